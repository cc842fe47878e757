"""record.py: what a run writes, where that goes beside metrics.jsonl, and its profile.

A whole run's files are looked at in test_loop_sync.py.

TensorBoard and Weights & Biases are no requirements of this repository; stand-ins take their place,
with the calls that record.py makes of them.
"""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
from types import ModuleType
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from harness import exits, record as record_module
from harness.checkpoint import Checkpoint
from conftest import ROOT
from common.errors import BadInput
from common.settings import RunSettings
from common.timeline import mark_evaluation
from data.sample import Sample
from harness.checks import check_run_flags
from harness.evaluate import eval_metrics
from harness.record import Record
from harness.run_folder import lock_run_folder, new_run_folder
from loop_sync import Settings


@pytest.fixture
def boards(monkeypatch):
    """What the stand-ins were told."""
    told = []
    tensorboard, wandb = ModuleType("torch.utils.tensorboard"), ModuleType("wandb")

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            told.append(("open", str(folder), purge_step))

        def add_scalar(self, key, value, step):
            told.append(("scalar", key, value, step))

        def flush(self):
            told.append(("flush",))

    class WandbRun:
        def log(self, metrics, step):
            told.append(("wandb", metrics, step))

    tensorboard.SummaryWriter = SummaryWriter
    wandb.init = lambda **about: (
        told.append(("init", about["project"], about["name"], about["id"])) or WandbRun()
    )
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    wandb.teardown = lambda exit_code: told.append(("end", exit_code))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return told


def record_of(monkeypatch, tmp_path, name="a", resumed=None, **changes) -> Record:
    monkeypatch.chdir(tmp_path)
    return Record(
        Settings(run=RunSettings(name=name, steps=3, **changes)),
        "sync",
        dist.group.WORLD,
        resumed=resumed,
    )


def resumed_at(record: Record, step: int) -> Checkpoint:
    """The checkpoint that would be written now, by a run that then ends."""
    record.lock.close()
    return Checkpoint(
        record.folder / "checkpoints" / f"step-{step:06d}", step, {"record": record.positions()}
    )


def test_metrics_reach_the_boards(one_rank, monkeypatch, tmp_path, boards):
    with record_of(monkeypatch, tmp_path, tensorboard=True, wandb="project") as record:
        record.log({"step": 1, "loss": 0.5, "staleness": [3, 1]})
    assert boards.pop(1)[:3] == ("init", "project", "a")
    assert boards == [
        ("open", "runs/a/tensorboard", None),
        ("scalar", "step", 1, 1), ("scalar", "loss", 0.5, 1), ("flush",), ("wandb", {"step": 1, "loss": 0.5}, 1), ("end", 0),
    ]  # fmt: skip
    assert json.loads((tmp_path / "runs/a/metrics.jsonl").read_text(encoding="utf-8")) == {
        "step": 1,
        "loss": 0.5,
        "staleness": [3, 1],
    }


def test_wandb_is_told_that_a_run_failed(one_rank, monkeypatch, tmp_path, boards):
    with pytest.raises(KeyboardInterrupt), record_of(monkeypatch, tmp_path, wandb="project"):
        raise KeyboardInterrupt
    assert [told[0] for told in boards] == ["init", "end"] and boards[-1] == ("end", 1)


@pytest.mark.parametrize(
    "changes, line",
    [
        (dict(tensorboard=True), "pip install tensorboard=="),
        (dict(wandb="p"), "pip install wandb=="),
    ],
)
def test_a_board_that_is_not_installed_is_named_before_the_start(monkeypatch, changes, line):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadInput, match=line):
        check_run_flags(RunSettings(**changes))


def test_rollouts_that_are_not_there_are_named_before_the_start(tmp_path):
    (tmp_path / "step-000001.jsonl").write_text("", encoding="utf-8")
    check_run_flags(RunSettings(load_rollouts=str(tmp_path), steps=1))
    with pytest.raises(BadInput, match="has no step-000002.jsonl"):
        check_run_flags(RunSettings(load_rollouts=str(tmp_path), steps=2))
    with pytest.raises(BadInput, match="starts no engine"):
        check_run_flags(RunSettings(load_rollouts=str(tmp_path), steps=1, debug_rollout_only=True))


