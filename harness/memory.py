"""Bytes on paper: what one rank of a layout holds, what a hand-off moves, what a checkpoint takes;
from config.json alone.

A trainer's rank, of the pipeline stage that needs most:

    weights        2 a parameter (FP32: 4)     Megatron's model, counted from config.json; divided by TP, experts by EP or else by TP
    gradients      4 a parameter               DDP's buffer (grad_reduce_in_fp32)
    optimizer      12 / D a parameter          FP32 main weights and Adam's two moments: the distributed optimizer splits them over the D ranks that hold the
                                               same parameters, DP times CP, for experts fewer.
                                               FP32: 8 / D, the model's weights are the main weights
    activations    see activation_bytes
    logits         2 or 4 each, twice          the last stage's, and their gradient; logprobs.py makes FP32 copies of so many rows at a time only

An engine's rank: the weights as they are handed over, and keys and values. plan.py says what must
be there at the same time.
"""

import math

from backends.huggingface.config import is_sparse, layers_in_last_stage, megatron_arguments
from backends.huggingface.names import LAYER_RULES, layer_shapes, unquantized_linears

LOGIT_ROWS = 1024  # logprobs.logprobs_and_entropy: chunk

# --- parameters ---------------------------------------------------------------------------------

TP_DIMS = {name: rule.tp_dim for rule in LAYER_RULES.values() for name in rule.hf}


def layer_kinds(config: dict) -> dict[bool, list[int]]:
    """Numbers of the layers without experts, False, and with, True: all layers of a kind have the
    same shapes.
    """
    layers = range(config["num_hidden_layers"])
    return {
        sparse: [layer for layer in layers if is_sparse(config, layer) == sparse]
        for sparse in (False, True)
    }


def layer_parameters(
    config: dict, *, sparse: bool, tp: int, ep: int, count: str = "held"
) -> tuple[float, float]:
    """Parameters of a layer on one rank: (experts', all others). count: "held", or "used", those of
    the experts that a token goes through.
    """
    layers = layer_kinds(config)[sparse]
    experts, others = 0.0, 0.0
    for name, shape in layer_shapes(config, layers[0]).items() if layers else ():
        if "{}" in name:
            n = config["num_experts"] / ep if count == "held" else config["num_experts_per_tok"]
            experts += n * math.prod(shape) / (1 if ep > 1 else tp)
        elif not name.endswith("e_score_correction_bias"):  # a buffer
            others += math.prod(shape) / (1 if TP_DIMS[name] is None else tp)
    return experts, others


