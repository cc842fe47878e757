"""What the command line can set, stage by stage: a field is a flag, the text below it its help.

Only light modules are imported here: flags are read, and refused, before the stages' own imports.
The choice of a loss is in losses.py, beside the tables that it chooses from. What values may not be
is in checks.py.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.errors import BadInput, all_problems

REPOSITORY = Path(__file__).resolve().parent.parent
GYM = "reasoning-gym:"  # how a source of --prompts begins that a task of that package makes
SMALLEST_SHARE = 1e-9  # of a mixture; a source with less would never be drawn


@dataclass(frozen=True)
class RunSettings:
    """The run: what to train, for how long, and where the record goes"""

    model: str = str(REPOSITORY / "toy")
    """Hugging Face folder (Qwen3, Qwen2.5, Llama, Qwen3-MoE or GLM-4.5; safetensors) to train and
    to generate with."""
    name: str = ""
    """The run's folder below runs/, for instance lr1/seed1; empty: the loop's name and the time."""
    steps: int = 80
    """Training steps in all, those before --resume included: each is one rollout, one update (of
    --minibatches optimizer steps), one weight hand-off."""
    eval_every: int = 10
    """Evaluate on the held-out prompts every so many steps, and before the first and after the
    last."""
    seed: int = 1
    """Seeds prompts, sampling and Megatron."""
    check_sync: bool = False
    """Read every weight back from the engine after every hand-off; always done after the first and
    the last."""
    save_every: int = 0
    """Write a checkpoint every so many steps and after the last; 0: only when the run is told to
    stop (SIGTERM), and after the last step of a resumed run."""
    keep: int = 2
    """How many checkpoints are kept; older ones are removed."""
    resume: bool = False
    """Go on from the newest checkpoint of the run --name."""
    export: tuple[str, ...] = ("bf16",)
    """Write the trained weights as Hugging Face folders at the end: any of bf16, fp8; none with an
    empty list."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard as well, into the run folder."""
    wandb: str = ""
    """Send the metrics to this Weights & Biases project as well."""
    save_rollouts: bool = False
    """Write every step's samples to runs/NAME/rollouts."""
    load_rollouts: str = ""
    """Train on the samples of such a folder, without an engine: to look at training alone, or to
    repeat it exactly."""
    debug_rollout_only: bool = False
    """Generate and judge, but never train: to look at generation alone."""
    profile: tuple[int, ...] = ()
    """Steps of which every rank writes PyTorch's profile; open it at ui.perfetto.dev."""
    eval_only: bool = False
    """Evaluate --model, or with --resume the newest checkpoint of --name, on the held-out prompts;
    train, save and export nothing.
    """


@dataclass(frozen=True)
class DataSettings:
    """Prompts: what is asked, and what ends an answer"""

    prompts: tuple[str, ...] = ("toy",)
    """Any of toy, FILE.jsonl, FILE.parquet, reasoning-gym:TASK, each with an optional :WEIGHT, its
    share of the prompts drawn."""
    prompt_key: tuple[str, ...] = ("prompt",)
    """The field of a row that holds the prompt: text, or a list of chat messages. Dots lead into
    nested fields; the first that is not null counts."""
    label_key: tuple[str, ...] = ("label",)
    """The field that holds the label, given likewise; for instance reward_model.ground_truth."""
    label_after: str = ""
    """In files whose labels hold this text, the label is what stands after its last occurrence; for
    GSM8K's solutions "####". At least one file must."""
    chat: bool = False
    """Make a text prompt the user's message in the tokenizer's chat template."""
    system_prompt: str = ""
    """A system message that goes before every prompt's chat messages."""
    chat_template_kwargs: tuple[str, ...] = ()
    """Values for names that the chat template reads, key=value; for instance
    enable_thinking=false."""
    eval_prompts: tuple[str, ...] = ()
    """Held-out sets, named as in --prompts. None given: the own held-out problems of toy and
    reasoning-gym, where --prompts has them."""
    eval_samples: int = 512
    """How many prompts of each held-out set an evaluation answers."""
    eval_samples_per_prompt: int = 1
    """Answers to each held-out prompt; with several, pass@k and majority@N are logged."""
    max_response_tokens: int = 8
    """A response is cut off after so many tokens."""
    stop: tuple[str, ...] = ()
    """Further tokens that end a response, beside the model's own end-of-sequence tokens."""


