"""What Megatron's local layer spec lacks, in plain torch.

Used wherever Transformer Engine is not installed, and always on a CPU. Transformer Engine brings
Megatron an RMSNorm that knows sequence parallelism and an attention that takes packed sequences.
The local spec's own norm and attention refuse both; modules here take their place. They can do what
Transformer Engine's cannot: compute a prompt that several samples share once.

Shape letters: B sequences, L tokens per sequence, P tokens of a shared prompt, T packed tokens of
all sequences, H heads, D head size.
"""

import itertools
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules


# On a GPU no fused kernel takes both a mask and grouped keys; the plain one holds [B, H, L, L].
FUSES_MASK_AND_GROUPS = not torch.cuda.is_available()

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


@dataclass
class PackedSequences(PackedSeqParams):
    """Bounds of packed sequences, and what the local spec's modules know beyond them.

    A prompt that several samples share may be packed once, without its last token. What each sample
    has from that token on is then one of the last sequences. It sees the prompt's tokens as if they
    stood before its own.
    """

    prompt_of: list[int] = field(default_factory=list)
    """Of each of the last sequences: which sequence is its prompt"""
    position_T: torch.Tensor | None = None
    """int64: where each token stands in its sample; None: as Megatron counts"""


class PackedRotary(torch.nn.Module):
    """Megatron's rotary embedding at the positions that PackedSequences name.

    Megatron cuts the angles of every sequence from a table, in every layer. A table with a row for
    each token is taken as it is (_apply_rotary_pos_emb_thd in Megatron's rope_utils).
    """

    def __init__(self, stock: torch.nn.Module):
        super().__init__()
        self.stock = stock

    def get_rotary_seq_len(self, *model_and_input) -> PackedSequences:
        """Return the packed sequences: GPTModel gives what comes from here to forward()."""
        return model_and_input[-1]

    def forward(self, packed: PackedSequences, **more) -> torch.Tensor:
        """Return the angles, float32 [T, 1, 1, D]; without position_T those of all positions."""
        angles = self.stock(max(packed.max_seqlen_q, packed.max_seqlen_kv), **more)
        return angles if packed.position_T is None else angles[packed.position_T]


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


def length_class(length: int) -> int:
    """Return the same number for lengths that share a call: up to 32, up to 64, up to 128, ..."""
    return max(length - 1, 31).bit_length()


def _runs(rows, key) -> list[list]:
    """Return runs of neighbours with equal keys."""
    return [list(run) for _, run in itertools.groupby(rows, key)]


def _pad(x_T, is_real_BL, dtype):
    """Return packed rows as [B, L, ...] in this dtype, with 0 where no row is real."""
    x_BL = x_T.new_zeros(*is_real_BL.shape, *x_T.shape[1:], dtype=dtype)
    x_BL[is_real_BL] = x_T.to(dtype)
    return x_BL


class PackedAttention(torch.nn.Module):
    """Causal attention over packed sequences (PackedSeqParams, layout thd).

    Neighbours of about one length are padded to [B, L] and make one call. plan_microbatches puts
    sequences of about one length next to each other. Padding stands behind each sequence, where the
    causal mask hides it.

    What stands behind a shared prompt attends to the prompt's keys, then to its own. Under context
    parallelism a rank has its own queries and gathers all keys and values.
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
        position_T, prompt_of = None, packed_seq_params.prompt_of
        if cp > 1:
            k_THD, v_THD, position_T = self._gather(lengths, k_THD, v_THD)
        starts = list(itertools.accumulate(lengths, initial=0))
        out = []
        whole = len(lengths) - len(prompt_of)
        for run in _runs(range(whole), lambda i: length_class(lengths[i])):
            begin, end = starts[run[0]], starts[run[-1] + 1]
            keys, queries = slice(begin, end), slice(begin // cp, end // cp)
            lengths_B = torch.tensor([lengths[i] for i in run], device=q_THD.device)
            position = None if position_T is None else position_T[queries]
            out.append(self._attend(lengths_B, q_THD[queries], k_THD[keys], v_THD[keys], position))
        behind = [(i, prompt) for i, prompt in enumerate(prompt_of, start=whole)]
        for run in _runs(behind, lambda pair: tuple(length_class(lengths[i]) for i in pair)):
            own = slice(starts[run[0][0]], starts[run[-1][0] + 1])
            rows = [(lengths[i], lengths[prompt], starts[prompt]) for i, prompt in run]
            rows_3B = torch.tensor(rows, device=q_THD.device).T
            out.append(self._attend_behind(rows_3B, own, q_THD, k_THD, v_THD))
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

        causal = {"is_causal": True}
        if cp > 1:
            position_BL = _pad(position_T, is_query_BL, torch.int64)
            causal = {"attn_mask": (place_L <= position_BL[:, :, None])[:, None]}
        out_BLHD = self._attention(
            _pad(q_THD, is_query_BL, dtype),
            _pad(k_THD, is_key_BL, dtype),
            _pad(v_THD, is_key_BL, dtype),
            **causal,
        )
        return out_BLHD[is_query_BL].to(q_THD.dtype)

    def _attend_behind(self, rows_3B, own: slice, q_THD, k_THD, v_THD):
        """Attend within B sequences that stand behind shared prompts; own: their packed tokens.

        rows_3B: length of each sequence; length and first token of its prompt.
        """
        lengths_B, prompts_B, starts_B = rows_3B
        place_P = torch.arange(int(prompts_B.max()), device=q_THD.device)
        place_L = torch.arange(int(lengths_B.max()), device=q_THD.device)
        is_prompt_BP, is_own_BL = place_P < prompts_B[:, None], place_L < lengths_B[:, None]
        tokens_BP = (starts_B[:, None] + place_P).masked_fill(~is_prompt_BP, 0)
        dtype = q_THD.dtype if q_THD.is_cuda else torch.float32  # see _attend

        def with_prompt(x_THD):
            prompt_BPHD = x_THD.index_select(0, tokens_BP.flatten()).unflatten(0, tokens_BP.shape)
            return torch.cat([prompt_BPHD.to(dtype), _pad(x_THD[own], is_own_BL, dtype)], dim=1)

        B, L, P = len(lengths_B), len(place_L), len(place_P)
        sees_prompt = is_prompt_BP[:, None].expand(B, L, P)
        sees_own = (place_L <= place_L[:, None]).expand(B, L, L)
        out_BLHD = self._attention(
            _pad(q_THD[own], is_own_BL, dtype),
            with_prompt(k_THD),
            with_prompt(v_THD),
            attn_mask=torch.cat([sees_prompt, sees_own], dim=2)[:, None],
        )
        return out_BLHD[is_own_BL].to(q_THD.dtype)

    def _attention(self, q_BLHD, k_BLHD, v_BLHD, **mask):
        """Call PyTorch's attention; all tensors are [B, L, H, D]."""
        if "attn_mask" in mask and not FUSES_MASK_AND_GROUPS:
            per_key = q_BLHD.shape[2] // k_BLHD.shape[2]
            k_BLHD, v_BLHD = (x.repeat_interleave(per_key, dim=2) for x in (k_BLHD, v_BLHD))
        out_BHLD = F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q_BLHD, k_BLHD, v_BLHD)),
            **mask,
            scale=self.scale,
            enable_gqa=q_BLHD.shape[2] != k_BLHD.shape[2],
        )
        return out_BHLD.transpose(1, 2)


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
