"""An engine on a GPU, as far as a machine without one can show it: its arguments, its updates.

CUDA is pretended where a function asks for it, and the calls that would reach it are recorded:
which arguments an engine gets, that nothing overwrites weights under a forward pass, and what the
gate sees. Memory is given back in order. What only a GPU can show is in tests/gpu.
"""

import ast
import asyncio
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, torchrun

import loop_async
import loop_sync
import weight_sync
from backends.huggingface.config import read_config
from backends.megatron import optimizer, state
from backends.sglang import buckets, checks, gpu, launch
from backends.sglang.engine import Engine
from common import distributed
from common.errors import BadInput
from common.settings import RolloutSettings, TrainSettings
from harness import flags, start
from train_step import build_trainer

TOY = ROOT / "toy"


# --- the arguments of an engine -----------------------------------------------------------------


@pytest.fixture
def arguments(monkeypatch, pretend):
    """Return a function that returns the ServerArgs with which launch_engine starts an engine."""

    def arguments(settings=None, capability=(9, 0), **load) -> dict:
        pretend(capability=capability)
        found, settings = {}, settings or RolloutSettings()
        room = SimpleNamespace(max_req_input_len=512)
        engine = SimpleNamespace(tokenizer_manager=room)
        monkeypatch.setattr(launch, "Engine", lambda *_, **given: found.update(given) or engine)
        monkeypatch.setattr(launch.dist, "get_rank", lambda: 0)
        launch.launch_engine(str(TOY), settings, read_config(TOY), seed=1, **load)
        return found

    return arguments


def test_only_an_engine_that_shares_its_gpu_can_release_its_memory(arguments):
    assert arguments(colocated=True)["enable_memory_saver"] is True
    assert arguments(colocated=False)["enable_memory_saver"] is False


def test_released_weights_come_back_where_only_changes_follow(arguments):
    asked = [(colocated, keeps) for colocated in (True, False) for keeps in (True, False)]
    found = [arguments(colocated=c, keeps_weights=k)["enable_weights_cpu_backup"] for c, k in asked]
    assert found == [True, False, False, False]


def test_an_engine_that_is_updated_in_flight_runs_nothing_while_it_reads_messages(arguments):
    assert arguments(colocated=False)["disable_overlap_schedule"] is True


@pytest.mark.parametrize("on_gpu", [True, False])
def test_and_nobody_can_ask_for_the_contrary(on_gpu):
    with pytest.raises(BadInput, match="disable_overlap_schedule is decided by"):
        checks.server_overrides(("disable_overlap_schedule=false",), on_gpu=on_gpu)


def test_no_prefill_graph_is_captured_beyond_a_short_context(arguments):
    assert arguments()["disable_prefill_cuda_graph"] is True


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (10, 0), (12, 0)])
def test_kernels_take_the_weights_as_they_are_on_every_gpu(arguments, capability):
    found = arguments(capability=capability)
    assert found["fp8_gemm_runner_backend"] == found["moe_runner_backend"] == "triton"


def test_a_16_bit_engine_is_told_no_fp8_kernel(arguments):
    assert "fp8_gemm_runner_backend" not in arguments(RolloutSettings(rollout_dtype="bf16"))


def test_the_cache_has_room_for_what_is_asked_twice_over_and_no_more(arguments):
    assert arguments(requests=100, longest=512)["max_total_tokens"] == 2 * 100 * 512
    assert arguments(requests=1, longest=9)["max_total_tokens"] == checks.LEAST_CACHE
    assert "max_total_tokens" not in arguments()


def test_a_flag_comes_before_these_choices(arguments):
    settings = RolloutSettings(sglang=("fp8_gemm_runner_backend=deep_gemm", "max_total_tokens=77"))
    found = arguments(settings, requests=1, longest=9)
    assert (found["fp8_gemm_runner_backend"], found["max_total_tokens"]) == ("deep_gemm", 77)


def test_every_argument_is_a_field_of_server_args(arguments):
    found = arguments(colocated=True, requests=1, longest=9)
    assert set(found) <= {*checks.SERVER_FIELDS}


@pytest.mark.parametrize(
    "loop, given, expected",
    [
        (loop_sync, [], [16 * 16, 8 * 16]),  # of a step
        (loop_sync, ["--eval-samples-per-prompt", "40"], [40 * 8, 40 * 4]),  # held out
        # Beside training's requests there is a held-out prompt at a time.
        (loop_async, ["--max-staleness", "2", "--oversample", "4"], [52 * 16 + 1, 26 * 16 + 1]),
    ],
)
def test_how_many_requests_an_engine_holds(monkeypatch, loop, given, expected):
    monkeypatch.setattr(sys, "argv", ["loop.py", *given])
    settings = flags.parse_settings(loop.Settings)
    run = start.Run.__new__(start.Run)
    run.settings, run.data = settings, SimpleNamespace(held_out=[None] * 8)
    run.longest, run.is_trainer = 9, True
    for run.engines, requests in enumerate(expected, 1):
        assert run.engine_load["requests"] == requests


