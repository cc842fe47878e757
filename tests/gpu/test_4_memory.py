"""An engine in FP8 that shares its GPU: it gives its memory back and takes it again, five times."""

import time

import pytest
import torch
from on_gpu import SGLANG, evidence, has_gpu, on_gpu, on_gpu_only, timed_hand_off, used_bytes
from test_engine import Pair

import train_step
import weight_sync


@pytest.fixture(scope="module")
def pair(one_rank):
    start = time.perf_counter()
    load = dict(colocated=True, keeps_weights=True, requests=512, longest=64)
    pair = Pair("bf16", "fp8", sglang=SGLANG, **load)
    arguments = pair.engine.server_args
    kernel = getattr(arguments, "fp8_gemm_runner_backend", "")
    took = time.perf_counter() - start
    evidence("engine in FP8, start and first hand-off", seconds=took, kernel=kernel)
    yield pair
    pair.engine.shutdown()


@on_gpu
def test_the_hand_off_is_exact(pair):
    sent, hand_off_ms = timed_hand_off(pair)
    weight_sync.verify_engine_weights(pair.weights, pair.engine)
    evidence("hand-off in FP8", sent=sent, ms=hand_off_ms)


@on_gpu
def test_the_mismatch_is_that_of_fp8(pair):
    difference = pair.differences(pair.generate(prompts=64, n=4))
    mean, largest = float(difference.mean()), float(difference.max())
    evidence("FP8, |log-prob difference|", mean=mean, largest=largest, on_a_CPU=0.041)
    assert 0.005 < mean < 0.1


@on_gpu_only
def test_memory_goes_to_the_trainer_and_comes_back(pair):
    before = used_bytes()
    for cycle in range(5):
        pair.engine.release_memory()
        released = used_bytes()
        # What a training step would leave in torch's cache.
        cached = [torch.empty(2**28, device="cuda") for _ in range(4)]
        del cached
        pair.sync()
        mean = float(pair.differences(pair.generate()).mean())
        evidence(
            f"cycle {cycle}",
            used_MB_before=before / 1e6,
            released=released / 1e6,
            after=used_bytes() / 1e6,
            mismatch=mean,
        )
        # Engine.release_memory() itself asks that the weights' own bytes came back.
        assert before - released > 50e6 and mean < 0.1
        assert abs(used_bytes() - before) < 0.1 * before


@on_gpu
def test_training_between_release_and_resume(pair):
    """A whole step as in the loop, with its memory."""
    samples = pair.generate(prompts=16, n=16)
    pair.engine.release_memory()
    batches = train_step.pack(pair.trainer, samples)
    for sample in samples:
        sample.advantages = [1.0 - 2.0 * (sample.index % 2)] * len(sample.response_ids)
    metrics = train_step.update_policy(pair.trainer, batches, train_step.LossSettings())
    pair.sync()
    after = float(pair.differences(pair.generate()).mean())
    evidence("a step between", grad_norm=metrics["grad_norm"], mismatch_after=after, gpu=has_gpu)
    assert after < 0.1
