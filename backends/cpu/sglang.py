"""SGLang's scheduler on a CPU: block-FP8 layers emulated, the attention of a batch in one call.

Shape letters: B requests, N new tokens per request, L tokens per request, T packed tokens; H heads,
D head size, K input features, V vocabulary, E experts of a token.
"""

import functools
import importlib
import itertools
import random

import numpy as np
import torch
import torch.nn.functional as F

from backends.delta import as_integers
from backends.fp8_activations import through_fp8
from backends.sglang import in_place
from common.heap import trim_heap

# Up to this share of a layer's codes, replacing their fp32 weights is faster than making all again.
FEW_CODES = 0.01

# ServerArgs without which SGLang does not start on a CPU, or starts something slow.
SERVER_ARGS = dict(
    device="cpu",
    attention_backend="torch_native",
    sampling_backend="pytorch",
    disable_cuda_graph=True,
    disable_overlap_schedule=True,
    sleep_on_idle=True,  # else the scheduler spins on a core that a trainer needs
    # Other processes load models while an engine starts, and SGLang counts what they take as its
    # own weights. The cache is bounded by max_total_tokens; where the run needs fewer, by these.
    mem_fraction_static=0.5,
    max_total_tokens=65536,
    max_running_requests=256,
    chunked_prefill_size=4096,
)


def patch_sglang() -> None:
    """Replace the FP8 layers and the attention by ones that a CPU runs, and runs quickly.

    Call it in the scheduler process, before the scheduler is built.
    """
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
    from sglang.srt.layers.quantization import fp8

    # On Python 3.13 transformers prints "[ERROR] ... not documented" at the import of models whose
    # source it misreads.
    importlib.import_module("transformers.utils.auto_docstring").print = lambda *_: None

    for method, apply in ((fp8.Fp8LinearMethod, fp8_linear), (fp8.Fp8MoEMethod, fp8_experts)):
        method.process_weights_after_loading_block_quant = _update_dequantized
        method.apply = apply
    TorchNativeAttnBackend._run_sdpa_forward_decode = functools.partialmethod(
        batched_decode, TorchNativeAttnBackend._run_sdpa_forward_decode
    )
    TorchNativeAttnBackend._run_sdpa_forward_extend = functools.partialmethod(
        batched_extend, TorchNativeAttnBackend._run_sdpa_forward_extend
    )
    _seed_each_request()
    _sleep_while_paused()
    _trim_after_updates()
    _hold_routed_experts()


# --- the scheduler ------------------------------------------------------------------------------


def _sleep_while_paused() -> None:
    """Extend sleep_on_idle to a paused engine.

    A paused scheduler would ask for messages over and over, on a core that the sender of weights
    needs.
    """
    from sglang.srt.managers.scheduler import Scheduler

    stock = Scheduler._record_scheduler_state_for_paused_engine

    def record_and_sleep(self):
        stock(self)
        self.idle_sleeper.maybe_sleep()  # until a message arrives

    Scheduler._record_scheduler_state_for_paused_engine = record_and_sleep


def _trim_after_updates() -> None:
    """Give freed memory back after some of the weight updates, each of which ends a pause."""
    from sglang.srt.managers.scheduler import Scheduler

    stock, updates = Scheduler.continue_generation, itertools.count(1)

    def continue_and_trim(self, request):
        trim_heap(next(updates))
        return stock(self, request)

    Scheduler.continue_generation = continue_and_trim


def _hold_routed_experts() -> None:
    """Hold SGLang's table of routed experts in plain memory: stock code registers it with CUDA."""
    from sglang.srt.mem_cache.pool_host.common import ALLOC_MEMORY_FUNCS

    def allocate(dims, dtype, **_):
        return torch.empty(dims, dtype=dtype)

    ALLOC_MEMORY_FUNCS["cpu"] = allocate


