"""backends/cpu: what a processor without BF16 instructions does instead.

Speed is measured by bench/; here is what decides, and that the numbers stay.

Each case needs a process of its own: imports.py replaces torch's functions once, when imported.
"""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="backends/cpu is for machines without a GPU"
)

PROGRAM = """
import torch
torch.cpu._is_avx512_bf16_supported = lambda: {avx512_bf16}
torch.cpu._is_amx_tile_supported = lambda: {amx}
stock = torch.nn.functional.linear
x, w = (torch.randn(64, 96, generator=torch.Generator().manual_seed(i)).bfloat16() for i in (0, 1))
expected = (x.float() @ w.float().T).bfloat16()
import backends
linear = torch.nn.functional.linear
print(linear is not stock, torch.equal(linear(x, w), expected))
"""


def linear_of(**supported: bool) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(**supported)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("avx512_bf16, amx", [(True, False), (False, True), (True, True)])
def test_with_bf16_instructions_products_stay_as_they_are(avx512_bf16, amx):
    assert linear_of(avx512_bf16=avx512_bf16, amx=amx)[0] == "False"


def test_without_them_products_go_through_fp32_also_where_there_is_avx512():
    """AVX512 alone, as most cloud processors have it: oneDNN would emulate BF16."""
    assert linear_of(avx512_bf16=False, amx=False) == ["True", "True"]


# --- imports ------------------------------------------------------------------------------------


def run_python(program: str, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


FOLDED = """
import torch
torch.cpu._is_avx512_bf16_supported = torch.cpu._is_amx_tile_supported = lambda: False
import backends
x, w = (torch.randn(64, 96, generator=torch.Generator().manual_seed(i)).bfloat16() for i in (0, 1))
expected = (x.float() @ w.float().T).bfloat16()
transposed = x[None].transpose(0, 1)  # [64, 1, 96], as the gradient of transposed logits
with torch.profiler.profile() as profile:
    same = [torch.matmul(transposed, w.T), transposed @ w.T]
    same += [torch.nn.functional.linear(transposed, w)]
print(all(torch.equal(rows[:, 0], expected) for rows in same))
print(any("bmm" in event.key for event in profile.key_averages()))
"""


def test_no_product_is_made_one_token_at_a_time():
    assert run_python(FOLDED).stdout.split() == ["True", "False"]


ABSENT = ["torchvision.transforms", "torchvision.transforms.v2.functional", "sgl_kernel"]
CALL_EACH = f"""
import importlib
import backends
for name in {ABSENT}:
    try:
        importlib.import_module(name).resize()
    except NotImplementedError as error:
        print(error)
"""


def test_what_is_absent_imports_and_says_so_when_it_is_called():
    said = run_python(CALL_EACH).stdout.splitlines()
    assert said == [f"{name}.resize is not used on a machine without a GPU" for name in ABSENT]


def test_requirements_have_no_torchvision():
    """Beside torch's CPU build it fails at import, and transformers with it."""
    assert "torchvision" not in (ROOT / "requirements.txt").read_text(encoding="utf-8")


UNDOCUMENTED = """
from transformers.modeling_outputs import ModelOutput
from transformers.utils import auto_docstring
@auto_docstring(custom_intro="An output.")
class Output(ModelOutput):
    def __init__(self, strange_name: int = 0): pass
"""


@pytest.mark.complete
def test_an_engine_prints_nothing_about_the_documentation_of_models(tmp_path):
    (tmp_path / "undocumented.py").write_text(UNDOCUMENTED, encoding="utf-8")
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import undocumented"
    assert "[ERROR] `strange_name`" in run_python(f"import backends; {program}").stdout
    assert (
        "[ERROR]"
        not in run_python(
            f"from backends.cpu.sglang import patch_sglang; patch_sglang(); {program}"
        ).stdout
    )


def test_torch_built_for_cuda_does_not_warn_that_there_is_no_gpu(tmp_path):
    program = "import torch.utils.cpp_extension as it; it._find_cuda_home()"
    assert "No CUDA runtime" in run_python(program, CUDA_HOME=str(tmp_path)).stderr
    assert run_python(f"import backends; {program}", CUDA_HOME=str(tmp_path)).stderr == ""
