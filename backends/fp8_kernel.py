"""Block quantization on a GPU: a Triton program reads each 128 x 128 block once and writes it once.

The result equals fp8_quant.quantize_slab's to the bit. That takes care in three places:

    division   Triton's `/` on fp32 is an approximation, so div_rn is used
    maximum    Triton's max drops NaN, so a block with NaN or infinity is found by a comparison
    cast       casts to e4m3 differ between machines, so the cast is written out in integers: GPUs
               before Ada Lovelace have none, and Triton's interpreter rounds 1.97 to 1 (tests
               without a GPU run on it)

Shape letters: N rows, K columns; n, k blocks along them.
"""

import torch
import triton
import triton.language as tl

BLOCK = 128


@triton.jit
def _e4m3(x):
    """Convert fp32, |x| <= 448, to the bits of the nearest e4m3 value, ties to even."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Normal values, from 2^-6: drop 20 of 23 mantissa bits. The rounding carries into the exponent
    # by itself, and the exponent's bias falls from 127 to 7.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    # Below, e4m3 counts in steps of 2^-9, as fp32 does at 2^14. The addition rounds to such a step
    # and leaves the count in the lowest bits.
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
    """Quantize block (n, k) of the weight; codes and scales are contiguous."""
    n, k = tl.program_id(0), tl.program_id(1)
    # int64: an embedding has more than 2^31 bytes.
    rows = (n * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
    columns = (k * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[None, :]
    inside = (rows < N) & (columns < K)
    place = rows * row_stride + columns * column_stride
    w = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    scale = tl.div_rn(tl.maximum(tl.max(tl.abs(w)), 1e-12), 448.0)
    finite = tl.min((tl.abs(w) < float("inf")).to(tl.int32)) > 0  # comparing with NaN is false
    scaled = tl.minimum(tl.maximum(tl.div_rn(w, scale), -448.0), 448.0)
    tl.store(codes + rows * K + columns, _e4m3(scaled), mask=inside)
    tl.store(scales + n * tl.num_programs(1) + k, tl.where(finite, scale, float("nan")))


def quantize_into(weight_NK: torch.Tensor, codes_NK: torch.Tensor, scale_nk: torch.Tensor) -> None:
    """Quantize a matrix into codes_NK, float8_e4m3fn, and scale_nk, float32, both contiguous.

    weight_NK may have any strides. A block that is not finite gets the scale NaN.
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
