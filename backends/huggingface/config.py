"""config.json of a model: read, checked, and turned into Megatron's arguments.

A field that is in none of the lists of fields.py is refused. A field that is left out gets the
value that transformers gives it, because the engine reads the file so.

The dtype of the stored weights does not matter. --train-dtype and --rollout-dtype decide what is
computed with, and exports are BF16 or FP8.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import torch.nn.functional as F
from transformers import AutoConfig

from backends.huggingface.fields import (
    EXPERTS,
    FAMILIES,
    FILLED_IN,
    IGNORED,
    MAPPED,
    MAPPED_OF,
    MOST_LAYERS,
    NUMBERS,
    OWN_EXPERTS,
    REQUIRED,
    REQUIRED_OF,
    SIZES,
)
from common.errors import BadInput, ProblemList, all_problems, model_problem, read_json
from common.settings import check_ranks


@all_problems
def read_config(folder: str | Path) -> dict:
    """Return config.json of a Hugging Face folder, checked and with left-out fields filled in.

    "num_experts" is set in every family, 0 in a dense model. Raises BadInput naming each field.
    """
    path = Path(folder) / "config.json"
    config = _read_object(folder, path)
    try:
        known = AutoConfig.for_model(**config)  # transformers knows the type of every field
    except Exception as error:  # it raises many kinds, and all are about this file
        raise BadInput(f"{path} is no {config['model_type']} config: {error}") from error
    yield from _field_problems(config, path)

    experts = {field: config[field] for field in EXPERTS if config.get(field)}
    engine_experts = getattr(known, OWN_EXPERTS.get(config["model_type"], ""), 0)
    if engine_experts and any(count != engine_experts for count in experts.values()):
        yield (
            f"{path}: transformers and the engine read {experts} as {engine_experts} experts: keep"
            f" one of these fields, the one that {config['model_type']} has"
        )
    config["num_experts"] = next(iter(experts.values()), 0)
    for field in FILLED_IN:
        if config.get(field) is None and getattr(known, field, None) is not None:
            config[field] = getattr(known, field)

    size_problems = list(_size_problems(config, path))
    if config["num_experts"] and not config.get("norm_topk_prob"):
        yield (
            f"{path}: norm_topk_prob is {config.get('norm_topk_prob')!r}; only True is implemented:"
            " expert weights that sum to one"
        )
    if config.get("attention_bias") and config["model_type"] != "glm4_moe":
        yield f"{path}: attention_bias is True, which is implemented for glm4_moe only"
    yield from size_problems
    if not size_problems:
        heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
        if heads % groups:
            found = f"num_attention_heads {heads} is not divisible by num_key_value_heads {groups}"
            yield f"{path}: {found}"
        yield from _rope_problems(config, known.rope_parameters, path)
    return config


def _read_object(folder: str | Path, path: Path) -> dict:
    """Return the file as it is. Raises BadInput where transformers could make nothing of it."""
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
    return config


# --- checks -------------------------------------------------------------------------------------


def _field_problems(config: dict, path: Path) -> Iterator[str]:
    """Yield fields that are unknown, and fields whose value is not implemented."""
    model_type = config["model_type"]
    architecture = FAMILIES[model_type]
    if config.get("architectures") != [architecture]:
        yield (
            f"{path}: architectures is {config.get('architectures')!r}; the engine chooses its"
            f' model class by it: write "architectures": ["{architecture}"] if this is a causal'
            " language model, and use another model if it is not"
        )
    required = REQUIRED | REQUIRED_OF.get(model_type, {})
    understood = MAPPED | IGNORED | MAPPED_OF.get(model_type, set())
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
        elif field not in understood:
            yield (
                f"{path}: field {field!r} is unknown; if it does not change the model, add it to"
                " IGNORED in backends/huggingface/fields.py"
            )


def _size_problems(config: dict, path: Path) -> Iterator[str]:
    """Yield sizes, numbers and switches that are not what they must be.

    Also fills in head_dim, which may be left out.
    """
    is_moe = config["model_type"] in ("qwen3_moe", "glm4_moe")
    sizes = SIZES
    sizes += ("moe_intermediate_size", "num_experts_per_tok", "num_experts") if is_moe else ()
    sizes += ("n_group", "topk_group") if config["model_type"] == "glm4_moe" else ()
    wrong = [field for field in sizes if not _is_size(config.get(field))]
    if config.get("head_dim") is None and not wrong:
        config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    if config.get("head_dim") is not None and not _is_size(config["head_dim"]):
        wrong.append("head_dim")
    for field in wrong:
        yield f"{path}: {field} is {config.get(field)!r}; it must be a positive integer"
    if is_moe and not wrong:
        yield from _expert_problems(config, path)

    numbers = {name: config.get(name) for name in NUMBERS}
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if isinstance(rope, dict):
        kinds = ("rope_type", "type")
        numbers |= {f"rope {name}": rope[name] for name in rope if name not in kinds}
    else:
        yield f"{path}: the rope settings are {rope!r}; they must be an object"
    for field, value in numbers.items():
        is_number = type(value) in (int, float) and 0 < value < 1e12
        if value is not None and not is_number:
            yield f"{path}: {field} is {value!r}; it must be a positive number"
    if type(config["tie_word_embeddings"]) is not bool:
        given = config["tie_word_embeddings"]
        yield f"{path}: tie_word_embeddings is {given!r}; it must be true or false"


def _is_size(value) -> bool:
    return type(value) is int and value >= 1


def _expert_problems(config: dict, path: Path) -> Iterator[str]:
    """Yield sizes of a mixture of experts that do not fit together."""
    experts, chosen = config["num_experts"], config["num_experts_per_tok"]
    groups, chosen_groups = config.get("n_group", 1), config.get("topk_group", 1)
    if chosen == 1:
        yield (
            f"{path}: num_experts_per_tok is 1; it must be at least 2: the weight of a single"
            " expert is 1 here, and Megatron gives it another"
        )
    if chosen > experts:
        yield (
            f"{path}: num_experts_per_tok {chosen} must be at most the model's {experts} experts"
        )
    if experts % groups or chosen_groups > groups:
        yield (
            f"{path}: n_group {groups} must divide the {experts} experts, and topk_group"
            f" {chosen_groups} must be at most n_group"
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
    (moe_utils.group_limited_topk). GLM and SGLang rank them by the sum of their best two.
    """
    chosen, groups = config["num_experts_per_tok"], config["n_group"]
    chosen_groups, size = config["topk_group"], config["num_experts"] // groups
    if size < 2:
        yield (
            f"{path}: n_group {groups} leaves groups of {size} expert; groups are ranked by their"
            f" best two, so n_group must be at most {config['num_experts'] // 2}, or 1 for no"
            " groups"
        )
    elif chosen > chosen_groups * size:
        yield (
            f"{path}: num_experts_per_tok {chosen} must be at most {chosen_groups * size}, the"
            f" experts of topk_group {chosen_groups} groups: use a larger topk_group"
        )
    elif is_grouped(config) and chosen // chosen_groups != 2:
        yield (
            f"{path}: n_group {groups} with topk_group {chosen_groups} is implemented where"
            f" num_experts_per_tok // topk_group is 2; here it is {chosen} // {chosen_groups} ="
            f" {chosen // chosen_groups}: the engine ranks groups by their best 2 experts, the"
            f" trainer by their best {chosen // chosen_groups}; use a model with n_group 1, or"
            " such numbers"
        )


