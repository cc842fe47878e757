"""Refuse flags of rewards and evaluation that cannot work. checks.py calls these checks."""

from collections.abc import Iterator

from common.errors import all_problems
from common.held_out import held_out_sets
from common.settings import GYM, RolloutSettings
from data.remote_reward import is_url, url_problem
from reward import REWARDS, RewardSettings

# Below 1e-6 SGLang samples greedily and reports log-probs of temperature 1 (SamplingParams). Below
# 0.01 the rounding errors of BF16 logits are larger than differences of log-probs that matter.
TEMPERATURES = 0.01, 100.0


@all_problems
def check_reward_flags(settings: RewardSettings, rollout: RolloutSettings) -> None:
    """Refuse settings of the reward that cannot work with these prompts and answers."""
    yield from _name_problems("--reward", settings.reward)
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


def _name_problems(flag: str, name: str) -> Iterator[str]:
    """Yield why there is no reward function of a name."""
    if is_url(name):
        if problem := url_problem(name):
            yield f"{flag} {problem}"
    elif name not in REWARDS:
        yield f"{flag} {name} must be one of {', '.join(REWARDS)}, or the URL of a service"


@all_problems
def check_held_out_flags(settings: RewardSettings, rollout: RolloutSettings) -> None:
    """Refuse values for held-out sets that cannot work."""
    low, high = TEMPERATURES
    for of_set in held_out_sets(rollout):
        name, degrees = of_set.name, of_set.temperature
        if rollout.eval_temperature and degrees and not low <= degrees <= high:  # also nan
            rule = f"must be 0, which is greedy, or lie between {low} and {high:g}"
            yield f"--eval-temperature {degrees} of {name} {rule}"
        if rollout.eval_max_response_tokens and of_set.max_response_tokens < 1:
            given = f"--eval-max-response-tokens {of_set.max_response_tokens}"
            yield f"{given} of {name} must be at least 1"
        if of_set.reward:
            yield from _name_problems("--eval-reward", of_set.reward)
        judged_by = of_set.reward or settings.reward
        is_of_group = getattr(REWARDS.get(judged_by), "of_group", False)
        if is_of_group and rollout.eval_samples_per_prompt == 1:
            fix = "use another --eval-reward, or more --eval-samples-per-prompt"
            yield f"the reward {judged_by} compares answers to a prompt, and {name} has one: {fix}"
        if rollout.eval_samples_per_prompt > 1 and not of_set.temperature:
            given = f"--eval-samples-per-prompt {rollout.eval_samples_per_prompt}"
            why = f"{name} is answered at temperature 0, and all answers to a prompt are equal"
            yield f"{given}: {why}: use 1, or a temperature"
