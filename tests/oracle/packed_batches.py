"""Packed batches for the oracle's tests, and comparisons of values and gradients.

A batch is packed as in training: samples one after the other, and a filler at the end. Some have
tool tokens masked in the middle, some have no counting token.
"""

import numpy as np
import pytest
import torch

import losses
import oracle


def assert_same(shipped: torch.Tensor | np.ndarray, expected, *, atol=1e-8, defined=True):
    """Assert equality to 1e-6 of the value where the formula defines one.

    The rest must be finite: it is multiplied by a weight of 0, and must give 0.
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
    """Assert that output i (row) moves with input j (column) as finite differences say.

    A missing stop-gradient shows off the diagonal. Finite differences know a slope to 1e-10 of the
    output, however large or small that is.
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

MASKS = {  # of each sample; the last one is the filler that packing appends
    "ragged": [[1, 1, 1], [1, 1, 1, 1, 1, 1], [1], [1, 1, 1, 1], [0, 0, 0]],
    "tool tokens": [[1, 1, 0, 0, 1], [0, 1, 0, 1], [1, 0, 1, 1], [0, 1, 1], [0, 0]],
    "samples that do not count": [[0, 0, 0], [1, 0, 1, 1], [], [0], [1, 1], [0, 0, 0]],
    "nothing counts": [[0, 0, 0], [0], [0, 0]],
}
SPREADS = ["usual", "sample at +-50", "token at +-50"]


class Batch:
    """Make log-probs and advantages on one layout; `spread` says how far log-ratios reach."""

    def __init__(self, layout: str, spread: str, seed: int):
        self.rng, self.spread = np.random.default_rng(seed), spread
        # Ratios from e^-50 to e^50 can only be compared relatively.
        self.atol = 1e-8 if spread == "usual" else 0.0
        masks = MASKS[layout]
        sample_T = np.repeat(np.arange(len(masks)), [len(mask) for mask in masks])
        self.packed = oracle.Packed(sample_T, np.concatenate(masks), samples=len(masks))
        # Without a counting token a mean over the sample is undefined.
        self.has_mean_T = np.array([bool(self.packed.counting(n)) for n in sample_T])
        self.old_T = self.rng.uniform(-3, 0, len(sample_T))
        self.logprobs_T = self.old_T + self.difference()
        self.rollout_T = self.old_T - self.difference()
        self.ref_T = self.logprobs_T - self.difference()
        # A third each is negative, 0 and positive.
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
        """Return the Sequences of all samples, or of a micro-batch of these."""
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
    """Return two sets of bounds for a policy loss: tight ones, and a dual clip or its own."""
    own = losses.POLICY_LOSSES[name]
    low, high = (None if own.clip_low is None else 0.2, None if own.clip_high is None else 0.28)
    first, *rest = own.only.get("dual_clip", (0.0, 1.5))
    tight = dict(clip_low=low, clip_high=high, dual_clip=first)
    if rest:
        return [tight, tight | dict(dual_clip=rest[-1])]
    its_own = tight | dict(clip_low=own.clip_low, clip_high=own.clip_high)
    if own.tau_pos is None:
        return [tight, its_own]
    return [
        tight | dict(tau_pos=3.0, tau_neg=5.0),
        its_own | dict(tau_pos=own.tau_pos, tau_neg=own.tau_neg),
    ]


BOTH = [name for name in oracle.POLICY_LOSSES if name in losses.POLICY_LOSSES]
POLICIES = pytest.mark.parametrize(
    "name, bounds", [(name, bounds) for name in BOTH for bounds in bounds_of(name)]
)


def defined(value_T: np.ndarray, batch: Batch) -> np.ndarray:
    """Return where the formula defines a value: at least where the token's sample has one that
    counts.
    """
    assert np.isfinite(value_T[batch.has_mean_T]).all()
    return ~np.isnan(value_T)


# ---- Corrections ----


def bounds_for(correction: str, low: float, high: float) -> dict:
    """Return these bounds, with None for one that the correction does not have."""
    own = losses.CORRECTIONS[correction]
    return dict(low=None if own.low is None else low, high=None if own.high is None else high)
