"""Every algorithm gives the same loss and gradient however its batch is split.

It is split over micro-batches, ranks and kinds of parallelism, and given in any order. A mean of
means, a whitening per rank, or a sequence ratio from half a sequence would train too, but something
else. In fp32, to 1e-5 of the loss and of the whole gradient's norm. tests/oracle says what the
formulas should give. test_layouts.py has the layouts of other families.
"""

import json

import pytest
import torch
from conftest import torchrun
from workers.algorithms import ALGORITHMS, not_named

from advantages import ADVANTAGES
from losses import POLICY_LOSSES, LossSettings, PolicyLoss

WHOLE = (1, [1, 1, 1], 4096, "given")  # one rank, one micro-batch
SPLITS = {  # ranks, [tp, pp, cp], microbatch_tokens, order
    "2 micro-batches": (1, [1, 1, 1], 160, "given"),
    "4 micro-batches": (1, [1, 1, 1], 70, "given"),
    "reversed": (1, [1, 1, 1], 4096, "reversed"),
    "shuffled, dp 2": (2, [1, 1, 1], 70, "shuffled"),
    "tp 2": (2, [2, 1, 1], 4096, "given"),
    "pp 2": (2, [1, 2, 1], 70, "given"),
    "cp 2": (2, [1, 1, 2], 70, "shuffled"),
}
LONG = pytest.mark.complete
QUICK = ("4 micro-batches", "shuffled, dp 2")  # without --complete


@pytest.fixture(scope="module")
def measured(models, tmp_path_factory, request):
    """{split: {algorithm: (losses, gradient)}}: one start of one rank, and one of two."""
    chosen = SPLITS if request.config.getoption("--complete") else QUICK
    found, splits = {}, {"whole": WHOLE, **{name: SPLITS[name] for name in chosen}}
    for ranks in (1, 2):
        folder = tmp_path_factory.mktemp(f"ranks-{ranks}")
        cases = {
            name: dict(zip(("splits", "microbatch_tokens", "order"), case[1:]))
            for name, case in splits.items()
            if case[0] == ranks
        }
        (folder / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
        worker = ("tests/workers/algorithms.py", folder, folder / "cases.json", models["qwen3"])
        torchrun(*worker, ranks=ranks)
        losses = json.loads((folder / "losses.json").read_text(encoding="utf-8"))
        gradients = torch.load(folder / "gradients.pt", weights_only=True)
        for case in cases:
            assert losses[case]["no token counts"] == [True, True, True]
            found[case] = {name: (losses[case][name], gradients[case][name]) for name in ALGORITHMS}
    return found


@pytest.fixture(scope="module")
def whole(measured):
    return measured["whole"]


@pytest.fixture(params=[pytest.param(name, marks=() if name in QUICK else LONG) for name in SPLITS])
def split(request, measured):
    return request.param, measured[request.param]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_loss_and_gradient_do_not_depend_on_the_split(whole, split, algorithm):
    (expected, expected_gradient), (got, gradient) = whole[algorithm], split[1][algorithm]
    for metric, value in expected.items():
        if metric != "microbatches":
            assert got[metric] == pytest.approx(value, rel=1e-5, abs=1e-7), metric
    assert gradient.keys() == expected_gradient.keys()
    differences = {name: gradient[name] - expected_gradient[name] for name in gradient}
    apart, norm = norm_of(differences), norm_of(expected_gradient)
    assert apart < 1e-5 * norm
    assert norm > 0


def norm_of(tensors: dict) -> float:
    return sum(float(tensor.double().square().sum()) for tensor in tensors.values()) ** 0.5


def test_every_metric_is_compared(whole):
    """mismatch_max is a maximum over ranks, and all others are means over the batch."""
    assert all(
        {"mismatch_max", "mismatch_abs", "mismatch_k3", "logprob_shift"} <= losses.keys()
        for losses, _ in whole.values()
    )


def test_the_splits_split(whole, split):
    name, measured = split
    if name.endswith("micro-batches"):
        assert {losses["microbatches"] for losses, _ in measured.values()} == {int(name[0])}
    assert {losses["microbatches"] for losses, _ in whole.values()} == {1}


def test_each_algorithm_is_one_of_its_own(whole):
    norms = [losses["grad_norm"] for losses, _ in whole.values()]
    assert len({round(norm, 6) for norm in norms}) == len(norms)
    settings = {name: LossSettings(**changes) for name, (_, changes) in ALGORITHMS.items()}
    clipped = [
        name for name in whole if 0 < (settings[name].clips["clip_high"] or 0) < 0.3
    ]  # ratios reach it
    assert "gspo" in clipped
    assert all(whole[name][0]["clipfrac"] > 0 for name in clipped)
    assert whole["icepop"][0]["tis_clipfrac"] > 0
    assert 0 < whole["sequence tis"][0]["tis_clipfrac"] < 1


def test_an_entry_that_is_not_named_is_run_all_the_same(monkeypatch):
    one = PolicyLoss(None, None, None, only={"aggregation": ("constant",)})
    monkeypatch.setitem(POLICY_LOSSES, "mine", one)
    monkeypatch.setitem(ADVANTAGES, "mine", None)
    assert not_named() == {
        "advantage mine": ({"advantage": "mine"}, {}),
        "policy_loss mine": ({}, {"policy_loss": "mine", "aggregation": "constant"}),
    }


@pytest.mark.complete
def test_a_loss_that_is_not_finite_ends_all_ranks_with_the_same_words(models):
    """Of four samples of one length on two ranks the third is rank 0's; both ranks name it, and
    neither waits for the other.
    """
    done = torchrun("tests/workers/not_finite.py", models["qwen3"], ranks=2)
    raised = [
        line.partition(" raises: ")[2]
        for line in sorted(done.stdout.splitlines())
        if " raises: " in line
    ]
    assert len(raised) == 2
    assert raised[0] == raised[1]
    assert "step 1, rank 0: sample 2 of group 5 has loss nan" in raised[0]
