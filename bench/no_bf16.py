"""How long a step trains on a processor without BF16 instructions, in BF16 and in FP32.

    python bench/no_bf16.py [--rounds 2] [--steps 12]

Runs the toy with --train-dtype bf16 and fp32 in turn. Prints the median seconds of training a step
of each, and their ratio. A processor that has the instructions hides them here: from oneDNN by
ONEDNN_MAX_CPU_ISA, from torch by a function that answers no. So backends/cpu/ sees what a processor
with AVX512 alone shows, and computes with the same instructions.
"""

import argparse
import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]


def run_without_bf16(arguments: list[str]) -> None:
    """Run the loop in this process, with a torch that finds no BF16 instructions."""
    import torch

    torch.cpu._is_avx512_bf16_supported = torch.cpu._is_amx_tile_supported = lambda: False
    sys.argv = [str(ROOT / "loop_sync.py"), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


def train_seconds(dtype: str, steps: int) -> float:
    """Run once. Return the median of train_s, without the first two steps."""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "OMP_NUM_THREADS": "1"}
    flags = ["--train-dtype", dtype, "--steps", str(steps), "--export", "--name", "run"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", __file__, "--loop"]
    with tempfile.TemporaryDirectory() as folder:
        where = dict(cwd=folder, env=environment, stdout=subprocess.DEVNULL)
        subprocess.run([*command, *flags], check=True, **where)
        lines = (Path(folder) / "runs/run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return statistics.median([row["train_s"] for row in rows if "train_s" in row][2:])


def main() -> None:
    if sys.argv[1:2] == ["--loop"]:
        return run_without_bf16(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12, help="of each run, at least 3")
    options = parser.parse_args()
    for _ in range(options.rounds):
        bf16, fp32 = (train_seconds(dtype, options.steps) for dtype in ("bf16", "fp32"))
        print(f"train: bf16 {bf16:.3f} s, fp32 {fp32:.3f} s a step; ratio {bf16 / fp32:.2f}")


if __name__ == "__main__":
    main()
