"""The mathematics of a training step, as pure functions of tensors: the parts of a policy loss.

Log-probs and entropy, which they start from, are computed in logprobs.py.

An algorithm is one choice from each of five tables: POLICY_LOSSES, AGGREGATIONS, CORRECTIONS,
KL_ESTIMATORS here, ADVANTAGES in advantages.py. A fork adds a function and its line in the table:
flags, default bounds and refusals follow from the line. Over the tokens of the global batch, in the
terms of the tables:

    loss = sum of weight_T (correction_T policy_loss_T + kl_coef kl_T - entropy_coef entropy_T) /
    sum of normalizer_N

Three log-probs of the same token, three names, here and everywhere:
    rollout_logprobs   by the engine that sampled it, from FP8 weights, at sampling time
    old_logprobs       by the trainer, before the first optimizer step on this batch
    logprobs           by the trainer now, with a gradient
and, where there is one, ref_logprobs by the frozen reference model. old - rollout measures how far
engine and trainer disagree about the same policy (the mismatch); logprobs - old, how far the policy
has moved.

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
    """Which sample each packed token belongs to, and which tokens count: what is needed by all that
    looks at whole responses.
    """

    sample_T: torch.Tensor
    """int64: place of the token's sample in the micro-batch."""
    mask_T: torch.Tensor
    """float: 1 where the token is the policy's own and counts."""
    counts_N: torch.Tensor
    """float: how many tokens of each sample count, those of other context-parallel ranks included.
    """
    cp_group: dist.ProcessGroup | None = None
    """Ranks that hold other tokens of the same samples; None: there are none."""

    @torch.no_grad()
    def mean(self, x_T: torch.Tensor) -> torch.Tensor:
        """The mean over a sample's counting tokens, at each of its tokens; 0 where no token counts.

        A constant: no gradient flows. Collective over cp_group.
        """
        sums_N = torch.zeros_like(self.counts_N, dtype=x_T.dtype).index_add_(
            0, self.sample_T, x_T * self.mask_T
        )
        if self.cp_group is not None:
            dist.all_reduce(sums_N, group=self.cp_group)
        return (sums_N / self.counts_N.clamp(min=1))[self.sample_T]


def ratio(log_ratio_T: torch.Tensor) -> torch.Tensor:
    """Return exp of a difference of log-probs that is bounded to +-20, as verl, SkyRL and miles do.

    exp(89) is infinite in fp32, and 0 times infinity is NaN, also where the clip is chosen. Beyond
    the bound a ratio has no gradient. Everything here that needs a ratio calls this function.
    """
    return log_ratio_T.clamp(-20, 20).exp()


# Each takes (logprobs_T, old_logprobs_T, advantages_T, sequences, *, clip_low, clip_high,
# dual_clip) and returns (loss_T, ratio_T, clipped_T), not masked: the loss, the ratio it looks at,
# and where the clip took the gradient away. float [T], float [T], bool [T].


