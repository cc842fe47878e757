"""checkpoint.py: a run that was stopped goes on as if it had not been; at other layouts too; and
what is damaged is refused by name.

Not covered: GPUs, several nodes, experts spread over other numbers of ranks (refused, see find).
"""

import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, false_alarms, metrics_of, torchrun
from megatron.core import dist_checkpointing

from backends.huggingface.config import read_config
from common import process_groups
from common.errors import BadInput, EngineDied
from common.settings import RolloutSettings, RunSettings, TrainSettings
from data.prompts import load_data
from data.sample import Sample
from harness import checkpoint
from harness.run_folder import checkpoints_of
import loop_async
from loop_sync import Settings
from losses import LossSettings
from reward import RewardSettings
import train_step

QUICK = [
    "--eval-every",
    "3",
    "--eval-samples",
    "32",
    "--prompts-per-step",
    "4",
    "--samples-per-prompt",
    "8",
    "--lr-schedule",
    "cosine",
    "--export",
]
QUICK += ["--prompts", "toy:3", "more.jsonl", "--eval-samples-per-prompt", "2"]


def run_in(folder, settings) -> SimpleNamespace:
    """What checkpoint.save needs to know of a run of one rank."""
    everyone = torch.distributed.group.WORLD
    record = SimpleNamespace(
        folder=folder, is_writer=True, group=everyone, loop="sync", positions=dict
    )
    return SimpleNamespace(record=record, settings=settings, inputs={})


def write_more(folder):
    """The other half of the mixture: a prompts file where the run is started."""
    (folder / "more.jsonl").write_text(
        "".join(
            json.dumps({"prompt": f"{i:03d}+111=", "label": str(i + 111)[::-1]}) + "\n"
            for i in range(7)
        ),
        encoding="utf-8",
    )


@pytest.fixture(autouse=True)
def more(tmp_path):
    write_more(tmp_path)


