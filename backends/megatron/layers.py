"""What Megatron's local layer spec lacks, in plain torch: used wherever Transformer Engine is not
installed, and always on a CPU.

Transformer Engine brings Megatron an RMSNorm that knows sequence parallelism and an attention that
takes packed sequences. The local spec's own norm refuses sequence parallelism and its attention
refuses packed sequences; these two take their place.

Shape letters: B sequences, L tokens per sequence, T packed tokens of all sequences, H heads, D head
size.
"""

import itertools

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm computed in fp32.

    Under sequence parallelism its gradient is summed over tensor-parallel ranks by
    finalize_model_grads.
    """

    def __init__(self, config, hidden_size, eps=1e-6, **_):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x):
        return (
            F.rms_norm(x.float(), self.weight.shape, None, self.eps).to(self.weight.dtype)
            * self.weight
        )  # x is fp32 with fp32_residual_connection


def zigzag(lengths: list[int], cp: int, rank: int) -> torch.Tensor:
    """Which of the packed tokens a context-parallel rank holds, int64 [T / cp]: of each sequence,
    cut into 2 cp chunks, chunk `rank` and the one as far from its end. A causal mask gives late
    tokens more work than early ones; so paired, every rank has the same. Transformer Engine expects
    the same order.
    """
    chunks = [
        chunk
        for tokens in torch.arange(sum(lengths)).split(lengths)
        for chunk in tokens.chunk(2 * cp)
    ]
    return torch.cat(
        [chunk for i, chunk in enumerate(chunks) if i % (2 * cp) in (rank, 2 * cp - 1 - rank)]
    )


class PackedAttention(torch.nn.Module):
    """Causal attention over packed sequences (PackedSeqParams, layout thd): neighbours of about one
    length are padded to [B, L] and make one call.

    plan_microbatches brings sequences of about one length together: up to 32 tokens, up to 64, and
    so on. Padding stands behind each sequence, where a causal mask keeps it from being seen. On a
    CPU in fp32: the backward pass of PyTorch's BF16 attention is several times slower there. Under
    context parallelism a rank has its own queries and gathers all keys and values.
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
        if packed_seq_params is None:
            raise NotImplementedError(
                "PackedAttention takes packed sequences only: pass packed_seq_params"
            )
        lengths, cp = packed_seq_params.cu_seqlens_q.diff().tolist(), self.cp_group.size()
        if cp > 1:
            tokens = [zigzag(lengths, cp, rank).to(q_THD.device) for rank in range(cp)]
            position_T = torch.cat(
                [torch.arange(length, device=q_THD.device) for length in lengths]
            )[tokens[self.cp_group.rank()]]
            in_order = torch.cat(tokens).argsort()
            k_THD, v_THD = (
                gather_from_sequence_parallel_region(x_THD.contiguous(), group=self.cp_group)[
                    in_order
                ]
                for x_THD in (k_THD, v_THD)
            )
        runs = [
            list(run)
            for _, run in itertools.groupby(
                lengths, key=lambda length: max(length - 1, 31).bit_length()
            )
        ]
        sizes = [sum(run) for run in runs]
        mine = [size // cp for size in sizes]
        positions = position_T.split(mine) if cp > 1 else [None] * len(runs)
        parts = zip(runs, q_THD.split(mine), k_THD.split(sizes), v_THD.split(sizes), positions)
        return torch.cat(
            [
                self._attend(torch.tensor(run, device=q_THD.device), *tensors)
                for run, *tensors in parts
            ]
        )

    def _attend(self, lengths_B, q_THD, k_THD, v_THD, position_T):
        cp, place_L = self.cp_group.size(), torch.arange(int(lengths_B.max()), device=q_THD.device)
        k_BL = place_L < lengths_B[:, None]
        q_BL = place_L[: len(place_L) // cp] < lengths_B[:, None] // cp
        dtype = q_THD.dtype if q_THD.is_cuda else torch.float32

        def pad(x_T, real_BL, dtype=dtype):
            x_BL = x_T.new_zeros(*real_BL.shape, *x_T.shape[1:], dtype=dtype)
            x_BL[real_BL] = x_T.to(dtype)
            return x_BL

        causal = {"is_causal": True}
        if cp > 1:
            position_BL = pad(position_T, q_BL, torch.int64)
            causal = {"attn_mask": (place_L <= position_BL[:, :, None])[:, None]}
        q_BHLD, k_BHLD, v_BHLD = (
            pad(x_THD, real_BL).transpose(1, 2)
            for x_THD, real_BL in ((q_THD, q_BL), (k_THD, k_BL), (v_THD, k_BL))
        )
        out_BHLD = F.scaled_dot_product_attention(
            q_BHLD,
            k_BHLD,
            v_BHLD,
            **causal,
            scale=self.scale,
            enable_gqa=q_THD.shape[1] != k_THD.shape[1],
        )
        return out_BHLD.transpose(1, 2)[q_BL].to(q_THD.dtype)


def complete_local_spec(
    block: TransformerBlockSubmodules, *, qk_layernorm: bool
) -> TransformerBlockSubmodules:
    """Put both modules into a block spec from
    get_gpt_decoder_block_spec(use_transformer_engine=False).
    """
    block.layer_norm = RMSNorm
    for layer in block.layer_specs:
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = PackedAttention
        if qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = RMSNorm
    return block
