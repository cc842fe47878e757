"""The GPU kernel's bits against the reference's, run by test_fp8_quant.py.

Prints how many cases were equal; fails at the first that is not.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent.parent)]

import torch

from backends.fp8_kernel import quantize_into
from fp8_quant import quantize_slab


def empty(shape: torch.Size, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = [-(-size // 128) for size in shape]
    return torch.empty(shape, dtype=torch.float8_e4m3fn, device=device), torch.empty(
        blocks, device=device
    )


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(5)
    # Magnitudes from 1e-9 to 1e6 reach every exponent, subnormal codes and zero; one block is all
    # zeros, the edges are ragged.
    ragged = torch.randn(300, 520, generator=generator) * 10.0 ** torch.randint(
        -9, 7, (300, 520), generator=generator
    )
    ragged[128:256, :128] = 0.0
    plain = torch.randn(384, 256, generator=generator).bfloat16()
    # A block each: the floor of 1e-12 and its neighbours; 448 * 2^e, whose scale is a power of two.
    edges = [0.9e-12, 1e-12, 1.1e-12, 1e-9, *(448 * 2.0**exponent for exponent in (-20, 0, 7))]
    single = torch.zeros(128 * len(edges), 3)
    single[::128] = torch.tensor(edges)[:, None] * torch.tensor([1.0, -1.0, 0.3])
    weights = (ragged, ragged.bfloat16(), ragged.t(), plain, single)
    for weight in weights:
        expected, got = empty(weight.shape, "cpu"), empty(weight.shape, device)
        quantize_slab(weight, *expected)
        quantize_into(weight.to(device), *got)
        assert torch.equal(expected[1], got[1].cpu()), "scales differ"
        assert torch.equal(expected[0].view(torch.uint8), got[0].cpu().view(torch.uint8)), (
            "codes differ"
        )
    plain[0, 0], plain[200, 200] = float("nan"), float("inf")
    got = empty(plain.shape, device)
    quantize_into(plain.to(device), *got)
    assert got[1].isnan().nonzero().tolist() == [[0, 0], [1, 1]], (
        "a block that is not finite must be told"
    )
    print(len(weights), "cases equal")


if __name__ == "__main__":
    main()
