"""Held-out prompts -> answers -> rewards -> metrics: mean reward, pass@k, majority@N."""

import math
from collections import Counter, defaultdict

from data.sample import Sample
import reward
import rollout


def held_out(run, engine, judge: reward.Judge, *, step: int, answer=rollout.answer) -> dict:
    """Answer every held-out prompt, judge the answers, print and return what they amount to.

    Each prompt gets --eval-samples-per-prompt answers. Every rank returns the same metrics; {} if
    the run has no held-out prompts. Collective over run.group. run: harness.start.Run.
    """
    settings = run.settings.rollout
    samples = rollout.generate(
        engine,
        list(rollout.engine_share(run.data.held_out, run)),
        run.data,
        settings,
        n=settings.eval_samples_per_prompt,
        answer=answer,
        cache="held-out",
    )
    reward.compute_rewards(samples, judge)
    samples = [sample for sample in samples if not sample.is_part]  # one for each answer
    samples = sorted(rollout.all_gather(samples, run.group), key=lambda sample: sample.group)
    return run.record.log_eval(step, samples, eval_metrics(samples))


def eval_metrics(samples: list[Sample]) -> dict[str, float]:
    """Return held_out, the mean reward. With N > 1 answers to a prompt also pass@k and majority@N.

    k is 1, 2, 4, ... and N. An answer is right if its reward is 1 or more. Answers that the reward
    function failed on count in held_out_errors only: held_out is the mean of the others, and pass@k
    that of the prompts with at least k others. A metric is missing where nothing is left of it.
    With several held-out sets KEY/SET is that of a set, and KEY the mean of the sets.
    """
    sets = defaultdict(list)
    for group in reward.by_group(samples):
        sets[group[0].source].append(group)
    of_set = {name: _set_metrics(groups) for name, groups in sets.items()}
    keys = dict.fromkeys(key for row in of_set.values() for key in row)
    rows = {key: [row[key] for row in of_set.values() if key in row] for key in keys}
    metrics = {key: sum(values) / len(values) for key, values in rows.items()}
    if errors := sum(sample.reward is None for sample in samples):
        metrics["held_out_errors"] = errors
    if len(of_set) > 1:
        metrics |= {f"{key}/{name}": x for name, row in of_set.items() for key, x in row.items()}
    return metrics


def _set_metrics(groups: list[list[Sample]]) -> dict[str, float]:
    """Return the metrics of one held-out set, from the answers to each of its prompts."""
    n = max(map(len, groups))
    scored = [[sample for sample in group if sample.reward is not None] for group in groups]
    rewards = [sample.reward for group in scored for sample in group]
    metrics = {"held_out": sum(rewards) / len(rewards)} if rewards else {}
    if n == 1:
        return metrics
    is_right = [[sample.reward >= 1 for sample in group] for group in scored]
    for k in sorted({n, *(2**i for i in range(n.bit_length()))}):
        if of_k := [pass_at_k(len(right), sum(right), k) for right in is_right if len(right) >= k]:
            metrics[f"pass@{k}"] = sum(of_k) / len(of_k)
    answers = [[s.response.strip() if s.answer is None else s.answer for s in g] for g in scored]
    if votes := [majority_is_right(*group) for group in zip(answers, is_right) if group[1]]:
        metrics[f"majority@{n}"] = sum(votes) / len(votes)
    return metrics


def pass_at_k(n: int, right: int, k: int) -> float:
    """Return the chance that one of k answers is right, from n answers of which `right` are.

    1 - C(n - right, k) / C(n, k), an estimate without bias; Chen et al. 2021, arXiv 2107.03374,
    equation 1.
    """
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def majority_is_right(answers: list[str], is_right: list[bool]) -> bool:
    """Tell whether the most frequent answer is right; of equally frequent ones, the first given.

    An empty answer has no vote. Right answers count as one answer however they are written: the
    reward function found them equal to the label. Wrong ones differ by what the reward function
    took for the answer (math, reasoning_gym), else by the whole response.
    """
    votes = Counter(
        "right" if right else ("wrong", answer)
        for answer, right in zip(answers, is_right)
        if answer or right
    )
    return bool(votes) and votes.most_common(1)[0][0] == "right"
