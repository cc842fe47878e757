"""Samples -> updated weights: a Megatron GPTModel built from a Hugging Face folder, and one
optimizer step on a batch of samples.

    samples  -> micro-batches     packing.py: packed without padding, balanced over data-parallel ranks by tokens
    tokens   -> logits            Megatron's GPTModel under its own forward-backward schedule
    logits   -> loss              logprobs.py and losses.py, per token; summed with the weights of
                                  the aggregation, divided once by its units in the global batch
    gradient -> weights           Megatron's distributed optimizer: FP32 main weights and Adam state split over data-parallel ranks, BF16 model weights

The normaliser is global: Megatron all-reduces what it calls the number of tokens, here the units of
the aggregation, before it scales the gradient (calculate_per_token_loss), so how samples fall on
ranks and micro-batches changes nothing but rounding.

Shape letters: T packed tokens of a micro-batch, N its samples, V vocabulary on this tensor-parallel
rank.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from backends.megatron.model import (
    check_overrides,
    init_parallel,
    load_model,
    overrides,
)  # first of what imports Megatron: without a GPU it is prepared there
from megatron.core import parallel_state as mpu
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig

from backends.huggingface.config import check_layout, megatron_arguments, read_config
from backends.huggingface.folder import HFWeights, check_shapes
from backends.megatron.batches import (
    MicroBatch,
    equal_parts,
    give_to_samples,
    global_sums,
    has_old_logprobs,
    local_microbatches,
    microbatch_plan,
    minibatches,
    padded_length,
)
from backends.megatron.layout import Layout
from backends.megatron.logprobs import logprobs_and_entropy
from common.errors import ProblemList, all_problems
from common.settings import TrainSettings
from data.sample import Sample
from losses import (
    AGGREGATIONS,
    CORRECTIONS,
    KL_ESTIMATORS,
    POLICY_LOSSES,
    LossSettings,
    k3,
    mismatch,
)


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
    reference: torch.nn.Module | None = None  # as ddp.module, with the reference's weights


@all_problems
def check_train_settings(
    settings: TrainSettings, config: dict | None, *, world_size: int, longest: int | None
) -> None:
    """Refuse what does not fit the model. The flags alone are checked in checks.py.

    world_size: of the ranks that train.
    longest: prompt plus response tokens of the longest possible sample.
    config, longest: None where they could not be found out; what needs them is then left out.
    """
    found = ProblemList()
    reference = found.collect(read_config, settings.reference) if settings.reference else None
    if reference and config:
        theirs, ours = (
            {**model, **gpt}
            for model, gpt in (megatron_arguments(c, tp=1) for c in (reference, config))
        )
        if differing := sorted(
            name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name)
        ):
            yield (
                f"--reference {settings.reference} differs from the model in"
                f" {', '.join(differing)}: it must have the same architecture"
            )
        else:
            found.collect(lambda: check_shapes(HFWeights(settings.reference), reference))
    if config:
        found.collect(
            check_layout,
            config,
            world_size=world_size,
            tp=settings.tp,
            pp=settings.pp,
            cp=settings.cp,
            ep=settings.ep,
        )
        found.collect(overrides, settings, config, TransformerConfig)
        if settings.megatron and not found.texts:
            found.collect(check_overrides, settings, config)
    if (
        longest
        and (cp := settings.cp) > 0
        and settings.microbatch_tokens * cp < padded_length(longest, cp)
    ):
        room = f"--microbatch-tokens {settings.microbatch_tokens} times --cp {cp}"
        yield (
            f"{room} is less than the longest possible sample, {padded_length(longest, cp)} tokens:"
            " raise one of them"
        )
    yield from found.texts


def build_trainer(
    model_folder: str,
    settings: TrainSettings,
    config: dict,
    *,
    steps: int,
    seed: int,
    with_reference: bool = False,
    head=None,
) -> Trainer:
    """Megatron's process groups, unless they are there, the model with the folder's weights, its
    optimizer, and the reference. Collective.

    head(transformer_config) -> module that takes the place of the output layer, for a model that
    computes something else than logits, such as a critic.
    """
    init_parallel(settings, seed=seed)
    gpt, layout, wrapped = load_model(model_folder, settings, config)
    if head is not None and gpt.post_process:
        gpt.output_layer = head(gpt.config)
    reference = (
        load_model(settings.reference or model_folder, settings, config)[-1].requires_grad_(False)
        if with_reference
        else None
    )
    if with_reference and settings.offload_reference:
        reference.to("cpu")

    transformer, dtype = gpt.config, gpt.config.params_dtype
    ddp = DistributedDataParallel(
        transformer,
        DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True),
        wrapped,
    )
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
    optimizer = get_megatron_optimizer(
        OptimizerConfig(**{**optimizer_arguments, **overrides(settings, config, OptimizerConfig)}),
        [ddp],
    )
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
    groups = (
        mpu.get_data_parallel_group(),
        mpu.get_context_parallel_group(),
        mpu.get_data_parallel_group(with_context_parallel=True),
    )
    return Trainer(settings, config, ddp, gpt, optimizer, scheduler, layout, *groups, reference)


# --- forward, backward, step --------------------------------------------------------------------


def run_schedule(
    trainer: Trainer,
    batches: list[MicroBatch],
    loss_function,
    *,
    model: torch.nn.Module | None = None,
    forward_only: bool,
) -> list[dict]:
    """Run Megatron's schedule over the micro-batches. loss_function(batch, output_TX) -> (sum to
    differentiate, units it is a sum over, dict).

    output_TX: the model's output, float [T, X], on the last pipeline stage. Returns the dicts,
    which are empty on the other stages. model: the trainer's unless given.
    """
    # Else Float16Module would make an fp32 copy of all logits; logprobs.py does so for few tokens.
    more = {"fp32_output": False} if trainer.settings.train_dtype == "bf16" else {}

    def forward_step(iterator, model):
        batch = next(iterator)
        output_1TX = model(batch.tokens_T[None], None, None, packed_seq_params=batch.packed, **more)
        return output_1TX, lambda output_1TX: loss_function(batch, output_1TX[0])

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=trainer.ddp if model is None else model,
        num_microbatches=len(batches),
        seq_length=trainer.settings.microbatch_tokens,
        micro_batch_size=1,
        forward_only=forward_only,
    )


def logprobs_of(
    trainer: Trainer, batch: MicroBatch, logits_TV: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-prob of each next token, entropy), float32 [T]."""
    vocabulary = dict(vocab_size=trainer.config["vocab_size"], group=trainer.layout.tp_group)
    return logprobs_and_entropy(logits_TV, batch.labels_T, temperature=temperature, **vocabulary)


