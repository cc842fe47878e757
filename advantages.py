"""Rewards -> advantages, as pure functions of arrays.

Every estimator sees the whole batch, on every rank the same: what it compares or whitens is global.

Shape letters: N samples of the global batch, T response tokens of all of them, sample after sample,
L tokens of one response.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Scores:
    """What an estimator knows of a batch."""

    rewards_N: np.ndarray
    """float64: the reward of each sample's outcome."""
    group_N: np.ndarray
    """int64: the samples of one group answer the same prompt."""
    lengths_N: np.ndarray
    """int64: response tokens of each sample."""
    mask_T: np.ndarray
    """float64: 1 where the token is the policy's own."""
    penalties_T: np.ndarray
    """float64: what is taken from the reward at each token, the KL to a reference; zeros without.
    """

    @property
    def sample_T(self) -> np.ndarray:
        """int64: which sample each token belongs to."""
        return np.repeat(np.arange(len(self.lengths_N)), self.lengths_N)

    @property
    def totals_N(self) -> np.ndarray:
        """float64: the reward of each sample, less the penalties of its tokens."""
        return self.rewards_N - np.bincount(
            self.sample_T, self.penalties_T * self.mask_T, minlength=len(self.rewards_N)
        )

    def at_tokens(self, x_N: np.ndarray) -> np.ndarray:
        """A sample's value at each of its tokens that count, 0 at the others."""
        return x_N[self.sample_T] * self.mask_T


def grpo(scores: Scores) -> np.ndarray:
    """(R - mean) / (std + 1e-6) over the group: GRPO, arXiv 2402.03300, section 4.1.2; std is
    unbiased, as in TRL and slime. Rewards all equal: 0.
    """
    mean_N, std_N, _ = _group_statistics(scores)
    return scores.at_tokens((scores.totals_N - mean_N) / (std_N + 1e-6))


def dr_grpo(scores: Scores) -> np.ndarray:
    """R - mean over the group: Dr.

    GRPO, arXiv 2503.20783. Without the division, groups that nearly always or never succeed do not
    weigh more.
    """
    return scores.at_tokens(scores.totals_N - _group_statistics(scores)[0])


def rloo(scores: Scores) -> np.ndarray:
    """R - mean over the other samples of the group: RLOO, arXiv 2402.14740, equation 9; the same as
    (R - mean) n / (n - 1). A group of one: 0.
    """
    mean_N, _, size_N = _group_statistics(scores)
    return scores.at_tokens((scores.totals_N - mean_N) * size_N / np.maximum(size_N - 1, 1))


def reinforce_plus_plus(scores: Scores) -> np.ndarray:
    """Reward to go, whitened over the tokens of the batch: REINFORCE++, arXiv 2501.03262, equations
    3 and 8. Without discount.

    The return at a token is the outcome less the penalties from there on: with --kl-in reward each
    token answers for the KL that follows it.
    """
    returns_T = np.zeros_like(scores.mask_T)
    ends = np.cumsum(scores.lengths_N)
    penalties_T = scores.penalties_T * scores.mask_T
    for reward, start, end in zip(scores.rewards_N, ends - scores.lengths_N, ends):
        returns_T[start:end] = reward - np.cumsum(penalties_T[start:end][::-1])[::-1]
    return whiten(returns_T, scores.mask_T)


def reinforce_plus_plus_baseline(scores: Scores) -> np.ndarray:
    """R - mean over the group, whitened over the tokens of the batch: REINFORCE++-baseline, arXiv
    2501.03262, section 3.2. The group gives the baseline, and the batch, not the group, the scale.
    """
    return whiten(dr_grpo(scores), scores.mask_T)


ADVANTAGES = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "reinforce++": reinforce_plus_plus,
    "reinforce++_baseline": reinforce_plus_plus_baseline,
}


def _group_statistics(scores: Scores) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(mean, unbiased standard deviation, size) of each sample's group; a group of one has
    deviation 0.
    """
    _, place_N = np.unique(scores.group_N, return_inverse=True)
    size = np.bincount(place_N)
    mean_N = (np.bincount(place_N, scores.totals_N) / size)[place_N]
    variance = np.bincount(place_N, (scores.totals_N - mean_N) ** 2) / np.maximum(size - 1, 1)
    return mean_N, np.sqrt(variance)[place_N], size[place_N]


def whiten(x_T: np.ndarray, mask_T: np.ndarray) -> np.ndarray:
    """(x - mean) / sqrt(variance + 1e-8) over the tokens that count, which are all of the global
    batch; 0 at the others.
    """
    count = max(mask_T.sum(), 1)
    mean = (x_T * mask_T).sum() / count
    variance = ((x_T - mean) ** 2 * mask_T).sum() / count
    return (x_T - mean) / np.sqrt(variance + 1e-8) * mask_T


def gae(
    rewards_L: np.ndarray, values_L: np.ndarray, mask_L: np.ndarray, *, gamma: float, lam: float
) -> tuple[np.ndarray, np.ndarray]:
    """Generalized advantage estimation over one response, arXiv 1506.02438, equation 16:
    (advantages, returns), float64 [L] each.

        delta = r + gamma V' - V        A = delta + gamma lam A'        return = A + V

    V' and A' are those of the next token that counts, 0 after the last: what a tool wrote is no
    step of the policy. It gets 0 itself.
    """
    advantages_L, returns_L = np.zeros(len(mask_L)), np.zeros(len(mask_L))
    next_value = next_advantage = 0.0
    for t in np.flatnonzero(mask_L)[::-1]:
        next_advantage = (
            rewards_L[t] + gamma * next_value - values_L[t] + gamma * lam * next_advantage
        )
        next_value = values_L[t]
        advantages_L[t], returns_L[t] = next_advantage, next_advantage + next_value
    return advantages_L, returns_L


def overlong_penalty(length: int, *, max_tokens: int, buffer: int) -> float:
    """What a response loses for coming near the limit, 0 to -1: DAPO, arXiv 2503.14476, equation
    13. buffer 0: nothing.

    A cut-off response is wrong whatever it said; the penalty lets the last `buffer` tokens before
    the limit announce it.
    """
    if buffer == 0:
        return 0.0
    return max(-1.0, min(0.0, (max_tokens - buffer - length) / buffer))
