"""megatron-core: the model, its batches and how it is split over ranks.

Without a GPU, megatron-core is patched here, before anything imports it.
"""

import torch

if not torch.cuda.is_available():
    from backends.cpu.megatron import patch_megatron

    patch_megatron()
