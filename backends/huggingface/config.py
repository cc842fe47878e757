"""config.json -> what it says, checked, and the arguments of Megatron's TransformerConfig and
GPTModel.

A config field that is in none of the lists below is refused by name: an ignored rope or activation
setting would train a different model in silence. A field that is left out has the value that
transformers gives it: the engine reads the file so. The dtype of the stored weights does not
matter: --train-dtype and --rollout-dtype decide what is computed with, and exports are BF16 or FP8.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import torch.nn.functional as F
from transformers import AutoConfig

from common.errors import BadInput, ProblemList, all_problems, model_problem, read_json
from harness.checks import check_ranks

FAMILIES = {
    "qwen3": "Qwen3ForCausalLM", "qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM", "glm4_moe": "Glm4MoeForCausalLM",
}  # fmt: skip

# Fields that enter the mapping.
MAPPED = {
    "model_type", "architectures", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "tie_word_embeddings",
    "partial_rotary_factor", "attention_bias",
}  # fmt: skip
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # names of their number
OWN_EXPERTS = {"qwen3_moe": "num_experts", "glm4_moe": "n_routed_experts"}  # which the engine reads
MAPPED_MOE = {*EXPERTS, "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"}
MAPPED_OF = {
    "qwen3_moe": MAPPED_MOE,
    "glm4_moe": MAPPED_MOE | {
        "n_shared_experts", "first_k_dense_replace", "routed_scaling_factor", "n_group", "topk_group",
        "use_qk_norm", "num_nextn_predict_layers",
    },
}  # fmt: skip
# Fields that only one value of is implemented.
REQUIRED = {
    "hidden_act": ("silu",), "mlp_bias": (False,), "use_sliding_window": (False,), "attention_dropout": (0, 0.0),
    "pretraining_tp": (1,), "rope_interleaved": (False,), "quantization_config": (None,), "is_llama_config": (True,),
    "decoder_sparse_step": (1,), "mlp_only_layers": ([], None),
}  # fmt: skip
# How a token's experts are chosen; a dense model has none of these fields.
REQUIRED_OF = {
    "qwen3_moe": {"scoring_func": ("softmax",)},
    "glm4_moe": {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
}
# Fields that do not change what the model computes.
IGNORED = {
    "dtype", "torch_dtype", "transformers_version", "use_cache", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id",
    "sliding_window", "max_window_layers", "_name_or_path", "transformers.js_config", "output_attentions", "output_hidden_states", "return_dict",
    "output_router_logits", "router_aux_loss_coef",
    "chunk_size_feed_forward", "is_encoder_decoder", "unk_token_id", "_model_name_or_path", "id2label", "label2id", "problem_type", "use_mrope",
}  # fmt: skip
# Fields whose default differs between families: transformers says what a config without them has.
FILLED_IN = (
    "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings",
    "partial_rotary_factor", "attention_bias", "use_qk_norm", "norm_topk_prob",
    "n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "routed_scaling_factor",
)  # fmt: skip
MOST_LAYERS = 10_000
NUMBERS = ("rms_norm_eps", "rope_theta", "partial_rotary_factor", "routed_scaling_factor")


@all_problems
def read_config(folder: str | Path) -> dict:
    """config.json of a Hugging Face folder, checked field by field.

    Raises BadInput naming the field.
    """
    path = Path(folder) / "config.json"
    if problem := model_problem(folder):
        raise BadInput(problem)
    config = read_json(path)
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise BadInput(f"{path} must be an object with a model_type, one of {', '.join(FAMILIES)}")
    if config["model_type"] not in FAMILIES:
        raise BadInput(
            f"{path}: model_type {config['model_type']!r} is not supported; supported are"
            f" {', '.join(FAMILIES)}"
        )
    layers = config.get("num_hidden_layers")
    if type(layers) is int and layers > MOST_LAYERS:  # transformers would list them one by one
        raise BadInput(f"{path}: num_hidden_layers {layers} must be at most {MOST_LAYERS}")
    try:
        known = AutoConfig.for_model(**config)  # transformers knows the type of every field
    except Exception as error:  # it raises many kinds, and all are about this file
        raise BadInput(f"{path} is no {config['model_type']} config: {error}") from error
    found, family = ProblemList(), FAMILIES[config["model_type"]]
    if config.get("architectures") != [family]:
        given = f"architectures is {config.get('architectures')!r}"  # None: also if it is not there
        fix = f'the engine chooses its model class by it: write "architectures": ["{family}"]'
        yield (
            f"{path}: {given}; {fix} if this is a causal language model, and use another model if "
            "it is not"
        )
    required = REQUIRED | REQUIRED_OF.get(config["model_type"], {})
    for field, value in config.items():
        if field == "layer_types":
            if set(value or ()) - {"full_attention"}:
                yield (
                    f"{path}: layer_types holds {sorted(set(value))}; only full_attention is"
                    " implemented"
                )
        elif field in required:
            if value not in required[field]:
                yield f"{path}: {field} is {value!r}; only {required[field][0]!r} is implemented"
        elif field not in MAPPED | IGNORED | MAPPED_OF.get(config["model_type"], set()):
            yield (
                f"{path}: field {field!r} is unknown to the mapping in hf_config.py; if it does not"
                " change the model, add it to IGNORED there"
            )
    experts = {field: config[field] for field in EXPERTS if config.get(field)}
    theirs = getattr(known, OWN_EXPERTS.get(config["model_type"], ""), 0)
    if theirs and any(count != theirs for count in experts.values()):
        yield (
            f"{path}: {experts} is read as {theirs} experts by transformers and the engine: keep"
            f" one of these fields, the one that {config['model_type']} has"
        )
    config["num_experts"] = next(iter(experts.values()), 0)
    for field in FILLED_IN:
        if config.get(field) is None and getattr(known, field, None) is not None:
            config[field] = getattr(known, field)
    found.collect(_check_sizes, config, path)
    if config["num_experts"] and not config.get("norm_topk_prob"):
        yield (
            f"{path}: norm_topk_prob is {config.get('norm_topk_prob')!r}; only True is implemented:"
            " expert weights that sum to one"
        )
    if config.get("attention_bias") and config["model_type"] != "glm4_moe":
        yield f"{path}: attention_bias is True, which is implemented for glm4_moe only"
    yield from found.texts
    if not found.texts:
        if config["num_attention_heads"] % config["num_key_value_heads"]:
            heads = (
                f"num_attention_heads {config['num_attention_heads']} is not divisible by"
                f" num_key_value_heads {config['num_key_value_heads']}"
            )
            yield f"{path}: {heads}"
        yield from _rope_problems(config, known.rope_parameters, path)
    return config


def _rope_problems(config: dict, known: dict, path: Path) -> Iterator[str]:
    """Yield where the rope settings contradict one another.

    known: what transformers makes of them, and so the engine.
    """
    rope, inside = (
        rope_of(config),
        config.get("rope_parameters") or config.get("rope_scaling") or {},
    )
    twice = ("rope_theta", "partial_rotary_factor")
    both = [name for name in twice if None not in (inside.get(name), config.get(name))]
    theirs = rope_of({"rope_parameters": known})
    if any(inside[name] != config[name] for name in both) or rope != theirs:
        names = (*twice, "rope_scaling", "rope_parameters")
        given = {name: config[name] for name in names if config.get(name) is not None}
        yield (
            f"{path}: the rope settings {given} contradict one another: keep rope_parameters alone,"
            " or rope_theta and rope_scaling"
        )
    if config["model_type"] != "glm4_moe" and rope.get("rotary_percent", 1.0) != 1:
        yield (
            f"{path}: partial_rotary_factor {rope['rotary_percent']} is implemented for glm4_moe"
            " only: the engine's model turns all dimensions of a head; use 1, or leave it out"
        )
    dimensions = int(config["head_dim"] * rope.get("rotary_percent", 1.0))
    if dimensions % 2 or not dimensions:
        yield (
            f"{path}: rope would turn {dimensions} of head_dim {config['head_dim']} dimensions; it "
            "turns pairs, so this must be even and above 0"
        )


@all_problems
def _check_sizes(config: dict, path: Path):
    """Fill in head_dim, which may be left out; yield a size, number or switch that is none."""
    sizes = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "max_position_embeddings",
    )
    is_moe = config["model_type"] in ("qwen3_moe", "glm4_moe")
    sizes += ("moe_intermediate_size", "num_experts_per_tok", "num_experts") if is_moe else ()
    sizes += ("n_group", "topk_group") if config["model_type"] == "glm4_moe" else ()
    wrong = [field for field in sizes if type(config.get(field)) is not int or config[field] < 1]
    if config.get("head_dim") is None and not wrong:
        config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    if config.get("head_dim") is not None and (
        type(config["head_dim"]) is not int or config["head_dim"] < 1
    ):
        wrong.append("head_dim")
    for field in wrong:
        yield f"{path}: {field} is {config.get(field)!r}; it must be a positive integer"
    if is_moe and not wrong:
        yield from _expert_problems(config, path)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        yield f"{path}: the rope settings are {rope!r}; they must be an object"
        rope = {}
    numbers = {name: config.get(name) for name in NUMBERS} | {
        f"rope {name}": rope.get(name) for name in rope
    }
    for field, value in numbers.items():
        if (
            field not in ("rope rope_type", "rope type")
            and value is not None
            and (type(value) not in (int, float) or not 0 < value < 1e12)
        ):
            yield f"{path}: {field} is {value!r}; it must be a positive number"
    if type(config["tie_word_embeddings"]) is not bool:
        yield (
            f"{path}: tie_word_embeddings is {config['tie_word_embeddings']!r}; it must be true or"
            " false"
        )


def _expert_problems(config: dict, path: Path) -> Iterator[str]:
    """Yield what of a mixture of experts' sizes does not fit together."""
    experts, groups = config["num_experts"], config.get("n_group", 1)
    if config["num_experts_per_tok"] == 1:
        yield (
            f"{path}: num_experts_per_tok is 1; it must be at least 2: the weight of a single"
            " expert is 1 here, and Megatron gives it another"
        )
    if config["num_experts_per_tok"] > experts:
        yield (
            f"{path}: num_experts_per_tok {config['num_experts_per_tok']} must be at most the "
            f"model's {experts} experts"
        )
    if experts % groups or config.get("topk_group", 1) > groups:
        yield (
            f"{path}: n_group {groups} must divide the {experts} experts, and topk_group "
            f"{config.get('topk_group', 1)} be at most n_group"
        )
    elif groups > 1 and config["model_type"] == "glm4_moe":
        yield from _group_problems(config, path)
    largest = {"first_k_dense_replace": config["num_hidden_layers"]}
    largest |= {"n_shared_experts": 2**16, "num_nextn_predict_layers": 2**16}
    for field, most in largest.items():
        value = config.get(field)
        if value is not None and (type(value) is not int or not 0 <= value <= most):
            yield f"{path}: {field} is {value!r}; it must be an integer from 0 to {most}"


