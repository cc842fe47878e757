"""Everything that only a machine without a GPU needs, for both engines.

On a GPU machine only bench/cpu_attention.py would import this file; delete both there and nothing
changes.

megatron-core and SGLang are written for CUDA. What stops them on a CPU is shallow: device strings,
missing compiled extensions, two kernels. Each patch below says what it stands in for. Three parts:

1. at import, in every process: environment and stand-ins without which `import transformers` or
   `import sglang` fails beside a CPU build of torch;
2. patch_megatron(), in a trainer rank: CUDA calls answered by the CPU;
3. patch_sglang(), in an engine's scheduler process: block-FP8 layers emulated, attention of a batch
   in one call instead of one call per request.

Import it before torch is used and before transformers, megatron or sglang is imported. Written for
megatron-core 0.16.1 and sglang 0.5.21. Shape letters: B requests, N new tokens per request, L
tokens per request, T packed tokens, H heads, D head size, K input features.
"""

import functools
import importlib.machinery
import logging
import os
import platform
import sys
import types

# One thread per process is fastest and steadiest here: every rank, and every engine process, then
# has a core of its own.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
# oneDNN keeps a compiled kernel for each length of a packed batch that BF16 has met, and of those
# no two are alike: 0.3 MB a step, up to a thousand kernels.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
os.environ.setdefault("LRU_CACHE_CAPACITY", "32")  # PyTorch's own cache of the same
os.environ.setdefault(
    "TORCHDYNAMO_DISABLE", "1"
)  # Megatron's jit_fuser would spend seconds in g++ at the first step and gain nothing

import torch
import torch.nn.functional as F

if torch.cuda.is_available():
    raise ImportError(
        "cpu.py replaces torch.cuda and must not be imported where CUDA works; guard the import"
        " with torch.cuda.is_available()"
    )

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
logging.getLogger("torch.utils.cpp_extension").setLevel(
    logging.ERROR
)  # It warns that there is no GPU.

# --- 1. stand-ins that imports need -------------------------------------------------------------

# sgl_kernel has no CPU wheel. Of torchvision transformers and SGLang need names only: PyPI's is
# built for CUDA, and fails beside a CPU build of torch. One that is installed all the same stays
# unused.
ABSENT = ("sgl_kernel", "torchvision", "torchvision.io")
ABSENT += ("torchvision.transforms", "torchvision.transforms.functional")
ABSENT += ("torchvision.transforms.v2", "torchvision.transforms.v2.functional")


class _Absent(types.ModuleType):
    """A package that imports, and whatever is looked up in it.

    Calling that says what is missing.
    """

    __version__ = "0"
    __path__ = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(f"{self.__name__}.{name}")

    def __call__(self, *args, **kwargs):
        raise NotImplementedError(f"{self.__name__} is not used on a machine without a GPU")


for _name in ABSENT:
    sys.modules[_name] = _Absent(_name)
    sys.modules[_name].__spec__ = importlib.machinery.ModuleSpec(_name, None, is_package=True)


def _through_fp32(product):
    """A matrix product of BF16 tensors as BF16 hardware computes it: exact products, summed in
    fp32, rounded to BF16 once.
    """

    @functools.wraps(product)
    def wrapped(a, b, bias=None, **kwargs):
        more = {} if bias is None else {"bias": bias.float()}
        if a.dtype is torch.bfloat16 and b.dtype is torch.bfloat16 and not kwargs:
            return product(a.float(), b.float(), **more).to(torch.bfloat16)
        return product(a, b, **({} if bias is None else {"bias": bias}), **kwargs)

    return wrapped


def has_bf16_instructions() -> bool:
    """Tell whether this processor multiplies BF16 matrices in hardware.

    oneDNN says that it supports BF16 wherever there is AVX512, also where it emulates it: there the
    products take five times as long as the same ones in fp32, and without AVX512 up to thirty
    times.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


if not has_bf16_instructions():
    torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__ = map(
        _through_fp32, (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
    )
    F.linear = torch.nn.functional.linear = _through_fp32(F.linear)
