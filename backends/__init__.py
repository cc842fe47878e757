"""What does the work: Megatron, SGLang, Hugging Face files, and a CPU in place of a GPU.

Importing any of them first checks that the installed packages belong to this machine. Without a GPU
it also puts stand-ins where transformers and SGLang would import what only a GPU machine has.
"""

import torch

from common.machine import check_installation

check_installation()
if not torch.cuda.is_available():
    import backends.cpu.imports  # noqa: F401
