"""--max-epochs ends a run after so many passes over the file of prompts, and never within a step.

Why: people count passes over their data, and a step too many would train on prompts once more than
they asked for. The number of steps is known before the start: schedule, record and --resume go by
it. Where a pass means nothing, the flag is refused. Not covered: the asynchronous loop, which takes
prompts from the same stream and counts the same steps.
"""

import collections
import dataclasses
import json
from types import SimpleNamespace

import pytest
from conftest import ROOT, metrics_of, torchrun
from prompt_helpers import data, write

from common.errors import BadInput
from common.settings import RolloutSettings, RunSettings, TrainSettings
from harness import checkpoint, epochs
from loop_sync import Settings

TEN = SimpleNamespace(prompts_of_a_pass=10)


def settings(*, prompts_per_step: int = 4, train: dict | None = None, **run) -> Settings:
    return Settings(
        run=RunSettings(**run),
        rollout=RolloutSettings(prompts_per_step=prompts_per_step),
        train=TrainSettings(**(train or {})),
    )


@pytest.mark.parametrize("max_epochs, steps, expected", [
    (0, 80, 80),  # no limit
    (1, 80, 2),  # 8 of the 10 prompts: a third step would begin the second pass
    (2, 80, 5),  # exactly
    (3, 80, 7),
    (2, 4, 4),  # --steps ends the run before
    (10**6, 80, 80),
])  # fmt: skip
def test_only_whole_steps_within_the_passes_are_made(max_epochs, steps, expected):
    before = settings(max_epochs=max_epochs, steps=steps)
    after = epochs.lower_steps(before, TEN)
    assert after.run.steps == expected
    assert dataclasses.replace(after, run=before.run) == before  # nothing else changes


def test_what_is_said_names_the_flag_that_ends_the_run():
    said = [
        epochs.describe(epochs.lower_steps(settings(max_epochs=2, steps=steps), TEN), TEN)
        for steps in (80, 4)
    ]
    assert said[0] == "--max-epochs 2: 5 steps, of 4 of the file's 10 prompts"
    assert said[1] == f"{said[0]}; --steps 4 ends the run before"


@pytest.mark.parametrize("changes, message", [
    (dict(max_epochs=1, prompts_per_step=11), "less than a step of --prompts-per-step 11"),
    (dict(max_epochs=2, train=dict(lr_warmup_steps=5)),
     "--lr-warmup-steps 5 must be smaller than the 5 steps of --max-epochs 2"),
    (dict(max_epochs=2, profile=(5, 6)), "--profile 6 is no step .* ends after step 5"),
])  # fmt: skip
def test_what_does_not_fit_the_fewer_steps_is_refused(changes, message):
    with pytest.raises(BadInput, match=message):
        epochs.lower_steps(settings(**changes), TEN)


@pytest.mark.parametrize("max_epochs, prompts, message", [
    (-1, ("a.jsonl",), "--max-epochs -1 must lie between 1 and 1,000,000, or be 0"),
    (10**20, ("a.jsonl",), "--max-epochs 100000000000000000000 must lie between"),
    (1, ("toy",), "the problems of --prompts toy never end: give a file"),
    (1, ("reasoning-gym:chain_sum:2",), "--prompts reasoning-gym:chain_sum never end"),
    (1, ("a.jsonl", "b.jsonl"), "--prompts draws from 2 sources by weight"),
    (1, ("a.jsonl", "toy"), "--prompts draws from 2 sources by weight"),
])  # fmt: skip
def test_where_a_pass_means_nothing_it_is_refused(max_epochs, prompts, message):
    with pytest.raises(BadInput, match=message):
        epochs.check_max_epochs(
            RunSettings(max_epochs=max_epochs), RolloutSettings(prompts=prompts)
        )


@pytest.mark.parametrize("max_epochs, prompts", [
    (0, ("toy",)), (0, ("a.jsonl", "toy")), (3, ("a.jsonl",)), (1, ("a.parquet:0.5",)),
    (1, ("a.jsonl:-1",)),  # check_rollout_flags refuses the weight
])  # fmt: skip
def test_where_a_pass_means_something_it_is_not_refused(max_epochs, prompts):
    epochs.check_max_epochs(RunSettings(max_epochs=max_epochs), RolloutSettings(prompts=prompts))


def test_the_prompts_of_a_pass_are_those_of_a_lone_file(tmp_path):
    rows = [{"prompt": f"{i}+1=", "label": str(i + 1)} for i in range(5)]
    one, other = (write(tmp_path / name, *rows) for name in ("a.jsonl", "b.jsonl"))
    assert data(prompts=(one,)).prompts_of_a_pass == 5
    assert data(prompts=(f"{one}:2",), eval_prompts=(other, "toy")).prompts_of_a_pass == 5
    assert data(prompts=(one, other)).prompts_of_a_pass is None
    assert data(prompts=("toy",)).prompts_of_a_pass is None


@pytest.mark.parametrize("max_epochs, refused", [(0, False), (2, True)])
def test_a_resumed_run_keeps_the_prompts_of_a_step(monkeypatch, tmp_path, max_epochs, refused):
    """With others the steps before the checkpoint would have taken another share of the passes."""
    then = json.loads(json.dumps(dataclasses.asdict(settings())))
    state = dict(settings=then, record={}, ranks=[], read={}, loop="sync")
    monkeypatch.setattr(checkpoint, "has_whole_rows", lambda *_, **__: True)
    newest = SimpleNamespace(state=state, folder=tmp_path, step=1)
    now = settings(prompts_per_step=8, max_epochs=max_epochs)
    problems = list(checkpoint._resume_problems(newest, now, {}))
    assert problems == refused * [
        f"--prompts-per-step was 4 when {tmp_path} was written, and is 8: it must stay the same"
    ]


@pytest.mark.complete
def test_a_run_takes_each_prompt_of_the_file_once_a_pass(tmp_path):
    """The last step is that of the passes: it evaluates, and the learning rate has come down."""
    rows = [{"prompt": f"{i}+{i}=", "label": str(2 * i)} for i in range(9)]
    flags = ["--prompts", write(tmp_path / "p.jsonl", *rows), "--max-epochs", "2"]
    flags += ["--prompts-per-step", "6", "--samples-per-prompt", "2", "--eval-prompts", "toy"]
    flags += ["--eval-samples", "4", "--save-rollouts", "--export", "--name", "run"]
    done = torchrun(ROOT / "loop_sync.py", *flags, ranks=1, cwd=tmp_path)
    assert "--max-epochs 2: 3 steps, of 6 of the file's 9 prompts" in done.stderr
    assert "in 3 steps" in done.stdout
    folder = tmp_path / "runs" / "run"
    metrics = metrics_of(folder)
    assert [row["step"] for row in metrics] == [0, 1, 2, 3] and "held_out" in metrics[-1]
    assert metrics[-1]["lr"] == pytest.approx(metrics[1]["lr"] / 3, rel=1e-3)
    taken = collections.Counter()
    for dump in sorted((folder / "rollouts").iterdir()):
        for line in dump.read_text(encoding="utf-8").splitlines():
            taken[json.loads(line)["prompt"]] += 1
    assert taken == {row["prompt"]: 2 * 2 for row in rows}  # passes, and answers to each
    about = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    assert (about["run"]["steps"], about["run"]["max_epochs"]) == (3, 2)
