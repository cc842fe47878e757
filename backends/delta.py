"""Only what changed: tensors compared with what was sent last, coded as positions and values.

    encode   positions and values of one tensor -> bytes
    decode   the same, back
    Sent     what this rank has sent, in host memory; tells what has changed since
    gather_changes   the changes of all ranks' shards -> those of whole tensors
    Tally    what one update has sent, for the metrics

Rounding to FP8 swallows nearly every small update, so few codes change in a step. Nothing is lost:
values travel as their bytes, and verify_engine_weights of weight_sync.py proves every byte.

One coded tensor, little-endian:

    int64 n            changes
    int64 escapes      gaps that do not fit in the width
    uint8 width        bytes of a gap: 1, 2 or 4
    uint8 wide         bytes of an escaped gap: 2, 4 or 8
    n gaps             from one changed position to the next; the first from -1
    escapes gaps       each where a gap is written as the largest number of its width
    n values           the bytes of the tensor's dtype
"""

import numpy as np
import torch
import torch.distributed as dist

from backends.huggingface.names import VOCABULARY, hf_shapes

CHANGES = " (changes)"  # ends the name of a bucket's entry that holds coded changes
HEAD_BYTES = 18
UNSIGNED = {1: np.dtype("u1"), 2: np.dtype("<u2"), 4: np.dtype("<u4"), 8: np.dtype("<u8")}
# Tensors of one size of element, compared and written as integers: not every kernel knows float8.
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def as_integers(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's elements as integers of the same size; a view."""
    return tensor.view(INTEGERS[tensor.element_size()])


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


class Sent:
    """This rank's tensors as they were sent last, in host memory, by name."""

    def __init__(self):
        self.version: int | None = None
        """Of the weights that they are; None before the first update, and after one that failed"""
        self.kept: dict[str, torch.Tensor] = {}

    def begin(self) -> int:
        """Begin an update; return the version that its changes are of, -1 if all must be sent.

        The caller sets `version` when the update has ended.
        """
        base, self.version = self.version, None
        if base is None:
            self.kept.clear()
            return -1
        return base

    def changes(self, name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        """Return what has changed, coded, and keep the tensor; None if it was never sent."""
        kept = self.kept.get(name)
        if kept is None:
            self.kept[name] = tensor.detach().contiguous().to("cpu", copy=True)
            return None
        now = as_integers(tensor.detach().contiguous()).flatten()
        kept = as_integers(kept).view(-1)
        positions, values = changed(now, kept.to(now.device))
        kept.index_copy_(0, positions.cpu(), values.cpu())
        return encode(positions, values)


def changed(now: torch.Tensor, before: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (positions, int64 [n], ascending, values now, [n]) where vectors of integers differ.

    now, before: of one length and dtype, on one device.
    """
    n = 8 // now.element_size()
    whole = len(now) // n * n
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


# --- between ranks ------------------------------------------------------------------------------


def gather_changes(bucket: list, layout, sent: Sent, vocab_size: int) -> list[list | None]:
    """Return each shard's changes, as entries of a bucket; None where tensors must go whole.

    They must where a rank has not sent its part before, or where the changes have more bytes. What
    must be quantized as a whole is compared later, see shorter(). Collective.
    bucket: weight_sync.Shard of each tensor. layout: backends.megatron.layout.Layout.
    """
    coded = [
        None if shard.quantize_whole else sent.changes(shard.names[0], shard.local)
        for shard in bucket
    ]
    found = [None] * len(bucket)
    splits = {}
    for i, shard in enumerate(bucket):
        group = layout.group(shard.rule)
        if shard.rule.tp_dim is not None and group.size() > 1:
            splits.setdefault(group, []).append(i)
        elif _is_shorter(coded[i], shard.local):
            found[i] = [_entry(shard.names[0], coded[i], shard.local.device)]
    for group, split in splits.items():
        for i, parts in _exchange(bucket, coded, split, group).items():
            shard, tp = bucket[i], layout.tp(bucket[i].rule)
            whole = [parts[at : at + tp] for at in range(0, len(parts), tp)]
            merged = [_merge(of_one, shard, vocab_size) for of_one in whole]
            device = shard.local.device
            found[i] = [_entry(*pair, device) for pair in zip(shard.names, merged)]
    return found


def _is_shorter(coded: torch.Tensor | None, tensor: torch.Tensor) -> bool:
    return coded is not None and len(coded) < tensor.nbytes


def _entry(name: str, coded: torch.Tensor, device: torch.device) -> tuple[str, torch.Tensor]:
    return name + CHANGES, coded.to(device)


def _exchange(bucket: list, coded: list, split: list[int], group) -> dict[int, list[torch.Tensor]]:
    """Return {shard: the coded changes of every rank's part}, of those that save bytes."""
    device = bucket[split[0]].local.device
    # What was never sent counts as whole, on every rank, and is not chosen.
    sizes = [bucket[i].local.nbytes if coded[i] is None else len(coded[i]) for i in split]
    mine = torch.tensor(sizes, device=device)
    theirs = torch.empty(group.size(), len(split), dtype=mine.dtype, device=device)
    dist.all_gather(list(theirs), mine, group=group)
    theirs = theirs.tolist()
    chosen = [
        k
        for k, i in enumerate(split)
        if sum(row[k] for row in theirs) < bucket[i].local.nbytes * len(theirs)
    ]
    if not chosen:
        return {}
    message = torch.cat([coded[split[k]] for k in chosen])
    lengths = [sum(row[k] for k in chosen) for row in theirs]
    padded = torch.zeros(max(lengths), dtype=torch.uint8, device=device)
    padded[: len(message)] = message.to(device)
    rows = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(rows, padded, group=group)
    parts = {split[k]: [] for k in chosen}
    for row, of_rank in zip(rows, theirs):
        pieces = row.cpu()[: sum(of_rank[k] for k in chosen)].split([of_rank[k] for k in chosen])
        for k, piece in zip(chosen, pieces):
            parts[split[k]].append(piece)
    return parts


def _merge(parts: list[torch.Tensor], shard, vocab_size: int) -> torch.Tensor:
    """Return the coded changes of a whole tensor from those of its shards, by rank.

    Rows that pad the vocabulary are left out.
    """
    if len(parts) == 1:  # an expert that no rank shares
        return parts[0]
    shape, dim = shard.local.shape, shard.rule.tp_dim
    columns = shape[1:].numel()
    wide = columns * (len(parts) if dim else 1)
    rows = shape[0] * (1 if dim else len(parts))
    if shard.names[0] in VOCABULARY:
        rows = vocab_size
    found = []
    for rank, part in enumerate(parts):
        positions, values = decode(part, INTEGERS[shard.local.element_size()])
        row, column = positions // columns, positions % columns
        if dim:
            column = column + rank * columns
        else:
            row = row + rank * shape[0]
        found.append((row * wide + column, values))
    positions, values = map(torch.cat, zip(*found))
    positions, order = positions.sort()
    inside = positions < rows * wide
    return encode(positions[inside], values[order][inside])


def shorter(pairs: list[tuple[str, torch.Tensor]], sent: Sent) -> list[tuple[str, torch.Tensor]]:
    """Return whole tensors that every rank has, or where that is shorter their changes."""
    found = []
    for name, tensor in pairs:
        coded = sent.changes(name, tensor)
        entry = (name, tensor)
        if _is_shorter(coded, tensor):
            entry = _entry(name, coded, tensor.device)
        found.append(entry)
    return found


def without_unchanged(named: list[tuple[str, torch.Tensor]]) -> list[tuple[str, torch.Tensor]]:
    """Leave out changes of nothing. One entry stays: a bucket without any would be the last."""
    changed = [pair for pair in named if not pair[0].endswith(CHANGES) or len(pair[1])]
    return changed or named[:1]


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

    def add(self, bucket: list[tuple[str, torch.Tensor]]) -> None:
        """Count a bucket. A tensor that was sent whole counts as changed."""
        self.buckets += 1
        for name, tensor in bucket:
            is_whole = not name.endswith(CHANGES)
            self.bytes += tensor.nbytes
            if "_scale_inv" not in name:
                n = tensor.numel() if is_whole else count(tensor)
                self.changed[self._kind(name.removesuffix(CHANGES))] += n

    def metrics(self, *, is_full: bool) -> dict[str, float]:
        """Return what metrics.jsonl logs. is_full: whether no tensor was compared."""
        shares = {
            f"sync_changed_{kind}": self.changed[kind] / max(self.elements[kind], 1)
            for kind in self.changed
        }
        return {"sync_bytes": self.bytes, "sync_full": int(is_full), **shares}
