"""A checkpoint that is damaged, hostile, or of another run is refused by name before the start.

It is that of a whole run. test_resume.py does the same with a small stand-in, whose contents it
writes itself.
"""

import json
import os
import pickle
import shutil

import pytest
import torch
from conftest import ROOT
from megatron.core import dist_checkpointing

from backends.huggingface.config import read_config
from common import process_groups
from common.errors import BadInput
from common.settings import RolloutSettings, RunSettings, TrainSettings
from data.prompts import load_data
from harness import checkpoint
import loop_async
from loop_sync import Settings
from reward import RewardSettings

pytestmark = pytest.mark.usefixtures("more")


def find(folder, monkeypatch, loop="sync", read=None, reward="exact", train=None, **changes):
    monkeypatch.chdir(folder.parent.parent)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    settings = loop_async.Settings if loop == "async" else Settings
    parts = dict(
        run=RunSettings(name=folder.name, **changes),
        rollout=RolloutSettings(samples_per_prompt=8),
        reward=RewardSettings(reward=reward),
        train=TrainSettings(**train or {}),
    )
    return checkpoint.find_latest_checkpoint(settings(**parts), loop, read or {})


@pytest.mark.parametrize("steps", [1, 5, 6])
def test_steps_that_are_done_are_refused_before_a_file_is_opened(stopped, monkeypatch, steps):
    before = {path: path.stat().st_mtime_ns for path in stopped.rglob("*")}
    with pytest.raises(
        BadInput,
        match=(
            f"--steps {steps} counts all steps of the run, and .*step-000006 is of step 6: nothing"
            " is left to do"
        ),
    ):
        find(stopped, monkeypatch, steps=steps)
    assert {path: path.stat().st_mtime_ns for path in stopped.rglob("*")} == before


def test_a_restarted_run_that_has_done_its_steps_only_ends(stopped, monkeypatch):
    """torchrun has restarted it after the last checkpoint: what is left is the export."""
    with pytest.raises(BadInput, match="nothing is left to do"):
        find(stopped, monkeypatch, steps=6)
    monkeypatch.setattr(process_groups._Start, "goes_on", True)
    assert find(stopped, monkeypatch, steps=6).step == 6


