"""Samples -> rewards -> advantages: judges, dynamic sampling, evaluation.

The estimators themselves are in advantages.py.

A reward is a function of one finished sample, plain or a coroutine; a fork writes its own and gives
it to Judge:

    def my_reward(sample: Sample) -> float:
        return float(len(sample.response) < 100)

A reward function that raises, or returns something that is not a finite number, is a fault of the
judge and not of the answer. Such a sample is not scored 0 in silence: its tokens are masked, it
does not count in its group's mean, and the metric reward_errors shows it. The run goes on.

A reward function may carry an attribute at_a_time: how many answers it can judge at once. Others
wait their turn, and their waiting does not count towards --judge-timeout-s.
"""

import asyncio
import functools
import math
import threading
import traceback
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from concurrent.futures import Future

import numpy as np
import torch
import torch.distributed as dist

from advantages import ADVANTAGES, Scores, overlong_penalty
from backends.sglang.engine import Engine
from common.settings import RewardSettings, RolloutSettings
from common.timeline import Timeline
from data import math_judge, reasoning_gym_tasks
from data.prompts import Data
from data.sample import Sample
from losses import KL_ESTIMATORS, LossSettings
from rollout import REPLACED, Prompts, all_gather_samples, generate, marks, my_share

Reward = Callable[[Sample], float | Awaitable[float]]


def exact_match(sample: Sample) -> float:
    """Return 1 if the response is the label, character for character, and was not cut off.

    Blanks around them do not count. Numbers compare by their text; a float 3.0 is also 3.
    """
    label = math_judge.label_text(sample.label)
    labels = {label, label.removesuffix(".0")} if isinstance(sample.label, float) else {label}
    return float(sample.finish_reason == "stop" and sample.response.strip() in labels)


def math_reward(sample: Sample) -> float:
    """Return 1 if the response's answer equals the label by the rules of math_rules/.

    0.5, 1/2 and \\frac{1}{2} are one answer. One that is too hard to judge is wrong, and
    notes["too_hard"] says so. Raises ValueError for a label that is no mathematics.
    """
    label = math_judge.label_text(sample.label)
    is_right, sample.answer, too_hard = math_judge.judged_in_worker(sample.response, label)
    if too_hard:
        sample.notes["too_hard"] = True
    return float(is_right)


def reasoning_gym_reward(sample: Sample) -> float:
    """Return the score of reasoning-gym's scorer for its problems, math_reward for other prompts."""
    if "reasoning_gym" not in sample.notes:
        return math_reward(sample)
    score, sample.answer = reasoning_gym_tasks.score(
        sample.response, *sample.notes["reasoning_gym"]
    )
    return score


math_reward.at_a_time = reasoning_gym_reward.at_a_time = math_judge.WORKERS


def label_problems(settings: RewardSettings) -> Callable[[list], list[str]]:
    """Return a function that says for each label why this reward cannot judge it; "" where it can.

    Each text goes on behind "the label ...": "is blank, and --reward math needs text or a number".
    """
    return functools.partial(math_judge.label_problems, reward=settings.reward)


REWARDS: dict[str, Reward] = {
    "exact": exact_match,
    "math": math_reward,
    "reasoning_gym": reasoning_gym_reward,
}


class Judge:
    """A reward function, and the thread whose event loop judges: all of a batch at once, as many at
    a time as `judges` says.

    A coroutine function runs on the loop itself; it is the right form for a judge that waits for a
    service. A plain function gets a thread for each answer, which is left behind should it hang: no
    later answer waits for it, nor does the end of the process.
    """

    def __init__(self, reward: Reward, judges: int = 32, timeout_s: float = 120.0):
        self.reward, self.timeout_s, self.timeline, self._busy, self._failed = (
            reward,
            timeout_s,
            Timeline(),
            0,
            False,
        )
        places = min(
            judges, getattr(reward, "at_a_time", judges)
        )  # what waits here is in front of the clock
        self._places, self._loop = asyncio.Semaphore(places), asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="judge-loop", daemon=True).start()

    def submit(self, samples: list[Sample]) -> Future:
        """Start judging: sets every sample's reward.

        Where the function fails it stays None, sample.error says why, and the tokens are masked.
        """
        return asyncio.run_coroutine_threadsafe(self._score_all(samples), self._loop)

    async def _score_all(self, samples: list[Sample]) -> None:
        await asyncio.gather(*map(self._score, samples))

    async def _score(self, sample: Sample) -> None:
        async with self._places:
            self._count(1)
            try:
                done, _ = await asyncio.wait(
                    [asyncio.ensure_future(self._call(sample))], timeout=self.timeout_s
                )
                if not done:
                    raise TimeoutError(
                        "the reward function has not returned within --judge-timeout-s"
                        f" {self.timeout_s:g}"
                    )
                sample.reward = float(done.pop().result())
                if not math.isfinite(sample.reward):
                    raise ValueError(f"the reward function returned {sample.reward}")
            # Whatever a user's reward function may raise: counted, shown, and the sample set aside
            except Exception as error:
                sample.reward, sample.loss_mask = None, [0] * len(sample.response_ids)
                sample.error = _cut(repr(error))
                if not self._failed:
                    trace = "\n".join(map(_cut, traceback.format_exc().splitlines()))
                    shown = _cut(repr(sample.response), most=80)
                    print(f"reward error, the first on this rank, on {shown}:\n{trace}", flush=True)
                self._failed = True
            finally:
                self._count(-1)

    async def _call(self, sample: Sample) -> float:
        if asyncio.iscoroutinefunction(self.reward):
            return await self.reward(sample)
        answer = Future()
        answer.set_running_or_notify_cancel()

        def run() -> None:
            try:
                answer.set_result(self.reward(sample))
            except Exception as error:  # it is the caller's, in another thread
                answer.set_exception(error)

        threading.Thread(target=run, name="judge", daemon=True).start()
        return await asyncio.wrap_future(answer)

    def _count(self, change: int) -> None:
        self._busy += change
        self.timeline.switch_to("reward" if self._busy else "wait")