def embedding_parameters(config: dict, *, tp: int = 1) -> int:
    """Of the embedding, or of the output layer, on one rank, with the rows that pad the vocabulary."""
    return -(-config["vocab_size"] // tp) * config["hidden_size"]


def parameters(config: dict) -> tuple[int, int]:
    """Of the whole model, and those of them that a token goes through, embedding and output layer
    included.
    """
    ends = (
        embedding_parameters(config) * (1 if config["tie_word_embeddings"] else 2)
        + config["hidden_size"]
    )
    kinds = layer_kinds(config).items()
    both = [
        sum(
            len(layers) * sum(layer_parameters(config, sparse=sparse, tp=1, ep=1, count=count))
            for sparse, layers in kinds
        )
        for count in ("held", "used")
    ]
    return int(both[0] + ends), int(both[1] + ends)


def stage_layers(config: dict, *, pp: int, stage: int) -> range:
    """Numbers of the layers of a pipeline stage."""
    last = layers_in_last_stage(config, pp)
    each = (
        config["num_hidden_layers"] // pp
        if last is None
        else (config["num_hidden_layers"] - last) // (pp - 1)
    )
    return range(
        stage * each, config["num_hidden_layers"] if stage == pp - 1 else (stage + 1) * each
    )


# --- the trainer --------------------------------------------------------------------------------


def activation_bytes(
    config: dict, *, sparse: bool, tokens: int, tp: int, ep: int, element_bytes: int
) -> float:
    """What one layer keeps of `tokens` tokens for its backward pass, on one rank: Megatron's local
    layers, as this trainer has them without Transformer Engine.

    Counted as Korthikanti et al. 2022 (arXiv 2205.05198, section 4) count GPT's layer: 34 bytes a
    token and hidden unit in 16 bits, all of it divided by TP where sequence parallelism is on, as
    here; attention scores are never stored (flash attention). A token keeps
        of each norm           its input in FP32, and what it is before and after the weight
        of attention           queries, keys and values; the output twice; where they are normalised, queries and keys in FP32 and normalised; on every rank
                               sine and cosine of its position, for queries and for keys
        of a gated MLP         gate and up twice, of which silu(gate) is one; their product
        of a routed expert     the same, and the token as it goes in and comes out
    Transformer Engine's fused layers keep about two thirds of it.
    """
    hidden, kv, q = (
        config["hidden_size"],
        *(
            config[name] * config["head_dim"]
            for name in ("num_key_value_heads", "num_attention_heads")
        ),
    )
    norms = 2 * hidden * (4 + 2 * element_bytes) + (
        (q + kv) * (4 + element_bytes) if megatron_arguments(config, tp=1)[0]["qk_layernorm"] else 0
    )
    attention, rope = (
        element_bytes * (3 * q + 2 * kv),
        element_bytes * 4 * config["head_dim"] * tokens,
    )
    if not sparse:
        return rope + tokens / tp * (
            norms + attention + element_bytes * 5 * config["intermediate_size"]
        )
    shared = (
        element_bytes * 5 * config["moe_intermediate_size"] * (config.get("n_shared_experts") or 0)
    )
    seen = (
        1 if ep > 1 else tp
        # Experts that are split over TP see the tokens of all its ranks, whole experts as many as one
        # rank has
    )
    routed = (
        element_bytes
        * config["num_experts_per_tok"]
        * (2 * hidden * seen + 5 * config["moe_intermediate_size"])
    )
    return rope + tokens / tp * (
        norms + attention + shared + routed + 4 * 4 * config["num_experts"]
    )


def trainer_bytes(
    config: dict,
    *,
    ranks: int,
    tp: int,
    pp: int,
    ep: int,
    element_bytes: int,
    tokens: int,
    microbatches: int,
    recompute: bool,
    reference: bool,
) -> dict[str, float]:
    """Bytes on a rank of the pipeline stage that needs most. tokens: of a micro-batch on one rank.
    reference: whether a frozen model stays on the GPU too.
    """
    expert_tp, stages = 1 if ep > 1 else tp, []
    held = {
        sparse: layer_parameters(config, sparse=sparse, tp=tp, ep=ep) for sparse in (False, True)
    }
    kept = {
        sparse: (
            activation_bytes(
                config, sparse=sparse, tokens=tokens, tp=tp, ep=ep, element_bytes=element_bytes
            )
            if layers
            else 0
        )
        for sparse, layers in layer_kinds(config).items()
    }
    for stage in range(pp):
        layers = [is_sparse(config, layer) for layer in stage_layers(config, pp=pp, stage=stage)]
        experts, others = (sum(held[sparse][i] for sparse in layers) for i in (0, 1))
        is_last, head = stage == pp - 1, embedding_parameters(config, tp=tp)
        others += (
            head * ((stage == 0) + (is_last and (pp > 1 or not config["tie_word_embeddings"])))
            + is_last * config["hidden_size"]
        )
        masters = experts / (ranks / (pp * ep * expert_tp)) + others / (
            ranks / (pp * tp)
        )  # parameters whose FP32 state is this rank's
        inputs = element_bytes * tokens * config["hidden_size"] / tp * len(layers)
        in_flight = min(pp - stage, microbatches)
        stages.append({
            "weights": element_bytes * (experts + others),
            "gradients": 4 * (experts + others),
            "optimizer": (12 if element_bytes == 2 else 8) * masters,
            "reference": element_bytes * (experts + others) if reference else 0,
            "activations": in_flight * inputs + max(kept[sparse] for sparse in layers) if recompute else in_flight * sum(kept[sparse] for sparse in layers),
            "logits": is_last * head / config["hidden_size"] * (2 * element_bytes * tokens + 4 * 4 * min(tokens, LOGIT_ROWS)),
        })  # fmt: skip
    return max(stages, key=lambda stage: sum(stage.values()))


def state_bytes(trainer: dict[str, float]) -> float:
    """What of trainer_bytes is there all the time."""
    return sum(trainer[name] for name in ("weights", "gradients", "optimizer", "reference"))


# --- hand-off and engine ------------------------------------------------------------------------


def hand_off_bytes(
    config: dict, *, dtype: str, engine_tp: int = 1, engine_ep: int = 1
) -> dict[str, int]:
    """Bytes handed over, as sync_bytes counts them: of experts, of other split tensors, and of
    those that every engine rank holds whole.
    """
    kinds = [layers for layers in layer_kinds(config).values() if layers]
    kept = set(
        unquantized_linears(
            config, engine_tp=engine_tp, engine_ep=engine_ep, layers=[layers[0] for layers in kinds]
        )
    )
    element_bytes = 4 if dtype == "fp32" else 2
    ends = (
        element_bytes * embedding_parameters(config) * (1 if config["tie_word_embeddings"] else 2)
    )
    total = {"experts": 0, "split": ends, "whole": element_bytes * config["hidden_size"]}
    for layers in kinds:
        for name, shape in layer_shapes(config, layers[0]).items():
            module = f"model.layers.{layers[0]}.{name.format(0).removesuffix('.weight')}"
            nbytes = math.prod(shape) * (
                4 if name.endswith("e_score_correction_bias") else element_bytes
            )
            if dtype == "fp8" and name.endswith("_proj.weight") and module not in kept:
                nbytes = math.prod(shape) + 4 * math.prod(-(-size // 128) for size in shape)
            part = "experts" if "{}" in name else "whole" if TP_DIMS[name] is None else "split"
            total[part] += (
                len(layers) * nbytes * (config["num_experts"] if part == "experts" else 1)
            )
    return total


def engine_bytes(
    config: dict, sent: dict[str, int], *, dtype: str, engine_tp: int
) -> dict[str, float]:
    """Bytes on an engine's rank: its weights, and the keys and values of one token."""
    kv_bytes = (
        2
        * config["num_hidden_layers"]
        * config["num_key_value_heads"]
        * config["head_dim"]
        * (4 if dtype == "fp32" else 2)
    )
    return {
        "engine": (sent["experts"] + sent["split"]) / engine_tp + sent["whole"],
        "token": kv_bytes / engine_tp,
    }


def checkpoint_bytes(parameters: int, *, train_dtype: str) -> int:
    """Of the model's weights, FP32 main weights, and Adam's two moments."""
    return parameters * ((2 if train_dtype == "bf16" else 4) + 12)
