"""The software that does the work: Megatron, SGLang, Hugging Face files, and a CPU without a GPU.

Importing any of them first checks that the installed packages belong to this kind of machine.
Without a GPU it also puts stand-ins where transformers and SGLang import what needs one.
"""

import torch

from common.machine import check_installation

check_installation()
if not torch.cuda.is_available():
    import backends.cpu.imports  # noqa: F401
