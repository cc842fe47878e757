"""Engine and trainer hold the same model in every family: after a hand-off both compute the same
log-probs, in fp32 and in FP8.

Each test starts an engine of its own, as an engine serves one model. test_engine.py has the toy,
a Qwen3.
"""

import pytest
import torch
from conftest import write_model
from nudge import nudge
from test_engine import Pair

from backends.huggingface.fp8 import linear_modules

RAGGED = dict(
    hidden_size=192,
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=64,
    intermediate_size=384,
)


@pytest.fixture
def start(one_rank):
    """Start a Pair, whose hand-off has passed the gate; its engine ends with the test."""
    pairs = []

    def start(train_dtype: str, rollout_dtype: str, folder) -> Pair:
        pairs.append(Pair(train_dtype, rollout_dtype, str(folder)))
        return pairs[-1]

    yield start
    for pair in pairs:
        pair.engine.shutdown()


@pytest.mark.complete
@pytest.mark.parametrize(
    "family, shape, kept",
    [
        ("llama", RAGGED, 3),
        ("qwen2", dict(num_attention_heads=2), 0),
        ("qwen3_moe", {}, 0),
        ("glm4_moe", {}, 0),
    ],
)
def test_fp8_rollouts_mismatch_by_quantization_alone(start, tmp_path, family, shape, kept):
    """Llama in SmolLM2's proportions: q, k, v stay BF16 (192 and 64 rows), o and down are ragged.

    Qwen2 has biases, the others experts. Random weights are rougher than trained ones.
    """
    pair = start("bf16", "fp8", write_model(tmp_path, family, dtype=torch.bfloat16, **shape))
    sent = []
    for every, factor in ((100, 1.2), (20, 1.2), *((every, 0.97) for every in range(41, 59))):
        nudge(pair.trainer.gpt, every, factor)
        sent.append(pair.sync())
    assert {metrics["sync_full"] for metrics in sent} == {0}
    assert sent[0]["sync_bytes"] < sent[1]["sync_bytes"]
    linear = linear_modules(pair.config)
    assert len(pair.weights.fp8) == len(linear) - kept * pair.config["num_hidden_layers"]
    assert 1e-4 < pair.differences(pair.generate()).mean() < 0.2


@pytest.mark.complete
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3_moe", "glm4_moe"])
def test_logprobs_agree_in_fp32(start, models, family):
    """Routers, correction bias, shared experts, partial rotary, biases, norms."""
    pair = start("fp32", "fp32", models[family])
    assert pair.differences(pair.generate()).max() < 1e-4
