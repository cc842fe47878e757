"""torchrun worker of test_groups.py: ranks without an engine that meet, wait for one another, end.

    torchrun --nproc-per-node 2 two_ranks.py stopped FOLDER
"""

import json
import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
import cpu  # noqa: F401  before sglang, for the asynchronous loop
import run


def stopped(folder: Path) -> None:
    """Rank 1 stands still before the second exchange: to the other it is as a lost machine."""
    everyone = run.init_distributed(wait_s=4)
    run.all_gather_bytes(b"", everyone)
    if everyone.rank() == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    run.all_gather_bytes(b"", everyone)


def killed_once(folder: Path) -> None:
    """Rank 1 is killed when all have met, and once more while they meet, before all is well."""
    start = len(list(folder.glob("start-*-rank-1")))
    if os.environ["RANK"] == "1":
        (folder / f"start-{start}-rank-1").touch()
    if start == 1 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    everyone = run.init_distributed(int(os.environ.get("ROLLOUT_RANKS", 0)), wait_s=30)
    run.all_gather_bytes(b"", everyone)
    if start == 0 and everyone.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    seen = run.all_gather_bytes(os.environ["TORCHELASTIC_RESTART_COUNT"].encode(), everyone)
    if everyone.rank() == 0:
        (folder / "seen.json").write_text(json.dumps([count.decode() for count in seen]))


if __name__ == "__main__":
    run.run_main(lambda: globals()[sys.argv[1]](Path(sys.argv[2])))
