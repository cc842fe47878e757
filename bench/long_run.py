"""Do memory, open files, threads or the time of a step grow over a long run?

    python bench/long_run.py [sync|async] [--steps 500] [flags of the loop …]

Runs the loop on two ranks and measures each of its processes once a second. Compares the second
fifth of the steps with the last. Resident memory of a process may grow by 3 % and 16 MiB, since
allocators keep what they once needed. Open files and threads may grow by 2, and the median step by
15 %. A run that grows more says so and ends with 1.
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
    if title.startswith("sglang::scheduler"):
        return "engine"
    return f"rank {environment['RANK']}" if "RANK" in environment else "torchrun"


def run(loop: str, steps: int, flags: list[str], folder: Path) -> tuple[dict, list[dict]]:
    """Run the loop to its end. Return ({process: measurements}, rows of metrics).

    A measurement is (steps done, resident bytes, open files, threads).
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(ROOT / f"loop_{loop}.py"), "--name", "run"]
    command += ["--steps", str(steps), "--eval-every", "50", "--export", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    seen, metrics = defaultdict(list), folder / "runs" / "run" / "metrics.jsonl"
    with open(folder / "output", "w", encoding="utf-8") as output:
        printed = dict(stdout=output, stderr=output)
        process = subprocess.Popen(command, cwd=folder, env=environment, **printed)
        while process.poll() is None:
            time.sleep(1)
            done = metrics.read_bytes().count(b"\n") - 1 if metrics.exists() else 0
            root = psutil.Process(process.pid)
            for one in [root, *root.children(recursive=True)]:
                try:
                    name, now = name_of(one), (one.memory_info().rss, one.num_fds())
                    if name != "torchrun" or one == root:
                        measured = (done, *now, one.num_threads())
                        seen[f"{name}, process {one.pid}"].append(measured)
                except psutil.Error:
                    continue  # the process has just ended
    assert process.returncode == 0, (folder / "output").read_text(encoding="utf-8")[-3000:]
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return seen, [row for row in rows if "step_s" in row]  # the others are evaluations


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
            continue  # the process did not live long enough
        kinds = (
            ("resident memory", "MiB", 2**20, 1.03, 16),
            ("open files", "", 1, 1, 2),
            ("threads", "", 1, 1, 2),
        )
        for i, (what, unit, scale, ratio, more) in enumerate(kinds, start=1):
            a, b = (statistics.median(s[i] for s in part) / scale for part in (early, late))
            compare(f"{process}: {what}", a, b, a * ratio + more, unit)
    a, b = (
        statistics.median(r["step_s"] for r in rows if low * steps < r["step"] <= high * steps)
        for low, high in ((0.2, 0.4), (0.8, 1.0))
    )
    compare("step", a * 1000, b * 1000, a * 1150, "ms")
    if grown:
        sys.exit(f"grown: {', '.join(grown)}")


if __name__ == "__main__":
    main()
