"""Every family of models on a GPU, in FP8: the bytes of the hand-off, and engine against trainer.

A random small model of each; random weights are rougher than trained ones. Experts use SGLang's
fused kernels here, which test_engine_families.py cannot reach without a GPU.
"""

import pytest
import torch
from conftest import FAMILIES, write_model
from on_gpu import SGLANG, evidence, on_gpu
from test_engine import Pair


@on_gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_engine_and_trainer_hold_the_same_model(one_rank, tmp_path, family):
    folder = write_model(tmp_path, family, dtype=torch.bfloat16)
    pair = Pair("bf16", "fp8", str(folder), sglang=SGLANG, requests=64, longest=64)
    try:
        difference = pair.differences(pair.generate())
    finally:
        pair.engine.shutdown()
    mean, largest = float(difference.mean()), float(difference.max())
    fp8 = len(pair.weights.fp8)
    evidence(f"{family} in FP8, |log-prob difference|", mean=mean, largest=largest, fp8=fp8)
    assert 1e-4 < mean < 0.2
