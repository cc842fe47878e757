"""Unmodified megatron-core on CPU tensors over gloo: CUDA calls answered by the CPU."""

import contextlib
import functools
import logging

import torch
import torch.utils._device


class _Stream:
    """All CUDA streams are one; waiting, recording and synchronizing do nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def __eq__(self, other):
        return True

    def __getattr__(self, name):
        return lambda *args, **kwargs: self


def _on_cpu(factory):
    """A tensor factory that takes device="cuda" for the CPU (optimizer, gradient clipping and
    schedules write that literally).
    """

    @functools.wraps(factory)
    def wrapped(*args, **kwargs):
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return wrapped


def patch_megatron() -> None:
    """Let unmodified megatron-core run on CPU tensors over gloo.

    Call before the first `import megatron`.
    """
    cuda, cpu = torch.cuda, torch.device("cpu")
    cuda.current_device = lambda: cpu  # used as device=torch.cuda.current_device()
    # A function object of its own for each name: torch.compile's tables refuse one that has two.
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.set_device = lambda *args, **kwargs: None
    cuda.Stream = cuda.current_stream = cuda.default_stream = _Stream
    cuda.stream = lambda stream: contextlib.nullcontext()
    # The "CUDA" generator is the CPU generator, so that Megatron's RNG tracker forks and restores
    # the real one.
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)
    cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)

    # Caches the unwrapped factories, which `with torch.device("meta")` looks up
    torch.utils._device._device_constructors()
    for name in ("empty", "zeros", "ones", "full", "tensor", "arange", "empty_like"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *args, **kwargs: self
    # The optimizers accept parameters by their type's name, "torch.cuda.BFloat16Tensor".
    tensor_type = torch.Tensor.type
    torch.Tensor.type = lambda self, *args, **kwargs: (
        tensor_type(self, *args, **kwargs)
        if args or kwargs
        else tensor_type(self).replace("torch.", "torch.cuda.", 1)
    )

    import megatron.core.tensor_parallel.random as megatron_random
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    moe_utils.te_general_gemm = getattr(
        moe_utils, "te_general_gemm", None
    )  # 0.16.1 tests this name, which is not defined without Transformer Engine
    # The sizes of an all-to-all are made NumPy arrays only if they have been on a GPU.
    token_dispatcher.maybe_move_tensor_to_cpu = lambda tensor, as_numpy=False, record_stream=False: (
        tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
    )

    megatron_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: (
        torch.set_rng_state(state)
    )
    logging.getLogger(megatron_random.__name__).setLevel(
        logging.ERROR
    )  # it warns that the CPU generator moved: here it is the tracked one
