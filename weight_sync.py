"""Megatron weights -> engine weights, every step.

What happens to one tensor on its way, for example linear_fc1 at tensor parallelism 2:

    this rank's shard [gate half; up half]    BF16, where the optimizer left it
      -> split into gate and up slices        Layout.split
      -> quantize each slice where it lives   fp8_quant, if its cut falls on a multiple of 128;
                                              else it is quantized after the gather
      -> gather codes and scales              one all_gather of bytes per bucket over the
                                              tensor-parallel group: half of what BF16 would move
      -> send the bucket to the engine        backends/sglang/buckets.py, in the engine's process:
                                              shared memory on a CPU, CUDA IPC on a GPU

Contract: whatever the parallel layout, the engine holds exactly quantize(full Hugging Face tensor),
byte for byte. verify_engine_weights proves it. It computes the expected bytes another way: gather
BF16, then quantize the whole tensor. It sends them through the same loader, in which every write is
replaced by a comparison with what the engine holds.

With --sync delta only what has changed since the last update travels (backends/delta.py).

An update is all or nothing. A failure in any phase ends the run and names the phase and the
tensors. The engine is paused from the first tensor to the last, so it never generates with half of
the new weights. Memory on top of the model is a few times bucket_bytes, or a few times the largest
tensor where that is larger; bench/weight_sync.py measures it.

Unlike in slime, the engine loads no weights by itself, and no converted checkpoint is needed. It
starts empty, and its first weights come on this path.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from backends.delta import CHANGES, Sent, Tally
from backends.delta_gather import compare, gather_changes
from backends.huggingface.fp8 import describe
from backends.huggingface.names import VOCABULARY, Rule, parameters_of, rule_of
from backends.megatron.layout import Layout
from backends.megatron.lora import merged
from backends.sglang.buckets import (
    Named,
    check_all_compared,
    entries,
    failure_note,
    pack,
    phase,
    unpack,
)
from common.distributed import broadcast_bytes, free_cached_memory
from common.errors import EngineDied
from fp8_quant import BLOCK, quantize_blockwise

# Named is (Hugging Face name, tensor). A Rule says which Hugging Face tensors a Megatron parameter
# holds, and along which dimension tensor parallelism splits it. phase() names the phase of an
# update in whatever is raised inside.


@dataclass(frozen=True)
class WeightPath:
    """What one rank needs to take part in a weight update.

    Trainer ranks send. In the asynchronous loop rollout ranks receive.
    """

    gpt: torch.nn.Module | None
    """Megatron's GPTModel with this rank's shards; None on a rank that does not train."""
    layout: Layout | None
    """How the model is split; None where gpt is."""
    config: dict
    """config.json, checked"""
    fp8: frozenset[str]
    """Hugging Face names of the weights that the engine holds in FP8"""
    bucket_bytes: int
    broadcast_group: dist.ProcessGroup | None = None
    """Asynchronous loop: all ranks; rank 0 sends them every bucket. None where each trainer has its
    engine at its side."""
    sent: Sent | None = None
    """What this rank has sent, to send changes only; None with --sync full."""

    def shards(self, *, quantize: bool) -> Iterator["Shard"]:
        """Yield what is gathered. harness/export.py gathers LoRA's adapters by another path."""
        return shards_in_model_order(self, quantize=quantize)


def open_path(run, trainer) -> WeightPath:
    """Return this rank's end of the path.

    run: harness.start.Run. trainer: None on rollout ranks.
    """
    run.record.say(describe(run.config, run.fp8))
    gpt, layout = (trainer.gpt, trainer.layout) if trainer else (None, None)
    sync = run.settings.sync
    sent = Sent() if sync.sync == "delta" else None
    return WeightPath(
        gpt, layout, run.config, run.fp8, sync.bucket_bytes, run.broadcast_group, sent
    )


# --- into the engine ----------------------------------------------------------------------------


