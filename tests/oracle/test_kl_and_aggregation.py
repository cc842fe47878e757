"""KL estimators, aggregations and the loss made of all parts against the oracle.

Why: an estimator can be unbiased as a value and descend the wrong KL. A mean of the ranks' means is
not the mean of the batch. A masked token with an infinite ratio turns the whole model into NaN. How
train_step.py puts the parts together is in test_whole_loss.py. Not covered: context parallelism.
"""

import math

import numpy as np
import pytest
import torch

import losses
import oracle
from packed_batches import (
    BOTH,
    MASKS,
    POLICIES,
    Batch,
    assert_same,
    assert_same_gradients,
    batches,
    bounds_for,
    bounds_of,
    tensor,
)

# ---- KL estimators ----


@batches()
@pytest.mark.parametrize("name", oracle.KL_ESTIMATORS)
def test_kl_estimator(name, batch):
    def kl_of(logprobs_T, estimator=oracle.KL_ESTIMATORS[name]):
        return np.array([estimator(*token) for token in zip(logprobs_T, batch.ref_T, batch.old_T)])

    # low_var_kl has a kink where k3 is 10.
    k3_T = kl_of(batch.logprobs_T, oracle.k3)
    assert (np.abs(np.abs(k3_T) - 10) > 1e-3).all(), "choose another seed"
    x = tensor(batch.logprobs_T, requires_grad=True)
    got_T = losses.KL_ESTIMATORS[name].function(x, tensor(batch.ref_T), tensor(batch.old_T))
    assert_same(got_T, kl_of(batch.logprobs_T), atol=batch.atol)
    assert_same_gradients(got_T, x, kl_of, defined_T=np.full(len(x), True))


def test_k3_beyond_its_bound():
    """At d = -30 the gradient is 0 and does not push the wrong way. At d = 30 it is 1."""
    x = tensor([-30.0, 30.0], requires_grad=True)
    kl_T = losses.KL_ESTIMATORS["k3"].function(x, tensor([0.0, 0.0]), tensor([0.0, 0.0]))
    assert kl_T.tolist() == pytest.approx([math.exp(20) - 21, 29])
    assert torch.autograd.grad(kl_T.sum(), x)[0].tolist() == [0, 1]


def log_softmax(logits_V: np.ndarray) -> np.ndarray:
    return logits_V - np.log(sum(np.exp(x) for x in logits_V))


POLICY_LOGITS = np.array([0.3, -1.2, 0.8, 0.1, -0.4])
REFERENCE_LOGITS = np.array([-0.5, 0.4, 0.2, 1.1, -0.9])
REFERENCE = log_softmax(REFERENCE_LOGITS)
EXPECTED_GRADIENT = {
    "k1": lambda logits_V: 0.0,
    # The reverse KL, KL(policy || reference).
    "k2": (
        lambda logits_V: (np.exp(log_softmax(logits_V)) * (log_softmax(logits_V) - REFERENCE)).sum()
    ),
    # The forward KL, KL(reference || policy).
    "k3": lambda logits_V: (np.exp(REFERENCE) * (REFERENCE - log_softmax(logits_V))).sum(),
}
EXPECTED_GRADIENT["low_var_kl"] = EXPECTED_GRADIENT["k3"]  # here no token reaches the clamp
EXPECTED_GRADIENT["unbiased_k3"] = EXPECTED_GRADIENT["k2"]


@pytest.mark.parametrize("name", EXPECTED_GRADIENT)
def test_expected_gradient_of_a_kl_estimator(name):
    """Compare the gradient that a KL loss has on average over samples of the current policy.

    The average is exact: every token of a vocabulary of 5, weighted with its probability. k1 has no
    gradient on average and k3 that of the wrong KL, although both are unbiased as values.
    """
    logits_V = tensor(POLICY_LOGITS, requires_grad=True)
    logprobs_V = torch.log_softmax(logits_V, dim=0)
    sampled_V = logprobs_V.detach().exp()
    kl_V = losses.KL_ESTIMATORS[name].function(logprobs_V, tensor(REFERENCE), logprobs_V.detach())
    gradient_V = torch.autograd.grad((sampled_V * kl_V).sum(), logits_V)[0]
    assert_same(gradient_V, oracle.jacobian(EXPECTED_GRADIENT[name], POLICY_LOGITS)[0])
    reverse_kl = EXPECTED_GRADIENT["k2"](POLICY_LOGITS)
    unbiased = abs((sampled_V * kl_V).sum().item() - reverse_kl) < 1e-9
    assert unbiased == (name != "k2")


def test_the_two_kl_gradients_differ():
    reverse, forward = (
        oracle.jacobian(EXPECTED_GRADIENT[name], POLICY_LOGITS)[0] for name in ("k2", "k3")
    )
    assert np.abs(reverse).max() > 0.1 and np.abs(reverse - forward).max() > 0.05


# ---- Aggregations: sums of micro-batches against the mean of the whole batch ----


