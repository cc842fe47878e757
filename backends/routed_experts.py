"""Which experts each token took, from the engine to the trainer: a compact array of expert numbers.

    SGLang      int32 [tokens, all layers, K]         in base64
    a sample    uint8 [tokens, layers with experts, K], as bytes; uint16 beyond 256 experts
    a rank      int16 [T, its layers with experts, K]; -1 where the engine reported nothing

An engine reports the experts of every token that it has run through the model. That is all but the
last one: it was sampled, and nothing came after it. GLM-4.5 takes 8 of 160 experts in 92 layers, so
a token has 736 bytes.

Shape letters: T tokens, L layers with experts, K experts per token.
"""

import base64

import numpy as np

from backends.huggingface.config import is_sparse


def sparse_layers(config: dict) -> list[int]:
    """Return the numbers of the layers that have experts."""
    return [layer for layer in range(config["num_hidden_layers"]) if is_sparse(config, layer)]


def packed_dtype(config: dict) -> type:
    """Return the type that holds an expert's number."""
    return np.uint8 if config["num_experts"] <= 256 else np.uint16


def pack_reported(reported: str, config: dict) -> bytes:
    """Return what a sample holds of SGLang's report (extract_routed_experts_from_meta_info)."""
    shape = -1, config["num_hidden_layers"], config["num_experts_per_tok"]
    experts_TLK = np.frombuffer(base64.b64decode(reported), np.int32).reshape(shape)
    return experts_TLK[:, sparse_layers(config)].astype(packed_dtype(config)).tobytes()


def unpack(sample, config: dict) -> np.ndarray:
    """Return the experts of a data.sample.Sample, int16 [T, L, K].

    Raises ValueError naming the sample if they are not of this model, or do not cover the tokens
    before its last counted one, which was sampled behind them.
    """
    name = f"sample {sample.index} of group {sample.group}"
    packed, dtype = sample.routed_experts, packed_dtype(config)
    shape = len(sparse_layers(config)), config["num_experts_per_tok"]
    row = shape[0] * shape[1] * np.dtype(dtype).itemsize
    if len(packed) % row:
        found = f"{len(packed)} bytes, which is no multiple of a token's {row}"
        raise ValueError(f"{name}: routed_experts has {found}: it is of another model")
    experts_TLK = np.frombuffer(packed, dtype).reshape(-1, *shape)
    if experts_TLK.size and (largest := experts_TLK.max()) >= (experts := config["num_experts"]):
        found = f"routed_experts names expert {largest} of {experts}"
        raise ValueError(f"{name}: {found}: it is of another model")
    ordered_TLK = np.sort(experts_TLK, axis=-1)
    if (ordered_TLK[..., 1:] == ordered_TLK[..., :-1]).any():
        raise ValueError(
            f"{name}: routed_experts names an expert twice for one token: does the engine's"
            " --sglang moe_runner_backend report them?"
        )
    counted = np.flatnonzero(sample.loss_mask)
    least = len(sample.prompt_ids) + int(counted[-1]) if len(counted) else 0
    tokens = len(sample.prompt_ids) + len(sample.response_ids)
    if not least <= len(experts_TLK) < tokens:
        found = f"routed_experts has {len(experts_TLK)} tokens"
        raise ValueError(f"{name}: {found}; it must have {least} at least, and less than {tokens}")
    return experts_TLK.astype(np.int16)
