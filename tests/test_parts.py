"""One answer as several samples: what data.sample.split_off makes of it, from the rollout to the
advantages and the metrics.

Why: an answer that counted once for each of its parts would move its group's mean towards its own
reward, and long conversations are split more often. Not covered: the trainer, for which a part is a
sample like any other.
"""

from types import SimpleNamespace

import numpy as np
import pytest
from test_in_flight import StandIn, run_steps

from advantages import ADVANTAGES
from backends.huggingface.config import read_config
from common.settings import REPOSITORY, RolloutSettings
from data.prompts import load_data
from data.sample import Sample, by_answer, split_off
from harness import evaluate
from losses import LossSettings
from harness.metrics import batch_metrics
from reward import Judge, RewardSettings, add_advantages, compute_rewards
import rollout

TOY = str(REPOSITORY / "toy")


@pytest.fixture
def data(one_rank):
    return load_data(TOY, RolloutSettings(), read_config(TOY), seed=1)


async def two_turns(engine, samples, data, settings, *, cache=""):
    """Answer twice. The second turn of the first sample of a group does not see the first one."""
    answered = list(samples)
    await rollout.answer(engine, answered, data, settings, cache=cache)
    for sample in answered:
        if sample.index == 0:
            sample.metrics["turns"] = 2
            split_off(samples, sample)
            sample.prompt_ids = [1, 9, 14]
    await rollout.answer(engine, answered, data, settings, cache=cache)


def group(rng, *, size: int = 4, number: int = 0) -> list[Sample]:
    samples = []
    for index in range(size):
        n = int(rng.integers(3, 9))
        mask = rng.integers(0, 2, n).tolist()
        one = Sample([1], group=number, index=index, response_ids=[3] * n, loss_mask=mask)
        one.reward, one.old_logprobs, one.ref_logprobs = float(rng.random()), rng.random(n), [0] * n
        one.weight_versions, one.rollout_logprobs = [0] * n, [0.0] * n
        samples.append(one)
    return samples


def cut(sample: Sample, at: int) -> tuple[Sample, Sample]:
    """The sample as a part and an end, as a rollout would have written them."""
    whole = {name: getattr(sample, name) for name in ("response_ids", "loss_mask")}
    whole |= {name: list(getattr(sample, name)) for name in ("old_logprobs", "ref_logprobs")}
    shared = dict(group=sample.group, reward=sample.reward)
    first = {name: values[:at] for name, values in whole.items()}
    last = {name: values[at:] for name, values in whole.items()}
    notes = {"part_of": sample.index}
    part = Sample([1], index=100 + sample.index, notes=notes, **first, **shared)
    return part, Sample([2], index=sample.index, **last, **shared)


@pytest.mark.parametrize("kl_in", ["loss", "reward"])
@pytest.mark.parametrize("name", ADVANTAGES)
def test_no_tokens_advantage_depends_on_how_an_answer_is_split(name, kl_in):
    rng = np.random.default_rng(5)
    whole = [sample for number in range(3) for sample in group(rng, number=number)]
    ends, parts = [], []
    for i, sample in enumerate(whole):
        if i % 2:
            part, end = cut(sample, 2)
            parts.append(part)
            ends.append(end)
        else:
            ends.append(sample)
    split = [*ends, *parts]  # parts behind all others, as the synchronous loop has them
    settings, loss = RewardSettings(advantage=name), LossSettings(kl_coef=0.1, kl_in=kl_in)
    add_advantages(split, settings, loss, 100)
    found = [np.concatenate([part.advantages for part in answer]) for answer in by_answer(split)]
    add_advantages(whole, settings, loss, 100)
    for sample, advantages in zip(whole, found):
        np.testing.assert_array_equal(sample.advantages, advantages)


def test_by_hand_two_answers_one_of_which_has_three_parts():
    """Rewards 1 and 0: the mean is 1/2. Counted by samples it would be 3/4."""
    right = Sample([1], group=0, index=0, response_ids=[3], loss_mask=[1], reward=1.0)
    wrong = Sample([1], group=0, index=1, response_ids=[4], loss_mask=[1], reward=0.0)
    samples = [right, wrong]
    for _ in range(2):
        split_off(samples, right)
        right.response_ids, right.loss_mask = [3], [1]
    assert [sample.index for sample in samples] == [0, 1, 2, 3]
    add_advantages(samples, RewardSettings(advantage="dr_grpo"), LossSettings(), 8)
    assert [sample.advantages.tolist() for sample in samples] == [[0.5], [-0.5], [0.5], [0.5]]