# --- an update and a forward pass ---------------------------------------------------------------


class Recorder:
    """Notes the calls of the functions that it replaces, in order."""

    def __init__(self, monkeypatch):
        self.calls, self.monkeypatch = [], monkeypatch

    def replace(self, owner, name: str, result=None) -> None:
        self.monkeypatch.setattr(owner, name, lambda *_, **__: self.note(name, result))

    def note(self, name: str, result=None):
        self.calls.append(name)
        return result


@pytest.fixture
def recorder(monkeypatch):
    return Recorder(monkeypatch)


class NotingModel(torch.nn.Module):
    def __init__(self, recorder: Recorder):
        super().__init__()
        self.recorder = recorder

    def load_weights(self, named):
        for name, _ in named:
            self.recorder.note(name)


def test_weights_are_written_when_the_gpu_has_finished_and_answered_when_they_are(
    pretend, recorder
):
    pretend()
    recorder.replace(torch.cuda, "synchronize")
    header, flat = buckets.pack([("weight", torch.ones(2))])
    header = torch.frombuffer(bytearray(header), dtype=torch.uint8)
    buckets.load_bucket(
        NotingModel(recorder),
        [("header", header), ("bytes", flat), ("versions", torch.tensor([-1, 0]))],
    )
    assert recorder.calls == ["synchronize", "weight", "synchronize"]


# --- the gate -----------------------------------------------------------------------------------


def test_the_gate_sees_every_rank_of_an_engine():
    """Rank 1 holds other bytes, and writes its findings into a copy of the report."""
    done = torchrun("tests/workers/gate.py", ranks=2)
    ones = 4 * 2  # a float32 of 1.0 and one of 2.0 differ in two of four bytes
    assert json.loads(done.stdout) == [[[16, 0, 0]], [[16, ones, 0]]]


class SilentEngine(Engine):
    """An engine whose second rank writes nothing into the report."""

    def __init__(self):
        self.server_args = SimpleNamespace(tp_size=2)

    def _enqueue(self, part, name, about):
        asyncio.run(part())

    def settle(self):
        pass

    async def _do_nothing(self, *_):
        pass

    _begin = _close_update = _continue = _do_nothing

    async def _update(self, message, loader, version):
        message[-1][1][0] = 0


def test_the_gate_fails_if_a_rank_has_not_compared():
    with pytest.raises(RuntimeError, match=r"engine ranks \[1\] have compared nothing"):
        SilentEngine().compare([("weight", torch.ones(2))])


# --- memory that trainer and engine share -------------------------------------------------------


class NotingEngine:
    holds_weights, last_phase = True, None

    def __init__(self, recorder: Recorder):
        for name in ("begin_update", "load", "end_update", "settle"):
            setattr(self, name, lambda *_, name=name, **__: recorder.note(name))


@pytest.mark.parametrize("colocated", [True, False])
def test_the_trainer_frees_its_cache_on_every_rank_before_the_engine_takes_memory(
    pretend, recorder, monkeypatch, colocated
):
    pretend()
    for name in ("ipc_collect", "empty_cache"):
        recorder.replace(torch.cuda, name)
    recorder.replace(distributed, "all_gather_bytes")
    bucket = [("weight", torch.ones(2))]
    monkeypatch.setattr(weight_sync, "buckets_of", lambda *_, **__: iter([bucket, bucket]))
    group = None if colocated else object()
    config = read_config(TOY)
    weights = weight_sync.WeightPath(None, None, config, frozenset(), 1, broadcast_group=group)
    weight_sync.send_weights(weights, NotingEngine(recorder), version=0)
    freed = ["ipc_collect", "empty_cache", "all_gather_bytes"] if colocated else []
    assert recorder.calls == [
        *freed,
        *("begin_update", "load", "load"),
        *(["settle", *freed] if colocated else []),
        "end_update",
        *(["settle"] if colocated else []),
    ]


class ReleasingEngine(Engine):
    """An idle engine that holds 1 GB of weights on each of two GPUs."""

    def __init__(self):
        self.server_args = SimpleNamespace(
            enable_memory_saver=True, enable_weights_cpu_backup=False, tp_size=2
        )
        self._weight_bytes, self._released = 2 * 10**9, False

        async def answer(*_):
            return SimpleNamespace(success=True)

        self.tokenizer_manager = SimpleNamespace(
            flush_cache=answer, release_memory_occupation=answer
        )

    def call(self, coroutine):
        return asyncio.run(coroutine)


