"""Adam, its schedule and data parallelism, as Megatron's distributed optimizer has them.

FP32 main weights and Adam's moments are split over data-parallel ranks; model weights are BF16.
Another optimizer is built here. backends/megatron/state.py restores Adam's state and
harness/memory.py counts its bytes: both must then change too.
"""

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from backends.megatron.model import overrides
from common.settings import TrainSettings


def wrap_data_parallel(gpt: GPTModel, module: torch.nn.Module) -> DistributedDataParallel:
    """Return the model with FP32 gradient buffers that data-parallel ranks share.

    module: gpt as Megatron's schedules call it.
    """
    config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    return DistributedDataParallel(gpt.config, config, module)


# EDIT HERE: optimizer. The module's docstring says what else must change with it.
def build_optimizer(
    ddp: DistributedDataParallel,
    gpt: GPTModel,
    settings: TrainSettings,
    config: dict,
    *,
    steps: int,
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """Build the optimizer and its learning-rate schedule over so many steps. Collective.

    config: config.json, checked. --megatron may set further fields of OptimizerConfig.
    """
    dtype = gpt.config.params_dtype
    arguments = dict(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta2=settings.adam_beta2,
        clip_grad=settings.clip_grad,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=True,
    )
    arguments |= overrides(settings, config, OptimizerConfig)
    optimizer = get_megatron_optimizer(OptimizerConfig(**arguments), [ddp])
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.lr_warmup_steps,
        lr_decay_steps=steps,
        lr_decay_style=settings.lr_schedule,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    gpt.config.finalize_model_grads_func = finalize_model_grads
    gpt.config.grad_scale_func = optimizer.scale_loss
    _give_adam_its_state(optimizer)
    return optimizer, scheduler


def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """Return the global norm of the gradient, before it is clipped and used. Collective."""
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


def _give_adam_its_state(optimizer: MegatronOptimizer) -> None:
    """Create Adam's moments now: every Adam makes them in its first step only.

    An engine that starts before that step would take their memory. A checkpoint fills only moments
    that exist. torch's Adam counts steps in a tensor of each parameter. Transformer Engine's counts
    them in the parameter group, and refuses such a tensor.
    """
    for chained in optimizer.chained_optimizers:
        adam = chained.optimizer
        if not isinstance(adam, torch.optim.AdamW):
            chained.init_state_fn(adam, chained.config)
            continue
        for group in adam.param_groups:
            for parameter in group["params"]:
                adam.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
