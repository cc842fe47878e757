"""Samples -> rewards -> advantages.

A reward is a function of one finished sample, plain or a coroutine; a fork writes its own and gives it to Judge:

    def my_reward(sample: Sample) -> float:
        return float(len(sample.response) < 100)

A reward function that raises, or returns something that is not a finite number, is a fault of the judge and not of the answer. Such a sample is not
scored 0 in silence: its tokens are masked, it does not count in its group's mean, and the metric reward_errors shows it.
"""

import asyncio
import math
import threading
import traceback
from collections import defaultdict
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import torch.distributed as dist

import math_judge
from engine import Engine
from rollout import Data, RolloutSettings, Sample, all_gather_samples, generate, my_share
from run import Row

Reward = Callable[[Sample], float | Awaitable[float]]


@dataclass(frozen=True)
class RewardSettings:
    """How answers are judged."""

    reward: Literal["exact", "math"] = "exact"
    """exact: the response equals the label and ended by itself. math: the last \\boxed{} or final number has the label's value (math-verify)."""
    judges: int = 32
    """How many answers a rank judges at a time: a reward function that waits for a service then does not wait in line."""


def exact_match(sample: Sample) -> float:
    """1 if the response is the label, character for character, and was not cut off."""
    return float(sample.finish_reason == "stop" and sample.response.strip() == str(sample.label))


def math_reward(sample: Sample) -> float:
    """1 if the last \\boxed{} of the response, or else its last number, equals the label in value: 0.5, 1/2 and \\frac{1}{2} are one answer."""
    return float(math_judge.equal_in_worker(sample.response, str(sample.label)))


REWARDS: dict[str, Reward] = {"exact": exact_match, "math": math_reward}


class Judge:
    """A reward function, and the thread whose event loop judges: all of a batch at once, as many at a time as `judges` says.

    A coroutine function runs on the loop itself and costs no thread; it is the right form for a judge that waits for a service. A plain function runs in a
    pool of threads.
    """

    def __init__(self, reward: Reward, judges: int = 32):
        self.reward, self.row, self._busy, self._failed = reward, Row(), 0, False
        self._threads, self._places, self._loop = ThreadPoolExecutor(judges, "judge"), asyncio.Semaphore(judges), asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="judge-loop", daemon=True).start()

    def submit(self, samples: list[Sample]) -> Future:
        """Start judging; the result is None, and every sample has its reward: None, with the reason in the metadata, where the function fails."""
        return asyncio.run_coroutine_threadsafe(self._score_all(samples), self._loop)

    async def _score_all(self, samples: list[Sample]) -> None:
        await asyncio.gather(*map(self._score, samples))

    async def _score(self, sample: Sample) -> None:
        async with self._places:
            self._count(1)
            try:
                if asyncio.iscoroutinefunction(self.reward):
                    sample.reward = float(await self.reward(sample))
                else:
                    sample.reward = float(await self._loop.run_in_executor(self._threads, self.reward, sample))
                if not math.isfinite(sample.reward):
                    raise ValueError(f"the reward function returned {sample.reward}")
            except Exception as error:  # whatever a user's reward function may raise: counted, shown, and the sample set aside
                sample.reward, sample.metadata["reward_error"] = None, repr(error)
                if not self._failed:
                    print(f"reward error, the first on this rank, on the response {sample.response!r}:\n{traceback.format_exc()}", flush=True)
                self._failed = True
            finally:
                self._count(-1)

    def _count(self, change: int) -> None:
        self._busy += change
        self.row.mark("reward" if self._busy else "wait")


def compute_rewards(samples: list[Sample], judge: Judge) -> None:
    """Judge all samples and wait for the last. Raises RuntimeError if the reward function fails on all of them."""
    judge.submit(samples).result()
    if samples and all(sample.reward is None for sample in samples):
        raise RuntimeError(f"the reward function failed on all {len(samples)} samples; the first error is printed above")


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


def evaluate(engine: Engine | None, data: Data, settings: RolloutSettings, judge: Judge, group: dist.ProcessGroup) -> list[Sample]:
    """One scored answer to every held-out prompt, on every rank of the group; empty where there are none. Collective."""
    samples = generate(engine, my_share(data.held_out, settings.engine_tp), data, settings, n=1)
    compute_rewards(samples, judge)
    return sorted(all_gather_samples(samples, group), key=lambda sample: sample.group)


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
        "staleness": [ages.count(age) for age in range(max(ages) + 1)],
    }
