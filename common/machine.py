"""Checks that the installed packages belong to this kind of machine, and quiets their warnings."""

import importlib.metadata
import importlib.util
import os
import sys
import warnings

from common.processes import use_writable_home

# At import the engine's packages warn, in every process, about what a CPU lacks. Errors still show.
os.environ.setdefault("PYTHONWARNINGS", "ignore")
warnings.simplefilter("ignore")
use_writable_home()


CPU_SGLANG = "0.5.21"  # the version that backends/cpu is written for


def check_installation() -> None:
    """End the program with exit code 2 if the packages belong to another kind of machine.

    The message gives the right install line. Called before sglang is imported.
    """
    import torch

    packages = ("sglang", "sgl_kernel", "megatron")
    missing = {name for name in packages if importlib.util.find_spec(name) is None}
    has_gpu = torch.cuda.is_available()
    line = "pip install -r requirements.txt && pip install --no-deps -r requirements-engine.txt"
    if has_gpu:
        line = "pip install -r requirements-gpu.txt"
    if missing & {"sglang", "megatron"}:
        problem = "sglang or megatron-core is not installed"
    elif has_gpu and "sgl_kernel" in missing:
        problem = "this machine has a GPU, but sglang's GPU kernels (sglang-kernel) are missing"
    elif not has_gpu and (version := importlib.metadata.version("sglang")) != CPU_SGLANG:
        problem = f"no GPU is visible; without one only sglang {CPU_SGLANG} runs, not {version}"
    else:
        return
    print(f"error: {problem}. In a fresh virtual environment: {line}", file=sys.stderr, flush=True)
    sys.exit(2)
