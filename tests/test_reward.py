"""reward.py: judging answers, and GRPO's advantages.

Not covered: judges that never return.
"""

import math

import pytest

from reward import Judge, batch_metrics, compute_rewards, exact_match, grpo_advantages, math_reward
from rollout import Sample


def answer(response="", label="", *, group=0, reward=None, finish="stop") -> Sample:
    answered = dict(response_ids=[5, 2], response=response, loss_mask=[1, 1], weight_versions=[3, 3], finish_reason=finish)
    return Sample([1], label=label, group=group, reward=reward, **answered)


def test_exact_match_wants_an_ended_answer():
    assert exact_match(answer("538", "538")) == 1
    assert exact_match(answer("5380", "538")) == 0
    assert exact_match(answer("538", "538", finish="length")) == 0  # cut off: whether it would have gone on is unknown


@pytest.mark.parametrize("response, label, expected", [
    (r"so \boxed{42}", "42", 1),
    (r"\boxed{\frac{1}{2}}", "0.5", 1),
    (r"first \boxed{3}, no: \boxed{4}", "4", 1),
    (r"first \boxed{3}, no: \boxed{4}", "3", 0),
    ("7 + 5 makes 12", "12", 1),
    ("The answer is 1,234.", "1234", 1),
    ("There are 45 chairs", "44", 0),
    (r"\boxed{x^2+2x+1}", "(x+1)^2", 1),
    ("I do not know", "12", 0),
    ("", "12", 0),
    (r"\boxed{", "12", 0),
])  # fmt: skip
def test_math_reward_compares_values(response, label, expected):
    assert math_reward(answer(response, label)) == expected


def test_grpo_by_hand():
    # rewards 1 0 0 1: mean 0.5, unbiased variance 4 * 0.25 / 3. A second group, all equal, has nothing to compare.
    samples = [answer(reward=r, group=g) for g, r in [(0, 1.0), (0, 0.0), (1, 1.0), (0, 0.0), (1, 1.0), (0, 1.0)]]
    grpo_advantages(samples)
    unit = 0.5 / (math.sqrt(1 / 3) + 1e-6)
    assert [sample.advantage for sample in samples] == pytest.approx([unit, -unit, 0, -unit, 0, unit])
    metrics = batch_metrics(samples, version=4)
    assert metrics["reward"] == pytest.approx(4 / 6) and metrics["zero_std_groups"] == 0.5 and metrics["staleness_max"] == 1


def test_a_failing_judge_is_counted_not_scored_zero(capsys):
    samples = [answer(label=label, group=0) for label in "abcd"]

    def judge(sample):
        if sample.label == "b":
            raise KeyError("judge is broken")
        return float("nan") if sample.label == "c" else float(sample.label == "a")

    compute_rewards(samples, Judge(judge))
    grpo_advantages(samples)
    assert [sample.reward for sample in samples] == [1.0, None, None, 0.0]
    assert samples[1].loss_mask == [0, 0] and samples[1].advantage == 0 and "judge is broken" in samples[1].metadata["reward_error"]
    assert samples[0].advantage == -samples[3].advantage > 0  # the mean is over the two that were scored
    assert batch_metrics(samples, version=3)["reward_errors"] == 2
    assert "judge is broken" in capsys.readouterr().out


def test_a_judge_that_fails_on_everything_stops_the_run():
    with pytest.raises(RuntimeError, match="all 2 samples"):
        compute_rewards([answer(), answer()], Judge(lambda sample: 1 / 0))