@torch.no_grad()
def compute_logprobs(
    trainer: Trainer,
    batches: list[MicroBatch],
    *,
    temperature: float,
    model: torch.nn.Module | None = None,
) -> list[torch.Tensor]:
    """The log-prob of every next token by the trainer, or another model, float32 [T] per
    micro-batch, in a forward pass of its own.
    """

    def loss_function(batch, logits_TV):
        logprobs_T, _ = logprobs_of(trainer, batch, logits_TV, temperature)
        return logprobs_T.sum() * 0, torch.tensor(0, dtype=torch.int), {"logprobs": logprobs_T}

    return [
        report["logprobs"]
        for report in run_schedule(trainer, batches, loss_function, model=model, forward_only=True)
    ]


def add_logprobs(
    trainer: Trainer | None,
    samples: list[Sample],
    settings: LossSettings | None = None,
    *,
    temperature: float,
) -> list[Sample]:
    """Set every sample's old_logprobs, and its ref_logprobs where there is a reference: a forward
    pass over the batch for each. Collective.

    Returns the samples; on ranks that do not train, none. The batch is packed as train_step packs
    it: the first ratio is then exactly 1. settings: leave out old_logprobs where nothing needs
    them: a batch's only update starts from the very weights that they would be computed with.
    """
    if trainer is None:
        return []
    needs_old = (
        settings is None
        or trainer.settings.minibatches > 1
        or (settings.kl_coef > 0 and settings.kl_in == "reward")
    )
    device = next(trainer.gpt.parameters()).device
    if not needs_old and trainer.reference is None:
        return samples
    for part in equal_parts(samples, trainer.settings.minibatches):
        batches = local_microbatches(trainer, part)
        if needs_old:
            give_to_samples(
                trainer,
                part,
                batches,
                compute_logprobs(trainer, batches, temperature=temperature),
                "old_logprobs",
            )
        if trainer.reference is not None:
            trainer.reference.to(device)
            logprobs = compute_logprobs(
                trainer, batches, temperature=temperature, model=trainer.reference
            )
            give_to_samples(trainer, part, batches, logprobs, "ref_logprobs")
            if trainer.settings.offload_reference:
                trainer.reference.to("cpu")
    return samples


