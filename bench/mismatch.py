"""How far trainer and engine are apart, and what brings them together; what routing replay costs.

    python bench/mismatch.py runs [--model toy] [--out OUT.png] [--steps 80] [--seeds 3]
        one row a variant: means over the first 20 steps, and held-out reward at the end
    python bench/mismatch.py cost [--steps 40]
        a step of toy/glm with replay, and with FP8 rounding too, divided by one with neither

`runs` starts runs of loop_sync.py on one rank, two at a time, since trainer and engine take turns.
Rows say mean ± standard deviation over the seeds. Held-out reward is that of 1,024 prompts with one
answer each, so its standard error is 0.01. A variant has TIS only if it names it. "routed
otherwise": route_mismatch, see docs/metrics.md.

`cost` has three trainers with their engines in one process, and lets them take turns, step by
step. The learning rate is 0, so all always have the same prompts and the same weights.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from algorithms import all_runs, spread

FIRST = 20  # steps that the means are over
BF16, FP8 = "--rollout-dtype bf16 --correction none", "--correction none"
DENSE = {
    "BF16 rollout": BF16,
    "FP8 rollout": FP8,
    "FP8 + TIS": "--correction tis",
    "FP8 + FP8-consistent trainer": f"{FP8} --train-numerics fp8",
}
EXPERTS = {
    "BF16 rollout": f"{BF16} --routing-replay compare",
    "BF16 + replay": f"{BF16} --routing-replay rollout",
    "FP8 rollout": f"{FP8} --routing-replay compare",
    "FP8 + TIS": "--correction tis --routing-replay compare",
    "FP8 + replay": f"{FP8} --routing-replay rollout",
    "FP8 + replay + FP8-consistent trainer": (
        f"{FP8} --routing-replay rollout --train-numerics fp8"
    ),
}
KEYS = {
    "mismatch_abs": "mean abs difference of log-probs",
    "mismatch_k3": "k3 between trainer and engine",
    "route_mismatch": "routed otherwise",
    "held_out": "held-out reward",
}


def print_row(name: str, runs: list[list[dict]]) -> None:
    """Print one variant. runs: the rows of metrics.jsonl of each seed."""
    cells = []
    for key in ("mismatch_abs", "mismatch_k3", "route_mismatch"):
        firsts = [[row[key] for row in rows if key in row][:FIRST] for rows in runs]
        cells.append(spread(list(map(statistics.mean, firsts)), ".2e") if firsts[0] else "")
    cells.append(spread([rows[-1]["held_out"] for rows in runs]))
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def draw(found: dict[str, list[list[dict]]], path: str) -> None:
    """Draw the mean of the seeds and their range, over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawing, axes = plt.subplots(2, 2, figsize=(12, 8), constrained_layout=True)
    for axis, (key, title) in zip(axes.flat, KEYS.items()):
        for color, (name, runs) in enumerate(found.items()):
            steps = [row["step"] for row in runs[0] if key in row]
            columns = list(zip(*([row[key] for row in rows if key in row] for rows in runs)))
            middle = list(map(statistics.mean, columns))
            axis.plot(steps, middle, color=f"C{color}", label=name)
            axis.fill_between(
                steps, *(list(map(bound, columns)) for bound in (min, max)), color=f"C{color}",
                alpha=0.15,
            )  # fmt: skip
        is_mismatch = key.startswith("mismatch")
        axis.set(title=title, xlabel="step", yscale="log" if is_mismatch else "linear")
        axis.grid(alpha=0.3)
    axes.flat[-1].legend(fontsize=8)
    seeds = len(next(iter(found.values())))
    drawing.suptitle(f"mean of {seeds} seeds, and their range", fontsize=10)
    drawing.savefig(path, dpi=80)


