"""Samples -> updated weights: one optimizer step on each mini-batch of a step's samples.

    samples  -> micro-batches     backends/megatron/batches.py: packed without padding, balanced
                                  over data-parallel ranks by tokens
    tokens   -> logits            Megatron's GPTModel under its own forward-backward schedule
    logits   -> loss              losses.py, per token; summed with the weights of the aggregation,
                                  divided once by its units in the global batch
    gradient -> weights           Megatron's distributed optimizer: FP32 main weights and Adam state
                                  split over data-parallel ranks, BF16 model weights

The normalizer is global. Megatron all-reduces what it calls the number of tokens, here the units of
the aggregation, before it scales the gradient (calculate_per_token_loss). So how samples fall on
ranks and micro-batches changes nothing but rounding.

Shape letters: T packed tokens of a micro-batch, N its samples, V vocabulary on this tensor-parallel
rank.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.distributed as dist

# First of what imports Megatron: without a GPU Megatron is patched there.
from backends.megatron.model import init_parallel, load_model, load_reference
from megatron.core import parallel_state as mpu
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func

from backends.megatron.balancing import balance_metrics, padding_of, scale_aux_loss
from backends.megatron.batches import (
    Batch,
    MicroBatch,
    field_of_old_logprobs,
    give_to_samples,
    global_sums,
    pack,
    step_means,
)
from backends.megatron.layout import Layout
from backends.megatron.logprobs import logprobs_and_entropy, mismatch
from backends.megatron.lora import add_adapters
from backends.megatron.not_finite import explain_not_finite
from backends.megatron.optimizer import build_optimizer, gradient_norm, wrap_data_parallel
from backends.megatron.routing_replay import RoutingReplay, build_replay, routed_as_the_engine
from common.settings import TrainSettings
from losses import AGGREGATIONS, CORRECTIONS, KL_ESTIMATORS, POLICY_LOSSES, LossSettings, k3

__all__ = ["Trainer", "add_logprobs", "build_trainer", "pack", "start_trainer", "update_policy"]


@dataclass
class Trainer:
    """One rank's part of the training state."""

    settings: TrainSettings
    config: dict  # config.json, checked
    ddp: DistributedDataParallel
    gpt: GPTModel  # the same parameters, unwrapped
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    layout: Layout
    dp_group: dist.ProcessGroup  # each of its ranks has other samples
    cp_group: dist.ProcessGroup  # each of its ranks has another part of the same sequences
    dp_cp_group: dist.ProcessGroup  # both: sums over tokens go over it
    temperature: float  # of the rollout: log-probs are of the distribution that was sampled from
    max_response_tokens: int
    replay: RoutingReplay | None = None  # of the engine's experts, with --routing-replay
    reference: torch.nn.Module | None = None  # as ddp.module; may be of another architecture


def start_trainer(run) -> Trainer | None:
    """Build this rank's trainer, as the flags say; None on ranks that only generate. Collective.

    run: harness.start.Run.
    """
    if not run.is_trainer:
        return None
    settings = run.settings
    return build_trainer(
        run.model,
        settings.train,
        run.config,
        fp8=run.fp8,
        steps=settings.run.steps,
        seed=settings.run.seed,
        temperature=settings.rollout.temperature,
        max_response_tokens=settings.rollout.max_response_tokens,
        with_reference=settings.loss.kl_coef > 0,
    )


def build_trainer(
    model_folder: str,
    settings: TrainSettings,
    config: dict,
    *,
    steps: int,
    seed: int,
    temperature: float,
    max_response_tokens: int,
    fp8: frozenset[str] | None = None,
    with_reference: bool = False,
    head: Callable | None = None,
) -> Trainer:
    """Build process groups (once), the model with the folder's weights, and its optimizer.

    Collective. head(transformer_config) -> module: replaces the output layer of a model that
    computes something else than logits, such as a critic.
    temperature: of the rollout. max_response_tokens: the aggregation "constant" divides by it.
    fp8: weights that the engine holds in FP8, for --train-numerics fp8.
    """
    init_parallel(settings, seed=seed)
    gpt, layout, module = load_model(model_folder, settings, config, fp8=fp8)
    if settings.lora_rank:  # then they alone are trained
        add_adapters(gpt, settings, config, layout, seed=seed)
    if head is not None and gpt.post_process:
        gpt.output_layer = head(gpt.config)
    reference = None
    if with_reference:
        reference = load_reference(model_folder, settings, config, fp8=fp8, policy=module)
    ddp = wrap_data_parallel(gpt, module)
    optimizer, scheduler = build_optimizer(ddp, gpt, settings, config, steps=steps)
    return Trainer(
        settings,
        config,
        ddp,
        gpt,
        optimizer,
        scheduler,
        layout,
        dp_group=mpu.get_data_parallel_group(),
        cp_group=mpu.get_context_parallel_group(),
        dp_cp_group=mpu.get_data_parallel_group(with_context_parallel=True),
        temperature=temperature,
        max_response_tokens=max_response_tokens,
        replay=None if head else build_replay(gpt, settings, config, layout),
        reference=reference,
    )


