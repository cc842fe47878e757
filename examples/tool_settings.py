"""The flags of tool_use.py and tool_use_async.py: read before anything heavy is imported."""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.errors import all_problems
from common.settings import RolloutSettings, RunSettings, SyncSettings, TrainSettings
from losses import LossSettings
from reward import RewardSettings
from toy.task import DIGITS

# Call, result, answer and </s>.
LONGEST_DEMONSTRATION = (2 * DIGITS + 3) + 2 * (DIGITS + 1) + 1


@dataclass(frozen=True)
class ToolSettings:
    """Conversations with the calculator, and the demonstrations they begin with."""

    max_turns: int = 3
    """The policy speaks at most so many times; a call in its last turn gets no result."""
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
    if settings.rollout.prompts != ("toy",) or settings.rollout.eval_prompts:
        yield (
            "--prompts and --eval-prompts: the calculator and the demonstrations are those of the"
            " toy: leave them out"
        )
    for name in ("max_turns", "warm_samples"):
        if getattr(tools, name) < 1:
            yield f"--{name.replace('_', '-')} {getattr(tools, name)} must be at least 1"
    if tools.warm_steps < 0:
        yield f"--warm-steps {tools.warm_steps} must not be negative"
    if not 0 <= tools.warm_calls <= 1:
        yield f"--warm-calls {tools.warm_calls} must lie between 0 and 1"
    if not 0 <= tools.warm_lr < math.inf:
        yield f"--warm-lr {tools.warm_lr} must be finite and must not be negative"
    if max_response_tokens < LONGEST_DEMONSTRATION:
        yield (
            f"--max-response-tokens {max_response_tokens} has no room for a call, its result and"
            f" the answer: use at least {LONGEST_DEMONSTRATION}"
        )