def aggregate(
    name: str, loss_T: torch.Tensor, batch: Batch, cuts: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (numerator, denominator), summed over micro-batches as ranks and steps sum them.

    cuts: the samples at which a micro-batch begins, except the first.
    """
    numerator, denominator = 0, 0
    for first, end in zip([0, *cuts], [*cuts, batch.packed.samples]):
        weight_T, normalizer_N = losses.AGGREGATIONS[name](
            batch.sequences(range(first, end)), max_response_tokens=8
        )
        assert len(normalizer_N) == end - first
        numerator = (
            numerator + (weight_T * loss_T[torch.from_numpy(batch.tokens(range(first, end)))]).sum()
        )
        denominator = denominator + normalizer_N.sum()
    return numerator, denominator


@pytest.mark.parametrize("cuts", [[], [1], [2], [1, 2, 3]])
@pytest.mark.parametrize("layout", list(MASKS)[:-1])
@pytest.mark.parametrize("name", oracle.AGGREGATIONS)
def test_aggregation(name, layout, cuts):
    batch = Batch(layout, "usual", seed=0)
    loss_T = batch.rng.normal(0, 1, len(batch.old_T))
    numerator, denominator = aggregate(name, tensor(loss_T), batch, cuts)
    assert_same(
        numerator / denominator,
        oracle.AGGREGATIONS[name](loss_T, batch.packed, max_response_tokens=8),
    )


@pytest.mark.parametrize("name", oracle.AGGREGATIONS)
def test_a_batch_where_nothing_counts_adds_nothing(name):
    batch = Batch("nothing counts", "usual", seed=0)
    numerator, denominator = aggregate(name, tensor(batch.old_T), batch, [1])
    assert numerator.item() == 0 and denominator.item() == 0


def test_a_mean_of_rank_means_is_not_the_mean():
    # Two ranks have the mean losses 1 (2 tokens) and 3 (8 tokens). The mean of the ranks is 2.0.
    # The mean of the tokens is (2 * 1 + 8 * 3) / 10 = 2.6.
    ranks = [
        losses.Sequences(torch.zeros(n, dtype=torch.int64), torch.ones(n), tensor([float(n)]))
        for n in (2, 8)
    ]
    loss_T = [torch.full((2,), 1.0), torch.full((8,), 3.0)]
    got, of_ranks = {}, {}
    for name in oracle.AGGREGATIONS:
        parts = [losses.AGGREGATIONS[name](sequences, max_response_tokens=8) for sequences in ranks]
        sums = [
            ((weight_T * x).sum().item(), normalizer_N.sum().item())
            for (weight_T, normalizer_N), x in zip(parts, loss_T)
        ]
        numerators, denominators = zip(*sums)
        got[name] = sum(numerators) / sum(denominators)
        of_ranks[name] = sum(numerator / denominator for numerator, denominator in sums) / 2
    assert of_ranks["token"] == pytest.approx(2.0)
    assert got["token"] == pytest.approx(2.6)
    assert got["sequence"] == pytest.approx(2.0)  # each rank has one sample
    assert got["constant"] == pytest.approx((2 * 1 / 8 + 8 * 3 / 8) / 2)


@pytest.mark.parametrize("aggregation", oracle.AGGREGATIONS)
@pytest.mark.parametrize("correction", oracle.CORRECTIONS)
# These seeds have tokens at both bounds and at the dual clip, and samples in and outside of
# sequence_mask.
@pytest.mark.parametrize("seed", [13, 28])
@POLICIES
def test_a_whole_loss(name, bounds, correction, aggregation, seed):
    """The scalar of policy loss, correction and KL loss, and its gradient at each token."""
    batch, kl_coefficient = Batch("tool tokens", "usual", seed), 0.3
    trust = bounds_for(correction, 0.6, 1.6)
    old_T, ref_T = tensor(batch.old_T), tensor(batch.ref_T)
    log_weight_T = tensor(batch.old_T - batch.rollout_T)

    def expected(logprobs_T):
        loss_T = oracle.POLICY_LOSSES[name](
            logprobs_T, batch.logprobs_T, batch.old_T, batch.advantages_T, batch.packed, **bounds
        )[0]
        weight_T, _ = oracle.CORRECTIONS[correction](
            batch.old_T - batch.rollout_T, batch.packed, **trust
        )
        kl_T = [oracle.unbiased_k3(*token) for token in zip(logprobs_T, batch.ref_T, batch.old_T)]
        return oracle.AGGREGATIONS[aggregation](
            weight_T * loss_T + kl_coefficient * np.array(kl_T), batch.packed, max_response_tokens=8
        )

    x, sequences = tensor(batch.logprobs_T, requires_grad=True), batch.sequences()
    loss_T = losses.POLICY_LOSSES[name].function(
        x, old_T, tensor(batch.advantages_T), sequences, **bounds
    )[0]
    loss_T = losses.CORRECTIONS[correction].weight(log_weight_T, sequences, **trust)[0] * loss_T
    loss_T = loss_T + kl_coefficient * losses.KL_ESTIMATORS["unbiased_k3"].function(x, ref_T, old_T)
    numerator, denominator = aggregate(aggregation, loss_T, batch, cuts=[])
    assert_same(numerator / denominator, expected(batch.logprobs_T))
    gradient_T = torch.autograd.grad(numerator / denominator, x)[0]
    assert_same(gradient_T, oracle.jacobian(expected, batch.logprobs_T)[0])
    assert not gradient_T[torch.from_numpy(batch.packed.mask_T == 0)].any()


@batches(["sample at +-50", "token at +-50"])
@pytest.mark.parametrize("aggregation", oracle.AGGREGATIONS)
@pytest.mark.parametrize("policy", BOTH)
def test_masked_tokens_have_exactly_no_gradient(policy, aggregation, batch):
    """The same holds at +-50 and in samples without a counting token.

    There 0 times infinity, or 0 / 0, would be NaN for the whole model.
    """
    x, sequences = tensor(batch.logprobs_T, requires_grad=True), batch.sequences()
    loss_T = losses.POLICY_LOSSES[policy].function(
        x, tensor(batch.old_T), tensor(batch.advantages_T), sequences, **bounds_of(policy)[0]
    )[0]
    gradient_T = torch.autograd.grad(aggregate(aggregation, loss_T, batch, cuts=[])[0], x)[0]
    assert torch.isfinite(gradient_T).all()
    assert not gradient_T[torch.from_numpy(batch.packed.mask_T == 0)].any()
