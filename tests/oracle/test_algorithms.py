"""Policy losses and corrections against oracle.py: values and gradients.

Why: a wrong sign or a forgotten stop-gradient still trains, only worse, and no loss curve shows it.
The oracle is written one token at a time from the formulas. The shipped functions must give its
values, and their gradients must equal its finite differences, to 1e-6. Where log-ratios are +-50,
that is 1e-6 of the value itself. KL estimators and aggregations are in test_kl_and_aggregation.py,
advantages in test_advantages.py.

An entry in a table without an oracle fails here. With one it is compared as all others are; its
entry in losses.py says which bounds it takes. Not covered: context parallelism (cp_group), float32,
the speed.

    OMP_NUM_THREADS=1 python -m pytest -q tests/oracle
"""

import math

import numpy as np
import pytest
import torch

import advantages
import losses
import oracle
from packed_batches import (
    BOTH,
    POLICIES,
    SPREADS,
    Batch,
    assert_same,
    assert_same_gradients,
    batches,
    bounds_for,
    bounds_of,
    defined,
    tensor,
)

TABLES = [
    (advantages.ADVANTAGES, oracle.ADVANTAGES),
    (losses.POLICY_LOSSES, oracle.POLICY_LOSSES),
    (losses.CORRECTIONS, oracle.CORRECTIONS),
    (losses.KL_ESTIMATORS, oracle.KL_ESTIMATORS),
    (losses.AGGREGATIONS, oracle.AGGREGATIONS),
]


@pytest.mark.parametrize(
    "shipped, independent",
    TABLES,
    ids=["advantages", "policy losses", "corrections", "kl estimators", "aggregations"],
)
def test_every_algorithm_has_an_oracle(shipped, independent):
    assert set(shipped) == set(independent)


def kinks_of(
    *, clip_low: float | None, clip_high: float | None, dual_clip: float, **taus: float
) -> list[float]:
    """Return the ratios at which a policy loss with these bounds has no derivative."""
    low, high = ([] if clip is None else [clip] for clip in (clip_low, clip_high))
    kinks = [*(1 - clip for clip in low), *(1 + clip for clip in high), dual_clip]
    return [kink for kink in kinks if kink]


@batches()
@POLICIES
def test_policy_loss(name, bounds, batch):
    constants = batch.old_T, batch.advantages_T

    def expected(logprobs_T):
        return oracle.POLICY_LOSSES[name](
            logprobs_T, batch.logprobs_T, *constants, batch.packed, **bounds
        )

    loss_T, ratio_T, clipped_T = expected(batch.logprobs_T)
    defined_T = defined(loss_T, batch)
    for kink in kinks_of(**bounds):
        assert (np.abs(ratio_T[defined_T] - kink) > 1e-4).all(), (
            "choose another seed: finite differences would step over a kink"
        )

    x = tensor(batch.logprobs_T, requires_grad=True)
    got_loss_T, got_ratio_T, got_clipped_T = losses.POLICY_LOSSES[name].function(
        x, *map(tensor, constants), batch.sequences(), **bounds
    )
    assert_same(got_loss_T, loss_T, atol=batch.atol, defined=defined_T)
    assert_same(got_ratio_T, ratio_T, atol=batch.atol, defined=defined_T)
    assert got_clipped_T.dtype == torch.bool
    assert (got_clipped_T.numpy() == clipped_T)[defined_T].all()
    assert_same_gradients(
        got_loss_T, x, lambda logprobs_T: expected(logprobs_T)[0], defined_T=defined_T
    )


ONE_SIDED = {
    ("below", -1, True),
    ("below", 1, False),
    ("above", 1, True),
    ("above", -1, False),
    ("dual clip", -1),
}
EXACT = {  # (place of the ratio, sign of the advantage, whether it is clipped)
    "ppo": ONE_SIDED,
    "gspo": ONE_SIDED,
    "cispo": {("below", -1, True), ("below", 1, True), ("above", 1, True), ("above", -1, True)},
}


