"""What a process keeps of freed memory, and when it gives it back."""

from types import SimpleNamespace

import psutil
import pytest
import torch

from common.heap import TRIM_EVERY, trim_heap
from data.sample import Sample
from harness import record as record_module
from test_record import record_of

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


def test_a_rank_gives_it_back_at_the_end_of_steps(one_rank, monkeypatch, tmp_path):
    steps = []
    monkeypatch.setattr(record_module, "trim_heap", steps.append)
    record = record_of(monkeypatch, tmp_path)
    sample = Sample([1], response_ids=[2], rollout_logprobs=[-1.0], loss_mask=[1], reward=1.0)
    sample.weight_versions = [6]
    record.end_step(7, record.start_step(7), [sample], SimpleNamespace(timeline=None), None)
    assert steps == [7]


@pytest.mark.skipif(torch.cuda.is_available(), reason="backends/cpu is for machines without a GPU")
def test_an_engine_gives_it_back_after_updates_and_goes_on(monkeypatch):
    from backends.cpu import sglang as cpu_sglang
    from sglang.srt.managers.scheduler import Scheduler

    updates = []
    monkeypatch.setattr(cpu_sglang, "trim_heap", updates.append)
    monkeypatch.setattr(Scheduler, "continue_generation", lambda self, request: request)
    cpu_sglang._trim_after_updates()
    assert [Scheduler.continue_generation(None, request) for request in "ab"] == ["a", "b"]
    assert updates == [1, 2]
