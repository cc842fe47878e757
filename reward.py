"""Samples -> rewards -> advantages.

A reward is a plain function of one finished sample; a fork writes its own and passes it to compute_rewards:

    def my_reward(sample: Sample) -> float:
        return float(len(sample.response) < 100)

A reward function that raises, or returns something that is not a finite number, is a fault of the judge and not of the answer. Such a sample is not
scored 0 in silence: its tokens are masked, it does not count in its group's mean, and the metric reward_errors shows it.
"""

import math
import traceback
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from rollout import Data, Engine, RolloutSettings, Sample, all_gather_samples, generate, my_share

Reward = Callable[[Sample], float]


@dataclass(frozen=True)
class RewardSettings:
    """How answers are judged."""

    reward: Literal["exact", "math"] = "exact"
    """exact: the response equals the label and ended by itself. math: the last \\boxed{} or final number has the label's value (math-verify)."""


def exact_match(sample: Sample) -> float:
    """1 if the response is the label, character for character, and was not cut off."""
    return float(sample.finish_reason == "stop" and sample.response.strip() == str(sample.label))


def math_reward(sample: Sample) -> float:
    """1 if the last \\boxed{} of the response, or else its last number, equals the label in value: 0.5, 1/2 and \\frac{1}{2} are one answer.

    Parsing and comparison are math-verify's, which evaluates nothing: it parses LaTeX to SymPy under a time limit.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    gold = parse(f"\\boxed{{{sample.label}}}")
    if not gold:
        raise ValueError(f"the label {sample.label!r} is not a mathematical expression")
    _, boxed, tail = sample.response.rpartition("\\boxed{")
    if boxed:
        answer = parse(boxed + tail, extraction_config=[LatexExtractionConfig(boxed_match_priority=0)])
    else:
        answer = parse(sample.response, extraction_config=[ExprExtractionConfig(), LatexExtractionConfig()])
    return float(bool(answer) and verify(gold, answer))


REWARDS: dict[str, Reward] = {"exact": exact_match, "math": math_reward}


def compute_rewards(samples: list[Sample], reward: Reward) -> None:
    """Set sample.reward on each, None where the reward function failed; the first failure is printed. Raises RuntimeError if it fails on all."""
    errors = 0
    for sample in samples:
        try:
            sample.reward = float(reward(sample))
            if not math.isfinite(sample.reward):
                raise ValueError(f"the reward function returned {sample.reward}")
        except Exception as error:  # whatever a user's judge may raise: counted, shown, and the sample set aside
            if not errors:
                print(f"reward error on the response {sample.response!r}:\n{traceback.format_exc()}", flush=True)
            sample.reward, sample.metadata["reward_error"] = None, repr(error)
            errors += 1
    if samples and errors == len(samples):
        raise RuntimeError(f"the reward function failed on all {errors} samples; the first error is printed above")


def grpo_advantages(samples: list[Sample]) -> None:
    """Set sample.advantage = (reward - mean) / (std + 1e-6) over its group: GRPO, arXiv 2402.03300, section 4.1.2; std is unbiased, as in TRL and slime.

    The samples of a group are the answers to one prompt. Where all rewards are equal the advantage is 0: nothing to learn from. Samples without a
    reward get advantage 0 and an all-zero loss mask.
    """
    groups = defaultdict(list)
    for sample in samples:
        if sample.reward is None:
            sample.advantage, sample.loss_mask = 0.0, [0] * len(sample.response_ids)
        else:
            groups[sample.group].append(sample)
    for group in groups.values():
        mean = sum(sample.reward for sample in group) / len(group)
        variance = sum((sample.reward - mean) ** 2 for sample in group) / max(len(group) - 1, 1)
        for sample in group:
            sample.advantage = (sample.reward - mean) / (math.sqrt(variance) + 1e-6)


def evaluate(engine: Engine | None, data: Data, settings: RolloutSettings, reward: Reward) -> list[Sample]:
    """One scored answer to every held-out prompt, on every rank; empty where there are none. Collective."""
    samples = generate(engine, my_share(data.held_out, settings.engine_tp), data, settings, n=1)
    compute_rewards(samples, reward)
    return sorted(all_gather_samples(samples), key=lambda sample: sample.group)


def batch_metrics(samples: list[Sample], *, version: int) -> dict[str, float]:
    """What a step's samples looked like. version: of the weights that the step trains."""
    scored = [sample.reward for sample in samples if sample.reward is not None]
    groups = defaultdict(set)
    for sample in samples:
        groups[sample.group].add(sample.reward)
    ages = [version - token_version for sample in samples for token_version in sample.weight_versions]
    return {
        "reward": sum(scored) / len(scored),
        "reward_errors": len(samples) - len(scored),
        "zero_std_groups": sum(len(rewards) == 1 for rewards in groups.values()) / len(groups),
        "response_tokens": sum(len(sample.response_ids) for sample in samples) / len(samples),
        "truncated": sum(sample.finish_reason == "length" for sample in samples) / len(samples),
        "staleness_max": max(ages),
    }
