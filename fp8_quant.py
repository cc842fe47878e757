"""Block-scaled FP8: BF16 weight [N, K] -> e4m3 codes [N, K] and one fp32 scale per 128 x 128 block
-> approximately the weight again.

Why FP8 at all. Decoding one token reads every weight once, so generation is bound by memory
bandwidth: half the bytes is up to twice the speed, and half the memory leaves twice the room for
the KV cache. The hand-off from trainer to engine moves half the bytes too. Training stays in BF16.

Why e4m3. An FP8 number has eight bits. e4m3 spends 4 on the exponent and 3 on the mantissa: about 6
% between neighbours, largest value 448, smallest normal 2^-6, subnormals down to 2^-9. e5m2 reaches
further with half the resolution and is meant for gradients. "fn" in float8_e4m3fn says finite:
there is no infinity, and what lies beyond 448 becomes NaN in a plain cast, hence the clamp below.

Why blocks. One scale for a whole matrix lets a single outlier push everything else towards zero.
One scale per 128 x 128 block confines the damage, and 128 is the tile that Hopper's FP8 matrix
kernels accumulate before they apply the scales (DeepSeek-V3, section 3.3; the checkpoint format of
DeepSeek-V3 and Qwen3-FP8, which SGLang reads).

    amax    = max |w| over the block
    scale   = max(amax, 1e-12) / 448          the clamp keeps an all-zero block from dividing 0 by 0
    q       = round_e4m3(clamp(w / scale, -448, 448))
    w      ~= q * scale

Hugging Face stores the scale as `weight_scale_inv`. The name says inverse; one multiplies by it.
This is the only place that says so.

The contract is this file's arithmetic: fp32, division by the scale (multiplying by 1/scale differs
in about one code in ten thousand), round to nearest even. A weight matrix whose sides are not
multiples of 128 has smaller blocks at its lower and right edges. A tensor-parallel shard may be
quantized alone exactly when its boundaries fall on multiples of 128, because then no block sees a
neighbour's values.

scale_format "ue8m0" rounds each scale up to a power of two (8 exponent bits, no mantissa), as
Blackwell's matrix units want it.

Expect about 2.6 % RMS error of the weights (half a step of 2^-3, averaged over a binade), whatever
their magnitude: that is FP8, not a defect. A single small element may vanish entirely, so errors
are to be judged per block, not per element.

Shape letters: N output features (rows), K input features (columns), n and k blocks along them.
"""

import torch
import torch.nn.functional as F

BLOCK = 128
FP8_MAX = 448.0  # torch.finfo(torch.float8_e4m3fn).max
AMAX_FLOOR = 1e-12


SLAB = (
    2**18
    # Elements: what a CPU's cache holds in fp32; whole rows of blocks, whose temporaries then stay
    # small, and which are several times faster
)


def quantize_blockwise(
    weight_NK: torch.Tensor, *, scale_format: str = "fp32"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a matrix to e4m3 with one scale per 128 x 128 block.

    weight_NK: bf16, fp16 or fp32, any strides and device. Returns (codes [N, K] float8_e4m3fn,
    scale_inv [ceil(N/128), ceil(K/128)] float32), on the same device. Raises ValueError for
    anything but such a matrix with elements, for an unknown scale format, and for weights that
    are not finite: their block would be silently lost.
    On a GPU the kernel in fp8_kernel.py does the same arithmetic in one pass over the weight.
    """
    if weight_NK.dim() != 2:
        raise ValueError(f"block quantization takes a matrix, got shape {tuple(weight_NK.shape)}")
    if weight_NK.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"block quantization takes bf16, fp16 or fp32, got {weight_NK.dtype}")
    if not weight_NK.numel():
        raise ValueError(f"a weight of shape {tuple(weight_NK.shape)} has no elements to quantize")
    if scale_format not in ("fp32", "ue8m0"):
        raise ValueError(f"scale_format {scale_format!r} is not 'fp32' or 'ue8m0'")
    N, K = weight_NK.shape
    codes_NK = torch.empty(N, K, dtype=torch.float8_e4m3fn, device=weight_NK.device)
    scale_nk = torch.empty(
        -(-N // BLOCK), -(-K // BLOCK), dtype=torch.float32, device=weight_NK.device
    )
    if weight_NK.is_cuda:
        from backends.fp8_kernel import quantize_into  # here: without a GPU nobody needs Triton

        quantize_into(weight_NK, codes_NK, scale_nk, power_of_two=scale_format == "ue8m0")
    else:
        rows = BLOCK * max(1, SLAB // (BLOCK * K))
        for slab_NK, slab_codes_NK, slab_scale_nk in zip(
            weight_NK.split(rows), codes_NK.split(rows), scale_nk.split(rows // BLOCK)
        ):
            quantize_slab(
                slab_NK, slab_codes_NK, slab_scale_nk, power_of_two=scale_format == "ue8m0"
            )
    if not torch.isfinite(scale_nk).all():
        raise ValueError(
            f"a weight of shape {(N, K)} holds NaN or infinity and cannot be quantized"
        )
    return codes_NK, scale_nk


def quantize_slab(
    weight_NK: torch.Tensor, codes_NK: torch.Tensor, scale_nk: torch.Tensor, *, power_of_two: bool
) -> None:
    """The arithmetic, written into codes and scales.

    A block that holds NaN or infinity gets such a scale.
    """
    N, K = weight_NK.shape
    padded_NK = F.pad(
        weight_NK.float(), (0, -K % BLOCK, 0, -N % BLOCK)
    )  # zeros never raise a block's maximum
    blocks_nBkB = padded_NK.view(
        padded_NK.shape[0] // BLOCK, BLOCK, padded_NK.shape[1] // BLOCK, BLOCK
    )
    torch.div(blocks_nBkB.abs().amax(dim=(1, 3)).clamp(min=AMAX_FLOOR), FP8_MAX, out=scale_nk)
    if power_of_two:
        mantissa_nk, exponent_nk = torch.frexp(
            scale_nk
        )  # scale = mantissa * 2^exponent, mantissa in [0.5, 1): exact where log2 would round
        scale_nk.copy_(
            torch.ldexp(torch.ones_like(scale_nk), exponent_nk - (mantissa_nk == 0.5).int())
        )
    scaled_NK = (
        (blocks_nBkB / scale_nk[:, None, :, None]).clamp(-FP8_MAX, FP8_MAX).view(padded_NK.shape)
    )
    codes_NK.copy_(scaled_NK[:N, :K])


def dequantize_blockwise(
    codes_NK: torch.Tensor, scale_inv_nk: torch.Tensor, *, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """codes [N, K] float8_e4m3fn times the scale of each element's block, rounded once to dtype:
    [N, K].
    """
    N, K = codes_NK.shape
    if scale_inv_nk.shape != (-(-N // BLOCK), -(-K // BLOCK)):
        raise ValueError(
            f"scales of shape {tuple(scale_inv_nk.shape)} do not fit a weight of shape {(N, K)} in"
            f" blocks of {BLOCK}"
        )
    scale_NK = scale_inv_nk.repeat_interleave(BLOCK, 0)[:N].repeat_interleave(BLOCK, 1)[:, :K]
    return (codes_NK.float() * scale_NK).to(dtype)
