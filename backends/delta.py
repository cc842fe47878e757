"""Only what changed: tensors compared with what was sent last, coded as positions and values.

    Sent             what this rank has sent, in host memory; tells what has changed since
    encode, decode   positions and values <-> bytes
    Tally            what one update has sent, for the metrics

backends/delta_gather.py makes changes of whole tensors from those of their shards.

Rounding to FP8 swallows nearly every small update, so few codes change in a step. Nothing is lost:
values travel as their bytes, and verify_engine_weights of weight_sync.py proves every byte.

The tensors of one dtype in a bucket are compared and coded together, as if laid end to end: small
ones cost more in calls than in bytes. A bucket's entry of changes has the tensors' names in its
name, and these bytes, little-endian:

    int64 n            changes
    int64 escapes      gaps that do not fit in the width
    uint8 width        bytes of a gap: 1, 2 or 4
    uint8 wide         bytes of an escaped gap: 2, 4 or 8
    n gaps             from one changed position to the next; the first from -1
    escapes gaps       each where a gap is written as the largest number of its width
    n values           the bytes of the tensors' dtype
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from backends.huggingface.names import hf_shapes

Named = tuple[str, torch.Tensor]
CHANGES = "changes of "  # begins the name of an entry that holds them; the tensors' names follow
HEAD_BYTES = 18
# Smaller tensors are laid end to end before they are compared: a copy that saves many calls.
LAID_OUT_BYTES = 2**20
# Larger ones are compared in pieces, which on a CPU fit in its cache.
PIECE_BYTES = {"cpu": 2**20, "cuda": 2**26}
# Changes are sent that have at most this share of a tensor's bytes. Beyond it, coding takes more
# time and memory than it saves bytes.
MOST_BYTES = 0.25
UNSIGNED = {1: np.dtype("u1"), 2: np.dtype("<u2"), 4: np.dtype("<u4"), 8: np.dtype("<u8")}
# Tensors of one size of element, compared and written as integers: not every kernel knows float8.
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def as_integers(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's elements as integers of the same size; a view."""
    return tensor.view(INTEGERS[tensor.element_size()])


def names_in(entry: str) -> list[str]:
    """Return the names of the tensors that a bucket's entry is about."""
    return entry.removeprefix(CHANGES).split() if entry.startswith(CHANGES) else [entry]


# --- coding -------------------------------------------------------------------------------------


def encode(positions: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return changes as bytes, uint8, on the CPU; no bytes for no changes.

    positions: int64 [n], ascending. values: [n] of any dtype, on any device.
    """
    n = len(positions)
    if not n:
        return torch.empty(0, dtype=torch.uint8)
    gaps = np.diff(positions.cpu().numpy(), prepend=-1)
    wide = next(width for width in (2, 4, 8) if _fits(gaps, width).all())
    escapes = {width: n - int(_fits(gaps, width).sum()) for width in (1, 2, 4)}
    width = min(escapes, key=lambda width: width * n + wide * escapes[width])
    fits = _fits(gaps, width)
    parts = (
        np.array([n, escapes[width]], "<i8"),
        np.array([width, wide], np.uint8),
        np.where(fits, gaps, _limit(width)).astype(UNSIGNED[width]),
        gaps[~fits].astype(UNSIGNED[wide]),
        as_integers(values.contiguous()).cpu().numpy(),
    )
    return torch.from_numpy(np.concatenate([part.view(np.uint8) for part in parts]))


def _limit(width: int) -> int:
    return 2 ** (8 * width) - 1


def _fits(gaps: np.ndarray, width: int) -> np.ndarray:
    return gaps < _limit(width) if width < 8 else np.ones(len(gaps), bool)


def decode(coded: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (positions, int64 [n], values, dtype [n]) of what encode() returned, on the CPU."""
    if not len(coded):
        return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=dtype)
    data = coded.cpu().numpy()
    (n, escapes), (width, wide) = data[:16].view("<i8").tolist(), data[16:HEAD_BYTES].tolist()
    ends = np.cumsum([HEAD_BYTES, n * width, escapes * wide, n * dtype.itemsize])
    # Copies: a part may begin at any byte.
    gaps, wides, values = (data[begin:end].copy() for begin, end in zip(ends, ends[1:]))
    gaps = gaps.view(UNSIGNED[width]).astype(np.int64)
    gaps[gaps == _limit(width)] = wides.view(UNSIGNED[wide])
    found = torch.empty(n, dtype=dtype)
    as_integers(found).view(torch.uint8).copy_(torch.from_numpy(values))
    return torch.from_numpy(np.cumsum(gaps) - 1), found


