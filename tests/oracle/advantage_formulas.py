"""Every advantage a second time: NumPy float64, one sample or one token at a time.

Nothing here is shared with advantages.py and nothing is vectorised. Letters and sources are those
of oracle.py.
"""

from dataclasses import dataclass
from math import sqrt

import numpy as np


@dataclass
class Outcomes:
    """Hold what advantages are made from: the fields of advantages.Scores as NumPy arrays."""

    rewards_N: np.ndarray
    group_N: np.ndarray
    lengths_N: np.ndarray  # response tokens of each sample
    mask_T: np.ndarray
    penalties_T: np.ndarray  # taken from the reward at each token

    def spans(self) -> list[range]:
        """Return the token indices of each sample."""
        spans, start = [], 0
        for length in self.lengths_N:
            spans.append(range(start, start + int(length)))
            start += int(length)
        return spans


# ---- Advantages: outcomes -> A_T ----


def net_rewards(outcomes: Outcomes) -> list[float]:
    """Return R_i: the reward of a sample minus the penalties of its counting tokens."""
    net = []
    for reward, span in zip(outcomes.rewards_N, outcomes.spans()):
        net.append(
            float(reward)
            - sum(float(outcomes.penalties_T[t]) for t in span if outcomes.mask_T[t] == 1)
        )
    return net


def group_of(outcomes: Outcomes, i: int) -> list[int]:
    return [j for j in range(len(outcomes.group_N)) if outcomes.group_N[j] == outcomes.group_N[i]]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def on_tokens(outcomes: Outcomes, value_N: list[float]) -> np.ndarray:
    """Return the value of each sample at its counting tokens, 0 at the others."""
    value_T = np.zeros(len(outcomes.mask_T))
    for value, span in zip(value_N, outcomes.spans()):
        for t in span:
            if outcomes.mask_T[t] == 1:
                value_T[t] = value
    return value_T


def whitened(value_T: np.ndarray, mask_T: np.ndarray) -> np.ndarray:
    """Return (x - mean) / sqrt(var + 1e-8) over the counting tokens of the batch.

    The variance is biased: it divides by the number of counting tokens.
    """
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
        deviation = (
            sqrt(sum((x - mean(group)) ** 2 for x in group) / (len(group) - 1))
            if len(group) > 1
            else 0.0
        )
        advantages.append((net[i] - mean(group)) / (deviation + 1e-6))
    return on_tokens(outcomes, advantages)


def dr_grpo(outcomes: Outcomes) -> np.ndarray:
    net = net_rewards(outcomes)
    return on_tokens(
        outcomes, [net[i] - mean([net[j] for j in group_of(outcomes, i)]) for i in range(len(net))]
    )


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
            still_to_pay = sum(
                float(outcomes.penalties_T[u]) for u in span if u >= t and outcomes.mask_T[u] == 1
            )
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
    """Return (A_L, returns_L) from the definition, without a recursion.

    A_k is the sum of (gamma lam)^(j-k) delta_j over k and the later counting tokens j.
    """
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
