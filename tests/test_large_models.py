"""The models that this is for, at the layout that they are trained at, without their weights: names
and shapes of GLM-4.5 (355B), GLM-4.5-Air, Qwen3-235B-A22B.

Megatron's modules are built on the meta device by every kind of rank of the layout (process groups
are stand-ins), and the hand-off's own walk says which Hugging Face tensors each delivers. Together
they must be the model's tensors, each exactly once and of the right shape. Configuration values are
those published with the models. Not covered: that such a model fits any memory.
"""

import json
import math
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import ROOT

GLM = dict(
    model_type="glm4_moe",
    architectures=["Glm4MoeForCausalLM"],
    vocab_size=151552,
    num_attention_heads=96,
    num_key_value_heads=8,
    head_dim=128,
    hidden_act="silu",
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    rope_theta=1000000,
    rope_scaling=None,
    partial_rotary_factor=0.5,
    attention_bias=True,
    attention_dropout=0.0,
    num_experts_per_tok=8,
    n_shared_experts=1,
    n_group=1,
    topk_group=1,
    norm_topk_prob=True,
    num_nextn_predict_layers=1,
    tie_word_embeddings=False,
    use_cache=True,
    torch_dtype="bfloat16",
)
GLM_4_5 = GLM | dict(
    hidden_size=5120,
    num_hidden_layers=92,
    intermediate_size=12288,
    moe_intermediate_size=1536,
    n_routed_experts=160,
    first_k_dense_replace=3,
    routed_scaling_factor=2.5,
    use_qk_norm=True,
)
GLM_4_5_AIR = GLM | dict(
    hidden_size=4096,
    num_hidden_layers=46,
    intermediate_size=10944,
    moe_intermediate_size=1408,
    n_routed_experts=128,
    first_k_dense_replace=1,
    routed_scaling_factor=1.0,
    use_qk_norm=False,
)
QWEN3_235B_A22B = dict(
    model_type="qwen3_moe",
    architectures=["Qwen3MoeForCausalLM"],
    vocab_size=151936,
    hidden_size=4096,
    num_hidden_layers=94,
    intermediate_size=12288,
    num_attention_heads=64,
    num_key_value_heads=4,
    head_dim=128,
    hidden_act="silu",
    max_position_embeddings=40960,
    rms_norm_eps=1e-6,
    rope_theta=1000000.0,
    rope_scaling=None,
    attention_bias=False,
    attention_dropout=0.0,
    num_experts=128,
    num_experts_per_tok=8,
    moe_intermediate_size=1536,
    norm_topk_prob=True,
    decoder_sparse_step=1,
    mlp_only_layers=[],
    max_window_layers=94,
    use_sliding_window=False,
    sliding_window=None,
    tie_word_embeddings=False,
    output_router_logits=False,
    router_aux_loss_coef=0.001,
    torch_dtype="bfloat16",
)
MODELS = {  # tp, config; four key-value heads end tensor parallelism at 4
    "GLM-4.5": (8, GLM_4_5),
    "GLM-4.5-Air": (8, GLM_4_5_AIR),
    "Qwen3-235B-A22B": (4, QWEN3_235B_A22B),
}
EP, PP = 8, 4
BILLIONS = {
    "GLM-4.5": 353,
    "GLM-4.5-Air": 107,
    "Qwen3-235B-A22B": 235,
}  # without the MTP layer, which is not trained


def expected(config: dict) -> dict[str, tuple[int, ...]]:
    """The checkpoint's tensors: transformers' model, with its stacked experts taken apart as the
    published files have them.
    """
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**config)
        )
    shapes = {}
    for name, tensor in model.state_dict().items():
        prefix, stacked, kind = name.rpartition("experts.")
        if stacked and kind == "gate_up_proj":
            for expert, rows in enumerate(tensor):
                shapes |= {
                    f"{prefix}experts.{expert}.{half}.weight": (rows.shape[0] // 2, rows.shape[1])
                    for half in ("gate_proj", "up_proj")
                }
        elif stacked and kind == "down_proj":
            shapes |= {
                f"{prefix}experts.{expert}.down_proj.weight": tuple(rows.shape)
                for expert, rows in enumerate(tensor)
            }
        else:
            shapes[name] = tuple(tensor.shape)
    return shapes


@pytest.fixture(scope="module")
def delivered(tmp_path_factory):
    """{model: {name: shape}} of tests/workers/large_model.py."""
    folder, cases = tmp_path_factory.mktemp("large"), {}
    for model, (tp, config) in MODELS.items():
        (folder / model).mkdir()
        (folder / model / "config.json").write_text(json.dumps(config), encoding="utf-8")
        cases[model] = [str(folder / model), tp, EP, PP]
    (folder / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    command = [sys.executable, ROOT / "tests" / "workers" / "large_model.py", folder / "cases.json"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.complete
@pytest.mark.parametrize("model", MODELS)
def test_every_tensor_is_delivered_once_and_whole(delivered, model):
    shapes = {name: tuple(shape) for name, shape in delivered[model].items()}
    assert shapes == expected(MODELS[model][1])
    assert sum(map(math.prod, shapes.values())) == pytest.approx(BILLIONS[model] * 1e9, rel=0.01)
