"""Every algorithm of losses.py and advantages.py against oracle.py, values and gradients.

Why: a wrong sign, a biased deviation or a forgotten stop-gradient still trains, only worse, and no
loss curve says so. The oracle is written one token at a time from the formulas; the shipped
functions must give its values, and their gradients must be finite differences of it, to 1e-6 and,
where log-ratios are +-50, to 1e-6 of the value itself. Batches are packed as in training: samples
one after the other, tool tokens masked in the middle, samples that do not count at all, a filler at
the end. A new entry in a table without an oracle fails here; with one it is compared as all others
are, and what it may be given follows from its entry in losses.py. Not covered: context parallelism
(cp_group), float32, the speed.

    OMP_NUM_THREADS=1 python -m pytest -q tests/oracle
"""

import math

import numpy as np
import oracle
import pytest
import torch

import advantages
import losses

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


def assert_same(shipped: torch.Tensor | np.ndarray, expected, *, atol=1e-8, defined=True):
    """Equal to 1e-6 of the value where the formula says something, and finite everywhere: times a
    weight of 0 the rest must be 0.
    """
    got, expected = (
        np.asarray(shipped.detach() if torch.is_tensor(shipped) else shipped),
        np.asarray(expected, dtype=np.float64),
    )
    assert got.dtype == np.float64 and got.shape == expected.shape
    assert np.isfinite(got).all()
    wrong = ~(np.abs(got - expected) <= 1e-6 * np.abs(expected) + atol) & defined
    assert not wrong.any(), (
        f"{got[wrong]} should be {expected[wrong]} at {np.argwhere(wrong).tolist()}"
    )


def assert_same_gradients(outputs_T: torch.Tensor, inputs_T: torch.Tensor, function, *, defined_T):
    """Row i, column j: how output i moves with input j, so that a token that is not stopped where
    it should be shows off the diagonal.

    Finite differences know a slope to 1e-10 of the output they are taken of, however large or small
    that is.
    """
    got = torch.stack(
        [torch.autograd.grad(output, inputs_T, retain_graph=True)[0] for output in outputs_T]
    )
    x = inputs_T.detach().numpy()
    assert_same(
        got,
        oracle.jacobian(function, x),
        atol=1e-8 * np.abs(function(x))[:, None],
        defined=defined_T[:, None],
    )
    assert not (got - torch.diag(got.diag())).any()


# ---- Packed batches for the losses ----

MASKS = {  # of each sample; the last is the filler that packing appends
    "ragged": [[1, 1, 1], [1, 1, 1, 1, 1, 1], [1], [1, 1, 1, 1], [0, 0, 0]],
    "tool tokens": [[1, 1, 0, 0, 1], [0, 1, 0, 1], [1, 0, 1, 1], [0, 1, 1], [0, 0]],
    "samples that do not count": [[0, 0, 0], [1, 0, 1, 1], [], [0], [1, 1], [0, 0, 0]],
    "nothing counts": [[0, 0, 0], [0], [0, 0]],
}
SPREADS = ["usual", "sample at +-50", "token at +-50"]


