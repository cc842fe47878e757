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
# and tau_pos, tau_neg where its entry has them. Log-probs and advantages are float [T], settings
# are numbers. loss_T is each token's loss, ratio_T the ratio that it uses, float [T]. clipped_T
# tells where the clip removed the gradient, bool [T]. weight_T masks tokens that do not count.


def clipped_objective(ratio_T, advantages_T, *, clip_low, clip_high, dual_clip):
    """Compute PPO's clipped objective for a given ratio r, arXiv 1707.06347, equation 7.

    The bounds may be asymmetric, as in DAPO, arXiv 2503.14476, equation 10:

        loss = max(-r A, -clip(r, 1 - clip_low, 1 + clip_high) A)

    dual_clip c > 1 limits the loss to -c A where A < 0 (arXiv 1912.09729, equation 5), so that no
    bad token that has become likely dominates the batch; 0: no limit.
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

    clip_low 1 means no lower bound, as in the paper. dual_clip has no meaning here.
    """
    ratio_T = ratio(logprobs_T.detach() - old_logprobs_T)
    weight_T = ratio_T.clamp(1 - clip_low, 1 + clip_high)
    return -weight_T * advantages_T * logprobs_T, ratio_T, weight_T != ratio_T


def gmpo(logprobs_T, old_logprobs_T, advantages_T, sequences, *, clip_low, clip_high, dual_clip):
    """Compute GMPO's objective, arXiv 2507.20673, in a token form as gspo's.

    A response's ratio s is the geometric mean of its token ratios, each clipped before:

        log s = c - sg(c) + sg(mean over the response of c),  c = clip(logprobs - old)

    c lies in [-clip_low, clip_high]; the upper bound holds where A > 0, the lower where A < 0. With
    one advantage for all tokens of a response, the gradient is that of the paper's product.
    """
    log_ratio_T = logprobs_T - old_logprobs_T
    bounded_T = log_ratio_T.clamp(-clip_low, clip_high)
    clipped_T = (bounded_T - log_ratio_T) * advantages_T < 0
    kept_T = torch.where(clipped_T, bounded_T, log_ratio_T)
    ratio_T = ratio(kept_T - kept_T.detach() + sequences.mean(kept_T))
    return -ratio_T * advantages_T, ratio_T, clipped_T


def sapo(logprobs_T, old_logprobs_T, advantages_T, sequences, *, tau_pos, tau_neg, **no_clips):
    """Compute SAPO's objective, arXiv 2511.20347: a smooth gate f in place of the clip.

        loss = -f(r) A,   f(r) = 4 / tau sigmoid(tau (r - 1))

    f has slope 1 at r = 1 and less on both sides, the less the larger tau is: tau_pos where A > 0,
    else tau_neg. No gradient is cut off. The paper averages as --aggregation sequence does.
    """
    ratio_T = ratio(logprobs_T - old_logprobs_T)
    tau_T = torch.full_like(ratio_T, tau_neg).masked_fill(advantages_T > 0, tau_pos)
    gate_T = 4 / tau_T * torch.sigmoid(tau_T * (ratio_T - 1))
    return -gate_T * advantages_T, ratio_T, torch.zeros_like(ratio_T, dtype=torch.bool)


@dataclass(frozen=True)
class PolicyLoss:
    """A policy loss and its default bounds. None: it has no such bound."""

    function: Callable
    clip_low: float | None
    clip_high: float | None
    tau_pos: float | None = None
    tau_neg: float | None = None
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
    "gmpo": PolicyLoss(gmpo, 0.4, 0.4, only={"aggregation": ("sequence",), "dual_clip": (0.0,)}),
    "sapo": PolicyLoss(sapo, None, None, 1.0, 1.05, only={"dual_clip": (0.0,)}),
}


# --- aggregation: one number from the tokens of the global batch --------------------------------
#
# Every aggregation is a function (sequences, *, max_response_tokens) -> (weight_T, normalizer_N):
#
#     loss = sum of weight_T loss_T / sum of normalizer_N
#
# Both sums run over the global batch. A mean of the ranks' means would depend on which rank holds
# which sample: means of 1 over 2 tokens and 3 over 8 average to 2.0, the mean over 10 is 2.6.


def per_token(sequences: Sequences, *, max_response_tokens: int):
    """Weigh all tokens alike: DAPO, arXiv 2503.14476, equation 8. Long responses count more."""
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


def sequence_tis(log_weight_T, sequences, *, low: None, high: float):
    """Truncate a response's importance weight: min(product of exp(old - rollout), high).

    Liu et al., "When Speed Kills Stability", 2025; verl's rollout_is "sequence". The product is the
    weight of the whole response, and without the bound unbiased; a geometric mean would not be.
    """
    weight_T = ratio(sequences.mean(log_weight_T) * sequences.counts_N[sequences.sample_T])
    return weight_T.clamp(max=high), weight_T > high


def icepop(log_weight_T, sequences, *, low: float, high: float):
    """Keep exp(old - rollout) where it lies in [low, high], else 0: IcePop, arXiv 2510.18855."""
    weight_T = ratio(log_weight_T)
    cut_T = (weight_T < low) | (weight_T > high)
    return weight_T.masked_fill(cut_T, 0), cut_T