def _rope_problems(config: dict, known: dict, path: Path) -> Iterator[str]:
    """Yield where the rope settings contradict one another.

    known: what transformers, and so the engine, makes of them.
    """
    rope = rope_of(config)
    nested = config.get("rope_parameters") or config.get("rope_scaling") or {}
    twice = ("rope_theta", "partial_rotary_factor")  # may stand in both places
    both = [name for name in twice if None not in (nested.get(name), config.get(name))]
    differs = any(nested[name] != config[name] for name in both)
    if differs or rope != rope_of({"rope_parameters": known}):
        names = (*twice, "rope_scaling", "rope_parameters")
        given = {name: config[name] for name in names if config.get(name) is not None}
        yield (
            f"{path}: the rope settings {given} contradict one another: keep rope_parameters alone,"
            " or rope_theta and rope_scaling"
        )
    turned = rope.get("rotary_percent", 1.0)
    if config["model_type"] != "glm4_moe" and turned != 1:
        yield (
            f"{path}: partial_rotary_factor {turned} is implemented for glm4_moe only: the engine's"
            " model turns all dimensions of a head; use 1, or leave it out"
        )
    dimensions = int(config["head_dim"] * turned)
    if dimensions % 2 or not dimensions:
        yield (
            f"{path}: rope would turn {dimensions} of head_dim {config['head_dim']} dimensions; it"
            " turns pairs, so this must be even and above 0"
        )


# --- what a checked config says -----------------------------------------------------------------


def is_grouped(config: dict) -> bool:
    """Tell whether a token's experts must be of its best groups. Not if all groups are chosen."""
    return config.get("topk_group", 1) < config.get("n_group", 1)


def is_sparse(config: dict, layer: int) -> bool:
    """Tell whether a decoder layer has experts. The first layers of GLM-4.5 are dense."""
    return bool(config.get("num_experts")) and layer >= config.get("first_k_dense_replace", 0)


