"""What Megatron's local layer spec lacks, in plain torch: used wherever Transformer Engine is not installed, and always on a CPU.

Transformer Engine brings Megatron an RMSNorm that knows sequence parallelism and an attention that takes packed sequences. The local spec's own norm
refuses sequence parallelism and its attention refuses packed sequences; these two take their place.

Shape letters: B sequences, L tokens per sequence, T packed tokens of all sequences, H heads, D head size.
"""

import itertools

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm computed in fp32. Under sequence parallelism its gradient is summed over tensor-parallel ranks by finalize_model_grads."""

    def __init__(self, config, hidden_size, eps=1e-6, **_):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device()))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, None, self.eps).to(x.dtype) * self.weight


class PackedAttention(torch.nn.Module):
    """Causal attention over packed sequences (PackedSeqParams, layout thd): neighbours of about one length are padded to [B, L] and make one call.

    plan_microbatches brings sequences of about one length together: up to 32 tokens, up to 64, and so on. Padding stands behind each sequence, where a
    causal mask keeps it from being seen. On a CPU in fp32: the backward pass of PyTorch's BF16 attention is several times slower there.
    """

    def __init__(self, config, layer_number, attn_mask_type, attention_type, softmax_scale=None, cp_comm_type=None, pg_collection=None, **_):
        super().__init__()
        self.scale = softmax_scale

    def forward(self, q_THD, k_THD, v_THD, attention_mask=None, attn_mask_type=None, attention_bias=None, packed_seq_params=None):
        if packed_seq_params is None:
            raise NotImplementedError("PackedAttention takes packed sequences only: pass packed_seq_params")
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        runs = [list(run) for _, run in itertools.groupby(lengths, key=lambda length: max(length - 1, 31).bit_length())]
        parts = zip(runs, *(x_THD.split([sum(run) for run in runs]) for x_THD in (q_THD, k_THD, v_THD)))
        return torch.cat([self._attend(torch.tensor(run, device=q_THD.device), *qkv) for run, *qkv in parts])

    def _attend(self, lengths_B, q_THD, k_THD, v_THD):
        real_BL = torch.arange(int(lengths_B.max()), device=q_THD.device) < lengths_B[:, None]
        dtype = q_THD.dtype if q_THD.is_cuda else torch.float32

        def pad(x_THD):
            x_BLHD = x_THD.new_zeros(*real_BL.shape, *x_THD.shape[1:], dtype=dtype)
            x_BLHD[real_BL] = x_THD.to(dtype)
            return x_BLHD.transpose(1, 2)

        out_BHLD = F.scaled_dot_product_attention(
            pad(q_THD), pad(k_THD), pad(v_THD), is_causal=True, scale=self.scale, enable_gqa=q_THD.shape[1] != k_THD.shape[1]
        )
        return out_BHLD.transpose(1, 2)[real_BL].to(q_THD.dtype)


def complete_local_spec(block: TransformerBlockSubmodules, *, qk_layernorm: bool) -> TransformerBlockSubmodules:
    """Put both modules into a block spec from get_gpt_decoder_block_spec(use_transformer_engine=False)."""
    block.layer_norm = RMSNorm
    for layer in block.layer_specs:
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = PackedAttention
        if qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = RMSNorm
    return block
