"""Bytes on a rank, in a weight update and in a checkpoint, computed from config.json alone.

A rank of the trainer holds what follows. P is the number of parameters on the rank. D is the number
of ranks that hold the same parameters: DP times CP, fewer for experts. The pipeline stage that
needs most counts.

                   BF16       FP32
    weights        2 P        4 P        Megatron's model, divided by TP; experts by EP, if it is on
    gradients      4 P        4 P        DDP's buffer is FP32 (grad_reduce_in_fp32)
    optimizer      12 P / D   8 P / D    Adam's two moments in FP32, split over D ranks by the
                                         distributed optimizer. BF16 weights have FP32 main weights
                                         too; FP32 weights are the main weights
    reference      2 P        4 P        a frozen model, if there is one
    activations    see activation_bytes and stage_activation_bytes
    logits         see logit_bytes

With --lora-rank P of gradients and optimizer is the number of the adapters' parameters. The weights
have them on top. Without --reference the reference then needs nothing.

A rank of an engine holds the weights as they are sent, and a cache of keys and values. layouts.py
says which of all this is in memory at the same time.
"""

import math

from backends.huggingface.config import (
    expert_ranks,
    is_sparse,
    layers_in_last_stage,
    megatron_arguments,
)
from backends.huggingface.names import LAYER_RULES, layer_shapes, unquantized_linears
from fp8_quant import BLOCK

LOGIT_ROWS = 1024  # tokens in a chunk of backends/megatron/logprobs.py: logprobs_and_entropy
ROUTER_BIAS = "e_score_correction_bias"  # a buffer of the router, FP32 in every dtype

# --- parameters ---------------------------------------------------------------------------------

# {name of a tensor in a layer: the dimension that tensor parallelism splits; None: whole}
TP_DIMS = {name: rule.tp_dim for rule in LAYER_RULES.values() for name in rule.hf}


def layer_kinds(config: dict) -> dict[bool, list[int]]:
    """Return {False: numbers of the dense layers, True: numbers of the layers with experts}.

    All layers of a kind have the same shapes.
    """
    kinds = {False: [], True: []}
    for layer in range(config["num_hidden_layers"]):
        kinds[is_sparse(config, layer)].append(layer)
    return kinds


def layer_parameters(
    config: dict, *, sparse: bool, tp: int, ep: int, count: str = "held"
) -> tuple[float, float]:
    """Return the parameters of one layer on one rank: (of experts, all others).

    count: "held" counts all experts of the rank, "used" only those that one token is routed to.
    Both numbers are 0 where the model has no layer of the kind.
    """
    layers = layer_kinds(config)[sparse]
    if not layers:
        return 0.0, 0.0
    expert_tp = 1 if ep > 1 else tp  # with expert parallelism an expert is not split
    held = config["num_experts"] / ep
    experts, others = 0.0, 0.0
    for name, shape in layer_shapes(config, layers[0]).items():
        if "{}" in name:  # stands for the number of an expert
            number = held if count == "held" else config["num_experts_per_tok"]
            experts += number * math.prod(shape) / expert_tp
        elif not name.endswith(ROUTER_BIAS):
            others += math.prod(shape) / (1 if TP_DIMS[name] is None else tp)
    return experts, others


def layer_adapters(
    config: dict, *, rank: int, sparse: bool, tp: int, ep: int
) -> tuple[float, float]:
    """Return the parameters of one layer's LoRA adapters on one rank: (of experts, all others).

    A matrix [out, in] has rank (in + out) of them. Stacked matrices share what is before them. The
    numbers are 0 where the model has no layer of the kind.
    """
    layers = layer_kinds(config)[sparse]
    if not layers or not rank:
        return 0.0, 0.0
    shapes = layer_shapes(config, layers[0])
    experts, others = 0.0, 0.0
    for name, rule in LAYER_RULES.items():
        is_adapted = name.endswith(".weight") and ".linear_" in name
        if not is_adapted or rule.hf[0] not in shapes:
            continue
        rows, columns = sum(shapes[part][0] for part in rule.hf), shapes[rule.hf[0]][1]
        is_expert = "{}" in rule.hf[0]
        split = 1 if is_expert and ep > 1 else tp
        # Tensor parallelism splits the one that has the dimension by which it splits the matrix.
        parts = (rows / split, columns) if rule.tp_dim == 0 else (rows, columns / split)
        if is_expert:
            experts += config["num_experts"] / ep * rank * sum(parts)
        else:
            others += rank * sum(parts)
    return experts, others


