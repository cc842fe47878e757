"""Samples <-> micro-batches: which samples a rank computes together, packed without padding.

Every rank holds the whole batch and makes the same plan, so ranks need not agree on anything.

A sample is a data.sample.Sample; a trainer is a train_step.Trainer.

Shape letters: T packed tokens of a micro-batch, N its samples, L response tokens of a sample, R
those of the whole batch.
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
from losses import Sequences

# --- which samples form a micro-batch -----------------------------------------------------------


def equal_parts(samples: list, n: int) -> list[list]:
    """Split samples, in order, into n parts of about equal size; into fewer if there are fewer."""
    parts = [samples[len(samples) * i // n : len(samples) * (i + 1) // n] for i in range(n)]
    return [part for part in parts if part]


def minibatches(trainer, samples: list) -> list[list]:
    """Split samples into equal parts, one for each optimizer step.

    A part in which no token counts is left out.
    """
    parts = equal_parts(samples, trainer.settings.minibatches)
    return [part for part in parts if any(any(sample.loss_mask) for sample in part)]


def plan_microbatches(
    lengths: list[int], *, microbatch_tokens: int, dp: int
) -> list[list[list[int]]]:
    """Plan the micro-batches of each data-parallel rank: plan[rank][micro-batch] = indices.

    Every rank gets the same number of micro-batches, because collectives inside the model must pair
    up. There are as few as the token budget allows. A micro-batch may be exactly full. It may be
    empty if there are fewer samples than micro-batches.

    lengths: tokens of each sample. Raises ValueError if one is above the budget.
    """
    if (longest := max(lengths, default=0)) > microbatch_tokens:
        raise ValueError(
            f"a sample has {longest} tokens, and a micro-batch holds at most {microbatch_tokens},"
            " --microbatch-tokens times --cp: raise --microbatch-tokens"
        )
    fewest = dp * max(1, -(-sum(lengths) // (dp * microbatch_tokens)))
    # This ends: with len(lengths) bins more, each sample has a bin of its own.
    for n_bins in range(fewest, fewest + len(lengths) + dp, dp):
        bins, loads = _fill_bins(lengths, n_bins)
        if max(loads) <= microbatch_tokens:
            break
    # Ranks take bins in turn, the fullest first, so that they compute together for about as long.
    by_load = sorted(range(n_bins), key=lambda i: -loads[i])
    return [[bins[i] for i in by_load[rank::dp]] for rank in range(dp)]


def _fill_bins(lengths: list[int], n_bins: int) -> tuple[list[list[int]], list[int]]:
    """Return the samples of each bin, by index, and its tokens.

    The longest sample goes first, each into the bin that holds least. So bins are about equally
    full, and in a bin samples of about one length follow each other.
    """
    bins, loads = [[] for _ in range(n_bins)], [0] * n_bins
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        lightest = loads.index(min(loads))
        bins[lightest].append(i)
        loads[lightest] += lengths[i]
    return bins, loads


def padded_length(length: int, cp: int) -> int:
    """Return the length of a sequence in a micro-batch; with cp > 1 a multiple of 2 cp (zigzag)."""
    return length if cp == 1 else -(-length // (2 * cp)) * 2 * cp


def microbatch_plan(trainer, samples: list) -> list[list[list[int]]]:
    """Plan the micro-batches of these samples, see plan_microbatches.

    Raises ValueError if a sample is longer than a micro-batch may be, naming its index and group.
    """
    cp = trainer.settings.cp
    budget, dp = trainer.settings.microbatch_tokens * cp, trainer.dp_group.size()
    lengths = [len(sample.prompt_ids) + len(sample.response_ids) for sample in samples]
    lengths = [padded_length(length, cp) for length in lengths]
    try:
        return plan_microbatches(lengths, microbatch_tokens=budget, dp=dp)
    except ValueError as error:
        sample = samples[lengths.index(max(lengths))]
        raise ValueError(f"sample {sample.index} of group {sample.group}: {error}") from None


# --- packing ------------------------------------------------------------------------------------


@dataclass
class MicroBatch:
    """Packed sequences.

    Position t predicts token t + 1, so every per-token field describes that next token.
    """

    tokens_T: torch.Tensor
    """int64: prompt and response of each sample, and filler."""
    labels_T: torch.Tensor
    """int64: tokens shifted left within each sequence."""
    response_index_T: torch.Tensor
    """int64: the token's place among the R response tokens of the batch, -1 for other tokens."""
    sample_T: torch.Tensor
    """int64: place of the token's sample in the micro-batch. Filler is one more sample, the last.
    """
    mask_T: torch.Tensor
    """float32: 1 where the next token is the policy's own and counts."""
    per_token: dict[str, torch.Tensor]
    """float32 [T] of each of Sample.TRAINING_FIELDS, 0 where samples do not have it yet.

    per_token["advantages"] is also advantages_T, and so on.
    """
    counts_N: torch.Tensor
    """float32: tokens of each sample that count, on all context-parallel ranks together."""
    packed: PackedSeqParams
    """Bounds of the sequences; of whole ones under context parallelism."""
    cp_group: dist.ProcessGroup | None = None
    """Ranks that hold other tokens of the same sequences. None: there are none."""

    def __getattr__(self, name: str) -> torch.Tensor:
        # Called for names that are not attributes: read advantages_T from per_token.
        per_token, field = self.__dict__.get("per_token", {}), name.removesuffix("_T")
        if field == name or field not in per_token:
            known = ", ".join(f"{field}_T" for field in per_token)
            raise AttributeError(
                f"a micro-batch has no {name}; of a sample's fields it has {known}: add others to"
                " Sample.TRAINING_FIELDS"
            )
        return per_token[field]

    @property
    def sequences(self) -> Sequences:
        return Sequences(self.sample_T, self.mask_T, self.counts_N, self.cp_group)


