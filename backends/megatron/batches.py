"""Samples <-> micro-batches: the samples that a rank computes together, packed without padding.

Every rank holds the whole batch and makes the same plan (microbatch_plan.py), so ranks need not
agree on anything. A prompt of several samples is packed once, see collate.

A sample is a data.sample.Sample; a trainer is a train_step.Trainer.

Shape letters: T packed tokens of a micro-batch, N its samples, L response tokens of a sample, R
those of all samples of a batch.
"""

import json
import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist

from backends.megatron.balancing import counts_tokens
from backends.megatron.layers import PackedRotary, PackedSequences, length_class, zigzag
from backends.megatron.microbatch_plan import microbatch_plan, padded_length
from common.distributed import broadcast_bytes
from losses import LossSettings, Sequences

SAVE_AT_LEAST = 0.1  # of the tokens of a prompt's samples: else they stay whole


@dataclass
class MicroBatch:
    """Packed sequences of one forward pass on one rank.

    Position t predicts token t + 1. So every per-token tensor describes that next token.
    """

    tokens_T: torch.Tensor
    """int64: prompt and response of each sample, and filler"""
    labels_T: torch.Tensor
    """int64: tokens, shifted left within each sequence"""
    response_index_T: torch.Tensor
    """int64: where the next token stands among the R response tokens of the batch; else -1"""
    sample_T: torch.Tensor
    """int64: the sample's place in the micro-batch; filler counts as one more sample, the last"""
    mask_T: torch.Tensor
    """float32: 1 where the next token is the policy's own and counts"""
    counts_N: torch.Tensor
    """float32: tokens of each sample that count, on all context-parallel ranks"""
    packed: PackedSequences
    """Bounds of the sequences; of whole ones under context parallelism"""
    experts_TLK: torch.Tensor | None = None
    """int16, on the CPU: the engine's experts in this stage's layers; -1: it reported none"""
    cp_group: dist.ProcessGroup | None = None
    """Ranks that hold other tokens of the same sequences; None: there are none"""
    per_token: dict[str, torch.Tensor] = field(default_factory=dict)
    """float32 [T] of each per-token field of Sample, by its name; see Batch.read_samples"""

    @property
    def is_filler_T(self) -> torch.Tensor:
        """Return which tokens are of no sample."""
        return self.sample_T == len(self.counts_N) - 1

    @property
    def sequences(self) -> Sequences:
        """Return which token belongs to which sample, as losses.py takes it."""
        return Sequences(self.sample_T, self.mask_T, self.counts_N, self.cp_group)


