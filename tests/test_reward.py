"""Judging answers, dynamic sampling, evaluation, and how a batch gets its advantages.

Why: a judge's error must not look like a reward of 0, and a judge that hangs must not stop a run.
The estimators of advantages are in tests/oracle, the mathematical reward is in test_math_judge.py.
Not covered: judges that are services.
"""

import asyncio
import math
import re
import threading
import time
from dataclasses import replace
from itertools import combinations, islice
from types import SimpleNamespace

import numpy as np
import pytest

import reward
import rollout
from common.settings import RolloutSettings
from conftest import ROOT
from data.sample import Sample
from harness.evaluate import eval_metrics, majority_is_right, pass_at_k
from losses import LossSettings
from harness.metrics import batch_metrics
from reward import (
    Judge,
    RewardSettings,
    add_advantages,
    compute_rewards,
    exact_match,
    is_uninformative,
    math_reward,
)
from rollout import replace_uninformative, split_discarded


def answer(response="", label="", *, group=0, reward=None, finish="stop") -> Sample:
    answered = dict(
        response_ids=[5, 2],
        response=response,
        loss_mask=[1, 1],
        weight_versions=[3, 3],
        finish_reason=finish,
    )
    return Sample([1], label=label, group=group, reward=reward, **answered)


def test_exact_match_wants_an_ended_answer():
    assert exact_match(answer("538", "538")) == 1
    assert exact_match(answer("5380", "538")) == 0
    # This answer was cut off. It might have gone on.
    assert exact_match(answer("538", "538", finish="length")) == 0


@pytest.mark.parametrize("label", ["42 ", "42\n", " 42", 42])
def test_exact_match_does_not_compare_the_blanks_around_a_label(label):
    assert exact_match(answer("42", label)) == 1 and exact_match(answer(" 42\n", label)) == 1
    assert exact_match(answer("4 2", label)) == 0


@pytest.mark.parametrize("label, response, right", [
    (3.0, "3", 1), (3.0, "3.0", 1), (3.5, "3", 0), (30.0, "3", 0), ("3.0", "3", 0), (3, "3.0", 0),
])  # fmt: skip
def test_a_whole_number_that_parquet_made_a_float_is_matched(label, response, right):
    assert exact_match(answer(response, label)) == right


@pytest.mark.parametrize("label", [None, math.nan, ["None"], {"a": 1}, True, " "])
@pytest.mark.parametrize("reward_function", [exact_match, math_reward])
def test_a_label_that_nothing_can_equal_is_an_error_and_no_zero(reward_function, label):
    sample = answer(str(label), label)
    compute_rewards([sample], Judge(reward_function))
    assert sample.reward is None
    assert sample.loss_mask == [0, 0]
    assert sample.error.startswith("ValueError")


def test_a_reward_of_a_fork_takes_any_label(monkeypatch):
    """Only the shipped rewards compare with the label; another may need a sentence, or none."""
    monkeypatch.setitem(reward.REWARDS, "mine", lambda sample: 1.0)
    assert reward.label_problems("mine") is None
    assert reward.label_problems("exact")([None]) != [""]


# --- evaluation ---------------------------------------------------------------------------------


def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_answer():
    # One of 4 answers is right. 3 of the 6 pairs hold it, and 3 of the 4 triples.
    assert [pass_at_k(4, 1, k) for k in (1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1.0]
    assert pass_at_k(4, 0, 2) == 0
    assert pass_at_k(4, 3, 2) == 1
    assert pass_at_k(10**4, 1, 10**3) == pytest.approx(0.1)
    for n, right, k in ((5, 2, 3), (6, 1, 2), (7, 4, 2), (6, 6, 1)):
        draws = list(combinations([True] * right + [False] * (n - right), k))
        assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, draws)) / len(draws))


