"""--deal room without SGLang: engines that take the next prompt when they have room for it.

Why: with several engines a slow one must not hold the others up, and yet each prompt is trained
once, in the step of its number, and no token is older than the bound. Engines here are stand-ins in
threads; they share torch's own store, as ranks do. The real stack is in test_loop_async.py.
"""

import asyncio
import random
import threading
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from prompt_helpers import TOY
from test_in_flight import StandIn

from backends.huggingface.config import read_config
from common.errors import BadInput
from common.settings import InFlightSettings, RolloutSettings, RunSettings
from data.prompts import load_data
from harness import deal
from harness.checks import check_in_flight_flags, check_modes
from loop_async import GroupQueue, Settings, check_staleness
from reward import Judge, RewardSettings

PER_STEP, STEPS, ENGINES = 4, 12, 2


def run_of(engine_index: int, *, bound: int, steps: int, resumed=None) -> SimpleNamespace:
    rollout = RolloutSettings(prompts_per_step=PER_STEP, samples_per_prompt=2)
    return SimpleNamespace(
        settings=SimpleNamespace(
            run=RunSettings(steps=steps),
            rollout=rollout,
            in_flight=InFlightSettings(max_staleness=bound, deal="room"),
            reward=RewardSettings(),
        ),
        data=load_data(TOY, rollout, read_config(TOY), seed=1),
        engine_index=engine_index,
        engines=ENGINES,
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


def test_room_needs_several_engines():
    with pytest.raises(BadInput, match="there is one: leave it out"):
        check_in_flight_flags(InFlightSettings(deal="room"), RolloutSettings(), world_size=2)


@pytest.mark.parametrize("stage, changes", [
    ("in_flight", InFlightSettings(deal="room", oversample=2)),
    ("reward", RewardSettings(dynamic_sampling=1)),
])  # fmt: skip
def test_what_room_does_not_go_with_is_refused(stage, changes):
    settings = {"in_flight": InFlightSettings(deal="room"), stage: changes}
    with pytest.raises(BadInput, match="does not go with --deal room: use --deal fixed"):
        check_modes(Settings(**settings))