def test_chosen_steps_are_profiled(one_rank, monkeypatch, tmp_path):
    record = record_of(monkeypatch, tmp_path, profile=(2,))
    for step in range(1, 4):
        record.start_step(step)
        if step == 2:
            torch.ones(3).cumsum(0)
        record.log({"step": step})
    (profile,) = (tmp_path / "runs/a/profile").iterdir()
    assert profile.name == "step-2-rank-0.json"
    assert any(
        event.get("name") == "aten::cumsum"
        for event in json.loads(profile.read_text(encoding="utf-8"))["traceEvents"]
    )


# --- a run's name -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "lr1/seed1", "2026-11-25_x.y", "_", "A/b/C"])
def test_plain_names_are_taken(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    check_run_flags(RunSettings(name=name))
    assert new_run_folder(name, "sync").is_dir()


@pytest.mark.parametrize("name", [
    "/tmp/runs/a", "../a", "a/../b", "a/..", ".", "./a", "a/", "a//b", "-a", "a/-b", ".hidden", "a:b", "a#1", "a?", "a%20", "a b", "a\\b",
    "a\n", "é", "x" * 129,
])  # fmt: skip
def test_other_names_are_refused(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match="--name .* must be at most 128 letters"):
        check_run_flags(RunSettings(name=name))


def test_a_name_that_is_taken_is_refused(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "exp" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "exp" / "a" / "settings.json").write_text("{}", encoding="utf-8")
    for name in ("exp", "exp/a"):
        with pytest.raises(BadInput, match=f"runs/{name} already exists: choose another --name"):
            check_run_flags(RunSettings(name=name))
    with pytest.raises(BadInput, match="--name exp/a/checkpoints lies inside the run exp/a"):
        check_run_flags(RunSettings(name="exp/a/checkpoints"))


def test_two_runs_of_one_name_do_not_share_a_folder(monkeypatch, tmp_path):
    """Both may have passed the check before one of them begins: the second to create the folder is
    refused.
    """
    monkeypatch.chdir(tmp_path)
    new_run_folder("a", "sync")
    with pytest.raises(BadInput, match="runs/a already exists"):
        new_run_folder("a", "sync")


def test_unnamed_runs_of_one_second_have_folders_of_their_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("harness.run_folder.time.strftime", lambda _: "20261125-120000")
    folders = [new_run_folder("", "sync").name for _ in range(3)]
    assert folders == ["sync-20261125-120000", "sync-20261125-120000-2", "sync-20261125-120000-3"]


def test_a_folder_that_cannot_be_created_is_named(one_rank, monkeypatch, tmp_path):
    (tmp_path / "runs").write_text("a file", encoding="utf-8")
    with pytest.raises(BadInput, match="a folder below runs/ cannot be created"):
        record_of(monkeypatch, tmp_path)


def test_runs_of_one_last_name_are_two_runs_to_wandb(one_rank, monkeypatch, tmp_path, boards):
    for name in ("lr1/seed1", "lr2/seed1"):
        record_of(monkeypatch, tmp_path, name=name, wandb="project")
    (_, _, first, first_id), (_, _, second, second_id) = boards
    assert (first, second) == ("lr1/seed1", "lr2/seed1") and first_id != second_id
    assert not {*first_id, *second_id} & set("/\\#?%:")  # what W&B refuses in an id


def test_a_resumed_run_is_the_same_run_to_wandb(one_rank, monkeypatch, tmp_path, boards):
    record = record_of(monkeypatch, tmp_path, wandb="project")
    record_of(monkeypatch, tmp_path, wandb="project", resumed=resumed_at(record, 1))
    assert boards[0] == boards[1]


def test_a_name_that_comes_again_is_a_new_run_to_wandb(one_rank, monkeypatch, tmp_path, boards):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        record_of(monkeypatch, tmp_path / folder, wandb="project")
    assert boards[0][2] == boards[1][2] and boards[0][3] != boards[1][3]


def test_a_stopped_run_says_the_whole_name_to_go_on_with(one_rank, monkeypatch, tmp_path, capsys):
    record = record_of(monkeypatch, tmp_path, name="exp/a")
    monkeypatch.setattr(exits, "told_to_stop", [signal.SIGTERM])
    record.log({"step": 1})
    record.finish()
    said = capsys.readouterr().out
    assert "as asked by SIGTERM: go on with --name exp/a --resume" in said


def test_a_second_run_of_one_name_is_refused_while_the_first_lives(one_rank, monkeypatch, tmp_path):
    """Nothing of the first is cut: not by --resume of a checkpoint that it has written either."""
    record = record_of(monkeypatch, tmp_path)
    saved = Checkpoint(tmp_path, 0, {"record": record.positions()})
    record.log({"step": 1})
    who = f"another run, process {os.getpid()} on"
    with pytest.raises(BadInput, match=f"runs/a is being written by {who}"):
        record_of(monkeypatch, tmp_path, resumed=saved)
    record.log({"step": 2})
    rows = (tmp_path / "runs/a/metrics.jsonl").read_text(encoding="utf-8")
    assert rows == '{"step": 1}\n{"step": 2}\n'


def test_a_killed_run_frees_its_folder(monkeypatch, tmp_path):
    code = """
import os, pathlib, sys, run_folder
lock = run_folder.lock_run_folder(pathlib.Path(sys.argv[1]))
os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT)
    lock_run_folder(tmp_path).close()
    assert (tmp_path / "lock").read_text(encoding="utf-8").startswith(f"process {os.getpid()} on ")


def test_a_file_system_without_locks_is_said(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("fcntl.flock", mock.Mock(side_effect=OSError(errno.ENOLCK, "No locks")))
    lock_run_folder(tmp_path)
    assert "has no locks (No locks): start no second run of this name" in capsys.readouterr().err


def test_what_killed_ranks_left_of_checkpoints_is_removed(one_rank, monkeypatch, tmp_path):
    saved = resumed_at(record_of(monkeypatch, tmp_path), 1)
    names = ["step-000001", "step-000002.part", "step-000003.part", "step-x.part", "mine.part"]
    for name in names:
        (tmp_path / "runs/a/checkpoints" / name).mkdir(parents=True)
    record_of(monkeypatch, tmp_path, resumed=saved)
    left = {path.name for path in (tmp_path / "runs/a/checkpoints").iterdir()}
    assert left == {"step-000001", "step-x.part", "mine.part"}


# --- going on -----------------------------------------------------------------------------------


def test_the_hours_between_do_not_count(one_rank, monkeypatch, tmp_path, capsys):
    now = [1000.0]
    monkeypatch.setattr(record_module.time, "time", lambda: now[0])
    record = record_of(monkeypatch, tmp_path)
    now[0] += 60
    saved = resumed_at(record, 1)
    now[0] += 1e6
    record = record_of(monkeypatch, tmp_path, resumed=saved)
    now[0] += 5
    record.finish()
    assert "in 3 steps, 65 s;" in capsys.readouterr().out


def test_rows_behind_the_checkpoint_are_dropped_and_announced(
    one_rank, monkeypatch, tmp_path, capfd
):
    record = record_of(monkeypatch, tmp_path)
    record.log({"step": 1})
    saved = resumed_at(record, 1)
    record.log({"step": 2})
    record.log({"step": 3})
    record_of(monkeypatch, tmp_path, resumed=saved)
    assert (tmp_path / "runs/a/metrics.jsonl").read_text(encoding="utf-8") == '{"step": 1}\n'
    assert (
        "going on from runs/a/checkpoints/step-000001; the 2 rows of metrics.jsonl that followed it"
        " are dropped" in capfd.readouterr().err
    )


@pytest.mark.parametrize(
    "save_every, resumed, due",
    [(0, False, []), (2, False, [2, 3]), (0, True, [3]), (5, False, [3]), (1, True, [1, 2, 3])],
)
def test_a_run_that_has_checkpoints_writes_its_last_one(
    one_rank, monkeypatch, tmp_path, save_every, resumed, due
):
    record = record_of(monkeypatch, tmp_path, save_every=save_every)
    if resumed:
        record = record_of(
            monkeypatch, tmp_path, save_every=save_every, resumed=resumed_at(record, 0)
        )
    assert [step for step in (1, 2, 3) if record.checkpoint_due(step)] == due


@pytest.mark.parametrize("save_every", [0, 2])
def test_a_run_that_is_told_to_stop_writes_a_checkpoint_now(
    one_rank, monkeypatch, tmp_path, save_every
):
    record = record_of(monkeypatch, tmp_path, save_every=save_every)
    assert not record.checkpoint_due(1)
    monkeypatch.setattr(exits, "told_to_stop", [signal.SIGHUP])
    record.log({"step": 1})
    assert record.checkpoint_due(1) and record.stopping


def test_a_run_that_is_told_to_stop_in_its_last_step_saves_and_finishes(
    one_rank, monkeypatch, tmp_path
):
    """There is nothing to go on with: its weights are exported."""
    record = record_of(monkeypatch, tmp_path)
    monkeypatch.setattr(exits, "told_to_stop", [signal.SIGTERM])
    record.log({"step": 3})
    assert record.checkpoint_due(3) and not record.stopping


# --- a first step that teaches nothing ----------------------------------------------------------


@pytest.mark.parametrize(
    "step, zero_std_groups, said", [(1, 1.0, True), (1, 0.9, False), (2, 1.0, False)]
)
def test_a_first_step_without_a_difference_of_rewards_is_said(
    one_rank, monkeypatch, tmp_path, capfd, step, zero_std_groups, said
):
    record = record_of(monkeypatch, tmp_path)
    record.log({"step": step, "reward": 0.0, "zero_std_groups": zero_std_groups, "truncated": 0.5})
    line = (
        "step 1: the rewards of each prompt's answers are all equal (mean 0.000), so nothing was"
        " learned"
    )
    assert (line in capfd.readouterr().err) == said


def test_a_profile_of_a_step_that_never_comes_is_refused():
    with pytest.raises(
        BadInput, match="--profile 90 is no step of the run, which has steps 1 to 80"
    ):
        check_run_flags(RunSettings(profile=(3, 90)))


@pytest.mark.parametrize(
    "reward, said", [(None, "no held-out reward  2 of 2 answers"), (1.0, "held-out reward 1.000")]
)
def test_an_evaluation_in_which_answers_could_not_be_judged_says_so(
    one_rank, monkeypatch, tmp_path, capfd, reward, said
):
    samples = [
        Sample([1], group=0, reward=reward),
        Sample([1], group=1, error="ValueError('the label')"),
    ]
    samples[0].error = "" if reward else "ValueError('the label')"
    with record_of(monkeypatch, tmp_path) as record:
        row = record.log_eval(1, samples, eval_metrics(samples))
    assert (
        said in (text := capfd.readouterr().err)
        and "could not be judged, the first: ValueError('the label')" in text
    )
    assert ("held_out" in row) == bool(reward) and row["held_out_errors"] == 2 - bool(reward)


def test_a_first_step_in_which_nothing_was_judged_is_recorded(
    one_rank, monkeypatch, tmp_path, capfd
):
    record_of(monkeypatch, tmp_path).log(
        {"step": 1, "reward_errors": 4, "zero_std_groups": 1.0, "truncated": 0.5}
    )
    assert "nothing was learned" not in capfd.readouterr().err


# --- samples, the bar and the last line ---------------------------------------------------------


def answers(prompts: int, per_prompt: int, *, source: str = "mine") -> list[Sample]:
    return [
        Sample([1], prompt=f"{source} {group}", group=group, index=index, reward=0.5, source=source)
        for group in range(prompts)
        for index in range(per_prompt)
    ]


def samples_of(tmp_path) -> list[dict]:
    lines = (tmp_path / "runs/a/samples.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_a_run_without_held_out_prompts_shows_answers(one_rank, monkeypatch, tmp_path):
    record = record_of(monkeypatch, tmp_path, eval_every=4)
    record.settings = dataclasses.replace(record.settings, steps=10)
    for step in range(1, 11):
        record.log_eval(step, [], {})
        record.log_samples(step, answers(3, 2))
    rows = samples_of(tmp_path)
    assert {row["split"] for row in rows} == {"train"}
    assert list(dict.fromkeys(row["step"] for row in rows)) == [1, 4, 8, 10]


def test_a_few_answers_to_several_prompts_of_each_source_are_shown(one_rank, monkeypatch, tmp_path):
    record_of(monkeypatch, tmp_path).log_samples(1, answers(9, 16) + answers(2, 2, source="other"))
    prompts = [row["prompt"] for row in samples_of(tmp_path)]
    assert sorted(prompts) == [
        *(f"mine {group}" for group in range(8)), "other 0", "other 0", "other 1", "other 1",
    ]  # fmt: skip


def test_answers_of_an_evaluation_are_told_apart(one_rank, monkeypatch, tmp_path):
    record = record_of(monkeypatch, tmp_path)
    record.log_eval(0, answers(1, 1), {"held_out": 0.5})
    record.log_samples(1, answers(1, 1))
    assert [(row["step"], row["split"]) for row in samples_of(tmp_path)] == [
        (0, "held-out"),
        (1, "train"),
    ]


def test_an_answer_without_a_reward_says_why(one_rank, monkeypatch, tmp_path):
    record_of(monkeypatch, tmp_path).log_samples(
        1, [Sample([1], error="ValueError('no')"), Sample([1])]
    )
    assert [row.get("error") for row in samples_of(tmp_path)] == ["ValueError('no')", None]


def test_the_bars_clock_runs_from_the_first_step(one_rank, monkeypatch, tmp_path):
    record, now = record_of(monkeypatch, tmp_path), [0.0]
    started = record.bar.start_t
    record.bar._time = lambda: started + now[0]
    now[0] = 40.0  # the engine's start, and the evaluation before the first step
    record.log({"step": 0, "held_out": 0.5})
    record.start_step(1)
    now[0] = 42.0
    assert record.bar.format_dict["elapsed"] == pytest.approx(2)
    record.log({"step": 1, "reward": 0.5})
    assert record.bar.format_dict["elapsed"] == pytest.approx(2)


def test_the_bars_clock_of_a_resumed_run_runs_from_its_first_step(one_rank, monkeypatch, tmp_path):
    record = record_of(monkeypatch, tmp_path)
    record = record_of(monkeypatch, tmp_path, resumed=resumed_at(record, 2))
    started = record.bar.start_t
    record.bar._time = lambda: started + 40.0
    record.start_step(3)
    assert record.bar.format_dict["elapsed"] == pytest.approx(0)


def test_an_evaluation_is_no_rollout_of_the_timeline():
    """It was from 5 to 8, in front of it the first weights; a step's rollout followed at once."""
    spans = [("sync", 5.0, 5.5), ("wait", 5.5, 6.0), ("rollout", 6.0, 9.0), ("wait", 9.0, 10.0)]
    assert mark_evaluation(spans, 5.0, 8.0) == [
        ("sync", 5.0, 5.5), ("wait", 5.5, 6.0), ("evaluation", 6.0, 8.0), ("rollout", 8.0, 9.0),
        ("wait", 9.0, 10.0),
    ]  # fmt: skip


@pytest.mark.parametrize("reward_s, shown", [(0.5, True), (0.11, True), (0.05, False)])
def test_the_bar_shows_a_judge_that_takes_long(one_rank, monkeypatch, tmp_path, reward_s, shown):
    record = record_of(monkeypatch, tmp_path)
    seconds = {
        "rollout_s": 0.3,
        "reward_s": reward_s,
        "train_s": 0.15,
        "sync_s": 0.05,
        "step_s": 1.0,
    }
    record.log({"step": 1, "reward": 0.5, **seconds})
    reward = f"  reward {reward_s:.2f} s" if shown else ""
    assert record.bar.postfix == f"reward 0.50  rollout 0.30 s{reward}  train 0.15 s  sync 0.05 s"


def last_line(record: Record, capsys) -> str:
    record.finish()
    return capsys.readouterr().out.splitlines()[-1]


def test_the_last_line_names_only_what_is_there(one_rank, monkeypatch, tmp_path, capsys):
    record = record_of(monkeypatch, tmp_path, export=())
    assert last_line(record, capsys).endswith("; metrics are in runs/a")


def test_the_last_line_names_samples_and_weights(one_rank, monkeypatch, tmp_path, capsys):
    record = record_of(monkeypatch, tmp_path, export=("fp8",))
    record.log_samples(1, answers(1, 1))
    (tmp_path / "runs/a/model-fp8").mkdir()
    (tmp_path / "runs/a/model-fp8/config.json").write_text("{}", encoding="utf-8")
    assert last_line(record, capsys).endswith("; metrics, samples and weights are in runs/a")


@pytest.mark.parametrize("rows, said", [
    ([{"held_out": 0.25, "reward": 0.1}, {"held_out": 0.5, "reward": 0.2}], "held-out reward 0.250 -> 0.500 in 3 steps"),
    ([{"reward": 0.1}, {}, {"reward": 0.2}], "no held-out prompts; reward of the training steps 0.100 -> 0.200 in 3 steps"),
    ([{}], "no reward in 3 steps"),
])  # fmt: skip
def test_the_last_line_says_what_was_learned(one_rank, monkeypatch, tmp_path, capsys, rows, said):
    record = record_of(monkeypatch, tmp_path)
    for step, row in enumerate(rows, start=1):
        record.log({"step": step, **row})
    assert last_line(record, capsys).startswith(said)


def test_the_last_line_of_a_resumed_run_tells_of_all_of_it(one_rank, monkeypatch, tmp_path, capsys):
    record = record_of(monkeypatch, tmp_path)
    record.log({"step": 1, "reward": 0.1})
    record = record_of(monkeypatch, tmp_path, resumed=resumed_at(record, 1))
    record.log({"step": 2, "reward": 0.3})
    assert "0.100 -> 0.300" in last_line(record, capsys)