class Batch:
    """Log-probs and advantages on one layout; difference() makes a log-ratio of the wanted spread."""

    def __init__(self, layout: str, spread: str, seed: int):
        self.rng, self.spread = np.random.default_rng(seed), spread
        # From e^-50 to e^50 only a relative comparison says something.
        self.atol = 1e-8 if spread == "usual" else 0.0
        masks = MASKS[layout]
        sample_T = np.repeat(np.arange(len(masks)), [len(mask) for mask in masks])
        self.packed = oracle.Packed(sample_T, np.concatenate(masks), samples=len(masks))
        # Else a mean over the sample is undefined.
        self.has_mean_T = np.array([bool(self.packed.counting(n)) for n in sample_T])
        self.old_T = self.rng.uniform(-3, 0, len(sample_T))
        self.logprobs_T = self.old_T + self.difference()
        self.rollout_T = self.old_T - self.difference()
        self.ref_T = self.logprobs_T - self.difference()
        # Negative, 0, positive.
        self.advantages_T = self.rng.uniform(0.5, 2, len(sample_T)) * self.rng.permutation(
            np.arange(len(sample_T)) % 3 - 1
        )

    def difference(self) -> np.ndarray:
        T, N, sample_T = len(self.packed.sample_T), self.packed.samples, self.packed.sample_T
        if self.spread == "usual":
            return self.rng.normal(0, 0.4, N)[sample_T] + self.rng.normal(0, 0.4, T)
        signs = (
            self.rng.permutation(np.arange(N) % 2 * 2 - 1)[sample_T]
            if self.spread == "sample at +-50"
            else self.rng.choice([-1, 1], T)
        )
        return 50 * signs + self.rng.normal(0, 0.1, T)

    def sequences(self, samples: range | None = None) -> losses.Sequences:
        """Of all samples, or of the micro-batch with these."""
        here = self.tokens(samples or range(self.packed.samples))
        counts = [len(self.packed.counting(n)) for n in samples or range(self.packed.samples)]
        first = samples[0] if samples else 0
        return losses.Sequences(
            tensor(self.packed.sample_T[here] - first),
            tensor(self.packed.mask_T[here] * 1.0),
            tensor(counts).double(),
        )

    def tokens(self, samples: range) -> np.ndarray:
        return np.array([n in samples for n in self.packed.sample_T])


def tensor(values, **arguments) -> torch.Tensor:
    return torch.tensor(values, **arguments)


def batches(spreads=SPREADS):
    return pytest.mark.parametrize(
        "batch",
        [
            pytest.param(Batch(layout, spread, seed), id=f"{layout}-{spread}-{seed}")
            for layout in MASKS
            for spread in spreads
            for seed in (0, 1)
        ],
    )


def bounds_of(name: str) -> list[dict]:
    """Return two sets of bounds that a policy loss takes: tight ones, and a dual clip or its own."""
    own = losses.POLICY_LOSSES[name]
    low, high = (None if own.clip_low is None else 0.2, None if own.clip_high is None else 0.28)
    first, *rest = own.only.get("dual_clip", (0.0, 1.5))
    tight = dict(clip_low=low, clip_high=high, dual_clip=first)
    if rest:
        return [tight, tight | dict(dual_clip=rest[-1])]
    return [tight, tight | dict(clip_low=own.clip_low, clip_high=own.clip_high)]


BOTH = [name for name in oracle.POLICY_LOSSES if name in losses.POLICY_LOSSES]
POLICIES = pytest.mark.parametrize(
    "name, bounds", [(name, bounds) for name in BOTH for bounds in bounds_of(name)]
)


def defined(value_T: np.ndarray, batch: Batch) -> np.ndarray:
    """Tell where a formula says something, which is wherever the token's sample has one that
    counts.
    """
    assert np.isfinite(value_T[batch.has_mean_T]).all()
    return ~np.isnan(value_T)


def kinks_of(*, clip_low: float | None, clip_high: float | None, dual_clip: float) -> list[float]:
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
EXACT = {  # whether the clip holds, by the ratio and the advantage's sign
    "ppo": ONE_SIDED,
    "gspo": ONE_SIDED,
    "cispo": {("below", -1, True), ("below", 1, True), ("above", 1, True), ("above", -1, True)},
}


@pytest.mark.parametrize("name", BOTH)
def test_the_batches_reach_every_branch(name):
    """Otherwise the comparisons above could agree on the easy half of the formulas."""
    seen, (plain, other) = set(), bounds_of(name)
    for batch in (Batch("ragged", spread, seed) for spread in SPREADS for seed in (0, 1)):
        arguments = (
            batch.logprobs_T,
            batch.logprobs_T,
            batch.old_T,
            batch.advantages_T,
            batch.packed,
        )
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
    # Ratio 2, advantage 3: PPO stops at 1.28 * 3 and has no gradient; CISPO weighs l = log 2 with
    # 1.28 and keeps it. Advantage -3: 2 * 3, dual clip 1.5 * 3.
    one = losses.Sequences(tensor([0, 0]), tensor([1.0, 1.0]), tensor([2.0]))
    x, old_T, advantages_T = (
        tensor([math.log(2)] * 2, requires_grad=True),
        tensor([0.0, 0.0]),
        tensor([3.0, -3.0]),
    )
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


