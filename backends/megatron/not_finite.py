"""Which sample makes the loss or its gradient not finite: said before a run ends for it."""

import math
from collections.abc import Callable

import torch.distributed as dist

from backends.megatron.batches import Batch, pack_batch
from backends.megatron.optimizer import gradient_norm


def explain_not_finite(trainer, batch: Batch, backward: Callable[[Batch], dict]) -> str:
    """Say which sample makes loss or gradient not finite, in which step, on which rank. Collective.

    All ranks try each sample alone, until one does. trainer: a train_step.Trainer. backward: as
    train_step.backward.
    """
    step = trainer.scheduler.num_steps + 1
    for i, sample in enumerate(batch.samples):
        loss = backward(pack_batch(trainer, [sample]))["loss"]
        norm = gradient_norm(trainer.optimizer)
        if math.isfinite(loss) and math.isfinite(norm):
            continue
        dp_rank = next(
            rank for rank, bins in enumerate(batch.plan) if any(i in bin for bin in bins)
        )
        rank = dist.get_process_group_ranks(trainer.dp_group)[dp_rank]
        culprit = f"step {step}, rank {rank}: sample {sample.index} of group {sample.group}"
        return f"{culprit} has loss {loss} and gradient norm {norm}; the optimizer has made no step"
    return (
        f"step {step}: loss or gradient of {len(batch.samples)} samples together is not finite, "
        "though each sample's alone is; the optimizer has made no step"
    )
