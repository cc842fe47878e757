"""What overlapping generation and training gains: loop_sync.py against loop_async.py.

    python bench/overlap.py [tail] [judge] [compute] [--steps N] [--rounds 2]
        speed of both loops; about three minutes a workload
    python bench/overlap.py accuracy [--steps 80] [--rounds 3]
        held-out reward of both loops, as many seeds as rounds; about ten minutes

    tail       answers of 16 tokens, one of each group of 16 has 256; 64 samples a step
    judge      a reward that takes 0.5 s, as a call to a service does; 256 samples a step
    compute    the toy as it is: 256 short answers, nothing to wait for

Both loops have the same two ranks and the same work. The synchronous loop trains and generates on
both ranks. The asynchronous one trains on one and generates on the other. Runs alternate, because
timings on a shared machine are only comparable side by side.

Printed are samples a second and the shares of a step that trainers and engines wait. The first
quarter of the steps and the last two do not count. Then comes the bound of the asynchronous step,
max(rollout, train, sync), from two measurements of the stages:

    as they ran   seconds of the asynchronous step in which engines generated, trainers trained and
                  weights were sent; what the step takes beyond this bound is waiting
    alone         rollout in the asynchronous loop without a trainer's work; train and sync in the
                  synchronous loop on one rank

The stages lose what they take beyond the second bound to each other, on cores that share caches and
memory, and to the processes beside them.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

STEPS = {"tail": 12, "judge": 24, "compute": 20}
WORKLOADS = {
    "tail": [
        *("--prompts-per-step", "4", "--samples-per-prompt", "16"),
        *("--max-response-tokens", "256", "--max-staleness", "4"),
    ],
    "judge": [
        *("--prompts-per-step", "16", "--samples-per-prompt", "16"),
        *("--judges", "512", "--max-staleness", "4"),
    ],
    "compute": [],
}


def worker(loop: str, workload: str, stage: str, arguments: list[str]) -> None:
    """Run one rank: the loop's own main() with the workload's lengths and judge.

    stage: "all", or "rollout" to leave out a trainer's work.
    """
    from backends.sglang.engine import Engine
    from harness import checks, exits, flags
    import reward
    import rollout
    import train_step

    generate = Engine.generate

    async def with_a_tail(self, prompts_ids, sampling, **more):
        lengths = [
            {"max_new_tokens": 256 if i % 16 == 15 else 16, "ignore_eos": True}
            for i in range(len(prompts_ids))
        ]
        sampling = [{**one, **length} for one, length in zip(sampling, lengths)]
        return await generate(self, prompts_ids, sampling, **more)

    async def slow_judge(sample: rollout.Sample) -> float:
        await asyncio.sleep(0.5)
        return reward.exact_match(sample)

    if workload == "tail":
        Engine.generate = with_a_tail
        # No such answer is right. Any rule that gives different rewards will do.
        reward.REWARDS["exact"] = lambda sample: float(sum(sample.response_ids) % 2)
    if workload == "judge":
        reward.REWARDS["exact"] = slow_judge
    if stage == "rollout":
        train_step.pack = train_step.add_logprobs = lambda *args, **kwargs: []
        train_step.update_policy = lambda *args, **kwargs: {}
    sys.argv = [f"loop_{loop}.py", *arguments]
    module = __import__(f"loop_{loop}")
    settings = flags.parse_or_exit(module.Settings, checks.check_flags)
    exits.run_main(lambda: module.main(settings))


def measure(
    loop: str,
    workload: str,
    *,
    steps: int | None,
    ranks: int = 2,
    stage: str = "all",
    more: tuple[str, ...] = (),
) -> list[dict]:
    """Run once. Return the rows of metrics.jsonl."""
    steps = str(steps or STEPS[workload])
    arguments = ["--steps", steps, "--eval-samples", "2", "--eval-every", steps]
    arguments += ["--export", "--name", "run", *WORKLOADS[workload], *more]
    if loop == "sync" and "--max-staleness" in arguments:
        at = arguments.index("--max-staleness")
        del arguments[at : at + 2]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), __file__]
    command += ["worker", loop, workload, stage, *arguments]
    with tempfile.TemporaryDirectory() as folder:
        quiet = dict(stdin=subprocess.DEVNULL, capture_output=True, text=True)
        done = subprocess.run(command, cwd=folder, **quiet)
        if done.returncode:
            what = f"{loop} {workload} {stage} ended with {done.returncode}"
            sys.exit(f"{what}:\n{done.stderr[-5000:]}")
        lines = (Path(folder) / "runs/run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


def mean(rows: list[dict], key: str) -> float:
    rows = [row for row in rows if "step_s" in row]  # the others are evaluations
    steady = rows[len(rows) // 4 : -2]
    return sum(row[key] for row in steady) / len(steady)


def overlap(workload: str, *, rounds: int, steps: int | None) -> None:
    flags = WORKLOADS[workload]
    samples = int(flags[1]) * int(flags[3]) if flags else 256
    results = {"sync": [], "async": []}
    for _ in range(rounds):
        for loop, runs in results.items():
            rows = measure(loop, workload, steps=steps)
            keys = ("step_s", "train_s", "sync_s", "trainer_wait", "engine_wait")
            row = {key: mean(rows, key) for key in keys}
            runs.append(row)
            speed = f"{samples / row['step_s']:6.1f} samples/s   step {row['step_s']:.2f} s"
            waits = f"trainer waits {row['trainer_wait']:4.0%}"
            waits += f", engine waits {row['engine_wait']:4.0%}"
            print(f"{workload:8} {loop:5}  {speed}   {waits}", flush=True)
    sync_s, async_s = (sum(row["step_s"] for row in runs) / rounds for runs in results.values())
    print(f"{workload:8} async / sync = {sync_s / async_s:.2f} in samples a second")
    runs = results["async"]
    ran = {stage: sum(row[f"{stage}_s"] for row in runs) / rounds for stage in ("train", "sync")}
    ran["rollout"] = sum(row["step_s"] * (1 - row["engine_wait"]) for row in runs) / rounds
    rows = measure("sync", workload, ranks=1, steps=steps)
    rollout_alone = mean(measure("async", workload, stage="rollout", steps=steps), "step_s")
    alone = {"train": mean(rows, "train_s"), "sync": mean(rows, "sync_s"), "rollout": rollout_alone}
    for how, stages in (("as they ran", ran), ("alone", alone)):
        bound_s = max(stages.values())
        times = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in stages.items())
        bound = f"bound, stages {how}: max({times}) = {bound_s:.2f} s"
        share = f"the async step takes {async_s / bound_s:.2f} of it"
        print(f"{workload:8} {bound}; {share}", flush=True)
    print(flush=True)


def accuracy(*, rounds: int, steps: int) -> None:
    final = {"sync": [], "async": []}
    for seed in range(1, rounds + 1):
        for loop, results in final.items():
            more = ("--seed", str(seed), "--eval-samples", "1024")
            rows = measure(loop, "compute", steps=steps, more=more)
            results.append(rows[-1]["held_out"])
            rewards = f"{rows[0]['held_out']:.3f} -> {results[-1]:.3f}"
            print(f"seed {seed} {loop:5} held-out reward {rewards}", flush=True)
    sync, overlapped = (sum(results) / len(results) for results in final.values())
    difference = f"difference {overlapped - sync:+.3f}"
    print(f"means: sync {sync:.3f}, async {overlapped:.3f}, {difference}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what",
        nargs="*",
        metavar="|".join((*WORKLOADS, "accuracy")),
        help="the three workloads unless some are named",
    )
    parser.add_argument("--steps", type=int, help="of each run")
    parser.add_argument("--rounds", type=int)
    flags = parser.parse_args()
    if unknown := set(flags.what) - {*WORKLOADS, "accuracy"}:
        parser.error(f"{' '.join(unknown)} is none of: {', '.join(WORKLOADS)}, accuracy")
    if flags.steps is not None and flags.steps < 4 and flags.what != ["accuracy"]:
        parser.error(
            f"--steps {flags.steps} leaves no step to measure: the first quarter and the last two"
            " are left out; use at least 4"
        )
    for what in flags.what or WORKLOADS:
        if what == "accuracy":
            accuracy(rounds=flags.rounds or 3, steps=flags.steps or 80)
        else:
            overlap(what, rounds=flags.rounds or 2, steps=flags.steps)


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(*sys.argv[2:5], sys.argv[5:])
    else:
        main()