@pytest.mark.parametrize("name", BOTH)
def test_the_batches_reach_every_branch(name):
    """Without this the comparisons above could agree on the easy half of the formulas."""
    seen, (plain, other) = set(), bounds_of(name)
    for batch in (Batch("ragged", spread, seed) for spread in SPREADS for seed in (0, 1)):
        logprobs_T, old_T = batch.logprobs_T, batch.old_T
        arguments = (logprobs_T, logprobs_T, old_T, batch.advantages_T, batch.packed)
        loss_T, ratio_T, clipped_T = oracle.POLICY_LOSSES[name](*arguments, **plain)
        other_loss_T = oracle.POLICY_LOSSES[name](*arguments, **other)[0]
        for t in np.flatnonzero(batch.packed.mask_T):
            region = "below" if ratio_T[t] < 0.8 else "above" if ratio_T[t] > 1.28 else "inside"
            seen.add((region, np.sign(batch.advantages_T[t]), bool(clipped_T[t])))
            if other["dual_clip"] and other_loss_T[t] < loss_T[t]:
                seen.add(("dual clip", np.sign(batch.advantages_T[t])))
    inside = {("inside", sign, False) for sign in (-1, 0, 1)} if name in EXACT else set()
    assert seen >= EXACT.get(name, set()) | inside
    assert {one[:2] for one in seen} >= {
        (r, sign) for r in ("below", "inside", "above") for sign in (-1, 0, 1)
    }


def test_policy_losses_by_hand():
    # With ratio 2 and advantage 3, PPO stops at 1.28 * 3 and has no gradient. CISPO weighs
    # l = log 2 with 1.28 and keeps its gradient. With advantage -3 the loss is 2 * 3, and with a
    # dual clip 1.5 * 3.
    one = losses.Sequences(tensor([0, 0]), tensor([1.0, 1.0]), tensor([2.0]))
    x = tensor([math.log(2)] * 2, requires_grad=True)
    old_T, advantages_T = tensor([0.0, 0.0]), tensor([3.0, -3.0])
    loss_T, _, clipped_T = losses.POLICY_LOSSES["ppo"].function(
        x, old_T, advantages_T, one, clip_low=0.2, clip_high=0.28, dual_clip=0.0
    )
    assert loss_T.tolist() == pytest.approx([-1.28 * 3, 2 * 3])
    assert clipped_T.tolist() == [True, False]
    assert torch.autograd.grad(loss_T.sum(), x)[0].tolist() == pytest.approx([0, 2 * 3])
    loss_T, _, clipped_T = losses.POLICY_LOSSES["ppo"].function(
        x, old_T, advantages_T, one, clip_low=0.2, clip_high=0.28, dual_clip=1.5
    )
    assert loss_T.tolist() == pytest.approx([-1.28 * 3, 1.5 * 3])
    assert clipped_T.tolist() == [True, False]
    assert torch.autograd.grad(loss_T.sum(), x)[0].tolist() == pytest.approx([0, 0])
    loss_T, _, clipped_T = losses.POLICY_LOSSES["cispo"].function(
        x, old_T, advantages_T, one, clip_low=0.2, clip_high=0.28, dual_clip=0.0
    )
    assert loss_T.tolist() == pytest.approx([-1.28 * 3 * math.log(2), 1.28 * 3 * math.log(2)])
    assert clipped_T.tolist() == [True, True]
    assert torch.autograd.grad(loss_T.sum(), x)[0].tolist() == pytest.approx([-1.28 * 3, 1.28 * 3])


@pytest.mark.parametrize("advantage", [1.5, -0.7])
def test_gmpo_descends_the_papers_product(advantage):
    """The token form has the value and the whole gradient of a root of a product.

    Log-ratios are inside and beyond both bounds, and a tool token stands between them.
    """
    clips = dict(clip_low=0.4, clip_high=0.3)
    x_T, mask_T = np.array([0.1, -0.6, 5.0, 0.7, -0.2]), np.array([1.0, 1, 0, 1, 1])
    counts_T = mask_T == 1

    def papers(counting_C: np.ndarray) -> float:
        return oracle.geometric_mean_loss(counting_C, advantage, **clips)

    sequences = losses.Sequences(tensor([0] * 5), tensor(mask_T), tensor([4.0]))
    old_T, advantages_T = tensor(np.full(5, -1.0)), tensor(np.full(5, advantage))
    x = tensor(x_T - 1.0, requires_grad=True)
    loss_T, *_ = losses.gmpo(x, old_T, advantages_T, sequences, **clips, dual_clip=0.0)
    weight_T, normalizer_N = losses.per_sequence(sequences, max_response_tokens=9)
    loss = (weight_T * loss_T).sum() / normalizer_N.sum()
    assert float(loss) == pytest.approx(papers(x_T[counts_T]), rel=1e-9)
    got_T = torch.autograd.grad(loss, x)[0].numpy()
    assert got_T[counts_T] == pytest.approx(oracle.jacobian(papers, x_T[counts_T])[0], abs=1e-8)
    assert got_T[~counts_T] == [0]


