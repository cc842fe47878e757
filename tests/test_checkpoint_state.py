"""checkpoint.save and checkpoint.restore in one process: what comes back, and what a failed save
leaves.

The trainer is the toy's, without an engine. Not covered: whole runs (test_checkpoint.py), other
layouts (test_layouts.py, test_checkpoint.py).
"""

import json
import os
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from megatron.core import dist_checkpointing

from backends.huggingface.config import read_config
from common.errors import EngineDied
from common.settings import RunSettings, TrainSettings
from data.sample import Sample
from harness import checkpoint
from harness.run_folder import checkpoints_of
from loop_sync import Settings
from losses import LossSettings
import train_step


def run_in(folder, settings) -> SimpleNamespace:
    """Return what checkpoint.save needs to know of a run of one rank."""
    everyone = torch.distributed.group.WORLD
    record = SimpleNamespace(
        folder=folder, is_writer=True, group=everyone, loop="sync", positions=dict
    )
    return SimpleNamespace(record=record, settings=settings, inputs={})


def toy_trainer(**settings) -> train_step.Trainer:
    toy = str(ROOT / "toy")
    limits = dict(steps=10, seed=1, temperature=1.0, max_response_tokens=8)
    return train_step.build_trainer(toy, TrainSettings(**settings), read_config(toy), **limits)


def test_restored_state_is_the_checkpoints_and_settings_are_the_commands(fresh_megatron, tmp_path):
    """Moments and the count of steps come from the checkpoint; learning rate, decay and Adam's
    constants from what the run is started with.
    """
    answer = dict(rollout_logprobs=[-1.0, -1.0], loss_mask=[1, 1], advantages=[1.0, -1.0])
    samples = [Sample([5, 6], response_ids=[7, 8], **answer)]
    run = run_in(tmp_path, Settings())

    def moments(trainer):
        return [
            state["exp_avg"]
            for optimizer in trainer.optimizer.chained_optimizers
            for state in optimizer.optimizer.state.values()
        ]

    before = toy_trainer(lr=1e-3, weight_decay=0.1, adam_beta2=0.95)
    train_step.update_policy(before, train_step.pack(before, samples), LossSettings())
    checkpoint.save(run, before, step=1, rank_state={})
    after = toy_trainer(
        lr=1e-4,
        lr_schedule="constant",
        weight_decay=0.3,
        adam_beta2=0.9,
        megatron=("adam_eps=1e-3",),
    )
    saved = tmp_path / "checkpoints" / "step-000001"
    checkpoint.restore(
        checkpoint.Checkpoint(
            saved, 1, json.loads((saved / "state.json").read_text(encoding="utf-8"))
        ),
        after,
    )
    for group in after.optimizer.param_groups:
        assert group["lr"] == 1e-4
        assert group["weight_decay"] == 0.3 * group["wd_mult"]
        assert group["betas"] == (0.9, 0.9)
        assert group["eps"] == 1e-3
    assert after.scheduler.num_steps == 1
    assert all(map(torch.equal, moments(before), moments(after)))
    assert any(moment.any() for moment in moments(after))
    states = [
        state
        for optimizer in after.optimizer.chained_optimizers
        for state in optimizer.optimizer.state.values()
    ]
    assert {float(state["step"]) for state in states} == {1.0}
    # Each parameter counts for itself: a count that they shared would grow once for each of them.
    train_step.update_policy(after, train_step.pack(after, samples), LossSettings())
    assert {float(state["step"]) for state in states} == {2.0}


@pytest.mark.parametrize("rank, drawn_by", [(0, 0), (1, 1), (2, 0)])
def test_a_rank_draws_on_as_it_did(fresh_megatron, tmp_path, monkeypatch, rank, drawn_by):
    """The checkpoint is of two trainers and a rank that generates. A third draws as the first."""
    trainer = toy_trainer()
    answer = dict(response_ids=[7], rollout_logprobs=[-1.0], loss_mask=[1], advantages=[1.0])
    samples = [Sample([5, 6], **answer)]
    train_step.update_policy(trainer, train_step.pack(trainer, samples), LossSettings())
    states, draws = [], []
    for seed in (5, 6):
        torch.manual_seed(seed)
        states.append(checkpoint.generators())
        draws.append(torch.rand(4).tolist())
    checkpoint.save(run_in(tmp_path, Settings()), trainer, step=1, rank_state={})
    ranks = [{"generators": states[0]}, {"generators": states[1]}, {"prompts": 3}]
    monkeypatch.setattr(checkpoint, "dist", SimpleNamespace(get_rank=lambda: rank))
    saved = tmp_path / "checkpoints" / "step-000001"
    checkpoint.restore(checkpoint.Checkpoint(saved, 1, {"ranks": ranks}), trainer)
    assert torch.rand(4).tolist() == draws[drawn_by] != draws[1 - drawn_by]


def test_a_part_that_is_written_elsewhere_leaves_the_checkpoints_before(
    fresh_megatron, tmp_path, monkeypatch
):
    trainer = toy_trainer()
    run = run_in(tmp_path, Settings(run=RunSettings(keep=1)))
    answer = dict(response_ids=[7], rollout_logprobs=[-1.0], loss_mask=[1], advantages=[1.0])
    samples = [Sample([5, 6], **answer)]
    train_step.update_policy(trainer, train_step.pack(trainer, samples), LossSettings())
    checkpoint.save(run, trainer, step=1, rank_state={})
    stock = dist_checkpointing.save

    def save_elsewhere(state, folder, **kwargs):
        stock(state, folder, **kwargs)
        os.unlink(os.path.join(folder, "__0_0.distcp"))

    monkeypatch.setattr(dist_checkpointing, "save", save_elsewhere)
    with pytest.raises(RuntimeError, match="__0_0.distcp is missing; a rank wrote it elsewhere"):
        checkpoint.save(run, trainer, step=2, rank_state={})
    assert [path.name for path in checkpoints_of(tmp_path)] == ["step-000001"]


def test_an_engine_that_dies_during_a_save_is_no_full_disk(monkeypatch, tmp_path):
    def dies(*args):
        raise EngineDied("rank 0: a process died")

    monkeypatch.setattr(checkpoint, "all_gather_bytes", dies)
    record = SimpleNamespace(folder=tmp_path, is_writer=False, group=None)
    run = SimpleNamespace(record=record, settings=Settings())
    with pytest.raises(EngineDied, match="rank 0: a process died"):
        checkpoint.save(run, None, step=1, rank_state={})


def test_a_checkpoint_is_a_folder_named_by_its_step_and_steps_count_as_numbers(tmp_path):
    names = [
        "step-000001-hf",
        "step-999999",
        "step-1000000",
        "step-000002.part",
        "step-x",
        "step-000003",
    ]
    for name in names:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-2000000").write_text("a file", encoding="utf-8")
    assert [path.name for path in checkpoints_of(tmp_path)] == [
        "step-000003",
        "step-999999",
        "step-1000000",
    ]


def test_changed_weights_change_the_digest_of_a_folder(tmp_path):
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    weights = bytearray(10_000_000)  # more than 64 parts of 64 KiB
    (tmp_path / "model.safetensors").write_bytes(weights)
    digest = checkpoint.folder_digest(tmp_path)
    weights[5 * (10_000_000 // 64)] = 1
    (tmp_path / "model.safetensors").write_bytes(weights)
    assert checkpoint.folder_digest(tmp_path) != digest
