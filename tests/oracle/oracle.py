"""Every algorithm a second time, one token or one sample at a time, in NumPy float64.

Policy losses, corrections, KL estimators, aggregations and the whole loss stand here, advantages in
advantage_formulas.py. Nothing is shared with losses.py and nothing is vectorised, so that a reader
can check each function against its formula.

Where a paper stops the gradient, the argument under the stop is passed as `frozen_T`. It holds the
same numbers as logprobs_T, and stays while finite differences move logprobs_T. NaN stands for a
value that the formula leaves undefined, such as a mean over a sample without counting tokens. Every
formula with a ratio bounds the log-ratio to +-20: see `ratio`.

N samples, T packed tokens, L tokens of one sample. A counting token has mask 1. Sources:
PPO arXiv:1707.06347, dual clip 1912.09729, GRPO 2402.03300, Dr. GRPO 2503.20783, RLOO 2402.14740,
REINFORCE++ 2501.03262, GAE 1506.02438, DAPO 2503.14476, GSPO 2507.18071, CISPO 2506.13585,
GMPO 2507.20673, SAPO 2511.20347, KL estimators http://joschu.net/blog/kl-approx.html.
"""

from dataclasses import dataclass
from math import exp, nan

import numpy as np

from advantage_formulas import ADVANTAGES, Outcomes, gae, mean, overlong_penalty  # noqa: F401


@dataclass
class Packed:
    """Hold which sample each packed token belongs to, and whether it counts."""

    sample_T: np.ndarray
    mask_T: np.ndarray
    samples: int

    def counting(self, sample: int) -> list[int]:
        return [
            t
            for t in range(len(self.sample_T))
            if self.sample_T[t] == sample and self.mask_T[t] == 1
        ]


# ---- Policy losses: (loss_T, ratio_T, clipped_T) ----


def clip(x: float, low: float, high: float) -> float:
    if x < low:
        return low
    return high if x > high else x


def ratio(log_ratio: float) -> float:
    """Return e to the log-ratio, which is first bounded to +-20."""
    return exp(clip(log_ratio, -20.0, 20.0))


def mean_log_ratio(log_ratio_T, packed: Packed, sample: int) -> float:
    counting = packed.counting(sample)
    return mean([float(log_ratio_T[t]) for t in counting]) if counting else nan


def clipped_surrogate(
    r: float, advantage: float, *, clip_low: float, clip_high: float, dual_clip: float
) -> tuple[float, bool]:
    unclipped_loss = -r * advantage
    clipped_loss = -clip(r, 1 - clip_low, 1 + clip_high) * advantage
    loss = max(unclipped_loss, clipped_loss)
    if dual_clip > 0 and advantage < 0:
        loss = min(loss, -dual_clip * advantage)
    return loss, clipped_loss > unclipped_loss


def ppo(logprobs_T, frozen_T, old_T, advantages_T, packed, **bounds):
    ratio_T = [ratio(new - old) for new, old in zip(logprobs_T, old_T)]
    results = [clipped_surrogate(r, a, **bounds) for r, a in zip(ratio_T, advantages_T)]
    loss_T, clipped_T = zip(*results)
    return np.array(loss_T), np.array(ratio_T), np.array(clipped_T)


def gspo(logprobs_T, frozen_T, old_T, advantages_T, packed, **bounds):
    """Return the loss with log s_t = l_t - sg(l_t) + sg(mean of l - lo).

    The value is the sample's ratio. The gradient is each token's own.
    """
    ratio_T, results = [], []
    for t in range(len(logprobs_T)):
        center = mean_log_ratio(
            np.asarray(frozen_T) - np.asarray(old_T), packed, packed.sample_T[t]
        )
        ratio_T.append(ratio(logprobs_T[t] - frozen_T[t] + center))
        if center != center:  # NaN: the sample has no counting token
            results.append((nan, False))
        else:
            results.append(clipped_surrogate(ratio_T[t], advantages_T[t], **bounds))
    loss_T, clipped_T = zip(*results)
    return np.array(loss_T), np.array(ratio_T), np.array(clipped_T)


