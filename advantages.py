"""Rewards -> advantages, as pure functions of arrays.

An estimator is a function Scores -> advantages_T, float64 [T], 0 where a token does not count. It
sees the whole batch, and every rank computes the same result: group statistics and whitening are
global. In the formulas R is the reward of a sample minus its penalties, Scores.totals_N.

Shape letters: N samples of the global batch; T the response tokens of all of them, sample after
sample; L tokens of one response.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Scores:
    """What an estimator knows about a batch."""

    rewards_N: np.ndarray  # float64: the reward of each sample
    group_N: np.ndarray  # int64: the sample's group; one group answers one prompt
    lengths_N: np.ndarray  # int64: response tokens of each sample
    mask_T: np.ndarray  # float64: 1 where the token counts, because the policy sampled it; else 0
    penalties_T: np.ndarray  # float64: subtracted from the reward, with --kl-in reward the KL

    @property
    def sample_T(self) -> np.ndarray:
        """Return the index of each token's sample, int64."""
        return np.repeat(np.arange(len(self.lengths_N)), self.lengths_N)

    @property
    def totals_N(self) -> np.ndarray:
        """Return each sample's reward minus the penalties of its counting tokens, float64."""
        penalties_T = self.penalties_T * self.mask_T
        return self.rewards_N - np.bincount(self.sample_T, penalties_T, len(self.rewards_N))

    def at_tokens(self, x_N: np.ndarray) -> np.ndarray:
        """Return each sample's value at its counting tokens, 0 at the others: [N] -> [T]."""
        return x_N[self.sample_T] * self.mask_T


def grpo(scores: Scores) -> np.ndarray:
    """Compute (R - mean) / (std + 1e-6) over the group: GRPO, arXiv 2402.03300, section 4.1.2.

    std is the unbiased estimate, as in TRL and slime. A group with equal rewards gets 0.
    """
    mean_N, std_N, _ = _group_statistics(scores)
    return scores.at_tokens((scores.totals_N - mean_N) / (std_N + 1e-6))


def dr_grpo(scores: Scores) -> np.ndarray:
    """Compute R - mean over the group: Dr. GRPO, arXiv 2503.20783.

    A division by std would give more weight to groups that nearly always or nearly never succeed.
    """
    mean_N, _, _ = _group_statistics(scores)
    return scores.at_tokens(scores.totals_N - mean_N)


def rloo(scores: Scores) -> np.ndarray:
    """Compute R - mean over the other samples of the group: RLOO, arXiv 2402.14740, equation 9.

    In a group of n samples this equals (R - mean) n / (n - 1). A group of one gets 0.
    """
    mean_N, _, size_N = _group_statistics(scores)
    return scores.at_tokens((scores.totals_N - mean_N) * size_N / np.maximum(size_N - 1, 1))


def reinforce_plus_plus(scores: Scores) -> np.ndarray:
    """Compute the undiscounted return, whitened: REINFORCE++, arXiv 2501.03262, equations 3 and 8.

    The return at a token is the sample's reward minus the penalties of this and all later tokens.
    """
    returns_T = np.zeros_like(scores.mask_T)
    penalties_T = scores.penalties_T * scores.mask_T
    ends_N = np.cumsum(scores.lengths_N)
    starts_N = ends_N - scores.lengths_N
    for reward, start, end in zip(scores.rewards_N, starts_N, ends_N):
        penalties_to_go_L = np.cumsum(penalties_T[start:end][::-1])[::-1]
        returns_T[start:end] = reward - penalties_to_go_L
    return whiten(returns_T, scores.mask_T)


def reinforce_plus_plus_baseline(scores: Scores) -> np.ndarray:
    """Compute R - mean over the group, whitened: REINFORCE++-baseline, arXiv 2501.03262, 3.2.

    The group gives the baseline; the batch, not the group, gives the scale.
    """
    return whiten(dr_grpo(scores), scores.mask_T)


# EDIT HERE: advantage. Write a function above, give it a name here: --advantage takes it.
# tests/oracle/advantage_formulas.py needs an entry of the same name.
ADVANTAGES = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "reinforce++": reinforce_plus_plus,
    "reinforce++_baseline": reinforce_plus_plus_baseline,
}


def _group_statistics(scores: Scores) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (mean, unbiased std, size) of each sample's group, [N]; a lone sample has std 0."""
    _, index_N = np.unique(scores.group_N, return_inverse=True)
    size = np.bincount(index_N)
    mean_N = (np.bincount(index_N, scores.totals_N) / size)[index_N]
    squares = np.bincount(index_N, (scores.totals_N - mean_N) ** 2)
    std = np.sqrt(squares / np.maximum(size - 1, 1))
    return mean_N, std[index_N], size[index_N]


def whiten(x_T: np.ndarray, mask_T: np.ndarray) -> np.ndarray:
    """Return (x - mean) / sqrt(variance + 1e-8) over the counting tokens, 0 at the others."""
    count = max(mask_T.sum(), 1)
    mean = (x_T * mask_T).sum() / count
    variance = ((x_T - mean) ** 2 * mask_T).sum() / count
    return (x_T - mean) / np.sqrt(variance + 1e-8) * mask_T


def gae(
    rewards_L: np.ndarray, values_L: np.ndarray, mask_L: np.ndarray, *, gamma: float, lam: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return GAE's (advantages, returns) of one response, float64 [L]: arXiv 1506.02438, eq. 16.

    It needs a critic: only examples/ppo_critic.py uses it.

        delta = r + gamma V' - V        A = delta + gamma lam A'        return = A + V

    V' and A' are those of the next counting token, 0 after the last. Tokens that do not count, such
    as a tool's output, are no steps of the policy and get 0.
    """
    advantages_L, returns_L = np.zeros(len(mask_L)), np.zeros(len(mask_L))
    next_value = next_advantage = 0.0
    for t in np.flatnonzero(mask_L)[::-1]:
        delta = rewards_L[t] + gamma * next_value - values_L[t]
        next_advantage = delta + gamma * lam * next_advantage
        next_value = values_L[t]
        advantages_L[t], returns_L[t] = next_advantage, next_advantage + next_value
    return advantages_L, returns_L


def overlong_penalty(length: int, *, max_tokens: int, buffer: int) -> float:
    """Return DAPO's penalty, 0 to -1, of a response near the limit: arXiv 2503.14476, equation 13.

    It falls linearly over the last `buffer` tokens before the limit; buffer 0 turns it off. A
    cut-off response is wrong whatever it said. The penalty makes long responses worse before that.
    """
    if buffer == 0:
        return 0.0
    return max(-1.0, min(0.0, (max_tokens - buffer - length) / buffer))
