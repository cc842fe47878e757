"""Conversations with a tool under both loops: held-out reward, and speed beside a slow tool.

    python bench/tools.py accuracy [--steps 30] [--seeds 1 2 3]     about three minutes a seed
    python bench/tools.py speed [--steps 16] [--rounds 2] [--delay-s 0.3] [--prompts-per-step 16]

Both loops have the same two ranks and the same work, that of examples/tool_use.py. They start from
the same folder, which a warm start has written. Runs alternate, because timings on a shared machine
are only comparable side by side.

accuracy prints the held-out reward of 1,024 prompts before the first step and after the last. speed
prints samples a second; the first quarter of the steps and the last two do not count. Both print
which share of a later turn's prompt the engine had in its prefix cache. The asynchronous loop has
less of it: new weights do not read what older ones have cached.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))
from overlap import mean

SCRIPTS = {"sync": "tool_use.py", "async": "tool_use_async.py"}
STALENESS = 2  # of the asynchronous loop in speed; else a step ahead is too short for two calls
SAMPLES_PER_PROMPT = 16


def run(loop: str, folder: Path, **flags) -> list[dict]:
    """Run an example's loop once on two ranks. Return the rows of its metrics.jsonl."""
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    words = [word.replace("_", "-") if word.startswith("--") else word for word in words]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(ROOT / "examples" / SCRIPTS[loop])]
    command += [*words, "--export"]
    quiet = dict(stdin=subprocess.DEVNULL, capture_output=True, text=True)
    done = subprocess.run(command, cwd=folder, **quiet)
    if done.returncode:
        sys.exit(f"{loop} ended with {done.returncode}:\n{done.stderr[-5000:]}")
    path = folder / "runs" / flags["name"] / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def warm_start(folder: Path, seed: int, warm_steps: int, start: str) -> str:
    """Return a folder of the toy that has learned to call: start, or one that is made here."""
    if start:
        return str(Path(start).resolve())
    name = f"warm{seed}"
    asked = dict(steps=1, eval_samples=2, warm_steps=warm_steps, seed=seed, name=name)
    run("sync", folder, **asked)
    return str(folder / "runs" / name / "warm-start")


def cached(rows: list[dict]) -> str:
    """Return the share of the later turns' prompts that was in the cache, over a run's steps."""
    steps = [row for row in rows if "later_prompt_tokens" in row]
    read, all_of_them = (
        sum(row[f"later_{name}_tokens"] for row in steps) for name in ("cached", "prompt")
    )
    return f"from the cache {read / all_of_them:4.0%}" if all_of_them else "no later turn"


def accuracy(folder: Path, warm: dict, *, steps: int, seeds: list[int]) -> None:
    """Print the held-out reward of both loops for each seed, and the means."""
    final = {loop: [] for loop in SCRIPTS}
    for seed in seeds:
        model = warm_start(folder, seed, **warm)
        for loop, results in final.items():
            asked = dict(steps=steps, seed=seed, eval_samples=1024, eval_every=steps)
            rows = run(loop, folder, model=model, warm_steps=0, name=f"{loop}{seed}", **asked)
            results.append(rows[-1]["held_out"])
            rewards = f"{rows[0]['held_out']:.3f} -> {results[-1]:.3f}"
            print(f"seed {seed} {loop:5} held-out reward {rewards}   {cached(rows)}", flush=True)
    sync, overlapped = (sum(results) / len(results) for results in final.values())
    means = f"means: sync {sync:.3f}, async {overlapped:.3f}"
    print(f"{means}, difference {overlapped - sync:+.3f}", flush=True)


def speed(
    folder: Path, warm: dict, *, steps: int, rounds: int, delay_s: float, prompts: int
) -> None:
    """Print the samples a second of both loops, and their ratio. prompts: of a step."""
    model, ratios = warm_start(folder, 1, **warm), []
    for number in range(rounds):
        step_s = {}
        for loop in SCRIPTS:
            asked = dict(steps=steps, eval_samples=2, eval_every=steps, tool_delay_s=delay_s)
            asked |= dict(prompts_per_step=prompts, samples_per_prompt=SAMPLES_PER_PROMPT)
            if loop == "async":
                asked |= dict(max_staleness=STALENESS)
            rows = run(loop, folder, model=model, warm_steps=0, name=f"{loop}-{number}", **asked)
            step_s[loop] = one_s = mean(rows, "step_s")
            waits = f"trainer waits {mean(rows, 'trainer_wait'):4.0%}, {cached(rows)}"
            calls = f"{mean(rows, 'tool_calls'):.2f} calls a sample"
            rate = f"{prompts * SAMPLES_PER_PROMPT / one_s:6.1f} samples/s   step {one_s:.2f} s"
            print(f"delay {delay_s:g} s {loop:5} {rate}   {waits}, {calls}", flush=True)
        ratios.append(step_s["sync"] / step_s["async"])
    shown = f"{statistics.mean(ratios):.2f}"
    shown += f" ± {statistics.stdev(ratios):.2f}" if rounds > 1 else ""
    batch = f"{prompts} prompts a step, delay {delay_s:g} s"
    print(f"{batch}: async / sync = {shown} in samples a second (n {rounds})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("accuracy", "speed"))
    parser.add_argument("--steps", type=int, help="of each run: 30 for accuracy, 16 for speed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--delay-s", type=float, default=0.3)
    parser.add_argument("--prompts-per-step", type=int, default=16)
    parser.add_argument("--warm-steps", type=int, default=600, help="of the warm start")
    parser.add_argument("--start", default="", help="folder of a toy that calls, if there is one")
    flags = parser.parse_args()
    if flags.what == "speed" and flags.steps is not None and flags.steps < 4:
        left_out = "the first quarter and the last two are left out; use at least 4"
        parser.error(f"--steps {flags.steps} leaves no step to measure: {left_out}")
    with tempfile.TemporaryDirectory() as folder:
        warm = dict(warm_steps=flags.warm_steps, start=flags.start)
        if flags.what == "accuracy":
            accuracy(Path(folder), warm, steps=flags.steps or 30, seeds=flags.seeds)
        else:
            asked = dict(rounds=flags.rounds, delay_s=flags.delay_s)
            asked |= dict(prompts=flags.prompts_per_step)
            speed(Path(folder), warm, steps=flags.steps or 16, **asked)


if __name__ == "__main__":
    main()
