"""The settings of each stage: every field is a flag, and the text below it is the flag's help.

This module imports only light modules, because flags are read and checked before the stages import
torch, SGLang and Megatron. LossSettings and RewardSettings are in losses.py and reward.py, beside
the tables that they choose from. harness/checks.py has the rules for the values.
"""

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.errors import BadInput, all_problems

REPOSITORY = Path(__file__).resolve().parent.parent
GYM = "reasoning-gym:"  # prefix of a --prompts source that is a task of that package
SMALLEST_SHARE = 1e-9  # of a mixture; a source with a smaller share would never be drawn


@dataclass(frozen=True)
class RunSettings:
    """The run: what to train, for how long, and what to write"""

    model: str = str(REPOSITORY / "toy")
    """The model to train: a Hugging Face folder, or a name on the hub, as Qwen/Qwen3-0.6B@REVISION
    (Qwen3, Qwen2.5, Llama, Qwen3-MoE or GLM-4.5, in safetensors)."""
    name: str = ""
    """The run's folder in runs/, for instance lr1/seed1; empty: the loop's name and the time."""
    steps: int = 80
    """Training steps in total, including those before --resume. A step is one rollout, one policy
    update (of --minibatches optimizer steps) and one weight update of the engine."""
    max_epochs: int = 0
    """End the run after so many passes over the file of --prompts, if --steps does not end it
    before; 0: no limit. Only whole steps are made. Prompts that --dynamic-sampling and --oversample
    take besides do not count."""
    eval_every: int = 10
    """Evaluate on the held-out prompts every so many steps, before the first step and after the
    last."""
    seed: int = 1
    """Seed of prompts, sampling and Megatron."""
    check_sync: bool = False
    """Verify the engine's weights after every weight update; always done after the first and the
    last one."""
    save_every: int = 0
    """Write a checkpoint every so many steps and after the last; 0: only when SIGTERM stops the
    run, and after the last step of a resumed run."""
    keep: int = 2
    """How many checkpoints to keep; older ones are removed."""
    resume: bool | Literal["auto"] = False
    """Continue from the newest checkpoint of the run --name. auto: from the newest whole one; where
    there is none, start afresh, and keep what lies in the run's folder beside it."""
    export: tuple[str, ...] = ("bf16",)
    """Formats in which to write the trained weights as Hugging Face folders at the end: any of
    bf16, fp8, and lora, the adapters of --lora-rank for PEFT; an empty list writes none."""
    tensorboard: bool = False
    """Also write the metrics for TensorBoard, into the run folder."""
    wandb: str = ""
    """Also send the metrics to this Weights & Biases project."""
    save_rollouts: bool = False
    """Write every step's samples to runs/NAME/rollouts."""
    load_rollouts: str = ""
    """Train on the samples in such a folder, without an engine: to study training alone, or to
    repeat it exactly."""
    debug_rollout_only: bool = False
    """Generate and judge, but never train: to study generation alone."""
    profile: tuple[int, ...] = ()
    """Steps that every rank profiles with PyTorch; open the files at ui.perfetto.dev."""
    eval_only: bool = False
    """Only evaluate --model on the held-out prompts, or with --resume the newest checkpoint of
    --name; train, save and export nothing."""


@dataclass(frozen=True)
class DataSettings:
    """Prompts: where they come from, and what ends a response"""

    prompts: tuple[str, ...] = ("toy",)
    """Sources of prompts: any of toy, FILE.jsonl, FILE.parquet, reasoning-gym:TASK, or a dataset on
    the hub, as openai/gsm8k/main:train@REVISION. An optional :WEIGHT after each sets its share of
    the prompts."""
    prompt_key: tuple[str, ...] = ("prompt",)
    """Field of a row that holds the prompt: text, or a list of chat messages. Dots lead into nested
    fields. Of several names, the first whose value is not null counts."""
    label_key: tuple[str, ...] = ("label",)
    """Field that holds the label, named in the same way; for instance reward_model.ground_truth."""
    label_after: str = ""
    """Text after whose last occurrence the label begins, in files whose labels contain it; for
    GSM8K's solutions "####". At least one file must contain it."""
    chat: bool = False
    """Put a text prompt into the tokenizer's chat template as the user's message."""
    system_prompt: str = ""
    """System message to put before every prompt's chat messages."""
    chat_template_kwargs: tuple[str, ...] = ()
    """Values for variables of the chat template, key=value; for instance enable_thinking=false."""
    eval_prompts: tuple[str, ...] = ()
    """Held-out sets, named as in --prompts. If none is given: the held-out problems of toy and
    reasoning-gym, if --prompts names these."""
    eval_samples: int = 512
    """Prompts of each held-out set that an evaluation answers."""
    eval_samples_per_prompt: int = 1
    """Responses to each held-out prompt; with several, pass@k and majority@N are logged."""
    eval_temperature: tuple[str, ...] = ()
    """Sampling temperature in evaluation; 0: greedy. A value for all held-out sets, and NAME=VALUE
    for a set of that name. Empty: --temperature."""
    eval_max_response_tokens: tuple[str, ...] = ()
    """--max-response-tokens in evaluation, given in the same way."""
    eval_reward: tuple[str, ...] = ()
    """--reward in evaluation, given in the same way."""
    max_response_tokens: int = 8
    """Cut a response off after so many tokens."""
    stop: tuple[str, ...] = ()
    """More tokens that end a response, besides the model's end-of-sequence tokens."""


