"""FP8 quantization: the arithmetic that defines which bytes a weight update delivers.

Why: engine and trainer must agree on every byte, so one wrong rounding breaks the verification of
weights. The tests have cases to compute by hand, an independent scalar implementation of e4m3
rounding in float64, and properties. The GPU kernel must give the same bits; without a GPU it runs
in Triton's interpreter. Not covered: how fast it is.
"""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

import fp8_quant
from fp8_quant import BLOCK, dequantize_blockwise, quantize_blockwise


def round_e4m3(x: float) -> float:
    """Return the nearest e4m3 value, ties to even, written from the format's definition.

    3 mantissa bits, exponents from -6, subnormal step 2^-9, largest value 448.
    """
    if x == 0:
        return 0.0
    exponent = max(math.floor(math.log2(abs(x))), -6)
    step = 2.0 ** (exponent - 3)
    # Python's round takes ties to even.
    return math.copysign(min(round(abs(x) / step) * step, 448.0), x)


def assert_same(got, expected) -> None:
    """Assert that codes and scales are equal to the last bit."""
    assert torch.equal(got[0].view(torch.uint8), expected[0].view(torch.uint8))
    assert torch.equal(got[1], expected[1])


def test_a_block_by_hand():
    # The largest value 896 gives the scale 2. 896/2 = 448 and 1/2 = 0.5 are codes. 3.1/2 = 1.55
    # lies between 1.5 and 1.625, nearer to 1.5.
    weight = torch.zeros(BLOCK, BLOCK)
    weight[0, :3] = torch.tensor([896.0, 1.0, 3.1])
    codes, scale_inv = quantize_blockwise(weight)
    assert scale_inv.tolist() == [[2.0]]
    assert codes[0, :4].float().tolist() == [448.0, 0.5, 1.5, 0.0]
    again = dequantize_blockwise(codes, scale_inv, dtype=torch.float32)
    assert again[0, :3].tolist() == [896.0, 1.0, 3.0]


# The last three need several slabs: slabs of several rows of blocks, ragged edges, and a row of
# blocks that is larger than a slab.
SHAPES = [(128, 128), (256, 384), (100, 50), (129, 257), (1, 1), (576, 192)]
SHAPES += [(1024, 768), (900, 530), (130, 4100)]