def send_weights(weights: WeightPath, engine, *, version: int, verify: bool = False) -> dict:
    """Give the engine this version of the weights; return metrics. Collective.

    The engine pauses at the first bucket and goes on when it has loaded the last. It loads one
    bucket while the next is being sent. In the asynchronous loop training does not wait for the
    last bucket; only new requests do, and they raise what went wrong.
    engine: a NoEngine on ranks without one. verify: compare every byte afterwards.
    """
    is_colocated, sent = weights.broadcast_group is None, weights.sent
    tally, base = Tally(weights.config, weights.fp8), sent and sent.begin()
    try:
        if is_colocated:
            free_cached_memory(on_all_ranks=True)  # for the engine's weights
        for bucket in buckets_of(weights, quantize=True, sent=sent):
            if not tally.buckets:
                engine.begin_update()
            engine.load(bucket, version=version, base=base)
            tally.add(bucket)
            del bucket  # before the next is made
        if is_colocated:
            engine.settle()  # the last bucket is loaded, and its memory can be freed
            free_cached_memory(on_all_ranks=True)  # for the engine's KV cache
        engine.end_update(version)
        if is_colocated:
            engine.settle()
    except EngineDied as error:
        # It died of what it was given last, whatever this rank has done since.
        if engine.last_phase:
            error.add_note(failure_note(*engine.last_phase))
        raise
    if sent:
        sent.version = version
    if verify:
        verify_engine_weights(weights, engine)
        if is_colocated:
            free_cached_memory()
    return tally.metrics(is_full=base in (None, -1))


@torch.no_grad()
def verify_engine_weights(weights: WeightPath, engine) -> int:
    """Prove that the engine holds quantize(full tensor) of every weight. Collective.

    Returns the bytes compared. Raises RuntimeError naming tensors that differ, are missing or come
    twice, or that the engine has no place for (0 of 0 bytes). It also raises it if some of the
    engine's bytes were compared with no tensor, and says how many.
    """
    compared_bytes, uncompared_bytes, names = 0, 0, Counter()
    for bucket in buckets_of(weights, quantize=False):
        if not engine.holds_weights:
            continue
        named = []
        for name, tensor in bucket:
            named += quantize_named(name, tensor) if name in weights.fp8 else [(name, tensor)]
        # [engine tp ranks, tensors, (bytes compared, different, of parameters not compared so far)]
        report = engine.compare(named)
        names.update(name for name, _ in named)
        compared, different, _ = report.sum(0).T.tolist()
        counts = zip([name for name, _ in named], different, compared)
        bad = [f"{name} ({wrong} of {n} bytes)" for name, wrong, n in counts if wrong or not n]
        if bad:
            raise RuntimeError(
                "read-back failed: the engine's weights are not quantize(full tensor) for"
                f" {', '.join(bad[:5])}; {len(bad)} tensors in all"
            )
        compared_bytes += sum(compared)
        uncompared_bytes = int(report[:, 0, 2].sum())
    if engine.holds_weights:
        check_all_compared(names, weights.config, uncompared_bytes)
    return compared_bytes


def quantize_named(name: str, tensor: torch.Tensor) -> list[Named]:
    """Return a full weight as the FP8 pair of a block-FP8 checkpoint: codes and scales."""
    with phase("quantize", [name]):
        codes, scale_inv = quantize_blockwise(tensor)
    return [(name, codes), (f"{name}_scale_inv", scale_inv)]


# --- between ranks ------------------------------------------------------------------------------


def buckets_of(
    weights: WeightPath, *, quantize: bool, sent: Sent | None = None
) -> Iterator[list[Named]]:
    """Yield full tensors, about bucket_bytes at a time, on trainers and rollout ranks alike.

    sent: yield only what has changed since, where that is little, as backends/delta.py codes it.
    Collective: every rank must iterate to the end.
    """
    how = dict(quantize=quantize, sent=sent)
    gathered = None if weights.gpt is None else trainer_buckets(weights, **how)
    if weights.broadcast_group is None:
        return gathered
    return broadcast_buckets(gathered, weights.broadcast_group)


