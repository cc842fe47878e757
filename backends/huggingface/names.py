"""Tensors of Hugging Face and of Megatron: which are the same, and which SGLang holds in FP8.

    tensor names <-> Megatron parameter names              TOP_RULES, LAYER_RULES, rule_of
    tensors      <-> Megatron's stacked tensors            split_stacked, stack_parts
    tensor names  -> those that stay BF16 in block FP8     unquantized_linears

Megatron stacks what Hugging Face keeps apart. linear_fc1 holds gate above up. linear_qkv holds, for
each group of heads that share one key and value: the group's query heads, its key head, its value
head. Stacking commutes with tensor-parallel sharding: a rank's shard of linear_qkv consists of the
same rank's slices of q, k and v. So both functions work on one rank's shard, and neither direction
needs a full tensor.

A config is config.json, checked (backends/huggingface/config.py).
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from backends.huggingface.config import is_sparse, megatron_arguments

# --- shapes -------------------------------------------------------------------------------------


def layer_shapes(config: dict, layer: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a decoder layer's Hugging Face tensors, by their name in the layer.

    Tensors of experts stand there once, with {} for the expert's number.
    """
    megatron, _ = megatron_arguments(config, tp=1)
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    q_rows = config["num_attention_heads"] * head_dim
    kv_rows = config["num_key_value_heads"] * head_dim
    shapes = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.o_proj.weight": (hidden, q_rows),
    }
    projections = {"q": q_rows, "k": kv_rows, "v": kv_rows}
    for name, rows in projections.items():
        shapes[f"self_attn.{name}_proj.weight"] = (rows, hidden)
    if megatron["add_qkv_bias"]:
        for name, rows in projections.items():
            shapes[f"self_attn.{name}_proj.bias"] = (rows,)
    if megatron["qk_layernorm"]:
        shapes["self_attn.q_norm.weight"] = shapes["self_attn.k_norm.weight"] = (head_dim,)
    if not is_sparse(config, layer):
        return shapes | _mlp_shapes("mlp", hidden, config["intermediate_size"])
    experts, expert_size = config["num_experts"], config["moe_intermediate_size"]
    shapes["mlp.gate.weight"] = (experts, hidden)
    if "moe_router_enable_expert_bias" in megatron:
        shapes["mlp.gate.e_score_correction_bias"] = (experts,)
    shapes |= _mlp_shapes("mlp.experts.{}", hidden, expert_size)
    if shared_size := megatron.get("moe_shared_expert_intermediate_size"):
        shapes |= _mlp_shapes("mlp.shared_experts", hidden, shared_size)
    return shapes


def _mlp_shapes(name: str, hidden: int, size: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{name}.gate_proj.weight": (size, hidden),
        f"{name}.up_proj.weight": (size, hidden),
        f"{name}.down_proj.weight": (hidden, size),
    }


def hf_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors of the model, by Hugging Face name."""
    shapes = {
        "model.embed_tokens.weight": (config["vocab_size"], config["hidden_size"]),
        "model.norm.weight": (config["hidden_size"],),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
    for layer in range(config["num_hidden_layers"]):
        for name, shape in layer_shapes(config, layer).items():
            numbers = range(config["num_experts"] if "{}" in name else 1)
            shapes |= {f"model.layers.{layer}.{name.format(number)}": shape for number in numbers}
    return shapes


# Tensors with a row for each token. Megatron pads them to a multiple of the tensor-parallel size.
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


# --- names --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """How one Megatron parameter is made of Hugging Face tensors."""

    hf: tuple[str, ...]
    """Hugging Face names in stacking order.

    In LAYER_RULES without the layer's prefix; in an expert's names {} stands for its number.
    """
    tp_dim: int | None = None
    """Dimension that tensor parallelism splits. None: every rank holds the whole tensor."""
    expert: int | None = None
    """Number of the expert among those of this expert-parallel rank. None: not an expert's."""

    def names(self, expert: int) -> list[str]:
        """Return the Hugging Face names. expert: its number in the whole model."""
        return [name.format(expert) for name in self.hf]


TOP_RULES = {
    "embedding.word_embeddings.weight": Rule(("model.embed_tokens.weight",), tp_dim=0),
    "decoder.final_layernorm.weight": Rule(("model.norm.weight",)),
    "output_layer.weight": Rule(("lm_head.weight",), tp_dim=0),
}

