"""--train-numerics fp8: the trainer's forward pass rounds as the FP8 engine does.

An engine in FP8 samples from a model that a BF16 trainer never sees. Here the trainer's linear
layers compute with the engine's weights and activations, rounded by the same quantizer. Gradients
pass straight through the rounding to the BF16 weights (Bengio et al., arXiv 1308.3432); the FP32
main weights and the optimizer know nothing of it. slime calls this unified FP8.

    linear layers     weights as quantize_blockwise rounds them, activations as through_fp8 does
    experts           weighed behind their last product, summed in FP32
    residual stream   added in FP32 before the next norm (layers.add_in_fp32)

FP8 amplifies: where attention alone differs, in the last bit of some BF16 values, log-probs differ
by 0.01. So on a CPU trainer and engine both attend in FP32.

Layers that the engine keeps in BF16 stay so. Where Transformer Engine is installed its blockwise
recipe takes the place of all this; see te_arguments. That path was not run.

Shape letters: N output features, K input features on this rank, T tokens.
"""

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.moe_layer import MoELayer

from backends.fp8_activations import through_fp8
from backends.huggingface.fp8 import linear_modules
from backends.huggingface.names import merged_linears, rule_of, split_stacked, stack_parts
from backends.megatron import FP32_SCALES
from common.errors import all_problems
from fp8_quant import BLOCK, dequantize_blockwise, quantize_blockwise


class RoundedLinear(torch.autograd.Function):
    """x [..., K] times a weight [N, K], both rounded to FP8; the gradient of the plain product."""

    @staticmethod
    def forward(ctx, x, weight_NK, rounded_NK):
        x_TK = through_fp8(x.flatten(0, -2))  # an expert may have no tokens
        ctx.save_for_backward(x_TK, rounded_NK)
        ctx.shape, ctx.dtypes = x.shape, (x.dtype, weight_NK.dtype)
        return F.linear(x_TK, rounded_NK).view(*x.shape[:-1], len(rounded_NK))

    @staticmethod
    def backward(ctx, grad):
        x_TK, rounded_NK = ctx.saved_tensors
        grad_TN = grad.flatten(0, -2).float()
        x_dtype, weight_dtype = ctx.dtypes
        grad_x = (grad_TN @ rounded_NK).view(ctx.shape).to(x_dtype)
        return grad_x, (grad_TN.T @ x_TK).to(weight_dtype), None


def round_as_engine(gpt: torch.nn.Module, config: dict, layout, fp8: frozenset[str]) -> None:
    """Let a model's layers compute as the engine's do.

    fp8: Hugging Face names of the weights that the engine holds in FP8. layout: a Layout.
    """
    for name, parameter in gpt.named_parameters():
        module = gpt.get_submodule(name.rpartition(".")[0])
        rule = rule_of(name, first_layer=layout.first_layer)
        is_fp8 = layout.names(rule, config)[0][0] in fp8
        if name.endswith(".weight") and parameter.dim() == 2 and is_fp8:
            module._forward_impl = _rounded_forward(parameter, rule, config, layout)
    for module in gpt.modules():
        if isinstance(module, MoELayer):
            _weigh_as_engine(module)


def _rounded_forward(parameter: torch.nn.Parameter, rule, config: dict, layout):
    """Return what takes the place of _forward_impl in a Column- or RowParallelLinear."""
    is_part = rule.tp_dim == 1

    def forward(input, weight, bias, *, allreduce_dgrad, sequence_parallel, tp_group, **_):
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, group=tp_group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=tp_group)
        # Anew for each micro-batch: it costs little beside the product, and is never stale.
        rounded_NK = rounded_shard(parameter.detach(), rule, config, layout)
        output = RoundedLinear.apply(input, weight, rounded_NK)
        output = output if bias is None else output + bias.float()
        # Parts of a sum over ranks stay in FP32; what takes the sum rounds it.
        return output if is_part else output.to(input.dtype)

    return forward