def test_an_answer_is_judged_once_and_a_failure_masks_all_of_it():
    judged = []

    def judge(sample):
        judged.append((sample.index, sample.response_ids))
        if sample.group:
            raise OSError("no service")
        return 0.25

    samples = []
    for number in range(2):
        sample = Sample([1], group=number, response_ids=[3, 4], loss_mask=[1, 1])
        samples.append(sample)
        split_off(samples, sample)
        sample.response_ids, sample.loss_mask = [5], [1]
    compute_rewards(samples, Judge(judge, 4))
    assert sorted(judged) == [(0, [5]), (0, [5])]
    assert [sample.reward for sample in samples] == [0.25, 0.25, None, None]
    assert [sample.loss_mask for sample in samples] == [[1], [1, 1], [0], [0, 0]]
    metrics = batch_metrics(samples, version=0)
    assert (metrics["reward"], metrics["reward_errors"]) == (0.25, 1)
    assert metrics["response_tokens"] == 3


def test_a_rollout_may_return_more_samples_than_it_was_given(data):
    engine = StandIn(lambda group: 0)
    prompts = [Sample([1, 3], "0", group=number) for number in range(2)]
    samples = rollout.generate(engine, prompts, data, RolloutSettings(), n=2, answer=two_turns)
    assert [(s.group, s.index) for s in samples] == [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (1, 2)]
    assert [s.prompt_ids for s in samples] == [[1, 9, 14], [1, 3]] * 2 + [[1, 3]] * 2
    assert all(s.response_ids == [5, 2] and s.loss_mask == [1, 1] for s in samples)
    again = [Sample.from_json(sample.to_json()) for sample in samples]
    assert [sample.is_part for sample in again] == [False] * 4 + [True] * 2
    for sample in samples:
        sample.reward = 1.0
    assert batch_metrics(samples, version=0)["turns"] == 1.0  # 2 in half of the answers


def test_the_queue_hands_over_parts_with_their_group(data):
    """And counts an answer that is discarded once: every third group teaches nothing."""

    def judge(sample):
        return float(sample.index) if sample.group % 3 else 0.0

    asked = dict(answer=two_turns, judge=judge, steps=4, max_staleness=1, dynamic_sampling=1)
    given, _ = run_steps(data, lambda group: 0, **asked)
    for samples in given:
        kept, discarded = rollout.split_discarded(samples)
        assert len(by_answer(kept)) == 6
        assert [len(parts) for parts in by_answer(kept)] == [2, 1] * 3
        assert all(
            part.reward == end.reward for part, end in map(lambda p: (p[0], p[-1]), by_answer(kept))
        )
        assert discarded["replaced"] % 2 == 0


def test_an_evaluation_counts_answers(data, monkeypatch):
    engine = StandIn(lambda group: 0)
    held_out = [Sample([1, 3], "0", group=number, source="toy") for number in range(3)]
    run = SimpleNamespace(
        settings=SimpleNamespace(
            rollout=RolloutSettings(eval_samples_per_prompt=2), reward=RewardSettings()
        ),
        data=SimpleNamespace(
            held_out=held_out, end_ids=data.end_ids, seed=1, tokenizer=data.tokenizer
        ),
        engine_index=0,
        engines=1,
        group=None,
        record=SimpleNamespace(log_eval=lambda step, samples, metrics, is_alone: metrics),
    )
    monkeypatch.setattr(rollout, "all_gather", lambda samples, group: samples)
    judge = Judge(lambda sample: float(sample.index == 0), 4)
    evaluation = evaluate.Evaluation(run, engine, judge, two_turns)
    metrics = evaluation.evaluate(0)
    assert len(evaluation.samples) == 6
    assert metrics["held_out"] == metrics["pass@1"] == 0.5
    assert metrics["pass@2"] == 1.0
