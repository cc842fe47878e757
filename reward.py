"""Samples -> rewards -> advantages.

A reward is a function of one finished sample, plain or a coroutine. A fork adds its own to REWARDS:

    def my_reward(sample: Sample) -> float:
        return float(len(sample.response) < 100)

A reward function that raises, or returns something other than a finite number, has failed. That
says nothing about the answer: the sample keeps reward None and its tokens are masked. It does not
count in its group's mean, the metric reward_errors counts it, and the run goes on.

A reward function may carry attributes. at_a_time: how many answers it can judge at once; others
wait for their turn, and this wait does not count towards --judge-timeout-s. of_group: it is a
function of all samples of a group, in a list, and returns a list of rewards.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import tyro

from advantages import ADVANTAGES, Scores, overlong_penalty
from data import math_judge, reasoning_gym_tasks, text_rewards
from data.judge import Judge, Reward, compute_rewards
from data.remote_reward import is_url, remote_reward
from data.sample import Sample, by_answer, by_group
from losses import KL_ESTIMATORS, LossSettings

__all__ = ["Judge", "Reward", "by_group", "compute_rewards"]


# --- reward functions ---------------------------------------------------------------------------


def exact_match(sample: Sample) -> float:
    """Return 1 if the response is the label, character for character, and was not cut off.

    Blanks around them do not count. Numbers compare by their text; a float 3.0 is also 3.
    """
    label = math_judge.label_text(sample.label)
    labels = {label, label.removesuffix(".0")} if isinstance(sample.label, float) else {label}
    return float(sample.finish_reason == "stop" and sample.response.strip() in labels)


def math_reward(sample: Sample) -> float:
    """Return 1 if the response's answer equals the label by the rules of data/math_rules.

    0.5, 1/2 and \\frac{1}{2} are one answer. One that is too hard to judge is wrong, and
    notes["too_hard"] says so. Raises ValueError for a label that is no mathematics.
    """
    label = math_judge.label_text(sample.label)
    is_right, sample.answer, too_hard = math_judge.judged_in_worker(sample.response, label)
    if too_hard:
        sample.notes["too_hard"] = True
    return float(is_right)


def reasoning_gym_reward(sample: Sample) -> float:
    """Return the score of reasoning-gym's scorer for its problems, else that of math_reward."""
    if "reasoning_gym" not in sample.notes:
        return math_reward(sample)
    problem = sample.notes["reasoning_gym"]
    score, sample.answer = reasoning_gym_tasks.score(sample.response, *problem)
    return score


math_reward.at_a_time = reasoning_gym_reward.at_a_time = math_judge.WORKERS
# These compare with the label, so that a file's labels are checked before the start.
for _function in (exact_match, math_reward, reasoning_gym_reward):
    _function.needs_label = True

# EDIT HERE: reward. Write a function above, give it a name here: --reward takes it.
REWARDS: dict[str, Reward] = {
    "exact": exact_match,
    "math": math_reward,
    "reasoning_gym": reasoning_gym_reward,
    "f1": text_rewards.f1_reward,
    "choice": text_rewards.choice_reward,
    "majority": text_rewards.majority_reward,
}


def find_reward(name: str) -> Reward:
    """Return the reward function of a name in REWARDS, or one that asks the service at a URL."""
    return remote_reward(name) if is_url(name) else REWARDS[name]