def decoupled(log_weight_T, sequences, *, low: None, high: float):
    """Keep exp(old - rollout) up to a cap, else 0: AReaL, arXiv 2505.24298, equation 5, its code.

    The other half of decoupled PPO, old_logprobs by the trainer, holds under every correction.
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
    "sequence_tis": Correction(sequence_tis, None, 2.0),
    "icepop": Correction(icepop, 0.5, 5.0),
    "decoupled": Correction(decoupled, None, 5.0),
    "sequence_mask": Correction(sequence_mask, 0.9, 1.1),
}


# --- KL to a frozen reference -------------------------------------------------------------------
#
# Every estimator is a function (logprobs_T, ref_logprobs_T, old_logprobs_T) -> kl_T, float [T].
# Let d = logprobs - ref. Over the policy's own samples the mean of each estimator is
# KL(policy || reference), exactly or nearly. In the reward only this value matters. In the loss the
# gradient matters, which need not be that of this KL. tests/oracle proves each claim.


def k1(logprobs_T, ref_logprobs_T, old_logprobs_T):
    """Return d: unbiased, with a large variance. As a loss, its expected gradient is 0."""
    return logprobs_T - ref_logprobs_T


def k2(logprobs_T, ref_logprobs_T, old_logprobs_T):
    """Return d^2 / 2: biased. As a loss, its mean gradient is that of KL(policy || reference)."""
    return (logprobs_T - ref_logprobs_T).square() / 2


def k3(logprobs_T, ref_logprobs_T, old_logprobs_T):
    """Return exp(-d) - 1 + d (Schulman, "Approximating KL divergence").

    It is unbiased, has a small variance and is never negative. As a loss, its gradient is that of
    KL(reference || policy). d is bounded below by -20 alone, because exp(-d) grows; see ratio.
    """
    difference_T = (logprobs_T - ref_logprobs_T).clamp(min=-20)
    return ratio(-difference_T) - 1 + difference_T


def low_var_kl(logprobs_T, ref_logprobs_T, old_logprobs_T):
    """Return k3 bounded by 10; verl and slime use this name. Beyond 10 it has no gradient."""
    return k3(logprobs_T, ref_logprobs_T, old_logprobs_T).clamp(-10, 10)


def unbiased_k3(logprobs_T, ref_logprobs_T, old_logprobs_T):
    """Return exp(logprobs - old) k3: DeepSeek-V3.2, arXiv 2512.02556, section 3.1.

    As a loss, its gradient is that of KL(policy || reference), also after the policy has moved.
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
    """Return the type of a flag that replaces a bound of the table; its help lists the table's."""
    own = {name: getattr(choice, bound) for name, choice in table.items()}
    shown = ", ".join(f"{value:g} for {name}" for name, value in own.items() if value is not None)
    return Annotated[float | None, tyro.conf.arg(help=f"{text} None: {shown}.")]


@dataclass(frozen=True)
class LossSettings:
    """The policy loss, one choice from each table above."""

    policy_loss: _choice(
        POLICY_LOSSES,
        "Objective of a token: ppo (clipped ratio), gspo (one ratio for a response), cispo "
        "(clipped weight), gmpo (geometric mean; logarithms are clipped) or sapo (smooth gate).",
    ) = "ppo"
    clip_low: _bound(POLICY_LOSSES, "clip_low", "Clip r below 1 - clip_low; gmpo: log r.") = None
    clip_high: _bound(POLICY_LOSSES, "clip_high", "Clip r above 1 + clip_high; gmpo: log r.") = None
    tau_pos: _bound(POLICY_LOSSES, "tau_pos", "Steepness of sapo's gate where A > 0.") = None
    tau_neg: _bound(POLICY_LOSSES, "tau_neg", "Steepness of sapo's gate elsewhere.") = None
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
        "How to weight or mask tokens on which trainer and engine differ; see losses.py.",
    ) = "tis"
    correction_low: _bound(CORRECTIONS, "low", "Lower bound of the correction.") = None
    correction_high: _bound(CORRECTIONS, "high", "Upper bound of the correction.") = None
    old_logprobs: Literal["trainer", "rollout"] = "trainer"
    """Whose log-probs the ratio starts from. rollout: the engine's, without a scoring pass of the
    trainer; there is nothing left to correct, so it needs --correction none."""
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
    def clips(self) -> dict[str, float | None]:
        """Return the policy loss's keyword arguments: as set by flags, else its own."""
        own = POLICY_LOSSES[self.policy_loss]
        names = ("clip_low", "clip_high", *(("tau_pos", "tau_neg") if own.tau_pos else ()))
        return self._bounds(own, **dict(zip(names, names))) | {"dual_clip": self.dual_clip}

    @property
    def correction_bounds(self) -> dict[str, float | None]:
        """Return {low, high}: as set by flags, else the correction's own."""
        own = CORRECTIONS[self.correction]
        return self._bounds(own, low="correction_low", high="correction_high")

    def _bounds(self, own: Any, **flags: str) -> dict[str, float | None]:
        given = {name: getattr(self, flag) for name, flag in flags.items()}
        return {name: getattr(own, name) if x is None else x for name, x in given.items()}
