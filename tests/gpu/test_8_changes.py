"""An engine that shares its GPU and gets changes alone: exact, and after a release too."""

import time
from dataclasses import replace

import pytest
import torch
from on_gpu import SGLANG, evidence, on_gpu, wait, write_qwen3_1_7b
from test_engine import Pair

import weight_sync


@pytest.fixture(scope="module")
def pair(one_rank, tmp_path_factory):
    """A trainer and an engine of Qwen3-1.7B with random weights."""
    folder = tmp_path_factory.mktemp("model")
    write_qwen3_1_7b(folder)
    load = dict(colocated=True, requests=16, longest=64, keeps_weights=True)
    pair = Pair("bf16", "fp8", str(folder), sglang=SGLANG, **load)
    pair.weights = replace(pair.weights, bucket_bytes=2**28)
    pair.weights.sent.version = None  # buckets are others now: begin with everything
    pair.sync()
    yield pair
    pair.engine.shutdown()


@torch.no_grad()
def step(pair) -> None:
    """Move every weight by about 1e-6, as a step at that learning rate does."""
    for parameter in pair.trainer.gpt.parameters():
        parameter.copy_(parameter.float() + 1e-6 * torch.randn_like(parameter, dtype=torch.float))


def timed(pair, weights, version: int) -> tuple[dict, float]:
    """Send the weights; return (metrics, milliseconds)."""
    wait()
    start = time.perf_counter()
    sent = weight_sync.send_weights(weights, pair.engine, version=version)
    pair.engine.settle()
    wait()
    return sent, (time.perf_counter() - start) * 1e3


@on_gpu
def test_changes_alone_lead_to_the_same_bytes(pair):
    """Each step by both ways, the second time the same weights; then every byte is compared."""
    for _ in range(4):
        step(pair)
        version = pair.engine.version + 1
        changes, changes_ms = timed(pair, pair.weights, version)
        weight_sync.verify_engine_weights(pair.weights, pair.engine)
        pair.engine.version = version - 1
        full, full_ms = timed(pair, replace(pair.weights, sent=None), version)
        assert not changes["sync_full"] and changes["sync_bytes"] < full["sync_bytes"] / 4
        evidence(
            "Qwen3-1.7B, changes against everything",
            MB=changes["sync_bytes"] / 1e6,
            ms=changes_ms,
            full_MB=full["sync_bytes"] / 1e6,
            full_ms=full_ms,
            codes=changes["sync_changed_fp8"],
            bf16=changes["sync_changed_bf16"],
        )


@on_gpu
def test_changes_land_in_weights_that_were_released(pair):
    """The host keeps the engine's weights while the trainer has the GPU."""
    for _ in range(3):
        start = time.perf_counter()
        pair.engine.release_memory()
        release_ms = (time.perf_counter() - start) * 1e3
        step(pair)
        sent, ms = timed(pair, pair.weights, pair.engine.version + 1)
        weight_sync.verify_engine_weights(pair.weights, pair.engine)
        evidence("changes after a release", ms=ms, release_ms=release_ms, full=sent["sync_full"])
        assert not sent["sync_full"]
