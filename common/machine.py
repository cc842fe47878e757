"""This machine: which packages it must have, and what processes on it share."""

import importlib.metadata
import importlib.util
import os
import sys
import warnings

from common.processes import use_writable_home

# The engines warn at import about what a CPU lacks; they say it in every process. Errors still
# show.
os.environ.setdefault("PYTHONWARNINGS", "ignore")
warnings.simplefilter("ignore")
use_writable_home()


CPU_SGLANG = "0.5.21"  # the version that backends/cpu is written for


def check_installation() -> None:
    """End the program, exit code 2, with the right install line if the packages are those of
    another kind of machine. Called before sglang's import.
    """
    import torch

    missing = {
        name
        for name in ("sglang", "sgl_kernel", "megatron")
        if importlib.util.find_spec(name) is None
    }
    has_gpu = torch.cuda.is_available()
    line = (
        "pip install -r requirements-gpu.txt"
        if has_gpu
        else "pip install -r requirements.txt && pip install --no-deps -r requirements-engine.txt"
    )
    if missing & {"sglang", "megatron"}:
        problem = "sglang or megatron-core is not installed"
    elif has_gpu and "sgl_kernel" in missing:
        problem = (
            "this machine has a GPU, but sglang's GPU kernels (sglang-kernel) are not installed"
        )
    elif not has_gpu and importlib.metadata.version("sglang") != CPU_SGLANG:
        problem = (
            f"no GPU is visible, and without one only sglang {CPU_SGLANG} runs; installed is"
            f" {importlib.metadata.version('sglang')}"
        )
    else:
        return
    print(f"error: {problem}. In a fresh virtual environment: {line}", file=sys.stderr, flush=True)
    sys.exit(2)
