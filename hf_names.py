"""The border between Hugging Face and Megatron: which config field means what, and which tensors are the same.

    config.json  -> arguments of TransformerConfig and GPTModel          megatron_arguments
    tensor names <-> Megatron parameter names                            TOP_RULES, LAYER_RULES, rule_of
    tensors      <-> Megatron's stacked tensors, shard by shard          split_stacked, stack_parts

Megatron stacks what Hugging Face keeps apart. linear_qkv holds, per group of heads that share one key and value, that group's query heads, then its
key head, then its value head; linear_fc1 holds gate above up. Stacking commutes with tensor-parallel sharding: a rank's shard of linear_qkv is made of
the same rank's slices of q, k and v. So both functions work on one rank's shard, and no full tensor is needed to convert either way.

A config field that is in none of the lists below is refused by name: an ignored rope or activation setting would train a different model in silence.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoConfig

from problems import BadInput, Problems, all_problems

FAMILIES = {
    "qwen3": "Qwen3ForCausalLM", "qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM", "glm4_moe": "Glm4MoeForCausalLM",
}  # fmt: skip

# Fields that enter the mapping.
MAPPED = {
    "model_type", "architectures", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "tie_word_embeddings",
    "partial_rotary_factor", "attention_bias",
}  # fmt: skip
MAPPED_MOE = {
    "num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "n_shared_experts",
    "first_k_dense_replace", "routed_scaling_factor", "n_group", "topk_group", "use_qk_norm", "num_nextn_predict_layers",
}  # fmt: skip
# Fields that only one value of is implemented.
REQUIRED = {
    "hidden_act": ("silu",), "mlp_bias": (False,), "use_sliding_window": (False,), "attention_dropout": (0, 0.0),
    "pretraining_tp": (1,), "rope_interleaved": (False,), "quantization_config": (None,), "is_llama_config": (True,),
    "decoder_sparse_step": (1,), "mlp_only_layers": ([], None), "scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",),
}  # fmt: skip
# Fields that do not change what the model computes.
IGNORED = {
    "dtype", "torch_dtype", "transformers_version", "use_cache", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id",
    "sliding_window", "max_window_layers", "_name_or_path", "transformers.js_config", "output_attentions", "output_hidden_states", "return_dict",
    "output_router_logits", "router_aux_loss_coef",
    "chunk_size_feed_forward", "is_encoder_decoder", "unk_token_id", "_model_name_or_path", "id2label", "label2id", "problem_type", "use_mrope",
}  # fmt: skip


@all_problems
def read_config(folder: str | Path) -> dict:
    """config.json of a Hugging Face folder, checked field by field. Raises BadInput naming the field."""
    path = Path(folder) / "config.json"
    if not os.path.isfile(path):  # unlike Path.is_file, it raises for no name
        raise BadInput(f"--model {folder} has no config.json: give a Hugging Face model folder on this machine (hub names are not resolved)")
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:  # also of bytes that are no text
        raise BadInput(f"{path} is not JSON ({error})") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise BadInput(f"{path} must be an object with a model_type, one of {', '.join(FAMILIES)}")
    if config["model_type"] not in FAMILIES:
        raise BadInput(f"{path}: model_type {config['model_type']!r} is not supported; supported are {', '.join(FAMILIES)}")
    try:
        AutoConfig.for_model(**config)  # transformers knows the type of every field
    except Exception as error:  # it raises many kinds, and all are about this file
        raise BadInput(f"{path} is no {config['model_type']} config: {error}") from error
    found = Problems()
    for field, value in config.items():
        if field == "layer_types":
            if set(value or ()) - {"full_attention"}:
                yield f"{path}: layer_types holds {sorted(set(value))}; only full_attention is implemented"
        elif field in REQUIRED:
            if value not in REQUIRED[field]:
                yield f"{path}: {field} is {value!r}; only {REQUIRED[field][0]!r} is implemented"
        elif field not in MAPPED | IGNORED | (MAPPED_MOE if config["model_type"] in ("qwen3_moe", "glm4_moe") else set()):
            yield f"{path}: field {field!r} is unknown to the mapping in hf_names.py; if it does not change the model, add it to IGNORED there"
    config["num_experts"] = next((config[field] for field in ("num_experts", "num_local_experts", "n_routed_experts") if config.get(field)), 0)
    found.of(_check_sizes, config, path)
    if config["num_experts"] and not config.get("norm_topk_prob"):
        yield f"{path}: norm_topk_prob is {config.get('norm_topk_prob')!r}; only True is implemented: expert weights that sum to one"
    if config.get("attention_bias") and config["model_type"] != "glm4_moe":
        yield f"{path}: attention_bias is True, which is implemented for glm4_moe only"
    yield from found.found
    if not found.found:
        if config["num_attention_heads"] % config["num_key_value_heads"]:
            heads = f"num_attention_heads {config['num_attention_heads']} is not divisible by num_key_value_heads {config['num_key_value_heads']}"
            yield f"{path}: {heads}"
        rope_of(config)
    return config


@all_problems
def _check_sizes(config: dict, path: Path):
    """Fill in what may be left out; a size, a number or a switch that is none is a problem."""
    optional = {"num_key_value_heads": config.get("num_attention_heads"), "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
    config |= {name: default for name, default in optional.items() if config.get(name) is None}
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size", "max_position_embeddings")
    sizes += ("moe_intermediate_size", "num_experts_per_tok") if config["num_experts"] else ()
    wrong = [field for field in sizes if type(config.get(field)) is not int or config[field] < 1]
    if config.get("head_dim") is None and not wrong:
        config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    if config.get("head_dim") is not None and (type(config["head_dim"]) is not int or config["head_dim"] < 1):
        wrong.append("head_dim")
    for field in wrong:
        yield f"{path}: {field} is {config.get(field)!r}; it must be a positive integer"
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        yield f"{path}: the rope settings are {rope!r}; they must be an object"
        rope = {}
    numbers = {name: config.get(name) for name in ("rms_norm_eps", "rope_theta", "partial_rotary_factor")} | {f"rope {name}": rope.get(name) for name in rope}
    for field, value in numbers.items():
        if field not in ("rope rope_type", "rope type") and value is not None and (type(value) not in (int, float) or not 0 < value < 1e12):
            yield f"{path}: {field} is {value!r}; it must be a positive number"
    if type(config["tie_word_embeddings"]) is not bool:
        yield f"{path}: tie_word_embeddings is {config['tie_word_embeddings']!r}; it must be true or false"


def generation_eos(folder: str | Path) -> list:
    """The tokens that end a response by generation_config.json, as they stand there; [] without that file."""
    path = Path(folder) / "generation_config.json"
    try:
        eos = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
    except (OSError, ValueError, AttributeError) as error:
        raise BadInput(f"{path} is no JSON object ({error}): copy it again, or remove it") from error
    return eos if isinstance(eos, list) else [] if eos is None else [eos]


def rope_of(config: dict) -> dict:
    """GPTModel's rotary arguments. transformers 5 writes rope_parameters; before it were rope_theta and rope_scaling."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", config.get("rope_theta", 10000.0))
    percent = rope.pop("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    left = sorted(name for name, value in rope.items() if value is not None)
    if kind == "default" and not left:
        return {"rotary_base": theta, "rotary_percent": percent}
    # Megatron has Llama 3's frequencies with these constants (rotary_pos_embedding.RotaryEmbedding._apply_scaling); only the factor is free.
    fixed = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    if kind == "llama3" and all(rope.get(k) == v for k, v in fixed.items()):
        return {"rotary_base": theta, "rope_scaling": True, "rope_scaling_factor": rope["factor"]}
    raise BadInput(f"rope settings {kind!r} with {rope} are not implemented; implemented are 'default', and 'llama3' with {fixed}")


@all_problems
def megatron_arguments(config: dict, *, tp: int) -> tuple[dict, dict]:
    """A checked config -> (arguments of TransformerConfig, arguments of GPTModel). Raises BadInput where tp does not divide."""
    for field in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if config[field] % tp:
            yield f"{field} {config[field]} is not divisible by --tp {tp}: use a --tp that divides it"
    transformer = dict(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=config["num_attention_heads"],
        num_query_groups=config["num_key_value_heads"],
        kv_channels=config["head_dim"],
        normalization="RMSNorm",
        layernorm_epsilon=config["rms_norm_eps"],
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=config["model_type"] == "qwen2" or bool(config.get("attention_bias")),
        qk_layernorm=config["model_type"] in ("qwen3", "qwen3_moe") or bool(config.get("use_qk_norm")),
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    if config["num_experts"]:
        transformer |= _moe_arguments(config)
    gpt = dict(
        vocab_size=-(-config["vocab_size"] // tp) * tp,  # padded rows are masked in the softmax and left out of every export
        max_sequence_length=config["max_position_embeddings"],
        position_embedding_type="rope",
        share_embeddings_and_output_weights=config["tie_word_embeddings"],
        **rope_of(config),
    )
    return transformer, gpt


@all_problems
def check_layout(config: dict, *, world_size: int, tp: int, pp: int, cp: int, ep: int):
    """What keeps the model from being trained on so many ranks with these parallel sizes."""
    if tp < 1 or world_size % tp:
        yield f"--tp {tp} does not divide the {world_size} ranks: use a --tp that divides --nproc-per-node times the nodes"
    elif min(pp, cp) < 1 or world_size % (tp * pp * cp):
        yield f"--tp {tp} times --pp {pp} times --cp {cp} does not divide the {world_size} ranks: use another --pp or --cp"
    if pp > 0 and (layers_in_last_stage(config, pp) or 1) < 1:
        yield f"--pp {pp} leaves the last stage without layers, of which the model has {config['num_hidden_layers']}: use a smaller --pp"
    stage_ranks, experts = world_size // max(pp, 1), config["num_experts"]
    if ep < 1 or stage_ranks % ep or experts % ep or (ep > 1 and not experts):
        rule = f"must divide the {stage_ranks} ranks of a pipeline stage and the model's {experts} experts"
        yield f"--ep {ep} {rule}: use another --ep, and 1 for a dense model"
    if tp > 0:
        megatron_arguments(config, tp=tp)


def layers_in_last_stage(config: dict, pp: int) -> int | None:
    """None where the layers divide evenly; else what is left for the last stage, which also has the output layer, when the others have equally many."""
    layers = config["num_hidden_layers"]
    return None if layers % pp == 0 else layers - (pp - 1) * -(-layers // pp)


def _moe_arguments(config: dict) -> dict:
    """TransformerConfig's mixture of experts. Softmax over the chosen experts' logits equals Qwen3's softmax over all, chosen, and normalised to sum to one.

    GLM-4.5 scores by sigmoid; a correction bias enters the choice but not the weight. The bias is the model's, not adjusted in training here.
    """
    moe = dict(
        num_moe_experts=config["num_experts"],
        moe_router_topk=config["num_experts_per_tok"],
        moe_ffn_hidden_size=config["moe_intermediate_size"],
        moe_router_load_balancing_type="none",
        moe_router_dtype="fp32",
        moe_layer_freq=[int(is_sparse(config, layer)) for layer in range(config["num_hidden_layers"])],
    )
    if config["model_type"] == "glm4_moe":
        grouped = config.get("n_group", 1) > 1
        moe |= dict(
            moe_router_score_function="sigmoid",
            moe_router_enable_expert_bias=True,
            moe_router_bias_update_rate=0.0,
            moe_router_topk_scaling_factor=config["routed_scaling_factor"],
            moe_router_num_groups=config["n_group"] if grouped else None,
            moe_router_group_topk=config["topk_group"] if grouped else None,
            moe_shared_expert_intermediate_size=config["moe_intermediate_size"] * config["n_shared_experts"] or None,
        )
    return moe


def is_sparse(config: dict, layer: int) -> bool:
    """Whether a decoder layer has experts; GLM-4.5's first layers are dense."""
    return bool(config.get("num_experts")) and layer >= config.get("first_k_dense_replace", 0)


def layer_shapes(config: dict, layer: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a decoder layer's Hugging Face tensors, by name inside the layer; those of its experts once, with {} for the expert's number."""
    hidden, head_dim, megatron = config["hidden_size"], config["head_dim"], megatron_arguments(config, tp=1)[0]
    rows = {"q": config["num_attention_heads"] * head_dim} | dict.fromkeys("kv", config["num_key_value_heads"] * head_dim)
    shapes = {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,), "self_attn.o_proj.weight": (hidden, rows["q"])}
    shapes |= {f"self_attn.{name}_proj.weight": (size, hidden) for name, size in rows.items()}
    shapes |= {f"self_attn.{name}_proj.bias": (size,) for name, size in rows.items() if megatron["add_qkv_bias"]}
    shapes |= {f"self_attn.{name}_norm.weight": (head_dim,) for name in "qk" if megatron["qk_layernorm"]}
    mlps = {"mlp": config["intermediate_size"]}
    if is_sparse(config, layer):
        shapes |= {"mlp.gate.weight": (config["num_experts"], hidden)}
        shapes |= {"mlp.gate.e_score_correction_bias": (config["num_experts"],)} if "moe_router_enable_expert_bias" in megatron else {}
        mlps = {"mlp.experts.{}": config["moe_intermediate_size"], "mlp.shared_experts": megatron.get("moe_shared_expert_intermediate_size")}
    for name, size in mlps.items():
        if size:
            shapes |= {f"{name}.gate_proj.weight": (size, hidden), f"{name}.up_proj.weight": (size, hidden), f"{name}.down_proj.weight": (hidden, size)}
    return shapes


def hf_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of the model, by Hugging Face name."""
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], config["hidden_size"]), "model.norm.weight": (config["hidden_size"],)}
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
    """Number of the expert among those of this expert-parallel rank, for which {} stands in the names; None: no expert's."""

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
    "self_attention.linear_qkv.layer_norm_weight": Rule(("input_layernorm.weight",)),  # Transformer Engine fuses the norm into the linear
    "self_attention.linear_qkv.weight": Rule(tuple(name.format("weight") for name in _QKV), tp_dim=0),
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
    "mlp.shared_experts.linear_fc1.weight": Rule(("mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"), tp_dim=0),
    "mlp.shared_experts.linear_fc2.weight": Rule(("mlp.shared_experts.down_proj.weight",), tp_dim=1),
    "mlp.experts.linear_fc1.weight": Rule(("mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight"), tp_dim=0),
    "mlp.experts.linear_fc2.weight": Rule(("mlp.experts.{}.down_proj.weight",), tp_dim=1),
}
# The experts' parameters as Megatron's SequentialMLP names them, and as Transformer Engine's grouped linear does.
_EXPERT = re.compile(r"mlp\.experts\.(?:local_experts\.(\d+)\.(linear_fc[12]\.weight)|(linear_fc[12]\.weight)(\d+))")


def parameters_of(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """All that is converted: the parameters, and the router's correction bias, which Megatron keeps as a buffer."""
    yield from model.named_parameters()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name.endswith("router.expert_bias"))


def rule_of(megatron_name: str, *, first_layer: int = 0) -> Rule:
    """The rule of a parameter of GPTModel, with full Hugging Face names. Raises KeyError for a parameter no rule covers.

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
    return Rule(tuple(f"model.layers.{first_layer + int(match[1])}.{name}" for name in rule.hf), rule.tp_dim, expert)


def split_stacked(stacked: torch.Tensor, parts: int, *, head_dim: int, groups: int) -> list[torch.Tensor]:
    """One rank's shard of a stacked tensor -> that rank's slices of the Hugging Face tensors. groups: key-value heads on this rank."""
    if parts == 3:
        by_group = stacked.view(groups, -1, *stacked.shape[1:])  # [groups, (heads per group + 2) * head_dim, ...]
        sizes = [by_group.shape[1] - 2 * head_dim, head_dim, head_dim]
        return [part.reshape(-1, *stacked.shape[1:]) for part in by_group.split(sizes, dim=1)]
    return list(stacked.chunk(parts))


def stack_parts(parts: list[torch.Tensor], *, groups: int) -> torch.Tensor:
    """The inverse of split_stacked."""
    if len(parts) == 3:
        return torch.cat([part.reshape(groups, -1, *part.shape[1:]) for part in parts], dim=1).reshape(-1, *parts[0].shape[1:])
    return torch.cat(parts)


def merged_linears(config: dict, layer: int) -> dict[str, tuple[tuple[str, ...], tuple[int, ...], bool]]:
    """The linear layers of a decoder layer as SGLang merges them: (names in the layer, rows of their parts, whether SGLang's rule binds it at engine TP 1)."""
    q_rows, kv_rows = config["num_attention_heads"] * config["head_dim"], config["num_key_value_heads"] * config["head_dim"]
    merged = {
        "qkv": (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), (q_rows, kv_rows), True),
        "o": (("self_attn.o_proj",), (q_rows,), False),
    }
    if is_sparse(config, layer):
        prefix, rows = "mlp.shared_experts", config["moe_intermediate_size"] * (config.get("n_shared_experts") or 0)
        projections = ("gate_proj", "up_proj", "down_proj")
        experts = tuple(f"mlp.experts.{expert}.{projection}" for expert in range(config["num_experts"]) for projection in projections)
        merged["experts"] = (experts, (config["moe_intermediate_size"],), True)
    else:
        prefix, rows = "mlp", config["intermediate_size"]
    if rows:
        merged |= {"gate_up": ((f"{prefix}.gate_proj", f"{prefix}.up_proj"), (rows,), True), "down": ((f"{prefix}.down_proj",), (rows,), False)}
    return merged


def unquantized_linears(config: dict, *, engine_tp: int, engine_ep: int = 1, layers: Iterable[int] | None = None) -> list[str]:
    """Linear layers that stay BF16 under block FP8, by full Hugging Face module name. lm_head always does. layers: of these only.

    SGLang's rule (Fp8LinearMethod.validate_block_quant_shapes, and the like for experts): in a merged layer, and in any layer split over engine tensor
    parallelism, each part's rows per rank must be a multiple of 128; under tensor parallelism so must the split columns of o_proj and down_proj. Experts are
    split over what engine_ep, over which whole ones are spread, leaves of engine_tp.
    This list serves both the engine's config (modules_to_not_convert) and the hand-off, so that they cannot disagree.
    """
    kept = ["lm_head"]
    for layer in range(config["num_hidden_layers"]) if layers is None else layers:
        for merged, (names, sizes, always) in merged_linears(config, layer).items():
            parts = engine_tp // engine_ep if merged == "experts" else engine_tp
            if (always or engine_tp > 1) and any(size % (128 * parts) for size in sizes):
                kept += [f"model.layers.{layer}.{name}" for name in (*names, *(["mlp.experts"] if merged == "experts" else []))]
    return kept


def fp8_config(config: dict, *, engine_tp: int, engine_ep: int = 1, scale_format: str = "fp32") -> dict:
    """The quantization_config of a block-FP8 checkpoint, for SGLang's model override and for the config.json of an FP8 export."""
    quantization = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": unquantized_linears(config, engine_tp=engine_tp, engine_ep=engine_ep),
    }
    return quantization | ({"scale_fmt": "ue8m0"} if scale_format == "ue8m0" else {})
