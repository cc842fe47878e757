"""What of the flags cannot work, whatever the model, the data and the machine are.

flags.py calls these checks right after the command line is read, before the imports of the stages,
which take half a minute. What needs config.json, prompts or the engine is checked by the stages
themselves, afterwards. problems.py says what a check is.
"""

import contextlib
import importlib.util
import math
import os
from collections.abc import Iterator
from dataclasses import fields

from common import process_groups
from common.errors import BadInput, ProblemList, all_problems, file_problem, model_problem
from common.overrides import parse_overrides
from common.settings import (
    GYM,
    InFlightSettings,
    PlanSettings,
    RolloutSettings,
    RunSettings,
    SyncSettings,
    TrainSettings,
    check_ranks,
    is_generated,
    parse_weights,
)
from harness.run_folder import name_problems, rollouts_file
from losses import LossSettings, check_loss_settings
from reward import RewardSettings

# Numpy takes seeds below 2**32. Engine and trainer add a number to --seed on each rank.
SEEDS = 2**31
NOT_IN_PROJECTS = "/\\#?%:"  # W&B refuses them only when the run has begun
EXTRAS = {"tensorboard": "tensorboard==2.21.0", "wandb": "wandb==0.31.0"}  # not in requirements.txt
# Below 1e-6 SGLang samples greedily and reports log-probs of temperature 1 (SamplingParams).
# Above it, errors of BF16 logits are divided by the temperature: below 0.01 they exceed what the
# engine's and the trainer's log-probs have to say.
TEMPERATURES = 0.01, 100.0
MOST_EVAL_SAMPLES = 100_000  # generated held-out prompts never end


@all_problems
def check_flags(settings) -> None:
    """Refuse what cannot work. settings: a loop's."""
    found, ranks = ProblemList(), world_size(settings)
    trainer_ranks = rollout_ranks = ranks
    found.collect(check_run_flags, settings.run)
    if hasattr(settings, "plan"):
        found.collect(check_plan_flags, settings.plan)
    if hasattr(settings, "in_flight"):
        found.collect(check_in_flight_flags, settings.in_flight, settings.rollout, world_size=ranks)
        rollout_ranks = settings.in_flight.rollout_ranks
        trainer_ranks = ranks - rollout_ranks
    if min(trainer_ranks, rollout_ranks) < 1:  # a problem of its own, not one of the layout
        trainer_ranks = rollout_ranks = None
    found.collect(check_rollout_flags, settings.rollout, ranks=rollout_ranks)
    if not is_plan(settings):  # which reads no prompts
        found.collect(check_prompt_files, settings.rollout)
    found.collect(check_reward_flags, settings.reward, settings.rollout)
    steps = settings.run.steps
    found.collect(
        check_train_flags, settings.train, settings.loss, steps=steps, ranks=trainer_ranks
    )
    found.collect(check_loss_settings, settings.loss)
    found.collect(check_sync_flags, settings.sync)
    found.collect(check_modes, settings)
    if not settings.run.load_rollouts:  # model_checks.longest_of_dumps looks at what is loaded
        answers = settings.rollout.prompts_per_step * settings.rollout.samples_per_prompt
        found.collect(check_minibatches, settings.train.minibatches, answers=answers)
    yield from found.texts


def world_size(settings) -> int:
    """Return how many ranks the run has, or the planned one. settings: a loop's."""
    return settings.plan.plan_gpus if is_plan(settings) else int(os.environ["WORLD_SIZE"])


def is_plan(settings) -> bool:
    """Tell whether the run is only planned. The examples cannot be."""
    return hasattr(settings, "plan") and settings.plan.plan


@all_problems
def check_modes(settings) -> None:
    """Refuse flags that would do nothing in a run of this kind. settings: a loop's."""
    run, idle = settings.run, []
    if run.eval_only or run.debug_rollout_only:
        kind = "--eval-only" if run.eval_only else "--debug-rollout-only"
        idle = [(settings.loss, "kl_coef"), (settings.train, "minibatches")]
        idle += [(settings.reward, "dynamic_sampling")] if run.eval_only else []
    elif run.load_rollouts:
        kind, idle = "--load-rollouts", [(run, "check_sync"), (settings.reward, "dynamic_sampling")]
        idle += [(settings.rollout, "sglang"), (settings.rollout, "eval_prompts")]
    for stage, name in idle:
        if (given := getattr(stage, name)) != getattr(type(stage)(), name):
            given = " ".join(map(str, given)) if isinstance(given, tuple) else given
            yield f"{_flag(name)} {given} has no effect with {kind}: leave one out"


