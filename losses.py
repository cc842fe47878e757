"""The mathematics of a training step, as pure functions of tensors: log-probs and entropy from logits, and the policy loss.

Three log-probs of the same token, three names, here and everywhere:
    rollout_logprobs   by the engine that sampled it, from FP8 weights, at sampling time
    old_logprobs       by the trainer, before the first optimizer step on this batch
    logprobs           by the trainer now, with a gradient
old - rollout measures how far engine and trainer disagree about the same policy (the mismatch); logprobs - old, how far the policy has moved.

Shape letters: T packed tokens of a micro-batch, V vocabulary on this tensor-parallel rank.
"""

import torch
import torch.distributed as dist


class VocabParallelLogprobs(torch.autograd.Function):
    """logits -> log-prob of each label and entropy of each position, for logits whose vocabulary is split over tensor-parallel ranks.

    fp32 exists for `chunk` tokens at a time only; between forward and backward nothing is kept but the logits in their own dtype and two numbers a
    token. With x = logits / temperature, Z = sum exp x over all ranks, p = exp(x) / Z:

        logprob = x_label - log Z                 d logprob / dx = onehot(label) - p
        entropy = log Z - sum p x                 d entropy / dx = -p (log p + entropy)
    """

    @staticmethod
    def forward(ctx, logits_TV, labels_T, temperature, vocab_size, group, chunk):
        T, V = logits_TV.shape
        first = V * group.rank()
        # Rows that pad the vocabulary have logits but are no tokens.
        real = min(V, vocab_size - first)
        log_z_T, logprobs_T, entropy_T = (torch.empty(T, dtype=torch.float32, device=logits_TV.device) for _ in range(3))
        for at in range(0, T, chunk):
            rows = slice(at, at + chunk)
            x_tV = logits_TV[rows, :real].float() / temperature  # not in place: of fp32 logits, float() is no copy
            max_t = x_tV.amax(dim=-1)
            if group.size() > 1:
                dist.all_reduce(max_t, op=dist.ReduceOp.MAX, group=group)
            x_tV -= max_t[:, None]
            label_t = labels_T[rows] - first
            is_here_t = (label_t >= 0) & (label_t < real)
            label_x_t = x_tV.gather(1, label_t.clamp(0, real - 1)[:, None])[:, 0] * is_here_t
            exp_tV = x_tV.exp()
            sums_3t = torch.stack([exp_tV.sum(-1), (exp_tV * x_tV).sum(-1), label_x_t])
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
            p_tV = logp_tV.exp()
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
    logits_TV: torch.Tensor, labels_T: torch.Tensor, *, temperature: float, vocab_size: int, group: dist.ProcessGroup, chunk: int = 1024
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-prob of each label, entropy), both float32 [T], of softmax(logits / temperature) over the whole vocabulary.

    logits_TV: this rank's columns, any float dtype. labels_T: int64, global token ids. vocab_size: without padding. group: tensor-parallel group.
    """
    return VocabParallelLogprobs.apply(logits_TV, labels_T, temperature, vocab_size, group, chunk)


def ppo_loss(
    logprobs_T: torch.Tensor,
    old_logprobs_T: torch.Tensor,
    rollout_logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
    tis_cap: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """PPO's clipped objective per token, weighted by truncated importance sampling; returns (loss_T, per-token statistics), both unmasked.

        ratio  = exp(logprobs - old)                                      PPO, arXiv 1707.06347, equation 7; asymmetric bounds from DAPO
        ppo    = max(-ratio A, -clip(ratio, 1 - clip_low, 1 + clip_high) A)
        weight = min(exp(old - rollout), tis_cap), no gradient            TIS, corrects for the engine having sampled from other numerics
        loss   = weight * ppo

    All inputs float32 [T]. Departure from PPO: the weight. tis_cap 0 turns it off.
    """
    log_ratio_T = logprobs_T - old_logprobs_T
    ratio_T = log_ratio_T.exp()
    clipped_T = ratio_T.clamp(1 - clip_low, 1 + clip_high)
    ppo_T = torch.maximum(-ratio_T * advantages_T, -clipped_T * advantages_T)
    importance_T = (old_logprobs_T - rollout_logprobs_T).exp()
    weight_T = importance_T.clamp(max=tis_cap) if tis_cap > 0 else torch.ones_like(importance_T)
    with torch.no_grad():
        statistics = {
            "ratio": ratio_T,
            "clipfrac": (-clipped_T * advantages_T > -ratio_T * advantages_T).float(),
            "approx_kl": ratio_T - 1 - log_ratio_T,
            "logprob_shift": log_ratio_T,
            "tis_clipfrac": (importance_T > weight_T).float(),
        }
    return weight_T.detach() * ppo_T, statistics


def mismatch(trainer_logprobs_T: torch.Tensor, rollout_logprobs_T: torch.Tensor) -> dict[str, torch.Tensor]:
    """Disagreement of trainer and engine about tokens that the engine sampled, per token.

    k3 = exp(d) - 1 - d with d = trainer - rollout estimates KL(rollout || trainer) without bias, and is never negative (Schulman, "Approximating KL").
    """
    difference_T = trainer_logprobs_T - rollout_logprobs_T
    return {"mismatch_abs": difference_T.abs(), "mismatch_k3": difference_T.exp() - 1 - difference_T}
