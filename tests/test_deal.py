"""--deal room without SGLang: engines that take the next prompt when they have room for it.

Why: with several engines a slow one must not hold the others up, and yet each prompt is trained
once, in the step of its number, and no token is older than the bound. Engines here are stand-ins in
threads; they share torch's own store, as ranks do. The real stack is in test_loop_async.py.
"""

import asyncio
import random
import threading
from types import SimpleNamespace

import loop_sync
import pytest
import rollout
import torch.distributed as dist
from prompt_helpers import TOY
from test_in_flight import StandIn

from backends.huggingface.config import read_config
from common.errors import BadInput, EngineDied
from common.settings import InFlightSettings, RolloutSettings, RunSettings
from data import deal
from data.prompts import load_data
from harness.checks import check_modes, check_rollout_flags
from loop_async import GroupQueue, Settings, check_staleness
from reward import Judge, RewardSettings

PER_STEP, STEPS, ENGINES = 4, 12, 2


def run_of(engine_index: int, *, bound: int, steps: int, resumed=None) -> SimpleNamespace:
    settings = RolloutSettings(prompts_per_step=PER_STEP, samples_per_prompt=2, deal="room")
    return SimpleNamespace(
        settings=SimpleNamespace(
            run=RunSettings(steps=steps),
            rollout=settings,
            in_flight=InFlightSettings(max_staleness=bound),
            reward=RewardSettings(),
        ),
        data=load_data(TOY, settings, read_config(TOY), seed=1),
        engine_index=engine_index,
        engines=ENGINES,
        is_async=True,
        resumed_from=resumed,
        first_step=resumed.step + 1 if resumed else 1,
    )