def rope_of(config: dict) -> dict:
    """Return GPTModel's rotary arguments. Raises BadInput for a kind that is not implemented.

    transformers 5 writes rope_parameters; earlier versions wrote rope_theta and rope_scaling.
    """
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", config.get("rope_theta", 10000.0))
    percent = rope.pop("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    if kind == "default" and all(value is None for value in rope.values()):
        return {"rotary_base": theta, "rotary_percent": percent}
    # Megatron has Llama 3's frequencies with these constants
    # (rotary_pos_embedding.RotaryEmbedding._apply_scaling); only the factor is free.
    fixed = {
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    if kind == "llama3" and all(rope.get(name) == value for name, value in fixed.items()):
        return {"rotary_base": theta, "rope_scaling": True, "rope_scaling_factor": rope["factor"]}
    raise BadInput(
        f"rope settings {kind!r} with {rope} are not implemented; implemented are 'default', and"
        f" 'llama3' with {fixed}"
    )


def generation_eos(folder: str | Path) -> list:
    """Return the end tokens of generation_config.json, as they stand there. [] without the file."""
    path = Path(folder) / "generation_config.json"
    settings = read_json(path) if os.path.lexists(path) else {}
    if not isinstance(settings, dict):
        raise BadInput(f"{path} is no JSON object: copy it again, or remove it")
    eos = settings.get("eos_token_id")
    if eos is None:
        return []
    return eos if isinstance(eos, list) else [eos]


# --- Megatron's arguments -----------------------------------------------------------------------


@all_problems
def megatron_arguments(config: dict, *, tp: int) -> tuple[dict, dict]:
    """Return the arguments of TransformerConfig and those of GPTModel for a checked config.

    Raises BadInput where tp does not divide a size.
    """
    for field in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if config[field] % tp:
            yield (
                f"{field} {config[field]} is not divisible by --tp {tp}: use a --tp that divides it"
            )
    family = config["model_type"]
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
        add_qkv_bias=family == "qwen2" or bool(config.get("attention_bias")),
        qk_layernorm=family in ("qwen3", "qwen3_moe") or bool(config.get("use_qk_norm")),
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    if config["num_experts"]:
        transformer |= _moe_arguments(config)
    # Padded rows of the vocabulary are masked in the softmax and left out of every export.
    padded_vocab_size = -(-config["vocab_size"] // tp) * tp
    gpt = dict(
        vocab_size=padded_vocab_size,
        max_sequence_length=config["max_position_embeddings"],
        position_embedding_type="rope",
        share_embeddings_and_output_weights=config["tie_word_embeddings"],
        **rope_of(config),
    )
    return transformer, gpt


def _moe_arguments(config: dict) -> dict:
    """Return TransformerConfig's arguments of a mixture of experts."""
    layers = range(config["num_hidden_layers"])
    # Qwen3's softmax over all experts, of which the chosen are normalised to sum to one, equals
    # Megatron's softmax over the chosen experts' logits.
    moe = dict(
        num_moe_experts=config["num_experts"],
        moe_router_topk=config["num_experts_per_tok"],
        moe_ffn_hidden_size=config["moe_intermediate_size"],
        moe_router_load_balancing_type="none",
        moe_router_dtype="fp32",
        moe_layer_freq=[int(is_sparse(config, layer)) for layer in layers],
    )
    if config["model_type"] == "glm4_moe":
        # GLM-4.5 scores by sigmoid. A correction bias enters the choice of experts, not their
        # weights. It is the model's own and is not adjusted in training.
        grouped = is_grouped(config)
        shared_size = config["moe_intermediate_size"] * config["n_shared_experts"]
        moe |= dict(
            moe_router_score_function="sigmoid",
            moe_router_enable_expert_bias=True,
            moe_router_bias_update_rate=0.0,
            moe_router_topk_scaling_factor=config["routed_scaling_factor"],
            moe_router_num_groups=config["n_group"] if grouped else None,
            moe_router_group_topk=config["topk_group"] if grouped else None,
            moe_shared_expert_intermediate_size=shared_size or None,
        )
    return moe


def is_same_architecture(one: dict, other: dict) -> bool:
    """Tell whether Megatron builds the same model of two checked configs.

    The length of the context is no part of it, as positions are rotary.
    """
    told = [megatron_arguments(config, tp=1) for config in (one, other)]
    for _, gpt in told:
        del gpt["max_sequence_length"]
    return told[0] == told[1]


def expert_ranks(config: dict, ep: int) -> int:
    """Return over how many ranks --ep spreads the experts of a model: 1 for a dense one."""
    return ep if config["num_experts"] else 1


@all_problems
def check_layout(config: dict, *, world_size: int, tp: int, pp: int, cp: int, ep: int) -> None:
    """Refuse parallel sizes that do not fit the model or the ranks that train."""
    found = ProblemList()
    found.collect(check_ranks, world_size, tp=tp, pp=pp, cp=cp, ep=ep)
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
    """Return how many layers the last pipeline stage has, or None where all have equally many.

    The other stages then have equally many, and the last stage has fewer and the output layer.
    """
    layers = config["num_hidden_layers"]
    if layers % pp == 0:
        return None
    layers_per_stage = -(-layers // pp)
    return layers - (pp - 1) * layers_per_stage
