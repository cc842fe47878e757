"""What a GPU machine must have, what is refused by name, and what the trainer asks of PyTorch.

CUDA is pretended, see conftest.pretend. What only a GPU can show is in tests/gpu.
"""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import loop_sync
from backends.megatron import batches, layers
from backends.sglang import gpu
from common import machine
from common.errors import BadInput
from common.settings import RolloutSettings
from data.sample import Sample
from harness import flags, plan


# --- the environment of an engine ---------------------------------------------------------------


def test_the_memory_saver_finds_libcudart_in_pip_s_packages(monkeypatch, tmp_path):
    folder = tmp_path / "nvidia" / "cu13" / "lib"
    folder.mkdir(parents=True)
    (folder / "libcudart.so.13").touch()
    (tmp_path / "nvidia" / "cudnn" / "lib").mkdir(parents=True)
    packages = SimpleNamespace(submodule_search_locations=[str(tmp_path / "nvidia")])
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: packages)
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/mine")
    with gpu.memory_saver_libraries():
        assert os.environ["LD_LIBRARY_PATH"] == f"{folder}:/opt/mine"
    assert os.environ["LD_LIBRARY_PATH"] == "/opt/mine"
    monkeypatch.delenv("LD_LIBRARY_PATH")
    with gpu.memory_saver_libraries():
        assert os.environ["LD_LIBRARY_PATH"] == str(folder)
    assert "LD_LIBRARY_PATH" not in os.environ


@pytest.mark.parametrize("tp, expected", [("2", "1"), ("1", None)])
def test_tensor_parallel_trainers_launch_in_order(monkeypatch, tp, expected):
    """CUDA reads the variable at its first call. Flags are read before torch is imported."""
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "")
    del os.environ["CUDA_DEVICE_MAX_CONNECTIONS"]
    monkeypatch.setattr(sys, "argv", ["loop.py", "--tp", tp])
    flags.parse_or_exit(loop_sync.Settings)
    assert os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == expected


# --- what is refused ----------------------------------------------------------------------------


def refused(**given) -> str:
    has_engine = given.pop("has_engine", True)
    try:
        gpu.check_gpus(RolloutSettings(**given), has_engine=has_engine)
    except BadInput as error:
        return str(error)
    return ""


def test_more_ranks_than_gpus(pretend):
    pretend(gpus=1, ranks=2)
    assert "2 ranks on a machine of 1 GPUs" in refused()
    assert "--nproc-per-node" in refused()


def test_a_rank_without_a_gpu_of_its_own_whoever_started_it(pretend, monkeypatch):
    pretend(gpus=2, rank=1)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert refused() == ""
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert "3 ranks on a machine of 2 GPUs" in refused()


def test_a_gpu_that_knows_no_bf16(pretend):
    pretend(capability=(7, 5))
    assert "SGLang would compute in FP16" in refused(rollout_dtype="bf16")


def test_an_engine_that_would_span_two_machines(pretend):
    pretend(gpus=4, ranks=4, rank=2)
    assert refused(engine_tp=2) == ""
    assert "--engine-tp 3 GPUs of its own machine, which has 2 left" in refused(engine_tp=3)
    assert refused(engine_tp=3, has_engine=False) == ""


@pytest.mark.parametrize("capability, works", [((8, 0), False), ((8, 6), False), ((8, 9), True)])
def test_fp8_on_a_gpu_that_cannot(pretend, capability, works):
    pretend(capability=capability)
    assert ("use --rollout-dtype bf16" in refused()) is not works
    assert refused(rollout_dtype="bf16") == ""


def test_fp32_rollouts(pretend):
    pretend()
    assert "use --rollout-dtype bf16" in refused(rollout_dtype="fp32")


@pytest.mark.parametrize("name", gpu.ALLOCATOR_VARIABLES)
def test_an_allocator_whose_memory_no_other_process_can_open(pretend, monkeypatch, name):
    pretend()
    monkeypatch.setenv(name, "max_split_size_mb:64, expandable_segments: True")
    assert name in refused() and "unset it" in refused()
    monkeypatch.setenv(name, "backend:cudaMallocAsync")
    assert name in refused()
    monkeypatch.setenv(name, "expandable_segments:False")
    assert refused() == ""


def test_without_a_gpu_none_of_it_is_asked():
    assert refused(rollout_dtype="fp32", engine_tp=99) == ""


@pytest.mark.parametrize(
    "rank, rollout_ranks, engine_tp, expected",
    [(0, 2, 1, 0), (1, 2, 1, 1), (1, 2, 2, None), (0, 1, 1, None), (1, 1, 1, 0)],
)
def test_which_ranks_start_an_engine(rank, rollout_ranks, engine_tp, expected):
    run = SimpleNamespace(load_rollouts="")
    settings = SimpleNamespace(rollout=RolloutSettings(engine_tp=engine_tp), run=run)
    split = dict(ranks=2, rollout_ranks=rollout_ranks)
    assert plan.engine_index(settings, rank, **split) == expected
    run.load_rollouts = "a folder"
    assert plan.engine_index(settings, rank, **split) is None


