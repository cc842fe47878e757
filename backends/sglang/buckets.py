"""A bucket of tensors as one message, and what the engine's process does with it.

    trainers         pack    [(name, tensor), ...] -> a JSON header and one uint8 tensor
    other ranks      unpack  header, bytes -> the same tensors, as views of the bytes
    engine process   load_bucket     unpack, then SGLang's load_weights, or for changes in_place.py
                     compare_loader  load_weights, with every write replaced by a comparison

SGLang calls the last two by their names (custom_weight_loader), in its scheduler's process.
"""

import contextlib
import json
import math
from collections import Counter

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from backends.delta import CHANGES, names_in
from backends.huggingface.names import hf_shapes
from backends.sglang.in_place import places_of, written_all
from common.errors import EngineDied

Named = tuple[str, torch.Tensor]
NO_CHANGES = -2  # in place of a version: --sync full

# --- messages -----------------------------------------------------------------------------------


def pack(named: list[Named], *, multiple_of: int = 1) -> tuple[bytes, torch.Tensor]:
    """Return a JSON header (names, dtypes, shapes) and the bytes of all tensors, uint8.

    multiple_of: zeros are added up to a multiple of so many bytes.
    """
    # Widest dtypes first, so that every tensor is aligned.
    named = sorted(named, key=lambda pair: -pair[1].element_size())
    header, parts = [], []
    for name, tensor in named:
        header.append([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)])
        parts.append(tensor.contiguous().view(-1).view(torch.uint8))
    if not parts:
        parts.append(torch.empty(0, dtype=torch.uint8))
    padding = -sum(map(len, parts)) % multiple_of
    if padding:
        parts.append(parts[0].new_zeros(padding))
    return json.dumps(header).encode(), torch.cat(parts)


def entries(header: bytes) -> list[tuple[str, torch.dtype, list[int], int]]:
    """Return (name, dtype, shape, bytes) of every tensor that a header describes."""
    described = []
    for name, dtype_name, shape in json.loads(header):
        dtype = getattr(torch, dtype_name)
        described.append((name, dtype, shape, math.prod(shape) * dtype.itemsize))
    return described


def unpack(header: bytes, flat: torch.Tensor) -> list[Named]:
    """Return the tensors of a message, as views of its bytes."""
    described = entries(header)
    sizes = [nbytes for *_, nbytes in described]
    parts = flat[: sum(sizes)].split(sizes)
    return [
        (name, part.view(dtype).view(shape))
        for (name, dtype, shape, _), part in zip(described, parts)
    ]


# --- failures -----------------------------------------------------------------------------------


def failure_note(name: str, tensors: list[str]) -> str:
    """Return the note about a failure: the phase of the weight update and its tensors.

    tensors: names, of tensors or of a bucket's entries.
    """
    tensors = [name for entry in tensors for name in names_in(entry)] or ["no changes"]
    about = tensors[0]
    if len(tensors) > 1:
        about = f"{tensors[0]} to {tensors[-1]}, {len(tensors)} tensors"
    return (
        f"The weight update failed in phase {name!r}: {about}. An engine that holds half of the"
        " new weights stays paused; the run ends."
    )


@contextlib.contextmanager
def phase(name: str, tensors: list[str]):
    """Add a note to any exception raised inside: the phase of the update and the tensors.

    The innermost phase wins. EngineDied passes unchanged; this rank's phase did not cause it.
    """
    try:
        yield
    except EngineDied:
        raise
    except Exception as error:
        if not hasattr(error, "__notes__"):
            error.add_note(failure_note(name, tensors))
        raise


# --- verification -----------------------------------------------------------------------------


def check_all_compared(names: Counter, config: dict, uncompared_bytes: int) -> None:
    """Raise RuntimeError unless every tensor was compared once, and every byte of a parameter."""
    never = sorted(set(hf_shapes(config)) - set(names))
    twice = sorted(name for name, times in names.items() if times > 1)
    gaps = {"never compared": never, "compared more than once": twice}
    found = [
        f"{what}: {', '.join(tensors[:5])}, {len(tensors)} tensors in all"
        for what, tensors in gaps.items()
        if tensors
    ]
    if uncompared_bytes:
        found.append(f"{uncompared_bytes} bytes of the engine's parameters were never compared")
    if found:
        found = "; ".join(found)
        raise RuntimeError(f"read-back failed: the hand-off does not cover the model. {found}")