# --- the run ----------------------------------------------------------------------------------


@all_problems
def check_run_flags(settings: RunSettings) -> None:
    """Refuse what cannot work, names that are taken, and folders that are not there."""
    if problem := model_problem(settings.model):
        yield problem
    if problem := process_groups.interface_problem():
        yield problem
    for name in ("steps", "eval_every", "keep"):
        if getattr(settings, name) < 1:
            yield f"{_flag(name)} {getattr(settings, name)} must be at least 1"
    if settings.save_every < 0:
        yield f"--save-every {settings.save_every} must not be negative"
    if not 0 <= settings.seed < SEEDS:
        yield f"--seed {settings.seed} must be at least 0 and below {SEEDS}"
    if odd := set(settings.wandb) & set(NOT_IN_PROJECTS):
        which = f"--wandb {settings.wandb!r} holds {''.join(sorted(odd))!r}"
        yield f"{which}: the name of a project may hold none of {NOT_IN_PROJECTS}"
    if unknown := set(settings.export) - {"bf16", "fp8"}:
        yield f"--export {' '.join(sorted(unknown))} is none of: bf16, fp8"
    for name, line in EXTRAS.items():
        if getattr(settings, name) and importlib.util.find_spec(name) is None:
            yield f"--{name} needs a package that is not installed: pip install {line}"
    if settings.load_rollouts and (settings.save_rollouts or settings.debug_rollout_only):
        fix = "leave out --save-rollouts and --debug-rollout-only, which are about its answers"
        yield f"--load-rollouts starts no engine: {fix}"
    dumps = (rollouts_file(settings.load_rollouts, step) for step in range(1, settings.steps + 1))
    if settings.load_rollouts and (file := next((f for f in dumps if not os.path.isfile(f)), None)):
        fix = "give a folder that --save-rollouts wrote, or fewer --steps"
        yield f"--load-rollouts {settings.load_rollouts} has no {file.name}: {fix}"
    idle = ("load_rollouts", "save_rollouts", "debug_rollout_only", "profile", "save_every")
    if settings.eval_only and (given := [name for name in idle if getattr(settings, name)]):
        given = ", ".join(map(_flag, given))
        yield f"--eval-only makes no training step, and {given} would do nothing: leave it out"
    if settings.eval_only and settings.export not in ((), RunSettings().export):
        yield f"--eval-only exports nothing: leave out --export {' '.join(settings.export)}"
    if late := [step for step in settings.profile if not 1 <= step <= settings.steps]:
        has = f"which has steps 1 to {settings.steps} (--steps)"
        yield f"--profile {late[0]} is no step of the run, {has}"
    yield from name_problems(settings)


@all_problems
def check_plan_flags(settings: PlanSettings) -> None:
    """Refuse sizes and bandwidths that cannot be, or are those of no plan."""
    changed = [f.name for f in fields(PlanSettings) if getattr(settings, f.name) != f.default]
    if changed and not settings.plan:
        yield f"{_flag(changed[0])} has no effect without --plan: add that, or leave it out"
    names = ("gpus", "node_gpus", "prompt_tokens", "gpu_gb", "memory_gb_s", "nvlink_gb_s")
    for name in (*names, "network_gb_s"):
        if not 0 < (value := getattr(settings, f"plan_{name}")) < 1e9:
            yield f"{_flag(f'plan_{name}')} {value} must be positive, and below a billion"


# --- prompts, rollout, reward -----------------------------------------------------------------


