"""The mathematics of a policy loss, as pure functions of tensors.

An algorithm is one choice from each of five tables: POLICY_LOSSES, AGGREGATIONS, CORRECTIONS and
KL_ESTIMATORS in this file, ADVANTAGES in advantages.py. Flags, default bounds and error messages
follow from the tables. Over the tokens T and the samples N of the global batch,

    loss = sum of weight_T (correction_T policy_loss_T + kl_coef kl_T - entropy_coef entropy_T)
           / sum of normalizer_N

where the aggregation gives weight_T and normalizer_N. train_step.py puts the terms together.
backends/megatron/logprobs.py computes the log-probs and the entropy that they start from.

The same token has three log-probs, and each has one name throughout the project:
    rollout_logprobs   by the engine, at sampling time, usually from FP8 weights
    old_logprobs       by the trainer, before the first optimizer step on this batch
    logprobs           by the trainer now, with a gradient
With a reference model there is a fourth: ref_logprobs, by the frozen reference. The difference
old - rollout measures the mismatch: how far engine and trainer disagree about the same policy. The
difference logprobs - old measures how far the policy has moved.

Shape letters: T packed tokens of a micro-batch, N its samples.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
import tyro

# --- policy losses ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sequences:
    """Which sample each packed token belongs to, and which tokens count."""

    sample_T: torch.Tensor
    """int64: index of the token's sample in the micro-batch."""
    mask_T: torch.Tensor
    """float: 1 where the token counts, because the policy sampled it; else 0."""
    counts_N: torch.Tensor
    """float: counting tokens of each sample, including those on other context-parallel ranks."""
    cp_group: dist.ProcessGroup | None = None
    """Ranks that hold other tokens of the same samples. None: this rank holds all of them."""

    @property
    def nonempty_N(self) -> torch.Tensor:
        """Return 1 for each sample with at least one counting token, else 0."""
        return (self.counts_N > 0).to(self.counts_N.dtype)

    @torch.no_grad()
    def mean(self, x_T: torch.Tensor) -> torch.Tensor:
        """Return at each token the mean of x over the counting tokens of its sample, float [T].

        The mean of a sample without counting tokens is 0. No gradient flows through the result.
        Collective over cp_group.
        """
        sums_N = torch.zeros_like(self.counts_N, dtype=x_T.dtype)
        sums_N.index_add_(0, self.sample_T, x_T * self.mask_T)
        if self.cp_group is not None:
            dist.all_reduce(sums_N, group=self.cp_group)
        means_N = sums_N / self.counts_N.clamp(min=1)
        return means_N[self.sample_T]


def ratio(log_ratio_T: torch.Tensor) -> torch.Tensor:
    """Return exp of a difference of log-probs, bounded to +-20 as in verl, SkyRL and miles.

    In fp32 exp(89) is infinite, and infinity times 0 is NaN, even at tokens where the clip is
    chosen instead. Beyond the bound a ratio has no gradient. Every ratio here uses this function.
    """
    return log_ratio_T.clamp(-20, 20).exp()


# Every policy loss is a function
#
#     (logprobs_T, old_logprobs_T, advantages_T, sequences, *, clip_low, clip_high, dual_clip)
#     -> (loss_T, ratio_T, clipped_T)
#
# The log-probs and advantages are float [T]; the three settings are numbers. loss_T is each token's
# loss, float [T]. ratio_T is the ratio that it uses, float [T]. clipped_T tells where the clip
# removed the gradient, bool [T]. They need no mask: weight_T is 0 where a token does not count.


def clipped_objective(ratio_T, advantages_T, *, clip_low, clip_high, dual_clip):
    """Compute PPO's clipped objective for a given ratio r, arXiv 1707.06347, equation 7.

    The bounds may be asymmetric, as in DAPO, arXiv 2503.14476, equation 10:

        loss = max(-r A, -clip(r, 1 - clip_low, 1 + clip_high) A)

    dual_clip c > 1 limits the loss to -c A where A < 0 (arXiv 1912.09729, equation 5); 0 turns the
    limit off. Without it, one bad token that has become likely can dominate the batch.
    """
    plain_T = -ratio_T * advantages_T
    bounded_T = -ratio_T.clamp(1 - clip_low, 1 + clip_high) * advantages_T
    loss_T = torch.maximum(plain_T, bounded_T)  # no gradient where the clip makes it larger
    if dual_clip > 0:
        limited_T = torch.minimum(loss_T, -dual_clip * advantages_T)
        loss_T = torch.where(advantages_T < 0, limited_T, loss_T)
    return loss_T, ratio_T, bounded_T > plain_T