# --- forward ------------------------------------------------------------------------------------


def run_schedule(
    trainer: Trainer,
    microbatches: list[MicroBatch],
    loss_function: Callable,
    *,
    model: torch.nn.Module | None = None,
    forward_only: bool,
) -> list[dict]:
    """Run Megatron's schedule over the micro-batches; return what loss_function reports of each.

    loss_function(microbatch, output_TX) -> (sum to differentiate, units it is a sum over, report).
    output_TX: the model's output, float [T, X], on the last pipeline stage. Other stages get [].
    model: the trainer's unless given.
    """
    replay = trainer.replay if model is None else None  # the reference chooses its own experts
    # Else Float16Module would make an FP32 copy of all logits. logprobs.py does so for few tokens.
    more = {"fp32_output": False} if trainer.settings.train_dtype == "bf16" else {}

    def forward_step(iterator, model):
        batch = next(iterator)
        packed = dict(packed_seq_params=batch.packed, **more, **padding_of(trainer, batch))
        with routed_as_the_engine(replay, batch, is_training=not forward_only):
            output_1TX = model(batch.tokens_T[None], None, None, **packed)
        return output_1TX, lambda output_1TX: loss_function(batch, output_1TX[0])

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(microbatches),
        model=trainer.ddp if model is None else model,
        num_microbatches=len(microbatches),
        seq_length=trainer.settings.microbatch_tokens,
        micro_batch_size=1,
        forward_only=forward_only,
    )