def collate(
    samples: list,
    starts: list[int],
    *,
    fields: tuple[str, ...],
    tp: int = 1,
    cp: int = 1,
    cp_rank: int = 0,
    device: torch.device,
) -> MicroBatch:
    """Concatenate prompt and response of each sample.

    Example: prompt [5, 6], response [7, 8] with log-probs [a, b]:

        tokens 5 6 7 8    labels 6 7 8 8    mask 0 1 1 0    rollout_logprobs 0 a b 0

    Under context parallelism the per-token fields hold this rank's tokens of every sequence.

    starts: where each sample's response begins among the R response tokens of the batch.
    fields: Sample.TRAINING_FIELDS.
    """
    sequences = [
        np.concatenate([sample.prompt_ids, sample.response_ids]).astype(np.int64)
        for sample in samples
    ]
    lengths = _packed_lengths(sequences, tp=tp, cp=cp)
    T, ends = sum(lengths), np.cumsum(lengths)

    tokens, labels = np.zeros(T, np.int64), np.zeros(T, np.int64)
    response_index, owner = np.full(T, -1, np.int64), np.full(T, len(samples), np.int64)
    places = []  # of each response: where it is predicted, one to the left of its tokens
    for i, sample in enumerate(samples):
        sequence, n_response = sequences[i], len(sample.response_ids)
        begin = ends[i] - lengths[i]
        end = begin + len(sequence)
        tokens[begin:end] = sequence
        labels[begin:end] = np.append(sequence[1:], sequence[-1])
        owner[begin:end] = i
        places.append(slice(end - n_response - 1, end - 1))
        response_index[places[i]] = np.arange(starts[i], starts[i] + n_response)

    held = zigzag(lengths, cp, cp_rank)

    def held_tokens(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array)[held].to(device)

    def packed_field(name: str) -> torch.Tensor:
        array = np.zeros(T, np.float32)
        for sample, place in zip(samples, places):
            if len(values := getattr(sample, name)):
                array[place] = values
        return held_tokens(array)

    counts = [*(sum(sample.loss_mask) for sample in samples), 0]  # filler is the last sample
    bounds = torch.tensor([0, *ends], dtype=torch.int32, device=device)
    return MicroBatch(
        tokens_T=held_tokens(tokens),
        labels_T=held_tokens(labels),
        response_index_T=held_tokens(response_index),
        sample_T=held_tokens(owner),
        mask_T=packed_field("loss_mask"),
        per_token={name: packed_field(name) for name in fields},
        counts_N=torch.tensor(counts, dtype=torch.float32, device=device),
        packed=_packed_seq_params(bounds, max(lengths)),
    )


