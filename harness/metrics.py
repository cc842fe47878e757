"""What samples amount to: the metrics of a step, and an evaluation in one line."""

from collections import defaultdict

from data.sample import Sample, by_group
from reward import is_uninformative


def batch_metrics(samples: list[Sample], *, version: int) -> dict[str, float]:
    """Return what a step's samples looked like; the reward of each source where there are several.

    version: of the weights that the step trains. A metric is missing where nothing is left of it:
    reward where no sample was scored, staleness where all responses are empty. too_hard counts the
    answers that passed the limit of the mathematical reward; it is missing where none did.
    Numbers that a rollout has left in sample.metrics are logged as means over the answers.
    """
    answers = [sample for sample in samples if not sample.is_part]
    rewards = defaultdict(list)
    for sample in answers:
        rewards[sample.source] += [] if sample.reward is None else [sample.reward]
    scored = [reward for of_source in rewards.values() for reward in of_source]
    metrics = {}
    if len(rewards) > 1:
        of_source = sorted((name, values) for name, values in rewards.items() if values)
        metrics = {f"reward/{name}": sum(values) / len(values) for name, values in of_source}
    if scored:
        metrics["reward"] = sum(scored) / len(scored)
    metrics["reward_errors"] = len(answers) - len(scored)
    if too_hard := sum("too_hard" in sample.notes for sample in answers):
        metrics["too_hard"] = too_hard
    if answers:
        groups = by_group(samples)
        metrics["zero_std_groups"] = sum(map(is_uninformative, groups)) / len(groups)
        metrics["response_tokens"] = sum(len(s.response_ids) for s in samples) / len(answers)
        metrics["truncated"] = sum(s.finish_reason == "length" for s in answers) / len(answers)
    for name in dict.fromkeys(name for sample in answers for name in sample.metrics):
        metrics[name] = sum(sample.metrics.get(name, 0) for sample in answers) / len(answers)
    ages = [version - sampled_by for sample in samples for sampled_by in sample.weight_versions]
    if ages:
        metrics["staleness_max"] = max(ages)
        metrics["staleness"] = [ages.count(age) for age in range(max(ages) + 1)]
    return metrics


def describe_evaluation(samples: list[Sample], metrics: dict) -> str:
    """Return an evaluation in one line: rewards, and what could not be judged."""
    prompts = len({sample.group for sample in samples})
    n = 1 + max(sample.index for sample in samples)
    of_n = (f"pass@{n}", f"majority@{n}") if n > 1 else ()
    shown = [key for key in metrics if key.startswith("held_out/") or key in of_n]
    more = "".join(f"  {key.removeprefix('held_out/')} {metrics[key]:.3f}" for key in shown)
    if errors := metrics.get("held_out_errors"):
        error = next(sample.error for sample in samples if sample.reward is None)
        which = f"{errors} of {len(samples)} answers could not be judged"
        more += f"  {which}, the first: {error[:200]}"
    if "held_out" in metrics:
        return f"held-out reward {metrics['held_out']:.3f} on {prompts} prompts{more}"
    return f"no held-out reward{more}"
