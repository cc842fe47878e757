"""reasoning-gym's problems and scores: endless, seeded, apart from the held-out ones, and safe.

Why: some of its scorers run the model's answer as Python, so those tasks are refused and no row may
name the task that judges it. The package is no requirement of this repository: a stand-in takes its
place, reasoning_gym_stand_in.py. Not covered: later versions of the package, and that the tasks
which are allowed evaluate nothing.
"""

import sys
from itertools import islice

import pytest

from common.errors import BadInput
from common.settings import RolloutSettings
from data import reasoning_gym_tasks
from data.sample import Sample
from harness.checks import check_reward_flags
from prompt_helpers import data, read, write
from reward import RewardSettings, reasoning_gym_reward

pytest_plugins = ["prompt_helpers", "reasoning_gym_stand_in"]  # the fixtures tokenizer and gym


def test_reasoning_gym_problems_are_endless_seeded_and_disjoint_of_the_held_out(gym):
    def rows(seed):
        # More than two chunks of 500 problems.
        return list(islice(reasoning_gym_tasks.problems("chain_sum", seed=seed), 1200))

    one, again, two, held_out = (rows(seed) for seed in (1, 1, 2, "held-out"))
    assert one == again and len({row["prompt"] for row in [*one, *two, *held_out]}) == 3600
    a, b = one[1100]["prompt"][:-1].split("+")
    assert one[1100]["label"] == str(int(a) + int(b))
    assert one[1100]["notes"] == {"reasoning_gym": ["chain_sum", 1, 1100]}


def test_reasoning_gym_judges_its_own_problems(gym):
    both = data(
        prompts=("toy", "reasoning-gym:chain_sum:2"),
        eval_prompts=("reasoning-gym:chain_sum",),
        eval_samples=4,
    )
    assert [sample.source for sample in both.held_out] == ["chain_sum"] * 4
    trained = [sample for sample in islice(both.stream, 60) if sample.source == "chain_sum"]
    assert len(trained) > 20
    assert not {sample.prompt for sample in trained} & {sample.prompt for sample in both.held_out}
    sample = trained[0]
    sample = Sample.from_json(sample.to_json())
    label, prose = sample.label, f"it is {sample.label}"
    for response, expected, answer in [
        (label, 1.0, label),
        (f"thus <answer>1</answer>, no: <answer> {label} </answer>.", 1.0, label),
        (prose, len(label) / len(prose), prose),
        ("", 0.0, ""),
    ]:
        sample.response = response
        assert reasoning_gym_reward(sample) == pytest.approx(expected)
        assert sample.answer == answer
    # This sample is none of its problems, so it is judged as mathematics.
    assert reasoning_gym_reward(Sample([1], label="4", response="so \\boxed{4.0}")) == 1


@pytest.mark.parametrize("task, message", [
    ("chain_sums", "chain_sums is not a task of reasoning-gym; it has chain_sum, gcd$"),
    ("countdown", "refused: its scorer runs the model's answer as Python"),
])  # fmt: skip
def test_tasks_that_cannot_be_used(gym, task, message):
    with pytest.raises(BadInput, match=message):
        data(prompts=(f"reasoning-gym:{task}",))


def test_a_row_cannot_name_the_task_that_judges_it(gym, tokenizer, tmp_path):
    """Some scorers run the answer as Python.

    The program ignores a row's own `notes`, and a refused task judges nothing.
    """
    rows = {
        "prompt": "1+2=",
        "label": "3",
        "metadata": {"reasoning_gym": ["countdown", 1, 0]},
        "notes": {"reasoning_gym": ["countdown", 1, 0]},
    }
    (sample,) = read(write(tmp_path / "p.jsonl", rows), tokenizer)
    assert sample.notes == {}
    with pytest.raises(ValueError, match="reasoning-gym:countdown is refused"):
        reasoning_gym_tasks.score("3", "countdown", 1, 0)


def test_without_the_package_the_install_line_is_named(monkeypatch):
    # With None here an import fails, as if the package were not installed.
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    line = "needs the package reasoning-gym .*: pip install reasoning-gym==0.1.25"
    with pytest.raises(BadInput, match=line):
        data(prompts=("reasoning-gym:chain_sum",))


def test_its_reward_needs_its_problems():
    settings = RewardSettings(reward="reasoning_gym")
    rule = "--prompts has none: add one such as reasoning-gym:chain_sum, or use --reward math"
    with pytest.raises(BadInput, match=rule):
        check_reward_flags(settings, RolloutSettings())
    check_reward_flags(settings, RolloutSettings(prompts=("toy", "reasoning-gym:gcd:0.1")))


def test_a_rows_own_fields_are_its_own(tokenizer, tmp_path):
    """The program writes its fields beside metadata, so a row may name its own freely."""
    own = {"answer": 7, "source": "book", "error": "none", "reasoning_gym": ["gcd"], "abort": 1}
    path = write(tmp_path / "p.jsonl", {"prompt": "1+2=", "label": "3", "metadata": own})
    (sample,) = read(path, tokenizer)
    written = (sample.source, sample.answer, sample.error, sample.notes)
    assert sample.metadata == own
    assert written == ("file", None, "", {})
    sample.response, sample.finish_reason = "3", "stop"
    assert reasoning_gym_reward(sample) == 1 and sample.metadata == own and sample.answer == "3"
