"""A fault injected into each phase of a hand-off, run under torchrun by test_weight_sync.py: two
tensor-parallel trainers, an engine beside rank 0.

    torchrun --nproc-per-node 2 hand_off_faults.py OUT_FILE full
    torchrun --nproc-per-node 2 hand_off_faults.py OUT_FILE delta

With delta the faulty updates send changes alone. Rank 0 writes {phase: what happened} as JSON.
Faults of the trainers are raised on both ranks, so that neither waits for the other. The engine is
mended by a whole hand-off before the next fault, but for the last one, which kills it.
"""

import asyncio
import contextlib
import json
import sys
from pathlib import Path
from unittest import mock

sys.path[:0] = [str(Path(__file__).resolve().parent.parent.parent)]

from backends import delta
from backends.huggingface.config import read_config
from backends.huggingface.fp8 import fp8_weights
from backends.sglang import buckets
from backends.sglang.launch import launch_engine
from common import distributed, errors
from common.settings import REPOSITORY, RolloutSettings, TrainSettings
from harness import exits
import rollout
import train_step
import weight_sync
from tests.nudge import nudge

import torch
import torch.distributed as dist

TOY = str(REPOSITORY / "toy")


def failing_from(call: int, stock):
    """The function, which from its call-th call on raises instead."""
    calls = []

    def wrapped(*args, **kwargs):
        calls.append(1)
        if len(calls) >= call:
            raise RuntimeError("injected")
        return stock(*args, **kwargs)

    return wrapped


@contextlib.contextmanager
def not_a_number(trainer):
    """One weight of the second layer is NaN, as after a broken optimizer step: the first buckets
    are in the engine by the time it is found.
    """
    weight = trainer.gpt.decoder.layers[1].mlp.linear_fc2.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[3, 5] = float("nan")
    yield
    with torch.no_grad():
        weight.copy_(kept)


@contextlib.contextmanager
def misshapen(trainer):
    """A tensor that does not fit the engine's parameter: SGLang's loader refuses it in the engine's
    own process. Of the changes with which that tensor's travel the last byte is lost.
    """
    stock, norm = buckets.pack, "model.layers.1.input_layernorm.weight"

    def pack(named):
        return stock(
            [
                (name, tensor[:-1] if norm in delta.names_in(name) else tensor)
                for name, tensor in named
            ]
        )

    with mock.patch("backends.sglang.engine.pack", pack):
        yield


def refusing(engine):
    """SGLang's own way to refuse: it answers (False, message), and raises nothing."""

    async def refuse(request, _):
        return False, "injected"

    return mock.patch.object(engine.tokenizer_manager, "end_weight_update", refuse)


def answers(engine) -> bool:
    """Whether the engine answers a request within two seconds."""

    async def answered():
        request = asyncio.ensure_future(engine.generate([[5, 6, 7]], {"max_new_tokens": 2}))
        done, _ = await asyncio.wait([request], timeout=2)
        return bool(done) and not request.exception()

    return engine.call(answered())


def main() -> None:
    distributed.init_distributed()
    config = read_config(TOY)
    trainer = train_step.build_trainer(
        TOY, TrainSettings(tp=2), config, steps=1, seed=1, temperature=1.0, max_response_tokens=8
    )
    fp8 = fp8_weights(config, rollout_dtype="fp8", engine_tp=1)
    weights = weight_sync.WeightPath(
        trainer.gpt,
        trainer.layout,
        config,
        fp8,
        bucket_bytes=100_000,
        broadcast_group=dist.group.WORLD,
        sent=delta.Sent() if sys.argv[2] == "delta" else None,
    )
    engine = rollout.NoEngine()
    if dist.get_rank() == 0:
        engine = launch_engine(TOY, RolloutSettings(), config, seed=1)
    version, report = 0, {}
    weight_sync.send_weights(weights, engine, version=version)
    faults = {
        "quantize": not_a_number(trainer),
        # A bucket of changes has up to three: their sizes, they themselves, whole tensors.
        "gather": mock.patch("weight_sync.dist.all_gather", failing_from(7, dist.all_gather)),
        "send": mock.patch(
            "weight_sync.broadcast_bytes", failing_from(3, weight_sync.broadcast_bytes)
        ),
        "end of update": mock.patch(
            "backends.sglang.engine.Engine._close_update", failing_from(1, None)
        )
        if engine.holds_weights
        else contextlib.nullcontext(),
        "refusal": refusing(engine) if engine.holds_weights else contextlib.nullcontext(),
        "load": misshapen(trainer),
    }
    if weights.sent:
        failing = failing_from(3, weight_sync.gather_changes)
        faults = {"compare": mock.patch("weight_sync.gather_changes", failing), **faults}
    for fault, injected in faults.items():
        error = None
        nudge(trainer.gpt, 10)  # so that there are changes to send
        with injected:
            try:
                weight_sync.send_weights(weights, engine, version=version + 1)
                if engine.holds_weights:
                    engine.settle()
            except (RuntimeError, ValueError, errors.EngineDied) as raised:
                error = raised
        report[fault] = {"error": repr(error), "notes": getattr(error, "__notes__", [])}
        if fault == "load":
            break
        if engine.holds_weights:
            report[fault] |= {"version": engine.version, "answers": answers(engine)}
            # What a run never does: mend the engine with a whole hand-off, for the next fault
            engine._last_part = None
            engine.call(engine._close_update())
        version += 1
        if weights.sent:
            weights.sent.version = None
        weight_sync.send_weights(weights, engine, version=version)
        report[fault]["answers_when_mended"] = not engine.holds_weights or answers(engine)
    if engine.holds_weights:
        Path(sys.argv[1]).write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    exits.run_main(main)
