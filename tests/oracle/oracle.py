"""Every advantage, policy loss, correction, KL estimator and aggregation a second time: NumPy float64, one token or one sample at a time.

Nothing here is shared with losses.py or advantages.py and nothing is vectorised, so that each function can be checked against its formula by reading it.
Where a paper stops the gradient, the argument under the stop is passed as `frozen_T`: the same numbers as logprobs_T, held still while finite
differences move logprobs_T. A value the formula leaves undefined (a mean over a sample without counting tokens) is NaN here.

N samples, T packed tokens, L tokens of one sample. A counting token is one with mask 1. Sources: PPO arXiv:1707.06347, dual clip 1912.09729,
GRPO 2402.03300, Dr. GRPO 2503.20783, RLOO 2402.14740, REINFORCE++ 2501.03262, GAE 1506.02438, DAPO 2503.14476, GSPO 2507.18071, CISPO 2506.13585,
KL estimators http://joschu.net/blog/kl-approx.html.
"""

from dataclasses import dataclass
from math import exp, nan, sqrt

import numpy as np


@dataclass
class Outcomes:
    """What the advantages are made from; the fields of advantages.Scores as NumPy arrays."""

    rewards_N: np.ndarray
    group_N: np.ndarray
    lengths_N: np.ndarray  # response tokens of each sample
    mask_T: np.ndarray
    penalties_T: np.ndarray  # taken from the reward at each token

    def spans(self) -> list[range]:
        """The token indices of each sample."""
        spans, start = [], 0
        for length in self.lengths_N:
            spans.append(range(start, start + int(length)))
            start += int(length)
        return spans


@dataclass
class Packed:
    """Which sample each packed token belongs to and whether it counts."""

    sample_T: np.ndarray
    mask_T: np.ndarray
    samples: int

    def counting(self, sample: int) -> list[int]:
        return [t for t in range(len(self.sample_T)) if self.sample_T[t] == sample and self.mask_T[t] == 1]


# ---- Advantages: outcomes -> A_T ----


def net_rewards(outcomes: Outcomes) -> list[float]:
    """R_i: the reward of a sample minus the penalties of its counting tokens."""
    net = []
    for reward, span in zip(outcomes.rewards_N, outcomes.spans()):
        net.append(float(reward) - sum(float(outcomes.penalties_T[t]) for t in span if outcomes.mask_T[t] == 1))
    return net


def group_of(outcomes: Outcomes, i: int) -> list[int]:
    return [j for j in range(len(outcomes.group_N)) if outcomes.group_N[j] == outcomes.group_N[i]]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def on_tokens(outcomes: Outcomes, value_N: list[float]) -> np.ndarray:
    """The value of each sample at its counting tokens, 0 at the others."""
    value_T = np.zeros(len(outcomes.mask_T))
    for value, span in zip(value_N, outcomes.spans()):
        for t in span:
            if outcomes.mask_T[t] == 1:
                value_T[t] = value
    return value_T


def whitened(value_T: np.ndarray, mask_T: np.ndarray) -> np.ndarray:
    """(x - mean) / sqrt(var + 1e-8) over the counting tokens of the batch; var divides by their number (biased)."""
    counting = [t for t in range(len(mask_T)) if mask_T[t] == 1]
    result_T = np.zeros(len(mask_T))
    if counting:
        center = mean([value_T[t] for t in counting])
        variance = mean([(value_T[t] - center) ** 2 for t in counting])
        for t in counting:
            result_T[t] = (value_T[t] - center) / sqrt(variance + 1e-8)
    return result_T


def grpo(outcomes: Outcomes) -> np.ndarray:
    net, advantages = net_rewards(outcomes), []
    for i in range(len(net)):
        group = [net[j] for j in group_of(outcomes, i)]
        deviation = sqrt(sum((x - mean(group)) ** 2 for x in group) / (len(group) - 1)) if len(group) > 1 else 0.0
        advantages.append((net[i] - mean(group)) / (deviation + 1e-6))
    return on_tokens(outcomes, advantages)


def dr_grpo(outcomes: Outcomes) -> np.ndarray:
    net = net_rewards(outcomes)
    return on_tokens(outcomes, [net[i] - mean([net[j] for j in group_of(outcomes, i)]) for i in range(len(net))])


