"""A run's folder and record: its name, its lock, its boards, its profile, and how it goes on.

Why: two runs in one folder, or rows behind a checkpoint, mix the figures of two runs. What a run
shows to people is in test_record_shown.py, a whole run's files in test_loop_sync.py. TensorBoard
and Weights & Biases are no requirements of this repository: stand-ins take the calls that the
record makes. Not covered: the two packages themselves.
"""

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

from common.errors import BadInput
from common.settings import RunSettings
from conftest import ROOT
from data.sample import Sample
from harness import exits
from harness import record as record_module
from harness.checkpoint import Checkpoint
from harness.checks import check_run_flags
from harness.evaluate import eval_metrics
from harness.record import Record
from harness.run_folder import lock_run_folder, new_run_folder
from loop_sync import Settings


@pytest.fixture
def boards(monkeypatch):
    """Put stand-ins in place of both boards. Return the list of calls that they get."""
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

    def init(**about):
        told.append(("init", about["project"], about["name"], about["id"]))
        return WandbRun()

    wandb.init = init
    wandb.teardown = lambda exit_code: told.append(("end", exit_code))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return told


def record_of(monkeypatch, tmp_path, name="a", resumed=None, **changes) -> Record:
    monkeypatch.chdir(tmp_path)
    settings = Settings(run=RunSettings(name=name, steps=3, **changes))
    return Record(settings, "sync", dist.group.WORLD, resumed=resumed)


def resumed_at(record: Record, step: int) -> Checkpoint:
    """Return the checkpoint that the run would write now, before it ends."""
    record.lock.close()
    folder = record.folder / "checkpoints" / f"step-{step:06d}"
    return Checkpoint(folder, step, {"record": record.positions()})


def test_metrics_reach_the_boards(one_rank, monkeypatch, tmp_path, boards):
    with record_of(monkeypatch, tmp_path, tensorboard=True, wandb="project") as record:
        record.log({"step": 1, "loss": 0.5, "staleness": [3, 1]})
    assert boards.pop(1)[:3] == ("init", "project", "a")
    assert boards == [
        ("open", "runs/a/tensorboard", None),
        ("scalar", "step", 1, 1), ("scalar", "loss", 0.5, 1), ("flush",),
        ("wandb", {"step": 1, "loss": 0.5}, 1), ("end", 0),
    ]  # fmt: skip
    row = json.loads((tmp_path / "runs/a/metrics.jsonl").read_text(encoding="utf-8"))
    assert row == {"step": 1, "loss": 0.5, "staleness": [3, 1]}


def test_wandb_is_told_that_a_run_failed(one_rank, monkeypatch, tmp_path, boards):
    with pytest.raises(KeyboardInterrupt), record_of(monkeypatch, tmp_path, wandb="project"):
        raise KeyboardInterrupt
    assert [told[0] for told in boards] == ["init", "end"]
    assert boards[-1] == ("end", 1)


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
    events = json.loads(profile.read_text(encoding="utf-8"))["traceEvents"]
    assert "aten::cumsum" in [event.get("name") for event in events]


# --- a run's name -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "lr1/seed1", "2026-11-25_x.y", "_", "A/b/C"])
def test_plain_names_are_taken(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    check_run_flags(RunSettings(name=name))
    assert new_run_folder(name, "sync").is_dir()


@pytest.mark.parametrize("name", [
    "/tmp/runs/a", "../a", "a/../b", "a/..", ".", "./a", "a/", "a//b", "-a", "a/-b", ".hidden",
    "a:b", "a#1", "a?", "a%20", "a b", "a\\b", "a\n", "é", "x" * 129,
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
    """Both may pass the check before one of them begins. The second to create the folder fails."""
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
    assert (first, second) == ("lr1/seed1", "lr2/seed1")
    assert first_id != second_id
    assert not {*first_id, *second_id} & set("/\\#?%:")  # W&B refuses these in an id


def test_a_resumed_run_is_the_same_run_to_wandb(one_rank, monkeypatch, tmp_path, boards):
    record = record_of(monkeypatch, tmp_path, wandb="project")
    record_of(monkeypatch, tmp_path, wandb="project", resumed=resumed_at(record, 1))
    assert boards[0] == boards[1]


def test_a_name_that_comes_again_is_a_new_run_to_wandb(one_rank, monkeypatch, tmp_path, boards):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        record_of(monkeypatch, tmp_path / folder, wandb="project")
    (_, _, first, first_id), (_, _, second, second_id) = boards
    assert first == second
    assert first_id != second_id


def test_a_stopped_run_says_the_whole_name_to_go_on_with(one_rank, monkeypatch, tmp_path, capsys):
    record = record_of(monkeypatch, tmp_path, name="exp/a")
    monkeypatch.setattr(exits, "told_to_stop", [signal.SIGTERM])
    record.log({"step": 1})
    record.finish()
    said = capsys.readouterr().out
    assert "as asked by SIGTERM: go on with --name exp/a --resume" in said


def test_a_second_run_of_one_name_is_refused_while_the_first_lives(one_rank, monkeypatch, tmp_path):
    """The first run keeps its rows, even if the second resumes a checkpoint of the first."""
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
import os, pathlib, sys
from harness import run_folder
lock = run_folder.lock_run_folder(pathlib.Path(sys.argv[1]))
os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT)
    assert done.returncode == -9
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
    said = capfd.readouterr().err
    assert "going on from runs/a/checkpoints/step-000001" in said
    assert "; the 2 rows of metrics.jsonl that followed it are dropped" in said


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
    """No step is left to go on with, so the run exports its weights."""
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
    assert said in (text := capfd.readouterr().err)
    assert "could not be judged, the first: ValueError('the label')" in text
    assert ("held_out" in row) == bool(reward) and row["held_out_errors"] == 2 - bool(reward)


def test_a_first_step_in_which_nothing_was_judged_is_recorded(
    one_rank, monkeypatch, tmp_path, capfd
):
    record_of(monkeypatch, tmp_path).log(
        {"step": 1, "reward_errors": 4, "zero_std_groups": 1.0, "truncated": 0.5}
    )
    assert "nothing was learned" not in capfd.readouterr().err
