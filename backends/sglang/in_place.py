"""Changes of a Hugging Face tensor, written where the engine holds it.

SGLang's load_weights knows where a tensor goes: into a part of a merged layer, a tensor-parallel
rank's slice, an expert's place. The first time that a tensor comes whole, its writes are watched
and remembered. Later changes are written to the same places, without load_weights.

Runs in the engine's process. A place is a box of the tensor and the view of a parameter that it was
copied to. A tensor whose writes were not copies of its boxes is kept, and loaded whole when it
changes.
"""

import bisect
import contextlib
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from backends.delta import as_integers, decode


# {address of a parameter's storage: positions that this update has written; None: perhaps all}.
# Without a GPU, the emulation of FP8 layers reads it.
WRITTEN: dict[int, list[torch.Tensor] | None] = {}


_ALL = -1  # the only entry of WRITTEN where every parameter may have been written


def written_all() -> None:
    """Note that every parameter may have been written, as an update without changes does."""
    WRITTEN.clear()
    WRITTEN[_ALL] = None


def take_written(parameter: torch.Tensor) -> list[torch.Tensor] | None:
    """Return and forget what was written into a parameter: [] for nothing, None for perhaps all."""
    if _ALL in WRITTEN:
        return None
    return WRITTEN.pop(parameter.untyped_storage().data_ptr(), [])


