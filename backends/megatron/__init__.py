"""megatron-core: the model, its batches and how it is split over ranks.

Without a GPU, megatron-core is patched here, before anything imports it.
"""

import os

import torch

# Transformer Engine reads it when it is imported. See backends/megatron/fp8_numerics.py.
FP32_SCALES = "NVTE_FP8_BLOCK_SCALING_FP32_SCALES"
os.environ.setdefault(FP32_SCALES, "1")

if not torch.cuda.is_available():
    from backends.cpu.megatron import patch_megatron

    patch_megatron()
