"""The asynchronous loop's queue over a checkpoint: what a resumed run trains and asks again.

Why: a resumed run may lose a finished group, ask it twice, or take it for younger than it is. Then
the bound on staleness or the account of groups is wrong, in silence. Not covered: a resumed run
with other ranks.
"""

import asyncio

from common.errors import EngineDied
from loop_async import GroupQueue, check_staleness
from rollout import DROPPED, REPLACED, split_discarded
from test_in_flight import PER_STEP, StandIn, groups_of, new_queue


def wait_until_finished(groups: GroupQueue, *, unfinished: tuple[int, ...] = ()) -> None:
    """Block until every group of the queue is finished, except those of these numbers."""

    async def finished():
        while not all(g.task.done() or g.prompt.group in unfinished for g in groups.queue):
            await asyncio.sleep(0.001)

    groups.engine.call(finished())


def stopped_after(steps: int, seconds, *, unfinished=(), **settings) -> list[dict]:
    """Return the states of a trainer and of this rank in a checkpoint after so many steps.

    The groups in flight are finished, except those of the given numbers.
    """
    engine = StandIn(seconds)
    groups = new_queue(engine, **settings)
    for version in range(steps):
        groups.take_step(version)
        wait_until_finished(groups, unfinished=unfinished)
        engine.version = version + 1
    return [{}, groups.state()]


def in_flight(ranks: list[dict]) -> list[tuple[int, int, bool]]:
    """Return (number of the prompt, version, whether finished) of each group of the checkpoint."""
    return [
        (group["prompt"]["group"], group["version"], bool(group["answers"]))
        for group in ranks[-1]["in_flight"]
    ]


def test_a_resumed_run_trains_finished_groups_at_their_true_age(one_rank):
    """K = 1. The checkpoint of version 2 holds groups 6, 7 and 8 of version 1.

    Group 7 was not finished, so the resumed run asks it again, as a new one.
    """
    seconds = {7: 60}
    ranks = stopped_after(2, lambda g: seconds.get(g, 0), unfinished=(7,), max_staleness=1)
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
    """The run stopped before the step that would have raised the error.

    The checkpoint must hold no answers of that group.
    """

    def seconds(group):
        if group == 7:
            raise EngineDied("the engine gave up")
        return 0

    ranks = stopped_after(2, seconds, max_staleness=1)
    assert in_flight(ranks) == [(6, 1, True), (7, 1, False), (8, 1, True)]


def test_finished_groups_that_a_resumed_run_cannot_train_in_time_are_dropped(one_rank):
    """K = 1, and --prompts-per-step is 1 after the resume.

    Version 2 trains one of three groups of version 1. The others may not wait for version 3.
    """
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
    """An empty response is an answer, and so is one whose judge failed.

    Both come back equal in every field.
    """

    def judge(sample):
        return 1 / sample.index  # the first sample of each group fails

    class Empty(StandIn):
        async def generate(self, prompts_ids, sampling, *, request_ids, cache="", keep=True):
            outputs = await super().generate(prompts_ids, sampling, request_ids=request_ids)
            meta = {"finish_reason": {"type": "stop"}, "output_token_logprobs": []}
            return [
                {"output_ids": [], "meta_info": meta, "weight_versions": [], "routed_experts": b""},
                *outputs[1:],
            ]

    engine = Empty(lambda group: 0)
    groups = new_queue(engine, judge=judge, max_staleness=1)
    groups.take_step(0)
    wait_until_finished(groups)
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
    """Group 4 is replaced between the last step and the checkpoint.

    The resumed run's first step counts it. The second does not.
    """
    held = [True]
    engine = StandIn(lambda group: 0, lambda engine, group: group >= PER_STEP and held[0])
    groups = new_queue(
        engine,
        judge=lambda sample: float(sample.index if sample.group != 4 else 0),
        dynamic_sampling=1,
        max_staleness=1,
    )
    assert split_discarded(groups.take_step(0))[1] == {DROPPED: 0, REPLACED: 0}
    held[0] = False
    wait_until_finished(groups)
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
