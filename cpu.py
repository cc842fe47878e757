"""Everything that only a machine without a GPU needs, for both engines. On a GPU machine only bench/cpu_attention.py
would import this file; delete both there and nothing changes.

megatron-core and SGLang are written for CUDA. What stops them on a CPU is shallow: device strings, missing compiled extensions, two kernels. Each
patch below says what it stands in for. Three parts:

1. at import, in every process: environment and stand-ins without which `import transformers` or `import sglang` fails beside a CPU build of torch;
2. patch_megatron(), in a trainer rank: CUDA calls answered by the CPU;
3. patch_sglang(), in an engine's scheduler process: block-FP8 layers emulated, attention of a batch in one call instead of one call per request.

Import it before torch is used and before transformers, megatron or sglang is imported. Written for megatron-core 0.16.1 and sglang 0.5.21.
Shape letters: B requests, N new tokens per request, L tokens per request, T packed tokens, H heads, D head size, K input features.
"""

import contextlib
import functools
import importlib.machinery
import logging
import os
import platform
import random
import sys
import types

# One thread per process is fastest and steadiest here: every rank, and every engine process, then has a core of its own.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
# oneDNN keeps a compiled kernel for each length of a packed batch that BF16 has met, and of those no two are alike: 0.3 MB a step, up to a thousand kernels.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
os.environ.setdefault("LRU_CACHE_CAPACITY", "32")  # PyTorch's own cache of the same
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # Megatron's jit_fuser would spend seconds in g++ at the first step and gain nothing

import numpy as np
import torch
import torch.nn.functional as F

if torch.cuda.is_available():
    raise ImportError("cpu.py replaces torch.cuda and must not be imported where CUDA works; guard the import with torch.cuda.is_available()")

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # It warns that there is no GPU.
FP8_MAX = 448.0

# --- 1. stand-ins that imports need ---------------------------------------------------------------------------------------------------------

# sgl_kernel has no CPU wheel. Of torchvision transformers and SGLang need names only: PyPI's is built for
# CUDA, and fails beside a CPU build of torch. One that is installed all the same stays unused.
ABSENT = ("sgl_kernel", "torchvision", "torchvision.io")
ABSENT += ("torchvision.transforms", "torchvision.transforms.functional")
ABSENT += ("torchvision.transforms.v2", "torchvision.transforms.v2.functional")


class _Absent(types.ModuleType):
    """A package that imports, and whatever is looked up in it. Calling that says what is missing."""

    __version__ = "0"
    __path__ = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(f"{self.__name__}.{name}")

    def __call__(self, *args, **kwargs):
        raise NotImplementedError(f"{self.__name__} is not used on a machine without a GPU")


for _name in ABSENT:
    sys.modules[_name] = _Absent(_name)
    sys.modules[_name].__spec__ = importlib.machinery.ModuleSpec(_name, None, is_package=True)


def _through_fp32(product):
    """A matrix product of BF16 tensors as BF16 hardware computes it: exact products, summed in fp32, rounded to BF16 once."""

    @functools.wraps(product)
    def wrapped(a, b, bias=None, **kwargs):
        more = {} if bias is None else {"bias": bias.float()}
        if a.dtype is torch.bfloat16 and b.dtype is torch.bfloat16 and not kwargs:
            return product(a.float(), b.float(), **more).to(torch.bfloat16)
        return product(a, b, **({} if bias is None else {"bias": bias}), **kwargs)

    return wrapped


def has_bf16_instructions() -> bool:
    """Tell whether this processor multiplies BF16 matrices in hardware.

    oneDNN says that it supports BF16 wherever there is AVX512, also where it emulates it: there the
    products take five times as long as the same ones in fp32, and without AVX512 up to thirty times.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


if not has_bf16_instructions():
    torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__ = map(_through_fp32, (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__))
    F.linear = torch.nn.functional.linear = _through_fp32(F.linear)

# ServerArgs without which SGLang does not start on a CPU, or starts something slow.
SERVER_ARGS = dict(
    device="cpu",
    attention_backend="torch_native",
    sampling_backend="pytorch",
    disable_cuda_graph=True,
    disable_overlap_schedule=True,
    sleep_on_idle=True,  # else the scheduler spins on a core that a trainer needs
    mem_fraction_static=0.1,
    max_total_tokens=65536,
    max_running_requests=256,
    chunked_prefill_size=4096,
)

# --- 2. megatron-core -----------------------------------------------------------------------------------------------------------------------


class _Stream:
    """All CUDA streams are one; waiting, recording and synchronizing do nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def __eq__(self, other):
        return True

    def __getattr__(self, name):
        return lambda *args, **kwargs: self


