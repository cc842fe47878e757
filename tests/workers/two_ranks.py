"""torchrun worker of test_process_groups.py: ranks without an engine meet, wait, and end.

torchrun --nproc-per-node 2 two_ranks.py stopped FOLDER
"""

import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
import backends  # noqa: F401  before sglang, for the group of the asynchronous loop
import torch
import torch.distributed as dist

from common import distributed
from common.settings import RunSettings
from harness import exits, record, run_folder


@dataclass(frozen=True)
class Settings:
    run: RunSettings


def stopped(folder: Path) -> None:
    """Rank 1 stands still before the second exchange."""
    everyone = distributed.init_distributed(wait_s=4)
    distributed.all_gather_bytes(b"", everyone)
    if everyone.rank() == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    distributed.all_gather_bytes(b"", everyone)


def stopped_inside(folder: Path) -> None:
    """Rank 1 stands still in a collective that is no exchange, as megatron-core's are."""
    everyone = distributed.init_distributed(wait_s=4)
    distributed.all_gather_bytes(b"", everyone)
    if everyone.rank() == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    dist.all_reduce(torch.ones(1))


def killed_once(folder: Path) -> None:
    """Rank 1 is killed when all have met; then every rank says in which start it is."""
    is_second = (folder / "killed").exists()
    everyone = distributed.init_distributed(int(os.environ["ROLLOUT_RANKS"]), wait_s=30)
    distributed.all_gather_bytes(b"", everyone)
    if everyone.rank() == 1 and not is_second:
        (folder / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    seen = distributed.all_gather_bytes(os.environ["TORCHELASTIC_RESTART_COUNT"].encode(), everyone)
    if everyone.rank() == 0:
        counts = [count.decode() for count in seen]
        (folder / "seen.json").write_text(json.dumps(counts), encoding="utf-8")


def apart(folder: Path) -> None:
    """Each rank has a file system of its own, or so it looks: another working folder."""
    os.chdir(folder / os.environ["RANK"])
    run_folder.SHARED_S = 1.0
    record.Record(Settings(RunSettings(name="a")), "sync", distributed.init_distributed())


if __name__ == "__main__":
    exits.run_main(lambda: globals()[sys.argv[1]](Path(sys.argv[2])))