def _packed_lengths(sequences: list[np.ndarray], *, tp: int, cp: int) -> list[int]:
    """Return the packed length of each sequence, and that of a masked filler sequence if needed.

    Filler brings T above 0 and to a multiple that context and sequence parallelism can split.
    """
    lengths = [padded_length(len(sequence), cp) for sequence in sequences]
    multiple_of = tp if cp == 1 else cp * math.lcm(2, tp)
    filler = -sum(lengths) % multiple_of if lengths else multiple_of
    return [*lengths, filler] if filler else lengths


def _packed_seq_params(bounds: torch.Tensor, longest: int) -> PackedSeqParams:
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        cu_seqlens_q_padded=bounds,
        cu_seqlens_kv_padded=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def local_microbatches(trainer, samples: list) -> list[MicroBatch]:
    """Pack this rank's share of a batch. Every rank passes the same samples in the same order."""
    plan, cp = microbatch_plan(trainer, samples), trainer.settings.cp
    starts = np.cumsum([0, *(len(sample.response_ids) for sample in samples)]).tolist()
    device = next(trainer.gpt.parameters()).device
    # Read from the samples' class: a field added there reaches the loss without an edit here.
    fields = samples[0].TRAINING_FIELDS if samples else ()
    batches = []
    for indices in plan[trainer.dp_group.rank()]:
        batch = collate(
            [samples[i] for i in indices],
            [starts[i] for i in indices],
            fields=fields,
            tp=trainer.settings.tp,
            cp=cp,
            cp_rank=trainer.cp_group.rank(),
            device=device,
        )
        batch.cp_group = trainer.cp_group if cp > 1 else None
        batches.append(batch)
    return batches


def has_old_logprobs(samples: list, *, with_reference: bool) -> bool:
    """Tell whether train_step.add_logprobs has set old_logprobs.

    Raises ValueError where only some samples have them, or where one lacks the ref_logprobs of a
    KL: they would count as 0.
    """
    has_old = any(len(sample.old_logprobs) for sample in samples)
    fields = ["old_logprobs"] if has_old else []
    fields += ["ref_logprobs"] if with_reference else []
    for field in fields:
        for sample in samples:
            if len(getattr(sample, field)) != len(sample.response_ids):
                found = f"sample {sample.index} of group {sample.group} has no {field}"
                raise ValueError(f"{found} for its tokens: pass the batch to add_logprobs() first")
    return has_old


# --- results ------------------------------------------------------------------------------------


def give_to_samples(
    trainer, samples: list, batches: list[MicroBatch], values: list[torch.Tensor], field: str
) -> None:
    """Set a field of every sample to its tokens' values, float32 [L], on every rank. Collective.

    batches: local_microbatches of these samples. values: float32 [T] for each of them; only the
    last pipeline stage has any.
    """
    lengths = [len(sample.response_ids) for sample in samples]
    # A rank knows the values of its own tokens. Each fills their places in a vector for the whole
    # batch; the sum of all ranks' vectors has every value.
    values_R = torch.zeros(sum(lengths), device=batches[0].tokens_T.device)
    for batch, values_T in zip(batches, values):
        is_response_T = batch.response_index_T >= 0
        values_R[batch.response_index_T[is_response_T]] = values_T[is_response_T]
    dist.all_reduce(values_R, group=trainer.dp_cp_group)
    stages = trainer.layout.pp_group
    dist.broadcast(values_R, group=stages, group_src=stages.size() - 1)
    for sample, values_L in zip(samples, values_R.cpu().split(lengths)):
        setattr(sample, field, values_L.numpy())


def global_sums(trainer, reports: list[dict]) -> dict[str, float]:
    """Sum the reports of all micro-batches and ranks, and find the largest mismatch. Collective.

    Only the last pipeline stage has reports; it sends the result to the others.
    """
    totals = {}
    if reports:
        names = list(reports[0]["sums"])
        rows = [[report["sums"][name].double() for name in names] for report in reports]
        sums = torch.stack([torch.stack(row) for row in rows]).sum(0)
        largest = torch.stack([report["max"] for report in reports]).max()
        dist.all_reduce(sums, group=trainer.dp_cp_group)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=trainer.dp_cp_group)
        totals = {**dict(zip(names, sums.tolist())), "mismatch_max": float(largest)}
    stages = trainer.layout.pp_group
    message = json.dumps(totals).encode()
    return json.loads(broadcast_bytes(message, stages, source=stages.size() - 1))
