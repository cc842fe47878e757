"""quantize_blockwise on a GPU: one Triton program per 128 x 128 block, which is read once and
written once.

The arithmetic is that of fp8_quant.quantize_slab, and so are the bits. Three things need care for
that. Triton's `/` on fp32 is an approximation: div_rn. Its max drops NaN: a block that is not
finite is found by itself. And the cast to e4m3 is written out in integers, because casts differ:
GPUs before Ada Lovelace have none, and the interpreter's, which tests without a GPU run on, rounds
1.97 to 1.
"""

import torch
import triton
import triton.language as tl

BLOCK = 128


@triton.jit
def _e4m3(x):
    """fp32, |x| <= 448 -> the bits of the nearest e4m3 value, ties to even.

    Normal values, from 2^-6: drop 20 of 23 mantissa bits, the rounding carries into the exponent by
    itself, and the exponent's bias falls from 127 to 7. Below, e4m3 counts in steps of 2^-9: so
    does fp32 at 2^14, which makes the addition round and leaves the count in its lowest bits.
    """
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    subnormal = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) & 0xF
    code = tl.where(tl.abs(x) < 0.015625, subnormal, normal)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _quantize_block(
    weight,
    codes,
    scales,
    N,
    K,
    row_stride,
    column_stride,
    BLOCK: tl.constexpr,
):
    n, k = tl.program_id(0), tl.program_id(1)
    rows = (n * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[
        :, None
    ]  # an embedding has more than 2^31 bytes
    columns = (k * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[None, :]
    inside = (rows < N) & (columns < K)
    w = tl.load(weight + rows * row_stride + columns * column_stride, mask=inside, other=0.0).to(
        tl.float32
    )
    scale = tl.div_rn(tl.maximum(tl.max(tl.abs(w)), 1e-12), 448.0)
    finite = tl.min((tl.abs(w) < float("inf")).to(tl.int32)) > 0  # comparing with NaN is false
    scaled = tl.minimum(tl.maximum(tl.div_rn(w, scale), -448.0), 448.0)
    tl.store(codes + rows * K + columns, _e4m3(scaled), mask=inside)
    tl.store(scales + n * tl.num_programs(1) + k, tl.where(finite, scale, float("nan")))


def quantize_into(weight_NK: torch.Tensor, codes_NK: torch.Tensor, scale_nk: torch.Tensor) -> None:
    """Quantize a weight of any strides into codes_NK, float8_e4m3fn, and scale_nk, float32.

    Both are contiguous. A block that holds NaN or infinity gets the scale NaN.
    """
    N, K = weight_NK.shape
    blocks = _quantize_block[scale_nk.shape]
    blocks(
        weight_NK,
        codes_NK.view(torch.uint8),
        scale_nk,
        N,
        K,
        *weight_NK.stride(),
        BLOCK=BLOCK,
        num_warps=8,
    )