def _weigh_as_engine(layer: MoELayer) -> None:
    """Let a mixture of experts weigh and sum as SGLang does.

    Megatron multiplies an expert's weight in front of its last product; SGLang behind it, and sums
    in fp32. The factor of all routed experts comes last (Glm4MoeSparseMoeBlock.forward_normal).
    """
    factor = layer.config.moe_router_topk_scaling_factor or 1.0
    dtype = layer.config.params_dtype

    def weighted(expert):
        def forward(hidden, weight_T):
            output, bias = MLP.forward(expert, hidden)
            return output.to(dtype).float() * (weight_T / factor)[:, None], bias

        return forward

    def postprocess(output, shared_output):
        output = layer.token_dispatcher.combine_postprocess(output).to(dtype) * factor
        return output if shared_output is None else output + shared_output.to(dtype)

    for expert in layer.experts.local_experts:
        expert.forward = weighted(expert)
    layer.postprocess = postprocess


def rounded_shard(weight_NK: torch.Tensor, rule, config: dict, layout) -> torch.Tensor:
    """Return this rank's shard of a weight with the engine's rounding, float32.

    A shard whose cut falls into a block is rounded as a part of the whole: its scale is the
    block's. Collective over the ranks that share such a weight.
    """
    tp, group = layout.tp(rule), layout.group(rule)
    groups = config["num_key_value_heads"] // tp
    stacked = dict(head_dim=config["head_dim"], groups=groups)
    rounded = []
    for part in split_stacked(weight_NK, len(rule.hf), **stacked):
        is_cut = tp > 1 and part.shape[rule.tp_dim] % BLOCK
        if is_cut:
            shards = [torch.empty_like(part) for _ in range(tp)]
            dist.all_gather(shards, part.contiguous(), group=group)
            part = torch.cat(shards, rule.tp_dim)
        part = dequantize_blockwise(*quantize_blockwise(part), dtype=torch.float32)
        rounded.append(part.chunk(tp, rule.tp_dim)[group.rank()] if is_cut else part)
    return stack_parts(rounded, groups=groups)


# --- refused ------------------------------------------------------------------------------------


@all_problems
def check_numerics(config: dict, fp8: frozenset[str], *, tp: int, ep: int, has_te: bool) -> None:
    """Refuse a split by which this trainer would round otherwise than the engine."""
    if config["num_experts"] and tp > 1 and ep == 1:
        yield (
            f"--train-numerics fp8: --tp {tp} would split each expert, and its parts cannot be"
            " rounded before they are weighed: use --ep, which spreads whole experts"
        )
    columns = {"o_proj": config["num_attention_heads"] * config["head_dim"] // tp}
    columns["down_proj"] = config["intermediate_size"] // tp
    if shared := config.get("n_shared_experts"):  # of a mixture only
        columns["a shared expert's down_proj"] = shared * config["moe_intermediate_size"] // tp
    for name, size in columns.items():
        if tp > 1 and size % BLOCK:
            yield (
                f"--train-numerics fp8: {name} has {size} of its columns on each rank of --tp {tp},"
                f" and activations are rounded {BLOCK} at a time: use a smaller --tp"
            )
    if not has_te:
        return
    if os.environ.get(FP32_SCALES) != "1":
        yield (
            f"--train-numerics fp8: the environment variable {FP32_SCALES} must be 1: else"
            " Transformer Engine rounds scales to powers of two, and SGLang does not"
        )
    modules = linear_modules(config)
    if kept := [name for name in modules if f"{name}.weight" not in fp8]:
        yield (
            f"--train-numerics fp8: the engine keeps {kept[0]} in BF16, and Transformer Engine"
            " would round it: leave the flag out"
        )
    parts = [size for layer in (0, -1) for size in _parts(config, layer)]
    if config["head_dim"] % BLOCK or any(size % (BLOCK * tp) for size in parts):
        yield (
            "--train-numerics fp8: Transformer Engine would round other blocks than the engine,"
            f" because not all of a layer's parts have a multiple of {BLOCK} rows on each rank:"
            " leave the flag out"
        )


def _parts(config: dict, layer: int) -> list[int]:
    merged = merged_linears(config, range(config["num_hidden_layers"])[layer])
    return [size for kind, linear in merged.items() if kind != "experts" for size in linear.sizes]


def te_arguments(config: dict) -> dict:
    """Return TransformerConfig's arguments of Transformer Engine's blockwise FP8 recipe.

    Its blocks are the engine's: 128 x 128 of a weight, 128 features of a token. In the backward
    pass it rounds gradients to FP8, too. It rounds scales up to powers of two, unless FP32_SCALES
    is set when it is imported; backends/megatron/__init__.py does so.
    """
    padding = dict(moe_router_padding_for_fp8=True) if config["num_experts"] else {}
    return dict(fp8="e4m3", fp8_recipe="blockwise", **padding)