def _cut(text: str, *, most: int = 1000) -> str:
    """Return a text, without its end where it is long: an answer can have 100,000 characters."""
    return text if len(text) <= most else f"{text[:most]} ... [{len(text)} characters]"


def compute_rewards(samples: list[Sample], judge: Judge) -> None:
    """Judge all samples and wait for the last. Where the reward function fails, reward is None."""
    judge.submit(samples).result()


def is_uninformative(samples: list[Sample]) -> bool:
    """Whether all rewards of a group are equal: compared with one another its answers teach
    nothing.
    """
    return len({sample.reward for sample in samples if sample.reward is not None}) < 2


def replace_uninformative(
    samples: list[Sample],
    engine: Engine | None,
    prompts: Prompts,
    data: Data,
    settings: RolloutSettings,
    rewards: RewardSettings,
    judge: Judge,
) -> list[Sample]:
    """Dynamic sampling, DAPO, arXiv 2503.14476, section 3.2: groups whose rewards are all equal are
    replaced by answers to new prompts, and only marked.

    Each round answers as many prompts as groups are to be replaced. What teaches nothing after the
    last round is trained as it is, with advantage 0.
    """
    replaced = []
    for _ in range(rewards.dynamic_sampling):
        groups = by_group(samples)
        uninformative = [group for group in groups if is_uninformative(group)]
        if not uninformative:
            break
        fresh = generate(
            engine, prompts.take(len(uninformative)), data, settings, n=settings.samples_per_prompt
        )
        compute_rewards(fresh, judge)
        replaced += [mark for group in uninformative for mark in marks(group, REPLACED)]
        samples = [
            sample for group in groups if not is_uninformative(group) for sample in group
        ] + fresh
    return samples + replaced


def by_group(samples: list[Sample]) -> list[list[Sample]]:
    groups = defaultdict(list)
    for sample in samples:
        groups[sample.group].append(sample)
    return list(groups.values())


def add_advantages(
    samples: list[Sample], settings: RewardSettings, loss: LossSettings, *, max_response_tokens: int
) -> None:
    """Set every sample's advantages, float64 [L], from the whole batch; every rank computes the
    same.

    With --kl-in reward the samples have old_logprobs and ref_logprobs. Samples without a reward are
    in no group and get advantages 0.
    """
    for sample in samples:
        sample.advantages = np.zeros(len(sample.response_ids))
    scored = [sample for sample in samples if sample.reward is not None]
    lengths = [len(sample.response_ids) for sample in scored]
    penalties = [
        overlong_penalty(length, max_tokens=max_response_tokens, buffer=settings.overlong_buffer)
        for length in lengths
    ]
    kl_T = np.zeros(sum(lengths))
    if loss.kl_coef and loss.kl_in == "reward":
        old_T, ref_T = (
            torch.from_numpy(_joined([getattr(sample, name) for sample in scored]))
            for name in ("old_logprobs", "ref_logprobs")
        )
        kl_T = KL_ESTIMATORS[loss.kl_estimator].function(old_T, ref_T, old_T).numpy()
    scores = Scores(
        rewards_N=np.array([sample.reward for sample in scored]) + penalties,
        group_N=np.array([sample.group for sample in scored], dtype=np.int64),
        lengths_N=np.array(lengths, dtype=np.int64),
        mask_T=_joined([sample.loss_mask for sample in scored]),
        penalties_T=loss.kl_coef * kl_T,
    )
    for sample, mine in zip(
        scored, np.split(ADVANTAGES[settings.advantage](scores), np.cumsum(lengths)[:-1])
    ):
        sample.advantages = mine


def _joined(rows: list) -> np.ndarray:
    return np.concatenate([np.zeros(0), *rows])


