"""Shared by the tests of this folder: when they are skipped, and how they print their evidence."""

import os
import subprocess
import sys
import time

import pytest
import torch
import transformers
import weight_sync
from conftest import ROOT

# A rehearsal on a CPU, to find mistakes in these tests before a GPU is at hand.
STAND_IN = bool(os.environ.get("GPU_STAND_IN"))
# Further ServerArgs of every engine here, as for --sglang: an attention backend, say.
SGLANG = tuple(os.environ.get("SGLANG_FLAGS", "").split())
FLAGS = ["--sglang", *SGLANG] if SGLANG else []

QWEN3_1_7B = ROOT / "docs" / "configs" / "Qwen3-1.7B"
has_gpu = torch.cuda.is_available()
DEVICE = "cuda" if has_gpu else "cpu"
NO_GPU = "there is no GPU here: torch.cuda.is_available() is False"
# For what a CPU can stand in for, and for what it cannot.
on_gpu = pytest.mark.skipif(not (has_gpu or STAND_IN), reason=NO_GPU)
on_gpu_only = pytest.mark.skipif(not has_gpu, reason=NO_GPU)


def evidence(what: str, **figures) -> None:
    """Print one line: what was seen, on which device."""
    device = torch.cuda.get_device_name() if has_gpu else "CPU (stand-in)"
    shown = ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in figures.items()
    )
    print(f"\nSEEN  {what}: {shown}  [{device}]", flush=True)


def used_bytes() -> int:
    """Return the bytes in use on the GPU, of all processes; 0 without one."""
    if not has_gpu:
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free


def seconds(function, rounds: int = 10) -> float:
    """Return the time of one call in seconds: the median of so many, after two to warm up."""
    times = []
    for _ in range(rounds + 2):
        wait()
        start = time.perf_counter()
        function()
        wait()
        times.append(time.perf_counter() - start)
    return sorted(times[2:])[rounds // 2]


def wait() -> None:
    if has_gpu:
        torch.cuda.synchronize()


def timed_hand_off(pair) -> tuple[int, float]:
    """Send every weight to the engine of a test_engine.Pair; return (bytes, milliseconds)."""
    pair.weights.sent.version = None  # so that all is sent
    start, version = time.perf_counter(), pair.engine.version + 1
    sent = weight_sync.send_weights(pair.weights, pair.engine, version=version)
    wait()
    return sent["sync_bytes"], (time.perf_counter() - start) * 1e3


def write_qwen3_1_7b(folder) -> None:
    """Write Qwen3-1.7B with random weights; a smaller one for a rehearsal.

    It has the toy's tokenizer, and so the toy's end of a sequence.
    """
    config = transformers.AutoConfig.from_pretrained(QWEN3_1_7B)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, 0
    if STAND_IN:
        config.update(dict(hidden_size=256, num_hidden_layers=1, num_key_value_heads=2))
        config.update(dict(intermediate_size=512, vocab_size=1000, num_attention_heads=4))
        config.layer_types = ["full_attention"]
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(ROOT / "toy").save_pretrained(folder)
    del model
    if has_gpu:
        torch.cuda.empty_cache()


class Run:
    """A loop under torchrun on so many ranks, in a process group of its own, in `folder`."""

    def __init__(self, folder, script: str, *flags: str, ranks: int = 1):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [sys.executable, *launcher, str(ROOT / script), "--name", "run", *flags, *FLAGS]
        self.folder = folder / "runs" / "run"
        self.output = open(folder / "output", "w+", encoding="utf-8")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def text(self) -> str:
        self.output.seek(0)
        return self.output.read()