def rloo(outcomes: Outcomes) -> np.ndarray:
    net, advantages = net_rewards(outcomes), []
    for i in range(len(net)):
        others = [net[j] for j in group_of(outcomes, i) if j != i]
        advantages.append(net[i] - mean(others) if others else 0.0)
    return on_tokens(outcomes, advantages)


def reinforce_plus_plus(outcomes: Outcomes) -> np.ndarray:
    return_T = np.zeros(len(outcomes.mask_T))
    for reward, span in zip(outcomes.rewards_N, outcomes.spans()):
        for t in span:
            still_to_pay = sum(float(outcomes.penalties_T[u]) for u in span if u >= t and outcomes.mask_T[u] == 1)
            return_T[t] = float(reward) - still_to_pay
    return whitened(return_T, outcomes.mask_T)


def reinforce_plus_plus_baseline(outcomes: Outcomes) -> np.ndarray:
    return whitened(dr_grpo(outcomes), outcomes.mask_T)


ADVANTAGES = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "reinforce++": reinforce_plus_plus,
    "reinforce++_baseline": reinforce_plus_plus_baseline,
}


def gae(rewards_L, values_L, mask_L, *, gamma: float, lam: float) -> tuple[np.ndarray, np.ndarray]:
    """(A_L, returns_L) by the definition: A_k = sum over later counting tokens j of (gamma lam)^(j-k) delta_j, with no recursion."""
    kept = [t for t in range(len(mask_L)) if mask_L[t] == 1]
    deltas = []
    for k, t in enumerate(kept):
        next_value = values_L[kept[k + 1]] if k + 1 < len(kept) else 0.0
        deltas.append(rewards_L[t] + gamma * next_value - values_L[t])
    advantages_L, returns_L = np.zeros(len(mask_L)), np.zeros(len(mask_L))
    for k, t in enumerate(kept):
        advantages_L[t] = sum((gamma * lam) ** (j - k) * deltas[j] for j in range(k, len(kept)))
        returns_L[t] = advantages_L[t] + values_L[t]
    return advantages_L, returns_L


def overlong_penalty(length: int, *, max_tokens: int, buffer: int) -> float:
    if buffer == 0 or length <= max_tokens - buffer:
        return 0.0
    if length <= max_tokens:
        return (max_tokens - buffer - length) / buffer
    return -1.0


# ---- Policy losses: (loss_T, ratio_T, clipped_T) ----


def clip(x: float, low: float, high: float) -> float:
    if x < low:
        return low
    return high if x > high else x


def mean_log_ratio(log_ratio_T, packed: Packed, sample: int) -> float:
    counting = packed.counting(sample)
    return mean([float(log_ratio_T[t]) for t in counting]) if counting else nan


def clipped_surrogate(ratio: float, advantage: float, *, clip_low: float, clip_high: float, dual_clip: float) -> tuple[float, bool]:
    unclipped_loss = -ratio * advantage
    clipped_loss = -clip(ratio, 1 - clip_low, 1 + clip_high) * advantage
    loss = max(unclipped_loss, clipped_loss)
    if dual_clip > 0 and advantage < 0:
        loss = min(loss, -dual_clip * advantage)
    return loss, clipped_loss > unclipped_loss


def ppo(logprobs_T, frozen_T, old_T, advantages_T, packed, **bounds):
    ratio_T = [exp(new - old) for new, old in zip(logprobs_T, old_T)]
    results = [clipped_surrogate(ratio, advantage, **bounds) for ratio, advantage in zip(ratio_T, advantages_T)]
    return np.array([loss for loss, _ in results]), np.array(ratio_T), np.array([clipped for _, clipped in results])


def gspo(logprobs_T, frozen_T, old_T, advantages_T, packed, **bounds):
    """log s_t = l_t - sg(l_t) + sg(mean of l - lo): the value is the sample's ratio, the gradient each token's own."""
    ratio_T, results = [], []
    for t in range(len(logprobs_T)):
        center = mean_log_ratio(np.asarray(frozen_T) - np.asarray(old_T), packed, packed.sample_T[t])
        ratio_T.append(exp(logprobs_T[t] - frozen_T[t] + center))
        results.append(clipped_surrogate(ratio_T[t], advantages_T[t], **bounds) if center == center else (nan, False))
    return np.array([loss for loss, _ in results]), np.array(ratio_T), np.array([clipped for _, clipped in results])