@dataclass(frozen=True)
class RolloutSettings(DataSettings):
    """Rollout: batch size, sampling, and the engine"""

    prompts_per_step: int = 16
    """Batch size: prompts of a step, over all engines, with --samples-per-prompt responses each."""
    samples_per_prompt: int = 16
    """Responses sampled for each prompt: the group that GRPO compares."""
    temperature: float = 1.0
    """Sampling temperature, in evaluation too unless --eval-temperature differs. The trainer
    computes its log-probs at the same temperature."""
    rollout_dtype: Literal["fp8", "bf16", "fp32"] = "fp8"
    """Precision of the engine: block-scaled FP8 weights and activations, or plain BF16 or FP32."""
    engine_tp: int = 1
    """Ranks that share one engine (SGLang tensor parallelism)."""
    engine_ep: int = 1
    """Of these ranks, how many whole experts are spread over (SGLang expert parallelism); the rest
    of --engine-tp splits each expert."""
    deal: Literal["fixed", "room"] = "fixed"
    """Which engine answers which prompt. fixed: engines take turns. room: an engine takes the next
    prompt when it has room for one, so that a slow engine answers fewer."""
    answer_timeout_s: float = 3600.0
    """An engine that takes longer for a request, or for a part of a weight update, counts as
    dead."""
    sglang: tuple[str, ...] = ()
    """More fields of SGLang's ServerArgs, key=value; for instance mem_fraction_static=0.5."""


@dataclass(frozen=True)
class InFlightSettings:
    """The asynchronous loop: how far generation runs ahead of training"""

    rollout_ranks: int = 1
    """How many ranks generate, the last ones; the others train."""
    max_staleness: int = 1
    """Train a token at most so many weight versions after the version that sampled it; 0:
    generation waits for training."""
    oversample: int = 0
    """How many groups a step may leave for a later step, over all engines, instead of waiting for
    their last response."""
    updates: Literal["in_flight", "drain"] = "in_flight"
    """When new weights reach the engine. in_flight: requests are paused and continue with the new
    weights. drain: after all running requests have finished."""
    engine_restarts: int = 3
    """Start an engine that dies again so many times, with the current weights, and ask again what
    it had not answered; 0: its death ends the run."""


@dataclass(frozen=True)
class TrainSettings:
    """The trainer: parallelism and optimizer"""

    tp: int = 1
    """Tensor-parallel size, with sequence parallelism. The remaining factor of the ranks is data
    parallel."""
    pp: int = 1
    """Pipeline-parallel size: how many ranks the layers are split over."""
    cp: int = 1
    """Context-parallel size: how many ranks every sequence is split over."""
    ep: int = 1
    """Expert-parallel size: how many ranks of tensor, context and data parallelism the experts are
    spread over. No expert is itself split."""
    train_dtype: Literal["bf16", "fp32"] = "bf16"
    """dtype of model weights and activations; main weights, gradients and Adam state are always
    fp32."""
    microbatch_tokens: int = 8192
    """Most tokens in one forward pass of one rank; with --cp C a sequence may have C times as
    many."""
    lr: float = 2e-4
    """Peak learning rate. The default suits the toy; pretrained models need about 1e-6."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """How the learning rate falls from --lr to --min-lr over the run."""
    lr_warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    min_lr: float = 0.0
    """Learning rate at the end of a linear or cosine schedule."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    adam_beta2: float = 0.95
    """Adam's beta2, the decay of the second moment; beta1 is 0.9."""
    clip_grad: float = 1.0
    """Largest global gradient norm; larger gradients are scaled down to it."""
    minibatches: int = 1
    """Optimizer steps on each rollout batch, each on an equal part of the samples. old_logprobs are
    computed once, before the first."""
    reference: str = ""
    """The frozen reference model, named as in --model, with the same tokenizer; empty: --model.
    Loaded only with --kl-coef. Of another architecture it is computed with --train-numerics
    plain."""
    offload_reference: bool = False
    """Keep the reference model in CPU memory, and on the GPU only during its forward pass."""
    train_numerics: Literal["plain", "fp8"] = "plain"
    """Rounding in the trainer's forward pass. plain: that of --train-dtype. fp8: linear layers see
    weights and activations as the FP8 engine rounds them; gradients ignore the rounding."""
    routing_replay: Literal["none", "compare", "rollout"] = "none"
    """Experts of a token in the trainer. rollout: those that the engine took (R3, routing replay).
    compare: the trainer's own choice; route_mismatch counts how often the engine took others."""
    freeze_moe_router: bool = False
    """Leave the weights of a mixture of experts' routers as they are."""
    lora_rank: int = 0
    """Train LoRA adapters of this rank in all linear layers, and leave the model's weights as they
    are; 0: train all weights. Adapters need about ten times the --lr."""
    lora_alpha: float = 32.0
    """LoRA adds its product times this number divided by --lora-rank."""
    megatron: tuple[str, ...] = ()
    """Fields of Megatron's TransformerConfig or OptimizerConfig, key=value, for memory, speed,
    rounding, Adam and the balance of experts; for instance recompute_granularity=full. See TUNABLE
    in backends/megatron/model.py."""


