"""fp8_quant.py: the arithmetic that the hand-off's byte-exactness is defined by.

Checked by hand-computable cases, by an independent scalar implementation of e4m3 rounding in float64, and by properties. The GPU kernel is
compared with it bit for bit, without a GPU in Triton's interpreter.
"""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

from fp8_quant import BLOCK, dequantize_blockwise, quantize_blockwise


def round_e4m3(x: float) -> float:
    """Nearest e4m3 value, ties to even: 3 mantissa bits, exponents from -6, subnormal step 2^-9, largest 448. Written from the format's definition."""
    if x == 0:
        return 0.0
    exponent = max(math.floor(math.log2(abs(x))), -6)
    step = 2.0 ** (exponent - 3)
    return math.copysign(min(round(abs(x) / step) * step, 448.0), x)  # Python's round is half to even


def test_a_block_by_hand():
    # amax 896 -> scale 2. 896/2 = 448; 1/2 = 0.5; 3.1/2 = 1.55 -> between 1.5 and 1.625, nearer to 1.5.
    weight = torch.zeros(BLOCK, BLOCK)
    weight[0, :3] = torch.tensor([896.0, 1.0, 3.1])
    codes, scale_inv = quantize_blockwise(weight)
    assert scale_inv.tolist() == [[2.0]]
    assert codes[0, :4].float().tolist() == [448.0, 0.5, 1.5, 0.0]
    assert dequantize_blockwise(codes, scale_inv, dtype=torch.float32)[0, :3].tolist() == [896.0, 1.0, 3.0]


@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (100, 50), (129, 257), (1, 1), (576, 192)])
@pytest.mark.parametrize("scale_format", ["fp32", "ue8m0"])
def test_agrees_with_a_scalar_implementation(shape, scale_format):
    # Ragged shapes have smaller blocks at the lower and right edge; the scale there sees only real elements.
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.05
    codes, scale_inv = quantize_blockwise(weight, scale_format=scale_format)
    w = weight.numpy()
    for n in range(0, shape[0], BLOCK):
        for k in range(0, shape[1], BLOCK):
            block = w[n : n + BLOCK, k : k + BLOCK]
            scale = np.float32(max(np.abs(block).max(), np.float32(1e-12)) / np.float32(448))
            if scale_format == "ue8m0":
                scale = np.float32(2.0 ** math.ceil(math.log2(float(scale))))
            assert scale_inv[n // BLOCK, k // BLOCK].item() == scale
            for i, j in [(0, 0), (block.shape[0] - 1, block.shape[1] - 1), (block.shape[0] // 2, block.shape[1] // 3)]:
                assert codes[n + i, k + j].float().item() == round_e4m3(float(block[i, j] / scale))


def test_zero_block_gives_zeros_not_nan():
    codes, scale_inv = quantize_blockwise(torch.zeros(256, 128))
    assert torch.isfinite(scale_inv).all() and (scale_inv > 0).all()
    assert (codes.view(torch.uint8) == 0).all()


def test_rms_error_is_that_of_three_mantissa_bits():
    # Judge blocks, not elements: a small element beside a large one may vanish.
    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(1))
    for scale in (1.0, 1e-4, 1e4):
        codes, scale_inv = quantize_blockwise(weight * scale)
        error = dequantize_blockwise(codes, scale_inv, dtype=torch.float32) - weight * scale
        assert 0.024 < (error.norm() / (weight * scale).norm()).item() < 0.028


def test_quantizing_what_was_quantized_changes_nothing():
    codes, scale_inv = quantize_blockwise(torch.randn(256, 256, generator=torch.Generator().manual_seed(2)))
    again, scale_again = quantize_blockwise(dequantize_blockwise(codes, scale_inv, dtype=torch.float32))
    assert torch.equal(codes.view(torch.uint8), again.view(torch.uint8)) and torch.allclose(scale_inv, scale_again, rtol=1e-6)


def test_shards_cut_at_blocks_quantize_alone():
    # The reason the hand-off may quantize before it gathers: cut at a multiple of 128, no block sees another shard.
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(3))
    whole, whole_scale = quantize_blockwise(weight)
    for dim in (0, 1):
        parts = [quantize_blockwise(part) for part in weight.chunk(2, dim)]
        assert torch.equal(torch.cat([codes.view(torch.uint8) for codes, _ in parts], dim), whole.view(torch.uint8))
        assert torch.equal(torch.cat([scale for _, scale in parts], dim), whole_scale)
    cut = torch.cat([quantize_blockwise(part)[0].view(torch.uint8) for part in weight.split([64, 192])])
    assert not torch.equal(cut, whole.view(torch.uint8))  # cut inside a block, the bytes differ


def test_ue8m0_scales_are_powers_of_two_and_never_smaller():
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(4))
    _, fp32 = quantize_blockwise(weight)
    _, ue8m0 = quantize_blockwise(weight, scale_format="ue8m0")
    mantissa, _ = torch.frexp(ue8m0)
    assert (mantissa == 0.5).all() and (ue8m0 >= fp32).all() and (ue8m0 < 2 * fp32).all()


@pytest.mark.parametrize("bad, message", [(torch.ones(3), "matrix"), (torch.tensor([[float("nan")]]), "NaN"), (torch.tensor([[float("inf")]]), "NaN")])
def test_refuses_what_it_cannot_represent(bad, message):
    with pytest.raises(ValueError, match=message):
        quantize_blockwise(bad)


@pytest.mark.skipif(torch.cuda.is_available(), reason="cpu.py is for machines without a GPU")
def test_rounding_without_conversion_is_the_formats_own():
    import cpu

    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    exact = codes[codes.isfinite()].sort().values
    halfway = (exact[1:] + exact[:-1]) / 2  # ties, and what lies just beside them
    up, down = (torch.nextafter(halfway, torch.tensor(float(sign))) for sign in (1000, -1000))
    noise = torch.randn(100_000, generator=torch.Generator().manual_seed(1)).mul(100).clamp(-448, 448)
    x = torch.cat([exact, halfway, up, down, noise, noise / 1000, noise / 1e6, noise / 1e30])
    assert torch.equal(cpu.round_to_e4m3(x), x.to(torch.float8_e4m3fn).float())


def test_the_gpu_kernel_has_the_same_bits():
    """On a GPU where there is one; else in Triton's interpreter, which has to be asked for before the first import of Triton: in a process of its own."""
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    command = [sys.executable, ROOT / "tests" / "workers" / "kernel_bits.py"]
    done = subprocess.run(command, env={**os.environ, **interpreted}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["8", "cases", "equal"]