def trained_parameters(config: dict, *, lora_rank: int) -> int:
    """Return the parameters that are trained: all, or those of LoRA's adapters."""
    if not lora_rank:
        return parameters(config)[0]
    whole, total = dict(rank=lora_rank, tp=1, ep=1), 0.0
    for sparse, layers in layer_kinds(config).items():
        total += len(layers) * sum(layer_adapters(config, sparse=sparse, **whole))
    return int(total)


def embedding_parameters(config: dict, *, tp: int = 1) -> int:
    """Return the parameters of the embedding, or of the output layer, on one rank.

    Rows that pad the vocabulary to a multiple of tp count.
    """
    return _vocabulary_rows(config, tp=tp) * config["hidden_size"]


def _vocabulary_rows(config: dict, *, tp: int) -> int:
    return -(-config["vocab_size"] // tp)


def parameters(config: dict) -> tuple[int, int]:
    """Return the parameters of the model: (all, those that one token uses).

    Both include the embedding and the output layer.
    """
    tables = 1 if config["tie_word_embeddings"] else 2
    ends = tables * embedding_parameters(config) + config["hidden_size"]  # and the last norm
    counts = []
    for count in ("held", "used"):
        total = 0.0
        for sparse, layers in layer_kinds(config).items():
            one = layer_parameters(config, sparse=sparse, tp=1, ep=1, count=count)
            total += len(layers) * sum(one)
        counts.append(int(total + ends))
    return counts[0], counts[1]


def stage_layers(config: dict, *, pp: int, stage: int) -> range:
    """Return the numbers of the layers of one pipeline stage. The last may have fewer."""
    layers, last = config["num_hidden_layers"], layers_in_last_stage(config, pp)
    each = layers // pp if last is None else (layers - last) // (pp - 1)
    return range(stage * each, layers if stage == pp - 1 else (stage + 1) * each)


def stage_parameters(
    config: dict, held: dict[bool, tuple[float, float]], *, tp: int, pp: int, stage: int
) -> tuple[float, float]:
    """Return the parameters of one pipeline stage on one rank: (of experts, all others).

    The first stage has the embedding, the last one the output layer and the last norm. Where these
    two tables are tied, the last of several stages has a copy of the embedding.
    held: {sparse: layer_parameters}.
    """
    layers = [is_sparse(config, layer) for layer in stage_layers(config, pp=pp, stage=stage)]
    experts = sum(held[sparse][0] for sparse in layers)
    others = sum(held[sparse][1] for sparse in layers)
    table = embedding_parameters(config, tp=tp)
    if stage == 0:
        others += table
    if stage == pp - 1:
        has_table = pp > 1 or not config["tie_word_embeddings"]
        others += (table if has_table else 0) + config["hidden_size"]
    return experts, others


# --- the trainer --------------------------------------------------------------------------------


def activation_bytes(
    config: dict, *, sparse: bool, tokens: int, tp: int, ep: int, element_bytes: int
) -> float:
    """Return the bytes that one layer keeps of `tokens` tokens for its backward pass, on one rank.

    The layers are Megatron's local ones. Transformer Engine's fused layers would keep about two
    thirds of it. The count follows Korthikanti et al. 2022 (arXiv 2205.05198, section 4), who find
    34 bytes a token and hidden unit for a GPT layer in 16 bits. Sequence parallelism is on, so TP
    divides all of it but rope. Attention scores are never stored (flash attention).

    With e = element_bytes, h = hidden size, q and kv = width of all query or key heads, one token
    keeps:

        each of two norms   (4 + 2 e) h        the input in FP32; before and after the weight
        query, key norms    (4 + e) (q + kv)   if any: both in FP32, and both normalised
        attention           e (3 q + 2 kv)     queries, keys and values; the output twice
        rope                4 e head_dim       sine and cosine, for queries and for keys
        gated MLP           5 e intermediate   gate and up twice, of which silu(gate) is one; their
                                               product
        a routed expert     5 e intermediate   the same, and
                            + 2 e h            the token as it goes in and as it comes out
        router              16 num_experts     four FP32 numbers an expert
    """
    e, hidden = element_bytes, config["hidden_size"]
    q = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]

    per_token = 2 * (4 + 2 * e) * hidden
    if megatron_arguments(config, tp=1)[0]["qk_layernorm"]:
        per_token += (4 + e) * (q + kv)
    per_token += e * (3 * q + 2 * kv)
    if sparse:
        width = config["moe_intermediate_size"]
        shared_experts = config.get("n_shared_experts") or 0
        # Experts that are split over TP see the tokens of all its ranks. Whole experts see as many
        # tokens as one rank has.
        token_copies = 1 if ep > 1 else tp
        expert = 5 * e * width + 2 * e * hidden * token_copies
        per_token += config["num_experts_per_tok"] * expert
        per_token += shared_experts * 5 * e * width
        per_token += 4 * 4 * config["num_experts"]
    else:
        per_token += 5 * e * config["intermediate_size"]

    rope = 4 * e * config["head_dim"] * tokens
    return rope + tokens / tp * per_token


