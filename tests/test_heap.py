"""What a process keeps of freed memory."""

import psutil
import pytest
import torch

from common.heap import TRIM_EVERY, trim_heap

BLOCK, BLOCKS = 2**16, 1024  # below the size from which the C library maps each block by itself


def resident() -> int:
    return psutil.Process().memory_info().rss


def freed_heap() -> torch.Tensor:
    """Free 64 MB in blocks; the last block, which stays, keeps the heap from shrinking."""
    *blocks, last = [torch.ones(BLOCK, dtype=torch.uint8) for _ in range(BLOCKS)]
    del blocks
    return last


@pytest.mark.parametrize("step, gives_back", [(TRIM_EVERY, True), (TRIM_EVERY + 1, False)])
def test_freed_memory_goes_back_every_few_steps(step, gives_back):
    trim_heap(0)
    last = freed_heap()
    before = resident()
    trim_heap(step)
    assert (before - resident() > BLOCK * BLOCKS / 2) is gives_back
    assert bool(last.all())


def test_where_tensors_lie_on_a_gpu_it_stays(pretend):
    last = freed_heap()
    pretend()
    before = resident()
    trim_heap(TRIM_EVERY)
    assert before - resident() < BLOCK * BLOCKS / 2
    assert bool(last.all())
