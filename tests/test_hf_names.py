"""Config fields and tensor names between Hugging Face and Megatron.

Why: a wrong mapping trains a different model in silence. Every field is either mapped or refused,
stacking is exactly undone, and the tensors that stay BF16 are SGLang's. test_layouts.py shows that
the mapped model computes the same logits. Not covered: models of other families.
"""

import json

import pytest
import torch

from backends.huggingface.config import read_config, rope_of
from backends.huggingface.names import (
    merged_linears,
    split_stacked,
    stack_parts,
    unquantized_linears,
)
from common.errors import BadInput


def test_qkv_stacking_by_hand():
    # 2 groups with 2 query heads each, head_dim 1. Megatron stacks group by group: its query heads,
    # its key, its value.
    q = torch.tensor([[0.0], [1], [2], [3]])
    k, v = torch.tensor([[10.0], [11]]), torch.tensor([[20.0], [21]])
    stacked = stack_parts([q, k, v], groups=2)
    assert stacked.flatten().tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    for part, original in zip(split_stacked(stacked, 3, head_dim=1, groups=2), (q, k, v)):
        assert torch.equal(part, original)


@pytest.mark.parametrize("tp", [1, 2])
def test_stacking_commutes_with_sharding(tp):
    # A rank's slices, stacked, are the rank's slice of the stack. So the conversion needs no full
    # tensor.
    q, k, v = torch.randn(8 * 16, 4), torch.randn(4 * 16, 4), torch.randn(4 * 16, 4)
    whole = stack_parts([q, k, v], groups=4)
    for rank in range(tp):
        mine = stack_parts([x.chunk(tp)[rank] for x in (q, k, v)], groups=4 // tp)
        assert torch.equal(mine, whole.chunk(tp)[rank])


@pytest.mark.parametrize("field, value, named", [
    ("hidden_act", "gelu", "hidden_act"),
    ("model_type", "mamba", "model_type"),
    ("use_sliding_window", True, "use_sliding_window"),
    ("layer_types", ["sliding_attention"], "layer_types"),
    ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}, "yarn"),
    ("quantization_config", {"quant_method": "fp8"}, "quantization_config"),
    ("num_experts", 8, "num_experts"),
    ("num_key_value_heads", 3, "num_key_value_heads"),
    ("hidden_size", "large", "hidden_size"),
])  # fmt: skip
def test_a_config_that_is_not_covered_is_refused_by_field(models, tmp_path, field, value, named):
    config = json.loads((models["qwen3"] / "config.json").read_text(encoding="utf-8")) | {
        field: value
    }
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(BadInput, match=named):
        read_config(tmp_path)


def test_llama3_rope_and_older_spelling():
    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    old = {"rope_theta": 5e5, "rope_scaling": scaling}
    assert rope_of(old) == {"rotary_base": 5e5, "rope_scaling": True, "rope_scaling_factor": 32.0}
    assert rope_of({"rope_theta": 1e6}) == {"rotary_base": 1e6, "rotary_percent": 1.0}


SHAPE = dict(
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    intermediate_size=512,
)


@pytest.mark.parametrize("changes, engine_tp, kept", [
    ({}, 1, []),
    (dict(num_key_value_heads=1), 1, ["qkv"]),  # 64 rows of k are half a block
    # SmolLM2 has 576 and 192 rows. Only o_proj may have a block that is not full.
    (dict(num_attention_heads=9, num_key_value_heads=3), 1, ["qkv"]),
    (dict(intermediate_size=500), 1, ["gate_up"]),
    ({}, 2, ["qkv"]),  # 64 rows of k per engine rank
    (dict(intermediate_size=384), 2, ["qkv", "gate_up", "down"]),
])  # fmt: skip
def test_what_stays_bf16_follows_from_shapes(changes, engine_tp, kept):
    expected = ["lm_head"] + [
        f"model.layers.0.{name}" for merged in kept for name in merged_linears(SHAPE, 0)[merged][0]
    ]
    assert unquantized_linears(SHAPE | changes, engine_tp=engine_tp) == expected