def _group_problems(config: dict, path: Path) -> Iterator[str]:
    """Yield where the trainer would choose experts of other groups than the engine.

    Megatron ranks groups by the sum of their best num_experts_per_tok // topk_group experts
    (moe_utils.group_limited_topk), GLM and SGLang by that of their best two.
    """
    chosen, groups, of_groups = (
        config[n] for n in ("num_experts_per_tok", "n_group", "topk_group")
    )
    size = config["num_experts"] // groups
    if size < 2:
        yield (
            f"{path}: n_group {groups} leaves groups of {size} expert; groups are ranked by their"
            f" best two, so n_group must be at most {config['num_experts'] // 2}, or 1 for no"
            " groups"
        )
    elif chosen > of_groups * size:
        yield (
            f"{path}: num_experts_per_tok {chosen} must be at most {of_groups * size}, the experts"
            f" of topk_group {of_groups} groups: use a larger topk_group"
        )
    elif is_grouped(config) and chosen // of_groups != 2:
        yield (
            f"{path}: n_group {groups} with topk_group {of_groups} is implemented where"
            f" num_experts_per_tok // topk_group is 2; here it is {chosen} // {of_groups} ="
            f" {chosen // of_groups}: the engine ranks groups by their best 2 experts, the trainer"
            f" by their best {chosen // of_groups}; use a model with n_group 1, or such numbers"
        )