def evaluate(
    engine: Engine | None,
    data: Data,
    settings: RolloutSettings,
    judge: Judge,
    group: dist.ProcessGroup,
) -> tuple[list[Sample], dict[str, float]]:
    """--eval-samples-per-prompt scored answers to every held-out prompt and what they amount to, on
    every rank of the group; nothing where there are none.

    Collective.
    """
    mine = list(my_share(data.held_out, settings.engine_tp))
    samples = generate(
        engine, mine, data, settings, n=settings.eval_samples_per_prompt, cache="held-out"
    )
    compute_rewards(samples, judge)
    samples = sorted(all_gather_samples(samples, group), key=lambda sample: sample.group)
    return samples, eval_metrics(samples)


def eval_metrics(samples: list[Sample]) -> dict[str, float]:
    """Return held_out, the mean reward. With N > 1 answers to a prompt also pass@k and majority@N.

    k is 1, 2, 4, ... and N. An answer is right if its reward is 1 or more. Answers that the reward
    function failed on count in held_out_errors only: held_out is the mean of the others, and pass@k
    that of the prompts with at least k others. A metric is missing where nothing is left of it.
    With several held-out sets KEY/SET is that of a set, and KEY the mean of the sets.
    """
    sets = defaultdict(list)
    for group in by_group(samples):
        sets[group[0].source].append(group)
    of_set = {name: _set_metrics(groups) for name, groups in sets.items()}
    keys = dict.fromkeys(key for row in of_set.values() for key in row)
    rows = {key: [row[key] for row in of_set.values() if key in row] for key in keys}
    metrics = {key: sum(values) / len(values) for key, values in rows.items()}
    if errors := sum(sample.reward is None for sample in samples):
        metrics["held_out_errors"] = errors
    if len(of_set) > 1:
        metrics |= {f"{key}/{name}": x for name, row in of_set.items() for key, x in row.items()}
    return metrics


def _set_metrics(groups: list[list[Sample]]) -> dict[str, float]:
    n = max(map(len, groups))
    scored = [[sample for sample in group if sample.reward is not None] for group in groups]
    rewards = [sample.reward for group in scored for sample in group]
    metrics = {"held_out": sum(rewards) / len(rewards)} if rewards else {}
    if n == 1:
        return metrics
    is_right = [[sample.reward >= 1 for sample in group] for group in scored]
    for k in sorted({n, *(2**i for i in range(n.bit_length()))}):
        if of_k := [pass_at_k(len(right), sum(right), k) for right in is_right if len(right) >= k]:
            metrics[f"pass@{k}"] = sum(of_k) / len(of_k)
    answers = [[s.response.strip() if s.answer is None else s.answer for s in g] for g in scored]
    if votes := [majority_is_right(*group) for group in zip(answers, is_right) if group[1]]:
        metrics[f"majority@{n}"] = sum(votes) / len(votes)
    return metrics


def pass_at_k(n: int, right: int, k: int) -> float:
    """The chance that one of k answers is right, estimated without bias from n of which `right`
    are: 1 - C(n - right, k) / C(n, k); Chen et al. 2021, arXiv 2107.03374, equation 1.
    """
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def majority_is_right(answers: list[str], is_right: list[bool]) -> bool:
    """Whether the most frequent answer is right; of equally frequent ones, the one that was given
    first. An empty answer has no vote.

    Right answers are one answer however they are written, since the reward function found them
    equal to the label; wrong ones are told apart by their text, which is what the reward function
    took for the answer (math, reasoning_gym) or else the whole response.
    """
    votes = Counter(
        "right" if right else ("wrong", answer)
        for answer, right in zip(answers, is_right)
        if answer or right
    )
    return bool(votes) and votes.most_common(1)[0][0] == "right"


def batch_metrics(samples: list[Sample], *, version: int) -> dict[str, float]:
    """Return what a step's samples looked like; the reward of each source where there are several.

    version: of the weights that the step trains. A metric is missing where nothing is left of it:
    reward where no sample was scored, staleness where all responses are empty. too_hard counts the
    answers that passed the limit of the mathematical reward; it is missing where none did.
    """
    rewards = defaultdict(list)
    for sample in samples:
        rewards[sample.source] += [] if sample.reward is None else [sample.reward]
    scored, groups = [reward for mine in rewards.values() for reward in mine], by_group(samples)
    metrics = {}
    if len(rewards) > 1:
        of_source = sorted((name, mine) for name, mine in rewards.items() if mine)
        metrics = {f"reward/{name}": sum(mine) / len(mine) for name, mine in of_source}
    if scored:
        metrics["reward"] = sum(scored) / len(scored)
    metrics["reward_errors"] = len(samples) - len(scored)
    if too_hard := sum("too_hard" in sample.notes for sample in samples):
        metrics["too_hard"] = too_hard
    if samples:
        metrics["zero_std_groups"] = sum(map(is_uninformative, groups)) / len(groups)
        metrics["response_tokens"] = sum(len(s.response_ids) for s in samples) / len(samples)
        metrics["truncated"] = sum(s.finish_reason == "length" for s in samples) / len(samples)
    ages = [version - sampled_by for sample in samples for sampled_by in sample.weight_versions]
    if ages:
        metrics["staleness_max"] = max(ages)
        metrics["staleness"] = [ages.count(age) for age in range(max(ages) + 1)]
    return metrics