def count(coded: torch.Tensor) -> int:
    """Return how many elements have changed."""
    return int(coded[:8].cpu().numpy().view("<i8")[0]) if len(coded) else 0


# --- what was sent ------------------------------------------------------------------------------


@dataclass
class Changes:
    """Changed elements of tensors of one dtype, as if these were laid end to end. On the CPU."""

    names: list[str]
    sizes: torch.Tensor
    """Elements of each tensor, int64 [tensors]"""
    positions: torch.Tensor
    """int64 [n], ascending"""
    values: torch.Tensor
    """[n], as integers of the dtype's size"""
    too_many: torch.Tensor
    """Tensors of which there are no positions, because too much has changed; bool [tensors]"""

    def counts(self) -> torch.Tensor:
        """Return how many changes of each tensor there are here, int64 [tensors]."""
        return _counts(self.positions, self.sizes)

    def counts_of_all(self) -> torch.Tensor:
        """Return the same, and for too many so many that they are too many of any shards."""
        return self.counts().masked_fill(self.too_many, 2**50)

    def tensors(self) -> torch.Tensor:
        """Return which tensor each change is of, int64 [n]."""
        return torch.arange(len(self.sizes)).repeat_interleave(self.counts())

    def only(self, chosen: torch.Tensor) -> "Changes":
        """Return the changes of some of the tensors. chosen: bool [tensors]."""
        if chosen.all():
            return self
        left_out = torch.where(chosen, 0, self.sizes).cumsum(0)
        of = self.tensors()
        here = chosen[of]
        names = [name for name, is_chosen in zip(self.names, chosen.tolist()) if is_chosen]
        positions = self.positions - left_out[of]
        few, too_many = self.values[here], self.too_many[chosen]
        return Changes(names, self.sizes[chosen], positions[here], few, too_many)

    def are_few(self, counts: torch.Tensor, *, shards: int = 1) -> torch.Tensor:
        """Tell of each tensor whether its changes are to be sent in its place, bool [tensors].

        counts: counts_of_all() of each tensor, or their sum over so many shards, all as large as
        ours. What is beyond MOST_BYTES is too many already; of a tiny tensor the head counts.
        """
        width = self.values.element_size()
        return (counts == 0) | (HEAD_BYTES + counts * (2 + width) <= self.sizes * width * shards)

    def entries(self, device: torch.device) -> list[Named]:
        """Return what a bucket holds of the changes: one entry, none if there are none."""
        if not len(self.positions):
            return []
        of_changed = self.only(self.counts() > 0)
        coded = encode(of_changed.positions, of_changed.values)
        return [(CHANGES + " ".join(of_changed.names), coded.to(device))]


