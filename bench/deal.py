"""What --deal room gains over --deal fixed where one of two engines is slow.

    python bench/deal.py sync|async [--rounds 3] [--steps 12] [--share 0.25]

Two engines of the toy, and in the asynchronous loop a third rank. Nothing trains. The second
engine's process stands still for 1 - share of the time, in slices of 80 ms, as on a machine that
others use too. --share 1 leaves it as fast as the first one: what room costs where nothing is
gained. Every answer has 48 tokens. Runs alternate. Printed are samples a second, and how many
prompts each engine answered; the first quarter of the steps and the last two do not count.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

RUN = "--prompts-per-step 16 --samples-per-prompt 8 --max-response-tokens 48 --eval-samples 1"
RUN += " --debug-rollout-only --name run"
MORE = {"sync": [], "async": ["--rollout-ranks", "2"]}
RANKS = {"sync": 2, "async": 3}
SLICE_S = 0.08


def worker(loop: str, share: float, arguments: list[str]) -> None:
    """Run one rank of a loop; the last rank's engine is slowed down."""
    import loop_async
    import loop_sync
    from backends.sglang.engine import Engine
    from harness import checks, exits, flags

    generate, started, answered = Engine.generate, [], []

    async def long_answers(self, prompts_ids, sampling, **more):
        if not started and int(os.environ["RANK"]) == RANKS[loop] - 1:
            started.append(True)
            threading.Thread(target=slow_down, args=(self.processes, share), daemon=True).start()
        answered.extend({name.rpartition("-")[0] for name in more["request_ids"]})
        sampling = [{**one, "ignore_eos": True} for one in sampling]
        return await generate(self, prompts_ids, sampling, **more)

    Engine.generate = long_answers
    sys.argv = [f"loop_{loop}.py", *arguments]
    module = {"sync": loop_sync, "async": loop_async}[loop]
    settings = flags.parse_or_exit(module.Settings, checks.check_flags)
    exits.run_main(lambda: module.main(settings))
    Path(f"answered-{os.environ['RANK']}").write_text(str(len(answered)), encoding="utf-8")


def slow_down(processes, share: float) -> None:
    """Let an engine's processes run for a share of each slice of time."""
    while share < 1 and all(process.is_alive() for process in processes):
        for number, part in ((signal.SIGSTOP, 1 - share), (signal.SIGCONT, share)):
            for process in processes:
                os.kill(process.pid, number)
            time.sleep(SLICE_S * part)


def measure(loop: str, deal: str, *, steps: int, share: float) -> tuple[float, list[int]]:
    """Run once. Return (samples a second, prompts that each engine answered)."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(RANKS[loop]), __file__, "worker", loop, str(share)]
    command += [*RUN.split(), *MORE[loop]]
    command += ["--steps", str(steps), "--eval-every", str(steps), "--deal", deal]
    with tempfile.TemporaryDirectory() as folder:
        quiet = dict(stdin=subprocess.DEVNULL, capture_output=True, text=True)
        done = subprocess.run(command, cwd=folder, **quiet)
        if done.returncode:
            sys.exit(f"--deal {deal} ended with {done.returncode}:\n{done.stderr[-5000:]}")
        lines = (Path(folder) / "runs/run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
        answered = [
            int((Path(folder) / f"answered-{rank}").read_text(encoding="utf-8"))
            for rank in range(RANKS[loop])[-2:]
        ]
    step_s = [row["step_s"] for row in map(json.loads, lines) if "step_s" in row]
    return 16 * 8 / statistics.mean(step_s[len(step_s) // 4 : -2]), answered


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("loop", choices=[*RANKS])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--share", type=float, default=0.25)
    flags = parser.parse_args()
    if flags.steps < 4 or not 0 < flags.share <= 1 or flags.rounds < 1:
        parser.error("--steps must be at least 4, --rounds 1, and --share above 0 and at most 1")
    ratios = []
    for _ in range(flags.rounds):
        speeds = {}
        for deal in ("fixed", "room"):
            speeds[deal], answered = measure(flags.loop, deal, steps=flags.steps, share=flags.share)
            each = " and ".join(map(str, answered))
            print(f"--deal {deal:5}  {speeds[deal]:6.1f} samples/s   prompts {each}", flush=True)
        ratios.append(speeds["room"] / speeds["fixed"])
    spread = f" ± {statistics.stdev(ratios):.2f}" if len(ratios) > 1 else ""
    print(f"room / fixed = {statistics.mean(ratios):.2f}{spread} (n {len(ratios)})")


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(sys.argv[2], float(sys.argv[3]), sys.argv[4:])
    else:
        main()