@pytest.mark.parametrize("freed, works", [(0, False), (9 * 10**8, False), (95 * 10**7, True)])
def test_an_engine_that_keeps_its_weights_ends_the_run(monkeypatch, freed, works):
    """However much came back of its KV cache, which is released first."""
    free = iter([5 * 10**9, 9 * 10**9, 9 * 10**9, 9 * 10**9 + freed])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (next(free), 80 * 10**9))
    if works:
        return ReleasingEngine().release_memory()
    with pytest.raises(RuntimeError, match="torch_memory_saver does not work"):
        ReleasingEngine().release_memory()


def test_a_few_bytes_are_lost_in_what_else_an_engine_takes(monkeypatch):
    """Seen on an H200 in the third step: 0.0 MB came back of the toy's 1.2 MB."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (5 * 10**9, 80 * 10**9))
    engine = ReleasingEngine()
    engine._weight_bytes = 1_200_000
    engine.release_memory()


def test_changes_are_refused_where_released_weights_are_lost():
    engine = ReleasingEngine()
    with pytest.raises(RuntimeError, match="an engine whose memory keeps no weights"):
        engine.load([], version=2, base=1)


@pytest.mark.parametrize(
    "name, dtype, expected",
    [
        ("a", torch.float8_e4m3fn, 6),
        ("a_scale_inv", torch.float32, 24),
        ("a", torch.bfloat16, 12),
        ("a", torch.float32, 12),  # of a trainer in FP32; the engine holds it in 16 bits
    ],
)
def test_how_much_an_engine_holds_of_what_is_sent(name, dtype, expected):
    assert gpu.held_bytes(name, torch.zeros(2, 3).to(dtype)) == expected


@pytest.mark.parametrize("script", ["loop_sync.py", "examples/ppo_critic.py"])
def test_engines_release_their_memory_before_any_rank_goes_on_to_train(script):
    """A rank without an engine may have an engine's second GPU. Its next step is all_gather."""
    tree = ast.parse((ROOT / script).read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    lines = {node.func.attr: node.lineno for node in calls if isinstance(node.func, ast.Attribute)}
    order = [lines[name] for name in ("release_memory", "all_gather", "update_policy")]
    assert order == sorted(order)


def test_adam_has_its_moments_before_an_engine_starts(fresh_megatron):
    settings = TrainSettings()
    trainer = build_trainer(
        str(TOY),
        settings,
        read_config(TOY),
        steps=1,
        seed=1,
        temperature=1.0,
        max_response_tokens=8,
    )
    for chained in trainer.optimizer.chained_optimizers:
        for group in chained.optimizer.param_groups:
            for parameter in group["params"]:
                state = chained.optimizer.state[parameter]
                assert state["exp_avg"].shape == state["exp_avg_sq"].shape == parameter.shape


class FusedAdam(torch.optim.Optimizer):
    """As Transformer Engine's, which knows no state of the name "step"."""

    def state_dict(self):
        dtypes = {"exp_avg": torch.float32, "exp_avg_sq": torch.float32, "master_param": None}
        for parameter in self.param_groups[0]["params"]:
            for name in self.state[parameter]:
                dtypes[name]
        return super().state_dict()


def test_transformer_engine_s_adam_gets_no_step_of_its_own():
    adam = FusedAdam([torch.nn.Parameter(torch.ones(3))], {})

    def init_state(adam, config):
        for parameter in adam.param_groups[0]["params"]:
            adam.state[parameter]["exp_avg"] = torch.zeros_like(parameter)

    chained = SimpleNamespace(optimizer=adam, config=None, init_state_fn=init_state)
    optimizer._give_adam_its_state(SimpleNamespace(chained_optimizers=[chained]))
    assert adam.state_dict()["state"][0].keys() == {"exp_avg"}


def test_a_checkpoint_gathers_optimizer_state_on_one_rank_and_not_on_every_gpu():
    asked = {}
    shards = SimpleNamespace(
        sharded_state_dict=lambda *_, metadata, **__: asked.update(metadata),
        state_dict=dict,
        chained_optimizers=[],
    )
    trainer = SimpleNamespace(gpt=shards, optimizer=shards, scheduler=shards, dp_cp_group=None)
    trainer.config = trainer.layout = None
    state._sharded_state(trainer)
    assert asked["distrib_optim_fully_reshardable_mem_efficient"] is True


# --- the process of an engine -------------------------------------------------------------------

SCHEDULER = """
import os
import backends
import sglang.srt.managers.scheduler as scheduler
from backends.sglang.process import run_scheduler
name = "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK"
scheduler.run_scheduler_process = lambda: print(os.environ[name])
run_scheduler()
"""


def test_gpus_of_an_engine_may_hold_unequal_trainers():
    """SGLang would refuse to start: pipeline stages, say, take unequal memory."""
    command = [sys.executable, "-c", SCHEDULER]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "0\n", done.stderr
