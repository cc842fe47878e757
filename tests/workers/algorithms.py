"""Every algorithm on parallel layouts, run under torchrun by test_splits.py: loss and whole
gradient of one batch.

    torchrun --nproc-per-node N algorithms.py OUT_FOLDER CASES_FILE MODEL_FOLDER

CASES_FILE holds as JSON, of each case:

    {"splits": [tp, pp, cp], "microbatch_tokens": 70, "order": "given", "reversed" or "shuffled"}

Rank 0 writes OUT_FOLDER/losses.json, {case: {algorithm: metrics}}, and OUT_FOLDER/gradients.pt,
{case: {algorithm: {Hugging Face name: gradient}}}. The gradient is read off the weights. With
Adam's epsilon of 1 and no clipping the first step moves them by lr g / (|g| + 1). The hand-off's
own gather brings them together. No engine is started.
"""

import json
import random
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE)]  # also where a test imports this file

from advantages import ADVANTAGES
from groups import drop_megatron
from backends.huggingface.config import read_config
from common import distributed
from common.settings import TrainSettings
from harness import exits
from losses import AGGREGATIONS, CORRECTIONS, KL_ESTIMATORS, POLICY_LOSSES, LossSettings
import reward
from reward import RewardSettings
import rollout
import train_step
import weight_sync

import torch
import torch.distributed as dist

GROUPS, PER_GROUP, LR = 8, 3, 1e4
ALGORITHMS = {
    "grpo, ppo, token mean, tis": ({}, {}),
    "dr_grpo, constant": ({"advantage": "dr_grpo"}, {"aggregation": "constant"}),
    "rloo, sequence mean": ({"advantage": "rloo"}, {"aggregation": "sequence"}),
    "reinforce++, KL in the reward": (
        {"advantage": "reinforce++"},
        {"kl_coef": 0.1, "kl_in": "reward", "kl_estimator": "k1"},
    ),
    "reinforce++_baseline, k2": (
        {"advantage": "reinforce++_baseline"},
        {"kl_coef": 0.1, "kl_estimator": "k2"},
    ),
    "gspo": ({}, {"policy_loss": "gspo", "aggregation": "sequence"}),
    "cispo": ({}, {"policy_loss": "cispo"}),
    "gmpo": ({}, {"policy_loss": "gmpo", "aggregation": "sequence", "clip_high": 0.2}),
    "sapo": ({}, {"policy_loss": "sapo"}),
    "sapo, sequence mean": ({}, {"policy_loss": "sapo", "aggregation": "sequence"}),
    "against the engine": ({}, {"old_logprobs": "rollout", "correction": "none"}),
    "gmpo against the engine, KL in the reward": (
        {"advantage": "reinforce++"},
        {
            "policy_loss": "gmpo",
            "aggregation": "sequence",
            "old_logprobs": "rollout",
            "correction": "none",
            "kl_coef": 0.1,
            "kl_in": "reward",
        },
    ),
    "dual clip, overlong penalty": ({"overlong_buffer": 6}, {"dual_clip": 3.0}),
    "icepop": ({}, {"correction": "icepop"}),
    "decoupled": ({}, {"correction": "decoupled"}),
    "sequence tis": ({}, {"correction": "sequence_tis"}),
    "sequence mask": ({}, {"correction": "sequence_mask"}),
    "unbiased k3, entropy bonus": (
        {},
        {"kl_coef": 0.1, "kl_estimator": "unbiased_k3", "entropy_coef": 0.01},
    ),
    "low_var_kl, no correction": (
        {},
        {"correction": "none", "kl_coef": 0.1, "kl_estimator": "low_var_kl"},
    ),
}  # settings of reward and of loss
TABLES = {
    "advantage": ADVANTAGES,
    "policy_loss": POLICY_LOSSES,
    "aggregation": AGGREGATIONS,
    "correction": CORRECTIONS,
    "kl_estimator": KL_ESTIMATORS,
}


def not_named() -> dict[str, tuple[dict, dict]]:
    """Return an algorithm for each entry of a table that is no default and not named above."""
    defaults = RewardSettings(), LossSettings()
    found = {}
    for field, table in TABLES.items():
        settings = defaults[0] if field == "advantage" else defaults[1]
        named = {getattr(settings, field)}
        named |= {part[field] for pair in ALGORITHMS.values() for part in pair if field in part}
        for name in [name for name in table if name not in named]:
            fitting = {
                other: values[0] for other, values in getattr(table[name], "only", {}).items()
            }
            chosen = {field: name, **fitting} | (
                {"kl_coef": 0.1} if field == "kl_estimator" else {}
            )
            found[f"{field} {name}"] = (chosen, {}) if field == "advantage" else ({}, chosen)
    return found


ALGORITHMS |= not_named()