@pytest.mark.parametrize("answers, is_right, expected", [
    (["7", "7", "8"], [1, 1, 0], True),
    (["7", "8", "8"], [1, 0, 0], False),
    (["0.5", "8", "1/2", "8", "9/18"], [1, 0, 1, 0, 1], True),  # one value, written in three ways
    (["7", "8"], [1, 0], True),
    (["8", "7"], [0, 1], False),  # a tie: the first
    (["", "", "7"], [0, 0, 1], True),  # an empty answer has no vote
    (["", ""], [0, 0], False),
    ([], [], False),
])  # fmt: skip
def test_majority(answers, is_right, expected):
    assert majority_is_right(answers, list(map(bool, is_right))) is expected


def test_one_answer_to_each_prompt_of_one_set_is_one_number():
    samples = [answer(group=group, reward=r) for group, r in enumerate([1.0, 0.0, None, 0.5])]
    # A reward of 0.5 counts as 0.5.
    assert eval_metrics(samples) == {"held_out": 0.5, "held_out_errors": 1}
    assert eval_metrics(samples[:2]) == {"held_out": 0.5} and eval_metrics([]) == {}


def test_several_sets_and_answers_by_hand():
    """Set a has two prompts with 1 and 2 right answers of 3. Set b has one prompt with none."""
    rewards = {0: ["a", 1.0, 0.0, 0.0], 1: ["a", 1.0, 0.0, 1.0], 2: ["b", 0.0, 0.5, None]}
    samples = [
        answer("no" if r != 1 else f"yes {i}", group=g, reward=r)
        for g, (_, *row) in rewards.items()
        for i, r in enumerate(row)
    ]
    for sample in samples:
        sample.source = rewards[sample.group][0]
    of_a = {
        "held_out": 3 / 6,
        "pass@1": 3 / 6,
        "pass@2": (2 / 3 + 1) / 2,
        "pass@3": 1,
        "majority@3": 1 / 2,
    }
    # One answer of set b could not be judged.
    of_b = {"held_out": 0.5 / 2, "pass@1": 0, "pass@2": 0, "majority@3": 0}
    metrics = eval_metrics(samples)
    both = {key: (of_a[key] + of_b.get(key, of_a[key])) / 2 for key in of_a}
    assert metrics.pop("held_out_errors") == 1
    both |= {f"{key}/a": value for key, value in of_a.items()}
    both |= {f"{key}/b": value for key, value in of_b.items()}
    assert metrics == pytest.approx(both)
    assert eval_metrics([sample for sample in samples if sample.group < 2]) == pytest.approx(of_a)
    metrics |= batch_metrics(samples, version=3)
    # The answer that could not be judged does not count.
    assert metrics["reward/a"] == 0.5
    assert metrics["reward/b"] == 0.25
    assert not [key for key in batch_metrics(samples[:6], version=3) if "/" in key]
    in_glossary = {r"/[ab]$": "/NAME", r"pass@\d": "pass@k", r"majority@\d": "majority@N"}
    names = set(metrics)
    for pattern, name in in_glossary.items():
        names = {re.sub(pattern, name, key) for key in names}
    glossary = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert [name for name in sorted(names) if f"`{name}`" not in glossary] == []


@pytest.mark.parametrize("samples, expected", [
    ([], {}),
    ([answer(), answer()], {"held_out_errors": 2}),
    ([answer(group=0), answer(group=1)], {"held_out_errors": 2}),
])  # fmt: skip
def test_an_evaluation_of_which_nothing_could_be_judged_has_no_mean(samples, expected):
    assert eval_metrics(samples) == expected


def test_a_step_of_empty_responses_has_metrics():
    samples = [
        replace(answer(reward=0.0), response_ids=[], loss_mask=[], weight_versions=[])
        for _ in range(2)
    ]
    metrics = batch_metrics(samples, version=3)
    assert metrics == {
        "reward": 0,
        "reward_errors": 0,
        "zero_std_groups": 1,
        "response_tokens": 0,
        "truncated": 0,
    }


def test_a_step_in_which_nothing_was_scored_or_sampled_has_metrics():
    assert "reward" not in (metrics := batch_metrics([answer(), answer()], version=3))
    assert metrics["reward_errors"] == 2
    assert batch_metrics([], version=3) == {"reward_errors": 0}


# --- advantages ---------------------------------------------------------------------------------