def test_sapo_by_hand():
    # At ratio 1 the gate is 2 / tau with slope 1, so the gradient is that of PPO. At ratio 3 and
    # tau 1 it is 4 sigmoid(2), and its slope in the log-prob 4 sigmoid(2) (1 - sigmoid(2)) 3.
    one = losses.Sequences(tensor([0] * 3), tensor([1.0] * 3), tensor([3.0]))
    x = tensor([0.0, 0.0, math.log(3)], dtype=torch.float64, requires_grad=True)
    old_T, advantages_T = tensor([0.0] * 3).double(), tensor([3.0, -3.0, 1.0]).double()
    taus = dict(tau_pos=1.0, tau_neg=2.0)
    none = dict(clip_low=None, clip_high=None, dual_clip=0.0)
    loss_T, ratio_T, clipped_T = losses.sapo(x, old_T, advantages_T, one, **taus, **none)
    sigmoid = 1 / (1 + math.exp(-2))
    assert loss_T.tolist() == pytest.approx([-3 * 2, 3 * 1, -4 * sigmoid])
    slopes = torch.autograd.grad(loss_T.sum(), x)[0].tolist()
    assert slopes == pytest.approx([-3, 3, -4 * sigmoid * (1 - sigmoid) * 3])
    assert ratio_T.tolist() == pytest.approx([1, 1, 3]) and not clipped_T.any()


@batches()
@pytest.mark.parametrize("low, high", [(0.5, 2.0), (0.9, 1.1), (0.0, 1e30)])
@pytest.mark.parametrize("name", oracle.CORRECTIONS)
def test_correction(name, low, high, batch):
    log_weight_T, bounds = batch.old_T - batch.rollout_T, bounds_for(name, low, high)
    weight_T, cut_T = losses.CORRECTIONS[name].weight(
        tensor(log_weight_T), batch.sequences(), **bounds
    )
    expected_T, expected_cut_T = oracle.CORRECTIONS[name](log_weight_T, batch.packed, **bounds)
    defined_T = defined(expected_T, batch)
    assert_same(weight_T, expected_T, atol=batch.atol, defined=defined_T)
    assert cut_T.dtype == torch.bool and (cut_T.numpy() == expected_cut_T)[defined_T].all()


def test_corrections_by_hand():
    # Sample 0 has weights 2 and 1/2, and 8 at a tool token. Its geometric mean over the counting
    # tokens is 1. Sample 1 has 3 and 3. A weight at a bound is inside.
    log_weight_T = tensor([math.log(w) for w in (2, 8, 1 / 2, 3, 3)], dtype=torch.float64)
    sequences = losses.Sequences(
        tensor([0, 0, 0, 1, 1]), tensor([1.0, 0.0, 1.0, 1.0, 1.0]), tensor([2.0, 2.0])
    )
    expected = {
        "none": [1, 1, 1, 1, 1],
        "tis": [2, 2.5, 0.5, 2.5, 2.5],
        "icepop": [2, 0, 0, 0, 0],
        "decoupled": [2, 0, 0.5, 0, 0],
    }
    expected["sequence_mask"] = [1, 1, 1, 0, 0]
    expected["sequence_tis"] = [1, 1, 1, 2.5, 2.5]
    cut = {
        "none": [0, 0, 0, 0, 0],
        "tis": [0, 1, 0, 1, 1],
        "icepop": [0, 1, 1, 1, 1],
        "decoupled": [0, 1, 0, 1, 1],
    }
    cut["sequence_mask"] = cut["sequence_tis"] = [0, 0, 0, 1, 1]
    for name, weights in expected.items():
        weight = losses.CORRECTIONS[name].weight
        weight_T, cut_T = weight(log_weight_T, sequences, **bounds_for(name, 0.75, 2.5))
        assert weight_T.tolist() == pytest.approx(weights), name
        assert cut_T.tolist() == cut[name], name
        weight_T, cut_T = weight(0 * log_weight_T, sequences, **bounds_for(name, 1.0, 1.0))
        assert weight_T.tolist() == [1] * 5, name
        assert not cut_T.any(), name
