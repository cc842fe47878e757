"""Megatron weights -> engine weights, every step.

What happens to one tensor on its way, for example linear_fc1 at tensor parallelism 2:

    this rank's shard [gate half; up half]        BF16, where the optimizer left it
      -> split into gate and up slices            hf_names.split_stacked
      -> quantize each slice where it lives       fp8_quant, if its cut falls on a multiple of 128; else it is quantized after the gather
      -> gather codes and scales                  one all_gather of bytes per bucket over the tensor-parallel group: half of what BF16 would move
      -> hand the bucket to the engine            buckets.load_bucket, in the engine's process: shared memory on a CPU, CUDA IPC on a GPU

Contract: whatever the parallel layout, the engine holds exactly quantize(full Hugging Face tensor),
byte for byte. verify_engine_weights proves it: it computes the expected bytes another way (gather BF16, then
quantize the whole tensor), sends them through the same loader, and has every write replaced by a
comparison with what the engine already holds.

An update is all or nothing. A failure in any phase (quantize, gather, send, load, end of update)
ends the run and names the phase and the tensors; the engine is paused from the first tensor to the
last, so it cannot generate with half of the new weights. Memory on top of the model is a few times
bucket_bytes, or a few times the largest tensor where that is larger: bench/weight_sync.py measures
it.

Unlike slime, no converted checkpoint is needed and no weights are loaded by the engine itself: it
starts empty, and its first weights are a hand-off.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from backends.huggingface.names import (
    Rule,
    hf_shapes,
    merged_linears,
    parameters_of,
    rule_of,
    split_stacked,
    unquantized_linears,
)
from backends.megatron.layout import Layout
from backends.sglang.buckets import Named, entries, pack, phase, unpack, failure_note
from common.distributed import broadcast_bytes
from common.errors import EngineDied
from fp8_quant import BLOCK, quantize_blockwise

# --- from Megatron to full Hugging Face tensors -------------------------------------------------


@dataclass(frozen=True)
class WeightPath:
    """A rank's end of the path that weights take: the trainer's, or in the asynchronous loop also a
    rollout rank's, where they only arrive.
    """

    trainer: Any
    """train_step.Trainer: its gpt has this rank's shards as parameters.

    None on a rank that does not train.
    """
    config: dict
    """config.json, checked."""
    fp8: frozenset[str]
    """Hugging Face names of the weights that the engine holds in FP8."""
    bucket_bytes: int
    broadcast_group: dist.ProcessGroup | None = None
    """Asynchronous loop: the group of all ranks, over which its rank 0 sends every bucket.

    None where each trainer has its engine at its side.
    """


@dataclass
class Shard:
    """This rank's part of one Hugging Face tensor; of an expert's tensor, its part of one of those
    that the expert-parallel ranks hold at this place.
    """

    names: list[str]
    """One name; of an expert's tensor, one for each expert-parallel rank."""
    local: torch.Tensor
    rule: Rule
    quantize_whole: bool = False
    """Quantize after the gather, because the cut does not fall on a block boundary."""


def fp8_weights(
    config: dict, *, rollout_dtype: str, engine_tp: int, engine_ep: int = 1
) -> frozenset[str]:
    """Hugging Face names of the weights that are handed over in FP8: under "fp8", every linear
    layer that the engine's config does not exempt.
    """
    if rollout_dtype != "fp8":
        return frozenset()
    kept = set(unquantized_linears(config, engine_tp=engine_tp, engine_ep=engine_ep))
    return frozenset(f"{module}.weight" for module in linear_modules(config) if module not in kept)


def linear_modules(config: dict) -> list[str]:
    """Full Hugging Face names of all linear modules in decoder layers, without routers."""
    layers = range(config["num_hidden_layers"])
    return [
        f"model.layers.{layer}.{name}"
        for layer in layers
        for names, *_ in merged_linears(config, layer).values()
        for name in names
    ]


@torch.no_grad()
def shards_in_model_order(weights: WeightPath, *, quantize: bool) -> Iterator[Shard]:
    """Every weight as shards of Hugging Face tensors, in the model's own order, which is the same
    on every rank.

    quantize: turn each weight that the engine holds in FP8 into two shards, `name` (float8_e4m3fn)
    and `name_scale_inv` (float32).
    """
    config, layout = weights.config, weights.trainer.layout
    for megatron_name, parameter in parameters_of(weights.trainer.gpt):
        if megatron_name == "output_layer.weight" and config["tie_word_embeddings"]:
            continue  # the last pipeline stage's copy of the first stage's embedding
        rule = rule_of(megatron_name, first_layer=layout.first_layer)
        tp = layout.tp(rule)
        parts = split_stacked(
            parameter.detach(),
            len(rule.hf),
            head_dim=config["head_dim"],
            groups=config["num_key_value_heads"] // tp,
        )
        for names, part in zip(map(list, zip(*layout.names(rule, config))), parts):
            if not quantize or names[0] not in weights.fp8:
                yield Shard(names, part, rule)
            elif tp == 1 or part.shape[rule.tp_dim] % BLOCK == 0:
                with phase("quantize", names):
                    codes, scale_inv = quantize_blockwise(part)
                yield Shard(names, codes, rule)
                yield Shard([f"{name}_scale_inv" for name in names], scale_inv, rule)
            else:
                yield Shard(names, part, rule, quantize_whole=True)


