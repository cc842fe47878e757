"""LoRA (--lora-rank R): beside each frozen weight W a product of two thin matrices learns.

    y = W x + (alpha / R) B A x        A [R, in], B [out, R]; Hu et al., arXiv 2106.09685, section 4

The linear layers of attention, of the MLPs and of each expert have adapters. Everything else stays
as the model folder has it: embedding, output layer, norms and routers. Layers that Megatron stacks
share an A: query, key and value have one, gate and up another.

    trainer       computes y as written: gradients and optimizer state are those of A and B alone
    checkpoint    holds A and B alone
    engine        gets W + (alpha / R) B A, merged on each shard in FP32 and rounded once to W's
                  dtype. It knows nothing of adapters. In BF16 a change of less than half of W's
                  last digit does not reach it: so far trainer and engine differ
    export        merged, or with --export lora the adapters alone, as PEFT reads them

Tensor parallelism splits one of the two as it splits W, and every rank holds the other whole:

                  W's split    A                    B               summed over ranks
    column        rows         whole                rows            gradient of A
    row           columns      columns              whole           B's input; gradient of B

All these sums are those of sequence parallelism, for a rank has its part of the tokens outside of
a layer. An expert has whole tokens, and what carries them sums its output: there B's input stays a
part. A starts at random, drawn from seed and name of the layer, so it is the same at every layout.
B starts at 0, so training starts with the outputs of the model folder.

Not run: Transformer Engine's layers.
"""

import contextlib
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.utils import get_attr_wrapped_model

from backends.huggingface.names import Rule, rule_of
from backends.megatron.layout import Layout

LINEARS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


@dataclass
class Adapters:
    """What the adapters of one model have in common; it stands at gpt.adapters."""

    scale: float
    are_on: bool = True


def adapted_linears(
    gpt: torch.nn.Module, layout: Layout
) -> Iterator[tuple[str, torch.nn.Module, Rule]]:
    """Yield this rank's linear layers that have adapters: (Megatron's name, layer, W's rule)."""
    for name, module in gpt.named_modules():
        if name.rpartition(".")[2] in LINEARS:
            yield name, module, rule_of(f"{name}.weight", first_layer=layout.first_layer)


def add_adapters(
    gpt: torch.nn.Module, settings, config: dict, layout: Layout, *, seed: int
) -> None:
    """Freeze a model that has its weights, and give its linear layers adapters.

    settings: TrainSettings. config: config.json, checked. seed: of A, with the layer's name.
    """
    gpt.requires_grad_(False)
    rank, gpt.adapters = settings.lora_rank, Adapters(settings.lora_alpha / settings.lora_rank)
    for _, module, rule in adapted_linears(gpt, layout):
        tp, weight = layout.tp(rule), module.weight
        ep_rank, tp_rank = layout.place(rule)
        rows, columns = weight.shape
        fan_in = columns * (tp if rule.tp_dim == 1 else 1)
        name = layout.names(rule, config)[ep_rank][0]
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        # As PEFT's LoraLayer.reset_lora_parameters: Kaiming's uniform distribution with a = √5.
        a = torch.rand(rank, fan_in, generator=generator) * 2 - 1
        a = (a / math.sqrt(fan_in)).to(weight)
        if rule.tp_dim == 1:
            a = a.chunk(tp, dim=1)[tp_rank].clone()
        module.lora_A = torch.nn.Parameter(a)
        module.lora_B = torch.nn.Parameter(weight.new_zeros(rows, rank))
        _mark(module.lora_A, rule, layout, is_split=rule.tp_dim == 1)
        _mark(module.lora_B, rule, layout, is_split=rule.tp_dim == 0)
        module.register_forward_hook(_adding_hook(gpt.adapters, rule, layout))
    if gpt.pre_process:
        # Else nothing that enters the first layer needs a gradient, and a recomputed layer
        # (recompute_granularity=full) would give its adapters none.
        gpt.embedding.register_forward_hook(_needs_gradient)


