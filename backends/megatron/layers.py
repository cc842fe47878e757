"""What Megatron's local layer spec lacks, in plain torch.

Used wherever Transformer Engine is not installed, and always on a CPU. Transformer Engine brings
Megatron an RMSNorm that knows sequence parallelism and an attention that takes packed sequences.
The local spec's own norm and attention refuse both; the two modules here take their place.

Shape letters: B sequences, L tokens per sequence, T packed tokens of all sequences, H heads, D head
size.
"""

import itertools

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules


if torch.cuda.is_available():
    # PyTorch would prefer cuDNN's attention on Hopper and Blackwell. It plans anew for every shape
    # [B, L], and packed batches have new shapes all the time.
    torch.backends.cuda.enable_cudnn_sdp(False)


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm, computed in fp32 and rounded once, as SGLang and TE do."""

    def __init__(self, config, hidden_size, eps=1e-6, **_):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        # By this mark finalize_model_grads sums the gradient over tensor-parallel ranks.
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x):
        normed = F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps)
        return normed.to(self.weight.dtype)


def zigzag(lengths: list[int], cp: int, rank: int) -> torch.Tensor:
    """Return which of the packed tokens a context-parallel rank holds, int64 [T / cp].

    Each sequence is cut into 2 cp chunks; rank r holds chunks r and 2 cp - 1 - r. A causal mask
    gives late tokens more work than early ones; so paired, all ranks have equally much. Transformer
    Engine expects the same order.
    """
    own_chunks = (rank, 2 * cp - 1 - rank)
    held = []
    for tokens in torch.arange(sum(lengths)).split(lengths):
        chunks = tokens.chunk(2 * cp)
        held += [chunk for i, chunk in enumerate(chunks) if i in own_chunks]
    return torch.cat(held)


def _length_class(length: int) -> int:
    """Return the same number for lengths that share a call: up to 32, up to 64, up to 128, ..."""
    return max(length - 1, 31).bit_length()


class PackedAttention(torch.nn.Module):
    """Causal attention over packed sequences (PackedSeqParams, layout thd).

    Neighbours of about one length are padded to [B, L] and make one call. plan_microbatches puts
    sequences of about one length next to each other. Padding stands behind each sequence, where the
    causal mask hides it.

    Under context parallelism a rank has its own queries and gathers all keys and values.
    """

    def __init__(
        self,
        config,
        layer_number,
        attn_mask_type,
        attention_type,
        softmax_scale=None,
        cp_comm_type=None,
        pg_collection=None,
        **_,
    ):
        super().__init__()
        self.scale, self.cp_group = softmax_scale, pg_collection.cp

    def forward(
        self,
        q_THD,
        k_THD,
        v_THD,
        attention_mask=None,
        attn_mask_type=None,
        attention_bias=None,
        packed_seq_params=None,
    ):
        """Attend within each packed sequence; float [T, H, D] with this rank's tokens."""
        if packed_seq_params is None:
            raise NotImplementedError(
                "PackedAttention takes packed sequences only: pass packed_seq_params"
            )
        lengths, cp = packed_seq_params.cu_seqlens_q.diff().tolist(), self.cp_group.size()
        position_T = None
        if cp > 1:
            k_THD, v_THD, position_T = self._gather(lengths, k_THD, v_THD)
        runs = [list(run) for _, run in itertools.groupby(lengths, _length_class)]
        k_sizes = [sum(run) for run in runs]
        q_sizes = [size // cp for size in k_sizes]
        q_parts, k_parts, v_parts = q_THD.split(q_sizes), k_THD.split(k_sizes), v_THD.split(k_sizes)
        position_parts = position_T.split(q_sizes) if cp > 1 else [None] * len(runs)
        out = []
        for run, *tensors in zip(runs, q_parts, k_parts, v_parts, position_parts):
            out.append(self._attend(torch.tensor(run, device=q_THD.device), *tensors))
        return torch.cat(out)

    def _gather(self, lengths: list[int], k_THD, v_THD):
        """Return keys and values of whole sequences, and the positions of this rank's queries.

        Collective over the context-parallel group.
        """
        cp, rank, device = self.cp_group.size(), self.cp_group.rank(), k_THD.device
        tokens_of = [zigzag(lengths, cp, other).to(device) for other in range(cp)]
        position_T = torch.cat([torch.arange(length, device=device) for length in lengths])
        # One rank's tokens come after the other's; this puts them back in order.
        in_order = torch.cat(tokens_of).argsort()

        def gather(x_THD):
            x_THD = gather_from_sequence_parallel_region(x_THD.contiguous(), group=self.cp_group)
            return x_THD[in_order]

        return gather(k_THD), gather(v_THD), position_T[tokens_of[rank]]

    def _attend(self, lengths_B, q_THD, k_THD, v_THD, position_T):
        """Attend within B sequences. position_T: of the queries, under context parallelism."""
        cp, place_L = self.cp_group.size(), torch.arange(int(lengths_B.max()), device=q_THD.device)
        is_key_BL = place_L < lengths_B[:, None]
        is_query_BL = place_L[: len(place_L) // cp] < lengths_B[:, None] // cp
        # On a CPU the backward pass of PyTorch's BF16 attention is several times slower than fp32,
        # and backends/cpu lets the engine attend in fp32 too.
        dtype = q_THD.dtype if q_THD.is_cuda else torch.float32

        def pad(x_T, is_real_BL, dtype=dtype):
            x_BL = x_T.new_zeros(*is_real_BL.shape, *x_T.shape[1:], dtype=dtype)
            x_BL[is_real_BL] = x_T.to(dtype)
            return x_BL

        causal = {"is_causal": True}
        if cp > 1:
            position_BL = pad(position_T, is_query_BL, torch.int64)
            causal = {"attn_mask": (place_L <= position_BL[:, :, None])[:, None]}
            # No fused kernel takes both a mask and grouped keys; the plain one holds [B, H, L, L].
            per_key = q_THD.shape[1] // k_THD.shape[1]
            k_THD, v_THD = (x.repeat_interleave(per_key, dim=1) for x in (k_THD, v_THD))
        out_BHLD = F.scaled_dot_product_attention(
            pad(q_THD, is_query_BL).transpose(1, 2),
            pad(k_THD, is_key_BL).transpose(1, 2),
            pad(v_THD, is_key_BL).transpose(1, 2),
            **causal,
            scale=self.scale,
            enable_gqa=q_THD.shape[1] != k_THD.shape[1],
        )
        return out_BHLD.transpose(1, 2)[is_query_BL].to(q_THD.dtype)


def add_in_fp32(training: bool, fused: bool):
    """Return what adds a layer's output to the residual stream, as SGLang's norm does.

    It stands where Megatron's spec has get_bias_dropout_add. Both come in BF16, or are rounded to
    it. The norm behind sees their sum in fp32. Models here have neither dropout nor such a bias.
    """

    def add(output_with_bias, residual, dropout):
        output, _ = output_with_bias
        return residual.bfloat16().float() + output.bfloat16().float()

    return add


def complete_local_spec(
    block: TransformerBlockSubmodules, *, qk_layernorm: bool, as_engine: bool = False
) -> TransformerBlockSubmodules:
    """Put both modules into a block spec.

    block: from get_gpt_decoder_block_spec(use_transformer_engine=False). as_engine: add to the
    residual stream as SGLang does.
    """
    block.layer_norm = RMSNorm
    for layer in block.layer_specs:
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
        if as_engine:
            layer.submodules.self_attn_bda = layer.submodules.mlp_bda = add_in_fp32
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = PackedAttention
        if qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = RMSNorm
    return block
