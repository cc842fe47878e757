"""The asynchronous loop's queue without SGLang: what a step gets, when it waits, what it drops.

Why: the loop's promises are kept here. No token is older than the bound K = --max-staleness. Each
group is trained once or counted as dropped. No due group waits while newer ones train. At most
(K + 1) steps' worth is in flight. A stand-in engine answers after seeded random times. Resuming is
in test_in_flight_resume.py, the real stack in test_loop_async.py. Not covered: several engines.
"""

import asyncio
import json
import random
import time
from types import SimpleNamespace

import pytest

import loop_async
import rollout

from backends.huggingface.config import read_config
from common.errors import BadInput, EngineDied
from common.settings import REPOSITORY, InFlightSettings, RolloutSettings, RunSettings
from common.timeline import Timeline
from data.prompts import load_data
from data.sample import Sample
from harness.checks import check_in_flight_flags
from loop_async import GroupQueue, check_staleness
from reward import Judge, RewardSettings
from rollout import DROPPED, REPLACED, split_discarded

TOY = str(REPOSITORY / "toy")
PER_STEP, STEPS = 3, 25


class StandIn:
    """Answer each group after seconds(group), and not before hold(engine, group) is false.

    An answer's first token has the version at its start, its last token the version at its end.
    """

    def __init__(self, seconds, hold=lambda engine, group: False):
        self.loop, self.version, self.timeline = asyncio.new_event_loop(), 0, Timeline()
        self.seconds, self.hold, self.started, self.aborted = seconds, hold, [], []

    def call(self, coroutine):
        return self.loop.run_until_complete(asyncio.wait_for(coroutine, 60))  # fail, do not hang

    async def generate(self, prompts_ids, sampling, *, request_ids, cache="", keep=True):
        group, first = int(request_ids[0].split("-")[-2]), self.version
        self.started.append(group)
        await asyncio.sleep(self.seconds(group))
        while self.hold(self, group):
            await asyncio.sleep(0.001)
        meta = {
            "finish_reason": {"type": "stop"},
            "output_token_logprobs": [(-1.0, 5, None), (-1.0, 2, None)],
        }
        versions = [first, self.version]
        return [
            dict(
                output_ids=[5, 2],
                meta_info=meta,
                weight_versions=versions,
                routed_experts=b"\x00\xff",
            )
            for _ in prompts_ids
        ]

    async def abort(self, request_ids):
        self.aborted.append(int(request_ids[0].split("-")[1]))


@pytest.fixture
def data(one_rank):
    return load_data(TOY, RolloutSettings(), read_config(TOY), seed=1)


def run_of(
    data, *, dynamic_sampling=0, per_step=PER_STEP, steps=STEPS, ranks=None, **settings
) -> SimpleNamespace:
    """Return what a queue needs of a run with one rollout rank.

    ranks: the states of a checkpoint, which are JSON.
    """
    checkpoint = SimpleNamespace(ranks=json.loads(json.dumps(ranks))) if ranks else None
    return SimpleNamespace(
        settings=loop_async.Settings(
            run=RunSettings(steps=steps),
            rollout=RolloutSettings(prompts_per_step=per_step, samples_per_prompt=2),
            in_flight=InFlightSettings(**settings),
            reward=RewardSettings(dynamic_sampling=dynamic_sampling),
        ),
        data=data,
        engine_index=0,
        engines=1,
        resumed_from=checkpoint,
    )


def run_steps(
    data,
    seconds,
    *,
    train_s=0.002,
    judge=lambda sample: float(sample.group % 2),
    steps=STEPS,
    dynamic_sampling=0,
    engine=None,
    answer=rollout.answer,
    **settings,
) -> tuple[list[list[Sample]], StandIn]:
    """Run the loop's body with a trainer that only takes time.

    Returns the samples that each step was given, and the engine.
    """
    engine = engine or StandIn(seconds)
    run = run_of(data, dynamic_sampling=dynamic_sampling, steps=steps, **settings)
    groups = GroupQueue(run, engine, Judge(judge, 4), answer)
    given = []
    for version in range(steps):
        given.append(groups.take_step(version))
        assert len(groups.queue) <= (run.settings.in_flight.max_staleness + 1) * PER_STEP
        engine.call(asyncio.sleep(train_s))
        engine.version = version + 1
    assert not groups.queue
    return given, engine


def new_queue(
    engine,
    *,
    ranks=None,
    judge=lambda sample: 1.0,
    dynamic_sampling=0,
    per_step=PER_STEP,
    steps=STEPS,
    **settings,
) -> GroupQueue:
    """Build a queue with prompts of its own. ranks: the states of a checkpoint, which are JSON."""
    data = load_data(TOY, RolloutSettings(), read_config(TOY), seed=1)
    asked = dict(dynamic_sampling=dynamic_sampling, per_step=per_step, steps=steps)
    return GroupQueue(run_of(data, ranks=ranks, **asked, **settings), engine, Judge(judge, 4))


def groups_of(samples: list[Sample], *, dropped: bool) -> list[int]:
    return sorted({sample.group for sample in samples if (sample.discarded == DROPPED) == dropped})


