"""Block-scaled FP8: BF16 weight -> e4m3 codes, and one fp32 scale per 128 x 128 block.

Why FP8. Decoding one token reads every weight once, so memory bandwidth limits generation. Half the
bytes mean up to twice the speed, and they leave more memory for the KV cache. A weight update sends
half the bytes, too. Training stays in BF16.

Why e4m3. Of its eight bits, e4m3 spends 4 on the exponent and 3 on the mantissa. Neighbouring
values differ by 7 to 12.5 %. The largest is 448, the smallest normal value is 2^-6, and subnormals
reach down to 2^-9. The alternative, e5m2, is meant for gradients: it reaches further with half the
resolution. The "fn" in float8_e4m3fn means finite: there is no infinity. A plain cast turns values
beyond 448 into NaN, hence the clamp below.

Why blocks. With one scale for a whole matrix, a single outlier pushes all other values towards
zero. With one scale per 128 x 128 block, the damage stays in its block. 128 is the tile that
Hopper's FP8 matrix kernels accumulate before they apply the scales (DeepSeek-V3, section 3.3).
SGLang reads this checkpoint format, which DeepSeek-V3 and Qwen3-FP8 use.

    amax    = max |w| over the block
    scale   = max(amax, 1e-12) / 448          the floor keeps a block of zeros from dividing 0 by 0
    q       = round_e4m3(clamp(w / scale, -448, 448))
    w      ~= q * scale

Hugging Face stores the scale as `weight_scale_inv`. Despite the name, one multiplies by it. This is
the only place that says so.

The contract. Trainer and engine must agree on every byte, so this arithmetic is exact: fp32,
division by the scale, rounding to nearest even. Multiplying by 1/scale would change about one code
in ten thousand. A matrix whose sides are not multiples of 128 has smaller blocks at its lower and
right edges. A tensor-parallel shard may be quantized alone exactly when its boundaries are
multiples of 128: then no block spans two shards.

Expect an RMS error of about 2.6 % of the weights, whatever their magnitude. It comes from rounding
to 3 bits of mantissa; it is not a defect. A small element beside a large one may become zero, so
judge errors per block and not per element.

Shape letters: N output features (rows), K input features (columns), n and k blocks along them, B
the side of a block.
"""

import torch
import torch.nn.functional as F

BLOCK = 128
FP8_MAX = 448.0  # torch.finfo(torch.float8_e4m3fn).max
AMAX_FLOOR = 1e-12
# A CPU quantizes this many elements at a time, in whole rows of blocks. In fp32 they fit in its
# cache, which makes it several times faster and keeps the temporaries small.
SLAB = 2**18


def quantize_blockwise(weight_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a matrix to e4m3 with one scale per 128 x 128 block.

    weight_NK: bf16, fp16 or fp32, any strides, any device. Returns (codes [N, K] float8_e4m3fn,
    scale_inv [ceil(N/128), ceil(K/128)] float32) on the same device.

    Raises ValueError for another shape or dtype and for a matrix without elements. Also raises it
    for NaN and infinity: the whole block would be lost, and nothing would show it.
    """
    if weight_NK.dim() != 2:
        raise ValueError(f"block quantization takes a matrix, got shape {tuple(weight_NK.shape)}")
    if weight_NK.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"block quantization takes bf16, fp16 or fp32, got {weight_NK.dtype}")
    if not weight_NK.numel():
        raise ValueError(f"a weight of shape {tuple(weight_NK.shape)} has no elements to quantize")

    N, K = weight_NK.shape
    device = weight_NK.device
    codes_NK = torch.empty(N, K, dtype=torch.float8_e4m3fn, device=device)
    scale_nk = torch.empty(_blocks(N), _blocks(K), dtype=torch.float32, device=device)
    if weight_NK.is_cuda:
        # The kernel does the arithmetic of quantize_slab, in one pass over the weight. Imported
        # here because a machine without a GPU needs no Triton.
        from backends.fp8_kernel import quantize_into

        quantize_into(weight_NK, codes_NK, scale_nk)
    else:
        block_rows = max(1, SLAB // (BLOCK * K))
        rows = BLOCK * block_rows
        slabs = zip(weight_NK.split(rows), codes_NK.split(rows), scale_nk.split(block_rows))
        for slab_NK, slab_codes_NK, slab_scale_nk in slabs:
            quantize_slab(slab_NK, slab_codes_NK, slab_scale_nk)
    if not torch.isfinite(scale_nk).all():
        raise ValueError(
            f"a weight of shape {(N, K)} holds NaN or infinity and cannot be quantized"
        )
    return codes_NK, scale_nk


def quantize_slab(weight_NK: torch.Tensor, codes_NK: torch.Tensor, scale_nk: torch.Tensor) -> None:
    """Quantize whole rows of blocks on a CPU: the reference arithmetic.

    Writes codes_NK and scale_nk. A block with NaN or infinity gets such a scale.
    """
    N, K = weight_NK.shape
    # Fill the blocks at the edges with zeros, which never raise a block's maximum.
    padded_NK = F.pad(weight_NK.float(), (0, -K % BLOCK, 0, -N % BLOCK))
    blocks_nBkB = padded_NK.view(_blocks(N), BLOCK, _blocks(K), BLOCK)
    amax_nk = blocks_nBkB.abs().amax(dim=(1, 3))
    torch.div(amax_nk.clamp(min=AMAX_FLOOR), FP8_MAX, out=scale_nk)
    scaled_nBkB = (blocks_nBkB / scale_nk[:, None, :, None]).clamp_(-FP8_MAX, FP8_MAX)
    codes_NK.copy_(scaled_nBkB.view(padded_NK.shape)[:N, :K])  # the copy rounds to e4m3


def dequantize_blockwise(
    codes_NK: torch.Tensor, scale_inv_nk: torch.Tensor, *, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """Return codes [N, K] float8_e4m3fn times the scale of each element's block, [N, K] in dtype.

    The product is computed in fp32 and rounded once. Raises ValueError if the shapes do not fit.
    """
    N, K = codes_NK.shape
    if scale_inv_nk.shape != (_blocks(N), _blocks(K)):
        raise ValueError(
            f"scales of shape {tuple(scale_inv_nk.shape)} do not fit a weight of shape {(N, K)} in"
            f" blocks of {BLOCK}"
        )
    scale_NK = scale_inv_nk.repeat_interleave(BLOCK, 0)[:N].repeat_interleave(BLOCK, 1)[:, :K]
    return (codes_NK.float() * scale_NK).to(dtype)


def _blocks(size: int) -> int:
    """Return the number of blocks along a side, the last of which may be smaller."""
    return -(-size // BLOCK)
