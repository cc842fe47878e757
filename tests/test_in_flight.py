"""The asynchronous loop's GroupQueue without SGLang: which groups a step gets, when it waits, what is dropped.

A stand-in engine answers after random times.

These are the promises of the asynchronous loop that do not depend on the engine: no token older
than the bound, every group trained once or counted as dropped, no group left waiting while newer
ones train, never more than (K + 1) steps' worth on its way. test_loop_async.py shows them on the
real stack.
"""

import asyncio
import json
import random
import time
from types import SimpleNamespace

import loop_async
import pytest

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
    """Answers each group after a time of its own, and after hold(engine, group) has become false.

    The first token is of the version it was started with, the last of the one it ended with.
    """

    def __init__(self, seconds, hold=lambda engine, group: False):
        self.loop, self.version, self.timeline = asyncio.new_event_loop(), 0, Timeline()
        self.seconds, self.hold, self.started, self.aborted = seconds, hold, [], []

    def call(self, coroutine):
        return self.loop.run_until_complete(asyncio.wait_for(coroutine, 60))  # fail, do not hang

    async def generate(self, prompts_ids, sampling, *, request_ids, cache=""):
        group, first = int(request_ids[0].split("-")[1]), self.version
        self.started.append(group)
        await asyncio.sleep(self.seconds(group))
        while self.hold(self, group):
            await asyncio.sleep(0.001)
        meta = {
            "finish_reason": {"type": "stop"},
            "output_token_logprobs": [(-1.0, 5, None), (-1.0, 2, None)],
        }
        return [
            {"output_ids": [5, 2], "meta_info": meta, "weight_versions": [first, self.version]}
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
    """What a queue needs to know of a run whose only rollout rank this is."""
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
    **settings,
) -> tuple[list[list[Sample]], StandIn]:
    """The loop's body with a trainer that only takes time. Returns what each step was given."""
    engine = engine or StandIn(seconds)
    run = run_of(data, dynamic_sampling=dynamic_sampling, steps=steps, **settings)
    groups = GroupQueue(run, engine, Judge(judge, 4))
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
    """A queue of its own prompts; ranks: as in a checkpoint, which holds JSON."""
    data = load_data(TOY, RolloutSettings(), read_config(TOY), seed=1)
    asked = dict(dynamic_sampling=dynamic_sampling, per_step=per_step, steps=steps)
    return GroupQueue(run_of(data, ranks=ranks, **asked, **settings), engine, Judge(judge, 4))


def stopped_after(steps: int, seconds, *, wait_s: float = 0.1, **settings) -> list[dict]:
    """The states of a trainer and of this rank, in a checkpoint after so many steps of wait_s."""
    engine = StandIn(seconds)
    groups = new_queue(engine, **settings)
    for version in range(steps):
        groups.take_step(version)
        engine.call(asyncio.sleep(wait_s))
        engine.version = version + 1
    return [{}, groups.state()]


def in_flight(ranks: list[dict]) -> list[tuple[int, int, bool]]:
    """(prompt's number, version, whether finished) of each group of the checkpoint."""
    return [
        (group["prompt"]["group"], group["version"], bool(group["answers"]))
        for group in ranks[-1]["in_flight"]
    ]


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
        assert groups_of(samples, dropped=False) == list(
            range(version * PER_STEP, (version + 1) * PER_STEP)
        )
        assert all(sample.reward == sample.group % 2 for sample in samples)
        kept, set_aside = split_discarded(samples)
        check_staleness(kept, version=version, max_staleness=bound)
        assert len(kept) == 2 * PER_STEP and set_aside == {DROPPED: 0, REPLACED: 0}
    assert (
        engine.started == list(range(STEPS * PER_STEP)) and engine.aborted == []
    )  # nothing is started that cannot be trained


def test_the_bound_is_used_not_only_kept(data):
    """With a slow trainer the queue is full: every token is exactly K old, once the first K steps
    are over.
    """
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
    assert (
        sorted(trained + dropped) == engine.started and len(trained) == STEPS * PER_STEP
    )  # each group once, and every step is full
    assert dropped and set(engine.aborted) == set(dropped)
    for version, samples in enumerate(given):
        assert len(groups_of(samples, dropped=True)) <= oversample or version == STEPS - 1
        check_staleness(
            split_discarded(samples)[0], version=version, max_staleness=bound
        )  # raises if a token is too old


