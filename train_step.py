"""Samples -> updated weights: a Megatron GPTModel built from a Hugging Face folder, and one optimizer step on a batch of samples.

    samples  -> micro-batches     plan_microbatches, collate: packed without padding, balanced over data-parallel ranks by tokens
    tokens   -> logits            Megatron's GPTModel under its own forward-backward schedule
    logits   -> loss              losses.py, per token; summed, and divided once by the number of response tokens in the global batch
    gradient -> weights           Megatron's distributed optimizer: FP32 main weights and Adam state split over data-parallel ranks, BF16 model weights

The normaliser is global: Megatron all-reduces the token count before it scales the gradient (calculate_per_token_loss), so how samples fall on ranks and
micro-batches changes nothing but rounding. Averages of averages would weight a rank's tokens by how few it has.

Shape letters: T packed tokens of a micro-batch, V vocabulary on this tensor-parallel rank.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist

if not torch.cuda.is_available():
    import cpu

    cpu.patch_megatron()

from megatron.core import parallel_state as mpu
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from hf_folder import load_hf
from hf_names import megatron_arguments
from local_spec import complete_local_spec, zigzag
from losses import logprobs_and_entropy, mismatch, ppo_loss
from rollout import Sample
from run import BadInput, broadcast_bytes, parse_overrides
from weight_sync import Layout


@dataclass(frozen=True)
class TrainSettings:
    """The trainer: parallelism, optimizer, loss."""

    tp: int = 1
    """Tensor-parallel size; the remaining factor of the world is data parallel. Sequence parallelism comes with it."""
    pp: int = 1
    """Pipeline-parallel size: the layers are split over so many ranks."""
    cp: int = 1
    """Context-parallel size: every sequence is split over so many ranks."""
    ep: int = 1
    """Expert-parallel size: experts are split over so many ranks of tensor, context and data parallelism. An expert itself is then not split."""
    train_dtype: Literal["bf16", "fp32"] = "bf16"
    """dtype of model weights and activations; main weights, gradients and Adam state are fp32 either way."""
    microbatch_tokens: int = 8192
    """At most this many tokens in one forward pass of one rank; with --cp C a sequence may have C times as many."""
    lr: float = 2e-4
    """Peak learning rate. Right for the toy; pretrained models want about 1e-6."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """How the learning rate goes from --lr to --min-lr over the run."""
    lr_warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    min_lr: float = 0.0
    """Learning rate at the end of a linear or cosine schedule."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    adam_beta2: float = 0.95
    """Decay of Adam's second moment; beta1 is 0.9."""
    clip_grad: float = 1.0
    """Clip the global gradient norm to this."""
    clip_low: float = 0.2
    """PPO ratio is clipped below 1 - clip_low."""
    clip_high: float = 0.28
    """PPO ratio is clipped above 1 + clip_high (DAPO's clip-higher)."""
    tis_cap: float = 2.0
    """Truncated importance sampling: cap of exp(old_logprobs - rollout_logprobs); 0 turns it off."""
    megatron: tuple[str, ...] = ()
    """Further TransformerConfig or OptimizerConfig fields, key=value; for instance recompute_granularity=full."""


@dataclass
class Trainer:
    """One rank's part of the training state."""

    settings: TrainSettings
    config: dict  # config.json, checked
    ddp: DistributedDataParallel
    gpt: GPTModel  # the same parameters, unwrapped
    optimizer: object
    scheduler: OptimizerParamScheduler
    layout: Layout
    dp_group: dist.ProcessGroup  # each of its ranks has other samples
    cp_group: dist.ProcessGroup  # each of its ranks has another part of the same sequences
    dp_cp_group: dist.ProcessGroup  # both: what sums over tokens go over


def has_transformer_engine() -> bool:
    """Whether Transformer Engine imports. A half-installed one raises RuntimeError, which is not hidden: it names its own remedy."""
    if not torch.cuda.is_available():
        return False
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError:
        return False
    return True


