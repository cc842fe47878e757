"""Write tests/gpu/dump: three small steps of FP8 rollouts, and what a CPU's trainer says of them.

    python tests/gpu/make_dump.py

Run it without a GPU when the format of a dump changes, or the loss.
"""

import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DUMP = Path(__file__).resolve().parent / "dump"
ROOT = DUMP.parent.parent.parent
FLAGS = "--save-rollouts --steps 3 --prompts-per-step 4 --samples-per-prompt 8 --seed 3 --name dump"
COMPARED = ("loss", "entropy", "grad_norm", "mismatch_abs", "mismatch_k3")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
        command = [sys.executable, *launcher, str(ROOT / "loop_sync.py"), *FLAGS.split()]
        subprocess.run(command, cwd=folder, check=True)
        run = Path(folder) / "runs" / "dump"
        DUMP.mkdir(exist_ok=True)
        for file in sorted((run / "rollouts").iterdir()):
            shutil.copy(file, DUMP)
        rows = [
            json.loads(line)
            for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ]
    steps = [{name: row[name] for name in COMPARED} for row in rows if "loss" in row]
    about = dict(date=time.strftime("%Y-%m-%d"), machine=_processor(), flags=FLAGS)
    (DUMP / "cpu.json").write_text(
        json.dumps(about | {"steps": steps}, indent=2) + "\n", encoding="utf-8"
    )


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((x.split(":")[1].strip() for x in lines if "model name" in x), platform.machine())


if __name__ == "__main__":
    main()