def stage_activation_bytes(
    config: dict,
    kept: dict[bool, float],
    *,
    pp: int,
    stage: int,
    input_bytes: float,
    microbatches: int,
    recompute: bool,
) -> float:
    """Return the bytes that one pipeline stage keeps for its backward passes, on one rank.

    Stage s starts pp - s micro-batches, or as many as there are, before the first one comes back.
    It keeps the activations of its layers for each of them. With full recomputation it keeps only
    the layers' inputs, and the activations of the one layer that is being recomputed.
    kept: {sparse: activation_bytes}. input_bytes: a layer's input for one micro-batch.
    """
    layers = [is_sparse(config, layer) for layer in stage_layers(config, pp=pp, stage=stage)]
    in_flight = min(pp - stage, microbatches)
    if recompute:
        return in_flight * (input_bytes * len(layers)) + max(kept[sparse] for sparse in layers)
    return in_flight * sum(kept[sparse] for sparse in layers)


def logit_bytes(config: dict, *, tokens: int, tp: int, element_bytes: int) -> int:
    """Return the bytes of logits and their gradient on a rank of the last pipeline stage.

    The log-probs are computed in FP32 for at most LOGIT_ROWS tokens at a time; each of these has
    four FP32 numbers for each token of the vocabulary.
    """
    per_logit = 2 * element_bytes * tokens + 4 * 4 * min(tokens, LOGIT_ROWS)
    return _vocabulary_rows(config, tp=tp) * per_logit


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
    reference: dict | None,
    lora_rank: int = 0,
) -> dict[str, float]:
    """Return {what: bytes} on a rank of the pipeline stage that needs most.

    ranks: all that train. tokens: of a micro-batch on one rank. reference: config.json of a frozen
    model that stays on the GPU too. lora_rank: 0 trains all weights. The module's docstring has the
    formulas.
    """
    kinds = [sparse for sparse, layers in layer_kinds(config).items() if layers]
    load = dict(tokens=tokens, tp=tp, element_bytes=element_bytes)
    held = {sparse: layer_parameters(config, sparse=sparse, tp=tp, ep=ep) for sparse in kinds}
    as_weights = dict(rank=lora_rank, tp=tp, ep=ep)
    adapters = {sparse: layer_adapters(config, sparse=sparse, **as_weights) for sparse in kinds}
    frozen = {}
    if reference:
        split_as = dict(tp=tp, ep=expert_ranks(reference, ep))
        for sparse in (False, True):
            frozen[sparse] = layer_parameters(reference, sparse=sparse, **split_as)
    kept = {sparse: activation_bytes(config, sparse=sparse, ep=ep, **load) for sparse in kinds}
    input_bytes = element_bytes * tokens * config["hidden_size"] / tp
    expert_tp = 1 if ep > 1 else tp
    stages = []
    for stage in range(pp):
        of_stage = dict(tp=tp, pp=pp, stage=stage)
        experts, others = stage_parameters(config, held, **of_stage)
        weights, trained, trained_others = experts + others, experts, others
        if lora_rank:
            layers = stage_layers(config, pp=pp, stage=stage)
            of_layers = [adapters[is_sparse(config, layer)] for layer in layers]
            trained, trained_others = map(sum, zip(*of_layers))
            weights += trained + trained_others
        # P / D of the module's docstring, for experts and for the others.
        split = trained / (ranks / (pp * ep * expert_tp)) + trained_others / (ranks / (pp * tp))
        activations = stage_activation_bytes(
            config,
            kept,
            pp=pp,
            stage=stage,
            input_bytes=input_bytes,
            microbatches=microbatches,
            recompute=recompute,
        )
        frozen_parts = stage_parameters(reference, frozen, **of_stage) if reference else ()
        sizes = {
            "weights": element_bytes * weights,
            "gradients": 4 * (trained + trained_others),
            "optimizer": (12 if element_bytes == 2 else 8) * split,
            "reference": element_bytes * sum(frozen_parts),
            "activations": activations,
            "logits": logit_bytes(config, **load) if stage == pp - 1 else 0,
        }
        stages.append(sizes)
    return max(stages, key=lambda sizes: sum(sizes.values()))