def without_times(rows: list[dict]) -> list[dict]:
    return [
        {key: value for key, value in row.items() if not key.endswith(("_s", "_wait"))}
        for row in rows
    ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Nine steps on one rank, with checkpoints of 3, 6 and 9, every sample on disk, and the weights
    exported at the end.
    """
    folder = tmp_path_factory.mktemp("undisturbed")
    write_more(folder)
    flags = [
        "--export",
        "bf16",
        "fp8",
        "--steps",
        "9",
        "--save-every",
        "3",
        "--keep",
        "3",
        "--save-rollouts",
        "--name",
        "run",
    ]
    torchrun(ROOT / "loop_sync.py", *QUICK, *flags, ranks=1, cwd=folder)
    return folder / "runs" / "run"


@pytest.fixture
def stopped(undisturbed, tmp_path):
    """The undisturbed run as a kill after step 6 would have left it, in the middle of writing the
    next checkpoint.
    """
    run = tmp_path / "runs" / "run"
    shutil.copytree(undisturbed, run)
    (run / "checkpoints" / "step-000009").rename(run / "checkpoints" / "step-000009.part")
    return run


def test_a_resumed_run_writes_the_same_metrics_digit_for_digit(undisturbed, stopped, tmp_path):
    done = torchrun(
        ROOT / "loop_sync.py",
        *QUICK,
        "--steps",
        "9",
        "--name",
        "run",
        "--resume",
        ranks=1,
        cwd=tmp_path,
    )
    assert (
        "going on from runs/run/checkpoints/step-000006; the 3 rows of metrics.jsonl that followed"
        " it are dropped" in done.stderr
    )
    assert without_times(metrics_of(stopped)) == without_times(metrics_of(undisturbed))
    assert (stopped / "samples.jsonl").read_text(encoding="utf-8") == (
        undisturbed / "samples.jsonl"
    ).read_text(encoding="utf-8")
    json.loads((stopped / "trace.json").read_text(encoding="utf-8"))


def test_a_finished_run_given_more_steps_learns_as_it_is_asked_to(undisturbed, tmp_path):
    """The first nine steps ended at learning rate 0; the next three are those of a linear schedule
    from 1e-3 over twelve. The last one is kept.
    """
    run = tmp_path / "runs" / "run"
    shutil.copytree(undisturbed, run)
    flags = [
        *QUICK,
        "--steps",
        "12",
        "--lr",
        "1e-3",
        "--lr-schedule",
        "linear",
        "--name",
        "run",
        "--resume",
    ]
    torchrun(ROOT / "loop_sync.py", *flags, ranks=1, cwd=tmp_path)
    rows = metrics_of(run)
    assert rows[:10] == metrics_of(undisturbed)
    assert [row["lr"] for row in rows[10:]] == pytest.approx(
        [1e-3 * left / 12 for left in (3, 2, 1)], rel=1e-4
    )  # eight digits are written
    assert json.loads((run / "settings.json").read_text(encoding="utf-8"))["train"]["lr"] == 1e-3
    assert (
        checkpoints_of(run)[-1].name == "step-000012"
    )  # without --save-every: the next --resume loses nothing


def test_restored_state_is_the_checkpoints_and_settings_are_the_commands(fresh_megatron, tmp_path):
    """Moments and the count of steps come from the checkpoint; learning rate, decay and Adam's
    constants from what the run is started with.
    """
    toy, samples = (
        str(ROOT / "toy"),
        [
            Sample(
                [5, 6],
                response_ids=[7, 8],
                rollout_logprobs=[-1.0, -1.0],
                loss_mask=[1, 1],
                advantages=[1.0, -1.0],
            )
        ],
    )
    run = run_in(tmp_path, Settings())

    def trainer_of(**settings):
        return train_step.build_trainer(
            toy, TrainSettings(**settings), read_config(toy), steps=10, seed=1
        )

    def moments(trainer):
        return [
            state["exp_avg"]
            for optimizer in trainer.optimizer.chained_optimizers
            for state in optimizer.optimizer.state.values()
        ]

    before = trainer_of(lr=1e-3, weight_decay=0.1, adam_beta2=0.95)
    train_step.update_policy(before, train_step.pack(before, samples), LossSettings())
    checkpoint.save(run, before, step=1, rank_state={})
    after = trainer_of(
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
        assert group["lr"] == 1e-4 and group["weight_decay"] == 0.3 * group["wd_mult"]
        assert group["betas"] == (0.9, 0.9) and group["eps"] == 1e-3
    assert after.scheduler.num_steps == 1
    assert all(map(torch.equal, moments(before), moments(after))) and any(
        moment.any() for moment in moments(after)
    )
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
    toy = str(ROOT / "toy")
    trainer = train_step.build_trainer(toy, TrainSettings(), read_config(toy), steps=10, seed=1)
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


@pytest.mark.parametrize("script, ranks", [("loop_sync.py", 1), ("loop_async.py", 2)])
def test_training_on_a_dump_of_rollouts_writes_the_same_metrics_digit_for_digit(
    undisturbed, tmp_path, script, ranks
):
    flags = [
        *QUICK,
        "--steps",
        "9",
        "--name",
        "again",
        "--load-rollouts",
        str(undisturbed / "rollouts"),
    ]
    torchrun(ROOT / script, *flags, ranks=ranks, cwd=tmp_path)
    again, first = (
        without_times(metrics_of(run)) for run in (tmp_path / "runs" / "again", undisturbed)
    )
    of_an_engine = {"held_out", "pass@1", "pass@2", "majority@2"}
    assert (
        again
        == [{key: value for key, value in row.items() if key not in of_an_engine} for row in first]
        and len(again) == 10
    )


def test_a_checkpoint_is_exported_at_another_layout(undisturbed, tmp_path):
    torchrun(
        ROOT / "tools" / "export.py",
        "--checkpoint",
        undisturbed,
        "--dtype",
        "bf16",
        "fp8",
        "--tp",
        "2",
        "--out",
        tmp_path / "out",
        ranks=2,
    )
    for dtype in ("bf16", "fp8"):
        theirs, ours = undisturbed / f"model-{dtype}", tmp_path / f"out-{dtype}"
        assert {path.name: path.read_bytes() for path in theirs.iterdir()} == {
            path.name: path.read_bytes() for path in ours.iterdir()
        }
    done = torchrun(ROOT / "tools" / "export.py", "--checkpoint", tmp_path, ranks=1, check=False)
    assert (
        done.returncode != 0
        and f"error: --checkpoint {tmp_path} holds no checkpoint" in done.stderr
    )


def test_the_asynchronous_loop_loses_and_repeats_no_prompt(tmp_path):
    """Killed after a checkpoint with groups in flight, it trains each of them once; its samples are
    others, as they depend on when updates arrive.
    """
    flags = [*QUICK, "--max-staleness", "2", "--steps", "9", "--name", "run"]

    def steps(part: str, *more: str) -> list[dict]:
        (tmp_path / part).mkdir()
        torchrun(
            ROOT / "tests/workers/async_run.py",
            tmp_path / part,
            "none",
            *flags,
            *more,
            ranks=2,
            cwd=tmp_path,
        )
        return json.loads((tmp_path / part / "rank-0.json").read_text(encoding="utf-8"))["steps"]

    before = steps("before", "--save-every", "5")[:5]
    shutil.rmtree(
        tmp_path / "runs" / "run" / "checkpoints" / "step-000009"
    )  # as if it had been killed before
    rows = metrics_of(tmp_path / "runs" / "run")[:6]
    after = steps("after", "--resume")
    assert [step["version"] for step in before + after] == list(range(9))
    trained = [tuple(name) for step in before + after for name in step["trained"]]
    assert sorted(trained) == [(group, index) for group in range(9 * 4) for index in range(8)]
    assert (
        metrics_of(tmp_path / "runs" / "run")[:6] == rows
        and max(row.get("staleness_max", 0) for row in metrics_of(tmp_path / "runs" / "run")) <= 2
    )


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


def test_a_part_that_is_written_elsewhere_leaves_the_checkpoints_before(
    fresh_megatron, tmp_path, monkeypatch
):
    toy = str(ROOT / "toy")
    trainer = train_step.build_trainer(toy, TrainSettings(), read_config(toy), steps=10, seed=1)
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


def test_a_restarted_run_that_has_done_its_steps_only_ends(stopped, monkeypatch):
    """torchrun has restarted it after the last checkpoint: what is left is the export."""
    with pytest.raises(BadInput, match="nothing is left to do"):
        find(stopped, monkeypatch, steps=6)
    monkeypatch.setattr(process_groups._Start, "goes_on", True)
    assert find(stopped, monkeypatch, steps=6).step == 6


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


def test_both_sources_were_trained_on(undisturbed):
    keys = {key for row in metrics_of(undisturbed) for key in row}
    assert {
        "reward/toy",
        "reward/more",
        "pass@1",
        "pass@2",
        "majority@2",
    } <= keys and "held_out/toy" not in keys


def test_keep_removes_the_oldest(undisturbed):
    assert [path.name for path in checkpoints_of(undisturbed)] == [
        "step-000003",
        "step-000006",
        "step-000009",
    ]


def test_resuming_at_another_layout(undisturbed, stopped, tmp_path):
    """One rank -> two tensor-parallel ones: two engines share the prompts, so the samples are
    others, and the run goes on from the same weights.
    """
    torchrun(
        ROOT / "loop_sync.py",
        *QUICK,
        "--steps",
        "9",
        "--name",
        "run",
        "--resume",
        "--tp",
        "2",
        ranks=2,
        cwd=tmp_path,
    )
    rows = metrics_of(stopped)
    assert [row["step"] for row in rows] == list(range(10)) and without_times(
        rows[:7]
    ) == without_times(metrics_of(undisturbed)[:7])
    assert (
        rows[7]["lr"] == metrics_of(undisturbed)[7]["lr"]
        and rows[7]["logprob_shift"] == 0
        and rows[7]["mismatch_abs"] < 0.1
    )


# --- evaluation without training ----------------------------------------------------------------


def held_out(row: dict) -> dict:
    return {key: row[key] for key in row if key.startswith(("held_out", "pass@", "majority@"))}


def test_an_evaluation_of_a_checkpoint_gives_what_the_run_measured_then(
    undisturbed, stopped, tmp_path
):
    """The same prompts, seeds and weights: every number agrees to the last digit.

    The run is left as it is.
    """
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    done = torchrun(
        ROOT / "loop_sync.py",
        *QUICK,
        "--eval-only",
        "--name",
        "run",
        "--resume",
        ranks=1,
        cwd=tmp_path,
    )
    (folder,) = (tmp_path / "runs").glob("run-eval-*")
    (row,) = metrics_of(folder)
    assert row["step"] == 6 and held_out(row) == held_out(metrics_of(undisturbed)[6])
    line = f"held-out reward of runs/run/checkpoints/step-000006: {row['held_out']:.3f}"
    assert done.stdout.splitlines() == [f"{line}; metrics and samples are in runs/{folder.name}"]
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == before


def test_an_evaluation_of_an_exported_folder_gives_what_the_run_measured_at_its_end(
    undisturbed, tmp_path
):
    flags = [*QUICK, "--eval-only", "--model", undisturbed / "model-bf16", "--name", "a"]
    done = torchrun(ROOT / "loop_async.py", *flags, ranks=2, cwd=tmp_path)
    (row,) = metrics_of(tmp_path / "runs" / "a")
    assert row["step"] == 0 and held_out(row) == held_out(metrics_of(undisturbed)[9])
    assert f"held-out reward of {undisturbed}/model-bf16: {row['held_out']:.3f}" in done.stdout
    assert not list((tmp_path / "runs" / "a").glob("*/"))  # neither checkpoints nor an export


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


# --- what is refused ----------------------------------------------------------------------------


def find(folder, monkeypatch, loop="sync", read=None, reward="exact", **changes):
    monkeypatch.chdir(folder.parent.parent)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    settings = loop_async.Settings if loop == "async" else Settings
    parts = dict(
        run=RunSettings(name=folder.name, **changes),
        rollout=RolloutSettings(samples_per_prompt=8),
        reward=RewardSettings(reward=reward),
    )
    return checkpoint.find_latest_checkpoint(settings(**parts), loop, read or {})


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


def test_a_record_that_is_shorter_than_the_checkpoint_says_is_refused(stopped, monkeypatch):
    (stopped / "metrics.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(BadInput, match="metrics.jsonl is shorter than it was"):
        find(stopped, monkeypatch)


def what_was_read(
    folder, monkeypatch, *, prompts=("toy:3", "more.jsonl"), model=str(ROOT / "toy"), **changes
) -> dict:
    monkeypatch.chdir(folder)
    settings = RolloutSettings(prompts=prompts, eval_samples_per_prompt=2, **changes)
    data = load_data(model, settings, read_config(model), seed=1)
    return checkpoint.what_was_read(Settings(run=RunSettings(model=model), rollout=settings), data)


def test_a_resumed_run_reads_what_it_had_read(stopped, tmp_path, monkeypatch):
    """The file is compared by its rows, wherever it lies now; the model's folder by its contents."""
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


def test_changed_weights_change_the_digest_of_a_folder(tmp_path):
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    weights = bytearray(10_000_000)  # more than 64 parts of 64 KiB
    (tmp_path / "model.safetensors").write_bytes(weights)
    digest = checkpoint.folder_digest(tmp_path)
    weights[5 * (10_000_000 // 64)] = 1
    (tmp_path / "model.safetensors").write_bytes(weights)
    assert checkpoint.folder_digest(tmp_path) != digest


def change_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage, message", [
    (lambda folder: (folder / "model" / "__0_0.distcp").write_bytes(b"short"), "__0_0.distcp has 5 bytes, and was written with"),
    (lambda folder: (folder / "model" / "common.pt").unlink(), "common.pt is missing"),
    (lambda folder: change_byte(folder / "model" / "__0_0.distcp"), "__0_0.distcp has other contents than were written"),
    (lambda folder: change_byte(folder / "state.json"), "state.json has other contents"),
    (lambda folder: (folder / "files.json").write_text("{", encoding="utf-8"), "files.json cannot be read"),
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


def test_a_checkpoint_of_another_run_is_refused(stopped, monkeypatch):
    with pytest.raises(BadInput, match="is of loop_sync.py"):
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

    written_with(rollout_ranks=1, max_staleness=1)
    assert find(stopped, monkeypatch, loop="async").step == 6
    written_with(rollout_ranks=1, max_staleness=4)
    with pytest.raises(
        BadInput, match="--max-staleness was 4 when .* and is 1: it must stay the same"
    ):
        find(stopped, monkeypatch, loop="async")


def test_a_full_disk_leaves_the_checkpoint_before(stopped, tmp_path):
    """Files may not grow beyond 4 MiB, as on a disk that has no room: the run ends with an error,
    and what it had resumed from is whole.
    """
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "1",
        str(ROOT / "loop_sync.py"),
        *QUICK,
    ]
    command += ["--steps", "9", "--save-every", "1", "--name", "run", "--resume"]

    def no_room():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**22, 2**22))

    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=no_room,
    )
    assert (
        done.returncode != 0
        and "the checkpoint of step 7 could not be written" in done.stderr
        and "step-000006 is whole" in done.stderr
    )
    assert (
        checkpoint.describe_damage(stopped / "checkpoints" / "step-000006") == ""
        and not (stopped / "checkpoints" / "step-000007").exists()
    )