@dataclass(frozen=True)
class SyncSettings:
    """Weight updates: how weights get from the trainer to the engine"""

    sync: Literal["full", "delta"] = "full"
    """What an update sends: every weight, or only the elements that have changed since the last
    one, exactly. delta keeps a copy of what a rank has sent in host memory."""
    bucket_bytes: int = 256 * 2**20
    """Gather and send weights in buckets of about this many bytes. The extra memory at the peak is
    a small multiple of it."""


@dataclass(frozen=True)
class PlanSettings:
    """A plan: memory and time estimates in place of a run"""

    plan: bool = False
    """Print a memory estimate for each GPU and the time of a weight update, and exit; needs no
    torchrun. If the run does not fit: exit code 2, and the nearest layout that does."""
    plan_gpus: int = 8
    """Ranks of the planned run: nodes times GPUs per node."""
    plan_node_gpus: int = 8
    """GPUs per node, connected by NVLink."""
    plan_gpu_gb: float = 80.0
    """Memory of a GPU, in 1e9 bytes."""
    plan_prompt_tokens: int = 1024
    """Tokens of the longest prompt."""
    plan_memory_gb_s: float = 2000.0
    """Memory bandwidth of a GPU, in 1e9 bytes per second."""
    plan_nvlink_gb_s: float = 300.0
    """Bandwidth between GPUs of a node, in 1e9 bytes per second, per GPU and direction."""
    plan_network_gb_s: float = 40.0
    """Bandwidth between nodes, in 1e9 bytes per second, per GPU and direction."""


# --- sources of prompts -----------------------------------------------------------------------


def is_generated(source: str) -> bool:
    """Return whether a source of --prompts generates its problems. The others are files."""
    return source == "toy" or source.startswith(GYM)


def parse_weights(prompts: tuple[str, ...], *, flag: str = "--prompts") -> dict[str, float]:
    """Parse ("a.jsonl", "b.parquet:0.5") as {"a.jsonl": 1.0, "b.parquet": 0.5}. Raises BadInput."""
    weights = {}
    for given in prompts:
        source, weight = given, 1.0
        before, _, text = given.rpartition(":")
        if before and "_" not in text:  # float() would read 1_0
            with contextlib.suppress(ValueError):  # "toy", or a file's name with a colon in it
                source, weight = before, float(text)
        if not (0 < weight and math.isfinite(weight)):
            raise BadInput(f"{flag} {given}: the weight {text} must be a positive number")
        if source in weights:
            fix = "give it once, with the sum of the weights"
            raise BadInput(f"{flag} {source} is given twice: {fix}")
        weights[source] = weight
    total = sum(weights.values())
    for source, weight in weights.items():
        if not math.isfinite(total) or weight / total < SMALLEST_SHARE:
            largest = max(weights, key=weights.get)
            both = f"{flag} {source}:{weight:g} beside {largest}:{weights[largest]:g}"
            raise BadInput(
                f"{both}: each source's share of the prompts must be at least {SMALLEST_SHARE:g}, "
                "or it is never drawn: give weights that are nearer"
            )
    if not weights:
        fix = "give a file, or leave the flag out for the toy task"
        raise BadInput(f"{flag} names nothing to learn from: {fix}")
    return weights


# --- the trainer's layout ------------------------------------------------------------------------


@all_problems
def check_ranks(ranks: int, *, tp: int, pp: int, cp: int, ep: int) -> None:
    """Refuse parallel sizes that do not divide the ranks that train."""
    if tp < 1 or ranks % tp:
        fix = "use a --tp that divides --nproc-per-node times the nodes"
        yield f"--tp {tp} does not divide the {ranks} ranks: {fix}"
    elif min(pp, cp) < 1 or ranks % (tp * pp * cp):
        layout = f"--tp {tp} times --pp {pp} times --cp {cp}"
        yield f"{layout} does not divide the {ranks} ranks: use another --pp or --cp"
    stage_ranks = ranks // max(pp, 1)
    if ep < 1 or stage_ranks % ep:
        rule = f"must divide the {stage_ranks} ranks of a pipeline stage"
        yield f"--ep {ep} {rule}: use another --ep, and 1 for a dense model"
