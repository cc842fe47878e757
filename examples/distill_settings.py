"""The flags of distill.py and distill_async.py: read before anything heavy is imported."""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import hub
from common.errors import all_problems
from common.settings import (
    RolloutSettings,
    RunSettings,
    SyncSettings,
    TrainSettings,
    is_generated,
)
from losses import LossSettings
from reward import RewardSettings


@dataclass(frozen=True)
class DistillSettings:
    """The teacher, and what is learned beside it."""

    teacher: str = ""
    """Hugging Face folder of the teacher: any supported model with the tokenizer of --model."""
    offload_teacher: bool = False
    """Keep the teacher in CPU memory, and on the GPU only during its forward pass."""
    reward_weight: float = 0.0
    """Add so many times the advantage that --advantage makes of the rewards; 0: the teacher alone
    teaches, and rewards are only measured."""
    unlabelled: bool = False
    """Judge no answer: labels may be null, every reward is 0, and nothing is evaluated. Prompts are
    then files, without --eval-prompts."""


@dataclass(frozen=True)
class Settings:
    run: RunSettings = RunSettings()
    # Answers are not compared. So a batch has more prompts than the loops', and fewer answers each.
    rollout: RolloutSettings = RolloutSettings(prompts_per_step=64, samples_per_prompt=4)
    reward: RewardSettings = RewardSettings()
    train: TrainSettings = TrainSettings()
    loss: LossSettings = LossSettings()
    sync: SyncSettings = SyncSettings()
    distill: DistillSettings = DistillSettings()


@all_problems
def check_distill_flags(settings: Settings) -> None:
    """Refuse what cannot work, and flags that would do nothing here."""
    distill, reward = settings.distill, settings.reward
    if needs_teacher(settings):
        if not distill.teacher:
            yield "--teacher is not given: name a Hugging Face folder with the model's tokenizer"
        elif problem := hub.model_problem(distill.teacher, flag="--teacher"):
            yield problem
    elif distill.teacher or distill.offload_teacher:
        fix = "leave --teacher and --offload-teacher out"
        yield f"--eval-only and --debug-rollout-only train nothing, and need no teacher: {fix}"
    if settings.loss.kl_coef:
        yield (
            f"--kl-coef {settings.loss.kl_coef}: the teacher takes the place of the reference"
            " model: leave --kl-coef and --reference out"
        )
    weight = distill.reward_weight
    if not 0 <= weight < math.inf:
        yield f"--reward-weight {weight} must be finite and must not be negative"
    if not weight and reward.advantage != RewardSettings().advantage:
        fix = "give it, or leave --advantage out"
        yield f"--advantage {reward.advantage} has no effect without --reward-weight: {fix}"
    if not weight and reward.overlong_buffer:
        given = f"--overlong-buffer {reward.overlong_buffer}"
        yield f"{given} changes rewards, and has no effect without --reward-weight: give it"
    if settings.loss.old_logprobs == "rollout":
        why = "the advantage is of the trainer's log-probs, and the engine's are rounded"
        yield f"--old-logprobs rollout: {why}: leave it out"
    if distill.unlabelled:
        yield from _judged(settings)
    if reward.dynamic_sampling:
        yield (
            f"--dynamic-sampling {reward.dynamic_sampling} replaces groups of equal rewards, and"
            " the teacher teaches on these too: leave it out"
        )


def _judged(settings: Settings) -> Iterator[str]:
    """Yield what would be judged beside --unlabelled."""
    if settings.distill.reward_weight:
        given = f"--reward-weight {settings.distill.reward_weight}"
        yield f"{given} needs rewards, and --unlabelled judges nothing: leave one out"
    if settings.reward.reward != RewardSettings().reward:
        given = f"--reward {settings.reward.reward}"
        yield f"{given} has no effect with --unlabelled: leave one out"
    generated = [source for source in settings.rollout.prompts if is_generated(source)]
    if held_out := (*settings.rollout.eval_prompts, *generated):
        yield (
            f"--unlabelled evaluates nothing, and {held_out[0]} has held-out prompts: leave"
            " --eval-prompts out, and name only files by --prompts"
        )


def needs_teacher(settings: Settings) -> bool:
    """Tell whether the run trains."""
    return not (settings.run.eval_only or settings.run.debug_rollout_only)


def for_the_loop(settings: Settings, advantage: str) -> Settings:
    """Return what a loop must be told: the teacher is its frozen reference.

    KL to the reference is taken from the reward, with weight 1 and estimator k1, which is the
    difference of the log-probs. advantage: the name, in ADVANTAGES, of what is made of it.
    """
    if not needs_teacher(settings):
        return settings
    distill = settings.distill
    teacher = dict(reference=distill.teacher, offload_reference=distill.offload_teacher)
    return replace(
        settings,
        train=replace(settings.train, **teacher),
        loss=replace(settings.loss, kl_coef=1.0, kl_in="reward", kl_estimator="k1"),
        reward=replace(settings.reward, advantage=advantage),
    )