class Engines:
    """Two queues with an engine each, in threads; a step ends when both have handed over."""

    def __init__(self, seconds, *, bound: int, steps: int = STEPS):
        self.queues, self.bound = [], bound
        for index, of_engine in enumerate(seconds):
            run = run_of(index, bound=bound, steps=steps)
            engine = StandIn(lambda group, s=of_engine: s())
            queue = GroupQueue(run, engine, Judge(lambda sample: float(sample.index), 4))
            self.queues.append(queue)

    def take(self, i: int, version: int, given: dict) -> None:
        queue = self.queues[i]
        given[i] = queue.take_step(version)
        queue.engine.call(asyncio.sleep(0.005))  # the step trains, and the engine goes on
        queue.engine.version = version + 1

    def run(self, steps) -> list[list]:
        """Return the samples of each step, of all engines."""
        samples = []
        for version in steps:
            given = {}
            threads = [
                threading.Thread(target=self.take, args=(i, version, given), daemon=True)
                for i in range(ENGINES)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(20)
            samples.append(given[0] + given[1])
        return samples


@pytest.fixture
def one_store(one_rank, monkeypatch, request):
    # As each start of a job has keys of its own, so has each test.
    store = dist.PrefixStore(request.node.name, dist.distributed_c10d._get_default_store())
    monkeypatch.setattr(deal.process_groups, "join_store", lambda: (store, 0, 1))


@pytest.mark.parametrize("bound", [0, 1, 3])
def test_each_prompt_is_trained_once_in_the_step_of_its_number(one_store, bound):
    rng = random.Random(bound)
    engines = Engines([lambda: rng.random() * 0.004] * ENGINES, bound=bound)
    for version, samples in enumerate(engines.run(range(STEPS))):
        first = version * PER_STEP
        assert sorted({s.group for s in samples}) == list(range(first, first + PER_STEP))
        check_staleness(samples, version=version, max_staleness=bound)
    started = [group for queue in engines.queues for group in queue.engine.started]
    assert sorted(started) == list(range(STEPS * PER_STEP))  # none beyond the run's last step


def test_a_slow_engine_answers_fewer_prompts(one_store):
    engines = Engines([lambda: 0.001, lambda: 0.15], bound=1)
    engines.run(range(STEPS))
    fast, slow = (len(queue.engine.started) for queue in engines.queues)
    assert fast > 1.5 * slow > 0


def test_a_group_is_as_old_as_the_step_it_starts_in(one_store):
    """An engine may not have loaded yet what was sent; requests wait until it has."""
    engines = Engines([lambda: 0, lambda: 0], bound=1)
    engines.run(range(1))
    for queue in engines.queues:
        queue.engine.version = 0  # as it still was
    engines.run(range(1, 2))
    samples = engines.run(range(2, 3))[0]
    assert sorted({s.group for s in samples if not s.discarded}) == [8, 9, 10, 11]


def test_an_engine_without_room_takes_nothing(one_store):
    shared = Engines([lambda: 0, lambda: 0], bound=1).queues[0].shared
    assert shared.most == 2  # half of 8 in flight by 2 engines
    assert shared.take(2, limit=8) is None
    assert [shared.take(0, limit=8).group, shared.take(1, limit=8).group] == [0, 1]
    assert shared.take(0, limit=2) is None  # it has drawn prompt 2, and keeps it
    assert not shared.all_started(3)
    assert shared.take(0, limit=3).group == 2
    assert shared.all_started(3) and not shared.all_started(4)


def test_a_resumed_run_takes_up_what_no_engine_held(one_store):
    """After step 1 engines held 5 and 8; 4, 6 and 7 were taken by nobody whose state was kept."""

    def held(number):
        return {"in_flight": [{"prompt": {"group": number}}]}

    resumed = SimpleNamespace(step=1, ranks=[{}, held(5), held(8)])
    shared = deal.SharedPrompts(run_of(0, bound=1, steps=STEPS, resumed=resumed))
    assert [shared.take(0, limit=99).group for _ in range(5)] == [4, 6, 7, 9, 10]


# --- the synchronous loop -----------------------------------------------------------------------


def steps_of_the_synchronous_loop(seconds, steps: int, resumed=None) -> list[list[int]]:
    """Return the groups that each engine answered, in order. Engines answer in seconds()."""
    runs = [run_of(index, bound=1, steps=STEPS, resumed=resumed) for index in range(ENGINES)]
    answered = [[] for _ in runs]

    def generate(index: int, prompts: rollout.PromptStream, engine: StandIn) -> None:
        settings, data = runs[index].settings.rollout, runs[index].data
        samples = rollout.generate(engine, prompts.take_step(), data, settings)
        answered[index].append([(sample.group, sample.index) for sample in samples])

    engines = []
    for run, of_engine in zip(runs, seconds):
        run.is_async = False
        prompts = rollout.PromptStream(run, run.settings.rollout)
        engines.append((prompts, StandIn(lambda group, s=of_engine: s())))
    for _ in range(steps):
        threads = [
            threading.Thread(target=generate, args=(i, *engine), daemon=True)
            for i, engine in enumerate(engines)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    return answered


def test_engines_of_the_synchronous_loop_share_a_step(one_store):
    fast, slow = steps_of_the_synchronous_loop([lambda: 0.001, lambda: 0.1], STEPS)
    for i, of_step in enumerate(zip(fast, slow)):
        first = i * PER_STEP
        both = [(group, index) for group in range(first, first + PER_STEP) for index in (0, 1)]
        assert sorted(of_step[0] + of_step[1]) == both
        assert list(of_step[0]) == sorted(of_step[0])
    assert len(sum(fast, [])) > 1.5 * len(sum(slow, [])) > 0


def test_the_order_is_that_of_the_prompts(one_store):
    """Though a later one is answered first. An answer may empty its list."""
    shared = deal.SharedPrompts(run_of(0, bound=3, steps=STEPS))

    async def ask(prompts):
        await asyncio.sleep(0.02 - 0.005 * prompts[0].group)
        return [] if prompts[0].group == 1 else prompts

    samples = asyncio.run(deal.SharedStep(shared, end=4).answer(ask))
    assert [sample.group for sample in samples] == [0, 2, 3]


def test_an_answer_that_fails_ends_the_others(one_store):
    shared, ended = deal.SharedPrompts(run_of(0, bound=3, steps=STEPS)), []

    async def ask(prompts):
        try:
            await asyncio.sleep(0 if prompts[0].group == 1 else 60)
            raise EngineDied("of old age")
        finally:
            ended.append(prompts[0].group)

    with pytest.raises(EngineDied, match="of old age"):
        asyncio.run(deal.SharedStep(shared, end=4).answer(ask))
    assert sorted(ended) == [0, 1, 2, 3]


def test_a_resumed_synchronous_run_goes_on_with_the_next_step(one_store):
    """Also with fewer engines than before."""
    resumed = SimpleNamespace(step=5, ranks=[{"prompts": 20}] * 3)
    answered = steps_of_the_synchronous_loop([lambda: 0, lambda: 0], 1, resumed)
    groups = {group for of_engine in answered for step in of_engine for group, _ in step}
    assert groups == set(range(5 * PER_STEP, 6 * PER_STEP))


def test_fixed_dealing_and_ranks_without_an_engine_share_nothing(one_store):
    run = run_of(0, bound=1, steps=STEPS)
    run.engine_index = None
    assert deal.shared_prompts(run, run.settings.rollout) is None
    run.engine_index = 0
    assert deal.shared_prompts(run, RolloutSettings()) is None


# --- what is refused ----------------------------------------------------------------------------


def test_room_needs_several_engines():
    settings = RolloutSettings(deal="room", engine_tp=2)
    with pytest.raises(BadInput, match="there is one: leave it out"):
        check_rollout_flags(settings, ranks=2)
    check_rollout_flags(settings, ranks=4)


@pytest.mark.parametrize("stage, changes", [
    ("in_flight", InFlightSettings(oversample=2)),
    ("reward", RewardSettings(dynamic_sampling=1)),
])  # fmt: skip
def test_what_room_does_not_go_with_is_refused(stage, changes):
    settings = {"rollout": RolloutSettings(deal="room"), stage: changes}
    with pytest.raises(BadInput, match="does not go with --deal room: use --deal fixed"):
        check_modes(Settings(**settings))


def test_a_loop_without_groups_in_flight_may_deal_by_room():
    check_modes(loop_sync.Settings(rollout=RolloutSettings(deal="room")))


@pytest.mark.parametrize("mode, flag", [
    (dict(eval_only=True), "--eval-only"), (dict(load_rollouts="runs/x"), "--load-rollouts"),
])  # fmt: skip
def test_room_is_refused_where_no_prompt_is_dealt(mode, flag):
    settings = Settings(run=RunSettings(**mode), rollout=RolloutSettings(deal="room"))
    with pytest.raises(BadInput, match=f"--deal room has no effect with {flag}"):
        check_modes(settings)