@dataclass(frozen=True)
class RolloutSettings(DataSettings):
    """Rollout: batch size, sampling, and the engine"""

    prompts_per_step: int = 16
    """Batch size: prompts in a step, over all engines. --samples-per-prompt answers each."""
    samples_per_prompt: int = 16
    """Answers sampled for each prompt: the group that GRPO compares."""
    temperature: float = 1.0
    """Sampling temperature, of training and of evaluation. The trainer computes its log-probs at
    the same."""
    rollout_dtype: Literal["fp8", "bf16", "fp32"] = "fp8"
    """What the engine computes with: block-scaled FP8 weights and activations, or plain BF16 or
    FP32."""
    engine_tp: int = 1
    """Ranks that share one engine (SGLang tensor parallelism)."""
    engine_ep: int = 1
    """Of those, ranks over which whole experts are spread (SGLang expert parallelism); the rest of
    --engine-tp splits each expert."""
    answer_timeout_s: float = 3600.0
    """An engine that takes longer for a request or for a part of a hand-off counts as dead, and the
    run ends."""
    sglang: tuple[str, ...] = ()
    """Further ServerArgs fields, key=value; for instance mem_fraction_static=0.5."""


@dataclass(frozen=True)
class InFlightSettings:
    """The asynchronous loop: how far generation runs ahead of training"""

    rollout_ranks: int = 1
    """The last so many ranks generate; the others train."""
    max_staleness: int = 1
    """A token is trained at most so many weight versions after the one that sampled it; 0:
    generation waits for training."""
    oversample: int = 0
    """Groups that a step may leave behind, over all engines, rather than wait for their last
    answer."""
    updates: Literal["in_flight", "drain"] = "in_flight"
    """New weights reach requests in flight (paused in place, continued), or wait until none is
    running."""


@dataclass(frozen=True)
class TrainSettings:
    """The trainer: parallelism and optimizer"""

    tp: int = 1
    """Tensor-parallel size; the remaining factor of the world is data parallel. Sequence
    parallelism comes with it."""
    pp: int = 1
    """Pipeline-parallel size: the layers are split over so many ranks."""
    cp: int = 1
    """Context-parallel size: every sequence is split over so many ranks."""
    ep: int = 1
    """Expert-parallel size: experts are split over so many ranks of tensor, context and data
    parallelism. An expert itself is then not split."""
    train_dtype: Literal["bf16", "fp32"] = "bf16"
    """dtype of model weights and activations; main weights, gradients and Adam state are fp32
    either way."""
    microbatch_tokens: int = 8192
    """At most this many tokens in one forward pass of one rank; with --cp C a sequence may have C
    times as many."""
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
    minibatches: int = 1
    """Optimizer steps on each rollout batch, each on an equal part of its samples; old_logprobs are
    computed once, before the first."""
    reference: str = ""
    """Hugging Face folder of the frozen reference model, of the same architecture; empty: --model.
    Kept only with --kl-coef."""
    offload_reference: bool = False
    """Keep the reference in CPU memory, and bring it to the GPU only for its forward pass."""
    megatron: tuple[str, ...] = ()
    """Fields of TransformerConfig or OptimizerConfig for memory, speed, rounding and Adam,
    key=value (TUNABLE in megatron_model.py); for instance recompute_granularity=full.
    """


@dataclass(frozen=True)
class SyncSettings:
    """Weight hand-off: how weights travel from trainer to engine"""

    bucket_bytes: int = 256 * 2**20
    """Weights are gathered and handed over in buckets of about this many bytes; peak extra memory
    is a small multiple of it."""


@dataclass(frozen=True)
class PlanSettings:
    """A plan: arithmetic in place of a run"""

    plan: bool = False
    """Print what every GPU must hold and how long a hand-off takes, and end, without torchrun; exit
    code 2 and the nearest layout if it does not fit."""
    plan_gpus: int = 8
    """Ranks of the planned run: nodes times GPUs of a node."""
    plan_node_gpus: int = 8
    """GPUs of a node, which NVLink connects."""
    plan_gpu_gb: float = 80.0
    """Memory of a GPU in 1e9 bytes."""
    plan_prompt_tokens: int = 1024
    """Tokens of the longest prompt."""
    plan_memory_gb_s: float = 2000.0
    """1e9 bytes a second that a GPU reads or writes in its memory."""
    plan_nvlink_gb_s: float = 300.0
    """1e9 bytes a second between GPUs of a node, per GPU and direction."""
    plan_network_gb_s: float = 40.0
    """1e9 bytes a second between nodes, per GPU and direction."""


# --- sources of prompts -----------------------------------------------------------------------


def is_generated(source: str) -> bool:
    """Tell whether a source of --prompts makes its problems; others are files."""
    return source == "toy" or source.startswith(GYM)


def parse_weights(prompts: tuple[str, ...], *, flag: str = "--prompts") -> dict[str, float]:
    """("a.jsonl", "b.parquet:0.5") -> {"a.jsonl": 1.0, "b.parquet": 0.5}. Raises BadInput."""
    weights = {}
    for given in prompts:
        source, _, text = given.rpartition(":")
        try:
            source, weight = (source, float(text)) if source and "_" not in text else (given, 1.0)
        except ValueError:
            source, weight = given, 1.0
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