def check_train_settings(settings: TrainSettings, config: dict, *, world_size: int, steps: int, longest: int) -> None:
    """Raise BadInput for what cannot work, before anything is started. longest: prompt plus response tokens of the longest possible sample."""
    if settings.tp < 1 or world_size % settings.tp:
        raise BadInput(f"--tp {settings.tp} does not divide the {world_size} ranks: use a --tp that divides --nproc-per-node times the nodes")
    if settings.pp < 1 or settings.cp < 1 or world_size % (settings.tp * settings.pp * settings.cp):
        split = f"--tp {settings.tp} times --pp {settings.pp} times --cp {settings.cp}"
        raise BadInput(f"{split} does not divide the {world_size} ranks: use another --pp or --cp")
    if (layers_in_last_stage(config, settings.pp) or 1) < 1:
        raise BadInput(f"--pp {settings.pp} leaves the last stage without layers, of which the model has {config['num_hidden_layers']}: use a smaller --pp")
    megatron_arguments(config, tp=settings.tp)
    stage_ranks = world_size // settings.pp
    if settings.ep < 1 or stage_ranks % settings.ep or config["num_experts"] % settings.ep or (settings.ep > 1 and not config["num_experts"]):
        raise BadInput(
            f"--ep {settings.ep} must divide the {stage_ranks} ranks of a pipeline stage and the model's {config['num_experts']} experts: "
            "use another --ep, and 1 for a dense model"
        )
    if settings.lr < 0 or settings.min_lr < 0 or settings.min_lr > settings.lr:
        raise BadInput(f"--lr {settings.lr} and --min-lr {settings.min_lr} must satisfy 0 <= min-lr <= lr")
    if not 0 <= settings.lr_warmup_steps < steps:
        raise BadInput(f"--lr-warmup-steps {settings.lr_warmup_steps} must be smaller than --steps {steps}")
    if not 0 < settings.clip_low < 1 or settings.clip_high <= 0 or settings.tis_cap < 0 or settings.clip_grad <= 0:
        raise BadInput("--clip-low must lie in (0, 1), --clip-high and --clip-grad be positive, --tis-cap not negative")
    if settings.microbatch_tokens * settings.cp < padded_length(longest, settings.cp):
        room = f"--microbatch-tokens {settings.microbatch_tokens} times --cp {settings.cp}"
        raise BadInput(f"{room} is less than the longest possible sample, {padded_length(longest, settings.cp)} tokens: raise one of them")
    _overrides(settings, config, TransformerConfig)


def _overrides(settings: TrainSettings, config: dict, config_class: type) -> dict:
    """The part of --megatron that are fields of config_class. What config.json or another flag decides is no field that can be set."""
    fields = [field.name for cls in (TransformerConfig, OptimizerConfig) for field in dataclasses.fields(cls)]
    decided = set(megatron_arguments(config, tp=settings.tp)[0]) | {"tensor_model_parallel_size", "sequence_parallel", "params_dtype", "bf16", "fp16", "lr"}
    overrides = parse_overrides(settings.megatron, flag="--megatron", fields=[name for name in fields if name not in decided])
    return {name: value for name, value in overrides.items() if name in config_class.__dataclass_fields__}


def build_gpt(settings: TrainSettings, config: dict) -> tuple[GPTModel, Layout]:
    """This rank's part of the model, not yet filled, and how the whole is split. Megatron's process groups must be there."""
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[settings.train_dtype]
    use_te = has_transformer_engine()
    model_arguments, gpt_arguments = megatron_arguments(config, tp=settings.tp)
    common = dict(
        tensor_model_parallel_size=settings.tp,
        pipeline_model_parallel_size=settings.pp,
        context_parallel_size=settings.cp,
        num_layers_in_last_pipeline_stage=layers_in_last_stage(config, settings.pp),
        expert_model_parallel_size=settings.ep,
        expert_tensor_parallel_size=expert_tp(settings),
        sequence_parallel=settings.tp > 1,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        pipeline_dtype=dtype,
        calculate_per_token_loss=True,  # before DDP is built: it decides there whether gradients are averaged or summed
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # variable_seq_lengths asks for it, even of a dense model
        attention_softmax_in_fp32=True,
        masked_softmax_fusion=use_te,
        bias_activation_fusion=use_te,
        bias_dropout_fusion=use_te,
        apply_rope_fusion=use_te,
        gradient_accumulation_fusion=False,
        moe_grouped_gemm=use_te,
        persist_layer_norm=use_te,
    )
    transformer = TransformerConfig(**{**model_arguments, **common, **_overrides(settings, config, TransformerConfig)})
    spec = get_gpt_decoder_block_spec(transformer, use_transformer_engine=use_te, normalization="RMSNorm")
    if not use_te:
        spec = complete_local_spec(spec, qk_layernorm=transformer.qk_layernorm)
    gpt = GPTModel(transformer, spec, pre_process=mpu.is_pipeline_first_stage(), post_process=mpu.is_pipeline_last_stage(), **gpt_arguments)
    layout = Layout(
        mpu.get_tensor_model_parallel_group(),
        mpu.get_expert_tensor_and_model_parallel_group(),
        settings.ep,
        mpu.get_pipeline_model_parallel_group(),
        get_transformer_layer_offset(transformer),
    )
    return gpt, layout