@pytest.mark.parametrize("bound", [0, 1, 3])
def test_groups_that_teach_nothing_are_replaced_within_the_bound(data, bound):
    """Every third group has rewards that differ; the others are replaced, and every group is
    trained or counted, once, and none is too old.
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
    trained, replaced = (
        sorted({s.group for samples in kept for s in samples}),
        [s.group for samples in given for s in samples if s.discarded == REPLACED],
    )
    assert all(group % 3 == 0 for group in trained) and len(trained) == STEPS * PER_STEP
    assert sorted(trained + replaced[::2]) == sorted(engine.started)
    for version, samples in enumerate(kept):
        check_staleness(samples, version=version, max_staleness=bound)


@pytest.mark.parametrize("slow", ["answer", "judge"])
def test_a_dropped_group_is_neither_trained_nor_replaced(data, slow):
    """Every fifth group is late, in its answers or in its judging, and its rewards are all equal.

    It is dropped, and counted as dropped, and not as replaced as well.
    """
    judged = []

    def is_late(group):
        return group % 5 == 0

    def holds(engine, group):  # until it has been dropped: no machine is too slow for this test
        return is_late(group) and group not in engine.aborted

    engine = StandIn(
        lambda group: 0.001, holds if slow == "answer" else lambda engine, group: False
    )

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
    assert set(names[DROPPED]) == set(engine.aborted) and names[DROPPED]
    assert names[REPLACED] == []
    assert not set(names[DROPPED]) & set(names[""])
    if slow == "answer":  # one that comes too late is not judged
        assert not set(judged) & set(names[DROPPED])


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
        assert len(kept) == 2 * PER_STEP and set_aside == {DROPPED: 0, REPLACED: 2 * 2 * PER_STEP}


def test_a_straggler_is_carried_over_while_the_bound_allows(data):
    # K = 2: group 0 takes longer than a step; steps go on with newer groups, and it is trained,
    # late, not dropped.
    engine = StandIn(lambda group: 0.001, lambda engine, group: group == 0 and engine.version < 1)
    given, _ = run_steps(
        data, None, engine=engine, train_s=0.3, max_staleness=2, oversample=1, steps=6
    )
    assert 0 not in groups_of(given[0], dropped=False)
    assert 0 in groups_of(given[2], dropped=False) + groups_of(given[1], dropped=False)
    assert 0 not in engine.aborted


def test_nothing_newer_is_trained_while_a_due_group_is_missing(data):
    """No oversampling: a slow group holds its step, however many newer ones are ready."""
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
    """Nobody asked for it: the engine gave up, and says why."""

    class Aborting(StandIn):
        async def generate(self, prompts_ids, sampling, *, request_ids, cache=""):
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


def test_a_resumed_run_trains_finished_groups_at_their_true_age(one_rank):
    """K = 1. The checkpoint of version 2 holds groups 6, 7 and 8 of version 1.

    Group 7 was not finished: it is asked again, and is new.
    """
    ranks = stopped_after(2, lambda group: 60 if group == 7 else 0, max_staleness=1)
    assert in_flight(ranks) == [(6, 1, True), (7, 1, False), (8, 1, True)]
    engine = StandIn(lambda group: 0)
    engine.version = 2
    groups = new_queue(engine, ranks=ranks, max_staleness=1)
    samples = groups.take_step(2)
    assert {sample.group: sample.weight_versions[0] for sample in samples} == {6: 1, 7: 2, 8: 1}
    assert engine.started == [7, 9, 10, 11]  # no finished group is asked again, no prompt left out
    check_staleness(samples, version=2, max_staleness=1)
    assert {group.prompt.group: group.version for group in groups.queue} == {9: 2, 10: 2, 11: 2}


def test_a_group_that_failed_is_not_finished(one_rank):
    """The step that would have raised it never came: the checkpoint holds no answers."""

    def seconds(group):
        if group == 7:
            raise EngineDied("the engine gave up")
        return 0

    ranks = stopped_after(2, seconds, max_staleness=1)
    assert in_flight(ranks) == [(6, 1, True), (7, 1, False), (8, 1, True)]


def test_finished_groups_that_a_resumed_run_cannot_train_in_time_are_dropped(one_rank):
    """K = 1, and --prompts-per-step is 1 after the resume: version 2 trains one of three groups of
    version 1, and the others may not wait for version 3."""
    ranks = stopped_after(2, lambda group: 0, max_staleness=1)
    assert in_flight(ranks) == [(6, 1, True), (7, 1, True), (8, 1, True)]
    engine = StandIn(lambda group: 0)
    engine.version = 2
    groups = new_queue(engine, ranks=ranks, max_staleness=1, per_step=1)
    samples = groups.take_step(2)
    assert (groups_of(samples, dropped=False), groups_of(samples, dropped=True)) == ([6], [7, 8])
    engine.version = 3
    later = groups.take_step(3)
    assert groups_of(later, dropped=False) == [9]
    check_staleness(split_discarded(later)[0], version=3, max_staleness=1)


def test_a_group_keeps_its_age_over_two_checkpoints(one_rank):
    """K = 2. What the first checkpoint held of version 1 is of version 1 in the second one too."""
    ranks = stopped_after(2, lambda group: 0, max_staleness=2)
    engine = StandIn(lambda group: 0)
    engine.version = 2
    groups = new_queue(engine, ranks=ranks, max_staleness=2)
    groups.take_step(2)
    assert in_flight([groups.state()])[:PER_STEP] == [(group, 1, True) for group in (9, 10, 11)]


def test_a_checkpoint_keeps_answers_as_they_were_judged(one_rank):
    """An empty response is an answer, and so is one whose judge failed. Both come back equal in
    every field."""

    def judge(sample):
        return 1 / sample.index  # the first sample of each group fails

    class Empty(StandIn):
        async def generate(self, prompts_ids, sampling, *, request_ids, cache=""):
            outputs = await super().generate(prompts_ids, sampling, request_ids=request_ids)
            meta = {"finish_reason": {"type": "stop"}, "output_token_logprobs": []}
            return [{"output_ids": [], "meta_info": meta, "weight_versions": []}, *outputs[1:]]

    engine = Empty(lambda group: 0)
    groups = new_queue(engine, judge=judge, max_staleness=1)
    groups.take_step(0)
    engine.call(asyncio.sleep(0.1))
    kept = [sample for group in groups.queue for sample in group.samples]
    resumed = new_queue(
        StandIn(lambda group: 0), ranks=[groups.state()], max_staleness=1, judge=judge, steps=2
    )
    resumed.engine.version = 1
    samples = resumed.take_step(1)
    assert samples == kept
    empty, full = samples[:2]
    assert (empty.response_ids, empty.reward) == ([], None)
    assert (full.response_ids, full.reward) == ([5, 2], 1.0)
    assert "ZeroDivisionError" in empty.error
    assert resumed.engine.started == []


def test_replaced_groups_are_counted_once_over_a_resume(one_rank):
    """Group 4 is replaced after the last step before the checkpoint: the resumed run's first step
    counts it, and the second does not."""
    engine = StandIn(lambda group: 0.05 if group >= PER_STEP else 0)
    groups = new_queue(
        engine,
        judge=lambda sample: float(sample.index if sample.group != 4 else 0),
        dynamic_sampling=1,
        max_staleness=1,
    )
    assert split_discarded(groups.take_step(0))[1] == {DROPPED: 0, REPLACED: 0}
    engine.call(asyncio.sleep(0.2))
    ranks = [groups.state()]
    assert [group for group, *_ in in_flight(ranks)] == [3, 5, 6]  # 4 was replaced by 6
    resumed = new_queue(
        StandIn(lambda group: 0),
        ranks=ranks,
        max_staleness=1,
        judge=lambda sample: float(sample.index),
        dynamic_sampling=1,
    )
    resumed.engine.version = 1
    kept, set_aside = split_discarded(resumed.take_step(1))
    assert set_aside == {DROPPED: 0, REPLACED: 2}
    assert sorted({sample.group for sample in kept}) == [3, 5, 6]
    resumed.engine.version = 2
    assert split_discarded(resumed.take_step(2))[1] == {DROPPED: 0, REPLACED: 0}


def test_a_token_older_than_the_bound_stops_the_run():
    sample = Sample([1], group=9, response_ids=[5, 2], weight_versions=[3, 4])
    check_staleness([sample], version=5, max_staleness=2)
    with pytest.raises(
        RuntimeError,
        match=(
            "group 9 has tokens of the weight versions .3, 4.; training version 5 .* none older"
            " than 4"
        ),
    ):
        check_staleness([sample], version=5, max_staleness=1)
    with pytest.raises(RuntimeError, match="group 9"):
        check_staleness(
            [sample], version=3, max_staleness=1
        )  # from the future: the trainer missed an update


@pytest.mark.parametrize("changes, world_size, message", [
    ({}, 1, "torchrun --nproc-per-node 2 loop_async.py"),
    (dict(rollout_ranks=2), 2, "--rollout-ranks 2 must leave at least one of the 2 ranks to each side: use 1 to 1"),
    (dict(rollout_ranks=0), 2, "--rollout-ranks 0"),
    (dict(max_staleness=-1), 2, "--max-staleness -1"),
    (dict(rollout_ranks=2, oversample=3), 4, "--oversample 3 must be a multiple of the 2 engines"),
])  # fmt: skip
def test_settings_that_cannot_work(changes, world_size, message):
    with pytest.raises(BadInput, match=message):
        check_in_flight_flags(InFlightSettings(**changes), RolloutSettings(), world_size=world_size)


def test_settings_that_work():
    check_in_flight_flags(InFlightSettings(rollout_ranks=3), RolloutSettings(), world_size=8)