def backward(
    trainer: Trainer,
    samples: list[Sample],
    settings: LossSettings,
    *,
    temperature: float,
    max_response_tokens: int,
) -> dict[str, float]:
    """Gradient of the loss of these samples, into the trainer's buffers; returns sums over all
    their tokens, equal on every rank. Collective.
    """
    clips = dict(zip(("clip_low", "clip_high"), settings.clips), dual_clip=settings.dual_clip)
    bounds = dict(zip(("low", "high"), settings.correction_bounds))
    scored = has_old_logprobs(samples, with_reference=settings.kl_coef > 0)

    def loss_function(batch, logits_TV):
        logprobs_T, entropy_T = logprobs_of(trainer, batch, logits_TV, temperature)
        # What does not count is set to 0 before anything is computed from it: 0 times infinity is
        # not 0.
        zero = batch.mask_T == 0
        old_T = batch.old_logprobs_T if scored else logprobs_T.detach()
        logprobs_T, entropy_T, old_T, rollout_T, ref_T, advantages_T = (
            x_T.masked_fill(zero, 0)
            for x_T in (
                logprobs_T,
                entropy_T,
                old_T,
                batch.rollout_logprobs_T,
                batch.ref_logprobs_T,
                batch.advantages_T,
            )
        )
        policy_T, ratio_T, clipped_T = POLICY_LOSSES[settings.policy_loss].function(
            logprobs_T, old_T, advantages_T, batch.sequences, **clips
        )
        correction = CORRECTIONS[settings.correction].weight
        correction_T, cut_T = correction(old_T - rollout_T, batch.sequences, **bounds)
        kl_T = (
            KL_ESTIMATORS[settings.kl_estimator].function(logprobs_T, ref_T, old_T)
            if settings.kl_coef
            else torch.zeros_like(logprobs_T)
        )
        kl_coef = settings.kl_coef if settings.kl_in == "loss" else 0.0
        loss_T = correction_T * policy_T + kl_coef * kl_T - settings.entropy_coef * entropy_T
        weight_T, normalizer_N = AGGREGATIONS[settings.aggregation](
            batch.sequences, max_response_tokens=max_response_tokens
        )
        loss, units = (
            (weight_T * loss_T).sum(),
            normalizer_N.sum() if trainer.cp_group.rank() == 0 else normalizer_N.sum() * 0,
        )

        mismatch_T, approx_kl_T = mismatch(old_T, rollout_T), k3(old_T, logprobs_T, None)
        per_token = {"entropy": entropy_T, "ratio": ratio_T, "clipfrac": clipped_T, "kl": kl_T}
        per_token |= {"approx_kl": approx_kl_T, "logprob_shift": logprobs_T - old_T}
        per_token |= {"tis_clipfrac": cut_T, **mismatch_T}
        sums = {
            name: (value_T.detach() * batch.mask_T).sum() for name, value_T in per_token.items()
        }
        report = {"loss": loss.detach(), "units": units, "tokens": batch.mask_T.sum(), **sums}
        return (
            loss,
            units.int(),
            {"sums": report, "max": (mismatch_T["mismatch_abs"] * batch.mask_T).max()},
        )

    trainer.ddp.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    return global_sums(
        trainer,
        run_schedule(
            trainer, local_microbatches(trainer, samples), loss_function, forward_only=False
        ),
    )