# ---- Corrections ----


def bounds_for(correction: str, low: float, high: float) -> dict:
    """These bounds, but for those that the correction does not have."""
    own = losses.CORRECTIONS[correction]
    return dict(low=None if own.low is None else low, high=None if own.high is None else high)


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
    # Sample 0 has weights 2, 1/2 and, at a tool token, 8: its geometric mean over the counting
    # tokens is 1. Sample 1 has 3 and 3. Bounds are inclusive.
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
    cut = {
        "none": [0, 0, 0, 0, 0],
        "tis": [0, 1, 0, 1, 1],
        "icepop": [0, 1, 1, 1, 1],
        "decoupled": [0, 1, 0, 1, 1],
    }
    cut["sequence_mask"] = [0, 0, 0, 1, 1]
    for name, weights in expected.items():
        weight = losses.CORRECTIONS[name].weight
        weight_T, cut_T = weight(log_weight_T, sequences, **bounds_for(name, 0.75, 2.5))
        assert weight_T.tolist() == pytest.approx(weights) and cut_T.tolist() == cut[name], name
        weight_T, cut_T = weight(0 * log_weight_T, sequences, **bounds_for(name, 1.0, 1.0))
        assert weight_T.tolist() == [1] * 5 and not cut_T.any(), name


# ---- KL estimators ----


@batches()
@pytest.mark.parametrize("name", oracle.KL_ESTIMATORS)
def test_kl_estimator(name, batch):
    def kl_of(logprobs_T):
        return np.array(
            [
                oracle.KL_ESTIMATORS[name](*token)
                for token in zip(logprobs_T, batch.ref_T, batch.old_T)
            ]
        )

    assert (
        np.abs(
            np.abs([oracle.k3(*token) for token in zip(batch.logprobs_T, batch.ref_T, batch.old_T)])
            - 10
        )
        > 1e-3
    ).all(), "choose another seed"
    x = tensor(batch.logprobs_T, requires_grad=True)
    got_T = losses.KL_ESTIMATORS[name].function(x, tensor(batch.ref_T), tensor(batch.old_T))
    assert_same(got_T, kl_of(batch.logprobs_T), atol=batch.atol)
    assert_same_gradients(got_T, x, kl_of, defined_T=np.full(len(x), True))


def test_k3_beyond_its_bound():
    """At d = -30 nothing is left of the gradient, not a push the wrong way; at d = 30 it is 1."""
    x = tensor([-30.0, 30.0], requires_grad=True)
    kl_T = losses.KL_ESTIMATORS["k3"].function(x, tensor([0.0, 0.0]), tensor([0.0, 0.0]))
    assert kl_T.tolist() == pytest.approx([math.exp(20) - 21, 29])
    assert torch.autograd.grad(kl_T.sum(), x)[0].tolist() == [0, 1]


def log_softmax(logits_V: np.ndarray) -> np.ndarray:
    return logits_V - np.log(sum(np.exp(x) for x in logits_V))


POLICY_LOGITS, REFERENCE_LOGITS = (
    np.array([0.3, -1.2, 0.8, 0.1, -0.4]),
    np.array([-0.5, 0.4, 0.2, 1.1, -0.9]),
)
REFERENCE = log_softmax(REFERENCE_LOGITS)
EXPECTED_GRADIENT = {
    "k1": lambda logits_V: 0.0,
    "k2": (
        lambda logits_V: (np.exp(log_softmax(logits_V)) * (log_softmax(logits_V) - REFERENCE)).sum()
    ),  # reverse: KL(policy || reference)
    "k3": (
        lambda logits_V: (np.exp(REFERENCE) * (REFERENCE - log_softmax(logits_V))).sum()
    ),  # forward: KL(reference || policy)
}
EXPECTED_GRADIENT["low_var_kl"] = EXPECTED_GRADIENT["k3"]  # no token is at the clamp here
EXPECTED_GRADIENT["unbiased_k3"] = EXPECTED_GRADIENT["k2"]