def expert_tp(settings: TrainSettings) -> int:
    """Over how many ranks one expert is split: as the rest of the layer, unless experts are spread over ranks."""
    return 1 if settings.ep > 1 else settings.tp


def layers_in_last_stage(config: dict, pp: int) -> int | None:
    """None where the layers divide evenly; else what is left for the last stage, which also has the output layer, when the others have equally many."""
    layers = config["num_hidden_layers"]
    return None if layers % pp == 0 else layers - (pp - 1) * -(-layers // pp)


def build_trainer(model_folder: str, settings: TrainSettings, config: dict, *, steps: int, seed: int) -> Trainer:
    """Megatron's process groups, the model with the folder's weights, and its optimizer. Collective over the default process group."""
    experts = dict(expert_model_parallel_size=settings.ep, expert_tensor_parallel_size=expert_tp(settings))
    mpu.initialize_model_parallel(settings.tp, settings.pp, context_parallel_size=settings.cp, **experts)
    model_parallel_cuda_manual_seed(seed)
    gpt, layout = build_gpt(settings, config)
    if torch.cuda.is_available():
        gpt.cuda(torch.cuda.current_device())
    load_hf(gpt, model_folder, config, layout=layout)  # before the optimizer copies FP32 main weights

    transformer, dtype = gpt.config, gpt.config.params_dtype
    wrapped = Float16Module(transformer, gpt) if dtype is torch.bfloat16 else gpt
    ddp = DistributedDataParallel(transformer, DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True), wrapped)
    optimizer_arguments = dict(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta2=settings.adam_beta2,
        clip_grad=settings.clip_grad,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=True,
    )
    optimizer = get_megatron_optimizer(OptimizerConfig(**{**optimizer_arguments, **_overrides(settings, config, OptimizerConfig)}), [ddp])
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.lr_warmup_steps,
        lr_decay_steps=steps,
        lr_decay_style=settings.lr_schedule,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    transformer.finalize_model_grads_func = finalize_model_grads
    transformer.grad_scale_func = optimizer.scale_loss
    groups = mpu.get_data_parallel_group(), mpu.get_context_parallel_group(), mpu.get_data_parallel_group(with_context_parallel=True)
    return Trainer(settings, config, ddp, gpt, optimizer, scheduler, layout, *groups)


# --- samples -> micro-batches -----------------------------------------------------------------------------------------------------------------


