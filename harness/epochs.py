"""--max-epochs: how many steps so many passes over the file of prompts are.

The number is known before the start. So the learning-rate schedule, the progress bar, the last
evaluation and --resume all know the last step, as if --steps had named it.

settings: a loop's. data: data.prompts.Data, which is not imported here: checks.py is to stay light.
"""

import contextlib
from dataclasses import replace

from common.errors import BadInput, all_problems
from common.settings import RolloutSettings, RunSettings, is_generated, parse_weights

MOST_EPOCHS = 1_000_000  # numbers above 2**64 would not come back from a checkpoint


@all_problems
def check_max_epochs(run: RunSettings, rollout: RolloutSettings) -> None:
    """Refuse --max-epochs where a pass over the prompts means nothing."""
    if not 0 <= (epochs := run.max_epochs) <= MOST_EPOCHS:
        yield f"--max-epochs {epochs} must lie between 1 and {MOST_EPOCHS:,}, or be 0 for no limit"
    if epochs <= 0:
        return
    sources = []
    with contextlib.suppress(BadInput):  # check_rollout_flags reports it
        sources = list(parse_weights(rollout.prompts))
    if len(sources) > 1:
        why = f"--prompts draws from {len(sources)} sources by weight, so none ends with the others"
        yield f"--max-epochs {epochs}: {why}: join them in one file, or give --steps alone"
    elif sources and is_generated(sources[0]):
        fix = "give a file, or --steps alone"
        yield f"--max-epochs {epochs}: the problems of --prompts {sources[0]} never end: {fix}"


@all_problems
def lower_steps(settings, data):
    """Return the settings with the steps that --max-epochs leaves of --steps.

    A step whose prompts would reach into a further pass is not made. Raises BadInput if no step is
    left, and for flags that no longer fit the steps.
    """
    run, per_step = settings.run, settings.rollout.prompts_per_step
    if not run.max_epochs or data.prompts_of_a_pass is None:
        return settings
    steps = min(run.steps, allowed_steps(settings, data))
    given = f"--max-epochs {run.max_epochs}"
    if steps < 1:
        has = f"{given} times the {data.prompts_of_a_pass} prompts of the file is less than a step"
        yield f"{has} of --prompts-per-step {per_step}: lower that, or raise --max-epochs"
        return settings
    # Against --steps these have been checked.
    if (warmup := settings.train.lr_warmup_steps) >= steps:
        yield f"--lr-warmup-steps {warmup} must be smaller than the {steps} steps of {given}"
    if late := [step for step in run.profile if step > steps]:
        yield f"--profile {late[0]} is no step of the run, which {given} ends after step {steps}"
    return replace(settings, run=replace(run, steps=steps))


def allowed_steps(settings, data) -> int:
    """Return how many whole steps the prompts of --max-epochs passes are."""
    return settings.run.max_epochs * data.prompts_of_a_pass // settings.rollout.prompts_per_step


def describe(settings, data) -> str:
    """Return a line that says how the lowered settings came about."""
    run, n, per_step = settings.run, data.prompts_of_a_pass, settings.rollout.prompts_per_step
    allowed = allowed_steps(settings, data)
    text = (
        f"--max-epochs {run.max_epochs}: {allowed} steps, of {per_step} of the file's {n} prompts"
    )
    return text if run.steps == allowed else f"{text}; --steps {run.steps} ends the run before"
