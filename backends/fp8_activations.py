"""Activations as block-FP8 layers see them: e4m3, one fp32 scale for 128 features of a token.

fp8_quant.py has the weights' half. SGLang quantizes activations so before each FP8 layer
(per_token_group_quant_fp8, with its floor of 1e-10 for the largest value).

Shape letters: T tokens, K features.
"""

import torch
import torch.nn.functional as F

from fp8_quant import BLOCK, FP8_MAX


def through_fp8(x_TK: torch.Tensor) -> torch.Tensor:
    """Return activations rounded to e4m3 and back, float32 [T, K]."""
    T, K = x_TK.shape
    padded = -(-K // BLOCK) * BLOCK
    groups = F.pad(x_TK.float(), (0, padded - K)).view(T, padded // BLOCK, BLOCK)
    scale = groups.abs().amax(-1, keepdim=True).clamp_(min=1e-10) / FP8_MAX
    return (round_to_e4m3(groups / scale) * scale).view(T, padded)[:, :K]


def round_to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Round fp32 numbers of at most 448 to the nearest that e4m3 has, ties to even.

    Equals x.to(torch.float8_e4m3fn).float(), whose way back to fp32 goes number by number.
    """
    # Add and subtract 1.5 * 2**20 times x's power of two. In that sum fp32 has room for three bits
    # behind x's first, so the addition rounds. Below 2**-6 e4m3's steps are all alike.
    power = x.view(torch.int32).bitwise_and(0x7F800000).clamp_(min=(127 - 6) << 23)
    large = power.add_((20 << 23) + (1 << 22)).view(torch.float32)
    return large.add(x).sub_(large)