def test_a_missing_compiler_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(machine.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(machine.sysconfig, "get_path", lambda _: str(tmp_path))
    named = " ".join(machine.missing_tools())
    assert all(tool in named for tool in ("nvcc", "gcc", "c++", "ninja", "Python.h"))


@pytest.fixture
def complete(monkeypatch, tmp_path):
    """A machine that has every tool; its toolkit is in tmp_path."""
    for folder in ("bin", "lib64", "venv"):
        (tmp_path / folder).mkdir()
    for tool in ("nvcc", "gcc", "c++", "ninja"):
        (tmp_path / "bin" / tool).touch(mode=0o755)
    for file in ("Python.h", "lib64/libcudart.so"):
        (tmp_path / file).touch()
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(machine.sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.setattr(machine.sys, "executable", str(tmp_path / "venv" / "python"))
    assert machine.missing_tools() == []
    return tmp_path


def test_a_compiler_may_have_another_name(complete, monkeypatch):
    (complete / "bin" / "c++").rename(complete / "bin" / "x86_64-conda-linux-gnu-c++")
    assert machine.missing_tools() == ["a C++ compiler (c++, or CXX)"]
    monkeypatch.setenv("CXX", "x86_64-conda-linux-gnu-c++ -O2")
    assert machine.missing_tools() == []


def test_ninja_is_found_beside_the_interpreter(complete):
    (complete / "bin" / "ninja").rename(complete / "venv" / "ninja")
    assert machine.missing_tools() == []


def test_the_toolkit_is_looked_for_where_sglang_looks(complete, monkeypatch):
    monkeypatch.delenv("CUDA_HOME")
    assert machine.cuda_home() == complete  # two folders above nvcc
    (complete / "lib64" / "libcudart.so").unlink()
    (missing,) = machine.missing_tools()
    assert f"lib64/libcudart.so in {complete}" in missing and "set CUDA_HOME" in missing


@pytest.mark.parametrize(
    "tools, version, said",
    [
        ([], "0.5.21", ""),
        ([], "0.5.14", ""),
        (["nvcc"], "0.5.21", "and miss nvcc"),
        ([], "0.5.23", "sglang 0.5.23 is installed"),
    ],
)
def test_a_gpu_machine_without_a_compiler_is_refused_before_sglang_is_imported(
    pretend, monkeypatch, capsys, tools, version, said
):
    pretend()
    monkeypatch.setattr(machine, "missing_tools", lambda: tools)
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(machine.importlib.metadata, "version", lambda name: version)
    if not said:
        return machine.check_installation()
    with pytest.raises(SystemExit) as end:
        machine.check_installation()
    assert end.value.code == 2
    assert said in capsys.readouterr().err


# --- the trainer's attention and its batches ----------------------------------------------------


def test_masked_attention_gets_as_many_keys_as_queries(monkeypatch):
    """Else no fused kernel of PyTorch takes it, and the plain one holds every score."""
    asked = []

    def attention(q, k, v, **options):
        asked.append((q.shape, k.shape, options["enable_gqa"]))
        return torch.zeros_like(q)

    monkeypatch.setattr(layers.F, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(layers, "FUSES_MASK_AND_GROUPS", False)  # as where CUDA is
    groups = SimpleNamespace(cp=SimpleNamespace(size=lambda: 2))
    module = layers.PackedAttention(None, 1, None, None, pg_collection=groups)
    q, kv = torch.randn(4, 6, 8), torch.randn(8, 2, 8)
    module._attend(torch.tensor([8]), q, kv, kv, torch.arange(4))
    (q_shape, k_shape, enable_gqa) = asked[0]
    assert (q_shape[1], k_shape[1], enable_gqa) == (6, 6, False)


def test_cudnn_is_told_few_different_lengths():
    def longest(n: int) -> int:
        sample = Sample(prompt_ids=[1] * n, response_ids=[1], loss_mask=[1])
        batch = batches.collate([sample], [0], tp=1, cp=1, cp_rank=0, device="cpu")
        return int(batch.packed.max_seqlen_q)

    assert [longest(n) for n in (1, 127, 128)] == [128, 128, 256]


def test_a_router_works_without_transformer_engine():
    """megatron-core 0.16.1 asks for a name that only Transformer Engine gives it."""
    import backends.megatron.model  # noqa: F401
    from megatron.core.transformer.moe.moe_utils import router_gating_linear

    scores = router_gating_linear(torch.ones(2, 4), torch.ones(3, 4), None, torch.float32)
    assert scores.tolist() == [[4.0] * 3] * 2


# --- tests/gpu ----------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_its_tests_are_skipped_and_say_why():
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "tests/gpu"]
    environment = {name: x for name, x in os.environ.items() if name != "GPU_STAND_IN"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "passed" not in done.stdout and "failed" not in done.stdout
    assert "there is no GPU here: torch.cuda.is_available() is False" in done.stdout


@pytest.mark.complete
@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_cpu_stands_in_for_a_gpu_in_a_rehearsal():
    """Of the files that start no engine; docs/gpu.md has the command for all."""
    command = [sys.executable, "-m", "pytest", "-s", "tests/gpu/test_1_ground.py"]
    command += ["tests/gpu/test_2_trainer.py"]
    environment = {**os.environ, "GPU_STAND_IN": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "SEEN  kernel bits" in done.stdout and "SEEN  local spec, step 3" in done.stdout