def cispo(logprobs_T, frozen_T, old_T, advantages_T, packed, *, clip_low, clip_high, dual_clip):
    """Return -sg(clip(r)) A l. The ratio only weighs, so a clipped token keeps its gradient."""
    assert dual_clip == 0
    loss_T, ratio_T, clipped_T = [], [], []
    for new, frozen, old, advantage in zip(logprobs_T, frozen_T, old_T, advantages_T):
        r = ratio(frozen - old)
        loss_T.append(-clip(r, 1 - clip_low, 1 + clip_high) * advantage * new)
        ratio_T.append(r)
        clipped_T.append(r < 1 - clip_low or r > 1 + clip_high)
    return np.array(loss_T), np.array(ratio_T), np.array(clipped_T)


def clipped_log_ratio(x: float, advantage: float, *, clip_low: float, clip_high: float) -> float:
    """Return x, bounded on the side to which the advantage drives it."""
    if advantage > 0:
        return min(x, clip_high)
    return max(x, -clip_low) if advantage < 0 else x


def gmpo(logprobs_T, frozen_T, old_T, advantages_T, packed, *, clip_low, clip_high, dual_clip):
    """Return -s A with log s_t = c_t - sg(c_t) + sg(mean of c), c the clipped log-ratio."""
    assert dual_clip == 0
    clips = dict(clip_low=clip_low, clip_high=clip_high)

    def clipped(values_T) -> np.ndarray:
        rows = zip(values_T, old_T, advantages_T)
        return np.array([clipped_log_ratio(new - old, a, **clips) for new, old, a in rows])

    now_T, before_T = clipped(logprobs_T), clipped(frozen_T)
    loss_T, ratio_T, clipped_T = [], [], []
    for t, (now, before) in enumerate(zip(now_T, before_T)):
        center = mean_log_ratio(before_T, packed, packed.sample_T[t])
        ratio_T.append(ratio(now - before + center))
        loss_T.append(nan if center != center else -ratio_T[t] * advantages_T[t])
        clipped_T.append(now != logprobs_T[t] - old_T[t])
    return np.array(loss_T), np.array(ratio_T), np.array(clipped_T)


def geometric_mean_loss(log_ratio_T, advantage: float, *, clip_low, clip_high) -> float:
    """Return GMPO's loss of one response as the paper has it: a root of a product of |min(..)|."""
    product = 1.0
    for x in log_ratio_T:
        bounded = clip(exp(x), exp(-clip_low), exp(clip_high))
        product *= abs(min(exp(x) * advantage, bounded * advantage))
    return -np.sign(advantage) * product ** (1 / len(log_ratio_T))


def sapo(logprobs_T, frozen_T, old_T, advantages_T, packed, *, tau_pos, tau_neg, **no_clips):
    """Return -A 4 / tau sigmoid(tau (r - 1)), with tau by the sign of the advantage."""
    assert no_clips == dict(clip_low=None, clip_high=None, dual_clip=0)
    loss_T, ratio_T = [], []
    for new, old, advantage in zip(logprobs_T, old_T, advantages_T):
        r, tau = ratio(new - old), tau_pos if advantage > 0 else tau_neg
        loss_T.append(-advantage * 4 / tau / (1 + exp(-tau * (r - 1))))
        ratio_T.append(r)
    return np.array(loss_T), np.array(ratio_T), np.zeros(len(loss_T), dtype=bool)


POLICY_LOSSES = {"ppo": ppo, "gspo": gspo, "cispo": cispo, "gmpo": gmpo, "sapo": sapo}


# ---- Corrections of the difference between engine and trainer: lo - lr -> (weight_T, cut_T) ----


def no_correction(log_weight_T, packed, *, low, high):
    assert low is None and high is None
    return np.array([1.0 for _ in log_weight_T]), np.array([False for _ in log_weight_T])


def tis(log_weight_T, packed, *, low, high):
    assert low is None
    weight_T = [min(ratio(x), high) for x in log_weight_T]
    return np.array(weight_T), np.array([ratio(x) > high for x in log_weight_T])