@all_problems
def check_rollout_flags(settings: RolloutSettings, *, ranks: int | None) -> None:
    """Refuse what cannot work. ranks: those that generate; None where that is a problem itself."""
    found = ProblemList()
    if settings.temperature <= 0:
        why = "a greedy rollout has no log-probs to learn from"
        yield f"--temperature {settings.temperature} must be above 0: {why}"
    elif not TEMPERATURES[0] <= settings.temperature <= TEMPERATURES[1]:  # also nan
        rule = f"must lie between {TEMPERATURES[0]} and {TEMPERATURES[1]:g}"
        low = "below, the engine's log-probs mean nothing, and from 1e-6 on SGLang is greedy"
        yield f"--temperature {settings.temperature} {rule}: {low}; above, all answers are noise"
    if settings.samples_per_prompt < 2:
        given = f"--samples-per-prompt {settings.samples_per_prompt}"
        yield f"{given}: GRPO compares answers to one prompt and needs at least 2"
    if not 1 <= settings.eval_samples <= MOST_EVAL_SAMPLES:
        rule = f"must lie between 1 and {MOST_EVAL_SAMPLES:,}"
        yield f"--eval-samples {settings.eval_samples} {rule}"
    if not 1 <= settings.eval_samples_per_prompt <= 1024:
        given = f"--eval-samples-per-prompt {settings.eval_samples_per_prompt}"
        yield f"{given} must lie between 1 and 1,024"
    if settings.max_response_tokens < 1:
        yield f"--max-response-tokens {settings.max_response_tokens} must be at least 1"
    if not settings.answer_timeout_s > 0:
        yield f"--answer-timeout-s {settings.answer_timeout_s} must be positive"
    yield from _engine_problems(settings, ranks)
    found.collect(parse_overrides, settings.sglang, flag="--sglang", fields=None)
    flag = "--chat-template-kwargs"
    found.collect(parse_overrides, settings.chat_template_kwargs, flag=flag, fields=None)
    yield from found.texts
    yield from _source_problems(settings)


