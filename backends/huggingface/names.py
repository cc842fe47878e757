"""Hugging Face's tensors and Megatron's: which are the same, and which of them SGLang holds in FP8.

    tensor names <-> Megatron parameter names                            TOP_RULES, LAYER_RULES, rule_of
    tensors      <-> Megatron's stacked tensors, shard by shard          split_stacked, stack_parts
    tensor names  -> those that stay BF16 under block FP8                unquantized_linears

Megatron stacks what Hugging Face keeps apart. linear_qkv holds, per group of heads that share one
key and value, that group's query heads, then its key head, then its value head; linear_fc1 holds
gate above up. Stacking commutes with tensor-parallel sharding: a rank's shard of linear_qkv is made
of the same rank's slices of q, k and v. So both functions work on one rank's shard, and no full
tensor is needed to convert either way.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from backends.huggingface.config import is_sparse, megatron_arguments


def layer_shapes(config: dict, layer: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a decoder layer's Hugging Face tensors, by name inside the layer; those of its
    experts once, with {} for the expert's number.
    """
    hidden, head_dim, megatron = (
        config["hidden_size"],
        config["head_dim"],
        megatron_arguments(config, tp=1)[0],
    )
    rows = {"q": config["num_attention_heads"] * head_dim} | dict.fromkeys(
        "kv", config["num_key_value_heads"] * head_dim
    )
    shapes = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.o_proj.weight": (hidden, rows["q"]),
    }
    shapes |= {f"self_attn.{name}_proj.weight": (size, hidden) for name, size in rows.items()}
    shapes |= {
        f"self_attn.{name}_proj.bias": (size,)
        for name, size in rows.items()
        if megatron["add_qkv_bias"]
    }
    shapes |= {
        f"self_attn.{name}_norm.weight": (head_dim,) for name in "qk" if megatron["qk_layernorm"]
    }
    mlps = {"mlp": config["intermediate_size"]}
    if is_sparse(config, layer):
        shapes |= {"mlp.gate.weight": (config["num_experts"], hidden)}
        shapes |= (
            {"mlp.gate.e_score_correction_bias": (config["num_experts"],)}
            if "moe_router_enable_expert_bias" in megatron
            else {}
        )
        mlps = {
            "mlp.experts.{}": config["moe_intermediate_size"],
            "mlp.shared_experts": megatron.get("moe_shared_expert_intermediate_size"),
        }
    for name, size in mlps.items():
        if size:
            shapes |= {
                f"{name}.gate_proj.weight": (size, hidden),
                f"{name}.up_proj.weight": (size, hidden),
                f"{name}.down_proj.weight": (hidden, size),
            }
    return shapes


def hf_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of the model, by Hugging Face name."""
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


@dataclass(frozen=True)
class Rule:
    """How one Megatron parameter is made of Hugging Face tensors."""

    hf: tuple[str, ...]
    """Hugging Face names in stacking order; inside a layer, without the layer's prefix."""
    tp_dim: int | None = None
    """Dimension that tensor parallelism splits; None: every rank holds it whole."""
    expert: int | None = None
    """Number of the expert among those of this expert-parallel rank, for which {} stands in the
    names; None: no expert's.
    """

    def names(self, expert: int) -> list[str]:
        """Hugging Face names, with the expert's number in the whole model."""
        return [name.format(expert) for name in self.hf]