@pytest.mark.parametrize("bound", [0, 1, 4])
@pytest.mark.parametrize("train_s", [0.0, 0.02])
def test_without_oversampling_the_steps_are_those_of_the_synchronous_loop(data, bound, train_s):
    rng = random.Random(bound)
    given, engine = run_steps(
        data, lambda group: rng.choice([0, 0, 0, 0.05]), train_s=train_s, max_staleness=bound
    )
    for version, samples in enumerate(given):
        first = version * PER_STEP
        assert groups_of(samples, dropped=False) == list(range(first, first + PER_STEP))
        assert all(sample.reward == sample.group % 2 for sample in samples)
        kept, set_aside = split_discarded(samples)
        check_staleness(kept, version=version, max_staleness=bound)
        assert len(kept) == 2 * PER_STEP
        assert set_aside == {DROPPED: 0, REPLACED: 0}
    # The queue starts nothing that the run cannot train.
    assert engine.started == list(range(STEPS * PER_STEP))
    assert engine.aborted == []


def test_the_bound_is_used_not_only_kept(data):
    """With a slow trainer the queue is full: after K steps every token is exactly K old."""
    given, _ = run_steps(data, lambda group: 0, train_s=0.01, max_staleness=2)
    ages = [
        {version - sample.weight_versions[0] for sample in samples}
        for version, samples in enumerate(given)
    ]
    assert ages[2:] == [{2}] * (STEPS - 2)


@pytest.mark.parametrize("bound, oversample", [(0, 1), (1, 1), (2, 3)])
def test_oversampling_leaves_stragglers_and_loses_count_of_none(data, bound, oversample):
    rng = random.Random(7)
    given, engine = run_steps(
        data,
        lambda group: 0.5 if group % 5 == 0 else rng.random() * 0.004,
        max_staleness=bound,
        oversample=oversample,
    )
    trained, dropped = (
        [group for samples in given for group in groups_of(samples, dropped=kind)]
        for kind in (False, True)
    )
    # Each group is trained or dropped, once. Every step is full.
    assert sorted(trained + dropped) == engine.started
    assert len(trained) == STEPS * PER_STEP
    assert dropped and set(engine.aborted) == set(dropped)
    for version, samples in enumerate(given):
        assert len(groups_of(samples, dropped=True)) <= oversample or version == STEPS - 1
        check_staleness(split_discarded(samples)[0], version=version, max_staleness=bound)


@pytest.mark.parametrize("bound", [0, 1, 3])
def test_groups_that_teach_nothing_are_replaced_within_the_bound(data, bound):
    """Only every third group has rewards that differ. The queue replaces the others.

    Every group is trained or counted as replaced, once, and none is too old.
    """
    rng, judged = random.Random(3), []

    def judge(sample):
        judged.append(sample.group)
        return float(sample.group % 3 == 0 and judged.count(sample.group) % 2)

    given, engine = run_steps(
        data,
        lambda group: rng.random() * 0.004,
        max_staleness=bound,
        judge=judge,
        dynamic_sampling=20,
    )
    kept = [split_discarded(samples)[0] for samples in given]
    trained = sorted({s.group for samples in kept for s in samples})
    replaced = [s.group for samples in given for s in samples if s.discarded == REPLACED]
    assert all(group % 3 == 0 for group in trained)
    assert len(trained) == STEPS * PER_STEP
    assert sorted(trained + replaced[::2]) == sorted(engine.started)
    for version, samples in enumerate(kept):
        check_staleness(samples, version=version, max_staleness=bound)


@pytest.mark.parametrize("slow", ["answer", "judge"])
def test_a_dropped_group_is_neither_trained_nor_replaced(data, slow):
    """Every fifth group is late, in its answers or in its judging, and its rewards are all equal.

    The queue drops it and counts it as dropped only, not as replaced too.
    """
    judged = []

    def is_late(group):
        return group % 5 == 0

    def holds(engine, group):  # until the group is dropped, so that no machine is too slow
        return is_late(group) and group not in engine.aborted

    if slow == "answer":
        engine = StandIn(lambda group: 0.001, holds)
    else:
        engine = StandIn(lambda group: 0.001)

    def judge(sample):
        judged.append(sample.group)
        while slow == "judge" and holds(engine, sample.group):
            time.sleep(0.001)
        return 0.0 if is_late(sample.group) else float(sample.index)

    asked = dict(max_staleness=0, oversample=1, dynamic_sampling=5)
    given, _ = run_steps(data, None, engine=engine, train_s=0.1, judge=judge, steps=4, **asked)
    names = {
        reason: [s.group for samples in given for s in samples if s.discarded == reason]
        for reason in (DROPPED, REPLACED, "")
    }
    assert names[DROPPED]
    assert set(names[DROPPED]) == set(engine.aborted)
    assert names[REPLACED] == []
    assert not set(names[DROPPED]) & set(names[""])
    if slow == "answer":  # an answer that comes too late is not judged
        assert not set(judged) & set(names[DROPPED])


