"""Megatron's process groups between two trainers of one process."""

import gc

import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from megatron.core import parallel_state as mpu


def drop_megatron() -> None:
    """Forget Megatron's parallel state and its process groups. The default group stays.

    A gloo group has threads that wake a hundred times a second for as long as anything refers to
    it. Megatron makes some twenty groups for a layout, and a trained model is not always freed. So
    trainers of one layout are to share its groups: with a thousand such threads nothing else runs.
    """
    if not mpu.model_parallel_is_initialized():
        return
    mpu.destroy_model_parallel()
    for group in list(c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    gc.collect()  # trainers are circles of references, and hold groups
