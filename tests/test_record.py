"""record.py: what a run writes, where that goes beside metrics.jsonl, and its profile. A whole run's files are looked at in test_loop_sync.py.

TensorBoard and Weights & Biases are no requirements of this repository; stand-ins take their place, with the calls that record.py makes of them.
"""

import json
import sys
from types import ModuleType

import pytest
import torch
import torch.distributed as dist

from loop_sync import Settings
from record import Record
from run import BadInput, RunSettings, check_run_settings


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
    wandb.init = lambda **about: told.append(("init", about["project"], about["name"])) or WandbRun()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    wandb.teardown = lambda exit_code: told.append(("end", exit_code))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return told


def record_of(monkeypatch, tmp_path, **changes) -> Record:
    monkeypatch.chdir(tmp_path)
    return Record(Settings(run=RunSettings(name="a", steps=3, **changes)), "sync", dist.group.WORLD)


def test_metrics_reach_the_boards(one_rank, monkeypatch, tmp_path, boards):
    with record_of(monkeypatch, tmp_path, tensorboard=True, wandb="project") as record:
        record.log({"step": 1, "loss": 0.5, "staleness": [3, 1]})
    assert boards == [
        ("open", "runs/a/tensorboard", None), ("init", "project", "a"),
        ("scalar", "step", 1, 1), ("scalar", "loss", 0.5, 1), ("flush",), ("wandb", {"step": 1, "loss": 0.5}, 1), ("end", 0),
    ]  # fmt: skip
    assert json.loads((tmp_path / "runs/a/metrics.jsonl").read_text(encoding="utf-8")) == {"step": 1, "loss": 0.5, "staleness": [3, 1]}


def test_wandb_is_told_that_a_run_failed(one_rank, monkeypatch, tmp_path, boards):
    with pytest.raises(KeyboardInterrupt), record_of(monkeypatch, tmp_path, wandb="project"):
        raise KeyboardInterrupt
    assert boards == [("init", "project", "a"), ("end", 1)]


@pytest.mark.parametrize("changes, line", [(dict(tensorboard=True), "pip install tensorboard=="), (dict(wandb="p"), "pip install wandb==")])
def test_a_board_that_is_not_installed_is_named_before_the_start(monkeypatch, changes, line):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadInput, match=line):
        check_run_settings(RunSettings(**changes))


def test_rollouts_that_are_not_there_are_named_before_the_start(tmp_path):
    (tmp_path / "step-000001.jsonl").write_text("", encoding="utf-8")
    check_run_settings(RunSettings(load_rollouts=str(tmp_path), steps=1))
    with pytest.raises(BadInput, match="has no step-000002.jsonl"):
        check_run_settings(RunSettings(load_rollouts=str(tmp_path), steps=2))
    with pytest.raises(BadInput, match="starts no engine"):
        check_run_settings(RunSettings(load_rollouts=str(tmp_path), steps=1, debug_rollout_only=True))


def test_chosen_steps_are_profiled(one_rank, monkeypatch, tmp_path):
    record = record_of(monkeypatch, tmp_path, profile=(2,))
    for step in range(4):
        if step == 2:
            torch.ones(3).cumsum(0)
        record.log({"step": step})
    (profile,) = (tmp_path / "runs/a/profile").iterdir()
    assert profile.name == "step-2-rank-0.json"
    assert any(event.get("name") == "aten::cumsum" for event in json.loads(profile.read_text(encoding="utf-8"))["traceEvents"])
