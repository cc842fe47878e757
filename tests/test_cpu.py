"""cpu.py: what a processor without BF16 instructions does instead. Speed is measured by bench/; here is what decides, and that the numbers stay.

Each case needs a process of its own, as cpu.py replaces torch's functions once, at its import.
"""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="cpu.py is for machines without a GPU")

PROGRAM = """
import torch
torch.cpu._is_avx512_bf16_supported = lambda: {avx512_bf16}
torch.cpu._is_amx_tile_supported = lambda: {amx}
stock = torch.nn.functional.linear
x, w = (torch.randn(64, 96, generator=torch.Generator().manual_seed(i)).bfloat16() for i in (0, 1))
expected = (x.float() @ w.float().T).bfloat16()
import cpu
print(torch.nn.functional.linear is not stock, torch.equal(torch.nn.functional.linear(x, w), expected))
"""


def linear_of(**supported: bool) -> list[str]:
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(**supported)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("avx512_bf16, amx", [(True, False), (False, True), (True, True)])
def test_with_bf16_instructions_products_stay_as_they_are(avx512_bf16, amx):
    assert linear_of(avx512_bf16=avx512_bf16, amx=amx)[0] == "False"


def test_without_them_products_go_through_fp32_also_where_there_is_avx512():
    """AVX512 alone, as most cloud processors have it: oneDNN would emulate BF16."""
    assert linear_of(avx512_bf16=False, amx=False) == ["True", "True"]