# --- in the engine's process --------------------------------------------------------------------


def load_bucket(model: torch.nn.Module, message: list[Named]) -> None:
    """Load a packed bucket: whole tensors by SGLang's own load_weights, changes in their place.

    message: its header; its bytes; int64 [2], the version that its changes are of and its own. The
    first is -1 if all is sent, and NO_CHANGES if changes will never follow. Runs in the engine as
    SGLang's custom_weight_loader.
    """
    _wait_for_gpu()  # for a forward pass that is still running: it reads the weights
    (_, header), (_, flat), (_, versions) = message
    base, version = versions.tolist()
    places, last_name = places_of(model), "the first tensor"
    if base != NO_CHANGES:
        places.begin(version, base=base)
    whole, changes = [], []
    for name, tensor in unpack(header.cpu().numpy().tobytes(), flat):
        (changes if name.startswith(CHANGES) else whole).append((name, tensor))

    def noted(pairs):
        nonlocal last_name
        for name, tensor in pairs:
            last_name = name
            yield name, tensor

    try:
        if base == NO_CHANGES:
            written_all()
            # Whole tensors that were kept are older now.
            places.version = -1 if places.kept else version
            model.load_weights(noted(whole))
        elif whole:
            places.load_whole(model, whole, noted)
        for entry, coded in changes:
            names = names_in(entry)
            last_name = CHANGES + " to ".join([*names[:1], *names[1:][-1:]])
            places.write_changes(model, names, coded, noted)
    except Exception as error:
        places.version = -1  # half of an update is the base of none
        error.add_note(f"The engine failed to load {last_name}.")
        raise
    # The sender uses the memory for the next bucket when this returns, so the copies must be done.
    # For its own formats SGLang answers when they are only queued.
    _wait_for_gpu()


def _wait_for_gpu() -> None:
    """Wait until this process's GPU has done all that was queued; without a GPU do nothing."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def compare_loader(model: torch.nn.Module, named_tensors: list[Named]) -> None:
    """Compare tensors with what the engine holds, and load nothing.

    Runs in the engine as SGLang's custom_weight_loader. The last tensor is the report, int64
    [engine tp, tensors, 3], in memory shared with the caller. For each tensor it gets, of each
    rank:

        bytes compared
        bytes that differ
        bytes of the model's parameters that no tensor has been compared with yet
    """
    _wait_for_gpu()
    *named, (_, report) = named_tensors
    # The model keeps the regions from one bucket to the next. Those of earlier verifications stay,
    # which hides nothing: a name always leads to the same regions, and the caller counts names.
    seen = vars(model).setdefault("compared_regions", {})
    counts = []
    for name, tensor in named:
        with _CompareWrites(seen) as writes:
            model.load_weights([(name, tensor)])
        counts.append([writes.compared, writes.different])
    unseen = unseen_bytes(model, seen)
    mine = torch.tensor([[*count, unseen] for count in counts], device=report.device)
    # SGLang copies the report to each rank's own GPU. So only the first rank, which is on the
    # caller's GPU, writes what the caller sees. The engine's own world: its ranks.
    rows = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, mine)
    if dist.get_rank() == 0:
        report.copy_(torch.stack(rows))
    _wait_for_gpu()


class _CompareWrites(TorchDispatchMode):
    """Replaces each in-place write by a comparison of what is held with what would be written.

    Writes are copies, and the zeros of vocabulary padding.

    seen: {address of a storage: {region compared: its bytes}}. Each comparison is noted there. A
    region counts once: a parameter that is compared twice cannot hide one that never is.
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
        held_bytes = held.contiguous().view(torch.uint8)
        self.compared += held.nbytes
        self.different += int((held_bytes != expected.contiguous().view(torch.uint8)).sum())
        return held


def unseen_bytes(model: torch.nn.Module, seen: dict[int, dict[tuple, int]]) -> int:
    """Return how many bytes of the model's parameters are in no region of seen."""
    # Settings of an FP8 KV cache that Llama holds as parameters: no weights, and not used.
    kv_cache_scales = (".k_scale", ".v_scale")
    held = Counter()
    for name, parameter in model.named_parameters():
        if not name.endswith(kv_cache_scales):
            held[parameter.untyped_storage().data_ptr()] += parameter.nbytes
    return sum(
        max(0, nbytes - sum(seen.get(storage, {}).values())) for storage, nbytes in held.items()
    )