_ATTENTION_NORM = Rule(("input_layernorm.weight",))
_MLP_NORM = Rule(("post_attention_layernorm.weight",))
LAYER_RULES = {
    "input_layernorm.weight": _ATTENTION_NORM,
    "self_attention.linear_qkv.weight": Rule(
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"), tp_dim=0
    ),
    "self_attention.linear_qkv.bias": Rule(
        ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"), tp_dim=0
    ),
    "self_attention.q_layernorm.weight": Rule(("self_attn.q_norm.weight",)),
    "self_attention.k_layernorm.weight": Rule(("self_attn.k_norm.weight",)),
    "self_attention.linear_proj.weight": Rule(("self_attn.o_proj.weight",), tp_dim=1),
    "pre_mlp_layernorm.weight": _MLP_NORM,
    "mlp.linear_fc1.weight": Rule(("mlp.gate_proj.weight", "mlp.up_proj.weight"), tp_dim=0),
    "mlp.linear_fc2.weight": Rule(("mlp.down_proj.weight",), tp_dim=1),
    # Transformer Engine fuses a norm into the linear layer that follows it.
    "self_attention.linear_qkv.layer_norm_weight": _ATTENTION_NORM,
    "mlp.linear_fc1.layer_norm_weight": _MLP_NORM,
    # mixture of experts
    "mlp.router.weight": Rule(("mlp.gate.weight",)),
    "mlp.router.expert_bias": Rule(("mlp.gate.e_score_correction_bias",)),
    "mlp.shared_experts.linear_fc1.weight": Rule(
        ("mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"), tp_dim=0
    ),
    "mlp.shared_experts.linear_fc2.weight": Rule(
        ("mlp.shared_experts.down_proj.weight",), tp_dim=1
    ),
    "mlp.experts.linear_fc1.weight": Rule(
        ("mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight"), tp_dim=0
    ),
    "mlp.experts.linear_fc2.weight": Rule(("mlp.experts.{}.down_proj.weight",), tp_dim=1),
}
# An expert's parameter, named as in LAYER_RULES but for the expert's number: as Megatron's
# SequentialMLP writes it (first line), and as Transformer Engine's grouped linear does (second).
_EXPERT = re.compile(
    r"mlp\.experts\.(?:local_experts\.(?P<sequential>\d+)\.(?P<name>linear_fc[12]\.weight)"
    r"|(?P<grouped_name>linear_fc[12]\.weight)(?P<grouped>\d+))"
)