def test_a_dropped_group_ends_in_the_middle_of_a_tools_call(data):
    """The engine has no request to abort then. The group must not go on, and ask it again."""
    ended = []

    async def answer(engine, samples, data, settings, *, cache=""):
        group = samples[0].group
        if group % 5 == 0:
            try:
                await asyncio.sleep(30)  # a tool
            except asyncio.CancelledError:
                ended.append(group)
                raise
        await rollout.answer(engine, samples, data, settings, cache=cache)

    asked = dict(max_staleness=0, oversample=1, steps=4)
    given, engine = run_steps(data, lambda group: 0.001, answer=answer, train_s=0.01, **asked)
    dropped = [group for samples in given for group in groups_of(samples, dropped=True)]
    assert dropped and sorted(set(ended)) == [group for group in dropped if group % 5 == 0]
    assert not set(ended) & set(engine.started)


def test_replacing_has_a_cap(data):
    given, engine = run_steps(
        data,
        lambda group: 0,
        judge=lambda sample: 0.0,
        dynamic_sampling=2,
        max_staleness=0,
        steps=4,
    )
    for samples in given:
        kept, set_aside = split_discarded(samples)
        assert len(kept) == 2 * PER_STEP
        assert set_aside == {DROPPED: 0, REPLACED: 2 * 2 * PER_STEP}


def test_a_straggler_is_carried_over_while_the_bound_allows(data):
    # K = 2 and group 0 takes longer than a step. Steps go on with newer groups. Group 0 is trained
    # late and not dropped.
    engine = StandIn(lambda group: 0.001, lambda engine, group: group == 0 and engine.version < 1)
    given, _ = run_steps(
        data, None, engine=engine, train_s=0.3, max_staleness=2, oversample=1, steps=6
    )
    assert 0 not in groups_of(given[0], dropped=False)
    assert 0 in groups_of(given[2], dropped=False) + groups_of(given[1], dropped=False)
    assert 0 not in engine.aborted


def test_nothing_newer_is_trained_while_a_due_group_is_missing(data):
    """Without oversampling a step waits for its slow group, however many newer ones are ready."""
    given, _ = run_steps(data, lambda group: 0.1 if group == 4 else 0, max_staleness=4, steps=4)
    assert groups_of(given[1], dropped=False) == [3, 4, 5]


def test_what_fails_in_the_background_is_raised_in_the_loop(data):
    def seconds(group):
        if group == 7:
            raise EngineDied("the engine gave up")
        return 0

    with pytest.raises(EngineDied, match="gave up"):
        run_steps(data, seconds)


def test_an_answer_that_the_engine_aborted_ends_the_run(one_rank):
    """The queue did not ask for the abort: the engine gave up, and the error says why."""

    class Aborting(StandIn):
        async def generate(self, prompts_ids, sampling, *, request_ids, cache="", keep=True):
            outputs = await super().generate(prompts_ids, sampling, request_ids=request_ids)
            for output in outputs:
                output["meta_info"]["finish_reason"] = {"type": "abort", "message": "no memory"}
            return outputs

    with pytest.raises(EngineDied, match="aborted sample 0 of group 0: no memory"):
        new_queue(Aborting(lambda group: 0), max_staleness=0).take_step(0)


def test_a_failing_judge_masks_its_samples(data, capsys):
    given, _ = run_steps(data, lambda group: 0, judge=lambda sample: 1 / sample.group, steps=2)
    broken = [sample for sample in given[0] if sample.group == 0]
    assert all(sample.reward is None and not any(sample.loss_mask) for sample in broken)
    assert all(all(sample.loss_mask) for sample in given[0] if sample.group)
    assert capsys.readouterr().out.count("ZeroDivisionError") == 1  # shown once


def test_a_token_older_than_the_bound_stops_the_run():
    sample = Sample([1], group=9, response_ids=[5, 2], weight_versions=[3, 4])
    check_staleness([sample], version=5, max_staleness=2)
    rule = "has tokens of the weight versions .3, 4.; training version 5 .* none older than 4"
    with pytest.raises(RuntimeError, match=f"group 9 {rule}"):
        check_staleness([sample], version=5, max_staleness=1)
    # A token from a later version means that the trainer has missed an update.
    with pytest.raises(RuntimeError, match="group 9"):
        check_staleness([sample], version=3, max_staleness=1)


@pytest.mark.parametrize("changes, world_size, message", [
    ({}, 1, "torchrun --nproc-per-node 2 loop_async.py"),
    (dict(rollout_ranks=2), 2,
     "--rollout-ranks 2 must leave at least one of the 2 ranks to each side: use 1 to 1"),
    (dict(rollout_ranks=0), 2, "--rollout-ranks 0"),
    (dict(max_staleness=-1), 2, "--max-staleness -1"),
    (dict(rollout_ranks=2, oversample=3), 4, "--oversample 3 must be a multiple of the 2 engines"),
])  # fmt: skip
def test_settings_that_cannot_work(changes, world_size, message):
    with pytest.raises(BadInput, match=message):
        check_in_flight_flags(InFlightSettings(**changes), RolloutSettings(), world_size=world_size)


def test_settings_that_work():
    check_in_flight_flags(InFlightSettings(rollout_ranks=3), RolloutSettings(), world_size=8)