def trainer_buckets(
    weights: WeightPath, *, quantize: bool, sent: Sent | None = None
) -> Iterator[list[Named]]:
    """Yield the whole model on every trainer. Pipeline stages send one after another.

    Within a stage, each tensor-parallel rank sends a different 1/TP of the bytes to the other
    stages, which gather the parts. Tensor-parallel ranks share a machine and stages do not: so the
    slow links carry every byte once per machine.
    """
    stages, parts = weights.layout.pp_group, weights.layout.tp_group
    for stage in range(stages.size()):
        is_mine = stage == stages.rank()
        gathered = gather_buckets(weights, quantize=quantize, sent=sent) if is_mine else None
        if stages.size() == 1:
            yield from gathered
        else:
            yield from broadcast_buckets(gathered, stages, source=stage, parts=parts)


def broadcast_buckets(
    gathered: Iterator[list[Named]] | None,
    group: dist.ProcessGroup,
    *,
    source: int = 0,
    parts: dist.ProcessGroup | None = None,
) -> Iterator[list[Named]]:
    """Yield one rank's buckets on all ranks of the group. gathered: None on the receiving ranks.

    parts: n ranks that hold, or get, the same buckets. Each is in a group of its own; all are
    sources, or none is. Each sends or receives 1/n of the bytes; then the receivers gather the
    parts.
    """
    n = parts.size() if parts else 1
    is_source = group.rank() == source
    while True:
        bucket = [] if gathered is None else next(gathered, [])
        with phase("send", [name for name, _ in bucket] or ["what another rank sends"]):
            header, flat = pack(bucket, multiple_of=n) if is_source else (b"", None)
            header = broadcast_bytes(header, group, source=source)
            if header == b"[]":
                return
            if flat is None:
                nbytes = sum(nbytes for *_, nbytes in entries(header))
                flat = torch.empty(-(-nbytes // n) * n, dtype=torch.uint8, device=_device())
            rows = flat.view(n, -1)
            mine = rows[parts.rank() if parts else 0]
            dist.broadcast(mine, group=group, group_src=source)
            if n > 1 and not is_source:
                dist.all_gather(list(rows), mine.clone(), group=parts)
        yield bucket or unpack(header, flat)
        del bucket, flat, rows, mine  # before the next are made


def _device() -> torch.device:
    has_gpu = torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if has_gpu else torch.device("cpu")


# --- from Megatron's shards to full Hugging Face tensors ----------------------------------------


@dataclass
class Shard:
    """This rank's part of one Hugging Face tensor.

    Expert-parallel ranks hold different experts under the same Megatron name. So the shard of an
    expert stands for several tensors, one for each of these ranks.
    """

    names: list[str]
    """One name; of an expert, one for each expert-parallel rank"""
    local: torch.Tensor
    rule: Rule
    quantize_whole: bool = False
    """Quantize after the gather: the cut does not fall on a block boundary."""


@torch.no_grad()
def shards_in_model_order(weights: WeightPath, *, quantize: bool) -> Iterator[Shard]:
    """Yield every weight as shards, in the model's own order, which is the same on every rank.

    quantize: turn each weight that the engine holds in FP8 into two shards, `name` (float8_e4m3fn)
    and `name_scale_inv` (float32).
    """
    config, layout = weights.config, weights.layout
    for megatron_name, parameter in parameters_of(weights.gpt):
        if megatron_name == "output_layer.weight" and config["tie_word_embeddings"]:
            continue  # the last pipeline stage's copy of the first stage's embedding
        rule = rule_of(megatron_name, first_layer=layout.first_layer)
        tp = layout.tp(rule)
        weight = merged(weights.gpt, megatron_name, parameter)  # with LoRA's adapters, if any
        parts = layout.split(weight, rule, config)
        names_of_parts = zip(*layout.names(rule, config))
        for names, part in zip(map(list, names_of_parts), parts):
            if not quantize or names[0] not in weights.fp8:
                yield Shard(names, part, rule)
            elif tp == 1 or part.shape[rule.tp_dim] % BLOCK == 0:
                with phase("quantize", names):
                    codes, scale_inv = quantize_blockwise(part)
                yield Shard(names, codes, rule)
                yield Shard([f"{name}_scale_inv" for name in names], scale_inv, rule)
            else:
                yield Shard(names, part, rule, quantize_whole=True)


def gather_buckets(
    weights: WeightPath, *, quantize: bool, sent: Sent | None
) -> Iterator[list[Named]]:
    """Yield a pipeline stage's buckets. Collective over its tensor- and expert-parallel ranks."""
    bucket, size = [], 0
    for shard in weights.shards(quantize=quantize):
        bucket.append(shard)
        is_split = shard.rule.tp_dim is not None
        copies = weights.layout.group(shard.rule).size() if is_split else len(shard.names)
        size += shard.local.nbytes * copies
        if size >= weights.bucket_bytes:
            gathered, bucket, size = gather(bucket, weights, sent), [], 0
            yield gathered
            del gathered  # before the next is made: this is what bounds the memory
    if bucket:
        yield gather(bucket, weights, sent)


def gather(bucket: list[Shard], weights: WeightPath, sent: Sent | None) -> list[Named]:
    """Return the full tensors of a bucket's shards, quantized where the shards could not be.

    sent: return changes instead, where they are few.
    """
    named, late, names = [], [], [name for shard in bucket for name in shard.names]
    if sent:
        with phase("compare", names):
            vocab_size = weights.config["vocab_size"]
            named, bucket = gather_changes(bucket, weights.layout, sent, vocab_size)
    with phase("gather", names):
        full = gather_full_tensors(bucket, weights.layout)
    for shard, tensors in zip(bucket, full):
        for name, tensor in zip(shard.names, tensors):
            if name in VOCABULARY:  # without the rows that pad it
                tensor = tensor[: weights.config["vocab_size"]]
            if shard.quantize_whole:
                late += quantize_named(name, tensor)
            else:
                named.append((name, tensor))
    if sent:
        with phase("compare", names):
            late = compare(late, sent)
    named += late
    # A bucket without any entry would be the last.
    return named or [(CHANGES, torch.empty(0, dtype=torch.uint8, device=_device()))]


def gather_full_tensors(bucket: list[Shard], layout: Layout) -> list[list[torch.Tensor]]:
    """Return each shard's full tensors, one for each of its names.

    One all_gather moves the bytes of all split tensors of the bucket, another those of its experts.
    """
    full = [[shard.local] for shard in bucket]
    for group in dict.fromkeys((layout.tp_group, layout.expert_group)):  # may be one group
        split = [
            i
            for i, shard in enumerate(bucket)
            if shard.rule.tp_dim is not None and layout.group(shard.rule) is group
        ]
        if not split or group.size() == 1:
            continue
        locals_ = [bucket[i].local for i in split]
        mine = torch.cat([local.contiguous().view(torch.uint8).flatten() for local in locals_])
        theirs = torch.empty(group.size(), mine.numel(), dtype=torch.uint8, device=mine.device)
        dist.all_gather(list(theirs), mine, group=group)
        offset = 0
        for i in split:
            shard, local, tp = bucket[i], bucket[i].local, layout.tp(bucket[i].rule)
            # As bytes: torch.cat has no float8 kernel everywhere, and the contract is about bytes.
            shape = (*local.shape[:-1], -1)
            parts = [row[offset : offset + local.nbytes].view(shape) for row in theirs]
            # tp parts make a tensor; of an expert there are as many tensors as names.
            tensors = [
                torch.cat(parts[at : at + tp], dim=shard.rule.tp_dim)
                for at in range(0, len(parts), tp)
            ]
            full[i] = [tensor.view(local.dtype) for tensor in tensors]
            offset += local.nbytes
    return full