_QKV = ("self_attn.q_proj.{}", "self_attn.k_proj.{}", "self_attn.v_proj.{}")
TOP_RULES = {
    "embedding.word_embeddings.weight": Rule(("model.embed_tokens.weight",), tp_dim=0),
    "decoder.final_layernorm.weight": Rule(("model.norm.weight",)),
    "output_layer.weight": Rule(("lm_head.weight",), tp_dim=0),
}
LAYER_RULES = {
    "input_layernorm.weight": Rule(("input_layernorm.weight",)),
    "self_attention.linear_qkv.layer_norm_weight": Rule(
        ("input_layernorm.weight",)
    ),  # Transformer Engine fuses the norm into the linear
    "self_attention.linear_qkv.weight": Rule(
        tuple(name.format("weight") for name in _QKV), tp_dim=0
    ),
    "self_attention.linear_qkv.bias": Rule(tuple(name.format("bias") for name in _QKV), tp_dim=0),
    "self_attention.q_layernorm.weight": Rule(("self_attn.q_norm.weight",)),
    "self_attention.k_layernorm.weight": Rule(("self_attn.k_norm.weight",)),
    "self_attention.linear_proj.weight": Rule(("self_attn.o_proj.weight",), tp_dim=1),
    "pre_mlp_layernorm.weight": Rule(("post_attention_layernorm.weight",)),
    "mlp.linear_fc1.layer_norm_weight": Rule(("post_attention_layernorm.weight",)),
    "mlp.linear_fc1.weight": Rule(("mlp.gate_proj.weight", "mlp.up_proj.weight"), tp_dim=0),
    "mlp.linear_fc2.weight": Rule(("mlp.down_proj.weight",), tp_dim=1),
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
# The experts' parameters as Megatron's SequentialMLP names them, and as Transformer Engine's
# grouped linear does.
_EXPERT = re.compile(
    r"mlp\.experts\.(?:local_experts\.(\d+)\.(linear_fc[12]\.weight)|(linear_fc[12]\.weight)(\d+))"
)


def parameters_of(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """All that is converted: the parameters, and the router's correction bias, which Megatron keeps
    as a buffer.
    """
    yield from model.named_parameters()
    yield from (
        (name, buffer)
        for name, buffer in model.named_buffers()
        if name.endswith("router.expert_bias")
    )


def rule_of(megatron_name: str, *, first_layer: int = 0) -> Rule:
    """The rule of a parameter of GPTModel, with full Hugging Face names.

    Raises KeyError for a parameter no rule covers.

    first_layer: number, in the whole model, of the first layer of this pipeline stage.
    """
    if megatron_name in TOP_RULES:
        return TOP_RULES[megatron_name]
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", megatron_name)
    inside, expert = match[2] if match else "", None
    if moe := _EXPERT.fullmatch(inside):
        inside, expert = f"mlp.experts.{moe[2] or moe[3]}", int(moe[1] or moe[4])
    if inside not in LAYER_RULES:
        raise KeyError(f"no rule in hf_names.py covers the Megatron parameter {megatron_name}")
    rule = LAYER_RULES[inside]
    return Rule(
        tuple(f"model.layers.{first_layer + int(match[1])}.{name}" for name in rule.hf),
        rule.tp_dim,
        expert,
    )


def split_stacked(
    stacked: torch.Tensor, parts: int, *, head_dim: int, groups: int
) -> list[torch.Tensor]:
    """One rank's shard of a stacked tensor -> that rank's slices of the Hugging Face tensors.
    groups: key-value heads on this rank.
    """
    if parts == 3:
        by_group = stacked.view(
            groups, -1, *stacked.shape[1:]
        )  # [groups, (heads per group + 2) * head_dim, ...]
        sizes = [by_group.shape[1] - 2 * head_dim, head_dim, head_dim]
        return [part.reshape(-1, *stacked.shape[1:]) for part in by_group.split(sizes, dim=1)]
    return list(stacked.chunk(parts))


def stack_parts(parts: list[torch.Tensor], *, groups: int) -> torch.Tensor:
    """The inverse of split_stacked."""
    if len(parts) == 3:
        return torch.cat(
            [part.reshape(groups, -1, *part.shape[1:]) for part in parts], dim=1
        ).reshape(-1, *parts[0].shape[1:])
    return torch.cat(parts)


def merged_linears(
    config: dict, layer: int
) -> dict[str, tuple[tuple[str, ...], tuple[int, ...], bool]]:
    """The linear layers of a decoder layer as SGLang merges them: (names in the layer, rows of
    their parts, whether SGLang's rule binds it at engine TP 1).
    """
    q_rows, kv_rows = (
        config["num_attention_heads"] * config["head_dim"],
        config["num_key_value_heads"] * config["head_dim"],
    )
    merged = {
        "qkv": (
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            (q_rows, kv_rows),
            True,
        ),
        "o": (("self_attn.o_proj",), (q_rows,), False),
    }
    if is_sparse(config, layer):
        prefix, rows = (
            "mlp.shared_experts",
            config["moe_intermediate_size"] * (config.get("n_shared_experts") or 0),
        )
        projections = ("gate_proj", "up_proj", "down_proj")
        experts = tuple(
            f"mlp.experts.{expert}.{projection}"
            for expert in range(config["num_experts"])
            for projection in projections
        )
        merged["experts"] = (experts, (config["moe_intermediate_size"],), True)
    else:
        prefix, rows = "mlp", config["intermediate_size"]
    if rows:
        merged |= {
            "gate_up": ((f"{prefix}.gate_proj", f"{prefix}.up_proj"), (rows,), True),
            "down": ((f"{prefix}.down_proj",), (rows,), False),
        }
    return merged


def unquantized_linears(
    config: dict, *, engine_tp: int, engine_ep: int = 1, layers: Iterable[int] | None = None
) -> list[str]:
    """Linear layers that stay BF16 under block FP8, by full Hugging Face module name. lm_head
    always does. layers: of these only.

    SGLang's rule (Fp8LinearMethod.validate_block_quant_shapes, and the like for experts): in a
    merged layer, and in any layer split over engine tensor parallelism, each part's rows per rank
    must be a multiple of 128; under tensor parallelism so must the split columns of o_proj and
    down_proj. Experts are split over what engine_ep, over which whole ones are spread, leaves of
    engine_tp. This list serves both the engine's config (modules_to_not_convert) and the hand-off,
    so that they cannot disagree.
    """
    kept = ["lm_head"]
    for layer in range(config["num_hidden_layers"]) if layers is None else layers:
        for merged, (names, sizes, always) in merged_linears(config, layer).items():
            parts = engine_tp // engine_ep if merged == "experts" else engine_tp
            if (always or engine_tp > 1) and any(size % (128 * parts) for size in sizes):
                kept += [
                    f"model.layers.{layer}.{name}"
                    for name in (*names, *(["mlp.experts"] if merged == "experts" else []))
                ]
    return kept


def fp8_config(config: dict, *, engine_tp: int, engine_ep: int = 1) -> dict:
    """The quantization_config of a block-FP8 checkpoint, for SGLang's model override and for the
    config.json of an FP8 export.
    """
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": unquantized_linears(
            config, engine_tp=engine_tp, engine_ep=engine_ep
        ),
    }
