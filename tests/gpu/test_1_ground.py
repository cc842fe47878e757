"""What everything else stands on: tools, libraries, the FP8 kernel's bits, the packed attention."""

import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from on_gpu import DEVICE, evidence, has_gpu, on_gpu, on_gpu_only, seconds

from backends.fp8_kernel import quantize_into
from backends.megatron.layers import PackedAttention, PackedSequences
from backends.sglang.gpu import memory_saver_libraries
from common import machine
from fp8_quant import quantize_blockwise


@on_gpu_only
def test_the_tools_that_compile_kernels_are_there():
    assert machine.missing_tools() == []
    query = "--query-gpu=name,driver_version,memory.total,compute_cap"
    card = subprocess.run(["nvidia-smi", query, "--format=csv,noheader"], capture_output=True)
    nvcc = shutil.which("nvcc") or os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin/nvcc"
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = version.split("release ")[1].split(",")[0]
    torch_is = f"{torch.__version__} (CUDA {torch.version.cuda})"
    evidence("tools", card=card.stdout.decode().strip(), nvcc=release, torch=torch_is)


@on_gpu_only
def test_the_memory_saver_s_hook_finds_all_its_libraries():
    saver = pytest.importorskip("torch_memory_saver")
    hooks = list(Path(saver.__file__).parent.parent.glob("torch_memory_saver_hook_mode_preload*"))
    assert hooks
    with memory_saver_libraries():
        told = subprocess.run(["ldd", *map(str, hooks)], capture_output=True, text=True).stdout
        folders = os.environ.get("LD_LIBRARY_PATH", "")
    # One hook is for CUDA 12, and one for CUDA 13, which is here.
    missing = {line.split()[0] for line in told.splitlines() if "not found" in line}
    assert missing <= {"libcudart.so.12"}
    evidence("memory saver", hooks=len(hooks), LD_LIBRARY_PATH=folders)


@on_gpu
def test_the_kernel_s_bits_are_the_reference_s(capsys):
    """Ragged edges, every exponent, zeros, transposed: see tests/workers/kernel_bits.py."""
    environment = {**os.environ, **({} if has_gpu else {"TRITON_INTERPRET": "1"})}
    command = [machine.sys.executable, str(ROOT / "tests" / "workers" / "kernel_bits.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    evidence("kernel bits against the CPU reference", result=done.stdout.strip())


@on_gpu_only
def test_how_fast_the_kernel_is():
    """A weight of 512 MB, far beyond the cache. It reads 2 bytes an element and writes 1."""
    weight = torch.randn(16384, 16384, device=DEVICE).bfloat16()
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=DEVICE)
    scales = torch.empty(128, 128, device=DEVICE)
    kernel_s = seconds(lambda: quantize_into(weight, codes, scales))
    whole_s = seconds(lambda: quantize_blockwise(weight))
    other = torch.empty_like(weight)
    copy_s = seconds(lambda: other.copy_(weight))
    nbytes = 3 * weight.numel()
    evidence(
        "quantization of 16384 x 16384",
        kernel_GB_s=nbytes / kernel_s / 1e9,
        quantize_blockwise_GB_s=nbytes / whole_s / 1e9,
        copy_GB_s=4 * weight.numel() / copy_s / 1e9,
    )
    assert (weight.float() - codes.float() * scales.repeat_interleave(128, 0).repeat_interleave(
        128, 1
    )).abs().max() < 0.5  # fmt: skip


def attend(q, k, v, lengths, dtype, device) -> list[torch.Tensor]:
    """Return what PackedAttention makes of packed sequences, and its three gradients, in fp32."""
    alone = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    groups = SimpleNamespace(cp=alone)
    module = PackedAttention(None, 1, None, None, pg_collection=groups)
    inputs = [x.to(device, dtype).clone().requires_grad_() for x in (q, k, v)]
    bounds = torch.tensor([0, *lengths], device=device).cumsum(0)
    out = module(*inputs, packed_seq_params=PackedSequences(cu_seqlens_q=bounds))
    weight = torch.linspace(-1, 1, out.numel(), device=device).view(out.shape)
    (out.float() * weight).sum().backward()
    return [out.detach().float().cpu(), *(x.grad.float().cpu() for x in inputs)]


@on_gpu
def test_packed_attention_equals_the_cpu_s_in_fp32():
    """Forward and backward; lengths in three classes, 8 heads on 2 of keys."""
    generator, lengths = torch.Generator().manual_seed(0), [7, 30, 100, 128, 500, 33]
    q, k, v = (
        torch.randn(sum(lengths), heads, 64, generator=generator).bfloat16().float()
        for heads in (8, 2, 2)
    )
    expected = attend(q, k, v, lengths, torch.float32, "cpu")
    got = attend(q, k, v, lengths, torch.bfloat16, DEVICE)
    errors = [float((a - b).norm() / a.norm()) for a, b in zip(expected, got)]
    assert max(errors) < 1e-2
    evidence(
        "packed attention in BF16, relative error of output and gradients",
        **dict(zip(("out", "dq", "dk", "dv"), errors)),
    )


@on_gpu_only
def test_which_kernel_the_attention_takes():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q = torch.randn(4, 8, 512, 64, device=DEVICE, dtype=torch.bfloat16)
    k = v = torch.randn(4, 2, 512, 64, device=DEVICE, dtype=torch.bfloat16)
    attention = torch.nn.functional.scaled_dot_product_attention
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        flash_s = seconds(lambda: attention(q, k, v, is_causal=True, enable_gqa=True))
    with sdpa_kernel(SDPBackend.MATH):
        math_s = seconds(lambda: attention(q, k, v, is_causal=True, enable_gqa=True))
    evidence("attention", flash_ms=flash_s * 1e3, math_ms=math_s * 1e3)
