"""Do memory, open files, threads or the time of a step grow over a long run?

    python bench/long_run.py [sync|async] [--steps 500] [flags of the loop …]

Runs the loop on two ranks and looks at every process of it each second. A run that grows says so
and ends with 1: from the second fifth of the steps to the last, resident memory of a process may
grow by 3 % and 16 MiB (allocators keep what they once needed), open files and threads by 2, and the
median step by 15 %.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent


def name_of(process: psutil.Process) -> str:
    title, environment = " ".join(process.cmdline()), process.environ()
    return (
        "engine"
        if title.startswith("sglang::scheduler")
        else f"rank {environment['RANK']}"
        if "RANK" in environment
        else "torchrun"
    )


def run(loop: str, steps: int, flags: list[str], folder: Path) -> tuple[dict, list[dict]]:
    """({process: [(steps done, resident bytes, open files, threads), …]}, rows of metrics) of a run
    that ended well.
    """
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(ROOT / f"loop_{loop}.py"),
        "--name",
        "run",
    ]
    command += ["--steps", str(steps), "--eval-every", "50", "--export", *flags]
    seen, metrics = defaultdict(list), folder / "runs" / "run" / "metrics.jsonl"
    with open(folder / "output", "w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=output,
        )
        while process.poll() is None:
            time.sleep(1)
            done = metrics.read_bytes().count(b"\n") - 1 if metrics.exists() else 0
            for one in [
                process.pid,
                *(child.pid for child in psutil.Process(process.pid).children(recursive=True)),
            ]:
                try:
                    p = psutil.Process(one)
                    if name_of(p) != "torchrun" or one == process.pid:
                        seen[f"{name_of(p)}, process {one}"].append(
                            (done, p.memory_info().rss, p.num_fds(), p.num_threads())
                        )
                except psutil.Error:
                    continue  # it has just ended
    assert process.returncode == 0, (folder / "output").read_text(encoding="utf-8")[-3000:]
    return seen, [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()][1:]


def main() -> None:
    loop = sys.argv[1] if sys.argv[1:] and not sys.argv[1].startswith("--") else "sync"
    flags = sys.argv[2:] if sys.argv[1:] and not sys.argv[1].startswith("--") else sys.argv[1:]
    steps = int(flags[flags.index("--steps") + 1]) if "--steps" in flags else 500
    with tempfile.TemporaryDirectory() as folder:
        seen, rows = run(loop, steps, flags, Path(folder))
    grown = []

    def compare(what: str, early: float, late: float, limit: float, unit: str) -> None:
        print(f"  {what:34s} {early:9.1f} -> {late:9.1f} {unit}")
        if late > limit:
            grown.append(what)

    print(f"loop_{loop}.py, {steps} steps on two ranks; median of the second fifth -> of the last")
    for process, samples in seen.items():
        early, late = (
            [s for s in samples if low * steps <= s[0] < high * steps]
            for low, high in ((0.2, 0.4), (0.8, 1.0))
        )
        if len(early) < 3 or len(late) < 3:
            continue  # one that came and went
        kinds = (
            ("resident memory", "MiB", 2**20, 1.03, 16),
            ("open files", "", 1, 1, 2),
            ("threads", "", 1, 1, 2),
        )
        for i, (what, unit, scale, ratio, more) in enumerate(kinds, start=1):
            a, b = (
                statistics.median(sample[i] for sample in part) / scale for part in (early, late)
            )
            compare(f"{process}: {what}", a, b, a * ratio + more, unit)
    a, b = (
        statistics.median(
            row["step_s"] for row in rows if low * steps < row["step"] <= high * steps
        )
        for low, high in ((0.2, 0.4), (0.8, 1.0))
    )
    compare("step", a * 1000, b * 1000, a * 1150, "ms")
    if grown:
        sys.exit(f"grown: {', '.join(grown)}")


if __name__ == "__main__":
    main()