def measure_runs(model: str, out: str | None, *, steps: int, seeds: int) -> None:
    has_experts = "n_routed_experts" in json.loads(
        (ROOT / model / "config.json").read_text(encoding="utf-8")
    )
    variants = EXPERTS if has_experts else DENSE
    variants = {name: f"{flags} --model {ROOT / model}" for name, flags in variants.items()}
    print(f"| {model} | {' | '.join(KEYS.values())} |\n|---|---|---|---|---|")
    found = {}
    for name, runs in all_runs(variants, seeds=seeds, steps=steps, every=min(10, steps)):
        found[name] = runs
        print_row(name, runs)
    if out:
        draw(found, out)


# --- the cost of replay ---------------------------------------------------------------------------


def measure_cost(steps: int) -> None:
    """Print the ratio of a step's times. The first step of each is not counted."""
    import os
    import socket
    from types import SimpleNamespace

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    alone = dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    os.environ.update(alone, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    import backends.megatron  # noqa: F401  before Megatron
    from backends.huggingface.config import read_config
    from backends.huggingface.fp8 import fp8_weights
    from backends.sglang.launch import launch_engine
    from common import distributed
    from common.settings import RolloutSettings, TrainSettings
    from data.prompts import load_data
    from losses import LossSettings
    import reward
    import rollout
    import train_step
    import weight_sync

    folder, settings, loss = str(ROOT / "toy" / "glm"), RolloutSettings(), LossSettings()
    config, group = read_config(folder), distributed.init_distributed()
    data = load_data(folder, settings, config, seed=1)
    judge = reward.Judge(reward.REWARDS["exact"])
    fp8 = fp8_weights(config, rollout_dtype="fp8", engine_tp=1)
    longest = settings.max_response_tokens
    modes = {"plain": {}, "with replay": dict(routing_replay="rollout")}
    modes["with replay and FP8 rounding"] = modes["with replay"] | dict(train_numerics="fp8")
    sides, times = {}, {mode: [] for mode in modes}
    for mode, changes in modes.items():
        train = TrainSettings(**changes, lr=0.0)
        limits = dict(temperature=settings.temperature, max_response_tokens=longest)
        limits |= dict(steps=steps, seed=1, fp8=fp8)
        trainer = train_step.build_trainer(folder, train, config, **limits)
        engine = launch_engine(folder, settings, config, seed=1, reports_experts=bool(changes))
        weights = weight_sync.WeightPath(trainer.gpt, trainer.layout, config, fp8, 2**28)
        run = SimpleNamespace(data=data, engine_index=0, engines=1, resumed_from=None)
        sides[mode] = trainer, engine, weights, rollout.PromptStream(run, settings)
        weight_sync.send_weights(weights, engine, version=0)
    for version in range(1, steps + 1):
        for mode in list(times)[:: 1 if version % 2 else -1]:
            trainer, engine, weights, prompts = sides[mode]
            started = time.perf_counter()
            samples = rollout.generate(engine, prompts.take_step(), data, settings)
            reward.compute_rewards(samples, judge)
            samples = rollout.all_gather(samples, group)
            batches = train_step.pack(trainer, samples)
            train_step.add_logprobs(trainer, batches, loss)
            reward.add_advantages(samples, reward.RewardSettings(), loss, longest)
            train_step.update_policy(trainer, batches, loss)
            weight_sync.send_weights(weights, engine, version=version)
            times[mode].append(time.perf_counter() - started)
    for _, engine, _, _ in sides.values():
        engine.shutdown()
    plain = times["plain"][1:]
    for mode, seconds in times.items():
        ratios = [one / other for one, other in zip(seconds[1:], plain)]
        spread_of = f"deviation {statistics.stdev(ratios):.3f}, {len(ratios)} steps"
        print(
            f"a step of toy/glm, {mode}: {statistics.median(seconds[1:]):.3f} s, ratio"
            f" {statistics.mean(ratios):.3f} ({spread_of})",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["runs", "cost"])
    parser.add_argument("--model", default="toy/glm", choices=["toy", "toy/glm"])
    parser.add_argument("--out")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seeds", type=int, default=3)
    flags = parser.parse_args()
    if flags.what == "cost":
        measure_cost(flags.steps or 40)
    else:
        measure_runs(flags.model, flags.out, steps=flags.steps or 80, seeds=flags.seeds)


if __name__ == "__main__":
    main()
