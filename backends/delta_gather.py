"""Changes of whole tensors, from what has changed of the shards on each rank.

    gather_changes   shards of a bucket -> its entries of changes, and the shards that go whole
    compare          the same for tensors that every rank has

Three messages a bucket and group: how many elements of each tensor have changed, how many bytes
each rank has to tell, and these bytes.
"""

from dataclasses import replace

import torch
import torch.distributed as dist

from backends.delta import Changes, Named, Sent, decode, encode
from backends.huggingface.names import VOCABULARY


def gather_changes(bucket: list, layout, sent: Sent, vocab_size: int) -> tuple[list[Named], list]:
    """Return a bucket's entries of changes, and the shards that must be gathered and sent whole.

    They must where nothing was sent before, or where too much has changed. What must be
    quantized as a whole is for compare(), when it has been gathered. Collective.
    bucket: weight_sync.Shard of each tensor. layout: backends.megatron.layout.Layout.
    """
    entries, whole, kinds = [], [], {}
    for shard in bucket:
        if shard.quantize_whole:
            whole.append(shard)
            continue
        group, tp = layout.group(shard.rule), layout.tp(shard.rule)
        if shard.rule.tp_dim is None or group.size() == 1:
            group, tp = None, 1
        kinds.setdefault((group, tp), {}).setdefault(shard.local.dtype, []).append(shard)
    for (group, tp), of_dtypes in kinds.items():
        shards_of, changes_of = [], []
        for shards in of_dtypes.values():
            changes = sent.changes([(shard.names[0], shard.local) for shard in shards])
            if changes is None:
                whole += shards
            else:
                shards_of.append(shards)
                changes_of.append(changes)
        if not changes_of:
            continue
        device = shards_of[0][0].local.device
        few_of = _which_are_few(changes_of, group, device)
        changes_of = [changes.only(few) for changes, few in zip(changes_of, few_of)]
        parts_of = _exchange(changes_of, group, device)
        for shards, few, parts in zip(shards_of, few_of, parts_of):
            pairs = list(zip(shards, few.tolist()))
            whole += [shard for shard, is_few in pairs if not is_few]
            chosen = [shard for shard, is_few in pairs if is_few]
            entries += _merge(parts, chosen, tp, vocab_size).entries(device)
    return entries, whole


def _which_are_few(changes_of: list[Changes], group, device) -> list[torch.Tensor]:
    """Return of each tensor whether the changes of all its shards are few, bool [tensors]."""
    counts = [changes.counts_of_all() for changes in changes_of]
    if group is None:
        return [changes.are_few(n) for changes, n in zip(changes_of, counts)]
    total = torch.cat(counts).to(device)
    dist.all_reduce(total, group=group)
    totals = total.cpu().split([len(n) for n in counts])
    return [changes.are_few(n, shards=group.size()) for changes, n in zip(changes_of, totals)]


def _exchange(changes_of: list[Changes], group, device) -> list[list[Changes]]:
    """Return of each of the given changes those of every rank."""
    if group is None:
        return [[changes] for changes in changes_of]
    coded = [encode(changes.positions, changes.values) for changes in changes_of]
    mine = torch.tensor([len(part) for part in coded], device=device)
    lengths = torch.empty(group.size(), len(coded), dtype=mine.dtype, device=device)
    dist.all_gather(list(lengths), mine, group=group)
    lengths = lengths.cpu()
    longest = int(lengths.sum(1).max())
    rows = torch.zeros(group.size(), longest, dtype=torch.uint8, device=device)
    if longest:
        message = torch.zeros(longest, dtype=torch.uint8, device=device)
        message[: int(mine.sum())] = torch.cat(coded).to(device)
        dist.all_gather(list(rows), message, group=group)
    parts_of = [[] for _ in coded]
    for row, of_rank in zip(rows.cpu(), lengths.tolist()):
        pieces = row[: sum(of_rank)].split(of_rank)
        for changes, piece, parts in zip(changes_of, pieces, parts_of):
            positions, values = decode(piece, changes.values.dtype)
            parts.append(replace(changes, positions=positions, values=values))
    return parts_of


def _merge(parts: list[Changes], shards: list, tp: int, vocab_size: int) -> Changes:
    """Return the changes of whole tensors from those of their shards, by rank.

    Each tp ranks in turn have the shards of one tensor; of experts there are several. Rows that pad
    the vocabulary are left out.
    """
    copies = len(parts) // tp
    names = [name for shard in shards for name in shard.names[:copies]]
    sizes = []
    for shard in shards:
        is_vocabulary = shard.names[0] in VOCABULARY
        size = vocab_size * shard.local.shape[1] if is_vocabulary else shard.local.numel() * tp
        sizes += [size] * copies
    sizes = torch.tensor(sizes, dtype=torch.int64)
    if len(parts) == 1 and torch.equal(sizes, parts[0].sizes):  # nothing is split or padded
        return parts[0]
    starts = sizes.cumsum(0) - sizes
    # Of a tensor that is split by rows, each shard is one run of its elements; else each row is.
    runs = [
        shard.local[0].numel() if shard.rule.tp_dim else shard.local.numel() for shard in shards
    ]
    runs, found = torch.tensor(runs, dtype=torch.int64), []
    for rank, part in enumerate(parts):
        of = part.tensors()
        at, run = part.positions - (part.sizes.cumsum(0) - part.sizes)[of], runs[of]
        at = (at // run * tp + rank % tp) * run + at % run
        of = of * copies + rank // tp
        inside = at < sizes[of]
        found.append(((starts[of] + at)[inside], part.values[inside]))
    positions, values = map(torch.cat, zip(*found))
    if len(parts) > 1:
        positions, order = positions.sort()
        values = values[order]
    return Changes(names, sizes, positions, values, torch.zeros(len(names), dtype=torch.bool))


def compare(named: list[Named], sent: Sent) -> list[Named]:
    """Return a bucket's entries for tensors that every rank has: changes where these are few."""
    entries, of_dtypes = [], {}
    for name, tensor in named:
        of_dtypes.setdefault(tensor.dtype, []).append((name, tensor))
    for tensors in of_dtypes.values():
        changes = sent.changes(tensors)
        if changes is None:
            entries += tensors
            continue
        few = changes.are_few(changes.counts_of_all())
        entries += [pair for pair, is_few in zip(tensors, few.tolist()) if not is_few]
        entries += changes.only(few).entries(tensors[0][1].device)
    return entries
