"""Evaluation without SGLang: each held-out set in its own way, and beside training.

Why: an evaluation beside training must not hold training up, must end though training never
pauses, and must be of one weight version; else its curve means nothing. A stand-in engine answers
after a moment. The real stack is in test_loop_async.py. Not covered: several engines.
"""

import asyncio
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from prompt_helpers import TOY

from backends.huggingface.config import read_config
from common.errors import EngineDied
from common.settings import RolloutSettings, RunSettings
from data.prompts import load_data
from harness.evaluate import Evaluation
from reward import Judge, RewardSettings

HELD_OUT, ROOM = 6, 4


class StandIn:
    """Answer "1" after a moment; requests counts what was asked, as the real engine's does."""

    def __init__(self):
        self.loop, self.requests, self.version = asyncio.new_event_loop(), 0, 0
        self.most, self.sampling, self.asked = 0, [], asyncio.Event()

    def call(self, coroutine):
        return self.loop.run_until_complete(asyncio.wait_for(coroutine, 60))

    async def generate(self, prompts_ids, sampling, *, request_ids, cache="", keep=True):
        self.requests += len(prompts_ids)
        self.most, self.sampling = max(self.most, self.requests), self.sampling + sampling
        version = self.version
        await asyncio.sleep(0.01)
        self.requests -= len(prompts_ids)
        meta = {"finish_reason": {"type": "stop"}, "output_token_logprobs": [(-1.0, 5, None)]}
        answer = dict(output_ids=[5], meta_info=meta, routed_experts=b"")
        return [{**answer, "weight_versions": [version]} for _ in prompts_ids]


@pytest.fixture
def start(one_rank):
    """Return (an evaluation, its engine, the rows that it logged) for settings of the rollout."""

    def start(**settings) -> tuple[Evaluation, StandIn, list[dict]]:
        rollout = RolloutSettings(eval_samples=HELD_OUT, **settings)
        data, rows, engine = load_data(TOY, rollout, read_config(TOY), seed=1), [], StandIn()
        record = SimpleNamespace(
            log_eval=lambda step, samples, metrics, is_alone: metrics, write_row=rows.append
        )
        run = SimpleNamespace(
            settings=SimpleNamespace(
                rollout=rollout,
                reward=RewardSettings(),
                run=RunSettings(),
                in_flight=SimpleNamespace(engine_restarts=3),
            ),
            **dict(data=data, record=record, group=dist.group.WORLD),
            **dict(engine_index=0, engines=1, training_requests=ROOM),
        )
        judge = Judge(lambda sample: float(len(sample.response_ids)))
        return Evaluation(run, engine, judge), engine, rows

    return start


def test_an_evaluation_beside_training_takes_the_room_that_is_left(start):
    """Three requests of training are running: one place of four is free."""
    evaluation, engine, rows = start()
    engine.requests = ROOM - 1
    evaluation.start(0)
    evaluation.finish()
    assert engine.most == ROOM and len(engine.sampling) == HELD_OUT
    assert rows == [{"step": 0, "held_out": 1.0}]


def test_an_evaluation_ends_though_training_never_pauses(start):
    """One prompt is always under way."""
    evaluation, engine, rows = start()
    engine.requests = 10 * ROOM
    evaluation.start(0)
    evaluation.finish()
    assert engine.most == 10 * ROOM + 1 and rows[0]["held_out"] == 1.0


def test_answers_of_another_version_are_an_error(start):
    """The loop calls finish() before the engine gets other weights."""
    evaluation, engine, _ = start()
    evaluation.start(0)
    engine.version = 1
    with pytest.raises(RuntimeError, match=r"evaluation of step 0 has tokens of \[1\]"):
        evaluation.finish()


def test_what_went_wrong_in_the_background_is_raised(start):
    evaluation, engine, _ = start()

    async def broken(*args, **kwargs):
        raise ValueError("broken")

    engine.generate = broken
    evaluation.start(0)
    with pytest.raises(ValueError, match="broken"):
        evaluation.finish()


def test_without_a_started_evaluation_nothing_is_logged(start):
    evaluation, _, rows = start()
    evaluation.finish()
    assert rows == []


def test_an_engine_that_was_started_again_is_asked_again(start):
    """The dead one had answered a part; nothing of it is left."""
    evaluation, dead, rows = start()
    evaluation.start(0)
    evaluation.engine = engine = StandIn()  # comeback.LastingEngine leads to the new one
    evaluation.finish()
    assert len(engine.sampling) == HELD_OUT and rows == [{"step": 0, "held_out": 1.0}]
    dead.call(asyncio.sleep(0.1))  # its requests end, and change nothing
    assert all(len(sample.response_ids) == 1 for sample in evaluation.samples)


def test_an_engine_that_dies_now_leaves_errors(start):
    """The trainers may have newer weights already; its missing answers are counted."""
    evaluation, engine, rows = start()
    evaluation.start(0)

    def dies(coroutine):
        coroutine.close()
        raise EngineDied("gone")

    alive, engine.call = engine.call, dies
    evaluation.finish()
    assert rows == [{"step": 0, "held_out_errors": HELD_OUT}]
    evaluation.run.settings.in_flight.engine_restarts = 0
    engine.call = alive
    evaluation.start(1)
    engine.call = dies
    with pytest.raises(EngineDied):
        evaluation.finish()


def test_both_ways_of_an_evaluation_agree(start):
    beside, _, rows = start(eval_samples_per_prompt=2)
    beside.start(0)
    beside.finish()
    assert rows == [{"step": 0, **start(eval_samples_per_prompt=2)[0].evaluate(0)}]


def test_an_evaluation_samples_by_its_own_flags(start):
    evaluation, engine, _ = start(eval_temperature=("0",), eval_max_response_tokens=("toy=5",))
    evaluation.evaluate(0)
    assert {params["temperature"] for params in engine.sampling} == {0.0}
    assert {params["max_new_tokens"] for params in engine.sampling} == {5}


def test_a_held_out_set_is_judged_by_its_own_reward(start):
    """The training's reward gives 1 here; no answer of the stand-in is right."""
    evaluation, _, _ = start(eval_reward=("toy=exact",))
    assert evaluation.evaluate(0)["held_out"] == 0
