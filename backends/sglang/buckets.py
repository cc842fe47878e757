"""A bucket of tensors as one message, and what the engine's process does with it.

    trainers          [(name, tensor), …]  -> pack -> a JSON header and one uint8 tensor  -> between ranks, or to the engine
    other ranks       header, bytes        -> unpack -> the same tensors, as views of the bytes
    engine's process  load_bucket: unpack -> SGLang's load_weights; compare_loader: the same with every write replaced by a comparison

SGLang calls the last two by their names (custom_weight_loader), in its scheduler's process.
"""

import contextlib
import json
import math
from collections import Counter

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from common.errors import EngineDied

Named = tuple[str, torch.Tensor]


def pack(named: list[Named], *, multiple_of: int = 1) -> tuple[bytes, torch.Tensor]:
    """Tensors as one message: names, dtypes and shapes as JSON, and all their bytes as one uint8
    tensor, zeros added up to a multiple.

    Widest dtypes first, so that every tensor is aligned.
    """
    named = sorted(named, key=lambda pair: -pair[1].element_size())
    header = [
        [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
        for name, tensor in named
    ]
    parts = [tensor.contiguous().view(-1).view(torch.uint8) for _, tensor in named] or [
        torch.empty(0, dtype=torch.uint8)
    ]
    padding = -sum(map(len, parts)) % multiple_of
    return json.dumps(header).encode(), torch.cat(
        [*parts, *([parts[0].new_zeros(padding)] if padding else [])]
    )


def entries(header: bytes) -> list[tuple[str, torch.dtype, list[int], int]]:
    """(name, dtype, shape, bytes) of every tensor that pack describes."""
    described = [(name, getattr(torch, dtype), shape) for name, dtype, shape in json.loads(header)]
    return [
        (name, dtype, shape, math.prod(shape) * dtype.itemsize) for name, dtype, shape in described
    ]


def unpack(header: bytes, flat: torch.Tensor) -> list[Named]:
    """The tensors of a message, as views of its bytes."""
    described = entries(header)
    sizes = [nbytes for *_, nbytes in described]
    parts = flat[: sum(sizes)].split(sizes)
    return [
        (name, part.view(dtype).view(shape))
        for (name, dtype, shape, _), part in zip(described, parts)
    ]


def failure_note(name: str, tensors: list[str]) -> str:
    """The note that tells in which phase of the hand-off something failed, and about which tensors."""
    about = (
        tensors[0]
        if len(tensors) == 1
        else f"{tensors[0]} to {tensors[-1]}, {len(tensors)} tensors"
    )
    return (
        f"The weight hand-off failed in phase {name!r}: {about}. An engine that holds half of the"
        " new weights stays paused; the run ends."
    )


@contextlib.contextmanager
def phase(name: str, tensors: list[str]):
    """What fails inside is told in which phase; the innermost one tells.

    That an engine has died is no matter of what this rank was doing: see send_weights.
    """
    try:
        yield
    except EngineDied:
        raise
    except Exception as error:
        if not hasattr(error, "__notes__"):
            error.add_note(failure_note(name, tensors))
        raise


# --- in the engine's process --------------------------------------------------------------------


class _CompareWrites(TorchDispatchMode):
    """Replaces every in-place write by a comparison of what is held with what would be written:
    copies, and the zeros of vocabulary padding.

    seen: the regions that have been compared, with their bytes, by the address of their storage.
    Each comparison is noted there.
    """

    def __init__(self, seen: dict[int, dict[tuple, int]]):
        super().__init__()
        self.compared = self.different = 0
        self.seen = seen

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function not in (torch.ops.aten.copy_.default, torch.ops.aten.fill_.Scalar):
            return function(*args, **(kwargs or {}))
        held, value = args[0], torch.as_tensor(args[1])
        if held.numel() == 0:  # a vocabulary without padding
            return held
        expected = value.to(device=held.device, dtype=held.dtype).expand_as(held)
        region = (held.storage_offset(), held.shape, held.stride())
        self.seen.setdefault(held.untyped_storage().data_ptr(), {})[region] = held.nbytes
        self.compared += held.nbytes
        self.different += int(
            (held.contiguous().view(torch.uint8) != expected.contiguous().view(torch.uint8)).sum()
        )
        return held


def load_bucket(model: torch.nn.Module, message: list[Named]) -> None:
    """Runs in the engine as SGLang's custom_weight_loader: the header and the bytes of a packed
    bucket -> SGLang's own load_weights.

    Returns when the copies have been made, not only queued: the sender may then use the memory for
    the next bucket. What SGLang answers to an update of its own formats says only that the copies
    are queued.
    """
    (_, header), (_, flat) = message
    loading = []

    def noted():
        for name, tensor in unpack(header.cpu().numpy().tobytes(), flat):
            loading[:] = [name]
            yield name, tensor

    try:
        model.load_weights(noted())
    except Exception as error:
        error.add_note(f"The engine failed to load {loading[0]}.")
        raise
    if flat.is_cuda:
        torch.cuda.synchronize()


def compare_loader(model: torch.nn.Module, named_tensors: list[Named]) -> None:
    """Runs in the engine as SGLang's custom_weight_loader: compares instead of loading.

    The last tensor is the report, in memory shared with the caller. It holds of each tensor: bytes
    compared, bytes that differ, and bytes of parameters that no tensor has been compared with so
    far. A region counts once: a parameter that is compared twice cannot hide one that never is.
    """
    *named, (_, report) = named_tensors
    mine = report[dist.get_rank()]  # the engine's own world: its tensor-parallel ranks
    # The model keeps the regions from one bucket to the next. Those of an earlier read-back stay,
    # which hides nothing: a name always leads to the same regions, and the caller counts names.
    seen = vars(model).setdefault("compared_regions", {})
    for i, (name, tensor) in enumerate(named):
        with _CompareWrites(seen) as writes:
            model.load_weights([(name, tensor)])
        mine[i, 0], mine[i, 1] = writes.compared, writes.different
    mine[:, 2] = unseen_bytes(model, seen)
    if report.is_cuda:
        torch.cuda.synchronize()


def unseen_bytes(model: torch.nn.Module, seen: dict[int, dict[tuple, int]]) -> int:
    """Bytes of the model's parameters that are in no region of seen."""
    # Settings of an FP8 KV cache that Llama holds as parameters: no weights, and not used.
    kv_cache_scales = (".k_scale", ".v_scale")
    bytes_of = Counter()
    for name, parameter in model.named_parameters():
        if not name.endswith(kv_cache_scales):
            bytes_of[parameter.untyped_storage().data_ptr()] += parameter.nbytes
    unseen = (held - sum(seen.get(storage, {}).values()) for storage, held in bytes_of.items())
    return sum(max(0, nbytes) for nbytes in unseen)