def buckets_of(weights: WeightPath, *, quantize: bool) -> Iterator[list[Named]]:
    """Full tensors, a list of about bucket_bytes at a time, on trainers and rollout ranks alike.

    Collective: every rank must iterate to the end.
    """
    gathered = None if weights.trainer is None else trainer_buckets(weights, quantize=quantize)
    return (
        gathered
        if weights.broadcast_group is None
        else broadcast_buckets(gathered, weights.broadcast_group)
    )


def trainer_buckets(weights: WeightPath, *, quantize: bool) -> Iterator[list[Named]]:
    """Full tensors of the whole model on every trainer: one pipeline stage after the other.

    A stage's tensor-parallel ranks all have the bucket. Each sends its own part of the bytes to the
    other stages, where the parts are gathered: tensor-parallel ranks share a machine and stages do
    not, so the slow links carry every byte once per machine.
    """
    layout = weights.trainer.layout
    for stage in range(layout.pp_group.size()):
        gathered = (
            gather_buckets(weights, quantize=quantize) if stage == layout.pp_group.rank() else None
        )
        yield from (
            gathered
            if layout.pp_group.size() == 1
            else broadcast_buckets(gathered, layout.pp_group, source=stage, parts=layout.tp_group)
        )


def broadcast_buckets(
    gathered: Iterator[list[Named]] | None,
    group: dist.ProcessGroup,
    *,
    source: int = 0,
    parts: dist.ProcessGroup | None = None,
) -> Iterator[list[Named]]:
    """One rank's buckets on all ranks of the group. gathered: None on ranks that have none.

    parts: ranks that are each the source, or each not, of such a group of their own, and have the
    same buckets: each sends or receives a part, and they gather what they have received.
    """
    n = parts.size() if parts else 1
    while True:
        bucket = [] if gathered is None else next(gathered, [])
        with phase("send", [name for name, _ in bucket] or ["what another rank sends"]):
            header, flat = pack(bucket, multiple_of=n) if group.rank() == source else (b"", None)
            header = broadcast_bytes(header, group, source=source)
            if header == b"[]":
                return
            if flat is None:
                nbytes = sum(nbytes for *_, nbytes in entries(header))
                flat = torch.empty(-(-nbytes // n) * n, dtype=torch.uint8, device=_device())
            rows = flat.view(n, -1)
            mine = rows[parts.rank() if parts else 0]
            dist.broadcast(mine, group=group, group_src=source)
            if n > 1 and group.rank() != source:
                dist.all_gather(list(rows), mine.clone(), group=parts)
        yield bucket or unpack(header, flat)
        del bucket, flat, rows, mine  # before the next are made


def _device() -> torch.device:
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def gather_buckets(weights: WeightPath, *, quantize: bool) -> Iterator[list[Named]]:
    """The buckets of this pipeline stage. Collective over its tensor- and expert-parallel ranks."""
    bucket, size = [], 0
    for shard in shards_in_model_order(weights, quantize=quantize):
        bucket.append(shard)
        size += shard.local.nbytes * (
            len(shard.names)
            if shard.rule.tp_dim is None
            else weights.trainer.layout.group(shard.rule).size()
        )
        if size >= weights.bucket_bytes:
            gathered, bucket, size = _gather(bucket, weights), [], 0
            yield gathered
            del gathered  # before the next is made: this is what bounds the memory
    if bucket:
        yield _gather(bucket, weights)


def _gather(bucket: list[Shard], weights: WeightPath) -> list[Named]:
    """One all_gather of the bytes of all split tensors in the bucket, and one of its experts'; then
    each tensor is put together from the ranks' parts.
    """
    with phase("gather", [name for shard in bucket for name in shard.names]):
        whole = _gather_full_tensors(bucket, weights.trainer.layout)
    named = []
    for shard, tensors in zip(bucket, whole):
        for name, tensor in zip(shard.names, tensors):
            if name in ("model.embed_tokens.weight", "lm_head.weight"):
                tensor = tensor[
                    : weights.config["vocab_size"]
                ]  # without the rows that pad the vocabulary to a multiple of tp
            named += quantize_named(name, tensor) if shard.quantize_whole else [(name, tensor)]
    return named


def _gather_full_tensors(bucket: list[Shard], layout: Layout) -> list[list[torch.Tensor]]:
    """For every shard its full tensors, one for each of its names."""
    whole = {id(shard): [shard.local] for shard in bucket}  # one tensor for each name
    for group in dict.fromkeys(
        (layout.tp_group, layout.expert_group)
    ):  # Megatron may have one group for both
        split = [
            shard
            for shard in bucket
            if shard.rule.tp_dim is not None
            and group.size() > 1
            and layout.group(shard.rule) is group
        ]
        if not split:
            continue
        mine = torch.cat([shard.local.contiguous().view(torch.uint8).flatten() for shard in split])
        theirs = torch.empty(group.size(), mine.numel(), dtype=torch.uint8, device=mine.device)
        dist.all_gather(list(theirs), mine, group=group)
        offset = 0
        for shard in split:
            # Concatenated as bytes: torch.cat has no float8 kernel everywhere, and bytes are what
            # the contract is about.
            shape, tp = (*shard.local.shape[:-1], -1), layout.tp(shard.rule)
            parts = [row[offset : offset + shard.local.nbytes].view(shape) for row in theirs]
            whole[id(shard)] = [
                torch.cat(parts[i : i + tp], dim=shard.rule.tp_dim).view(shard.local.dtype)
                for i in range(0, len(parts), tp)
            ]
            offset += shard.local.nbytes
    return [whole[id(shard)] for shard in bucket]


def quantize_named(name: str, tensor: torch.Tensor) -> list[Named]:
    """A full weight -> its FP8 pair under the names of a block-FP8 checkpoint."""
    with phase("quantize", [name]):
        codes, scale_inv = quantize_blockwise(tensor)
    return [(name, codes), (f"{name}_scale_inv", scale_inv)]


# --- into the engine ----------------------------------------------------------------------------


def describe(config: dict, fp8: frozenset[str]) -> str:
    """One line: which weights the engine holds in FP8, and which linear layers SGLang's block rule
    keeps from it.
    """
    if not fp8:
        return "hand-off: every weight as the trainer holds it"
    kept = sorted(
        {
            re.sub(r"model\.layers\.\d+\.|\.\d+", "", module)
            for module in linear_modules(config)
            if f"{module}.weight" not in fp8
        }
    )
    reason = (
        "; kept in BF16, because a merged layer's parts must have a multiple of 128 rows in"
        " SGLang: " + ", ".join(kept)
        if kept
        else ""
    )
    return f"hand-off: {len(fp8)} weights in block FP8{reason}"


def sync_weights(weights: WeightPath, engine, *, version: int, check: bool) -> int:
    """send_weights, and if check is set the read-back gate; returns the bytes handed over."""
    sent_bytes = send_weights(weights, engine, version=version)
    if check:
        verify_engine_weights(weights, engine)
    return sent_bytes


def send_weights(weights: WeightPath, engine, *, version: int) -> int:
    """Give the engine this version of the weights; returns the bytes handed over.

    Every rank calls it; engine is None on ranks without one.

    The engine is paused when the first bucket is there, and goes on when the last has been loaded.
    Whatever raises in between leaves it paused for good. A bucket is loaded while the next is on
    its way. The asynchronous loop does not wait for the last one either: new requests do, and raise
    what went wrong.
    """
    sent_bytes = 0
    try:
        for bucket in buckets_of(weights, quantize=True):
            if engine is not None:
                if not sent_bytes:
                    engine.begin_update()
                engine.load(bucket, version=version)
            sent_bytes += sum(tensor.nbytes for _, tensor in bucket)
            del bucket
        if engine is not None:
            engine.end_update(version)
            if weights.broadcast_group is None:
                engine.settle()
    except EngineDied as error:
        if (
            engine is not None
        ):  # what it was given last is what it died of, whatever this rank has done since
            error.add_note(failure_note(*engine.last_phase))
        raise
    return sent_bytes


@torch.no_grad()
def verify_engine_weights(weights: WeightPath, engine) -> int:
    """Prove that the engine holds quantize(full tensor) for every weight; returns the bytes
    compared. Collective, like send_weights.

    Raises RuntimeError naming the first tensors that differ, that the engine has no place for (0 of
    0 bytes), that are missing or that come twice, or saying how many of the engine's bytes no
    tensor was compared with.
    """
    compared_bytes, uncompared_bytes, names = 0, 0, Counter()
    for bucket in buckets_of(weights, quantize=False):
        named = [
            pair
            for name, tensor in bucket
            for pair in (quantize_named(name, tensor) if name in weights.fp8 else [(name, tensor)])
        ]
        if engine is None:
            continue
        names.update(name for name, _ in named)
        # [engine tp ranks, tensors, (bytes compared, different, of parameters not compared so far)]
        report = engine.compare(named)
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
    if engine is not None:
        check_all_compared(names, weights, uncompared_bytes)
    return compared_bytes


def check_all_compared(names: Counter, weights: WeightPath, uncompared_bytes: int) -> None:
    """Raise RuntimeError unless every tensor was compared once, and every byte of a parameter."""
    gaps = {
        "never compared": sorted(set(hf_shapes(weights.config)) - set(names)),
        "compared more than once": sorted(name for name, times in names.items() if times > 1),
    }
    found = []
    for what, these in gaps.items():
        if these:
            found.append(f"{what}: {', '.join(these[:5])}, {len(these)} tensors in all")
    if uncompared_bytes:
        found.append(f"{uncompared_bytes} bytes of the engine's parameters were never compared")
    if found:
        found = "; ".join(found)
        raise RuntimeError(f"read-back failed: the hand-off does not cover the model. {found}")