def advantages(samples, **settings) -> list[float]:
    add_advantages(samples, RewardSettings(**settings), LossSettings(), max_response_tokens=8)
    return [sample.advantages[0] for sample in samples]


def test_grpo_by_hand():
    # Rewards 1 0 0 1 have the mean 0.5 and the unbiased variance 4 * 0.25 / 3. The second group's
    # rewards are equal, so its advantages are 0.
    samples = [
        answer(reward=r, group=g)
        for g, r in [(0, 1.0), (0, 0.0), (1, 1.0), (0, 0.0), (1, 1.0), (0, 1.0)]
    ]
    unit = 0.5 / (math.sqrt(1 / 3) + 1e-6)
    assert advantages(samples) == pytest.approx([unit, -unit, 0, -unit, 0, unit])
    metrics = batch_metrics(samples, version=4)
    assert metrics["reward"] == pytest.approx(4 / 6)
    assert metrics["zero_std_groups"] == 0.5
    assert metrics["staleness_max"] == 1


def test_overlong_responses_lose_reward_but_the_metric_shows_what_the_judge_said():
    samples = [answer(reward=1.0), answer(reward=1.0)]
    # 7 of at most 8 tokens, with a buffer of 4, lose 3/4.
    samples[1].response_ids, samples[1].loss_mask = [5] * 7, [1] * 7
    assert advantages(samples, advantage="dr_grpo", overlong_buffer=4) == pytest.approx(
        [0.375, -0.375]
    )
    assert batch_metrics(samples, version=3)["reward"] == 1.0


def test_kl_in_the_reward_is_taken_where_it_arises():
    samples = [answer(reward=1.0), answer(reward=0.0)]
    for sample in samples:
        # The estimator k1 gives 0, then 2.
        sample.old_logprobs = np.float32([-1.0, -1.0])
        sample.ref_logprobs = np.float32([-1.0, -3.0])
    add_advantages(
        samples,
        RewardSettings(advantage="dr_grpo"),
        LossSettings(kl_coef=0.1, kl_estimator="k1", kl_in="reward"),
        max_response_tokens=8,
    )
    # With --kl-coef 0.1 both samples lose 0.2, so only the rewards differ.
    assert [list(sample.advantages) for sample in samples] == [[0.5, 0.5], [-0.5, -0.5]]
    samples[1].ref_logprobs = samples[1].old_logprobs
    add_advantages(
        samples,
        RewardSettings(advantage="dr_grpo"),
        LossSettings(kl_coef=0.1, kl_estimator="k1", kl_in="reward"),
        max_response_tokens=8,
    )
    assert samples[0].advantages[0] == pytest.approx(0.8 - 0.4)


def test_groups_that_teach_nothing_are_refilled(monkeypatch):
    """Prompts 4 and 6 have mixed rewards, all others equal ones.

    The step has two prompts, so two rounds fill both places with mixed ones.
    """
    rounds = []

    def generate(engine, prompts, data, settings, **_):
        rounds.append([prompt.group for prompt in prompts])
        return [
            answer(group=prompt.group, label=str(prompt.group))
            for prompt in prompts
            for _ in range(settings.samples_per_prompt)
        ]

    seen = []

    def judge(sample):
        seen.append(sample.group)
        return float(sample.group in (4, 6) and seen.count(sample.group) % 2)

    monkeypatch.setattr(rollout, "generate", generate)
    first = [answer(group=group, reward=1.0) for group in (0, 1) for _ in range(2)]
    coming = iter(Sample([1], group=group) for group in range(4, 20))
    prompts = SimpleNamespace(take=lambda n: list(islice(coming, n)))

    def replaced(judge, most_rounds: int):
        settings = SimpleNamespace(
            rollout=RolloutSettings(samples_per_prompt=2),
            reward=RewardSettings(dynamic_sampling=most_rounds),
        )
        samples = replace_uninformative(first, None, prompts, Judge(judge), None, settings)
        return split_discarded(samples)

    samples, set_aside = replaced(judge, 3)
    assert rounds == [[4, 5], [6]]
    assert [sample.group for sample in samples] == [4, 4, 6, 6]
    assert set_aside == {"dropped": 0, "replaced": 6}
    assert not any(is_uninformative(group) for group in reward.by_group(samples))
    capped, set_aside = replaced(lambda sample: 0.0, 1)
    # After the last round the step trains on groups of equal rewards all the same.
    assert len(capped) == 4
    assert set_aside["replaced"] == 4


