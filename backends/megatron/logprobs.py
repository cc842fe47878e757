"""Log-probs and entropy of logits whose vocabulary is split over tensor-parallel ranks.

Shape letters: T packed tokens of a micro-batch, t those of one chunk, V vocabulary on this rank.
"""

import math

import torch
import torch.distributed as dist

from losses import k3

# Stands for -inf where it is multiplied: 0 times -inf is NaN.
LOWEST = torch.finfo(torch.float32).min


class VocabParallelLogprobs(torch.autograd.Function):
    """The log-prob of each label and the entropy, where the vocabulary is split over ranks.

    Only `chunk` tokens at a time exist in fp32. Between forward and backward it keeps the logits in
    their own dtype and two numbers per token. With x = logits / temperature, Z = sum exp x over all
    ranks, p = exp(x) / Z:

        logprob = x_label - log Z                 d logprob / dx = onehot(label) - p
        entropy = log Z - sum p x                 d entropy / dx = -p (log p + entropy)

    A logit of -inf has p = 0 and p x = 0. As a label it has log-prob -inf; the loss is then not
    finite, and train_step refuses it.
    """

    @staticmethod
    def forward(ctx, logits_TV, labels_T, temperature, vocab_size, group, chunk):
        T, V = logits_TV.shape
        first = V * group.rank()
        # Columns that pad the vocabulary are not tokens. A rank may hold nothing else.
        real = min(V, max(0, vocab_size - first))
        logprobs_T = torch.empty(T, dtype=torch.float32, device=logits_TV.device)
        entropy_T, log_z_T = torch.empty_like(logprobs_T), torch.empty_like(logprobs_T)
        for at in range(0, T, chunk):
            rows = slice(at, at + chunk)
            # Not in place: for fp32 logits float() does not copy.
            x_tV = logits_TV[rows].float() / temperature
            x_tV[:, real:] = -math.inf
            max_t = x_tV.amax(dim=-1)
            if group.size() > 1:
                dist.all_reduce(max_t, op=dist.ReduceOp.MAX, group=group)
            x_tV -= max_t[:, None]
            label_t = labels_T[rows] - first
            is_here_t = (label_t >= 0) & (label_t < real)
            column_t = label_t.clamp(0, V - 1)[:, None]
            label_x_t = x_tV.gather(1, column_t)[:, 0].masked_fill(~is_here_t, 0)
            exp_tV = x_tV.exp()
            weighted_t = (exp_tV * x_tV.clamp_(min=LOWEST)).sum(-1)
            sums_3t = torch.stack([exp_tV.sum(-1), weighted_t, label_x_t])
            if group.size() > 1:
                dist.all_reduce(sums_3t, group=group)
            z_t, weighted_t, label_x_t = sums_3t
            log_z_t = z_t.log()
            logprobs_T[rows] = label_x_t - log_z_t
            entropy_T[rows] = log_z_t - weighted_t / z_t
            log_z_T[rows] = log_z_t + max_t
        ctx.save_for_backward(logits_TV, labels_T, log_z_T, entropy_T)
        ctx.temperature, ctx.first, ctx.real, ctx.chunk = temperature, first, real, chunk
        ctx.set_materialize_grads(False)
        return logprobs_T, entropy_T

    @staticmethod
    def backward(ctx, d_logprobs_T, d_entropy_T):
        logits_TV, labels_T, log_z_T, entropy_T = ctx.saved_tensors
        d_logits_TV = torch.zeros_like(logits_TV)
        for at in range(0, len(labels_T), ctx.chunk):
            rows = slice(at, at + ctx.chunk)
            logp_tV = logits_TV[rows, : ctx.real].float() / ctx.temperature - log_z_T[rows, None]
            p_tV = logp_tV.clamp_(min=LOWEST).exp()
            d_tV = torch.zeros_like(p_tV)
            if d_entropy_T is not None:
                d_tV -= p_tV * (logp_tV + entropy_T[rows, None]) * d_entropy_T[rows, None]
            if d_logprobs_T is not None:
                d_tV -= p_tV * d_logprobs_T[rows, None]
                label_t = labels_T[rows] - ctx.first
                here = ((label_t >= 0) & (label_t < ctx.real)).nonzero()[:, 0]
                d_tV[here, label_t[here]] += d_logprobs_T[rows][here]
            d_logits_TV[rows, : ctx.real] = d_tV.div_(ctx.temperature).to(logits_TV.dtype)
        return d_logits_TV, None, None, None, None, None


def logprobs_and_entropy(
    logits_TV: torch.Tensor,
    labels_T: torch.Tensor,
    *,
    temperature: float,
    vocab_size: int,
    group: dist.ProcessGroup,
    chunk: int = 1024,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (log-prob of each label, entropy) of softmax(logits / temperature), both float32 [T].

    The softmax is over the whole vocabulary. Collective over group, the tensor-parallel ranks.

    logits_TV: this rank's columns, any float dtype. labels_T: int64, global token ids.
    vocab_size: without padding.
    """
    return VocabParallelLogprobs.apply(logits_TV, labels_T, temperature, vocab_size, group, chunk)


def mismatch(
    trainer_logprobs_T: torch.Tensor, rollout_logprobs_T: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Measure per token how far trainer and engine disagree about tokens that the engine sampled.

    With d = trainer - rollout, mismatch_abs is |d| and mismatch_k3 is exp(d) - 1 - d. The latter is
    an unbiased estimate of KL(rollout || trainer) and is never negative; see losses.k3.
    """
    return {
        "mismatch_abs": (trainer_logprobs_T - rollout_logprobs_T).abs(),
        "mismatch_k3": k3(rollout_logprobs_T, trainer_logprobs_T, None),
    }
