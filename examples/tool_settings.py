"""The flags of tool_use.py and tool_use_async.py: read before anything heavy is imported."""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.errors import all_problems
from common.settings import RolloutSettings, RunSettings, SyncSettings, TrainSettings
from losses import LossSettings
from reward import RewardSettings
from toy.task import DIGITS

CALL_END = "="  # the toy's
# Call, result, answer and </s>.
LONGEST_DEMONSTRATION = (2 * DIGITS + 3) + 2 * (DIGITS + 1) + 1


@dataclass(frozen=True)
class ToolSettings:
    """Conversations with the calculator, and the demonstrations they begin with."""

    max_turns: int = 3
    """The policy speaks at most so many times; a call in its last turn gets no result."""
    call_end: str = CALL_END
    """Token that ends a call; for a chat model that of its tool calls, such as </tool_call>."""
    result_role: Literal["tool", "user"] = "tool"
    """With --chat: role of the message that holds a result; user where the chat template does not
    know the role tool."""
    tool_delay_s: float = 0.0
    """The calculator answers so much later, as a slow service would."""
    tool_timeout_s: float = 60.0
    """A call that takes longer has failed: its conversation ends, is masked, and is counted in
    tool_failures."""
    warm_steps: int = 600
    """Optimizer steps on demonstrations before the loop; 0: none, --model knows how to call."""
    warm_samples: int = 16
    """Demonstrations in a step."""
    warm_calls: float = 0.5
    """Share of demonstrations that call the calculator; the others answer at once."""
    warm_lr: float = 1e-3
    """Learning rate of the first of these steps; it falls to 0."""


@dataclass(frozen=True)
class Settings:
    run: RunSettings = RunSettings(steps=30)
    rollout: RolloutSettings = RolloutSettings(max_response_tokens=24)
    reward: RewardSettings = RewardSettings()
    train: TrainSettings = TrainSettings(lr=5e-5)
    loss: LossSettings = LossSettings()
    sync: SyncSettings = SyncSettings()
    tools: ToolSettings = ToolSettings()


@all_problems
def check_tool_flags(settings: Settings) -> None:
    """Refuse what cannot work, and flags that would do nothing here."""
    tools, max_response_tokens = settings.tools, settings.rollout.max_response_tokens
    if settings.run.load_rollouts and tools.warm_steps:
        fix = "use --warm-steps 0, or leave --load-rollouts out"
        yield f"--load-rollouts trains on what another run sampled, with its own warm start: {fix}"
    if settings.run.debug_rollout_only and tools.warm_steps:
        found = f"--debug-rollout-only trains nothing, and --warm-steps {tools.warm_steps} does"
        yield f"{found}: use --warm-steps 0"
    if settings.run.eval_only and tools.warm_steps and not settings.run.resume:
        fix = "use --warm-steps 0 with a --model that can call the calculator, or --resume"
        yield f"--eval-only trains nothing, and --warm-steps {tools.warm_steps} trains: {fix}"
    if settings.reward.reward != "exact":
        given = f"--reward {settings.reward.reward}"
        yield f"{given} judges single turns, not conversations: leave it out"
    if settings.rollout.eval_reward:
        given = f"--eval-reward {' '.join(settings.rollout.eval_reward)}"
        yield f"{given} judges single turns, not conversations: leave it out"
    yield from _chat_problems(settings)
    for name in ("max_turns", "warm_samples"):
        if getattr(tools, name) < 1:
            yield f"--{name.replace('_', '-')} {getattr(tools, name)} must be at least 1"
    if tools.warm_steps < 0:
        yield f"--warm-steps {tools.warm_steps} must not be negative"
    if not 0 <= tools.warm_calls <= 1:
        yield f"--warm-calls {tools.warm_calls} must lie between 0 and 1"
    if not 0 <= tools.tool_delay_s < math.inf:
        yield f"--tool-delay-s {tools.tool_delay_s} must be finite and must not be negative"
    longest_s = settings.rollout.answer_timeout_s
    if not 0 < tools.tool_timeout_s <= longest_s:
        limit = f"--answer-timeout-s, {longest_s:g}: other ranks wait no longer"
        yield f"--tool-timeout-s {tools.tool_timeout_s} must be above 0 and at most {limit}"
    if not 0 <= tools.warm_lr < math.inf:
        yield f"--warm-lr {tools.warm_lr} must be finite and must not be negative"
    if max_response_tokens < LONGEST_DEMONSTRATION:
        yield (
            f"--max-response-tokens {max_response_tokens} has no room for a call, its result and"
            f" the answer: use at least {LONGEST_DEMONSTRATION}"
        )


def _chat_problems(settings: Settings) -> Iterator[str]:
    """Yield what belongs to chat models only, or to the toy only."""
    tools, rollout = settings.tools, settings.rollout
    if rollout.chat:
        if tools.warm_steps:
            found = f"--chat with --warm-steps {tools.warm_steps}"
            yield f"{found}: the demonstrations are those of the toy: use --warm-steps 0"
        if tools.call_end == CALL_END:
            fix = "name the token that ends the model's tool calls, such as </tool_call>"
            yield f"--chat with --call-end {CALL_END}, the end of the toy's calls: {fix}"
        return
    if rollout.prompts != ("toy",) or rollout.eval_prompts:
        rule = "without --chat the calculator and the demonstrations are those of the toy"
        yield f"--prompts and --eval-prompts: {rule}: leave them out"
    if tools.call_end != CALL_END:
        fix = "leave it out, or add --chat for a chat model"
        yield f"--call-end {tools.call_end}: the toy's calls end with {CALL_END}: {fix}"
    if tools.result_role != "tool":
        fix = "add --chat, or leave it out"
        yield f"--result-role {tools.result_role} is read from a chat template: {fix}"
