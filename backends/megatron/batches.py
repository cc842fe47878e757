"""Samples -> micro-batches: which samples a rank computes together, packed without padding, and
back: values of packed tokens to their samples.

Every rank holds the whole batch and makes the same plan, so nothing has to be agreed on. Shape
letters: T packed tokens of a micro-batch, N its samples, R response tokens of the whole batch.
"""

import json
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams

from backends.megatron.layers import zigzag
from common.distributed import broadcast_bytes
from data.sample import Sample
from losses import Sequences


def equal_parts(samples: list[Sample], n: int) -> list[list[Sample]]:
    """n parts, in order; with fewer samples than n, one for each sample."""
    parts = [samples[len(samples) * i // n : len(samples) * (i + 1) // n] for i in range(n)]
    return [part for part in parts if part]


def plan_microbatches(
    lengths: list[int], *, microbatch_tokens: int, dp: int
) -> list[list[list[int]]]:
    """Which samples form which micro-batch of which data-parallel rank: plan[rank][micro-batch] =
    indices into lengths.

    Every rank gets the same number of micro-batches (collectives inside the model must pair up), as
    few as the token budget allows, of about equal size: longest sample first, each into the bin
    that holds least; so samples of about one length stand together. A bin may be empty when there
    are fewer samples than bins, and exactly full. Raises ValueError if a sample is longer than the
    budget.
    """
    if (longest := max(lengths, default=0)) > microbatch_tokens:
        found = f"a sample has {longest} tokens, a micro-batch at most {microbatch_tokens}"
        raise ValueError(f"{found}, --microbatch-tokens times --cp: raise --microbatch-tokens")
    fewest = dp * max(1, -(-sum(lengths) // (dp * microbatch_tokens)))
    for bins in range(fewest, fewest + len(lengths) + dp, dp):  # at the end each sample has its own
        loads, members = [0] * bins, [[] for _ in range(bins)]
        for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
            lightest = loads.index(min(loads))
            loads[lightest] += lengths[i]
            members[lightest].append(i)
        if max(loads) <= microbatch_tokens:
            break
    by_load = sorted(range(bins), key=lambda b: -loads[b])
    return [[members[b] for b in by_load[rank::dp]] for rank in range(dp)]


def minibatches(trainer, samples: list[Sample]) -> list[list[Sample]]:
    """Split the samples into those of each optimizer step. trainer: train_step.Trainer.

    The parts are equal. Those in which no token counts are left out.
    """
    return [
        part
        for part in equal_parts(samples, trainer.settings.minibatches)
        if any(any(sample.loss_mask) for sample in part)
    ]


def has_old_logprobs(samples: list[Sample], *, with_reference: bool) -> bool:
    """Tell whether train_step.add_logprobs has set old_logprobs, on all samples or on none.

    Raises ValueError where some lack them, or the ref_logprobs of a KL: they would count as 0.
    """
    scored = any(len(sample.old_logprobs) for sample in samples)
    for field in ["old_logprobs"] * scored + ["ref_logprobs"] * with_reference:
        for sample in samples:
            if len(getattr(sample, field)) != len(sample.response_ids):
                found = f"sample {sample.index} of group {sample.group} has no {field}"
                raise ValueError(f"{found} for its tokens: the batch must come from score()")
    return scored


@dataclass
class MicroBatch:
    """Packed sequences.

    Position t predicts token t + 1, so every per-token field describes that next token, and mask is
    1 where it counts.
    """

    tokens_T: torch.Tensor  # int64
    labels_T: torch.Tensor  # int64, tokens shifted left within each sequence
    response_index_T: (
        torch.Tensor
    )  # int64, where the token stands among the R response tokens of the batch, -1 for others
    sample_T: (
        torch.Tensor
    )  # int64, place of the sample in the micro-batch; filler is one more sample, the last
    mask_T: torch.Tensor  # float32: 1 where the next token is the policy's own
    advantages_T: (
        torch.Tensor
    )  # float32, as those that follow; 0 where the samples do not have them yet
    rollout_logprobs_T: torch.Tensor
    old_logprobs_T: torch.Tensor
    ref_logprobs_T: torch.Tensor
    counts_N: (
        torch.Tensor
    )  # float32: tokens of each sample that count, on all context-parallel ranks
    packed: PackedSeqParams
    cp_group: dist.ProcessGroup | None = None

    @property
    def sequences(self) -> Sequences:
        return Sequences(self.sample_T, self.mask_T, self.counts_N, self.cp_group)


PER_TOKEN = {"mask": "loss_mask"} | {
    name: name for name in ("advantages", "rollout_logprobs", "old_logprobs", "ref_logprobs")
}


def padded_length(length: int, cp: int) -> int:
    """Length of a sequence in a micro-batch: under context parallelism a multiple of 2 cp, see
    zigzag.
    """
    return length if cp == 1 else -(-length // (2 * cp)) * 2 * cp


def collate(
    samples: list[Sample],
    starts: list[int],
    *,
    tp: int = 1,
    cp: int = 1,
    cp_rank: int = 0,
    device: torch.device,
) -> MicroBatch:
    """Concatenate prompt + response of each sample.

    A masked filler sequence brings T to a multiple that sequence parallelism can split, and above
    0.

    Example, prompt [5, 6], response [7, 8] with log-probs [a, b]:   tokens 5 6 7 8   labels 6 7 8 8   mask 0 1 1 0   rollout_logprobs 0 a b 0
    starts: where each sample's response begins among the R response tokens of the batch. Under context parallelism the fields hold this rank's tokens of
    every sequence, and packed the bounds of the whole sequences.
    """
    sequences = [
        np.concatenate([sample.prompt_ids, sample.response_ids]).astype(np.int64)
        for sample in samples
    ]
    lengths = [padded_length(len(sequence), cp) for sequence in sequences]
    multiple_of = tp if cp == 1 else cp * math.lcm(2, tp)
    filler = -sum(lengths) % multiple_of if lengths else multiple_of
    lengths += [filler] if filler else []
    T, ends = sum(lengths), np.cumsum(lengths)
    tokens, labels, place, owner = (
        np.zeros(T, np.int64),
        np.zeros(T, np.int64),
        np.full(T, -1),
        np.full(T, len(samples)),
    )
    per_token = {name: np.zeros(T, np.float32) for name in PER_TOKEN}
    for i, (sample, sequence, begin, start) in enumerate(
        zip(samples, sequences, ends - lengths, starts)
    ):
        end = begin + len(sequence)
        tokens[begin:end] = sequence
        labels[begin:end] = np.append(sequence[1:], sequence[-1])
        owner[begin:end] = i
        answer = slice(end - len(sample.response_ids) - 1, end - 1)
        place[answer] = np.arange(start, start + len(sample.response_ids))
        for name, field in PER_TOKEN.items():
            if len(getattr(sample, field)):
                per_token[name][answer] = getattr(sample, field)
    cu_seqlens = torch.tensor([0, *ends], dtype=torch.int32, device=device)
    packed = PackedSeqParams(
        "thd",
        cu_seqlens,
        cu_seqlens,
        cu_seqlens,
        cu_seqlens,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )
    mine = zigzag(lengths, cp, cp_rank)
    arrays = (tokens, labels, place, owner, *per_token.values())
    counts_N = torch.tensor(
        [*(sum(sample.loss_mask) for sample in samples), 0], dtype=torch.float32, device=device
    )
    return MicroBatch(
        *(torch.from_numpy(array)[mine].to(device) for array in arrays), counts_N, packed
    )


def microbatch_plan(trainer, samples: list[Sample]) -> list[list[list[int]]]:
    """Plan the micro-batches of these samples. trainer: train_step.Trainer.

    Raises ValueError, with its index and group, if a sample is longer than a micro-batch may be.
    """
    cp = trainer.settings.cp
    budget, dp = trainer.settings.microbatch_tokens * cp, trainer.dp_group.size()
    lengths = [
        padded_length(len(sample.prompt_ids) + len(sample.response_ids), cp) for sample in samples
    ]
    try:
        return plan_microbatches(lengths, microbatch_tokens=budget, dp=dp)
    except ValueError as error:
        sample = samples[lengths.index(max(lengths))]
        raise ValueError(f"sample {sample.index} of group {sample.group}: {error}") from None


def local_microbatches(trainer, samples: list[Sample]) -> list[MicroBatch]:
    """This rank's share of a batch; every rank passes the same samples in the same order. trainer:
    train_step.Trainer.
    """
    tp, cp, plan = trainer.settings.tp, trainer.settings.cp, microbatch_plan(trainer, samples)
    starts = np.cumsum([0, *(len(sample.response_ids) for sample in samples)]).tolist()
    split = dict(
        tp=tp, cp=cp, cp_rank=trainer.cp_group.rank(), device=next(trainer.gpt.parameters()).device
    )
    batches = [
        collate([samples[i] for i in bin], [starts[i] for i in bin], **split)
        for bin in plan[trainer.dp_group.rank()]
    ]
    for batch in batches:
        batch.cp_group = trainer.cp_group if cp > 1 else None
    return batches


def give_to_samples(
    trainer,
    samples: list[Sample],
    batches: list[MicroBatch],
    values: list[torch.Tensor],
    field: str,
) -> None:
    """Set a field of every sample to its tokens' values, float32 [L], on every rank. Collective.

    batches: local_microbatches of these samples; values: float32 [T] for each, on the last pipeline
    stage, which alone has them. A rank knows the values of its own tokens only: all fill their
    places of one vector for the batch, which is then summed.
    """
    lengths = [len(sample.response_ids) for sample in samples]
    values_R = torch.zeros(sum(lengths), device=batches[0].tokens_T.device)
    for batch, values_T in zip(batches, values):
        is_response_T = batch.response_index_T >= 0
        values_R[batch.response_index_T[is_response_T]] = values_T[is_response_T]
    dist.all_reduce(values_R, group=trainer.dp_cp_group)
    stages = trainer.layout.pp_group
    dist.broadcast(values_R, group=stages, group_src=stages.size() - 1)
    for sample, mine in zip(samples, values_R.cpu().split(lengths)):
        setattr(sample, field, mine.numpy())


def global_sums(trainer, reports: list[dict]) -> dict[str, float]:
    """Sum the reports of all micro-batches and ranks, and find the largest mismatch. Collective.

    Only the last pipeline stage has reports; it tells the others. trainer: train_step.Trainer.
    """
    totals = {}
    if reports:
        names = list(reports[0]["sums"])
        rows = [
            torch.stack([report["sums"][name].double() for name in names]) for report in reports
        ]
        sums = torch.stack(rows).sum(0)
        largest = torch.stack([report["max"] for report in reports]).max()
        dist.all_reduce(sums, group=trainer.dp_cp_group)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=trainer.dp_cp_group)
        totals = {**dict(zip(names, sums.tolist())), "mismatch_max": float(largest)}
    stages = trainer.layout.pp_group
    told = broadcast_bytes(json.dumps(totals).encode(), stages, source=stages.size() - 1)
    return json.loads(told)