def parameters_of(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what is converted: the parameters, and the router's correction bias.

    Megatron keeps that bias as a buffer. LoRA's adapters are not tensors of a Hugging Face model.
    """
    for name, parameter in model.named_parameters():
        if not name.endswith((".lora_A", ".lora_B")):
            yield name, parameter
    for name, buffer in model.named_buffers():
        if name.endswith("router.expert_bias"):
            yield name, buffer


def rule_of(megatron_name: str, *, first_layer: int = 0) -> Rule:
    """Return the rule of a GPTModel's parameter, with full Hugging Face names.

    Raises KeyError for a parameter that no rule covers.

    first_layer: number, in the whole model, of the first layer of this pipeline stage.
    """
    if megatron_name in TOP_RULES:
        return TOP_RULES[megatron_name]
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", megatron_name)
    name_in_layer, expert = match[2] if match else "", None
    if moe := _EXPERT.fullmatch(name_in_layer):
        name_in_layer = f"mlp.experts.{moe['name'] or moe['grouped_name']}"
        expert = int(moe["sequential"] or moe["grouped"])
    if name_in_layer not in LAYER_RULES:
        raise KeyError(
            f"no rule in backends/huggingface/names.py covers the Megatron parameter"
            f" {megatron_name}: add one to LAYER_RULES"
        )
    rule, layer = LAYER_RULES[name_in_layer], first_layer + int(match[1])
    names = tuple(f"model.layers.{layer}.{name}" for name in rule.hf)
    return Rule(names, rule.tp_dim, expert)


# --- stacked tensors ----------------------------------------------------------------------------


def split_stacked(
    stacked: torch.Tensor, parts: int, *, head_dim: int, groups: int
) -> list[torch.Tensor]:
    """Split one rank's shard of a stacked tensor into that rank's slices of Hugging Face tensors.

    parts: how many tensors are stacked; 3 are query, key and value. groups: key-value heads on this
    rank.
    """
    if parts != 3:
        return list(stacked.chunk(parts))
    columns = stacked.shape[1:]  # none for a bias
    # [groups, (heads of the group + 2) * head_dim, ...]
    by_group = stacked.view(groups, -1, *columns)
    q_rows = by_group.shape[1] - 2 * head_dim
    q, k, v = by_group.split([q_rows, head_dim, head_dim], dim=1)
    return [part.reshape(-1, *columns) for part in (q, k, v)]


def stack_parts(parts: list[torch.Tensor], *, groups: int) -> torch.Tensor:
    """Stack what split_stacked splits. groups: key-value heads on this rank."""
    if len(parts) != 3:
        return torch.cat(parts)
    columns = parts[0].shape[1:]
    by_group = [part.reshape(groups, -1, *columns) for part in parts]
    return torch.cat(by_group, dim=1).reshape(-1, *columns)


# --- block FP8 ----------------------------------------------------------------------------------


class MergedLinear(NamedTuple):
    """Linear layers of a decoder layer that SGLang computes as one."""

    names: tuple[str, ...]
    """Hugging Face module names in the layer."""
    sizes: tuple[int, ...]
    """What must divide into whole blocks: rows of each part, or the columns that are split."""
    binds_unsplit: bool
    """Whether SGLang's rule binds it also where no tensor parallelism splits it."""


def merged_linears(config: dict, layer: int) -> dict[str, MergedLinear]:
    """Return the linear layers of a decoder layer as SGLang merges them."""
    q_rows = config["num_attention_heads"] * config["head_dim"]
    kv_rows = config["num_key_value_heads"] * config["head_dim"]
    qkv = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    merged = {
        "qkv": MergedLinear(qkv, (q_rows, kv_rows), True),
        "o": MergedLinear(("self_attn.o_proj",), (q_rows,), False),
    }
    mlp, size = "mlp", config["intermediate_size"]
    if is_sparse(config, layer):
        expert_size = config["moe_intermediate_size"]
        experts = tuple(
            f"mlp.experts.{expert}.{projection}"
            for expert in range(config["num_experts"])
            for projection in ("gate_proj", "up_proj", "down_proj")
        )
        merged["experts"] = MergedLinear(experts, (expert_size,), True)
        mlp, size = "mlp.shared_experts", expert_size * (config.get("n_shared_experts") or 0)
    if size:
        gate_up = (f"{mlp}.gate_proj", f"{mlp}.up_proj")
        merged["gate_up"] = MergedLinear(gate_up, (size,), True)
        merged["down"] = MergedLinear((f"{mlp}.down_proj",), (size,), False)
    return merged


def unquantized_linears(
    config: dict, *, engine_tp: int, engine_ep: int = 1, layers: Iterable[int] | None = None
) -> list[str]:
    """Return the linear layers that stay BF16 in block FP8, by full Hugging Face module name.

    This list decides both what the engine's config exempts (modules_to_not_convert) and what a
    weight update sends in BF16, so the two cannot disagree. layers: consider only these.

    SGLang's rule (Fp8LinearMethod.validate_block_quant_shapes, and the like for experts): each
    part's rows per rank must be a multiple of 128 in a merged layer, and in any layer that engine
    tensor parallelism splits. Then so must the columns that it splits, of o_proj and down_proj.
    """
    kept = ["lm_head"]  # SGLang never quantizes it
    for layer in range(config["num_hidden_layers"]) if layers is None else layers:
        for kind, merged in merged_linears(config, layer).items():
            is_experts = kind == "experts"
            # engine_ep spreads whole experts; what it leaves of engine_tp splits each.
            ranks = engine_tp // engine_ep if is_experts else engine_tp
            is_ragged = any(size % (128 * ranks) for size in merged.sizes)
            if is_ragged and (merged.binds_unsplit or engine_tp > 1):
                names = [*merged.names, "mlp.experts"] if is_experts else merged.names
                kept += [f"model.layers.{layer}.{name}" for name in names]
    return kept


def fp8_config(config: dict, *, engine_tp: int, engine_ep: int = 1) -> dict:
    """Return the quantization_config of a block-FP8 checkpoint.

    It goes to SGLang as a model override, and into the config.json of an FP8 export.
    """
    kept = unquantized_linears(config, engine_tp=engine_tp, engine_ep=engine_ep)
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": kept,
    }
