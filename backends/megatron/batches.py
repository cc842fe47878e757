"""Samples -> micro-batches: which samples a rank computes together, packed without padding.

And back: values of packed tokens to the samples they belong to. Every rank holds the whole batch
and makes the same plan, so ranks need not agree on anything.

Shape letters: T packed tokens of a micro-batch, N its samples, R response tokens of all samples of
a batch.
"""

import json
import math
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams

from backends.megatron.layers import zigzag
from common.distributed import broadcast_bytes
from losses import Sequences


@dataclass
class MicroBatch:
    """Packed sequences of one forward pass on one rank.

    Position t predicts token t + 1. So every per-token tensor describes that next token, and mask
    is 1 where the next token is the policy's own.
    """

    tokens_T: torch.Tensor
    """int64"""
    labels_T: torch.Tensor
    """int64: tokens, shifted left within each sequence"""
    response_index_T: torch.Tensor
    """int64: where the next token stands among the R response tokens of the batch; else -1"""
    sample_T: torch.Tensor
    """int64: the sample's place in the micro-batch; filler counts as one more sample, the last"""
    mask_T: torch.Tensor
    """float32"""
    counts_N: torch.Tensor
    """float32: tokens of each sample that count, on all context-parallel ranks"""
    packed: PackedSeqParams
    cp_group: dist.ProcessGroup | None = None
    per_token: dict[str, torch.Tensor] = field(default_factory=dict)
    """float32 [T] of each per-token field of Sample, by its name; see Batch.read_samples"""

    @property
    def sequences(self) -> Sequences:
        """What losses.py needs to know of which token belongs to which sample."""
        return Sequences(self.sample_T, self.mask_T, self.counts_N, self.cp_group)


@dataclass
class Batch:
    """The samples of one optimizer step: the whole of them, and this rank's micro-batches."""

    samples: list
    """Each a data.sample.Sample, the same on every rank."""
    plan: list[list[list[int]]]
    """plan[data-parallel rank][micro-batch] = indices of samples"""
    microbatches: list[MicroBatch]

    @property
    def has_tokens(self) -> bool:
        """Whether a token of any sample counts."""
        return any(any(sample.loss_mask) for sample in self.samples)

    def read_samples(self) -> None:
        """Fill per_token of the micro-batches with what the samples hold now.

        A field that a sample does not have, and every token outside of a response, is 0.
        """
        for name in self.samples[0].per_token_names() if self.samples else ():
            rows = [_values(sample, name) for sample in self.samples]
            values_R = torch.from_numpy(np.concatenate(rows))
            for batch in self.microbatches:
                index_T = batch.response_index_T
                is_response_T = index_T >= 0
                values_T = torch.zeros(index_T.shape, device=index_T.device)
                values_T[is_response_T] = values_R.to(index_T.device)[index_T[is_response_T]]
                batch.per_token[name] = values_T


def _values(sample, name: str) -> np.ndarray:
    """Return a per-token field of a sample, float32 [L]; zeros if it is empty."""
    values, length = getattr(sample, name), len(sample.response_ids)
    if len(values) not in (0, length):
        found = f"{name} has {len(values)} values for {length} response tokens"
        raise ValueError(f"sample {sample.index} of group {sample.group}: {found}")
    return np.asarray(values, np.float32) if len(values) else np.zeros(length, np.float32)


# --- packing ------------------------------------------------------------------------------------


def pack(trainer, samples: list) -> list[Batch]:
    """Pack the samples of a step: a Batch for each of its --minibatches optimizer steps.

    Every rank passes the same samples in the same order. trainer: train_step.Trainer.
    """
    parts = equal_parts(samples, trainer.settings.minibatches)
    return [pack_batch(trainer, part) for part in parts]