def plan_microbatches(lengths: list[int], *, microbatch_tokens: int, dp: int) -> list[list[list[int]]]:
    """Which samples form which micro-batch of which data-parallel rank: plan[rank][micro-batch] = indices into lengths.

    Every rank gets the same number of micro-batches (collectives inside the model must pair up), as few as the token budget allows, of about equal
    size: longest sample first, each into the bin that holds least; so samples of about one length stand together. A bin may be empty when there are fewer
    samples than bins.
    """
    bins = dp * max(1, -(-sum(lengths) // (dp * microbatch_tokens)))
    while True:
        loads, members = [0] * bins, [[] for _ in range(bins)]
        for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
            lightest = loads.index(min(loads))
            loads[lightest] += lengths[i]
            members[lightest].append(i)
        if max(loads) <= microbatch_tokens:
            break
        bins += dp
    by_load = sorted(range(bins), key=lambda b: -loads[b])
    return [[members[b] for b in by_load[rank::dp]] for rank in range(dp)]


@dataclass
class MicroBatch:
    """Packed sequences. Position t predicts token t + 1, so every per-token field describes that next token, and mask is 1 where it counts."""

    tokens_T: torch.Tensor  # int64
    labels_T: torch.Tensor  # int64, tokens shifted left within each sequence
    mask_T: torch.Tensor  # float32: 1 where the next token is the policy's own
    advantages_T: torch.Tensor  # float32
    rollout_logprobs_T: torch.Tensor  # float32
    packed: PackedSeqParams
    old_logprobs_T: torch.Tensor | None = None


def padded_length(length: int, cp: int) -> int:
    """Length of a sequence in a micro-batch: under context parallelism a multiple of 2 cp, see zigzag."""
    return length if cp == 1 else -(-length // (2 * cp)) * 2 * cp


def collate(samples: list[Sample], *, tp: int = 1, cp: int = 1, cp_rank: int = 0, device: torch.device) -> MicroBatch:
    """Concatenate prompt + response of each sample. A masked filler sequence brings T to a multiple that sequence parallelism can split, and above 0.

    Example, prompt [5, 6], response [7, 8] with log-probs [a, b]:   tokens 5 6 7 8   labels 6 7 8 8   mask 0 1 1 0   rollout_logprobs 0 a b 0
    Under context parallelism the fields hold this rank's tokens of every sequence, and packed the bounds of the whole sequences.
    """
    sequences = [np.concatenate([sample.prompt_ids, sample.response_ids]).astype(np.int64) for sample in samples]
    lengths = [padded_length(len(sequence), cp) for sequence in sequences]
    multiple_of = tp if cp == 1 else cp * math.lcm(2, tp)
    filler = -sum(lengths) % multiple_of if lengths else multiple_of
    lengths += [filler] if filler else []
    T, ends = sum(lengths), np.cumsum(lengths)
    tokens, labels = np.zeros(T, np.int64), np.zeros(T, np.int64)
    mask, advantages, rollout_logprobs = (np.zeros(T, np.float32) for _ in range(3))
    for sample, sequence, start in zip(samples, sequences, ends - lengths):
        end = start + len(sequence)
        tokens[start:end] = sequence
        labels[start:end] = np.append(sequence[1:], sequence[-1])
        answer = slice(end - len(sample.response_ids) - 1, end - 1)
        mask[answer] = sample.loss_mask
        advantages[answer] = sample.advantage
        rollout_logprobs[answer] = sample.rollout_logprobs
    cu_seqlens = torch.tensor([0, *ends], dtype=torch.int32, device=device)
    packed = PackedSeqParams("thd", cu_seqlens, cu_seqlens, cu_seqlens, cu_seqlens, max_seqlen_q=max(lengths), max_seqlen_kv=max(lengths))
    mine = zigzag(lengths, cp, cp_rank)
    arrays = (tokens, labels, mask, advantages, rollout_logprobs)
    return MicroBatch(*(torch.from_numpy(array)[mine].to(device) for array in arrays), packed=packed)


def local_microbatches(trainer: Trainer, samples: list[Sample]) -> list[MicroBatch]:
    """This rank's share of a global batch; every rank passes the same samples in the same order."""
    tp, cp = trainer.settings.tp, trainer.settings.cp
    lengths = [padded_length(len(sample.prompt_ids) + len(sample.response_ids), cp) for sample in samples]
    plan = plan_microbatches(lengths, microbatch_tokens=trainer.settings.microbatch_tokens * cp, dp=trainer.dp_group.size())
    split = dict(tp=tp, cp=cp, cp_rank=trainer.cp_group.rank(), device=next(trainer.gpt.parameters()).device)
    return [collate([samples[i] for i in bin], **split) for bin in plan[trainer.dp_group.rank()]]


# --- forward, backward, step ------------------------------------------------------------------------------------------------------------------


def _schedule(trainer: Trainer, batches: list[MicroBatch], loss_function, *, temperature: float, forward_only: bool) -> list[dict]:
    """Run Megatron's schedule; loss_function(batch, logprobs_T, entropy_T) -> (summed loss, dict). Returns the dicts."""

    def forward_step(iterator, model):
        batch = next(iterator)
        logits_1TV = model(batch.tokens_T[None], None, None, packed_seq_params=batch.packed)

        def loss(logits_1TV):
            logprobs_T, entropy_T = logprobs_and_entropy(
                logits_1TV[0], batch.labels_T, temperature=temperature, vocab_size=trainer.config["vocab_size"], group=trainer.layout.tp_group
            )
            summed, report = loss_function(batch, logprobs_T, entropy_T)
            return summed, batch.mask_T.sum().int(), report

        return logits_1TV, loss

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=trainer.ddp,
        num_microbatches=len(batches),
        seq_length=trainer.settings.microbatch_tokens,
        micro_batch_size=1,
        forward_only=forward_only,
    )


@torch.no_grad()
def compute_logprobs(trainer: Trainer, batches: list[MicroBatch], *, temperature: float) -> list[torch.Tensor]:
    """The trainer's log-prob of every next token, float32 [T] per micro-batch, in a forward pass of its own."""
    reports = _schedule(
        trainer,
        batches,
        lambda batch, logprobs_T, entropy_T: (logprobs_T.sum() * 0, {"logprobs": logprobs_T}),
        temperature=temperature,
        forward_only=True,
    )
    return [report["logprobs"] for report in reports]


def train_step(trainer: Trainer, samples: list[Sample], *, temperature: float) -> dict[str, float]:
    """One optimizer step on the global batch; returns metrics that are equal on every rank.

    temperature: of the rollout; log-probs are those of the distribution that was sampled from. Raises RuntimeError on every rank when the loss or the
    gradient is not finite, or when no token counts: a step that is skipped in silence is a run that fails later.
    """
    settings = trainer.settings
    batches = local_microbatches(trainer, samples)
    for batch, old_logprobs_T in zip(batches, compute_logprobs(trainer, batches, temperature=temperature)):
        batch.old_logprobs_T = old_logprobs_T

    def loss_function(batch, logprobs_T, entropy_T):
        loss_T, statistics = ppo_loss(
            logprobs_T,
            batch.old_logprobs_T,
            batch.rollout_logprobs_T,
            batch.advantages_T,
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
            tis_cap=settings.tis_cap,
        )
        difference = mismatch(batch.old_logprobs_T, batch.rollout_logprobs_T)
        per_token = {"loss": loss_T.detach(), "entropy": entropy_T.detach(), **statistics, **difference}
        masked = {name: (value_T * batch.mask_T).sum() for name, value_T in per_token.items()}
        return (loss_T * batch.mask_T).sum(), {"sums": {"tokens": batch.mask_T.sum(), **masked}, "max": (difference["mismatch_abs"] * batch.mask_T).max()}

    trainer.ddp.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    reports = _schedule(trainer, batches, loss_function, temperature=temperature, forward_only=False)
    metrics = _global_means(reports, trainer)
    if not metrics["tokens"]:
        raise RuntimeError(f"none of the {len(samples)} samples has a token that counts: every loss_mask is 0")
    if not np.isfinite(metrics["loss"]):
        raise RuntimeError(f"the loss is {metrics['loss']}; the weights have not been updated")
    lr = trainer.optimizer.param_groups[0]["lr"]
    updated, grad_norm, _ = trainer.optimizer.step()
    if not updated or not np.isfinite(grad_norm):
        raise RuntimeError(f"the gradient norm is {grad_norm}; the run stops rather than skip a step")
    trainer.scheduler.step(1)
    return {**metrics, "grad_norm": float(grad_norm), "lr": lr}


def _global_means(reports: list[dict], trainer: Trainer) -> dict[str, float]:
    """Sums over all micro-batches and ranks, divided by the global number of tokens; and the largest mismatch.

    Only the last pipeline stage has reports; it tells the others.
    """
    means = {}
    if reports:
        names = list(reports[0]["sums"])
        sums = torch.stack([torch.stack([report["sums"][name].double() for name in names]) for report in reports]).sum(0)
        largest = torch.stack([report["max"] for report in reports]).max()
        dist.all_reduce(sums, group=trainer.dp_cp_group)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=trainer.dp_cp_group)
        totals = dict(zip(names, sums.tolist()))
        tokens = totals.pop("tokens")
        means = {"tokens": int(tokens), **{name: total / max(tokens, 1) for name, total in totals.items()}, "mismatch_max": float(largest)}
    stages = trainer.layout.pp_group
    return json.loads(broadcast_bytes(json.dumps(means).encode(), stages, source=stages.size() - 1))
