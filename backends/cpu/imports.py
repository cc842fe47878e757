"""What `import transformers` and `import sglang` need on a machine without a GPU.

megatron-core and SGLang are written for CUDA. What stops them on a CPU is shallow: device strings,
missing compiled extensions, two kernels. This folder replaces that in three places. Each patch says
what it stands in for.

    imports.py    at import, in every process: the environment, and stand-ins for packages that
                  cannot be imported beside a CPU build of torch
    megatron.py   patch_megatron(), in a trainer rank and a scheduler that is a copy of one: the
                  CPU answers CUDA calls
    sglang.py     patch_sglang(), in an engine's scheduler process: block-FP8 layers emulated, the
                  attention of a batch in one call instead of one call per request

Import this file before torch is used, and before transformers, megatron or sglang is imported. It
is written for megatron-core 0.16.1 and sglang 0.5.21.
"""

import functools
import importlib.machinery
import logging
import os
import platform
import sys
import types

# One thread per process is fastest and steadiest: every rank and every engine process then has a
# core of its own.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
# oneDNN keeps a compiled BF16 kernel, of up to 1 MB, for each size of a product. It would keep a
# thousand, and most lengths of a packed batch do not come again. A layer needs 4 of them forwards
# and 8 backwards; to compile one takes 0.2 ms.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
os.environ.setdefault("LRU_CACHE_CAPACITY", "16")  # PyTorch's own cache of the same kernels
# Megatron's jit_fuser would spend seconds in g++ at the first step and gain nothing.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import torch
import torch.nn.functional as F

if torch.cuda.is_available():
    raise ImportError(
        "backends/cpu replaces torch.cuda and must not be imported where CUDA works; guard the"
        " import with torch.cuda.is_available()"
    )

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
# It warns that there is no GPU.
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)

# --- stand-ins that imports need ----------------------------------------------------------------

# sgl_kernel has no CPU wheel. PyPI's torchvision is built for CUDA and fails beside a CPU build of
# torch; transformers and SGLang need only names of it. An installed one is not used either.
ABSENT = (
    "sgl_kernel",
    "torchvision",
    "torchvision.io",
    "torchvision.transforms",
    "torchvision.transforms.functional",
    "torchvision.transforms.v2",
    "torchvision.transforms.v2.functional",
)


class _Absent(types.ModuleType):
    """A package that imports, and in which every name is found.

    Calling what was found raises an error that names it.
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


# --- products of BF16 matrices ------------------------------------------------------------------


def _through_fp32(product):
    """Wrap a matrix product so that it treats BF16 as BF16 hardware does.

    Products are exact, sums are fp32, and the result is rounded to BF16 once.
    """

    @functools.wraps(product)
    def wrapped(a, b, bias=None, **kwargs):
        if a.dtype is torch.bfloat16 and b.dtype is torch.bfloat16 and not kwargs:
            more = {} if bias is None else {"bias": bias.float()}
            if a.dim() > 2 and b.dim() == 2:
                # torch would multiply a tensor with odd strides, as the gradient of transposed
                # logits, one token at a time, and read the whole vocabulary matrix for each.
                rows = product(a.reshape(-1, a.shape[-1]).float(), b.float(), **more)
                return rows.to(torch.bfloat16).view(*a.shape[:-1], rows.shape[-1])
            return product(a.float(), b.float(), **more).to(torch.bfloat16)
        more = {} if bias is None else {"bias": bias}
        return product(a, b, **more, **kwargs)

    return wrapped


def has_bf16_instructions() -> bool:
    """Tell whether this processor multiplies BF16 matrices in hardware.

    oneDNN claims support for BF16 wherever there is AVX512, also where it emulates BF16. Emulated
    products take five times as long as fp32, and without AVX512 up to thirty times.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


if not has_bf16_instructions():
    torch.matmul = _through_fp32(torch.matmul)
    torch.Tensor.matmul = _through_fp32(torch.Tensor.matmul)
    torch.Tensor.__matmul__ = _through_fp32(torch.Tensor.__matmul__)
    F.linear = _through_fp32(F.linear)