def batch(vocab: int) -> list[rollout.Sample]:
    """Ragged groups with everything that an algorithm looks at: masked tokens within a response, a
    wholly masked one, and one whose judge failed.
    """
    generator = torch.Generator().manual_seed(0)
    samples = []
    for i in range(GROUPS * PER_GROUP):
        prompt, response = (
            torch.randint(3, vocab, (n,), generator=generator).tolist()
            for n in (3 + i % 5, 1 + (7 * i) % 11)
        )
        mask = [0 if i == 3 or (i % 5 == 0 and j == 1) else 1 for j in range(len(response))]
        scored = None if i == 4 else float(torch.rand(1, generator=generator))
        samples.append(
            rollout.Sample(
                prompt,
                group=i // PER_GROUP,
                index=i % PER_GROUP,
                response_ids=response,
                loss_mask=mask,
                reward=scored,
            )
        )
    return samples


def give_rollout_logprobs(trainer, samples: list[rollout.Sample]) -> None:
    """The engine's log-probs: the trainer's own, and noise that some corrections cut off.

    Old ones from weights a little apart, so that ratios differ.
    """
    generator = torch.Generator().manual_seed(1)
    ordered = sorted(samples, key=lambda sample: (sample.group, sample.index))
    train_step.add_logprobs(trainer, train_step.pack(trainer, ordered))
    for sample in ordered:
        first, second = torch.randn(2, len(sample.response_ids), generator=generator).numpy()
        sample.rollout_logprobs = sample.old_logprobs + 0.5 * first
        sample.old_logprobs = sample.old_logprobs + 0.3 * second


def without_a_token(trainer, weights) -> list[bool]:
    """Whether a step says so and leaves the weights: without samples, all empty, all masked."""
    as_said, before = (
        [],
        {
            n: t.clone()
            for bucket in weight_sync.trainer_buckets(weights, quantize=False)
            for n, t in bucket
        },
    )
    masked = [
        rollout.Sample([5, 6], response_ids=[7] * n, loss_mask=[0] * n, rollout_logprobs=[-1.0] * n)
        for n in (3, 1, 9)
    ]
    for samples in ([], [rollout.Sample([5, 6]), rollout.Sample([7])], masked):
        batches = train_step.pack(trainer, samples)
        train_step.add_logprobs(trainer, batches)
        reward.add_advantages(samples, RewardSettings(), LossSettings(), max_response_tokens=12)
        metrics = train_step.update_policy(trainer, batches, LossSettings())
        after = (
            item
            for bucket in weight_sync.trainer_buckets(weights, quantize=False)
            for item in bucket
        )
        as_said.append(
            metrics == {"tokens": 0, "lr": LR} and all(torch.equal(before[n], t) for n, t in after)
        )
    return as_said


def measure(folder: str, splits: list[int], microbatch_tokens: int, order: str) -> tuple:
    """Return the losses and the gradients of every algorithm at one layout."""
    tp, pp, cp = splits
    config = read_config(folder)
    settings = TrainSettings(
        tp=tp,
        pp=pp,
        cp=cp,
        train_dtype="fp32",
        microbatch_tokens=microbatch_tokens,
        lr=LR,
        lr_schedule="constant",
        clip_grad=1e9,
        megatron=("adam_eps=1.0",),
    )
    losses, gradients = {}, {}
    drop_megatron()  # all trainers of a layout share its groups
    for name, (reward_changes, loss_changes) in ALGORITHMS.items():
        loss = LossSettings(**loss_changes)
        trainer = train_step.build_trainer(
            folder,
            settings,
            config,
            steps=4,
            seed=1,
            temperature=0.7,
            max_response_tokens=12,
            with_reference=loss.kl_coef > 0,
        )
        if trainer.reference is not None:  # a reference that differs from the model
            with torch.no_grad():
                for parameter in trainer.reference.parameters():
                    parameter.mul_(0.9)
        weights = weight_sync.WeightPath(
            trainer.gpt, trainer.layout, config, frozenset(), bucket_bytes=2**20
        )
        before = {
            n: t.clone()
            for bucket in weight_sync.trainer_buckets(weights, quantize=False)
            for n, t in bucket
        }
        samples = batch(config["vocab_size"])
        if order == "reversed":
            samples.reverse()
        elif order == "shuffled":
            random.Random(0).shuffle(samples)
        give_rollout_logprobs(trainer, samples)
        reward.add_advantages(
            samples, RewardSettings(**reward_changes), loss, max_response_tokens=12
        )
        batches = train_step.pack(trainer, samples)
        metrics = train_step.update_policy(trainer, batches, loss)
        losses[name] = {key: value for key, value in metrics.items() if key != "lr"}
        losses[name]["microbatches"] = sum(len(batch.microbatches) for batch in batches)
        moved = {
            n: (before[n] - t) / LR
            for bucket in weight_sync.trainer_buckets(weights, quantize=False)
            for n, t in bucket
        }
        gradients[name] = {n: m / (1 - m.abs()) for n, m in moved.items()}
    losses["no token counts"] = without_a_token(trainer, weights)
    return losses, gradients


def main() -> None:
    out, cases = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    distributed.init_distributed()
    losses, gradients = {}, {}
    for name, case in cases.items():
        losses[name], gradients[name] = measure(sys.argv[3], **case)
    if dist.get_rank() == 0:
        (out / "losses.json").write_text(json.dumps(losses), encoding="utf-8")
        torch.save(gradients, out / "gradients.pt")


if __name__ == "__main__":
    exits.run_main(main)