@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_a_scalar_implementation(shape):
    # Ragged shapes have smaller blocks at the lower and right edge. Only real elements set their
    # scale.
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.05
    codes, scale_inv = quantize_blockwise(weight)
    w = weight.numpy()
    for n in range(0, shape[0], BLOCK):
        for k in range(0, shape[1], BLOCK):
            block = w[n : n + BLOCK, k : k + BLOCK]
            scale = np.float32(max(np.abs(block).max(), np.float32(1e-12)) / np.float32(448))
            assert scale_inv[n // BLOCK, k // BLOCK].item() == scale
            for i, j in [
                (0, 0),
                (block.shape[0] - 1, block.shape[1] - 1),
                (block.shape[0] // 2, block.shape[1] // 3),
            ]:
                assert codes[n + i, k + j].float().item() == round_e4m3(float(block[i, j] / scale))


def test_every_code_is_that_of_the_quotient():
    """Multiplying by the scale's reciprocal would change about one code in ten thousand."""
    weight = torch.randn(1024, 768, generator=torch.Generator().manual_seed(9)).bfloat16()
    codes, scale_inv = quantize_blockwise(weight)
    scale_NK = np.kron(scale_inv.numpy(), np.ones((BLOCK, BLOCK), np.float32))
    quotient = torch.from_numpy(weight.float().numpy() / scale_NK)
    assert torch.equal(codes.float(), quotient.to(torch.float8_e4m3fn).float())


def test_dequantizing_rounds_once():
    """The scale is no BF16 number. The product is rounded, and the scale is not."""
    weight = torch.randn(256, 384, generator=torch.Generator().manual_seed(10))
    codes, scale_inv = quantize_blockwise(weight)
    exact = dequantize_blockwise(codes, scale_inv, dtype=torch.float32)
    assert torch.equal(dequantize_blockwise(codes, scale_inv), exact.bfloat16())


def test_zero_block_gives_zeros_not_nan():
    codes, scale_inv = quantize_blockwise(torch.zeros(256, 128))
    assert torch.isfinite(scale_inv).all() and (scale_inv > 0).all()
    assert (codes.view(torch.uint8) == 0).all()


def test_rms_error_is_that_of_three_mantissa_bits():
    # The error is that of a whole matrix: a small element beside a large one may vanish.
    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(1))
    for scale in (1.0, 1e-4, 1e4):
        codes, scale_inv = quantize_blockwise(weight * scale)
        error = dequantize_blockwise(codes, scale_inv, dtype=torch.float32) - weight * scale
        assert 0.024 < (error.norm() / (weight * scale).norm()).item() < 0.028


def test_quantizing_what_was_quantized_changes_nothing():
    codes, scale_inv = quantize_blockwise(
        torch.randn(256, 256, generator=torch.Generator().manual_seed(2))
    )
    again, scale_again = quantize_blockwise(
        dequantize_blockwise(codes, scale_inv, dtype=torch.float32)
    )
    assert torch.equal(codes.view(torch.uint8), again.view(torch.uint8))
    assert torch.allclose(scale_inv, scale_again, rtol=1e-6)


def test_shards_cut_at_blocks_quantize_alone():
    # A shard cut at a multiple of 128 holds whole blocks. So a weight update may quantize before it
    # gathers.
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(3))
    whole, whole_scale = quantize_blockwise(weight)
    for dim in (0, 1):
        parts = [quantize_blockwise(part) for part in weight.chunk(2, dim)]
        assert torch.equal(
            torch.cat([codes.view(torch.uint8) for codes, _ in parts], dim), whole.view(torch.uint8)
        )
        assert torch.equal(torch.cat([scale for _, scale in parts], dim), whole_scale)
    cut = torch.cat(
        [quantize_blockwise(part)[0].view(torch.uint8) for part in weight.split([64, 192])]
    )
    assert not torch.equal(cut, whole.view(torch.uint8))  # a cut inside a block changes bytes


