"""Unmodified megatron-core on CPU tensors over gloo: the CPU answers CUDA calls."""

import contextlib
import functools
import logging

import torch
import torch.utils._device


class _Stream:
    """Every CUDA stream. All are equal; waiting, recording and synchronizing do nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def __eq__(self, other):
        return True

    def __getattr__(self, name):
        return lambda *args, **kwargs: self


def _on_cpu(factory):
    """Wrap a tensor factory so that it reads device="cuda" as the CPU.

    Megatron's optimizer, gradient clipping and schedules write that device literally.
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

    Call it before the first `import megatron`.
    """
    _patch_torch_cuda()
    _patch_tensors()
    _patch_megatron_core()


def _patch_torch_cuda() -> None:
    """Replace torch.cuda's functions for the device, streams and random states."""
    cuda, cpu = torch.cuda, torch.device("cpu")
    cuda.current_device = lambda: cpu  # used as device=torch.cuda.current_device()
    # A function object of its own for each name: torch.compile's tables refuse one that has two.
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.set_device = lambda *args, **kwargs: None
    cuda.Stream = cuda.current_stream = cuda.default_stream = _Stream
    cuda.stream = lambda stream: contextlib.nullcontext()
    # The "CUDA" generator is the CPU generator, so that Megatron's RNG tracker forks and restores
    # the one that is used.
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)
    cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)


def _patch_tensors() -> None:
    """Let tensors that are created on, moved to, or asked for a CUDA type be CPU tensors."""
    # PyTorch caches here which factories `with torch.device("meta")` redirects. Filled now, the
    # cache holds the unwrapped ones, which that context looks up.
    torch.utils._device._device_constructors()
    for name in ("empty", "zeros", "ones", "full", "tensor", "arange", "empty_like"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *args, **kwargs: self

    stock_type = torch.Tensor.type

    def tensor_type(self, *args, **kwargs):
        if args or kwargs:
            return stock_type(self, *args, **kwargs)
        # The optimizers accept parameters by their type's name, "torch.cuda.BFloat16Tensor".
        return stock_type(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = tensor_type


def _patch_megatron_core() -> None:
    """Replace what megatron-core itself asks of CUDA."""
    import megatron.core.tensor_parallel.random as megatron_random
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    def maybe_move_tensor_to_cpu(tensor, as_numpy=False, record_stream=False):
        # Stock code makes the sizes of an all-to-all NumPy arrays only if they are on a GPU.
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu

    def set_rng_state(state, device=-1, graph_safe=False):
        torch.set_rng_state(state)

    megatron_random._set_cuda_rng_state = set_rng_state
    # It warns that the CPU generator moved. Here that is the generator it tracks.
    logging.getLogger(megatron_random.__name__).setLevel(logging.ERROR)