def cispo(logprobs_T, frozen_T, old_T, advantages_T, packed, *, clip_low, clip_high, dual_clip):
    """-sg(clip(r)) A l: the ratio only weighs, so a clipped token keeps its gradient."""
    assert dual_clip == 0
    loss_T, ratio_T, clipped_T = [], [], []
    for new, frozen, old, advantage in zip(logprobs_T, frozen_T, old_T, advantages_T):
        ratio = exp(frozen - old)
        loss_T.append(-clip(ratio, 1 - clip_low, 1 + clip_high) * advantage * new)
        ratio_T.append(ratio)
        clipped_T.append(ratio < 1 - clip_low or ratio > 1 + clip_high)
    return np.array(loss_T), np.array(ratio_T), np.array(clipped_T)


POLICY_LOSSES = {"ppo": ppo, "gspo": gspo, "cispo": cispo}


# ---- Corrections of the difference between engine and trainer: lo - lr -> weight_T ----


def no_correction(log_weight_T, packed, *, low, high):
    return np.array([1.0 for _ in log_weight_T])


def tis(log_weight_T, packed, *, low, high):
    return np.array([min(exp(x), high) for x in log_weight_T])


def icepop(log_weight_T, packed, *, low, high):
    return np.array([exp(x) if low <= exp(x) <= high else 0.0 for x in log_weight_T])


def decoupled(log_weight_T, packed, *, low, high):
    return np.array([exp(x) if exp(x) <= high else 0.0 for x in log_weight_T])


def sequence_mask(log_weight_T, packed, *, low, high):
    weight_T = []
    for t in range(len(log_weight_T)):
        center = mean_log_ratio(log_weight_T, packed, packed.sample_T[t])
        weight_T.append(nan if center != center else 1.0 if low <= exp(center) <= high else 0.0)
    return np.array(weight_T)


CORRECTIONS = {"none": no_correction, "tis": tis, "icepop": icepop, "decoupled": decoupled, "sequence_mask": sequence_mask}


# ---- KL estimators: (l, lf, lo) of one token ----


def k1(new: float, ref: float, old: float) -> float:
    return new - ref


def k2(new: float, ref: float, old: float) -> float:
    return (new - ref) ** 2 / 2


def k3(new: float, ref: float, old: float) -> float:
    return exp(ref - new) - 1 + (new - ref)


def low_var_kl(new: float, ref: float, old: float) -> float:
    return clip(k3(new, ref, old), -10.0, 10.0)


def unbiased_k3(new: float, ref: float, old: float) -> float:
    return exp(new - old) * k3(new, ref, old)


KL_ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3, "low_var_kl": low_var_kl, "unbiased_k3": unbiased_k3}


# ---- Aggregations: the loss of a batch as the mean it stands for ----


def token_mean(loss_T, packed, *, max_response_tokens) -> float:
    return mean([float(loss_T[t]) for n in range(packed.samples) for t in packed.counting(n)])


def sequence_mean(loss_T, packed, *, max_response_tokens) -> float:
    return mean([mean([float(loss_T[t]) for t in packed.counting(n)]) for n in range(packed.samples) if packed.counting(n)])


def constant_mean(loss_T, packed, *, max_response_tokens) -> float:
    return mean([sum(float(loss_T[t]) for t in packed.counting(n)) / max_response_tokens for n in range(packed.samples) if packed.counting(n)])


AGGREGATIONS = {"token": token_mean, "sequence": sequence_mean, "constant": constant_mean}


# ---- Finite differences ----


def jacobian(function, x: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """Row i, column j: how output i moves with input j. The error is about 1e-10 of the output, at every size of it."""
    columns = []
    for j in range(len(x)):
        up, down = x.copy(), x.copy()
        up[j] += step
        down[j] -= step
        columns.append((np.atleast_1d(function(up)) - np.atleast_1d(function(down))) / (2 * step))
    return np.stack(columns, axis=1)