@dataclass(frozen=True)
class RewardSettings:
    """Rewards and advantages: how responses are judged"""

    reward: str = "exact"
    """exact: the response must equal the label and end by itself. math: its answer must have the
    label's value; see data/math_rules. reasoning_gym: the task's own scorer for problems of
    reasoning-gym, math for all other prompts. f1: overlap of words with the label. choice: a
    letter. majority: equal to most answers of the group, without a label. See data/text_rewards.py.
    A URL: a service judges; see data/remote_reward.py."""
    advantage: tyro.extras.literal_type_from_choices(ADVANTAGES) = "grpo"
    """How to compute advantages from rewards; see advantages.py."""
    overlong_buffer: int = 0
    """Reduce the reward of long responses, by up to 1 and linearly over the last so many tokens
    before --max-response-tokens (DAPO); 0: off."""
    dynamic_sampling: int = 0
    """Replace groups whose rewards are all equal by responses to new prompts, at most so many times
    in a step (DAPO). 0: train on all groups."""
    judges: int = 32
    """Responses that a rank judges at the same time, so that a reward function may wait for a
    service."""
    judge_timeout_s: float = 120.0
    """A reward function that takes longer for one response has failed; the sample is masked and
    counted in reward_errors."""


def label_problems(reward: str) -> Callable[[list], list[str]] | None:
    """Return a function that says for each label why this reward cannot judge it; "" where it can.

    Each text completes "the label ...": "is blank, and --reward math needs text or a number". None
    for a service and for a function of a fork, which may judge by any label or by none.
    """
    function = REWARDS.get(reward)
    if getattr(function, "needs_label", False):
        return functools.partial(math_judge.label_problems, reward=reward)
    if reads := getattr(function, "reads", None):
        return functools.partial(text_rewards.label_problems, reads=reads, reward=reward)
    return None


# --- groups -------------------------------------------------------------------------------------


def is_uninformative(group: list[Sample]) -> bool:
    """Tell whether all rewards of a group are equal: its advantages would all be 0."""
    return len({sample.reward for sample in group if sample.reward is not None}) < 2


def add_advantages(
    samples: list[Sample],
    settings: RewardSettings,
    loss: LossSettings,
    max_response_tokens: int,
) -> None:
    """Set every sample's advantages, float64 [L], from the whole batch. Each rank gets the same.

    With --kl-in reward the samples have ref_logprobs, and those that --old-logprobs names. Samples
    without a reward belong to no group and get advantages 0. The parts of one answer
    (data.sample.split_off) are one row of Scores, so that an answer counts once in its group.
    """
    for sample in samples:
        sample.advantages = np.zeros(len(sample.response_ids))
    answers = by_answer([sample for sample in samples if sample.reward is not None])
    scored = [part for parts in answers for part in parts]
    limits = dict(max_tokens=max_response_tokens, buffer=settings.overlong_buffer)
    lengths_of = [[len(part.response_ids) for part in parts] for parts in answers]
    overlong = [overlong_penalty(max(of_parts), **limits) for of_parts in lengths_of]
    lengths = sum(lengths_of, [])
    kl_T, mask_T = np.zeros(sum(lengths)), _concatenated([s.loss_mask for s in scored])
    if loss.kl_coef and loss.kl_in == "reward":
        old = "rollout_logprobs" if loss.old_logprobs == "rollout" else "old_logprobs"
        old_T = torch.from_numpy(_concatenated([getattr(sample, old) for sample in scored]))
        ref_T = torch.from_numpy(_concatenated([sample.ref_logprobs for sample in scored]))
        kl_T = KL_ESTIMATORS[loss.kl_estimator].function(old_T, ref_T, old_T).numpy()
        kl_T = np.where(mask_T > 0, kl_T, 0)  # nan where the engine has not sampled
    scores = Scores(
        rewards_N=np.array([parts[0].reward for parts in answers]) + overlong,
        group_N=np.array([parts[0].group for parts in answers], dtype=np.int64),
        lengths_N=np.array([sum(of_parts) for of_parts in lengths_of], dtype=np.int64),
        mask_T=mask_T,
        penalties_T=loss.kl_coef * kl_T,
    )
    advantages_T = ADVANTAGES[settings.advantage](scores)
    for sample, mine_L in zip(scored, np.split(advantages_T, np.cumsum(lengths)[:-1])):
        sample.advantages = mine_L


def _concatenated(rows: list) -> np.ndarray:
    return np.concatenate([np.zeros(0), *rows])