def state_bytes(trainer: dict[str, float]) -> float:
    """Return the part of trainer_bytes that is held all the time, not only during a step."""
    return sum(trainer[name] for name in ("weights", "gradients", "optimizer", "reference"))


# --- weight update and engine -------------------------------------------------------------------


def hand_off_bytes(
    config: dict, *, dtype: str, engine_tp: int = 1, engine_ep: int = 1
) -> dict[str, int]:
    """Return the bytes that one weight update sends, which metrics.jsonl logs as sync_bytes.

    {"experts": ..., "split": other tensors that engine tensor parallelism splits, "whole": tensors
    that every rank of an engine holds whole}. dtype: --rollout-dtype; "fp8" quantizes what SGLang's
    rule allows at this engine_tp and engine_ep.
    """
    kinds = [layers for layers in layer_kinds(config).values() if layers]
    one_of_each = [layers[0] for layers in kinds]
    unquantized = set(
        unquantized_linears(config, engine_tp=engine_tp, engine_ep=engine_ep, layers=one_of_each)
    )
    element_bytes = 4 if dtype == "fp32" else 2
    tables = 1 if config["tie_word_embeddings"] else 2
    total = {
        "experts": 0,
        "split": element_bytes * embedding_parameters(config) * tables,
        "whole": element_bytes * config["hidden_size"],  # the last norm
    }
    for layers in kinds:
        for name, shape in layer_shapes(config, layers[0]).items():
            module = f"model.layers.{layers[0]}.{name.format(0).removesuffix('.weight')}"
            if name.endswith(ROUTER_BIAS):
                nbytes = 4 * math.prod(shape)
            elif dtype == "fp8" and name.endswith("_proj.weight") and module not in unquantized:
                nbytes = _fp8_bytes(shape)
            else:
                nbytes = element_bytes * math.prod(shape)
            if "{}" in name:
                total["experts"] += len(layers) * config["num_experts"] * nbytes
            else:
                total["whole" if TP_DIMS[name] is None else "split"] += len(layers) * nbytes
    return total


def _fp8_bytes(shape: tuple[int, ...]) -> int:
    """Return the bytes of a block-quantized matrix: one an element, and an FP32 scale a block."""
    return math.prod(shape) + 4 * math.prod(-(-size // BLOCK) for size in shape)


def engine_bytes(
    config: dict, sent: dict[str, int], *, dtype: str, engine_tp: int
) -> dict[str, float]:
    """Return the bytes on a rank of an engine: {"engine": weights, "token": cache of one token}.

    sent: what hand_off_bytes returns. FP8 engines keep keys and values in BF16.
    """
    kv_width = config["num_key_value_heads"] * config["head_dim"]
    element_bytes = 4 if dtype == "fp32" else 2
    token_bytes = 2 * config["num_hidden_layers"] * kv_width * element_bytes
    return {
        "engine": (sent["experts"] + sent["split"]) / engine_tp + sent["whole"],
        "token": token_bytes / engine_tp,
    }


def checkpoint_bytes(parameters: int, *, train_dtype: str) -> int:
    """Return the bytes of a checkpoint: weights, FP32 main weights, and Adam's two FP32 moments.

    parameters: those that are trained; the others are not in it.
    """
    return parameters * ((2 if train_dtype == "bf16" else 4) + 12)
