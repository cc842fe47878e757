"""comeback.py: in the asynchronous loop an engine that dies is started again, and nothing is lost.

Stand-ins die at every place where an engine is asked or given something. Whole runs lose a real
one, killed and hung. Not covered: GPUs, an engine on several of them.
"""

import asyncio
import json
import signal
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from conftest import metrics_of
from test_in_flight import StandIn, new_queue

from backends.delta import Sent
from common.errors import EngineDied
from common.timeline import Timeline
from data.sample import Sample
from harness import comeback, exits
import rollout
import weight_sync

TOKENS = [("a", None), ("b", None)]  # of a bucket; only their number counts here


class Mortal:
    """An engine that dies in the given part of an update."""

    last_phase, holds_weights, version = ("load", ["a"]), True, 3

    def __init__(self, dies_in=""):
        self.dies_in, self.done, self.timeline, self.is_down = dies_in, [], Timeline(), False
        self.loop = SimpleNamespace(call_soon_threadsafe=lambda note: note())

    def part(self, name):
        def do(*args, **how):
            self.done.append(name)
            if name == self.dies_in:
                raise EngineDied(f"died in {name}")
            return name

        return do

    def __getattr__(self, name):
        return self.part(name)

    def shutdown(self):
        self.is_down = True


@pytest.fixture
def lasting(one_rank, monkeypatch):
    """Return a function that makes a LastingEngine of stand-ins, the first of which is running."""
    sent = []

    def make(*engines, most=3):
        start, *others = engines
        monkeypatch.setattr(rollout, "start_engine", lambda *_: others.pop(0))
        how = dict(engine_restarts=most)
        run = SimpleNamespace(
            settings=SimpleNamespace(in_flight=SimpleNamespace(**how), rollout=None),
            group=dist.group.WORLD,
            engine_index=0,
            record=SimpleNamespace(say=sent.append),
        )
        weights = SimpleNamespace(sent=Sent())
        weights.sent.version = 7
        return comeback.LastingEngine(start, run, weights)

    def send_weights(weights, engine, *, version, verify):
        assert weights.sent.version is None, "only changes would be sent to an empty engine"
        sent.append((engine.engine, version, verify))

    monkeypatch.setattr(weight_sync, "send_weights", send_weights)
    monkeypatch.setattr(exits, "note_engine_death", None)
    make.sent = sent
    return make


def answers_of(engine):
    """Return what asks the engine for one sample."""

    def work():
        engine.generate()
        return [Sample([1], group=5)]

    return work


def test_an_engine_that_dies_is_replaced_and_asked_again(lasting):
    first, second = Mortal("generate"), Mortal()
    engine = lasting(first, second)
    engine.end_update(7)
    samples = engine.all_gather(answers_of(engine))
    assert [sample.group for sample in samples] == [5]
    assert first.is_down and engine.engine is second
    assert lasting.sent[1:] == [(second, 7, True)]  # the version that the other engines hold
    assert "the engine of rank 0 was started again" in lasting.sent[0]
    assert engine.timeline is first.timeline  # its part of the trace goes on
    assert engine.pop_restarts() == {"engine_restarts": 1}
    assert engine.pop_restarts() == {}


@pytest.mark.parametrize("most", [0, 1, 2])
def test_one_that_dies_again_and_again_ends_the_run(lasting, most):
    engine = lasting(*(Mortal("generate") for _ in range(4)), most=most)
    with pytest.raises(EngineDied, match="died in generate"):
        engine.all_gather(answers_of(engine))
    assert len(lasting.sent) == 2 * most
    assert engine.restarts == most


def test_one_that_dies_while_it_starts_counts(lasting, monkeypatch):
    """Its groups are stopped once, on the loop of the first, which then ends."""
    engine, stopped = lasting(Mortal("generate")), []

    def start(*_):
        raise EngineDied("while it started")

    monkeypatch.setattr(rollout, "start_engine", start)
    engine.before_restart = lambda: stopped.append(engine.engine.is_down)
    with pytest.raises(EngineDied, match="while it started"):
        engine.all_gather(answers_of(engine))
    assert engine.restarts == 3
    assert stopped == [False]


@pytest.mark.parametrize("part", ["begin_update", "load", "settle", "end_update", "compare"])
def test_a_rank_whose_engine_dies_in_an_update_takes_part_to_its_end(lasting, part):
    """The other ranks send, and would wait for it."""
    first, second = Mortal(part), Mortal()
    engine = lasting(first, second)
    engine.begin_update()
    engine.load(TOKENS, version=8)
    engine.settle()
    engine.end_update(8)
    report = engine.compare(TOKENS)
    assert first.done[-1] == part
    assert not engine.holds_weights
    if part == "compare":
        compared, different, uncompared = report.sum(0).T.tolist()
        assert all(compared) and not any(different) and not any(uncompared)
    engine.all_gather(lambda: [])
    assert lasting.sent[-1] == (second, 8, True)
    assert engine.holds_weights