def sequence_tis(log_weight_T, packed, *, low, high):
    assert low is None
    weight_T = []
    for sample in packed.sample_T:
        weight_T.append(ratio(sum(log_weight_T[t] for t in packed.counting(sample))))
    return np.array([min(x, high) for x in weight_T]), np.array([x > high for x in weight_T])


def icepop(log_weight_T, packed, *, low, high):
    inside_T = np.array([low <= ratio(x) <= high for x in log_weight_T])
    weight_T = [ratio(x) if inside else 0.0 for x, inside in zip(log_weight_T, inside_T)]
    return np.array(weight_T), ~inside_T


def decoupled(log_weight_T, packed, *, low, high):
    assert low is None
    inside_T = np.array([ratio(x) <= high for x in log_weight_T])
    weight_T = [ratio(x) if inside else 0.0 for x, inside in zip(log_weight_T, inside_T)]
    return np.array(weight_T), ~inside_T


def sequence_mask(log_weight_T, packed, *, low, high):
    weight_T = []
    for t in range(len(log_weight_T)):
        center = mean_log_ratio(log_weight_T, packed, packed.sample_T[t])
        weight_T.append(nan if center != center else 1.0 if low <= ratio(center) <= high else 0.0)
    return np.array(weight_T), np.array([weight == 0 for weight in weight_T])


CORRECTIONS = {
    "none": no_correction,
    "tis": tis,
    "sequence_tis": sequence_tis,
    "icepop": icepop,
    "decoupled": decoupled,
    "sequence_mask": sequence_mask,
}


# ---- KL estimators: (l, lf, lo) of one token ----


def k1(new: float, ref: float, old: float) -> float:
    return new - ref


def k2(new: float, ref: float, old: float) -> float:
    return (new - ref) ** 2 / 2


def k3(new: float, ref: float, old: float) -> float:
    """Return e^-d - 1 + d with d = l - lf, bounded to at least -20."""
    d = max(new - ref, -20.0)
    return exp(-d) - 1 + d


def low_var_kl(new: float, ref: float, old: float) -> float:
    return clip(k3(new, ref, old), -10.0, 10.0)


def unbiased_k3(new: float, ref: float, old: float) -> float:
    return ratio(new - old) * k3(new, ref, old)


KL_ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3, "low_var_kl": low_var_kl, "unbiased_k3": unbiased_k3}


# ---- Aggregations: the loss of a batch as the mean it stands for ----


def token_mean(loss_T, packed, *, max_response_tokens) -> float:
    return mean([float(loss_T[t]) for n in range(packed.samples) for t in packed.counting(n)])


def sequence_mean(loss_T, packed, *, max_response_tokens) -> float:
    return mean(
        [
            mean([float(loss_T[t]) for t in packed.counting(n)])
            for n in range(packed.samples)
            if packed.counting(n)
        ]
    )


def constant_mean(loss_T, packed, *, max_response_tokens) -> float:
    return mean(
        [
            sum(float(loss_T[t]) for t in packed.counting(n)) / max_response_tokens
            for n in range(packed.samples)
            if packed.counting(n)
        ]
    )


AGGREGATIONS = {"token": token_mean, "sequence": sequence_mean, "constant": constant_mean}


# ---- The whole loss: what a training step descends, and what it reports ----


@dataclass
class Known:
    """Hold what stays while logprobs_T and entropy_T move."""

    frozen_T: np.ndarray  # the numbers of logprobs_T
    old_T: np.ndarray
    rollout_T: np.ndarray
    ref_T: np.ndarray
    advantages_T: np.ndarray
    packed: Packed
    measured_T: np.ndarray
    """The trainer's log-probs whose mismatch with rollout_T is reported."""


@dataclass
class Algorithm:
    """Hold one choice from each table. kl: the estimator of the loss's KL term, or None."""

    policy_loss: str
    clips: dict
    correction: str
    bounds: dict
    aggregation: str
    kl: str | None
    kl_coef: float
    entropy_coef: float
    max_response_tokens: int