@pytest.mark.parametrize("name", EXPECTED_GRADIENT)
def test_expected_gradient_of_a_kl_estimator(name):
    """What a KL loss on samples of the current policy really descends, exactly: every token of a
    vocabulary of 5, weighted with its probability.

    k1 has no gradient on average and k3 that of the wrong KL, although both are unbiased as values.
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
    """(numerator, denominator) summed over micro-batches that begin at these samples, as ranks and
    accumulation steps do.
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
    # Two ranks with mean losses 1 (2 tokens) and 3 (8 tokens). Averaging the ranks gives 2.0; the
    # tokens say (2 * 1 + 8 * 3) / 10 = 2.6.
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
        got[name] = sum(numerator for numerator, _ in sums) / sum(
            denominator for _, denominator in sums
        )
        of_ranks[name] = sum(numerator / denominator for numerator, denominator in sums) / 2
    assert of_ranks["token"] == pytest.approx(2.0) and got["token"] == pytest.approx(2.6)
    assert got["sequence"] == pytest.approx(2.0)  # here each rank has one sample
    assert got["constant"] == pytest.approx((2 * 1 / 8 + 8 * 3 / 8) / 2)


@pytest.mark.parametrize("aggregation", oracle.AGGREGATIONS)
@pytest.mark.parametrize("correction", oracle.CORRECTIONS)
@pytest.mark.parametrize(
    "seed", [13, 28]
)  # with tokens at both bounds and at the dual clip, responses in and outside of sequence_mask
@POLICIES
def test_a_whole_loss(name, bounds, correction, aggregation, seed):
    """Policy loss with correction and KL loss, aggregated: the scalar and its gradient, each
    token's with all others in place.
    """
    batch, kl_coefficient = Batch("tool tokens", "usual", seed), 0.3
    trust = bounds_for(correction, 0.6, 1.6)
    old_T, ref_T, log_weight_T = (
        tensor(batch.old_T),
        tensor(batch.ref_T),
        tensor(batch.old_T - batch.rollout_T),
    )

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
    """Also at +-50 and in samples without a counting token: 0 times infinity, or 0 / 0, would be
    NaN for the whole model.
    """
    x, sequences = tensor(batch.logprobs_T, requires_grad=True), batch.sequences()
    loss_T = losses.POLICY_LOSSES[policy].function(
        x, tensor(batch.old_T), tensor(batch.advantages_T), sequences, **bounds_of(policy)[0]
    )[0]
    gradient_T = torch.autograd.grad(aggregate(aggregation, loss_T, batch, cuts=[])[0], x)[0]
    assert torch.isfinite(gradient_T).all()
    assert not gradient_T[torch.from_numpy(batch.packed.mask_T == 0)].any()


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
    # At masked tokens too, where they must not be taken.
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
    # One of four samples is right. Mean 1/4, unbiased deviation sqrt((9 + 1 + 1 + 1) / 16 / 3) =
    # 1/2; the others of the right one have mean 0.
    outcomes = make_outcomes([8, 8, 8, 8], [[1]] * 4, [1, 0, 0, 0], 0.0, np.random.default_rng(0))
    expected = {
        "dr_grpo": [3 / 4] + [-1 / 4] * 3,
        "grpo": [3 / 2] + [-1 / 2] * 3,
        "rloo": [1] + [-1 / 3] * 3,
    }
    # Deviation sqrt(3) / 4 over all four tokens.
    expected["reinforce++"] = expected["reinforce++_baseline"] = [math.sqrt(3)] + [
        -1 / math.sqrt(3)
    ] * 3
    for name, values in expected.items():
        assert advantages.ADVANTAGES[name](scores(outcomes)).tolist() == pytest.approx(
            values, abs=1e-5
        ), name
    # One sample, penalties 2, (9 at a tool token) and 0: the returns -2 and 0 are whitened to -1
    # and 1.
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
    # The only reward is 1 at the end. gamma = lam = 1: every return is 1. lam = 0: one step of it,
    # A = V_next - V; the tool token (V = 9) is not there.
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
    # Limit 20, the last 5 tokens cost 1/5 each.
    got = [
        advantages.overlong_penalty(length, max_tokens=20, buffer=5)
        for length in (15, 16, 18, 20, 21, 100)
    ]
    assert got == pytest.approx([0, -1 / 5, -3 / 5, -1, -1, -1])
