"""Which weights of a model the engine holds in block FP8."""

import re

from backends.huggingface.names import merged_linears, unquantized_linears


def fp8_weights(
    config: dict, *, rollout_dtype: str, engine_tp: int, engine_ep: int = 1
) -> frozenset[str]:
    """Return the Hugging Face names of the weights that the engine holds in FP8.

    With --rollout-dtype fp8 that is every linear layer that the engine's config does not exempt.
    config: config.json, checked.
    """
    if rollout_dtype != "fp8":
        return frozenset()
    kept = set(unquantized_linears(config, engine_tp=engine_tp, engine_ep=engine_ep))
    return frozenset(f"{module}.weight" for module in linear_modules(config) if module not in kept)


def linear_modules(config: dict) -> list[str]:
    """Return the full Hugging Face names of linear modules in decoder layers, without routers."""
    modules = []
    for layer in range(config["num_hidden_layers"]):
        for merged in merged_linears(config, layer).values():
            modules += [f"model.layers.{layer}.{name}" for name in merged.names]
    return modules


def describe(config: dict, fp8: frozenset[str]) -> str:
    """Say in one line which weights the engine holds in FP8, and which linear layers stay BF16.

    They do by SGLang's block rule, see unquantized_linears.
    """
    if not fp8:
        return "hand-off: every weight as the trainer holds it"
    kept = [module for module in linear_modules(config) if f"{module}.weight" not in fp8]
    kinds = sorted({re.sub(r"model\.layers\.\d+\.|\.\d+", "", module) for module in kept})
    why = "because a merged layer's parts must have a multiple of 128 rows in SGLang"
    reason = f"; kept in BF16, {why}: {', '.join(kinds)}" if kinds else ""
    return f"hand-off: {len(fp8)} weights in block FP8{reason}"
