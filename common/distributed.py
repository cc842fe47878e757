"""Joins the process groups of a run, and sends bytes between ranks."""

import gc
import os

import torch
import torch.distributed as dist

from common import process_groups


def init_distributed(
    rollout_ranks: int = 0, *, wait_s: float = process_groups.UNLIMITED_WORK_S
) -> dist.ProcessGroup:
    """Join torchrun's process groups and return the one that all ranks share.

    It uses gloo for CPU tensors, and NCCL for CUDA tensors if there is a GPU. wait_s: how long a
    rank may wait for another in a collective, see process_groups.longest_wait_s.

    With rollout_ranks there are two default worlds: the last rollout_ranks ranks, and the others,
    the trainers. megatron-core builds its groups from the default world. The shared group is made
    beside the two from the same store, as SGLang makes its weight-update groups.
    """
    gc.collect()
    # Objects that imports made are never garbage. Scanning them would take 0.3 s now and then,
    # while every other rank waits.
    gc.freeze()
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    store, rank, world_size = process_groups.join_store()
    process_groups.set_wait(wait_s)
    trainers = world_size - rollout_ranks
    if rank < trainers:
        name, size, rank_there = "trainers", trainers, rank
    else:
        name, size, rank_there = "rollout", rollout_ranks, rank - trainers
    world = dict(store=dist.PrefixStore(name, store), timeout=process_groups.timeout())
    dist.init_process_group(backend, world_size=size, rank=rank_there, **world)
    all_ranks = dist.group.WORLD
    if rollout_ranks:
        from sglang.srt.utils import init_custom_process_group

        shared = dict(store=dist.PrefixStore("shared", store), timeout=process_groups.timeout())
        all_ranks = init_custom_process_group(
            backend, world_size=world_size, rank=rank, group_name="shared", **shared
        )
    process_groups.watch_links()
    return all_ranks


def free_cached_memory(*, on_all_ranks: bool = False) -> None:
    """Give the GPU memory that torch keeps for later back to the GPU; without one do nothing.

    Another process on the same GPU, such as an engine, cannot use what torch keeps.
    on_all_ranks: return when all ranks of the default world have done so. An engine may have its
    memory on the GPUs of other ranks. Collective.
    """
    if not torch.cuda.is_available():
        return
    torch.cuda.ipc_collect()  # what another process has had open, and has closed since
    torch.cuda.empty_cache()
    if on_all_ranks:
        all_gather_bytes(b"", dist.group.WORLD)


def all_gather_bytes(mine: bytes, group: dist.ProcessGroup) -> list[bytes]:
    """Return the bytes of every rank of the group, in rank order. Collective (gloo)."""
    process_groups.joins_exchange(group)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(group.size())]
    dist.all_gather(sizes, torch.tensor([len(mine)]), group=group)
    padded = torch.zeros(int(max(sizes)), dtype=torch.uint8)
    if mine:  # torch.frombuffer refuses an empty buffer
        padded[: len(mine)] = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
    rows = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(rows, padded, group=group)
    return [row[: int(size)].numpy().tobytes() for row, size in zip(rows, sizes)]


def broadcast_bytes(mine: bytes, group: dist.ProcessGroup, *, source: int = 0) -> bytes:
    """Return the bytes of the rank `source` on all ranks of the group. Collective (gloo)."""
    process_groups.joins_exchange(group)
    size = torch.tensor([len(mine)])
    dist.broadcast(size, group=group, group_src=source)
    if group.rank() == source:
        data = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
    else:
        data = torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(data, group=group, group_src=source)
    return data.numpy().tobytes()