def _needs_gradient(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
    """Let a gradient flow to what the embedding returns."""
    if torch.is_grad_enabled():
        output.requires_grad_()


def _mark(parameter: torch.nn.Parameter, rule: Rule, layout: Layout, *, is_split: bool) -> None:
    """Say by Megatron's marks over which ranks a parameter's gradient and norm are summed."""
    is_spread = layout.spreads(rule)
    parameter.allreduce = not is_spread  # False: its data-parallel ranks are those with this expert
    parameter.tensor_model_parallel = is_split or is_spread  # False: the norm counts one rank's
    parameter.partition_dim, parameter.partition_stride = rule.tp_dim, 1
    parameter.sequence_parallel = layout.tp(rule) > 1 and not is_split


def _adding_hook(adapters: Adapters, rule: Rule, layout: Layout):
    """Return the hook that adds the product of the adapters to what a linear layer returns."""
    # Experts get whole tokens, and what carries the tokens sums the parts of what they return.
    is_sequence_split = layout.tp(rule) > 1 and rule.expert is None

    def hook(module: torch.nn.Module, inputs: tuple, output: tuple) -> tuple | None:
        if not adapters.are_on:
            return None
        x, (y, bias) = inputs[0], output
        if hasattr(module, "layer_norm_weight"):  # Transformer Engine's layer begins with a norm
            x = F.rms_norm(x, x.shape[-1:], module.layer_norm_weight, module.eps)
        low = F.linear(x, module.lora_A)
        if is_sequence_split and rule.tp_dim == 0:
            low = gather_from_sequence_parallel_region(low, group=layout.tp_group)
        elif is_sequence_split:
            low = reduce_scatter_to_sequence_parallel_region(low, group=layout.tp_group)
        return y + F.linear(low, module.lora_B) * adapters.scale, bias

    return hook


# --- without them, and merged -------------------------------------------------------------------


class WithoutAdapters(torch.nn.Module):
    """The model as it was before training, as schedules call it: a reference that costs no memory.

    module: the model with its adapters, as schedules call it.
    """

    def __init__(self, module: torch.nn.Module):
        super().__init__()
        self.module = module
        self.adapters = get_attr_wrapped_model(module, "adapters")

    def forward(self, *args, **kwargs):
        with _off(self.adapters):
            return self.module(*args, **kwargs)


@contextlib.contextmanager
def _off(adapters: Adapters) -> Iterator[None]:
    """Leave the adapters out for a while."""
    adapters.are_on = False
    try:
        yield
    finally:
        adapters.are_on = True


@torch.no_grad()
def merged(gpt: torch.nn.Module, name: str, parameter: torch.Tensor) -> torch.Tensor:
    """Return what the engine gets for this rank's shard of a parameter, in its shape and dtype.

    name: Megatron's. That is the parameter, with the product of its adapters if it has any.
    """
    module = gpt.get_submodule(name.rpartition(".")[0])
    if not hasattr(module, "lora_A") or not name.endswith(".weight"):
        return parameter.detach()
    a, b, scale = module.lora_A.float(), module.lora_B.float(), gpt.adapters.scale
    return torch.addmm(parameter.float(), b, a, alpha=scale).to(parameter.dtype)


# --- checkpoints --------------------------------------------------------------------------------


def sharded_adapters(
    gpt: torch.nn.Module, config: dict, layout: Layout
) -> dict[str, ShardedTensor]:
    """Return {Megatron's name: adapter} as megatron-core's dist_checkpointing takes it.

    In files an adapter has the Hugging Face name of its layer, which is the same at every layout.
    """
    sharded = {}
    for megatron_name, module, rule in adapted_linears(gpt, layout):
        ep_rank, tp_rank = layout.place(rule)
        name = layout.names(rule, config)[ep_rank][0].removesuffix(".weight")
        copies = mpu.get_data_parallel_group(with_context_parallel=True)
        if rule.expert is not None:
            copies = mpu.get_expert_data_parallel_group()
        for letter, tp_dim in (("A", 1), ("B", 0)):
            is_split = rule.tp_dim == tp_dim
            adapter = ShardedTensor.from_rank_offsets(
                f"{name}.lora_{letter}",
                getattr(module, f"lora_{letter}"),
                *([(tp_dim, tp_rank, layout.tp(rule))] if is_split else []),
                replica_id=(0, 0 if is_split else tp_rank, copies.rank()),
            )
            if letter == "B" and len(rule.hf) == 2:  # a part of gate's rows above a part of up's
                adapter = apply_swiglu_sharded_factory(adapter, sharded_offsets=())
            sharded[f"{megatron_name}.lora_{letter}"] = adapter
    return sharded