def is_grouped(config: dict) -> bool:
    """Tell whether a token's experts must be of its best groups; not where all groups are chosen."""
    return config.get("topk_group", 1) < config.get("n_group", 1)


def rope_of(config: dict) -> dict:
    """GPTModel's rotary arguments. transformers 5 writes rope_parameters; before it were rope_theta
    and rope_scaling.
    """
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", config.get("rope_theta", 10000.0))
    percent = rope.pop("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    left = sorted(name for name, value in rope.items() if value is not None)
    if kind == "default" and not left:
        return {"rotary_base": theta, "rotary_percent": percent}
    # Megatron has Llama 3's frequencies with these constants
    # (rotary_pos_embedding.RotaryEmbedding._apply_scaling); only the factor is free.
    fixed = {
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    if kind == "llama3" and all(rope.get(k) == v for k, v in fixed.items()):
        return {"rotary_base": theta, "rope_scaling": True, "rope_scaling_factor": rope["factor"]}
    raise BadInput(
        f"rope settings {kind!r} with {rope} are not implemented; implemented are 'default', and"
        f" 'llama3' with {fixed}"
    )


@all_problems
def megatron_arguments(config: dict, *, tp: int) -> tuple[dict, dict]:
    """A checked config -> (arguments of TransformerConfig, arguments of GPTModel).

    Raises BadInput where tp does not divide.
    """
    for field in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if config[field] % tp:
            yield (
                f"{field} {config[field]} is not divisible by --tp {tp}: use a --tp that divides it"
            )
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
        qk_layernorm=config["model_type"] in ("qwen3", "qwen3_moe")
        or bool(config.get("use_qk_norm")),
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    if config["num_experts"]:
        transformer |= _moe_arguments(config)
    gpt = dict(
        vocab_size=-(-config["vocab_size"] // tp)
        * tp,  # padded rows are masked in the softmax and left out of every export
        max_sequence_length=config["max_position_embeddings"],
        position_embedding_type="rope",
        share_embeddings_and_output_weights=config["tie_word_embeddings"],
        **rope_of(config),
    )
    return transformer, gpt


@all_problems
def check_layout(config: dict, *, world_size: int, tp: int, pp: int, cp: int, ep: int) -> None:
    """What keeps the model from being trained on so many ranks with these parallel sizes."""
    found, sizes = ProblemList(), dict(tp=tp, pp=pp, cp=cp, ep=ep)
    found.collect(check_ranks, world_size, **sizes)
    if pp > 0 and (layers_in_last_stage(config, pp) or 1) < 1:
        yield (
            f"--pp {pp} leaves the last stage without layers, of which the model has"
            f" {config['num_hidden_layers']}: use a smaller --pp"
        )
    experts = config["num_experts"]
    if ep > 0 and (experts % ep or (ep > 1 and not experts)):
        rule = f"must divide the model's {experts} experts"
        yield f"--ep {ep} {rule}: use another --ep, and 1 for a dense model"
    if tp > 0:
        found.collect(megatron_arguments, config, tp=tp)
    yield from found.texts


def layers_in_last_stage(config: dict, pp: int) -> int | None:
    """None where the layers divide evenly; else what is left for the last stage, which also has the
    output layer, when the others have equally many.
    """
    layers = config["num_hidden_layers"]
    return None if layers % pp == 0 else layers - (pp - 1) * -(-layers // pp)


def is_sparse(config: dict, layer: int) -> bool:
    """Whether a decoder layer has experts; GLM-4.5's first layers are dense."""
    return bool(config.get("num_experts")) and layer >= config.get("first_k_dense_replace", 0)


def _moe_arguments(config: dict) -> dict:
    """TransformerConfig's mixture of experts.

    Softmax over the chosen experts' logits equals Qwen3's softmax over all, chosen, and normalised
    to sum to one.

    GLM-4.5 scores by sigmoid; a correction bias enters the choice but not the weight. The bias is
    the model's, not adjusted in training here.
    """
    moe = dict(
        num_moe_experts=config["num_experts"],
        moe_router_topk=config["num_experts_per_tok"],
        moe_ffn_hidden_size=config["moe_intermediate_size"],
        moe_router_load_balancing_type="none",
        moe_router_dtype="fp32",
        moe_layer_freq=[
            int(is_sparse(config, layer)) for layer in range(config["num_hidden_layers"])
        ],
    )
    if config["model_type"] == "glm4_moe":
        grouped = is_grouped(config)
        moe |= dict(
            moe_router_score_function="sigmoid",
            moe_router_enable_expert_bias=True,
            moe_router_bias_update_rate=0.0,
            moe_router_topk_scaling_factor=config["routed_scaling_factor"],
            moe_router_num_groups=config["n_group"] if grouped else None,
            moe_router_group_topk=config["topk_group"] if grouped else None,
            moe_shared_expert_intermediate_size=config["moe_intermediate_size"]
            * config["n_shared_experts"]
            or None,
        )
    return moe


def generation_eos(folder: str | Path) -> list:
    """The tokens that end a response by generation_config.json, as they stand there; [] without
    that file.
    """
    path = Path(folder) / "generation_config.json"
    read = read_json(path) if os.path.lexists(path) else {}
    if not isinstance(read, dict):
        raise BadInput(f"{path} is no JSON object: copy it again, or remove it")
    eos = read.get("eos_token_id")
    return eos if isinstance(eos, list) else [] if eos is None else [eos]