def test_an_engine_that_dies_during_a_save_is_no_full_disk(monkeypatch, tmp_path):
    def dies(*args):
        raise EngineDied("rank 0: a process died")

    monkeypatch.setattr(checkpoint, "all_gather_bytes", dies)
    record = SimpleNamespace(folder=tmp_path, is_writer=False, group=None)
    with pytest.raises(EngineDied, match="rank 0: a process died"):
        checkpoint.save(record, Settings(), None, step=1, read={}, rank_state={})


@pytest.mark.parametrize("script, number, reward", [
    ("loop_sync.py", signal.SIGTERM, "math"),
    ("loop_async.py", signal.SIGHUP, "exact"),
])  # fmt: skip
def test_torchrun_told_to_stop_leaves_a_checkpoint(start_loop, tmp_path, script, number, reward):
    """torchrun hands the signal to every process of each rank's group, engines and judges too.

    Schedulers and closed terminals send it to torchrun. A second one changes nothing.
    """
    started = start_loop(script, *QUICK, "--reward", reward, rows=3)
    for rank in range(2):
        os.killpg(started.rank(rank).pid, number)
    started.process.send_signal(number)
    assert started.end(60) != 0  # torchrun's own code for a signal
    rows = metrics_of(tmp_path / "runs" / "long")
    (saved,) = checkpoints_of(tmp_path / "runs" / "long")
    assert checkpoint.describe_damage(saved) == "" and saved.name == f"step-{rows[-1]['step']:06d}"
    assert not any(row["reward_errors"] for row in rows[1:])
    said = started.text()
    assert f"as asked by {number.name}: go on" in said and "SGLang engine died" not in said