@pytest.mark.parametrize("slab", [1, 2**15, 2**17, 2**40])
def test_the_size_of_a_slab_does_not_show(slab, monkeypatch):
    # Slabs bound the temporaries. Whatever their size, they hold whole rows of blocks.
    weight = torch.randn(700, 400, generator=torch.Generator().manual_seed(6))
    expected = quantize_blockwise(weight)
    monkeypatch.setattr(fp8_quant, "SLAB", slab)
    assert_same(quantize_blockwise(weight), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_weight_is_taken_at_its_own_value(dtype):
    # BF16 and FP16 values are exact FP32 numbers. No step is computed in 16 bits.
    weight = torch.randn(300, 200, generator=torch.Generator().manual_seed(7)).to(dtype)
    scale = weight.float()[:128, :128].abs().max() / 448
    codes, scale_inv = quantize_blockwise(weight)
    assert scale_inv[0, 0] == scale
    assert_same((codes, scale_inv), quantize_blockwise(weight.float()))


@pytest.mark.parametrize("view", [
    lambda x: x.t(), lambda x: x[::2, 1:], lambda x: x[5:, ::3], lambda x: x[0].expand(300, -1),
])  # fmt: skip
def test_strides_do_not_show(view):
    weight = view(torch.randn(600, 500, generator=torch.Generator().manual_seed(8)))
    assert not weight.is_contiguous()
    assert_same(quantize_blockwise(weight), quantize_blockwise(weight.contiguous()))


def test_the_largest_value_of_a_block_may_be_negative():
    weight = torch.full((1, 2), -896.0)
    weight[0, 1] = 1.0
    codes, scale_inv = quantize_blockwise(weight)
    assert scale_inv.tolist() == [[2.0]]
    assert codes.float().tolist() == [[-448.0, 0.5]]


@pytest.mark.parametrize("amax, scale", [
    (1e-11, np.float32(1e-11) / np.float32(448)), (1e-13, np.float32(1e-12) / np.float32(448)),
])  # fmt: skip
def test_only_a_block_below_the_floor_is_rounded_to_zero_scale(amax, scale):
    # The floor 1e-12 is far below any weight, so small weights keep their 3 bits.
    codes, scale_inv = quantize_blockwise(torch.tensor([[amax]]))
    assert scale_inv.item() == scale
    assert codes.float().item() == round_e4m3(float(np.float32(amax) / scale))


@pytest.mark.parametrize("exponent", [-30, -8, -1, 0, 1, 20])
def test_a_scale_that_is_a_power_of_two_is_exact(exponent):
    weight = torch.full((2, 1), 448.0 * 2.0**exponent)
    codes, scale_inv = quantize_blockwise(weight)
    assert scale_inv.item() == 2.0**exponent
    assert codes.float().flatten().tolist() == [448.0, 448.0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [(0, 0), (699, 399), (699, 0), (0, 399), (300, 200)])
def test_a_value_that_is_not_finite_is_found_wherever_it_is(value, place, monkeypatch):
    monkeypatch.setattr(fp8_quant, "SLAB", 2**16)  # the weight needs several slabs
    weight = torch.ones(700, 400)
    weight[place] = value
    with pytest.raises(ValueError, match=r"shape \(700, 400\) holds NaN or infinity"):
        quantize_blockwise(weight)


def test_scales_must_fit_the_codes():
    codes, scale_inv = quantize_blockwise(torch.ones(129, 128))
    rule = r"scales of shape \(1, 1\) do not fit a weight of shape \(129, 128\)"
    with pytest.raises(ValueError, match=rule):
        dequantize_blockwise(codes, scale_inv[:1])


@pytest.mark.parametrize("bad, message", [
    (torch.ones(3), "matrix, got shape \\(3,\\)"), (torch.ones(2, 2, 2), "matrix"),
    (torch.empty(4, 0), "no elements"), (torch.empty(0, 4), "no elements"),
    (torch.ones(2, 2, dtype=torch.int64), "torch.int64"),
    (torch.ones(2, 2, dtype=torch.float64), "torch.float64"),
    (torch.ones(2, 2).to(torch.float8_e4m3fn), "torch.float8_e4m3fn"),
])  # fmt: skip
def test_refuses_what_it_cannot_represent(bad, message):
    with pytest.raises(ValueError, match=message):
        quantize_blockwise(bad)


@pytest.mark.skipif(torch.cuda.is_available(), reason="backends/cpu is for machines without a GPU")
def test_rounding_without_conversion_is_the_formats_own():
    from backends.fp8_activations import round_to_e4m3

    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    exact = codes[codes.isfinite()].sort().values
    halfway = (exact[1:] + exact[:-1]) / 2  # ties; below come their neighbours
    up, down = (torch.nextafter(halfway, torch.tensor(float(sign))) for sign in (1000, -1000))
    noise = (
        torch.randn(100_000, generator=torch.Generator().manual_seed(1)).mul(100).clamp(-448, 448)
    )
    x = torch.cat([exact, halfway, up, down, noise, noise / 1000, noise / 1e6, noise / 1e30])
    assert torch.equal(round_to_e4m3(x), x.to(torch.float8_e4m3fn).float())


def test_the_gpu_kernel_has_the_same_bits():
    """Without a GPU the kernel runs in Triton's interpreter.

    The interpreter must be chosen before Triton's first import, so the kernel has its own process.
    """
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    command = [sys.executable, ROOT / "tests" / "workers" / "kernel_bits.py"]
    done = subprocess.run(
        command, env={**os.environ, **interpreted}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["5", "cases", "equal"]