def _seed_each_request() -> None:
    """Sample each request from its own sampling_seed.

    SGLang can, but only with enable_deterministic_inference, which refuses this attention backend.
    """
    from sglang.srt.layers import sampler
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

    stock = SamplingBatchInfo.from_schedule_batch.__func__

    def from_schedule_batch(cls, batch, vocab_size):
        info = stock(cls, batch, vocab_size)
        seeds = [request.sampling_params.sampling_seed for request in batch.reqs]
        info.sampling_seed = torch.tensor(
            [random.getrandbits(31) if seed is None else seed for seed in seeds]
        )
        return info

    SamplingBatchInfo.from_schedule_batch = classmethod(from_schedule_batch)
    sampler.multinomial_with_seed = multinomial_with_seed


def multinomial_with_seed(logprobs_BV, seed_B, position_B):
    """Sample one index for each request, int64 [B, 1].

    Only the request's seed and the token's position decide the random number. SGLang's own function
    needs a compiled kernel.
    """
    # SplitMix64 (Steele, Lea and Flood, 2014)
    x = seed_B.numpy().astype(np.uint64) << np.uint64(32) | position_B.numpy().astype(np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        x = (x ^ x >> np.uint64(shift)) * np.uint64(factor)
    uniform_B = torch.from_numpy((x >> np.uint64(11)).astype(np.float64) + 1) / 2**53  # in (0, 1]
    cumulative_BV = logprobs_BV.double().exp().cumsum(-1)
    return (cumulative_BV < uniform_B[:, None] * cumulative_BV[:, -1:]).sum(-1, keepdim=True)


# --- block FP8 ----------------------------------------------------------------------------------


def _update_dequantized(self, layer) -> None:
    """Bring a layer's fp32 weights up to date: SGLang calls this at the end of each weight update.

    Where few codes have changed, their fp32 weights are replaced. Otherwise all are dropped, and
    made again when they are used. This replaces code that asserts AMX and repacks the weights. They
    must stay as delivered, or verification would find other bytes.
    """
    if "_dequantized" not in layer.__dict__:
        return
    held = layer.__dict__["_dequantized"]
    names = ["weight"] if torch.is_tensor(held) else ["w13_weight", "w2_weight"]
    for fp32, name in zip([held] if torch.is_tensor(held) else held, names):
        codes, scales = getattr(layer, name), getattr(layer, f"{name}_scale_inv")
        new_scales, parts = in_place.take_written(scales), in_place.take_written(codes)
        if new_scales != [] or parts is None or sum(map(len, parts)) > codes.numel() * FEW_CODES:
            del layer.__dict__["_dequantized"]
            return
        for positions in parts:
            *experts, row, column = np.unravel_index(positions.numpy(), codes.shape)
            scale = scales[(*experts, row // 128, column // 128)]
            changed = as_integers(codes).view(-1)[positions].view(codes.dtype)
            fp32.view(-1)[positions] = changed.float() * scale


def fp8_linear(self, layer, x_TK, bias=None):
    """Compute a block-FP8 linear layer with the numerics of the GPU kernel.

    Weights are FP8, activations are quantized per token and 128 features, sums are fp32. The first
    use after each weight update dequantizes the weights to fp32.
    """
    weight_NK = layer.__dict__.get("_dequantized")
    if weight_NK is None:
        weight_NK = dequantize(layer.weight, layer.weight_scale_inv)
        layer.__dict__["_dequantized"] = weight_NK
    bias = None if bias is None else bias.float()
    return F.linear(through_fp8(x_TK), weight_NK, bias).to(x_TK.dtype)


def fp8_experts(self, layer, dispatch_output):
    """Compute a block-FP8 mixture of experts: each one as fp8_linear, summed by router weight."""
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


def dequantize(codes_NK, scale_inv):
    """Return block-scaled e4m3 weights in fp32, of one matrix or of several stacked."""
    N, K = codes_NK.shape[-2:]
    scale_NK = scale_inv.repeat_interleave(128, -2)[..., :N, :].repeat_interleave(128, -1)[..., :K]
    return codes_NK.float() * scale_NK


# --- attention ----------------------------------------------------------------------------------


def _gather_kv(k_cache, v_cache, req_to_token, req_pool_indices, seq_lens_B):
    """Return the cached keys and values of all requests, float32 [B, H, L, D], and live_BL.

    live_BL tells which of the L places a request really has.
    """
    L = int(seq_lens_B.max())
    live_BL = torch.arange(L) < seq_lens_B[:, None]
    slots_BL = req_to_token[req_pool_indices, :L].masked_fill(~live_BL, 0)
    k_BHLD = k_cache[slots_BL].transpose(1, 2).float()
    v_BHLD = v_cache[slots_BL].transpose(1, 2).float()
    return k_BHLD, v_BHLD, live_BL


def batched_decode(
    self,
    stock,
    query_BHD,
    output,
    k_cache,
    v_cache,
    req_to_token,
    req_pool_indices,
    seq_lens,
    encoder_lens=None,
    scaling=None,
    enable_gqa=False,
    causal=False,
    is_cross_attn=False,
    sliding_window_size=None,
):
    """Attend from one new token per request, many requests a call, in fp32.

    In BF16 the last bit would depend on how long the other requests are, and FP8 layers amplify
    that: see backends/megatron/fp8_numerics.py. Stock code makes one call per request and layer.
    """
    cache = (k_cache, v_cache, req_to_token)
    if encoder_lens is not None or sliding_window_size is not None:
        rest = (encoder_lens, scaling, enable_gqa, causal, is_cross_attn, sliding_window_size)
        return stock(self, query_BHD, output, *cache, req_pool_indices, seq_lens, *rest)
    # Requests of about one length share a call. Padded all to the longest, a single long answer
    # would cost as much as if every one were long.
    classes_B = (seq_lens - 1).clamp(min=31).log2().int()
    for length_class in classes_B.unique():
        rows = (classes_B == length_class).nonzero()[:, 0]
        k_BHLD, v_BHLD, live_BL = _gather_kv(*cache, req_pool_indices[rows], seq_lens[rows])
        out_BH1D = F.scaled_dot_product_attention(
            query_BHD[rows, :, None].float(),
            k_BHLD,
            v_BHLD,
            attn_mask=live_BL[:, None, None],
            scale=scaling,
            enable_gqa=enable_gqa,
        )
        output[rows] = out_BH1D[:, :, 0].to(output.dtype)
    return output


# Above this many mask elements the padded block costs more memory than it saves time.
MAX_MASK_ELEMENTS = 16_000_000


def batched_extend(
    self,
    stock,
    query_THD,
    output,
    k_cache,
    v_cache,
    req_to_token,
    req_pool_indices,
    seq_lens,
    extend_prefix_lens,
    extend_seq_lens,
    encoder_lens=None,
    scaling=None,
    enable_gqa=False,
    causal=False,
    is_cross_attn=False,
    sliding_window_size=None,
):
    """Attend from N new tokens per request behind a cached prefix, all requests in one call.

    Requests are padded to [B, N]; the mask is causal by position.
    """
    cache = (k_cache, v_cache, req_to_token, req_pool_indices, seq_lens)
    B, N, L = seq_lens.shape[0], int(extend_seq_lens.max()), int(seq_lens.max())
    is_plain = encoder_lens is None and causal and sliding_window_size is None
    if not is_plain or B * N * L > MAX_MASK_ELEMENTS:
        lengths = (extend_prefix_lens, extend_seq_lens)
        rest = (encoder_lens, scaling, enable_gqa, causal, is_cross_attn, sliding_window_size)
        return stock(self, query_THD, output, *cache, *lengths, *rest)
    k_BHLD, v_BHLD, live_BL = _gather_kv(*cache)
    real_BN = torch.arange(N) < extend_seq_lens[:, None]
    query_BNHD = query_THD.new_zeros(B, N, *query_THD.shape[1:], dtype=torch.float32)
    query_BNHD[real_BN] = query_THD.float()
    position_BN = extend_prefix_lens[:, None] + torch.arange(N)
    mask_BNL = (torch.arange(L) <= position_BN[:, :, None]) & live_BL[:, None]
    out_BHND = F.scaled_dot_product_attention(
        query_BNHD.transpose(1, 2),
        k_BHLD,
        v_BHLD,
        attn_mask=mask_BNL[:, None],
        scale=scaling,
        enable_gqa=enable_gqa,
    )
    return output.copy_(out_BHND.transpose(1, 2)[real_BN])
