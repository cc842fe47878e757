"""An engine on GPUs: the ServerArgs it gets and why, and the GPUs and settings that are refused.

The counterpart of backends/cpu/sglang.py. Every choice here avoids one of three things: weights
that change under a forward pass, formats that a weight update cannot write, and kernels that take
minutes to compile.
"""

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from common.errors import all_problems
from common.settings import RolloutSettings

# Share of the free GPU memory that an engine takes for weights and cache, unless --sglang says
# otherwise.
MEM_FRACTION_STATIC = 0.5
BF16_CAPABILITY = 8, 0  # Ampere
FP8_CAPABILITY = 8, 9  # Ada Lovelace. Below, SGLang repacks FP8 for Marlin: other tensors
ALLOCATOR_VARIABLES = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"
# What an engine's process may take of its GPU while it releases its weights: kernels that it loads.
RELEASE_SLACK_BYTES = 64 * 2**20
UNSHARED = "expandable_segments:true", "backend:cudamallocasync"


def server_args(
    settings: RolloutSettings,
    *,
    colocated: bool,
    keeps_weights: bool = False,
) -> dict:
    """Return the ServerArgs of an engine on this rank's GPU.

    colocated: whether a trainer computes on the same GPU, between two rollouts. keeps_weights:
    whether released weights must come back as they were.
    """
    arguments = dict(
        base_gpu_id=int(os.environ["LOCAL_RANK"]),
        mem_fraction_static=MEM_FRACTION_STATIC,
        # It lets the engine give its memory to the trainer and take it back.
        enable_memory_saver=colocated,
        # Released weights are lost unless the host keeps a copy. Changes need what they change.
        enable_weights_cpu_backup=colocated and keeps_weights,
        # With overlap, SGLang launches a batch before it has read its messages. An update that
        # pauses running requests would overwrite the weights under that batch (Scheduler's
        # event_loop_overlap, pause_generation). Colocated engines are idle when they are updated.
        disable_overlap_schedule=not colocated,
        # Capturing takes a minute, and 0.5.14 reads out of bounds where the context is shorter than
        # what it captures (sglang issue 21112). Decode graphs stay.
        disable_prefill_cuda_graph=True,
        # "auto" may choose kernels that shuffle expert weights, which no update could write.
        moe_runner_backend="triton",
    )
    if settings.rollout_dtype == "fp8":
        # It takes the FP32 scales of a checkpoint as they are, on every GPU. "auto" would choose
        # DeepGEMM on Hopper and Blackwell: it first compiles for every length up to 16384, and on
        # Blackwell it repacks the scales.
        arguments["fp8_gemm_runner_backend"] = "triton"
    return arguments


def held_bytes(name: str, tensor: torch.Tensor) -> int:
    """Return how many bytes an engine on a GPU holds of a tensor, at least.

    It holds FP8 as it is sent, with FP32 scales, and everything else in 16 bits.
    """
    most = 4 if name.endswith("_scale_inv") else 2
    return tensor.numel() * min(tensor.element_size(), most)


def check_released(freed: int, *, of: int) -> None:
    """Raise RuntimeError if an engine's GPU got back less than the bytes of its weights."""
    if freed < of - RELEASE_SLACK_BYTES:
        raise RuntimeError(
            f"the engine has released {freed / 1e6:,.1f} MB of its GPU for its weights, which"
            f" have {of / 1e6:,.1f} MB: torch_memory_saver does not work in its process"
        )


@contextlib.contextmanager
def memory_saver_libraries():
    """Let the processes that are started inside find libcudart, which the memory saver needs.

    torch_memory_saver is preloaded into them, before Python could load the library from pip's
    packages, and version 0.0.10 does not say where it lies.
    """
    before = os.environ.get("LD_LIBRARY_PATH")
    folders = [str(folder) for folder in cudart_folders()]
    os.environ["LD_LIBRARY_PATH"] = os.pathsep.join([*folders, *filter(None, [before])])
    try:
        yield
    finally:
        del os.environ["LD_LIBRARY_PATH"]
        if before is not None:
            os.environ["LD_LIBRARY_PATH"] = before


def cudart_folders() -> list[Path]:
    """Return the folders of pip's CUDA packages that hold a libcudart.so."""
    packages = importlib.util.find_spec("nvidia")  # a namespace of all of them
    roots = packages.submodule_search_locations if packages else []
    return sorted(
        {file.parent for root in roots for file in Path(root).glob("*/lib/libcudart.so*")}
    )


# --- refused ------------------------------------------------------------------------------------


@all_problems
def check_gpus(settings: RolloutSettings, *, has_engine: bool) -> None:
    """Refuse what these GPUs cannot do, and ranks that have none. Without a GPU nothing is checked.

    has_engine: whether this rank starts an engine. Its GPUs are this rank's and the next.
    """
    if not torch.cuda.is_available():
        return
    gpus, rank = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", 0))
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", gpus))  # torchrun sets it; others may not
    if max(ranks, rank + 1) > gpus:
        fix = f"start at most {gpus} on this machine (torchrun --nproc-per-node)"
        found = f"{max(ranks, rank + 1)} ranks on a machine of {gpus} GPUs"
        yield f"{found}, and each needs its own: {fix}"
        return
    tp = settings.engine_tp
    if has_engine and rank + tp > ranks:
        fix = "use a --engine-tp that divides the ranks of each machine"
        yield (
            f"the engine of local rank {rank} needs --engine-tp {tp} GPUs of its own machine, which"
            f" has {ranks - rank} left: {fix}"
        )
    capability = torch.cuda.get_device_capability(rank)
    if capability < BF16_CAPABILITY:
        has = f"{torch.cuda.get_device_name(rank)} has compute capability {_dotted(capability)}"
        yield f"{has}, and BF16 needs {_dotted(BF16_CAPABILITY)}: SGLang would compute in FP16"
        return
    if settings.rollout_dtype == "fp8" and capability < FP8_CAPABILITY:
        has = f"{torch.cuda.get_device_name(rank)} has compute capability {_dotted(capability)}"
        rule = f"needs at least {_dotted(FP8_CAPABILITY)}"
        yield f"--rollout-dtype fp8 {rule}, and {has}: use --rollout-dtype bf16"
    if settings.rollout_dtype == "fp32" and has_engine:
        why = "SGLang's attention kernels for GPUs take 16 bits"
        yield f"--rollout-dtype fp32 works without a GPU only ({why}): use --rollout-dtype bf16"
    yield from _allocator_problems()


def _allocator_problems() -> Iterator[str]:
    """Yield that torch's allocator would make memory that the engine's process cannot open."""
    for name in ALLOCATOR_VARIABLES:
        given = os.environ.get(name, "").lower().replace(" ", "")
        if any(setting in given for setting in UNSHARED):
            rule = "the engine's process could not open such memory by CUDA IPC"
            yield f"the environment variable {name}={os.environ[name]}: {rule}; unset it"


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
