"""megatron-core: the model, its batches and its layout.

Without a GPU it is patched here, before its import.
"""

import torch

if not torch.cuda.is_available():
    from backends.cpu.megatron import patch_megatron

    patch_megatron()