def _counts(positions: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Return how many positions lie in each of the tensors that are laid end to end."""
    ends = torch.searchsorted(positions, sizes.cumsum(0))
    return ends.diff(prepend=ends.new_zeros(1))


class Sent:
    """This rank's tensors as they were sent last, in host memory."""

    def __init__(self):
        self.version: int | None = None
        """Of the weights that they are; None before the first update, and after one that failed"""
        self.kept: dict[str, torch.Tensor] = {}
        """As integers, by the name of the first of the tensors that are laid out together"""

    def begin(self) -> int:
        """Begin an update; return the version that its changes are of, -1 if all must be sent.

        The caller sets `version` when the update has ended.
        """
        base, self.version = self.version, None
        if base is None:
            self.kept.clear()
            return -1
        return base

    def changes(self, named: list[Named]) -> Changes | None:
        """Return what has changed, and keep the tensors; None if they were never sent.

        named: tensors of one dtype, the same ones in every update.
        """
        found, too_many, start = [], [], 0
        sizes = torch.tensor([tensor.numel() for _, tensor in named])
        for names, now in _laid_out(named):
            kept = self.kept.get(names[0])
            if kept is None:
                # Page-locked, so that a GPU copies it without a stop in between.
                kept = torch.empty_like(now, device="cpu", pin_memory=now.is_cuda)
                self.kept[names[0]] = kept.copy_(now)
                continue
            of_group = sizes[len(too_many) : len(too_many) + len(names)]
            pieces, are_too_many = _update(kept, now, of_group)
            found += [(start + positions, values) for positions, values in pieces]
            too_many += are_too_many
            start += len(now)
        if not start:
            return None
        nothing = torch.empty(0, dtype=torch.int64), as_integers(named[0][1][:0].cpu()).flatten()
        positions, values = map(torch.cat, zip(nothing, *found))
        names = [name for name, _ in named]
        return Changes(names, sizes, positions, values, torch.tensor(too_many))


def most_changed(element_bytes: int) -> float:
    """Return up to which share of changed elements changes are sent. A gap counts two bytes."""
    return MOST_BYTES * element_bytes / (2 + element_bytes)


def _update(kept: torch.Tensor, now: torch.Tensor, sizes: torch.Tensor) -> tuple[list, list[bool]]:
    """Bring what is kept up to date; return what has changed.

    sizes: of the tensors that are laid end to end, int64. Returns [(positions, values)] of a large
    tensor's pieces or of small ones together, and of each tensor whether it has too many changes:
    their positions are left out, because nobody needs them and they take many times its memory.
    """
    share = most_changed(now.element_size())
    if len(sizes) > 1:
        positions, values = (x.cpu() for x in changed(now, kept.to(now.device)))
        kept.index_copy_(0, positions, values)
        counts = _counts(positions, sizes)
        too_many = counts > sizes * share
        few = ~too_many.repeat_interleave(counts)
        return [(positions[few], values[few])], too_many.tolist()
    found, n, step = [], 0, PIECE_BYTES[now.device.type] // now.element_size()
    for start in range(0, len(now), step):
        was, new = kept[start : start + step], now[start : start + step]
        positions, values = (x.cpu() for x in changed(new, was.to(now.device)))
        n += len(positions)
        if n > len(now) * share:
            kept[start:].copy_(now[start:])
            return [], [True]
        was.index_copy_(0, positions, values)
        found.append((start + positions, values))
    return found, [False]


def _laid_out(named: list[Named]) -> Iterator[tuple[list[str], torch.Tensor]]:
    """Yield (names, vector of integers) of large tensors, and of small ones laid end to end."""
    names, small, nbytes = [], [], 0
    for name, tensor in named:
        vector = as_integers(tensor.detach().contiguous()).flatten()
        if names and nbytes + vector.nbytes > LAID_OUT_BYTES:
            yield names, torch.cat(small)
            names, small, nbytes = [], [], 0
        if vector.nbytes > LAID_OUT_BYTES:
            yield [name], vector
        else:
            names, small, nbytes = [*names, name], [*small, vector], nbytes + vector.nbytes
    if names:
        yield names, torch.cat(small)


def changed(now: torch.Tensor, before: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (positions, int64 [n], ascending, values now, [n]) where vectors of integers differ.

    now, before: of one length and dtype, on one device.
    """
    n = 8 // now.element_size()
    whole = len(now) // n * n
    # A part of a merged parameter may begin at any element.
    if now.data_ptr() % 8 or now.storage_offset() % n:
        now = now.clone()
    # Eight bytes at a time: nearly all are equal.
    words, words_before = (x[:whole].view(torch.int64) for x in (now, before))
    at = _nonzero(words != words_before)
    values, values_before = (x.index_select(0, at).view(now.dtype) for x in (words, words_before))
    place = _nonzero(values != values_before)
    rest = whole + _nonzero(now[whole:] != before[whole:])
    positions = at.index_select(0, place // n) * n + place % n
    values = values.index_select(0, place)
    return torch.cat([positions, rest]), torch.cat([values, now[rest]])


def _nonzero(mask: torch.Tensor) -> torch.Tensor:
    """Return the positions, int64, where a vector is true."""
    if mask.is_cuda:
        return mask.nonzero().flatten()
    return torch.from_numpy(np.flatnonzero(mask.numpy()))  # in half of torch's time


# --- for the metrics ----------------------------------------------------------------------------


class Tally:
    """Bytes and changes of one update, as this rank sees them."""

    def __init__(self, config: dict, fp8: frozenset[str]):
        self.fp8, self.buckets, self.bytes = fp8, 0, 0
        self.changed = {"fp8": 0, "bf16": 0}
        self.elements = {"fp8": 0, "bf16": 0}
        for name, shape in hf_shapes(config).items():
            self.elements[self._kind(name)] += torch.Size(shape).numel()

    def _kind(self, name: str) -> str:
        return "fp8" if name in self.fp8 else "bf16"

    def add(self, bucket: list[Named]) -> None:
        """Count a bucket. A tensor that was sent whole counts as changed."""
        self.buckets += 1
        for entry, tensor in bucket:
            self.bytes += tensor.nbytes
            n = count(tensor) if entry.startswith(CHANGES) else tensor.numel()
            name = next(iter(names_in(entry)), "")  # the others are of the same kind
            if n and not name.endswith("_scale_inv"):
                self.changed[self._kind(name)] += n

    def metrics(self, *, is_full: bool) -> dict[str, float]:
        """Return what metrics.jsonl logs. is_full: whether no tensor was compared."""
        shares = {
            f"sync_changed_{kind}": self.changed[kind] / max(self.elements[kind], 1)
            for kind in self.changed
        }
        return {"sync_bytes": self.bytes, "sync_full": int(is_full), **shares}