def test_a_run_that_is_told_to_stop_before_its_first_step_ends_at_once(start_loop, tmp_path):
    started = start_loop("loop_sync.py", *QUICK, rows=0)
    started.wait_for(lambda: len(started.engines()) == 2, 120)
    started.process.send_signal(signal.SIGTERM)
    assert started.end(25) != 0  # torchrun kills after 30 s
    assert started.text().count("interrupted by SIGTERM: rank") == 2
    assert metrics_of(tmp_path / "runs" / "long") == []


@pytest.mark.parametrize(
    "script, flags", [("loop_sync.py", []), ("loop_async.py", ["--max-staleness", "2"])]
)
def test_told_to_stop_it_saves_and_ends_well(start_loop, tmp_path, script, flags):
    """SIGTERM to the ranks, as a scheduler sends it before preemption; the asynchronous loop has
    groups in flight then.
    """
    started = start_loop(script, *QUICK, *flags, rows=3)
    listening = [
        c.laddr.ip
        for process in started.family
        for c in process.net_connections()
        if c.status == "LISTEN"
    ]
    assert set(listening) == {
        "127.0.0.1"
    }  # nobody outside this machine can reach a rank or an engine; torchrun's own store is not ours
    for rank in (0, 1) if script == "loop_async.py" else (1,):  # one that is told tells the others
        started.rank(rank).send_signal(signal.SIGTERM)
    assert started.end(60) == 0
    run = tmp_path / "runs" / "long"
    (saved,) = checkpoints_of(run)
    assert (
        checkpoint.describe_damage(saved) == ""
        and "go on with --name long --resume" in started.text()
    )
    assert false_alarms(started.whole_output()) == []
    last = metrics_of(run)[-1]["step"]
    assert saved.name == f"step-{last:06d}"
    torchrun(
        ROOT / script,
        *QUICK,
        *flags,
        "--steps",
        str(last + 4),
        "--name",
        "long",
        "--resume",
        ranks=2,
        cwd=tmp_path,
    )
    rows = metrics_of(run)
    assert [row["step"] for row in rows] == list(range(last + 5)) and max(
        row.get("staleness_max", 0) for row in rows
    ) <= 2
    if script == "loop_async.py":
        assert (
            len(
                json.loads((saved / "state.json").read_text(encoding="utf-8"))["ranks"][1][
                    "in_flight"
                ]
            )
            == 2 * 4
        )
