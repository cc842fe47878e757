"""--train-numerics fp8: the trainer computes what the FP8 engine computes, and learns in BF16.

Why: what an FP8 engine samples from is a model that a BF16 trainer never sees. The log-probs of
real engines are compared. Not covered: Transformer Engine's recipe, which needs a GPU.
"""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, metrics_of, torchrun
from safetensors.torch import load_file
from test_engine import Pair

import train_step
from backends.fp8_activations import through_fp8
from backends.huggingface.config import read_config
from backends.huggingface.fp8 import fp8_weights
from backends.megatron import FP32_SCALES
from backends.megatron.fp8_numerics import RoundedLinear, check_numerics
from common.errors import BadInput
from common.settings import TrainSettings
from fp8_quant import dequantize_blockwise, quantize_blockwise

MODELS = {"toy": ROOT / "toy", "glm": ROOT / "toy" / "glm"}
FULL = ["recompute_granularity=full", "recompute_method=uniform", "recompute_num_layers=1"]
LAYOUTS = {  # model, ranks, [tp, ep, pp, cp], --megatron
    "toy, one rank": ("toy", 1, [1, 1, 1, 1], []),
    "toy, recomputed": ("toy", 1, [1, 1, 1, 1], FULL),
    "toy, tp 2": ("toy", 2, [2, 1, 1, 1], []),
    "toy, pp 2": ("toy", 2, [1, 1, 2, 1], []),
    "toy, cp 2": ("toy", 2, [1, 1, 1, 2], []),
    "glm, one rank": ("glm", 1, [1, 1, 1, 1], []),
    "glm, ep 2": ("glm", 2, [1, 2, 1, 1], []),
    "glm, pp 2": ("glm", 2, [1, 1, 2, 1], []),
}


# --- one layer ------------------------------------------------------------------------------------


def test_activations_have_a_scale_per_128_features_of_a_token():
    x_TK = torch.zeros(2, 256)
    x_TK[0, :3] = torch.tensor([448.0, 17.0, 1.1])
    x_TK[0, 128], x_TK[1, 0] = 1.1, 1.1
    rounded_TK = through_fp8(x_TK)
    assert rounded_TK[0, :3].tolist() == [448, 16, 1.125]  # 17 lies between 16 and 18: even
    for alone in (rounded_TK[0, 128], rounded_TK[1, 0]):  # each the largest of its own group
        assert alone == pytest.approx(1.1, rel=1e-6)


def test_small_activations_keep_their_digits():
    x_TK = torch.full((1, 128), 1e-6)
    torch.testing.assert_close(through_fp8(x_TK), x_TK, rtol=1e-6, atol=0)
    assert not through_fp8(torch.zeros(1, 128)).any()


def test_gradients_pass_straight_through_the_rounding():
    generator = torch.Generator().manual_seed(0)
    x_TK, weight_NK = (torch.randn(n, 256, generator=generator) for n in (5, 128))
    x_TK.requires_grad_(), weight_NK.requires_grad_()
    rounded_NK = dequantize_blockwise(*quantize_blockwise(weight_NK.detach()), dtype=torch.float32)
    output_TN = RoundedLinear.apply(x_TK, weight_NK, rounded_NK)
    assert torch.equal(output_TN, F.linear(through_fp8(x_TK), rounded_NK))
    grad_TN = torch.randn(5, 128, generator=generator)
    output_TN.backward(grad_TN)
    torch.testing.assert_close(x_TK.grad, grad_TN @ rounded_NK)
    torch.testing.assert_close(weight_NK.grad, grad_TN.T @ through_fp8(x_TK))


def test_an_expert_may_have_no_tokens():
    assert through_fp8(torch.zeros(0, 200)).shape == (0, 200)
    weight_NK = torch.ones(8, 128, requires_grad=True)
    output_TN = RoundedLinear.apply(torch.zeros(0, 128), weight_NK, torch.ones(8, 128))
    output_TN.sum().backward()
    assert output_TN.shape == (0, 8) and not weight_NK.grad.any()


def test_a_trainer_must_know_what_the_engine_rounds(fresh_megatron):
    config = read_config(MODELS["toy"])
    with pytest.raises(ValueError, match="which weights does the engine hold in FP8"):
        train_step.build_trainer(
            str(MODELS["toy"]), TrainSettings(train_numerics="fp8"), config, steps=1, seed=1,
            temperature=1.0, max_response_tokens=8,
        )  # fmt: skip


