"""Whether each algorithm learns: runs of the toy, three seeds each.

    python bench/algorithms.py table [NAME …] [--steps 40] [--seeds 3]
        held-out reward before and after, mean and standard deviation; about 30 s a run

Each run has one rank. Two runs share two cores, since trainer and engine of a synchronous run take
turns. The runs are compared by accuracy, which does not depend on speed. It is measured on 1,024
held-out prompts with one answer each at temperature 1, so its standard error is 0.01. Every row has
the loop's defaults except the flags shown. Nothing is tuned: a row says that an algorithm works
here, not that it is the best.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ALGORITHMS = {
    "GRPO, as the loop's defaults are: clip-higher, token mean, TIS": "",
    "GRPO, sequence mean": "--aggregation sequence",
    "Dr. GRPO": "--advantage dr_grpo --aggregation constant",
    "RLOO": "--advantage rloo",
    "REINFORCE++": "--advantage reinforce++ --kl-coef 0.01 --kl-in reward --kl-estimator k1",
    "REINFORCE++-baseline": "--advantage reinforce++_baseline --kl-coef 0.01 --kl-estimator k2",
    "DAPO": "--dynamic-sampling 3 --overlong-buffer 2",
    "GRPO, four mini-batches": "--minibatches 4",
    "dual clip, four mini-batches": "--minibatches 4 --dual-clip 3",
    "GSPO, four mini-batches": "--minibatches 4 --policy-loss gspo --aggregation sequence",
    "CISPO, two mini-batches": "--minibatches 2 --policy-loss cispo",
    "CISPO, four mini-batches": "--minibatches 4 --policy-loss cispo",
    "GMPO, four mini-batches": "--minibatches 4 --policy-loss gmpo --aggregation sequence",
    "SAPO, four mini-batches": "--minibatches 4 --policy-loss sapo --aggregation sequence",
    "sequence-level TIS": "--correction sequence_tis",
    "ratio against the engine": "--old-logprobs rollout --correction none",
    "no correction": "--correction none",
    "IcePop": "--correction icepop",
    "decoupled PPO": "--correction decoupled",
    "sequence mask": "--correction sequence_mask",
    "KL to the start, k3": "--kl-coef 0.01 --kl-estimator k3",
    "KL to the start, low_var_kl": "--kl-coef 0.01 --kl-estimator low_var_kl",
    "KL to the start, unbiased k3": "--kl-coef 0.01 --kl-estimator unbiased_k3",
    "entropy bonus": "--entropy-coef 0.003",
    "LoRA of rank 32": "--lora-rank 32 --lr 2e-3",
    "PPO with a critic": "examples/ppo_critic.py",
}


def measure(flags: str, seed: int, *, steps: int, every: int) -> list[dict]:
    """Run once. Return the rows of metrics.jsonl.

    flags: of loop_sync.py, or the path of another script and its flags.
    """
    script, *words = f"loop_sync.py {flags}".split()
    if flags.startswith("examples/"):
        script, *words = words
    words += ["--steps", str(steps), "--seed", str(seed), "--eval-every", str(every)]
    words += ["--eval-samples", "1024", "--export", "--name", "run"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", "1", str(ROOT / script), *words]
    with tempfile.TemporaryDirectory() as folder:
        quiet = dict(stdin=subprocess.DEVNULL, capture_output=True, text=True)
        done = subprocess.run(command, cwd=folder, **quiet)
        if done.returncode:
            what = f"{' '.join(command)} ended with {done.returncode}"
            raise RuntimeError(f"{what}:\n{done.stderr[-5000:]}")
        lines = (Path(folder) / "runs/run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


def all_runs(variants: dict[str, str], *, seeds: int, steps: int, every: int):
    """Yield (name, rows of each seed) of every variant, in order, as they are finished."""
    with ThreadPoolExecutor(2) as pool:
        futures = {
            name: [
                pool.submit(measure, flags, seed, steps=steps, every=every)
                for seed in range(1, seeds + 1)
            ]
            for name, flags in variants.items()
        }
        for name, runs in futures.items():
            yield name, [future.result() for future in runs]


def spread(values: list[float], digits: str = ".3f") -> str:
    deviation = f" ± {statistics.stdev(values):{digits}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{digits}}{deviation}"


def table(names: list[str], *, seeds: int, steps: int) -> None:
    print(f"| algorithm | flags | held-out reward after {steps} steps | best and worst seed |")
    print("|---|---|---|---|")
    variants = {name: ALGORITHMS[name] for name in names or ALGORITHMS}
    for name, runs in all_runs(variants, seeds=seeds, steps=steps, every=steps):
        start, end = ([rows[place]["held_out"] for rows in runs] for place in (0, -1))
        flags = f"`{ALGORITHMS[name]}`" if ALGORITHMS[name] else "none"
        rewards = f"{spread(start)} → {spread(end)}"
        print(f"| {name} | {flags} | {rewards} | {max(end):.3f}, {min(end):.3f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["table"])
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    flags = parser.parse_args()
    if unknown := set(flags.names) - set(ALGORITHMS):
        parser.error(
            f"{', '.join(map(repr, unknown))} is none of: {', '.join(map(repr, ALGORITHMS))}"
        )
    table(flags.names, seeds=flags.seeds, steps=flags.steps)


if __name__ == "__main__":
    main()