def update_policy(
    trainer: Trainer | None,
    samples: list[Sample],
    settings: LossSettings,
    *,
    temperature: float,
    max_response_tokens: int,
) -> dict[str, float]:
    """One optimizer step on each mini-batch of the global batch; returns metrics that are equal on
    every rank that trains, {} on others. Collective.

    samples: with advantages, and what score() has set. temperature: of the rollout; log-probs are
    those of the distribution that was sampled from. Raises RuntimeError on every rank when loss or
    gradient are not finite: a step that is skipped in silence is a run that fails later. The
    weights are then those of before the step.

    A batch in which no token counts has no gradient. Weights and optimizer stay as they are, the
    schedule goes on, and the metrics are {"tokens": 0, "lr": lr}: the caller says so.
    """
    if trainer is None:
        return {}
    arguments = dict(temperature=temperature, max_response_tokens=max_response_tokens)
    totals, grad_norms, lr = [], [], trainer.optimizer.param_groups[0]["lr"]
    for part in minibatches(trainer, samples):
        totals.append(backward(trainer, part, settings, **arguments))
        if not np.isfinite(totals[-1]["loss"]) or not np.isfinite(gradient_norm(trainer)):
            raise RuntimeError(explain_not_finite(trainer, part, settings, **arguments))
        grad_norms.append(float(trainer.optimizer.step()[1]))
    trainer.scheduler.step(1)
    if not totals:
        return {"tokens": 0, "lr": lr}
    sums = {name: sum(total[name] for total in totals) for name in totals[0]}
    loss, units, tokens = (sums.pop(name) for name in ("loss", "units", "tokens"))
    means = {name: value / tokens for name, value in sums.items()}
    largest = max(total["mismatch_max"] for total in totals)
    return {
        "tokens": int(tokens),
        "loss": loss / units,
        **means,
        "mismatch_max": largest,
        "grad_norm": sum(grad_norms) / len(grad_norms),
        "lr": lr,
    }


def gradient_norm(trainer: Trainer) -> float:
    """The global norm of the gradient, before it is clipped and used. Collective."""
    trainer.optimizer.prepare_grads()
    return float(trainer.optimizer.get_grad_norm())


def explain_not_finite(
    trainer: Trainer, samples: list[Sample], settings: LossSettings, **arguments
) -> str:
    """Which sample makes loss or gradient not finite, in which step, on which rank: each is tried
    alone, on all ranks, until one does. Collective.
    """
    step = trainer.scheduler.num_steps + 1
    for i, sample in enumerate(samples):
        loss = backward(trainer, [sample], settings, **arguments)["loss"]
        norm = gradient_norm(trainer)
        if not np.isfinite(loss) or not np.isfinite(norm):
            plan = microbatch_plan(trainer, samples)
            rank = dist.get_process_group_ranks(trainer.dp_group)[
                next(r for r, bins in enumerate(plan) for bin in bins if i in bin)
            ]
            culprit = f"step {step}, rank {rank}: sample {sample.index} of group {sample.group}"
            return f"{culprit} has loss {loss} and gradient norm {norm}; the weights are unchanged"
    return (
        f"step {step}: loss or gradient of {len(samples)} samples together is not finite, though"
        " each sample's alone is; the weights are unchanged"
    )