def whole_loss(logprobs_T, entropy_T, known: Known, algorithm: Algorithm) -> float:
    """Return the aggregate of w_t L_t + kl_coef K_t - entropy_coef H_t.

    The correction w_t weighs the policy loss alone.
    """
    policy_T, _, _ = POLICY_LOSSES[algorithm.policy_loss](
        logprobs_T, known.frozen_T, known.old_T, known.advantages_T, known.packed, **algorithm.clips
    )
    weight_T, _ = CORRECTIONS[algorithm.correction](
        known.old_T - known.rollout_T, known.packed, **algorithm.bounds
    )
    loss_T = []
    for t in range(len(logprobs_T)):
        loss = weight_T[t] * policy_T[t] - algorithm.entropy_coef * entropy_T[t]
        if algorithm.kl:
            loss += algorithm.kl_coef * KL_ESTIMATORS[algorithm.kl](
                logprobs_T[t], known.ref_T[t], known.old_T[t]
            )
        loss_T.append(loss)
    return AGGREGATIONS[algorithm.aggregation](
        loss_T, known.packed, max_response_tokens=algorithm.max_response_tokens
    )


def whole_metrics(
    logprobs_T, entropy_T, known: Known, algorithm: Algorithm, kl: str | None
) -> dict[str, float]:
    """Return means over the counting tokens, and the largest mismatch. kl: estimator or None."""
    _, ratio_T, clipped_T = POLICY_LOSSES[algorithm.policy_loss](
        logprobs_T, known.frozen_T, known.old_T, known.advantages_T, known.packed, **algorithm.clips
    )
    _, cut_T = CORRECTIONS[algorithm.correction](
        known.old_T - known.rollout_T, known.packed, **algorithm.bounds
    )
    rows = []
    for t in [t for n in range(known.packed.samples) for t in known.packed.counting(n)]:
        moved = logprobs_T[t] - known.old_T[t]
        apart = known.measured_T[t] - known.rollout_T[t]
        rows.append({
            "entropy": entropy_T[t],
            "ratio": ratio_T[t],
            "clipfrac": float(clipped_T[t]),
            "approx_kl": exp(min(moved, 20.0)) - 1 - min(moved, 20.0),
            "logprob_shift": moved,
            "tis_clipfrac": float(cut_T[t]),
            "kl": KL_ESTIMATORS[kl](logprobs_T[t], known.ref_T[t], known.old_T[t]) if kl else 0.0,
            "mismatch_abs": abs(apart),
            "mismatch_k3": exp(min(apart, 20.0)) - 1 - min(apart, 20.0),
        })  # fmt: skip
    means = {name: mean([row[name] for row in rows]) for name in rows[0]}
    return means | {"mismatch_max": max(row["mismatch_abs"] for row in rows)}


def log_softmax(logits_V, temperature: float) -> np.ndarray:
    """Return log p of each token of the vocabulary, p = softmax(logits / temperature)."""
    x_V = np.asarray(logits_V, dtype=np.float64) / temperature
    return x_V - x_V.max() - np.log(sum(exp(x) for x in x_V - x_V.max()))


def through_softmax(
    logits_V, label: int, d_logprob: float, d_entropy: float, temperature: float
) -> np.ndarray:
    """Return the gradient at a position's logits from those at its label's log-prob and entropy."""
    logp_V = log_softmax(logits_V, temperature)
    p_V = np.exp(logp_V)
    entropy = -(p_V * logp_V).sum()
    onehot_V = np.arange(len(p_V)) == label
    return (d_logprob * (onehot_V - p_V) - d_entropy * p_V * (logp_V + entropy)) / temperature


# ---- Finite differences ----


def jacobian(function, x: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """Return how output i (row) moves with input j (column), by finite differences.

    The error is about 1e-10 of the output, however large or small that is.
    """
    columns = []
    for j in range(len(x)):
        up, down = x.copy(), x.copy()
        up[j] += step
        down[j] -= step
        columns.append((np.atleast_1d(function(up)) - np.atleast_1d(function(down))) / (2 * step))
    return np.stack(columns, axis=1)