def logprobs_of(
    trainer: Trainer, batch: MicroBatch, logits_TV: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (log-prob of each next token, entropy), float32 [T], at the rollout's temperature."""
    return logprobs_and_entropy(
        logits_TV,
        batch.labels_T,
        temperature=trainer.temperature,
        vocab_size=trainer.config["vocab_size"],
        group=trainer.layout.tp_group,
    )


@torch.no_grad()
def compute_logprobs(
    trainer: Trainer, microbatches: list[MicroBatch], *, model: torch.nn.Module | None = None
) -> list[torch.Tensor]:
    """Return the log-prob of every next token, float32 [T] a micro-batch, by a forward pass."""

    def loss_function(batch, logits_TV):
        logprobs_T, _ = logprobs_of(trainer, batch, logits_TV)
        return logprobs_T.sum() * 0, torch.tensor(0, dtype=torch.int), {"logprobs": logprobs_T}

    reports = run_schedule(trainer, microbatches, loss_function, model=model, forward_only=True)
    return [report["logprobs"] for report in reports]


def add_logprobs(
    trainer: Trainer, batches: list[Batch], settings: LossSettings | None = None
) -> None:
    """Set every sample's old_logprobs, and its ref_logprobs where there is a reference.

    Each is a forward pass over the batches of pack(). Collective. Without settings old_logprobs are
    always computed. With settings they are left out where a step has one update and no KL in the
    reward. That update starts from the old weights, so its own log-probs are the old ones. They are
    left out too where the engine's take their place, with --old-logprobs rollout.
    """
    needs_old = settings is None or (
        settings.old_logprobs == "trainer"
        and (
            trainer.settings.minibatches > 1 or settings.kl_coef > 0 and settings.kl_in == "reward"
        )
    )
    if needs_old:
        for batch in batches:
            logprobs = compute_logprobs(trainer, batch.microbatches)
            give_to_samples(trainer, batch, logprobs, "old_logprobs")
    if trainer.reference is not None:
        trainer.reference.to(next(trainer.gpt.parameters()).device)
        for batch in batches:
            logprobs = compute_logprobs(trainer, batch.microbatches, model=trainer.reference)
            give_to_samples(trainer, batch, logprobs, "ref_logprobs")
        if trainer.settings.offload_reference:
            trainer.reference.to("cpu")


# --- backward -----------------------------------------------------------------------------------


def backward(trainer: Trainer, batch: Batch, settings: LossSettings) -> dict[str, float]:
    """Compute the gradient of the loss of these samples, into the trainer's buffers. Collective.

    Returns sums over all tokens of the batch, equal on every rank. The samples have advantages, and
    what add_logprobs has set.
    """
    policy_loss = POLICY_LOSSES[settings.policy_loss].function
    correct = CORRECTIONS[settings.correction].weight
    estimate_kl = KL_ESTIMATORS[settings.kl_estimator].function
    aggregate = AGGREGATIONS[settings.aggregation]
    clips, bounds = settings.clips, settings.correction_bounds
    kl_coef = settings.kl_coef if settings.kl_in == "loss" else 0.0
    old = field_of_old_logprobs(batch.samples, settings)
    batch.read_samples()

    # EDIT HERE: loss. The functions are in losses.py; this is where they meet the model.
    def loss_function(microbatch, logits_TV):
        sequences, mask_T = microbatch.sequences, microbatch.mask_T

        def masked(x_T: torch.Tensor) -> torch.Tensor:
            # Before anything is computed from it: 0 times infinity is not 0.
            return x_T.masked_fill(mask_T == 0, 0)

        logprobs_T, entropy_T = map(masked, logprobs_of(trainer, microbatch, logits_TV))
        rollout_T = masked(microbatch.per_token["rollout_logprobs"])
        ref_T = masked(microbatch.per_token["ref_logprobs"])
        advantages_T = masked(microbatch.per_token["advantages"])
        # Without old log-probs this is the first update: the policy is still the old one.
        old_T = masked(microbatch.per_token[old]) if old else logprobs_T.detach()

        policy_T, ratio_T, clipped_T = policy_loss(
            logprobs_T, old_T, advantages_T, sequences, **clips
        )
        correction_T, cut_T = correct(old_T - rollout_T, sequences, **bounds)
        kl_T = torch.zeros_like(logprobs_T)
        if settings.kl_coef:
            kl_T = estimate_kl(logprobs_T, ref_T, old_T)
        loss_T = correction_T * policy_T + kl_coef * kl_T - settings.entropy_coef * entropy_T
        weight_T, normalizer_N = aggregate(
            sequences, max_response_tokens=trainer.max_response_tokens
        )
        loss, units = (weight_T * loss_T).sum(), normalizer_N.sum()
        if trainer.cp_group.rank() > 0:  # its ranks share the samples: they count once
            units = units * 0

        trainer_T = logprobs_T.detach() if old == "rollout_logprobs" else old_T
        mismatch_T = mismatch(trainer_T, rollout_T)
        means_T = {
            "entropy": entropy_T,
            "ratio": ratio_T,
            "clipfrac": clipped_T,
            "kl": kl_T,
            "approx_kl": k3(old_T, logprobs_T, None),
            "logprob_shift": logprobs_T - old_T,
            "tis_clipfrac": cut_T,
            **mismatch_T,
        }
        sums = {name: (x_T.detach() * mask_T).sum() for name, x_T in means_T.items()}
        sums = {"loss": loss.detach(), "units": units, "tokens": mask_T.sum(), **sums}
        largest = (mismatch_T["mismatch_abs"] * mask_T).max()
        return loss, units.int(), {"sums": sums, "max": largest}

    scale_aux_loss(trainer, batch, aggregate)
    trainer.ddp.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    reports = run_schedule(trainer, batch.microbatches, loss_function, forward_only=False)
    return global_sums(trainer, reports)


# --- the step -----------------------------------------------------------------------------------


def update_policy(
    trainer: Trainer, batches: list[Batch], settings: LossSettings
) -> dict[str, float]:
    """Make one optimizer step on each mini-batch; return metrics, equal on every rank. Collective.

    Raises RuntimeError on every rank when loss or gradient are not finite; the weights are then
    those of before the step. A step that were skipped in silence would be a run that fails later.

    A batch in which no token counts has no gradient. Weights and optimizer stay as they are, the
    schedule goes on, and the metrics are {"tokens": 0, "lr": lr}: the caller says so.
    """
    totals, routes, grad_norms, lr = [], [], [], trainer.optimizer.param_groups[0]["lr"]
    for batch in batches:
        if not batch.has_tokens:
            continue
        totals.append(backward(trainer, batch, settings))
        routes.append(trainer.replay.mismatch() if trainer.replay else {})
        found = totals[-1]["loss"], gradient_norm(trainer.optimizer)
        if not np.isfinite(found).all():
            alone = partial(backward, trainer, settings=settings)
            raise RuntimeError(explain_not_finite(trainer, batch, alone))
        grad_norms.append(float(trainer.optimizer.step()[1]))
    trainer.scheduler.step(1)
    if not totals:
        return {"tokens": 0, "lr": lr}
    return {
        **step_means(totals, settings),
        "grad_norm": sum(grad_norms) / len(grad_norms),
        **routes[0],  # later mini-batches have other weights than the engine
        **balance_metrics(trainer, [batch for batch in batches if batch.has_tokens]),
        "lr": lr,
    }