def ppo(logprobs_T, old_logprobs_T, advantages_T, sequences, *, clip_low, clip_high, dual_clip):
    """Compute PPO's objective with a ratio for each token, r = exp(logprobs - old)."""
    clip = dict(clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
    return clipped_objective(ratio(logprobs_T - old_logprobs_T), advantages_T, **clip)


def gspo(logprobs_T, old_logprobs_T, advantages_T, sequences, *, clip_low, clip_high, dual_clip):
    """Compute GSPO's objective in its token form, arXiv 2507.18071, equation 17.

    It is PPO's objective with the same ratio s at all tokens of a response; sg stops the gradient:

        log s = logprobs - sg(logprobs) + sg(mean over the response of (logprobs - old))

    The value of s is the geometric mean of the token ratios. Its gradient at each token is that of
    the token's own log-prob. With --aggregation sequence the loss is equation 5. A mean of many
    logarithms moves little, so the default bounds are narrow: 3e-4 and 4e-4.
    """
    mean_T = sequences.mean(logprobs_T - old_logprobs_T)
    ratio_T = ratio(logprobs_T - logprobs_T.detach() + mean_T)
    clip = dict(clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
    return clipped_objective(ratio_T, advantages_T, **clip)


def cispo(logprobs_T, old_logprobs_T, advantages_T, sequences, *, clip_low, clip_high, dual_clip):
    """Compute CISPO's objective, MiniMax-M1, arXiv 2506.13585, equations 4 and 5.

    The clipped ratio is a weight without a gradient, so the clip removes no token from the batch:

        loss = -sg(clip(r, 1 - clip_low, 1 + clip_high)) A logprobs

    clip_low 1 means no lower bound, as in the paper. dual_clip has no meaning here; the table
    allows only 0.
    """
    ratio_T = ratio(logprobs_T.detach() - old_logprobs_T)
    weight_T = ratio_T.clamp(1 - clip_low, 1 + clip_high)
    return -weight_T * advantages_T * logprobs_T, ratio_T, weight_T != ratio_T


@dataclass(frozen=True)
class PolicyLoss:
    """A policy loss and its default bounds. None: it has no such bound."""

    function: Callable
    clip_low: float | None
    clip_high: float | None
    only: dict[str, tuple] = field(default_factory=dict)
    """{field of LossSettings: the values that this loss works with}; others are refused."""


# EDIT HERE: policy loss. Write a function above, give it a name here: --policy-loss takes it.
# tests/oracle/oracle.py needs an entry of the same name.
POLICY_LOSSES = {
    # DAPO's bounds.
    "ppo": PolicyLoss(ppo, 0.2, 0.28),
    # Equation 5 gives every response the same weight.
    "gspo": PolicyLoss(gspo, 3e-4, 4e-4, only={"aggregation": ("sequence",)}),
    # No lower bound and weights up to 5, as in ScaleRL, arXiv 2510.13786.
    "cispo": PolicyLoss(cispo, 1.0, 4.0, only={"dual_clip": (0.0,)}),
}


# --- aggregation: one number from the tokens of the global batch --------------------------------
#
# Every aggregation is a function (sequences, *, max_response_tokens) -> (weight_T, normalizer_N):
#
#     loss = sum of weight_T loss_T / sum of normalizer_N
#
# Both sums run over all samples of the global batch, on whichever ranks they are. A mean of the
# ranks' means would depend on which rank holds which sample. For example, means of 1 over 2 tokens
# and 3 over 8 tokens average to 2.0, but the mean over the 10 tokens is 2.6.


def per_token(sequences: Sequences, *, max_response_tokens: int):
    """Give every token the same weight: DAPO, arXiv 2503.14476, equation 8.

    A long response counts more than a short one.
    """
    return sequences.mask_T, sequences.counts_N


def per_sequence(sequences: Sequences, *, max_response_tokens: int):
    """Average over each response, then over responses: GRPO, arXiv 2402.03300, equation 3.

    A token of a long response counts less than one of a short response.
    """
    counts_T = sequences.counts_N.clamp(min=1)[sequences.sample_T]
    return sequences.mask_T / counts_T, sequences.nonempty_N


def constant(sequences: Sequences, *, max_response_tokens: int):
    """Divide each response's sum by a constant: Dr. GRPO, arXiv 2503.20783, appendix A.

    A token's weight does not depend on the length of its response.
    """
    return sequences.mask_T / max_response_tokens, sequences.nonempty_N


AGGREGATIONS = {"token": per_token, "sequence": per_sequence, "constant": constant}


# --- off-policy corrections ---------------------------------------------------------------------
#
# The engine samples with other numerics than the trainer, and sometimes with older weights. A
# correction reweights the policy loss of each token for that difference. It is a function
#
#     (log_weight_T = old - rollout, sequences, *, low, high) -> (weight_T, cut_T)
#
# weight_T, float [T], has no gradient. cut_T, bool [T], tells where the correction truncated or
# masked. A weight of 0 removes a token from the numerator only. The denominator still counts all
# tokens; otherwise masking some tokens would give the others more weight.


def no_correction(log_weight_T, sequences, *, low: None, high: None):
    """Give every token the weight 1, as if the trainer's own policy had sampled it."""
    return torch.ones_like(log_weight_T), torch.zeros_like(log_weight_T, dtype=torch.bool)


def tis(log_weight_T, sequences, *, low: None, high: float):
    """Truncate the importance weight: min(exp(old - rollout), high).

    Yao et al., "Your efficient RL framework secretly brings you off-policy training", 2025.
    """
    weight_T = ratio(log_weight_T)
    return weight_T.clamp(max=high), weight_T > high


def icepop(log_weight_T, sequences, *, low: float, high: float):
    """Keep exp(old - rollout) where it lies in [low, high], else 0: IcePop, arXiv 2510.18855.

    A token about which engine and trainer disagree too much teaches nothing.
    """
    weight_T = ratio(log_weight_T)
    cut_T = (weight_T < low) | (weight_T > high)
    return weight_T.masked_fill(cut_T, 0), cut_T


def decoupled(log_weight_T, sequences, *, low: None, high: float):
    """Keep exp(old - rollout) up to a cap, 0 above it: AReaL, arXiv 2505.24298, equation 5.

    This is the behaviour weight of decoupled PPO; AReaL's code sets it to 0 above the cap. The
    other half of decoupled PPO holds under every correction here: the trainer recomputes
    old_logprobs with the weights that the step starts from.
    """
    weight_T = ratio(log_weight_T)
    return weight_T.masked_fill(weight_T > high, 0), weight_T > high


def sequence_mask(log_weight_T, sequences, *, low: float, high: float):
    """Keep or drop whole responses, because a few bad tokens can spoil a response.

    The weight is 1 where the response's geometric mean of exp(old - rollout) lies in [low, high],
    else 0. The logarithm of that mean estimates -KL(rollout || old). NeMo-RL uses 0.999 to 1.002
    with BF16 rollouts. FP8 rollouts of short answers differ more, so the defaults are 0.9 and 1.1.
    """
    mean_T = ratio(sequences.mean(log_weight_T))
    kept_T = (mean_T >= low) & (mean_T <= high)
    return kept_T.to(log_weight_T.dtype), ~kept_T


@dataclass(frozen=True)
class Correction:
    """A correction and its default bounds. None: it has no such bound."""

    weight: Callable
    low: float | None
    high: float | None


CORRECTIONS = {
    "none": Correction(no_correction, None, None),
    "tis": Correction(tis, None, 2.0),
    "icepop": Correction(icepop, 0.5, 5.0),
    "decoupled": Correction(decoupled, None, 5.0),
    "sequence_mask": Correction(sequence_mask, 0.9, 1.1),
}


# --- KL to a frozen reference -------------------------------------------------------------------
#
# Every estimator is a function (logprobs_T, ref_logprobs_T, old_logprobs_T) -> kl_T, float [T].
# Let d = logprobs - ref. Over the policy's own samples the mean of each estimator is
# KL(policy || reference), exactly or nearly. In the reward only this value matters. In the loss the
# gradient matters, and that need not be the gradient of this KL. tests/oracle proves each claim.


def k1(logprobs_T, ref_logprobs_T, old_logprobs_T):
    """Return d: unbiased, with a large variance.

    As a loss, its expected gradient is 0 and each gradient is noise; use it in the reward.
    """
    return logprobs_T - ref_logprobs_T


def k2(logprobs_T, ref_logprobs_T, old_logprobs_T):
    """Return d^2 / 2: biased. As a loss, its mean gradient is that of KL(policy || reference)."""
    return (logprobs_T - ref_logprobs_T).square() / 2


def k3(logprobs_T, ref_logprobs_T, old_logprobs_T):
    """Return exp(-d) - 1 + d (Schulman, "Approximating KL divergence").

    It is unbiased, has a small variance and is never negative. As a loss, its gradient is that of
    KL(reference || policy). d is bounded below by -20, because exp(-d) grows; see ratio. It has no
    upper bound: a token that the reference excludes keeps its gradient.
    """
    difference_T = (logprobs_T - ref_logprobs_T).clamp(min=-20)
    return ratio(-difference_T) - 1 + difference_T


def low_var_kl(logprobs_T, ref_logprobs_T, old_logprobs_T):
    """Return k3 bounded by 10; verl and slime use this name. Beyond 10 it has no gradient."""
    return k3(logprobs_T, ref_logprobs_T, old_logprobs_T).clamp(-10, 10)


def unbiased_k3(logprobs_T, ref_logprobs_T, old_logprobs_T):
    """Return exp(logprobs - old) k3: DeepSeek-V3.2, arXiv 2512.02556, section 3.1.

    The ratio keeps its gradient. As a loss, the gradient is that of KL(policy || reference). It
    stays unbiased after the policy has moved away from the one that sampled.
    """
    return ratio(logprobs_T - old_logprobs_T) * k3(logprobs_T, ref_logprobs_T, old_logprobs_T)


@dataclass(frozen=True)
class KLEstimator:
    """A KL estimator, and the values of other settings that it works with, as in PolicyLoss."""

    function: Callable
    only: dict[str, tuple] = field(default_factory=dict)


KL_ESTIMATORS = {
    "k1": KLEstimator(k1, only={"kl_in": ("reward",)}),  # as a loss its mean gradient is 0
    "k2": KLEstimator(k2),
    "k3": KLEstimator(k3),
    "low_var_kl": KLEstimator(low_var_kl),
    "unbiased_k3": KLEstimator(unbiased_k3),
}


# --- the choice of an algorithm -----------------------------------------------------------------


def _choice(table: dict[str, Any], text: str) -> Any:
    """Return the type of a flag whose values are the names in a table."""
    return Annotated[tyro.extras.literal_type_from_choices(table), tyro.conf.arg(help=text)]


def _bound(table: dict[str, Any], bound: str, text: str) -> Any:
    """Return the type of a flag that replaces a bound of the table, unless it is None.

    The flag's help lists the bounds that the table has.
    """
    own = {name: getattr(choice, bound) for name, choice in table.items()}
    shown = ", ".join(f"{value:g} for {name}" for name, value in own.items() if value is not None)
    return Annotated[float | None, tyro.conf.arg(help=f"{text} None: {shown}.")]


@dataclass(frozen=True)
class LossSettings:
    """The policy loss, one choice from each table above."""

    policy_loss: _choice(
        POLICY_LOSSES,
        "Objective of a token: ppo (clipped ratio), gspo (one ratio for a response) or cispo "
        "(clipped weight); see losses.py.",
    ) = "ppo"
    clip_low: _bound(POLICY_LOSSES, "clip_low", "Clip the ratio below 1 - clip_low.") = None
    clip_high: _bound(POLICY_LOSSES, "clip_high", "Clip the ratio above 1 + clip_high.") = None
    dual_clip: float = 0.0
    """Limit the loss of tokens with a negative advantage to this multiple of |advantage|, above 1,
    for instance 3; 0: no limit."""
    aggregation: _choice(
        AGGREGATIONS,
        "How token losses become one number: every token counts the same (token, DAPO), every "
        "response does (sequence, GRPO), or sums are divided by --max-response-tokens (constant, "
        "Dr. GRPO).",
    ) = "token"
    correction: _choice(
        CORRECTIONS,
        "How to weight or mask tokens whose log-probs differ between trainer and engine; see "
        "losses.py.",
    ) = "tis"
    correction_low: _bound(CORRECTIONS, "low", "Lower bound of the correction.") = None
    correction_high: _bound(CORRECTIONS, "high", "Upper bound of the correction.") = None
    kl_coef: float = 0.0
    """Weight of the KL to the frozen reference model; 0: no reference model is loaded."""
    kl_estimator: _choice(
        KL_ESTIMATORS, "How to estimate that KL from a sampled token; see losses.py."
    ) = "k3"
    kl_in: Literal["loss", "reward"] = "loss"
    """loss: add the KL to the loss, with its gradient. reward: subtract it from the reward at each
    token."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""

    @property
    def clips(self) -> tuple[float | None, float | None]:
        """Return (clip_low, clip_high): as set by flags, else the policy loss's own."""
        own, low, high = POLICY_LOSSES[self.policy_loss], self.clip_low, self.clip_high
        return own.clip_low if low is None else low, own.clip_high if high is None else high

    @property
    def correction_bounds(self) -> tuple[float | None, float | None]:
        """Return (low, high): as set by flags, else the correction's own."""
        own, low, high = CORRECTIONS[self.correction], self.correction_low, self.correction_high
        return own.low if low is None else low, own.high if high is None else high


def mismatch(
    trainer_logprobs_T: torch.Tensor, rollout_logprobs_T: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Measure per token how far trainer and engine disagree about tokens that the engine sampled.

    With d = trainer - rollout, mismatch_abs is |d| and mismatch_k3 is exp(d) - 1 - d. The latter is
    an unbiased estimate of KL(rollout || trainer) and is never negative; see k3.
    """
    return {
        "mismatch_abs": (trainer_logprobs_T - rollout_logprobs_T).abs(),
        "mismatch_k3": k3(rollout_logprobs_T, trainer_logprobs_T, None),
    }
