"""Checks that the installed packages belong to this kind of machine, and quiets their warnings."""

import importlib.metadata
import importlib.util
import os
import shutil
import sys
import sysconfig
import warnings
from pathlib import Path

from common.processes import use_writable_home

# At import the engine's packages warn, in every process, about what a CPU lacks. Errors still show.
os.environ.setdefault("PYTHONWARNINGS", "ignore")
warnings.simplefilter("ignore")
use_writable_home()


CPU_SGLANG = "0.5.21"  # the version that backends/cpu is written for
GPU_SGLANG = (CPU_SGLANG, "0.5.14")  # those that backends/sglang is written for


def check_installation() -> None:
    """End the program with exit code 2 if the packages belong to another kind of machine.

    On a GPU machine also if a tool is missing with which SGLang and Triton compile their kernels.
    The message gives the fix. Called before sglang is imported.
    """
    import torch

    packages = ("sglang", "sgl_kernel", "megatron")
    missing = {name for name in packages if importlib.util.find_spec(name) is None}
    has_gpu = torch.cuda.is_available()
    list_of = "requirements-gpu.txt" if has_gpu else "requirements.txt"
    line = f"pip install -r {list_of} && pip install --no-deps -r requirements-engine.txt"
    fix = f"In a fresh virtual environment: {line}"
    if missing & {"sglang", "megatron"}:
        problem = "sglang or megatron-core is not installed"
    elif has_gpu and "sgl_kernel" in missing:
        problem = "this machine has a GPU, but sglang's GPU kernels (sglang-kernel) are missing"
    elif not has_gpu and (version := importlib.metadata.version("sglang")) != CPU_SGLANG:
        problem = f"no GPU is visible; without one only sglang {CPU_SGLANG} runs, not {version}"
    elif has_gpu and (version := importlib.metadata.version("sglang")) not in GPU_SGLANG:
        problem = f"sglang {version} is installed; this project knows {' and '.join(GPU_SGLANG)}"
    elif has_gpu and (tools := missing_tools()):
        problem = f"SGLang and Triton compile kernels on a GPU, and miss {'; '.join(tools)}"
        fix = "docs/gpu.md says where each comes from"
    else:
        return
    print(f"error: {problem}. {fix}", file=sys.stderr, flush=True)
    sys.exit(2)


def missing_tools() -> list[str]:
    """Return what a GPU machine lacks to compile kernels, each with where it comes from.

    pip puts ninja beside the interpreter, which is on PATH only in an activated environment: that
    folder is added.
    """
    beside = Path(sys.executable).parent
    if not shutil.which("ninja") and (beside / "ninja").exists():
        os.environ["PATH"] = f"{beside}{os.pathsep}{os.environ.get('PATH', '')}"
    toolkit = cuda_home()
    # Linkers find a distribution's own package without a path.
    libraries = (toolkit / "lib64", Path("/usr/lib/x86_64-linux-gnu"))
    has_library = any((folder / "libcudart.so").exists() for folder in libraries)
    has_toolkit = (toolkit / "bin" / "nvcc").exists() and has_library
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    found = {
        f"the CUDA toolkit (no bin/nvcc or no lib64/libcudart.so in {toolkit}: install it, or set"
        " CUDA_HOME to its folder)": has_toolkit,
        "a C compiler (gcc, or CC)": any(map(shutil.which, (_of("CC"), "gcc", "clang"))),
        "a C++ compiler (c++, or CXX)": shutil.which(_of("CXX") or "c++"),
        "ninja (pip install ninja)": shutil.which("ninja"),
        f"Python.h ({python}-dev)": headers.exists(),
    }
    return [tool for tool, is_there in found.items() if not is_there]


def _of(variable: str) -> str:
    """Return the command that an environment variable names, without its arguments."""
    return (os.environ.get(variable, "").split() or [""])[0]


def cuda_home() -> Path:
    """Return the folder in which SGLang looks for the CUDA toolkit.

    As toolchain.py of SGLang 0.5.21's kernels, and tvm_ffi.cpp.extension, find it.
    """
    if home := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return Path(home)
    nvcc = shutil.which("nvcc")
    return Path(nvcc).parent.parent if nvcc else Path("/usr/local/cuda")