def _engine_problems(settings: RolloutSettings, ranks: int | None) -> Iterator[str]:
    """Yield how the engines do not fit the ranks."""
    tp, prompts = settings.engine_tp, settings.prompts_per_step
    if prompts < 1:
        yield f"--prompts-per-step {prompts} must be at least 1"
    if tp < 1:
        yield f"--engine-tp {tp} must be at least 1"
    elif settings.engine_ep < 1 or tp % settings.engine_ep:
        yield f"--engine-ep {settings.engine_ep} must divide --engine-tp {tp}"
    if ranks is None or tp < 1:
        return
    if ranks % tp:
        yield f"--engine-tp {tp} does not divide the {ranks} ranks: use a divisor"
    elif prompts % (engines := ranks // tp):
        rule = f"is not divisible by the {engines} engines: use a multiple of {engines}"
        yield f"--prompts-per-step {prompts} {rule}"


def _source_problems(settings: RolloutSettings) -> Iterator[str]:
    """Yield what is wrong with the sources of prompts, but for their files."""
    found = ProblemList()
    found.collect(parse_weights, settings.prompts)
    for given in settings.eval_prompts:
        weights = found.collect(parse_weights, (given,), flag="--eval-prompts")
        if weights is not None and given not in weights:
            why = "a held-out set has no weight, each is evaluated whole"
            yield f"--eval-prompts {given}: {why}: leave the number out"
    if len(set(settings.eval_prompts)) < len(settings.eval_prompts):
        given = " ".join(settings.eval_prompts)
        yield f"--eval-prompts {given}: a source is given twice: give each once"
    yield from found.texts


@all_problems
def check_prompt_files(settings: RolloutSettings) -> None:
    """Refuse files of prompts that are not there."""
    sources = []
    for given in (settings.prompts, *((source,) for source in settings.eval_prompts)):
        with contextlib.suppress(BadInput):  # another check says so
            sources += parse_weights(given)
    for source in dict.fromkeys(sources):
        if not is_generated(source) and (problem := file_problem(source)):
            yield problem


@all_problems
def check_reward_flags(settings: RewardSettings, rollout: RolloutSettings) -> None:
    """Refuse what cannot work."""
    if settings.judges < 1:
        yield f"--judges {settings.judges} must be at least 1"
    if not settings.judge_timeout_s > 0:
        yield f"--judge-timeout-s {settings.judge_timeout_s} must be positive"
    if settings.dynamic_sampling < 0:
        yield f"--dynamic-sampling {settings.dynamic_sampling} must not be negative"
    sources = (*rollout.prompts, *rollout.eval_prompts)
    if settings.reward == "reasoning_gym" and not any(s.startswith(GYM) for s in sources):
        fix = f"add one such as {GYM}chain_sum, or use --reward math"
        what = "judges problems of reasoning-gym, and --prompts has none"
        yield f"--reward reasoning_gym {what}: {fix}"
    if not 0 <= settings.overlong_buffer <= rollout.max_response_tokens:
        rule = f"must lie between 0 and --max-response-tokens {rollout.max_response_tokens}"
        yield f"--overlong-buffer {settings.overlong_buffer} {rule}"


@all_problems
def check_in_flight_flags(
    settings: InFlightSettings, rollout: RolloutSettings, *, world_size: int
) -> None:
    """Refuse what cannot work."""
    if world_size < 2:
        fix = "use `torchrun --nproc-per-node 2 loop_async.py`"
        needs = "needs a rank that trains and one that generates"
        yield f"the asynchronous loop {needs}: {fix}"
    elif not 1 <= settings.rollout_ranks < world_size:
        rule = f"must leave at least one of the {world_size} ranks to each side"
        yield f"--rollout-ranks {settings.rollout_ranks} {rule}: use 1 to {world_size - 1}"
    if settings.max_staleness < 0:
        yield f"--max-staleness {settings.max_staleness} must not be negative"
    engines = max(settings.rollout_ranks // max(rollout.engine_tp, 1), 1)
    if settings.oversample < 0 or settings.oversample % engines:
        rule = f"must be a multiple of the {engines} engines, and not negative"
        yield f"--oversample {settings.oversample} {rule}"


# --- training and the hand-off ----------------------------------------------------------------


@all_problems
def check_train_flags(
    settings: TrainSettings, loss: LossSettings, *, steps: int, ranks: int | None
) -> None:
    """Refuse what cannot work. ranks: those that train; None where that is a problem itself."""
    found = ProblemList()
    for name in ("minibatches", "microbatch_tokens"):
        if getattr(settings, name) < 1:
            yield f"{_flag(name)} {getattr(settings, name)} must be at least 1"
    if not 0 <= settings.min_lr <= settings.lr < math.inf:
        rates = f"--lr {settings.lr} and --min-lr {settings.min_lr}"
        yield f"{rates} must satisfy 0 <= min-lr <= lr, and be finite"
    if settings.min_lr and settings.lr_schedule == "constant":
        given = f"--min-lr {settings.min_lr}"
        yield f"{given} has no effect with --lr-schedule constant: leave one out"
    if not 0 <= settings.adam_beta2 < 1:
        yield f"--adam-beta2 {settings.adam_beta2} must lie in [0, 1)"
    if not 0 <= settings.weight_decay < math.inf:
        yield f"--weight-decay {settings.weight_decay} must be finite and must not be negative"
    if not 0 <= settings.lr_warmup_steps < max(steps, 1):
        yield f"--lr-warmup-steps {settings.lr_warmup_steps} must be smaller than --steps {steps}"
    if not settings.clip_grad > 0:
        yield f"--clip-grad {settings.clip_grad} must be positive"
    if settings.reference and not loss.kl_coef:
        fix = "set one, or leave the other out"
        yield f"--reference {settings.reference} is not used without --kl-coef: {fix}"
    elif settings.reference and (text := model_problem(settings.reference, flag="--reference")):
        yield text
    if settings.offload_reference and not loss.kl_coef:
        fix = "leave it out, or set that"
        yield f"--offload-reference has no effect without --kl-coef: {fix}"
    found.collect(parse_overrides, settings.megatron, flag="--megatron", fields=None)
    if ranks is not None:
        sizes = dict(tp=settings.tp, pp=settings.pp, cp=settings.cp, ep=settings.ep)
        found.collect(check_ranks, ranks, **sizes)
    yield from found.texts


@all_problems
def check_minibatches(n: int, *, answers: int) -> None:
    """Refuse --minibatches n where a step has fewer answers: some updates would have none."""
    if 1 <= answers < n:
        most = f"a step has {answers} answers, --prompts-per-step times --samples-per-prompt"
        yield f"--minibatches {n}: {most}: use at most {answers}"


@all_problems
def check_sync_flags(settings: SyncSettings) -> None:
    """Refuse what cannot work."""
    if settings.bucket_bytes < 1:
        given = f"--bucket-bytes {settings.bucket_bytes}"
        yield f"{given} must be at least 1; leave it out for 256 MiB"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