@dataclass
class Place:
    """A box of a tensor, and where it is held."""

    held: torch.Tensor
    """View of a parameter"""
    offset: int
    """Of the box's first element in the flattened tensor"""
    strides: tuple[int, ...]
    """Of the box in the flattened tensor"""

    def write(self, positions: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Write those elements that lie in the box.

        positions: int64 [n], ascending, in the flattened tensor. values: [n], in its dtype. Both
        on the CPU. Returns the positions in the parameter's storage.
        """
        if self.held.is_contiguous() and self.strides == self.held.stride():  # whole rows
            ends = torch.tensor([self.offset, self.offset + self.held.numel()])
            begin, end = torch.searchsorted(positions, ends)
            at, values = positions[begin:end] - self.offset, values[begin:end]
        else:
            inside, at = self._find(positions)
            at, values = at[inside], values[inside]
        at += self.held.storage_offset()
        length = self.held.untyped_storage().nbytes() // self.held.element_size()
        stored = self.held.as_strided((length,), (1,), 0)
        values = values.to(self.held.device, self.held.dtype)
        as_integers(stored).index_copy_(0, at.to(self.held.device), as_integers(values))
        return at

    def _find(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (whether it lies in the box, bool [n], where in the held view, int64 [n])."""
        rest = positions - self.offset
        inside, found = rest >= 0, torch.zeros_like(rest)
        # Of a contiguous tensor, the box's strides fall from one dimension to the next.
        for size, stride, held_stride in zip(self.held.shape, self.strides, self.held.stride()):
            if size > 1:  # of one element the stride means nothing
                at = rest // stride
                rest, inside = rest - at * stride, inside & (at >= 0) & (at < size)
                found += at * held_stride
        return inside & (rest == 0), found


class Places:
    """Where an engine rank holds each Hugging Face tensor, and what was written of late."""

    def __init__(self):
        self.version, self.base = -1, -1
        self.of: dict[str, list[Place]] = {}
        self.kept: dict[str, torch.Tensor] = {}
        """Whole tensors that have no places"""
        self.dtypes: dict[str, torch.dtype] = {}
        self.sizes: dict[str, int] = {}
        """Elements of each tensor"""

    def begin(self, version: int, *, base: int) -> None:
        """Check that a bucket's changes are of the version that is held: base, -1 for no changes.

        Raises RuntimeError if not. The buckets of one update have one version.
        """
        expected = self.base if version == self.version else self.version
        if base not in (-1, expected):
            held = f"the engine holds version {expected}"
            raise RuntimeError(f"{held}, and changes of version {base} came: send all of it")
        if version != self.version:
            self.version, self.base = version, base
            WRITTEN.clear()

    def load_whole(self, model: torch.nn.Module, named: list, noted=iter) -> None:
        """Load tensors by load_weights, and remember where those go that are new.

        named: [(name, tensor), ...]. noted: yields them, and may note which one it is at.
        """
        new = [pair for pair in named if pair[0] not in self.dtypes]
        with _WatchCopies(model, named) if new else contextlib.nullcontext() as copies:
            model.load_weights(noted(named))
        for name, tensor in new:
            if not copies.is_clear:  # of which tensor the other writes were, only one alone tells
                with _WatchCopies(model, [(name, tensor)]) as copies_of_one:
                    model.load_weights(noted([(name, tensor)]))
                self.of[name] = copies_of_one.places[name] if copies_of_one.is_clear else []
            else:
                self.of[name] = copies.places[name]
            self.dtypes[name], self.sizes[name] = tensor.dtype, tensor.numel()
        for name, tensor in named:
            if not self.of[name]:
                self.kept[name] = tensor.to("cpu", copy=True)
            for place in self.of[name]:
                WRITTEN[place.held.untyped_storage().data_ptr()] = None

    def write_changes(
        self, model: torch.nn.Module, names: list[str], coded: torch.Tensor, noted=iter
    ) -> None:
        """Write coded changes of tensors of one dtype that have come whole before.

        Positions are in the tensors laid end to end. noted: as for load_whole().
        """
        if missing := [name for name in names if name not in self.sizes]:
            raise RuntimeError(f"changes of {missing[0]} came, and the whole tensor never did")
        if not names:
            return
        positions, values = decode(coded, self.dtypes[names[0]])
        ends = torch.tensor([self.sizes[name] for name in names]).cumsum(0)
        cuts = torch.searchsorted(positions, ends).tolist()
        starts = [0, *ends.tolist()]
        for (name, start), begin, end in zip(noted(zip(names, starts)), [0, *cuts], cuts):
            self._write(model, name, positions[begin:end] - start, values[begin:end])

    def _write(
        self, model: torch.nn.Module, name: str, positions: torch.Tensor, values: torch.Tensor
    ) -> None:
        if name in self.kept:
            as_integers(self.kept[name]).view(-1)[positions] = as_integers(values)
            model.load_weights(iter([(name, self.kept[name])]))
            return
        for place in self.of[name]:
            written = place.write(positions, values)
            if not len(written) or not _is_emulated(name, place.held):
                continue
            parts = WRITTEN.setdefault(place.held.untyped_storage().data_ptr(), [])
            if parts is not None:
                parts.append(written)


class _WatchCopies(TorchDispatchMode):
    """Notes which box of which tensor each copy reads, and what it writes.

    is_clear: whether all that was written into the model's parameters were such copies, and zeros.
    """

    def __init__(self, model: torch.nn.Module, named: list[tuple[str, torch.Tensor]]):
        super().__init__()
        parameters = [*model.parameters(), *model.buffers()]
        self.storages = {x.untyped_storage().data_ptr() for x in parameters}
        self.named = sorted(named, key=lambda pair: pair[1].data_ptr())
        self.begins = [tensor.data_ptr() for _, tensor in self.named]
        self.places: dict[str, list[Place]] = {name: [] for name, _ in named}
        self.is_clear = True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function not in (torch.ops.aten.fill_.Scalar, torch.ops.aten.zero_.default):
            if any(map(self._is_held, _written(function, args, kwargs))):
                is_copy = function is torch.ops.aten.copy_.default
                self.is_clear &= is_copy and self._note(*args[:2])
        return function(*args, **kwargs)

    def _is_held(self, tensor: torch.Tensor) -> bool:
        """Tell whether a tensor is a part of a parameter, and not an empty one."""
        return tensor.numel() > 0 and tensor.untyped_storage().data_ptr() in self.storages

    def _note(self, held: torch.Tensor, source: torch.Tensor) -> bool:
        """Note a copy; return whether it was one of a box of a tensor."""
        at = bisect.bisect_right(self.begins, source.data_ptr()) - 1
        if at < 0 or source.shape != held.shape:
            return False
        name, tensor = self.named[at]
        offset, rest = divmod(source.data_ptr() - self.begins[at], tensor.element_size())
        is_repeated = any(n > 1 and not s for n, s in zip(source.shape, source.stride()))
        if offset >= tensor.numel() or rest or source.dtype != tensor.dtype or is_repeated:
            return False
        # A loader may transpose. A box's strides fall from one dimension to the next.
        order = sorted(range(source.dim()), key=lambda dim: -source.stride(dim))
        held, source = held.detach().permute(order), source.permute(order)
        self.places[name].append(Place(held, offset, source.stride()))
        return True


def _written(function, args: tuple, kwargs: dict) -> list[torch.Tensor]:
    """Return the tensors that a call of an operator writes."""
    schema = function._schema.arguments
    given = dict(zip((argument.name for argument in schema), args)) | kwargs
    writes = [argument.name for argument in schema if argument.is_write]
    return [given[name] for name in writes if torch.is_tensor(given.get(name))]


def _is_emulated(name: str, held: torch.Tensor) -> bool:
    """Tell whether a layer without a GPU keeps fp32 weights that are made of this parameter."""
    return not held.is_cuda and (held.element_size() == 1 or name.endswith("_scale_inv"))


def places_of(model: torch.nn.Module) -> Places:
    """Return the model's Places; they live as long as the model."""
    return vars(model).setdefault("hf_places", Places())