def _on_cpu(factory):
    """A tensor factory that takes device="cuda" for the CPU (optimizer, gradient clipping and schedules write that literally)."""

    @functools.wraps(factory)
    def wrapped(*args, **kwargs):
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return wrapped


def patch_megatron() -> None:
    """Let unmodified megatron-core run on CPU tensors over gloo. Call before the first `import megatron`."""
    cuda, cpu = torch.cuda, torch.device("cpu")
    cuda.current_device = lambda: cpu  # used as device=torch.cuda.current_device()
    cuda.synchronize = cuda.set_device = lambda *args, **kwargs: None
    cuda.Stream = cuda.current_stream = cuda.default_stream = _Stream
    cuda.stream = lambda stream: contextlib.nullcontext()
    # The "CUDA" generator is the CPU generator, so that Megatron's RNG tracker forks and restores the real one.
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)

    torch.utils._device._device_constructors()  # caches the unwrapped factories, which `with torch.device("meta")` looks up
    for name in ("empty", "zeros", "ones", "full", "tensor", "arange", "empty_like"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *args, **kwargs: self
    # The optimizers accept parameters by their type's name, "torch.cuda.BFloat16Tensor".
    tensor_type = torch.Tensor.type
    torch.Tensor.type = lambda self, *args, **kwargs: (
        tensor_type(self, *args, **kwargs) if args or kwargs else tensor_type(self).replace("torch.", "torch.cuda.", 1)
    )

    import megatron.core.tensor_parallel.random as megatron_random
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    moe_utils.te_general_gemm = getattr(moe_utils, "te_general_gemm", None)  # 0.16.1 tests this name, which is not defined without Transformer Engine
    # The sizes of an all-to-all are made NumPy arrays only if they have been on a GPU.
    token_dispatcher.maybe_move_tensor_to_cpu = lambda tensor, as_numpy=False, record_stream=False: (
        tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
    )

    megatron_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    logging.getLogger(megatron_random.__name__).setLevel(logging.ERROR)  # it warns that the CPU generator moved: here it is the tracked one


# --- 3. SGLang --------------------------------------------------------------------------------------------------------------------------------


def patch_sglang() -> None:
    """In the scheduler process, before the scheduler is built: FP8 layers and attention that a CPU can run, and run quickly."""
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
    from sglang.srt.layers.quantization import fp8

    # Stock code asserts AMX here, and would repack the weights; they stay as they were delivered, which the read-back gate relies on.
    fp8.Fp8LinearMethod.process_weights_after_loading_block_quant = lambda self, layer: layer.__dict__.pop("_dequantized", None)
    fp8.Fp8LinearMethod.apply = fp8_linear
    fp8.Fp8MoEMethod.process_weights_after_loading_block_quant = lambda self, layer: layer.__dict__.pop("_dequantized", None)
    fp8.Fp8MoEMethod.apply = fp8_experts
    # On Python 3.13 this prints "[ERROR] ... not documented" at the import of models that it misreads.
    importlib.import_module("transformers.utils.auto_docstring").print = lambda *_: None
    _seed_each_request()
    _sleep_while_paused()
    TorchNativeAttnBackend._run_sdpa_forward_decode = functools.partialmethod(batched_decode, TorchNativeAttnBackend._run_sdpa_forward_decode)
    TorchNativeAttnBackend._run_sdpa_forward_extend = functools.partialmethod(batched_extend, TorchNativeAttnBackend._run_sdpa_forward_extend)


def _sleep_while_paused() -> None:
    """sleep_on_idle for an engine that is paused, too: SGLang's would ask for messages over and over, on a core that the sender of the weights needs."""
    from sglang.srt.managers.scheduler import Scheduler

    stock = Scheduler._record_scheduler_state_for_paused_engine

    def until_a_message(self):
        stock(self)
        self.idle_sleeper.maybe_sleep()

    Scheduler._record_scheduler_state_for_paused_engine = until_a_message


def _seed_each_request() -> None:
    """Sample each request from its own sampling_seed. SGLang can, but only with enable_deterministic_inference, which refuses this attention backend."""
    from sglang.srt.layers import sampler
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

    stock = SamplingBatchInfo.from_schedule_batch.__func__

    def from_schedule_batch(cls, batch, vocab_size):
        info = stock(cls, batch, vocab_size)
        seeds = [request.sampling_params.sampling_seed for request in batch.reqs]
        info.sampling_seed = torch.tensor([random.getrandbits(31) if seed is None else seed for seed in seeds])
        return info

    SamplingBatchInfo.from_schedule_batch = classmethod(from_schedule_batch)
    sampler.multinomial_with_seed = multinomial_with_seed


def multinomial_with_seed(logprobs_BV, seed_B, position_B):
    """One index for each request, int64 [B, 1], by a number that only its seed and the token's position decide. SGLang's own needs a compiled kernel."""
    x = seed_B.numpy().astype(np.uint64) << np.uint64(32) | position_B.numpy().astype(np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):  # SplitMix64 (Steele, Lea and Flood, 2014)
        x = (x ^ x >> np.uint64(shift)) * np.uint64(factor)
    uniform_B = torch.from_numpy((x >> np.uint64(11)).astype(np.float64) + 1) / 2**53  # in (0, 1]
    cumulative_BV = logprobs_BV.double().exp().cumsum(-1)
    return (cumulative_BV < uniform_B[:, None] * cumulative_BV[:, -1:]).sum(-1, keepdim=True)


def fp8_linear(self, layer, x_TK, bias=None):
    """Block-FP8 linear with the numerics of the GPU kernel: FP8 weights, activations quantized per token and 128 features, fp32 accumulation.

    The weights are dequantized to fp32 at the first use after each update; SGLang calls process_weights_after_loading at its end.
    """
    weight_NK = layer.__dict__.get("_dequantized")
    if weight_NK is None:
        weight_NK = layer.__dict__["_dequantized"] = dequantize(layer.weight, layer.weight_scale_inv)
    return F.linear(through_fp8(x_TK), weight_NK, None if bias is None else bias.float()).to(x_TK.dtype)


def dequantize(codes_NK, scale_inv):
    """Block-scaled e4m3 weights, of one matrix or of several stacked, in fp32."""
    N, K = codes_NK.shape[-2:]
    return codes_NK.float() * scale_inv.repeat_interleave(128, -2)[..., :N, :].repeat_interleave(128, -1)[..., :K]


def through_fp8(x_TK):
    """Activations rounded as the GPU kernels round them: e4m3, one scale per token and 128 features; returned in fp32."""
    T, K = x_TK.shape
    groups = F.pad(x_TK.float(), (0, -K % 128)).view(T, -1, 128)
    scale = groups.abs().amax(-1, keepdim=True).clamp_(min=1e-10) / FP8_MAX
    return (round_to_e4m3(groups / scale) * scale).view(T, -1)[:, :K].to(x_TK.dtype).float()


def round_to_e4m3(x):
    """fp32 numbers of at most 448 to the nearest that e4m3 has, ties to even: x.to(torch.float8_e4m3fn).float(), whose way back goes number by number.

    Where 1.5 * 2**20 times x's power of two is added, fp32 has no room for more than three bits behind x's first; below 2**-6 e4m3's steps are all alike.
    """
    power = x.view(torch.int32).bitwise_and(0x7F800000).clamp_(min=(127 - 6) << 23)
    large = power.add_((20 << 23) + (1 << 22)).view(torch.float32)
    return large.add(x).sub_(large)


def fp8_experts(self, layer, dispatch_output):
    """A block-FP8 mixture of experts: each expert's gate, up and down as fp8_linear, summed with the router's weights."""
    from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput

    if "_dequantized" not in layer.__dict__:
        layer.__dict__["_dequantized"] = [
            dequantize(layer.w13_weight, layer.w13_weight_scale_inv),
            dequantize(layer.w2_weight, layer.w2_weight_scale_inv),
        ]
    gate_up, down = layer.__dict__["_dequantized"]
    x_TK, (weights_TE, experts_TE, *_) = dispatch_output.hidden_states, dispatch_output.topk_output
    quantized_TK, out_TK = through_fp8(x_TK), torch.zeros_like(x_TK, dtype=torch.float32)
    for expert in experts_TE.unique().tolist():
        token, place = (experts_TE == expert).nonzero(as_tuple=True)
        gate, up = F.linear(quantized_TK[token], gate_up[expert]).to(x_TK.dtype).chunk(2, dim=-1)
        hidden = F.linear(through_fp8(F.silu(gate) * up), down[expert]).to(x_TK.dtype)
        out_TK.index_add_(0, token, hidden.float() * weights_TE[token, place, None].float())
    return StandardCombineInput(hidden_states=out_TK.to(x_TK.dtype))


def _gather_kv(k_cache, v_cache, req_to_token, req_pool_indices, seq_lens_B, dtype):
    """Cached keys and values of all requests as [B, H, L, D], and live_BL, which of the L places each request really has."""
    L = int(seq_lens_B.max())
    live_BL = torch.arange(L) < seq_lens_B[:, None]
    slots_BL = req_to_token[req_pool_indices, :L].masked_fill(~live_BL, 0)
    return k_cache[slots_BL].transpose(1, 2).to(dtype), v_cache[slots_BL].transpose(1, 2).to(dtype), live_BL


def batched_decode(
    self, stock, query_BHD, output, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens, encoder_lens=None,
    scaling=None, enable_gqa=False, causal=False, is_cross_attn=False, sliding_window_size=None,
):  # fmt: skip
    """One new token per request. Stock code makes one attention call per request and layer."""
    if encoder_lens is not None or sliding_window_size is not None:
        return stock(
            self, query_BHD, output, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens, encoder_lens,
            scaling, enable_gqa, causal, is_cross_attn, sliding_window_size,
        )  # fmt: skip
    # Requests of about one length make one call: padded all to the longest, a single long answer would cost as much as if every one were long.
    classes_B = (seq_lens - 1).clamp(min=31).log2().int()
    for length_class in classes_B.unique():
        rows = (classes_B == length_class).nonzero()[:, 0]
        k_BHLD, v_BHLD, live_BL = _gather_kv(k_cache, v_cache, req_to_token, req_pool_indices[rows], seq_lens[rows], query_BHD.dtype)
        out_BH1D = F.scaled_dot_product_attention(
            query_BHD[rows, :, None], k_BHLD, v_BHLD, attn_mask=live_BL[:, None, None], scale=scaling, enable_gqa=enable_gqa
        )
        output[rows] = out_BH1D[:, :, 0]
    return output


# Above this many mask elements the padded block costs more memory than the loop over requests saves in time.
MAX_MASK_ELEMENTS = 16_000_000


def batched_extend(
    self, stock, query_THD, output, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens, extend_prefix_lens, extend_seq_lens,
    encoder_lens=None, scaling=None, enable_gqa=False, causal=False, is_cross_attn=False, sliding_window_size=None,
):  # fmt: skip
    """N new tokens per request behind a cached prefix: padded to [B, N], causal by position."""
    B, N, L = seq_lens.shape[0], int(extend_seq_lens.max()), int(seq_lens.max())
    if encoder_lens is not None or not causal or sliding_window_size is not None or B * N * L > MAX_MASK_ELEMENTS:
        return stock(
            self, query_THD, output, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens, extend_prefix_lens, extend_seq_lens,
            encoder_lens, scaling, enable_gqa, causal, is_cross_attn, sliding_window_size,
        )  # fmt: skip
    k_BHLD, v_BHLD, live_BL = _gather_kv(k_cache, v_cache, req_to_token, req_pool_indices, seq_lens, query_THD.dtype)
    real_BN = torch.arange(N) < extend_seq_lens[:, None]
    query_BNHD = query_THD.new_zeros(B, N, *query_THD.shape[1:])
    query_BNHD[real_BN] = query_THD
    position_BN = extend_prefix_lens[:, None] + torch.arange(N)
    mask_BNL = (torch.arange(L) <= position_BN[:, :, None]) & live_BL[:, None]
    out_BHND = F.scaled_dot_product_attention(
        query_BNHD.transpose(1, 2), k_BHLD, v_BHLD, attn_mask=mask_BNL[:, None], scale=scaling, enable_gqa=enable_gqa
    )
    return output.copy_(out_BHND.transpose(1, 2)[real_BN])