@dataclass
class Batch:
    """The samples of one optimizer step: the whole of them, and this rank's micro-batches."""

    samples: list
    """Each a data.sample.Sample, the same on every rank."""
    plan: list[list[list[int]]]
    """plan[data-parallel rank][micro-batch] = indices of samples"""
    microbatches: list[MicroBatch]
    packed_masks: list[list[int]] = field(init=False)
    """The loss mask of each sample when it was packed"""

    def __post_init__(self):
        self.packed_masks = [list(sample.loss_mask) for sample in self.samples]

    @property
    def has_tokens(self) -> bool:
        """Tell whether a token of any sample counts."""
        return any(map(any, self.packed_masks))

    def read_samples(self) -> None:
        """Fill per_token of the micro-batches with what the samples hold now.

        A field that a sample does not have, and every token outside of a response, is 0. Raises
        ValueError if a loss mask has changed since pack(): the micro-batches hold the old one.
        """
        if self.packed_masks != [list(sample.loss_mask) for sample in self.samples]:
            raise ValueError("a loss mask has changed since pack(): pack the samples again")
        device = self.microbatches[0].response_index_T.device
        for name in self.samples[0].per_token_names() if self.samples else ():
            rows = [_values(sample, name) for sample in self.samples]
            values_R = torch.from_numpy(np.concatenate(rows)).to(device)
            for batch in self.microbatches:
                index_T = batch.response_index_T
                is_response_T = index_T >= 0
                values_T = torch.zeros(index_T.shape, device=device)
                values_T[is_response_T] = values_R[index_T[is_response_T]]
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

    Every rank passes the same samples in the same order.
    """
    parts = equal_parts(samples, trainer.settings.minibatches)
    return [pack_batch(trainer, part) for part in parts]


def equal_parts(samples: list, n: int) -> list[list]:
    """Split samples, in order, into n parts of about equal size; into fewer if there are fewer."""
    parts = [samples[len(samples) * i // n : len(samples) * (i + 1) // n] for i in range(n)]
    return [part for part in parts if part]


def pack_batch(trainer, samples: list) -> Batch:
    """Plan the micro-batches of these samples and build this rank's.

    Raises ValueError, naming index and group, if a sample is longer than a micro-batch may be.
    """
    tp, cp = trainer.settings.tp, trainer.settings.cp
    device = next(trainer.gpt.parameters()).device
    # Transformer Engine's FP8 products take a multiple of 16 tokens. oneDNN makes a BF16 kernel for
    # each number of tokens; so there are fewer, and each is simpler and smaller.
    if trainer.gpt.config.fp8 or device.type == "cpu":
        tp *= 16
    # On a GPU, with Transformer Engine or without, masks would take the place of faster kernels.
    rotary = getattr(trainer.gpt, "rotary_pos_emb", None)  # a fork's model may have none
    by_position = device.type == "cpu" and cp == 1 and isinstance(rotary, PackedRotary)
    # Where routers count tokens, or look the engine's experts up, every sample has all of its own.
    share_prompts = by_position and not (trainer.replay or counts_tokens(trainer.gpt.config))
    plan = microbatch_plan(trainer, samples, share_prompts=share_prompts)
    starts = np.cumsum([0, *response_lengths(samples)]).tolist()
    split = dict(tp=tp, cp=cp, cp_rank=trainer.cp_group.rank(), device=device)
    split |= dict(replay=trainer.replay, by_position=by_position, share_prompts=share_prompts)
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


@dataclass
class _Piece:
    """A packed sequence: tokens of a sample, or filler."""

    tokens: np.ndarray
    sample: int  # its place in the micro-batch
    responses: int  # how many tokens at the end are its response
    prompt: "_Piece | None" = None  # what it stands behind


def _pieces(samples: list, *, share_prompts: bool) -> tuple[list[_Piece], list[_Piece]]:
    """Return the packed sequences of samples: those that begin a sample, and those behind them.

    A prompt of several samples is one of the first, without its last token. That token predicts
    every sample's first response token, so each sample has it once more. Where responses are so
    long that this saves little, samples stay whole: attention then needs no mask.
    """
    prompts = [tuple(sample.prompt_ids) for sample in samples]
    times, tokens_of = Counter(prompts), Counter()
    for sample, prompt in zip(samples, prompts):
        tokens_of[prompt] += len(prompt) + len(sample.response_ids)
    shared, first, behind = {}, [], []
    for i, (sample, prompt) in enumerate(zip(samples, prompts)):
        n = len(sample.response_ids)
        tokens = np.concatenate([sample.prompt_ids, sample.response_ids]).astype(np.int64)
        saved = (times[prompt] - 1) * (len(prompt) - 1)
        if not share_prompts or saved <= SAVE_AT_LEAST * tokens_of[prompt]:
            first.append(_Piece(tokens, i, n))
            continue
        if prompt not in shared:
            shared[prompt] = _Piece(tokens[: len(prompt) - 1], i, 0)
            first.append(shared[prompt])
        behind.append(_Piece(tokens[len(prompt) - 1 :], i, n, shared[prompt]))
    if behind:  # sequences of about one length side by side, as PackedAttention wants them
        first.sort(key=lambda piece: -len(piece.tokens))
        behind.sort(key=lambda piece: (-length_class(len(piece.prompt.tokens)), -len(piece.tokens)))
    return first, behind


def collate(
    samples: list,
    starts: list[int],
    *,
    tp: int = 1,
    cp: int = 1,
    cp_rank: int = 0,
    device: torch.device,
    replay=None,
    by_position: bool = False,
    share_prompts: bool = False,
) -> MicroBatch:
    """Concatenate prompt and response of each sample.

    Example, prompt [5, 6] and response [7, 8], the first response of the batch:

        tokens 5 6 7 8    labels 6 7 8 8    mask 0 1 1 0    response_index -1 0 1 -1

    Two samples that share this prompt, with responses [7, 8] and [9]:

        tokens 5 | 6 7 8 | 6 9    labels 5 | 7 8 8 | 9 9    position 0 | 1 2 3 | 1 2

    Under context parallelism the tensors hold this rank's tokens of every sequence.

    starts: where each sample's response begins among the R response tokens of the batch.
    replay: a RoutingReplay, if the engine's experts are to be at hand. by_position: tell the model
    where each token stands. share_prompts: needs it, and neither replay nor cp.
    """
    first, behind = _pieces(samples, share_prompts=share_prompts)
    lengths = [padded_length(len(piece.tokens), cp) for piece in first + behind]
    multiple_of = tp if cp == 1 else cp * math.lcm(2, tp)
    # A masked filler sequence brings T above 0, and to what can be split over ranks.
    if filler := -sum(lengths) % multiple_of if sum(lengths) else multiple_of:
        lengths.insert(len(first), filler)
        first.append(_Piece(np.zeros(0, np.int64), len(samples), 0))
    T, ends = sum(lengths), np.cumsum(lengths)
    tokens, labels = np.zeros(T, np.int64), np.zeros(T, np.int64)
    response_index, owner = np.full(T, -1), np.full(T, len(samples))
    mask, position = np.zeros(T, np.float32), np.zeros(T, np.int64)
    for piece, length, last in zip(first + behind, lengths, ends):
        begin, n = last - length, piece.responses
        end = begin + len(piece.tokens)
        tokens[begin:end] = piece.tokens
        labels[begin:end] = np.append(piece.tokens[1:], piece.tokens[-1:])
        owner[begin:end] = piece.sample
        before = len(piece.prompt.tokens) if piece.prompt else 0
        position[begin:last] = np.arange(before, before + length)
        if n:  # one to the left: the positions that predict it
            response = slice(end - n - 1, end - 1)
            at = starts[piece.sample]
            response_index[response] = np.arange(at, at + n)
            mask[response] = samples[piece.sample].loss_mask
    counts = [*(sum(sample.loss_mask) for sample in samples), 0]  # filler is the last sample
    bounds = torch.tensor([0, *ends], dtype=torch.int32, device=device)
    held = zigzag(lengths, cp, cp_rank)

    def held_tokens(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array)[held].to(device)

    # cuDNN keeps a plan for each maximum that Transformer Engine tells it: let there be few.
    longest = -(-int(position.max() + 1) // 128) * 128
    maximum = dict(max_seqlen_q=longest, max_seqlen_kv=longest)
    packed = PackedSequences("thd", bounds, bounds, bounds, bounds, **maximum)
    if by_position:
        # Megatron's rotary embedding goes by these bounds: a row of angles for each token.
        packed.cu_seqlens_q_padded = packed.cu_seqlens_kv_padded = bounds[[0, -1]]
        packed.position_T = held_tokens(position)
        place = {id(piece): k for k, piece in enumerate(first)}
        packed.prompt_of = [place[id(piece.prompt)] for piece in behind]
    experts_TLK = replay and torch.from_numpy(replay.experts_of(samples, lengths))[held]
    return MicroBatch(
        tokens_T=held_tokens(tokens),
        labels_T=held_tokens(labels),
        response_index_T=held_tokens(response_index),
        sample_T=held_tokens(owner),
        mask_T=held_tokens(mask),
        counts_N=torch.tensor(counts, dtype=torch.float32, device=device),
        packed=packed,
        experts_TLK=experts_TLK,
    )


# --- results ------------------------------------------------------------------------------------


def field_of_old_logprobs(samples: list, settings: LossSettings) -> str | None:
    """Return which field of the samples has the log-probs that ratios start from.

    None where train_step.add_logprobs has set none: then they are the policy's own.

    Raises ValueError where only some samples have them, or where one lacks the ref_logprobs of a
    KL: they would count as 0.
    """
    old = "rollout_logprobs" if settings.old_logprobs == "rollout" else None
    if not old and any(len(sample.old_logprobs) for sample in samples):
        old = "old_logprobs"
    names = [old] if old else []
    names += ["ref_logprobs"] if settings.kl_coef > 0 else []
    for name in names:
        for sample in samples:
            if len(getattr(sample, name)) != len(sample.response_ids):
                found = f"sample {sample.index} of group {sample.group} has no {name}"
                raise ValueError(f"{found} for its tokens: call add_logprobs() on the batch first")
    return old


def give_to_samples(trainer, batch: Batch, values: list[torch.Tensor], name: str) -> None:
    """Set a field of every sample to its tokens' values, float32 [L], on every rank. Collective.

    values: float32 [T] of each micro-batch, on the last pipeline stage; it alone has them.
    """
    # A rank knows the values of its own tokens. Each fills their places in a vector for the whole
    # batch; the sum of all ranks' vectors has every value.
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


def step_means(totals: list[dict[str, float]], settings: LossSettings) -> dict[str, float]:
    """Return the means of a step from the sums of its mini-batches, and how many tokens counted.

    totals: as global_sums returns them, with loss, units and tokens; loss is divided by units, all
    else by tokens. With --old-logprobs rollout the mismatch is that of the first mini-batch: it is
    measured by the policy, which later ones have moved.
    """
    sums = {name: sum(total[name] for total in totals) for name in totals[0]}
    loss, units, tokens = (sums.pop(name) for name in ("loss", "units", "tokens"))
    means = {"tokens": int(tokens), "loss": loss / units}
    means |= {name: value / tokens for name, value in sums.items()}
    measured = totals[:1] if settings.old_logprobs == "rollout" else totals
    for name in ("mismatch_abs", "mismatch_k3"):
        of_tokens = sum(total["tokens"] for total in measured)
        means[name] = sum(total[name] for total in measured) / of_tokens
    return means | {"mismatch_max": max(total["mismatch_max"] for total in measured)}