def test_coroutine_judges_wait_together():
    waiting, most = 0, 0

    async def judge(sample):
        nonlocal waiting, most
        waiting += 1
        most = max(most, waiting)
        await asyncio.sleep(0.01)
        waiting -= 1
        return 1.0

    samples = [answer() for _ in range(20)]
    compute_rewards(samples, Judge(judge, 8))
    assert most == 8 and all(sample.reward == 1.0 for sample in samples)


def test_a_failing_judge_is_counted_not_scored_zero(capsys):
    samples = [answer(label=label, group=0) for label in "abcd"]

    def judge(sample):
        if sample.label == "b":
            raise KeyError("judge is broken")
        return float("nan") if sample.label == "c" else float(sample.label == "a")

    compute_rewards(samples, Judge(judge))
    advantages(samples)
    assert [sample.reward for sample in samples] == [1.0, None, None, 0.0]
    assert samples[1].loss_mask == [0, 0]
    assert list(samples[1].advantages) == [0, 0]
    assert "judge is broken" in samples[1].error
    # The mean is over the two samples that have a reward.
    assert samples[0].advantages[0] == -samples[3].advantages[0] > 0
    assert batch_metrics(samples, version=3)["reward_errors"] == 2
    assert "judge is broken" in capsys.readouterr().out


def test_a_judge_that_hangs_fails_on_that_answer_only():
    """Its thread is left behind, and its place is free again.

    Nothing waits for that thread, not even the end of the process.
    """
    release = threading.Event()
    samples = [answer(label=label) for label in "hhab"]
    compute_rewards(
        samples,
        Judge(lambda sample: release.wait(60) if sample.label == "h" else 1.0, 2, timeout_s=1),
    )
    assert [sample.reward for sample in samples] == [None, None, 1.0, 1.0]
    assert samples[0].loss_mask == [0, 0]
    assert "has not returned within --judge-timeout-s 1" in samples[0].error
    release.set()


def test_a_judge_that_fails_on_everything_masks_all_samples():
    """The run goes on: the only prompt of a step may have a bad label."""
    samples = [answer(), answer()]
    compute_rewards(samples, Judge(lambda sample: 1 / 0))
    assert [sample.reward for sample in samples] == [None, None]
    assert [sample.loss_mask for sample in samples] == [[0, 0]] * 2


def test_a_long_response_is_not_printed_or_kept_whole(capsys):
    def quotes_it(sample):
        raise ValueError(f"no verdict on {sample.response}")

    compute_rewards([sample := answer("9" * 100_000)], Judge(quotes_it))
    printed = capsys.readouterr().out
    assert len(printed) < 10_000
    assert "ValueError: no verdict on 999" in printed
    assert "100002 characters" in printed
    assert len(sample.error) < 2000


def test_an_answer_on_which_the_judge_hangs_is_not_printed_whole(capsys):
    release = threading.Event()
    compute_rewards([answer("9" * 5000)], Judge(lambda sample: release.wait(60), timeout_s=0.1))
    release.set()
    printed = capsys.readouterr().out
    assert "9" * 70 in printed and "9" * 81 not in printed and "[5002 characters]" in printed


def test_waiting_for_a_place_does_not_count_towards_the_timeout():
    """A function that judges one answer at a time needs more time for all than one may take."""
    lock = threading.Lock()

    def one_at_a_time(sample):
        with lock:
            time.sleep(0.5)
        return 1.0

    one_at_a_time.at_a_time = 1
    samples = [answer() for _ in range(8)]
    compute_rewards(samples, Judge(one_at_a_time, 32, timeout_s=3))
    assert [sample.reward for sample in samples] == [1.0] * 8