def test_a_record_that_is_shorter_than_the_checkpoint_says_is_refused(stopped, monkeypatch):
    (stopped / "metrics.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(BadInput, match="metrics.jsonl is shorter than it was"):
        find(stopped, monkeypatch)


def test_a_checkpoint_of_another_run_is_refused(stopped, monkeypatch):
    with pytest.raises(BadInput, match="is of the sync loop"):
        find(stopped, monkeypatch, loop="async")
    with pytest.raises(BadInput, match="--seed was 1 when .* and is 2: it must stay the same"):
        find(stopped, monkeypatch, seed=2)
    with pytest.raises(
        BadInput, match="--reward was 'exact' when .* and is 'math': it must stay the same"
    ):
        find(stopped, monkeypatch, reward="math")


def test_an_asynchronous_run_goes_on_with_the_same_engines_and_bound(stopped, monkeypatch):
    """Its groups in flight belong to ranks, and may be as old as the bound was.

    The checkpoint is the synchronous loop's, made to look like the other's.
    """
    newest = checkpoint.open_checkpoint
    monkeypatch.setattr(checkpoint, "MUST_AGREE", ())

    def written_with(**in_flight):
        def opened(folder):
            found = newest(folder)
            state = {
                **found.state,
                "loop": "async",
                "settings": {**found.state["settings"], "in_flight": in_flight},
            }
            return checkpoint.Checkpoint(found.folder, found.step, state)

        monkeypatch.setattr(checkpoint, "open_checkpoint", opened)

    written_with(rollout_ranks=1, max_staleness=1, deal="fixed")
    assert find(stopped, monkeypatch, loop="async").step == 6
    written_with(rollout_ranks=1, max_staleness=4, deal="fixed")
    with pytest.raises(
        BadInput, match="--max-staleness was 4 when .* and is 1: it must stay the same"
    ):
        find(stopped, monkeypatch, loop="async")


# --- what the run has read ----------------------------------------------------------------------


def what_was_read(
    folder, monkeypatch, *, prompts=("toy:3", "more.jsonl"), model=str(ROOT / "toy"), **changes
) -> dict:
    monkeypatch.chdir(folder)
    settings = RolloutSettings(prompts=prompts, eval_samples_per_prompt=2, **changes)
    data = load_data(model, settings, read_config(model), seed=1)
    return checkpoint.what_was_read(Settings(run=RunSettings(model=model), rollout=settings), data)


def test_a_resumed_run_reads_what_it_had_read(stopped, tmp_path, monkeypatch):
    """A file is compared by its rows, wherever it lies, and a model's folder by its contents."""
    assert find(stopped, monkeypatch, read=what_was_read(tmp_path, monkeypatch)).step == 6
    (tmp_path / "moved").mkdir()
    (tmp_path / "more.jsonl").rename(tmp_path / "moved" / "more.jsonl")
    shutil.copytree(ROOT / "toy", tmp_path / "model", ignore=shutil.ignore_patterns("__pycache__"))
    moved = what_was_read(
        tmp_path, monkeypatch, prompts=("toy:3", "moved/more.jsonl"), model=str(tmp_path / "model")
    )
    assert find(stopped, monkeypatch, read=moved).step == 6


def test_a_resumed_run_with_other_rows_is_refused(stopped, tmp_path, monkeypatch):
    rows = (tmp_path / "more.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "more.jsonl").write_text("\n".join(rows[::-1]), encoding="utf-8")
    with pytest.raises(
        BadInput,
        match=(
            "what --prompts names is not what it was when .*step-000006 was written: give the same"
            " rows"
        ),
    ):
        find(stopped, monkeypatch, read=what_was_read(tmp_path, monkeypatch))


def test_a_resumed_run_with_another_model_folder_is_refused(stopped, tmp_path, monkeypatch):
    shutil.copytree(ROOT / "toy", tmp_path / "model", ignore=shutil.ignore_patterns("__pycache__"))
    config = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "model" / "config.json").write_text(
        json.dumps(config | {"rms_norm_eps": 1e-5}), encoding="utf-8"
    )
    with pytest.raises(
        BadInput,
        match=(
            "what --model names is not what it was when .*step-000006 was written: give the same"
            " folder"
        ),
    ):
        find(
            stopped,
            monkeypatch,
            read=what_was_read(tmp_path, monkeypatch, model=str(tmp_path / "model")),
        )


# --- evaluation without training ----------------------------------------------------------------


def test_an_evaluation_needs_no_step_that_is_left_and_no_flags_of_the_training(
    undisturbed, monkeypatch
):
    assert (
        find(
            undisturbed, monkeypatch, eval_only=True, resume=True, steps=9, seed=7, reward="math"
        ).step
        == 9
    )


def test_an_evaluation_needs_the_model_that_was_trained(stopped, monkeypatch):
    read = json.loads(
        (stopped / "checkpoints" / "step-000006" / "state.json").read_text(encoding="utf-8")
    )["read"]
    other = read | {"--prompts": "other"}
    assert find(stopped, monkeypatch, read=other, eval_only=True, resume=True).step == 6
    with pytest.raises(BadInput, match="what --model names is not what it was"):
        find(stopped, monkeypatch, read=other | {"--model": "other"}, eval_only=True, resume=True)


# --- damage -------------------------------------------------------------------------------------


def change_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_short(folder):
    (folder / "model" / "__0_0.distcp").write_bytes(b"short")


def change_state(folder):
    change_byte(folder / "state.json")


def change_weights(folder):
    change_byte(folder / "model" / "__0_0.distcp")


def lose_a_file(folder):
    (folder / "model" / "common.pt").unlink()


def spoil_the_list(folder):
    (folder / "files.json").write_text("{", encoding="utf-8")


@pytest.mark.parametrize("changes", [{}, dict(eval_only=True)])
def test_adapters_are_read_with_their_own_rank_and_scale(stopped, monkeypatch, changes):
    """With another scale the same adapters would be another model."""
    with pytest.raises(BadInput, match="--lora-rank was 0 when .* and is 4: it must stay the same"):
        find(stopped, monkeypatch, train=dict(lora_rank=4), **changes)
    with pytest.raises(BadInput, match="--lora-alpha was 32.0 when .* and is 16.0: it must stay"):
        find(stopped, monkeypatch, train=dict(lora_alpha=16.0), **changes)


def test_a_setting_that_an_older_version_did_not_have_was_as_its_default(stopped, monkeypatch):
    monkeypatch.setattr(checkpoint, "describe_damage", lambda *folder, **share: "")
    file = stopped / "checkpoints" / "step-000006" / "state.json"
    state = json.loads(file.read_text(encoding="utf-8"))
    del state["settings"]["train"]["lora_rank"]
    file.write_text(json.dumps(state), encoding="utf-8")
    assert find(stopped, monkeypatch).step == 6
    with pytest.raises(BadInput, match="--lora-rank was 0 when"):
        find(stopped, monkeypatch, train=dict(lora_rank=4))


@pytest.mark.parametrize("damage, message", [
    (cut_short, "__0_0.distcp has 5 bytes, and was written with"),
    (lose_a_file, "common.pt is missing"),
    (change_weights, "__0_0.distcp has other contents than were written"),
    (change_state, "state.json has other contents"),
    (spoil_the_list, "files.json cannot be read"),
])  # fmt: skip
def test_a_damaged_checkpoint_is_refused_and_the_one_before_offered(
    stopped, monkeypatch, damage, message
):
    monkeypatch.setattr(checkpoint, "MUST_AGREE", ())
    newest = stopped / "checkpoints" / "step-000006"
    assert find(stopped, monkeypatch).step == 6
    damage(newest)
    with pytest.raises(
        BadInput,
        match=(
            rf"step-000006 is damaged: (model/)?{message}.*the one before; step-000003 before it is"
            r" whole"
        ),
    ):
        find(stopped, monkeypatch)
    shutil.rmtree(newest)
    assert find(stopped, monkeypatch).step == 3


def test_a_checkpoint_without_the_files_of_one_rank_is_not_whole(stopped, monkeypatch):
    """As on file systems that ranks do not share: files.json lists what rank 0 has seen."""
    newest = stopped / "checkpoints" / "step-000006"
    part = sorted((newest / "model").glob("*.distcp"))[-1]
    part.unlink()
    files = json.loads((newest / "files.json").read_text(encoding="utf-8"))
    del files[f"model/{part.name}"]
    (newest / "files.json").write_text(json.dumps(files), encoding="utf-8")
    missing = (
        f"step-000006 is damaged: model/{part.name} is missing.*step-000003 before it is whole"
    )
    with pytest.raises(BadInput, match=missing):
        find(stopped, monkeypatch)


class Runs:
    """Pickled, it is a call of os.mkdir: what a hostile file would make of whoever loads it."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_a_hostile_checkpoint_runs_no_code(stopped, tmp_path, monkeypatch):
    saved, trap = stopped / "checkpoints" / "step-000006", tmp_path / "trap"

    def plant(name: str) -> None:
        path = saved / "model" / name
        path.write_bytes(pickle.dumps(Runs(trap)) if name == ".metadata" else b"")
        if name == "common.pt":
            torch.save({"x": Runs(trap)}, path)
        files = json.loads((saved / "files.json").read_text(encoding="utf-8"))
        files[f"model/{name}"] = (path.stat().st_size, checkpoint._crc(path))
        (saved / "files.json").write_text(json.dumps(files), encoding="utf-8")

    plant("common.pt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        dist_checkpointing.load_common_state_dict(str(saved / "model"))
    plant(".metadata")
    monkeypatch.setattr(checkpoint, "MUST_AGREE", ())
    with pytest.raises(
        BadInput,
        match=(
            "not safe to read: model/.metadata: it names posix.mkdir, which is no part of a"
            " checkpoint"
        ),
    ):
        find(stopped, monkeypatch)
    assert not trap.exists()
    pickle.loads(pickle.dumps(Runs(trap)))
    assert trap.exists()  # it would have