def ppo(
    logprobs_T,
    old_logprobs_T,
    advantages_T,
    sequences,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
):
    """PPO's clipped objective, arXiv 1707.06347, equation 7, with DAPO's asymmetric bounds (arXiv
    2503.14476, equation 10):

        r    = exp(logprobs - old)
        loss = max(-r A, -clip(r, 1 - clip_low, 1 + clip_high) A)

    dual_clip c > 1 (arXiv 1912.09729, equation 5; 0: off): where A < 0 the loss is at most -c A.
    The plain objective has no bound there: a token that has become likely although it was bad would
    dominate the batch.
    """
    clips = dict(clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
    return _clipped(ratio(logprobs_T - old_logprobs_T), advantages_T, **clips)


def gspo(
    logprobs_T,
    old_logprobs_T,
    advantages_T,
    sequences,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
):
    """GSPO, arXiv 2507.18071, in its token form (equation 17): PPO's objective with one ratio for
    all tokens of a response,

        log s = logprobs - sg(logprobs) + sg(mean over the response of (logprobs - old))

    whose value is the geometric mean of the token ratios, and whose gradient at each token is that
    token's. Together with --aggregation sequence it is equation 5. The mean of many logarithms
    moves little, hence the bounds of 3e-4 and 4e-4.
    """
    ratio_T = ratio(logprobs_T - logprobs_T.detach() + sequences.mean(logprobs_T - old_logprobs_T))
    return _clipped(
        ratio_T, advantages_T, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip
    )


def _clipped(ratio_T, advantages_T, *, clip_low, clip_high, dual_clip):
    plain_T = -ratio_T * advantages_T
    bounded_T = -ratio_T.clamp(1 - clip_low, 1 + clip_high) * advantages_T
    loss_T = torch.maximum(plain_T, bounded_T)
    if dual_clip > 0:
        loss_T = torch.where(
            advantages_T < 0, torch.minimum(loss_T, -dual_clip * advantages_T), loss_T
        )
    return loss_T, ratio_T, bounded_T > plain_T


def cispo(
    logprobs_T,
    old_logprobs_T,
    advantages_T,
    sequences,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
):
    """CISPO, MiniMax-M1, arXiv 2506.13585, equations 4 and 5: the ratio is a clipped weight without
    gradient, so that no token is cut out of the batch,

        loss = -sg(clip(r, 1 - clip_low, 1 + clip_high)) A logprobs

    clip_low 1 is no lower bound, as in the paper. dual_clip has no meaning here; the table refuses
    it.
    """
    ratio_T = ratio(logprobs_T.detach() - old_logprobs_T)
    weight_T = ratio_T.clamp(1 - clip_low, 1 + clip_high)
    return -weight_T * advantages_T * logprobs_T, ratio_T, weight_T != ratio_T


@dataclass(frozen=True)
class PolicyLoss:
    """One policy loss, with the bounds that hold unless they are set; None: it has no such bound."""

    function: Callable
    clip_low: float | None
    clip_high: float | None
    only: dict[str, tuple] = field(default_factory=dict)
    """Fields of LossSettings of which it takes these values only; others are refused."""


POLICY_LOSSES = {
    "ppo": PolicyLoss(ppo, 0.2, 0.28),  # DAPO's
    "gspo": PolicyLoss(
        gspo, 3e-4, 4e-4, only={"aggregation": ("sequence",)}
    ),  # one ratio a response
    # No lower bound and weights up to 5, as ScaleRL (arXiv 2510.13786) uses it.
    "cispo": PolicyLoss(cispo, 1.0, 4.0, only={"dual_clip": (0.0,)}),
}


# --- aggregation: one number from the tokens of the global batch --------------------------------
#
# Each takes (sequences, *, max_response_tokens) and returns (weight_T, normalizer_N): loss = sum of we
# of the global batch, on whatever rank they are. Averages of averages would depend on who holds w
# average to 2.0, where the mean over tokens is 2.6.


def per_token(sequences: Sequences, *, max_response_tokens: int):
    """Every token alike: DAPO, arXiv 2503.14476, equation 8. Long responses weigh more."""
    return sequences.mask_T, sequences.counts_N


def per_sequence(sequences: Sequences, *, max_response_tokens: int):
    """Every response alike, the mean of its tokens: GRPO, arXiv 2402.03300, equation 3.

    A token of a long response weighs less.
    """
    return sequences.mask_T / sequences.counts_N.clamp(min=1)[sequences.sample_T], (
        sequences.counts_N > 0
    ).to(sequences.counts_N.dtype)


def constant(sequences: Sequences, *, max_response_tokens: int):
    """The sum of a response's tokens over a constant: Dr.

    GRPO, arXiv 2503.20783, appendix A. A token's weight does not depend on its response's length.
    """
    return sequences.mask_T / max_response_tokens, (sequences.counts_N > 0).to(
        sequences.counts_N.dtype
    )


AGGREGATIONS = {"token": per_token, "sequence": per_sequence, "constant": constant}


# --- off-policy corrections: weights for tokens that the engine sampled from other numerics or ol
#
# Each takes (log_weight_T = old - rollout, sequences, *, low, high), returns (weight_T, cut_T): a
# weight for the policy loss of each token, without gradient, and where the correction has truncated
# or masked. A weight of 0 takes a token out; the denominator stays that of all tokens, or what is
# masked would make the others count more.


def no_correction(log_weight_T, sequences, *, low: None, high: None):
    """1: the samples are taken as the trainer's own."""
    return torch.ones_like(log_weight_T), torch.zeros_like(log_weight_T, dtype=torch.bool)


def tis(log_weight_T, sequences, *, low: None, high: float):
    """Truncated importance sampling, min(exp(old - rollout), high): Yao et al., "Your efficient RL
    framework secretly brings you off-policy training", 2025.
    """
    weight_T = ratio(log_weight_T)
    return weight_T.clamp(max=high), weight_T > high


def icepop(log_weight_T, sequences, *, low: float, high: float):
    """exp(old - rollout) where it lies in [low, high], else 0: IcePop, Ring-1T, arXiv 2510.18855.

    A token on which the two disagree teaches nothing.
    """
    weight_T = ratio(log_weight_T)
    cut_T = (weight_T < low) | (weight_T > high)
    return weight_T.masked_fill(cut_T, 0), cut_T


def decoupled(log_weight_T, sequences, *, low: None, high: float):
    """The behaviour weight of decoupled PPO, AReaL, arXiv 2505.24298, equation 5: exp(old -
    rollout), and as in AReaL's code 0 above a cap.

    The other half, that old_logprobs are recomputed by the trainer with the weights it starts the
    step from, holds here under every correction.
    """
    weight_T = ratio(log_weight_T)
    return weight_T.masked_fill(weight_T > high, 0), weight_T > high


def sequence_mask(log_weight_T, sequences, *, low: float, high: float):
    """1 for responses whose geometric mean of exp(old - rollout) lies in [low, high], 0 for all
    tokens of others: a few tokens can spoil a whole response.

    The mean's logarithm is an estimate of -KL(rollout || old). NeMo-RL uses 0.999 to 1.002 where
    rollouts are BF16; FP8 rollouts of short answers differ more, hence the bounds of 0.9 and 1.1.
    """
    mean_T = ratio(sequences.mean(log_weight_T))
    cut_T = ~((mean_T >= low) & (mean_T <= high))
    return (~cut_T).to(log_weight_T.dtype), cut_T


@dataclass(frozen=True)
class Correction:
    """One correction, with the bounds that hold unless they are set; None: it has no such bound."""

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
# Each takes (logprobs_T, ref_logprobs_T, old_logprobs_T); with d = logprobs - ref every one's mea
# exactly or nearly. As a value in the reward that is all that matters. As a loss its gradient mat


def k1(logprobs_T, ref_logprobs_T, old_logprobs_T):
    """d.

    Unbiased, of large variance. As a loss: its expected gradient is 0, only noise; use it in the
    reward.
    """
    return logprobs_T - ref_logprobs_T


def k2(logprobs_T, ref_logprobs_T, old_logprobs_T):
    """d^2 / 2. Biased. As a loss: its expected gradient is that of KL(policy || reference)."""
    return (logprobs_T - ref_logprobs_T).square() / 2


def k3(logprobs_T, ref_logprobs_T, old_logprobs_T):
    """exp(-d) - 1 + d. Unbiased, of small variance, never negative (Schulman, "Approximating KL").

    As a loss: the gradient of KL(reference || policy). d is bounded below by -20, where exp(-d)
    grows, see ratio. It has no upper bound: a token that the reference excludes keeps its gradient.
    """
    difference_T = (logprobs_T - ref_logprobs_T).clamp(min=-20)
    return ratio(-difference_T) - 1 + difference_T


def low_var_kl(logprobs_T, ref_logprobs_T, old_logprobs_T):
    """k3, bounded by 10, as verl and slime name it.

    As a loss: k3's gradient, and none beyond the bound.
    """
    return k3(logprobs_T, ref_logprobs_T, old_logprobs_T).clamp(-10, 10)


def unbiased_k3(logprobs_T, ref_logprobs_T, old_logprobs_T):
    """exp(logprobs - old) k3, the ratio with its gradient: DeepSeek-V3.2, arXiv 2512.02556, section 3.1. As a loss: the gradient of KL(policy || reference),
    and without bias also where the policy has moved since it sampled.
    """
    return ratio(logprobs_T - old_logprobs_T) * k3(logprobs_T, ref_logprobs_T, old_logprobs_T)


@dataclass(frozen=True)
class KLEstimator:
    """One estimator, and the settings that it takes some values of only, as PolicyLoss.only."""

    function: Callable
    only: dict[str, tuple] = field(default_factory=dict)


KL_ESTIMATORS = {
    "k1": KLEstimator(k1, only={"kl_in": ("reward",)}),  # as a loss it has no gradient on average
    "k2": KLEstimator(k2),
    "k3": KLEstimator(k3),
    "low_var_kl": KLEstimator(low_var_kl),
    "unbiased_k3": KLEstimator(unbiased_k3),
}


# --- the choice of an algorithm -----------------------------------------------------------------


def _choice(table: dict[str, Any], text: str) -> Any:
    """Return the type of a flag that takes the names of a table."""
    return Annotated[tyro.extras.literal_type_from_choices(table), tyro.conf.arg(help=text)]


def _bound(table: dict[str, Any], bound: str, text: str) -> Any:
    """Return the type of a flag that is None, or takes the place of a bound of the table."""
    own = {name: getattr(choice, bound) for name, choice in table.items()}
    shown = ", ".join(f"{value:g} for {name}" for name, value in own.items() if value is not None)
    return Annotated[float | None, tyro.conf.arg(help=f"{text} None: {shown}.")]


@dataclass(frozen=True)
class LossSettings:
    """The policy loss, one choice from each table above."""

    policy_loss: _choice(
        POLICY_LOSSES,
        "Objective of a token: PPO's clip; GSPO's sequence ratio; CISPO's clipped weight; see"
        " losses.py.",
    ) = "ppo"
    clip_low: _bound(POLICY_LOSSES, "clip_low", "The ratio is clipped below 1 - clip_low.") = None
    clip_high: _bound(POLICY_LOSSES, "clip_high", "The ratio is clipped above 1 + clip_high.") = (
        None
    )
    dual_clip: float = 0.0
    """Bound of the loss of bad tokens, as a multiple of |advantage| above 1, for instance 3; 0: no bound.
    """
    aggregation: _choice(
        AGGREGATIONS,
        "Every token of the batch counts alike (DAPO), every response (GRPO), or tokens over the "
        "constant --max-response-tokens (Dr. GRPO).",
    ) = "token"
    correction: _choice(
        CORRECTIONS,
        "What becomes of tokens whose log-prob differs between trainer and engine: weights or"
        " masks; see losses.py.",
    ) = "tis"
    correction_low: _bound(CORRECTIONS, "low", "Lower bound of the correction.") = None
    correction_high: _bound(CORRECTIONS, "high", "Upper bound of the correction.") = None
    kl_coef: float = 0.0
    """Weight of the KL to the frozen reference; 0: no reference is kept."""
    kl_estimator: _choice(
        KL_ESTIMATORS, "How that KL is estimated from a sampled token; see losses.py."
    ) = "k3"
    kl_in: Literal["loss", "reward"] = "loss"
    """The KL is a term of the loss, with its gradient, or is taken from the reward at each token.
    """
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""

    @property
    def clips(self) -> tuple[float | None, float | None]:
        """(clip_low, clip_high), as set or as the policy loss has them."""
        own, low, high = POLICY_LOSSES[self.policy_loss], self.clip_low, self.clip_high
        return own.clip_low if low is None else low, own.clip_high if high is None else high

    @property
    def correction_bounds(self) -> tuple[float | None, float | None]:
        """(low, high), as set or as the correction has them."""
        own, low, high = CORRECTIONS[self.correction], self.correction_low, self.correction_high
        return own.low if low is None else low, own.high if high is None else high


def mismatch(
    trainer_logprobs_T: torch.Tensor, rollout_logprobs_T: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Disagreement of trainer and engine about tokens that the engine sampled, per token.

    k3 = exp(d) - 1 - d with d = trainer - rollout estimates KL(rollout || trainer) without bias, and is never negative (Schulman, "Approximating KL").
    """
    return {
        "mismatch_abs": (trainer_logprobs_T - rollout_logprobs_T).abs(),
        "mismatch_k3": k3(rollout_logprobs_T, trainer_logprobs_T, None),
    }
