"""Refuse flags that cannot work, whatever the model, the data and the machine are.

flags.py calls these checks right after it has read the command line. The stages' imports, which
take half a minute, come later. After them start.py checks the rules that need config.json, prompts
or the machine; see model_checks.py and plan.py. common/errors.py says what a check is.
"""

import contextlib
import importlib.util
import math
import os
from collections.abc import Iterator
from dataclasses import fields

from common import hub, process_groups
from common.errors import (
    BadInput,
    ProblemList,
    all_problems,
    file_problem,
    flag_of,
)
from common.overrides import parse_overrides
from common.settings import (
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
from harness.epochs import check_max_epochs
from harness.lora_checks import check_lora_flags
from harness.loss_checks import check_loss_settings
from harness.reward_checks import TEMPERATURES, check_held_out_flags, check_reward_flags
from harness.run_folder import name_problems, rollouts_file
from losses import LossSettings

# NumPy takes seeds below 2**32. Engine and trainer add a number to --seed on each rank.
SEEDS = 2**31
NOT_IN_PROJECTS = "/\\#?%:"  # W&B itself refuses them only after the run has begun
EXTRAS = {"tensorboard": "tensorboard==2.21.0", "wandb": "wandb==0.31.0"}  # not in requirements.txt
EVALUATION = ("prompts", "temperature", "max_response_tokens", "reward")  # flags behind --eval-
MOST_EVAL_SAMPLES = 100_000  # a generated held-out set has no end


@all_problems
def check_flags(settings) -> None:
    """Check all flags of a loop. Raises one BadInput with everything that cannot work."""
    found, ranks = ProblemList(), world_size(settings)
    found.collect(check_run_flags, settings.run)
    found.collect(check_max_epochs, settings.run, settings.rollout)
    if hasattr(settings, "plan"):
        found.collect(check_plan_flags, settings.plan)
    if is_async(settings):
        found.collect(check_in_flight_flags, settings.in_flight, settings.rollout, world_size=ranks)
    trainer_ranks, rollout_ranks = split_ranks(settings)
    if min(trainer_ranks, rollout_ranks) < 1:
        # The checks above report it. What follows from it must not be reported too.
        trainer_ranks = rollout_ranks = None
    found.collect(check_rollout_flags, settings.rollout, ranks=rollout_ranks)
    if not is_plan(settings):  # a plan reads no prompts
        found.collect(check_prompt_files, settings.rollout)
    found.collect(check_reward_flags, settings.reward, settings.rollout)
    found.collect(check_held_out_flags, settings.reward, settings.rollout)
    trained = dict(steps=settings.run.steps, ranks=trainer_ranks)
    found.collect(check_train_flags, settings.train, settings.loss, **trained)
    found.collect(check_loss_settings, settings.loss)
    found.collect(check_lora_flags, settings)
    found.collect(check_sync_flags, settings.sync, settings.rollout)
    found.collect(check_modes, settings)
    if not settings.run.load_rollouts:  # model_checks.longest_of_dumps checks the loaded ones
        answers = settings.rollout.prompts_per_step * settings.rollout.samples_per_prompt
        found.collect(check_minibatches, settings.train.minibatches, answers=answers)
    yield from found.texts


def world_size(settings) -> int:
    """Return the number of ranks of the run, or of the planned run. settings: a loop's."""
    return settings.plan.plan_gpus if is_plan(settings) else int(os.environ["WORLD_SIZE"])


def split_ranks(settings) -> tuple[int, int]:
    """Return how many ranks train and how many generate; in the synchronous loop all do both."""
    ranks = world_size(settings)
    if not is_async(settings):
        return ranks, ranks
    return ranks - settings.in_flight.rollout_ranks, settings.in_flight.rollout_ranks


def is_async(settings) -> bool:
    """Tell whether a loop's settings are those of the asynchronous loop."""
    return hasattr(settings, "in_flight")


def is_plan(settings) -> bool:
    """Tell whether the run is only planned. The examples cannot be."""
    return hasattr(settings, "plan") and settings.plan.plan


@all_problems
def check_modes(settings) -> None:
    """Refuse flags that would do nothing in a run of this kind. settings: a loop's."""
    run, rollout, train = settings.run, settings.rollout, settings.train
    kind, idle = "", []
    if run.eval_only or run.debug_rollout_only:
        kind = "--eval-only" if run.eval_only else "--debug-rollout-only"
        idle = [(settings.loss, "kl_coef"), (train, "minibatches"), (train, "train_numerics")]
        idle += [(train, "freeze_moe_router"), (settings.loss, "old_logprobs")]
        if run.debug_rollout_only or not run.resume:
            idle += [(train, "lora_rank")]  # adapters that have learned nothing add nothing
        if run.eval_only:
            idle += [(settings.reward, "dynamic_sampling"), (train, "routing_replay")]
            idle += [(run, "max_epochs"), (rollout, "deal")]
    elif run.load_rollouts:
        kind = "--load-rollouts"
        idle = [(run, "check_sync"), (settings.reward, "dynamic_sampling")]
        idle += [(rollout, "sglang"), (rollout, "deal"), (run, "max_epochs")]
        idle += [(rollout, f"eval_{name}") for name in EVALUATION]
    for stage, name in [*idle, (settings.sync, "sync")] if kind else []:
        given, default = getattr(stage, name), getattr(type(stage)(), name)
        if given != default:
            shown = " ".join(map(str, given)) if isinstance(given, tuple) else given
            yield f"{flag_of(name)} {shown} has no effect with {kind}: leave one out"
    if rollout.deal == "room":  # then the numbers of a step's prompts are known before it starts
        further = [(settings.reward, "dynamic_sampling")]
        if is_async(settings):
            further += [(settings.in_flight, "oversample")]
        for stage, name in further:
            if given := getattr(stage, name):
                yield f"{flag_of(name)} {given} does not go with --deal room: use --deal fixed"


# --- the run ------------------------------------------------------------------------------------


@all_problems
def check_run_flags(settings: RunSettings) -> None:
    """Refuse values that cannot work, names that are taken, and folders that are not there."""
    if problem := hub.model_problem(settings.model):
        yield problem
    if problem := process_groups.interface_problem():
        yield problem
    for name in ("steps", "eval_every", "keep"):
        if getattr(settings, name) < 1:
            yield f"{flag_of(name)} {getattr(settings, name)} must be at least 1"
    if settings.save_every < 0:
        yield f"--save-every {settings.save_every} must not be negative"
    if not 0 <= settings.seed < SEEDS:
        yield f"--seed {settings.seed} must be at least 0 and below {SEEDS}"
    if odd := set(settings.wandb) & set(NOT_IN_PROJECTS):
        which = f"--wandb {settings.wandb!r} holds {''.join(sorted(odd))!r}"
        yield f"{which}: the name of a project may hold none of {NOT_IN_PROJECTS}"
    if unknown := set(settings.export) - {"bf16", "fp8", "lora"}:
        yield f"--export {' '.join(sorted(unknown))} is none of: bf16, fp8, lora"
    for name, line in EXTRAS.items():
        if getattr(settings, name) and importlib.util.find_spec(name) is None:
            yield f"--{name} needs a package that is not installed: pip install {line}"
    yield from _load_rollouts_problems(settings)
    yield from _eval_only_problems(settings)
    for step in settings.profile:
        if not 1 <= step <= settings.steps:
            has = f"which has steps 1 to {settings.steps} (--steps)"
            yield f"--profile {step} is no step of the run, {has}"
            break
    yield from name_problems(settings)


def _load_rollouts_problems(settings: RunSettings) -> Iterator[str]:
    """Yield what keeps --load-rollouts from working."""
    if not settings.load_rollouts:
        return
    if settings.save_rollouts or settings.debug_rollout_only:
        fix = "leave out --save-rollouts and --debug-rollout-only, which are about its answers"
        yield f"--load-rollouts starts no engine: {fix}"
    for step in range(1, settings.steps + 1):
        file = rollouts_file(settings.load_rollouts, step)
        if not os.path.isfile(file):
            fix = "give a folder that --save-rollouts wrote, or fewer --steps"
            yield f"--load-rollouts {settings.load_rollouts} has no {file.name}: {fix}"
            return


def _eval_only_problems(settings: RunSettings) -> Iterator[str]:
    """Yield the flags that would do nothing beside --eval-only."""
    if not settings.eval_only:
        return
    idle = ("load_rollouts", "save_rollouts", "debug_rollout_only", "profile", "save_every")
    if given := [flag_of(name) for name in idle if getattr(settings, name)]:
        flags = ", ".join(given)
        yield f"--eval-only makes no training step, and {flags} would do nothing: leave it out"
    if settings.export not in ((), RunSettings().export):
        yield f"--eval-only exports nothing: leave out --export {' '.join(settings.export)}"


@all_problems
def check_plan_flags(settings: PlanSettings) -> None:
    """Refuse sizes and bandwidths that cannot be, and any of them without --plan."""
    changed = [f.name for f in fields(PlanSettings) if getattr(settings, f.name) != f.default]
    if changed and not settings.plan:
        yield f"{flag_of(changed[0])} has no effect without --plan: add that, or leave it out"
    for field in fields(PlanSettings):
        value = getattr(settings, field.name)
        if field.name != "plan" and not 0 < value < 1e9:
            yield f"{flag_of(field.name)} {value} must be positive, and below a billion"


# --- prompts and rollout ------------------------------------------------------------------------


@all_problems
def check_rollout_flags(settings: RolloutSettings, *, ranks: int | None) -> None:
    """Refuse settings of the rollout that cannot work, whatever the model is.

    ranks: those that generate; None where their number is itself a reported problem.
    """
    found = ProblemList()
    if settings.temperature <= 0:
        why = "a greedy rollout has no log-probs to learn from"
        yield f"--temperature {settings.temperature} must be above 0: {why}"
    elif not TEMPERATURES[0] <= settings.temperature <= TEMPERATURES[1]:  # also nan
        rule = f"must lie between {TEMPERATURES[0]} and {TEMPERATURES[1]:g}"
        low = "below, the engine's log-probs mean nothing, and below 1e-6 SGLang is greedy"
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
    """Yield where the sizes of the engines do not divide the ranks and the prompts."""
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
    elif settings.deal == "room" and engines == 1:
        yield "--deal room divides the prompts between engines, and there is one: leave it out"


def _source_problems(settings: RolloutSettings) -> Iterator[str]:
    """Yield what is wrong with the sources of prompts. check_prompt_files looks at their files."""
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
        with contextlib.suppress(BadInput):  # check_rollout_flags reports it
            sources += parse_weights(given)
    for source in dict.fromkeys(sources):  # each once
        if is_generated(source) or hub.is_dataset(source):
            continue
        if problem := file_problem(source):
            yield problem


@all_problems
def check_in_flight_flags(
    settings: InFlightSettings, rollout: RolloutSettings, *, world_size: int
) -> None:
    """Refuse settings of the asynchronous loop that do not fit its ranks and engines."""
    if world_size < 2:
        fix = "use `torchrun --nproc-per-node 2 loop_async.py`"
        yield f"the asynchronous loop needs a rank that trains and one that generates: {fix}"
    elif not 1 <= settings.rollout_ranks < world_size:
        rule = f"must leave at least one of the {world_size} ranks to each side"
        yield f"--rollout-ranks {settings.rollout_ranks} {rule}: use 1 to {world_size - 1}"
    for name in ("max_staleness", "engine_restarts"):
        if getattr(settings, name) < 0:
            yield f"{flag_of(name)} {getattr(settings, name)} must not be negative"
    engines = max(settings.rollout_ranks // max(rollout.engine_tp, 1), 1)
    if settings.oversample < 0 or settings.oversample % engines:
        rule = f"must be a multiple of the {engines} engines, and not negative"
        yield f"--oversample {settings.oversample} {rule}"


# --- training and weight updates ----------------------------------------------------------------


@all_problems
def check_train_flags(
    settings: TrainSettings, loss: LossSettings, *, steps: int, ranks: int | None
) -> None:
    """Refuse settings of the trainer that cannot work, whatever the model is.

    ranks: those that train; None where their number is itself a reported problem.
    """
    found = ProblemList()
    for name in ("minibatches", "microbatch_tokens"):
        if getattr(settings, name) < 1:
            yield f"{flag_of(name)} {getattr(settings, name)} must be at least 1"
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
    elif settings.reference and (text := hub.model_problem(settings.reference, flag="--reference")):
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
    """Refuse --minibatches n if a step has fewer answers: some optimizer steps would have none."""
    if 1 <= answers < n:
        most = f"a step has {answers} answers, --prompts-per-step times --samples-per-prompt"
        yield f"--minibatches {n}: {most}: use at most {answers}"


@all_problems
def check_sync_flags(settings: SyncSettings, rollout: RolloutSettings) -> None:
    """Refuse a bucket size that cannot work, and changes where they would fill the memory."""
    if (given := settings.bucket_bytes) < 1:
        yield f"--bucket-bytes {given} must be at least 1; leave it out for 256 MiB"
    if settings.sync == "delta" and (ep := rollout.engine_ep) > 1:
        rule = "each engine rank would keep the others' experts in host memory: use --sync full"
        yield f"--sync delta does not go with --engine-ep {ep}: {rule}"
