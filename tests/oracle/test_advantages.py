"""Every advantage, GAE and the overlong penalty against the oracle, and by hand.

Why: a biased deviation or a mean over the wrong samples still trains, only worse. Groups come in
any order and size, with ids that are large or skip numbers. Masked tokens must get exactly 0. Not
covered: how fast they are.
"""

import math

import numpy as np
import pytest

import advantages
import oracle
from packed_batches import assert_same

# ---- Advantages ----

GROUPS = {
    "even": [0, 0, 0, 1, 1, 1],
    "ragged, interleaved": [1, 0, 1, 1, 0, 1],
    "ids that do not occur": [40, 3, 40, 11, 3, 40],
    "large ids": [2**40, 5, 2**40, 2**40 + 1, 5, 2**40],
    "groups of one": [7, 2, 7, 9, 4, 7],
    "one sample": [5],
    "no samples": [],
}
COUNTING = {
    "all count": [[1, 1, 1], [1], [1, 1, 1, 1, 1], [1, 1], [1, 1, 1, 1], [1, 1]],
    "tool tokens": [[1, 0, 1], [0, 1], [1, 0, 0, 1, 1], [1, 1], [0, 1, 1, 0], [1, 0]],
    "samples that do not count": [[0, 0, 0], [1], [], [0, 0], [1, 0, 1, 1], [1, 1]],
    "nothing counts": [[0, 0], [0], [], [0], [0, 0], [0]],
}
REWARDS = {
    "normal": lambda rng, n: rng.normal(0, 1, n),
    "binary": lambda rng, n: rng.integers(0, 2, n) * 1.0,
    "equal": lambda rng, n: np.full(n, 0.1),
}


def scores(outcomes: oracle.Outcomes) -> advantages.Scores:
    return advantages.Scores(
        outcomes.rewards_N,
        outcomes.group_N,
        outcomes.lengths_N,
        outcomes.mask_T,
        outcomes.penalties_T,
    )


def make_outcomes(
    groups: list[int], masks: list[list[int]], rewards_N, penalty: float, rng
) -> oracle.Outcomes:
    masks = masks[: len(groups)]
    mask_T = np.array([x for mask in masks for x in mask], dtype=np.float64)
    lengths_N = np.array([len(mask) for mask in masks], dtype=np.int64)
    # Masked tokens have penalties too. They must not be subtracted.
    penalties_T = penalty * rng.normal(0, 1, len(mask_T))
    return oracle.Outcomes(
        np.asarray(rewards_N, dtype=np.float64),
        np.array(groups, dtype=np.int64),
        lengths_N,
        mask_T,
        penalties_T,
    )


@pytest.mark.parametrize("penalty", [0.0, 0.5])
@pytest.mark.parametrize("counting", COUNTING)
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("name", oracle.ADVANTAGES)
def test_advantage(name, groups, counting, penalty):
    for seed, rewards in enumerate(REWARDS):
        rng = np.random.default_rng(seed)
        outcomes = make_outcomes(
            GROUPS[groups],
            COUNTING[counting],
            REWARDS[rewards](rng, len(GROUPS[groups])),
            penalty,
            rng,
        )
        got_T = advantages.ADVANTAGES[name](scores(outcomes))
        assert_same(got_T, oracle.ADVANTAGES[name](outcomes))
        assert not got_T[outcomes.mask_T == 0].any()


def test_advantages_by_hand():
    # One of four samples is right. The mean is 1/4, the unbiased deviation
    # sqrt((9 + 1 + 1 + 1) / 16 / 3) = 1/2. Without the right one the mean of the others is 0.
    outcomes = make_outcomes([8, 8, 8, 8], [[1]] * 4, [1, 0, 0, 0], 0.0, np.random.default_rng(0))
    expected = {
        "dr_grpo": [3 / 4] + [-1 / 4] * 3,
        "grpo": [3 / 2] + [-1 / 2] * 3,
        "rloo": [1] + [-1 / 3] * 3,
    }
    # Over all four tokens the deviation is sqrt(3) / 4.
    expected["reinforce++"] = expected["reinforce++_baseline"] = [math.sqrt(3)] + [
        -1 / math.sqrt(3)
    ] * 3
    for name, values in expected.items():
        assert advantages.ADVANTAGES[name](scores(outcomes)).tolist() == pytest.approx(
            values, abs=1e-5
        ), name
    # One sample with penalties 2, 9 (at a tool token) and 0: the returns -2 and 0 become -1 and 1.
    outcomes = make_outcomes([0], [[1, 0, 1]], [0], 0.0, np.random.default_rng(0))
    outcomes.penalties_T[:] = [2, 9, 0]
    assert advantages.ADVANTAGES["reinforce++"](scores(outcomes)).tolist() == pytest.approx(
        [-1, 0, 1], abs=1e-6
    )


@pytest.mark.parametrize(
    "gamma, lam", [(1.0, 1.0), (1.0, 0.95), (0.9, 0.8), (0.9, 0.0), (0.0, 1.0)]
)
@pytest.mark.parametrize(
    "mask",
    [[1], [0], [], [1, 1, 1, 1, 1], [1, 0, 0, 1, 1], [0, 1, 1, 0], [1, 0], [0, 0, 0]],
    ids=str,
)
def test_gae(mask, gamma, lam):
    rng = np.random.default_rng(0)
    rewards_L, values_L, mask_L = (
        rng.normal(0, 1, len(mask)),
        rng.normal(0, 1, len(mask)),
        np.array(mask, dtype=np.float64),
    )
    got = advantages.gae(rewards_L, values_L, mask_L, gamma=gamma, lam=lam)
    for got_L, expected_L in zip(
        got, oracle.gae(rewards_L, values_L, mask_L, gamma=gamma, lam=lam), strict=True
    ):
        assert_same(got_L, expected_L)
        assert not got_L[mask_L == 0].any()


def test_gae_by_hand():
    # The only reward is 1, at the end. With gamma = lam = 1 every return is 1. With lam = 0 the
    # advantage is V_next - V. The tool token (V = 9) does not take part.
    rewards_L, values_L, mask_L = (
        np.array(x, dtype=np.float64) for x in ([0, 0, 0, 1], [0.25, 9, 0.5, 0.75], [1, 0, 1, 1])
    )
    assert advantages.gae(rewards_L, values_L, mask_L, gamma=1.0, lam=1.0)[
        1
    ].tolist() == pytest.approx([1, 0, 1, 1])
    assert advantages.gae(rewards_L, values_L, mask_L, gamma=1.0, lam=0.0)[
        0
    ].tolist() == pytest.approx([0.25, 0, 0.25, 0.25])


@pytest.mark.parametrize("max_tokens, buffer", [(20, 5), (20, 0), (20, 1), (20, 20)])
def test_overlong_penalty(max_tokens, buffer):
    for length in range(0, 2 * max_tokens):
        expected = oracle.overlong_penalty(length, max_tokens=max_tokens, buffer=buffer)
        assert advantages.overlong_penalty(
            length, max_tokens=max_tokens, buffer=buffer
        ) == pytest.approx(expected, abs=1e-12)


def test_overlong_penalty_by_hand():
    # Of at most 20 tokens the last 5 cost 1/5 each.
    got = [
        advantages.overlong_penalty(length, max_tokens=20, buffer=5)
        for length in (15, 16, 18, 20, 21, 100)
    ]
    assert got == pytest.approx([0, -1 / 5, -3 / 5, -1, -1, -1])