def test_without_restarts_a_death_in_an_update_ends_the_run_at_once(lasting):
    engine = lasting(Mortal("load"), most=0)
    with pytest.raises(EngineDied, match="died in load"):
        engine.load(TOKENS, version=8)


def test_a_signal_does_not_interrupt_what_other_ranks_wait_for(lasting):
    """It is noted, and the engine's next call raises."""
    first = Mortal()
    with lasting(first):
        exits._engine_child_died(signal.SIGQUIT, None)
        assert first.done[-1] == "note_death"
    with pytest.raises(EngineDied):
        exits._engine_child_died(signal.SIGQUIT, None)


# --- the groups in flight -----------------------------------------------------------------------


@pytest.fixture
def moved(one_rank):
    """Return a queue of six groups that has moved, and its two engines. The first has hung at the
    fifth and sixth group, after a step of three.
    """
    first, second = StandIn(lambda group: 0, hold=lambda *_: False), StandIn(lambda group: 0)
    first.hold = lambda engine, group: group in (4, 5)
    queue = new_queue(first, max_staleness=1)
    taken = queue.take_step(0)
    first.call(asyncio.sleep(0.05))  # until the fourth is judged
    queue.leave()
    queue.engine, second.version = second, 1
    return queue, first, second, taken


def test_only_what_is_not_finished_is_asked_again(moved):
    queue, first, second, taken = moved
    taken += queue.take_step(1) + queue.take_step(2)
    assert first.started == list(range(6))
    assert second.started[:2] == [4, 5] and 3 not in second.started
    assert [sample.group for sample in taken[::2]] == list(range(9))
    of_group = {sample.group: set(sample.weight_versions) for sample in taken}
    assert of_group[3] == {0} and of_group[4] == {1}


def test_a_checkpoint_holds_groups_that_wait_for_their_engine(moved):
    """The engine died in an evaluation, and a checkpoint follows before the next step."""
    queue, _, second, _ = moved
    state = second.call(queue._state())
    assert [group["prompt"]["group"] for group in state["in_flight"]] == [3, 4, 5]
    assert [bool(group["answers"]) for group in state["in_flight"]] == [True, False, False]


def test_an_engine_that_dies_twice_loses_nothing(moved):
    queue, _, second, taken = moved
    queue.leave()
    taken += queue.take_step(1)
    assert [sample.group for sample in taken[::2]] == list(range(6))


# --- whole runs ---------------------------------------------------------------------------------

RUN = ["--eval-samples", "8", "--prompts-per-step", "4", "--samples-per-prompt", "4", "--export"]
RUN += ["--max-response-tokens", "40", "--save-rollouts", "--rollout-ranks", "2"]


@pytest.mark.complete
@pytest.mark.parametrize("how, flags", [
    (signal.SIGKILL, ["--max-staleness", "1"]),
    (signal.SIGSTOP, ["--sync", "delta", "--check-sync", "--answer-timeout-s", "10"]),
])  # fmt: skip
def test_a_run_loses_an_engine_and_no_prompt(start_loop, tmp_path, how, flags):
    started = start_loop(
        "loop_async.py", *RUN, *flags, "--eval-every", "5", "--steps", "25", rows=4, ranks=3
    )
    of_rank = {
        p.parent().environ()["RANK"]: p
        for p in started.family
        if p.cmdline()[0].startswith("sglang::scheduler")
    }
    of_rank["1"].send_signal(how)
    started.wait_for(lambda: "was started again" in started.text(), 120)
    assert of_rank["2"].is_running()
    assert started.end(120) == 0, started.text()
    run = tmp_path / "runs" / "long"
    rows = metrics_of(run)
    steps = [row["step"] for row in rows if "loss" in row]  # the others are evaluations
    assert steps == list(range(1, 26))
    assert sum(row.get("engine_restarts", 0) for row in rows) == 1
    assert max(row.get("staleness_max", 0) for row in rows) <= 1
    groups = []
    for file in sorted((run / "rollouts").iterdir()):
        lines = file.read_text(encoding="utf-8").splitlines()
        groups += sorted({json.loads(line)["group"] for line in lines})
    assert sorted(groups) == list(range(25 * 4))