def equal_parts(samples: list, n: int) -> list[list]:
    """Return n parts, in order; with fewer samples than n, one for each sample."""
    parts = [samples[len(samples) * i // n : len(samples) * (i + 1) // n] for i in range(n)]
    return [part for part in parts if part]


def pack_batch(trainer, samples: list) -> Batch:
    """Plan the micro-batches of these samples and build this rank's. trainer: train_step.Trainer.

    Raises ValueError, naming index and group, if a sample is longer than a micro-batch may be.
    """
    tp, cp = trainer.settings.tp, trainer.settings.cp
    plan = microbatch_plan(trainer, samples)
    starts = np.cumsum([0, *response_lengths(samples)]).tolist()
    device = next(trainer.gpt.parameters()).device
    split = dict(tp=tp, cp=cp, cp_rank=trainer.cp_group.rank(), device=device)
    microbatches = []
    for indices in plan[trainer.dp_group.rank()]:
        chosen, begins = [samples[i] for i in indices], [starts[i] for i in indices]
        batch = collate(chosen, begins, **split)
        batch.cp_group = trainer.cp_group if cp > 1 else None
        microbatches.append(batch)
    return Batch(samples, plan, microbatches)


def response_lengths(samples: list) -> list[int]:
    """Return the number of response tokens of each sample."""
    return [len(sample.response_ids) for sample in samples]


def microbatch_plan(trainer, samples: list) -> list[list[list[int]]]:
    """Return plan[data-parallel rank][micro-batch] = indices of samples."""
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


def plan_microbatches(
    lengths: list[int], *, microbatch_tokens: int, dp: int
) -> list[list[list[int]]]:
    """Return which samples form which micro-batch: plan[rank][micro-batch] = indices into lengths.

    Every rank gets the same number of micro-batches, as collectives inside the model must pair up.
    They are as few as the token budget allows, and of about equal size: the longest sample first,
    each into the bin that holds least. A bin may be empty if there are fewer samples than bins.
    Raises ValueError if a sample is longer than the budget.
    """
    if (longest := max(lengths, default=0)) > microbatch_tokens:
        found = f"a sample has {longest} tokens, a micro-batch at most {microbatch_tokens}"
        raise ValueError(f"{found}, --microbatch-tokens times --cp: raise --microbatch-tokens")
    longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    fewest = dp * max(1, -(-sum(lengths) // (dp * microbatch_tokens)))
    for bins in range(fewest, fewest + len(lengths) + dp, dp):  # in the end each has its own
        loads, members = [0] * bins, [[] for _ in range(bins)]
        for i in longest_first:
            lightest = loads.index(min(loads))
            loads[lightest] += lengths[i]
            members[lightest].append(i)
        if max(loads) <= microbatch_tokens:
            break
    # Samples of about one length stand together: micro-batches are dealt out by their load.
    by_load = sorted(range(bins), key=lambda b: -loads[b])
    return [[members[b] for b in by_load[rank::dp]] for rank in range(dp)]


def padded_length(length: int, cp: int) -> int:
    """Return the length of a sequence in a micro-batch: with cp > 1 a multiple of 2 cp (zigzag)."""
    return length if cp == 1 else -(-length // (2 * cp)) * 2 * cp


def collate(
    samples: list,
    starts: list[int],
    *,
    tp: int = 1,
    cp: int = 1,
    cp_rank: int = 0,
    device: torch.device,
) -> MicroBatch:
    """Concatenate prompt and response of each sample.

    Example, prompt [5, 6] and response [7, 8], the first response of the batch:

        tokens 5 6 7 8    labels 6 7 8 8    mask 0 1 1 0    response_index -1 0 1 -1

    A masked filler sequence brings T to a multiple that sequence parallelism can split, and above
    0. starts: where each sample's response begins among the R response tokens of the batch. Under
    context parallelism the tensors hold this rank's tokens of every sequence, and packed holds the
    bounds of the whole sequences.
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
    tokens, labels = np.zeros(T, np.int64), np.zeros(T, np.int64)
    response_index, owner = np.full(T, -1), np.full(T, len(samples))
    mask = np.zeros(T, np.float32)
    for i, (sample, sequence) in enumerate(zip(samples, sequences)):
        begin = ends[i] - lengths[i]
        end = begin + len(sequence)
        tokens[begin:end] = sequence
        labels[begin:end] = np.append(sequence[1:], sequence[-1])
        owner[begin:end] = i
        n = len(sample.response_ids)
        response = slice(end - n - 1, end - 1)  # the positions that predict it
        response_index[response] = np.arange(starts[i], starts[i] + n)
        mask[response] = sample.loss_mask
    bounds = torch.tensor([0, *ends], dtype=torch.int32, device=device)
    longest = max(lengths)
    counts = [*(sum(sample.loss_mask) for sample in samples), 0]
    mine = zigzag(lengths, cp, cp_rank)

    def here(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array)[mine].to(device)

    return MicroBatch(
        tokens_T=here(tokens),
        labels_T=here(labels),
        response_index_T=here(response_index),
        sample_T=here(owner),
        mask_T=here(mask),
        counts_N=torch.tensor(counts, dtype=torch.float32, device=device),
        packed=PackedSeqParams(
            "thd", bounds, bounds, bounds, bounds, max_seqlen_q=longest, max_seqlen_kv=longest
        ),
    )


# --- and back -----------------------------------------------------------------------------------


def has_old_logprobs(samples: list, *, with_reference: bool) -> bool:
    """Tell whether train_step.add_logprobs has set old_logprobs, on all samples or on none.

    Raises ValueError where some lack them, or the ref_logprobs of a KL: they would count as 0.
    """
    has_old = any(len(sample.old_logprobs) for sample in samples)
    for name in ["old_logprobs"] * has_old + ["ref_logprobs"] * with_reference:
        for sample in samples:
            if len(getattr(sample, name)) != len(sample.response_ids):
                found = f"sample {sample.index} of group {sample.group} has no {name}"
                raise ValueError(f"{found} for its tokens: call add_logprobs() on the batch first")
    return has_old


def give_to_samples(trainer, batch: Batch, values: list[torch.Tensor], name: str) -> None:
    """Set a field of every sample to its tokens' values, float32 [L], on every rank. Collective.

    values: float32 [T] of each micro-batch, on the last pipeline stage; it alone has them. A rank
    knows the values of its own tokens only. So all fill their places of one vector for the batch,
    which is then summed. trainer: train_step.Trainer.
    """
    lengths = response_lengths(batch.samples)
    device = batch.microbatches[0].tokens_T.device
    values_R = torch.zeros(sum(lengths), device=device)
    for microbatch, values_T in zip(batch.microbatches, values):
        is_response_T = microbatch.response_index_T >= 0
        values_R[microbatch.response_index_T[is_response_T]] = values_T[is_response_T]
    dist.all_reduce(values_R, group=trainer.dp_cp_group)
    stages = trainer.layout.pp_group
    dist.broadcast(values_R, group=stages, group_src=stages.size() - 1)
    for sample, values_L in zip(batch.samples, values_R.cpu().split(lengths)):
        setattr(sample, name, values_L.numpy())


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