# --- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize("model, split, has_te, message", [
    ("toy", dict(tp=4), False, "o_proj has 64 of its columns on each rank of --tp 4"),
    ("glm", dict(tp=2), False, "--tp 2 would split each expert"),
    ("glm", dict(tp=2, ep=2), False, "a shared expert's down_proj has 64 of its columns"),
    ("glm", dict(tp=1, ep=2), False, ""),
    ("toy", dict(tp=2), False, ""),
    ("toy", dict(tp=1), True, "Transformer Engine would round other blocks"),  # heads of 64
])  # fmt: skip
def test_a_split_that_would_round_otherwise_is_refused(model, split, has_te, message):
    config = read_config(MODELS[model])
    fp8 = fp8_weights(config, rollout_dtype="fp8", engine_tp=1)
    split = dict(ep=1) | split
    if not message:
        check_numerics(config, fp8, **split, has_te=has_te)
        return
    with pytest.raises(BadInput, match=message):
        check_numerics(config, fp8, **split, has_te=has_te)


def test_transformer_engine_must_not_round_scales(monkeypatch):
    """It is told so when it is imported: an environment that says otherwise is refused."""
    config = read_config(MODELS["toy"])
    fp8 = fp8_weights(config, rollout_dtype="fp8", engine_tp=1)
    monkeypatch.setenv(FP32_SCALES, "0")
    with pytest.raises(BadInput, match=f"{FP32_SCALES} must be 1"):
        check_numerics(config, fp8, tp=1, ep=1, has_te=True)


# --- real engines ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(one_rank, tmp_path_factory):
    """Return {case: (report, gradient)}: every layout, and each model with plain numerics."""
    dumps = {}
    for name, folder in MODELS.items():
        pair = Pair("bf16", "fp8", str(folder))
        try:
            samples = pair.generate(prompts=64, n=2)
        finally:
            pair.engine.shutdown()
        dumps[name] = tmp_path_factory.mktemp("dumps") / f"{name}.jsonl"
        dumps[name].write_bytes(b"".join(sample.to_json() + b"\n" for sample in samples))
    found = {}
    for ranks in (1, 2):
        cases = {}
        for layout, (model, of_ranks, splits, megatron) in LAYOUTS.items():
            common = dict(folder=str(MODELS[model]), samples=str(dumps[model]), noise=0)
            train = dict(train_numerics="fp8", megatron=megatron)
            if of_ranks == ranks:
                cases[layout] = common | dict(splits=splits, train=train)
            if layout.endswith("one rank") and ranks == 1:
                cases[f"{model}, plain"] = common | dict(splits=splits, train={})
        out = tmp_path_factory.mktemp("numerics")
        (out / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
        torchrun("tests/workers/routed.py", out, out / "cases.json", ranks=ranks, timeout=900)
        for name in cases:
            report = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
            found[name] = report, load_file(out / f"{name}.safetensors")
    return found


@pytest.mark.complete
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logprobs_are_the_fp8_engines(measured, layout):
    plain, _ = measured[f"{LAYOUTS[layout][0]}, plain"]
    report, _ = measured[layout]
    print(layout, plain["mean"], report["mean"])
    assert plain["mean"] > 0.015
    assert report["mean"] < 1e-3


@pytest.mark.complete
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_one_ranks(measured, layout):
    """To the rounding of BF16. The plain trainer's gradient is another."""
    model = LAYOUTS[layout][0]
    (_, gradient), (_, expected) = measured[layout], measured[f"{model}, one rank"]
    assert gradient.keys() == expected.keys()
    ours, theirs = (
        torch.cat([tensors[name].flatten() for name in expected])
        for tensors in (gradient, expected)
    )
    plain = torch.cat([measured[f"{model}, plain"][1][name].flatten() for name in expected])
    print(layout, (ours - theirs).norm() / theirs.norm(), (plain - theirs).norm() / theirs.norm())
    assert (ours - theirs).norm() < 0.02 * theirs.norm()
    assert (plain - theirs).norm() > 0.1 * theirs.norm()


@pytest.mark.complete
@pytest.mark.parametrize("model", MODELS)
def test_a_run_trains_the_policy_that_it_samples_from(tmp_path, model):
    """In every step: the rounding follows the weights. And it learns."""
    given = ["--model", MODELS[model], "--train-numerics", "fp8", "--steps", "20", "--name", "fp8"]
    torchrun(ROOT / "loop_sync.py", *given, "--export", ranks=1, cwd=tmp_path)
    rows = metrics_of(tmp_path / "runs" / "fp8")
    assert all(row["mismatch_abs"] < 1e-3 for row in rows if "loss" in row)
    assert rows[-1]["held_out"] > rows[0]["held_out"] + 0.2
