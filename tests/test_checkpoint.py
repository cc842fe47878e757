"""A run that was stopped goes on as if it had not been, at other layouts too.

All of it with whole runs. Not covered: GPUs, several nodes, experts spread over other numbers of
ranks (refused, see find_latest_checkpoint).
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, SMALL_RUN, metrics_of, torchrun

from common.errors import BadInput
from harness import checkpoint
from harness.run_folder import checkpoints_of
from tools import export

pytestmark = pytest.mark.usefixtures("more")


def without_times(rows: list[dict]) -> list[dict]:
    return [
        {key: value for key, value in row.items() if not key.endswith(("_s", "_wait"))}
        for row in rows
    ]


def test_both_sources_were_trained_on(undisturbed):
    keys = {key for row in metrics_of(undisturbed) for key in row}
    assert {"reward/toy", "reward/more", "pass@1", "pass@2", "majority@2"} <= keys
    assert "held_out/toy" not in keys


def test_keep_removes_the_oldest(undisturbed):
    kept = [path.name for path in checkpoints_of(undisturbed)]
    assert kept == ["step-000003", "step-000006", "step-000009"]


def test_a_resumed_run_writes_the_same_metrics_digit_for_digit(undisturbed, stopped, tmp_path):
    flags = [*SMALL_RUN, "--steps", "9", "--name", "run", "--resume"]
    done = torchrun(ROOT / "loop_sync.py", *flags, ranks=1, cwd=tmp_path)
    said = "going on from runs/run/checkpoints/step-000006; the 3 rows of metrics.jsonl that"
    assert f"{said} followed it are dropped" in done.stderr
    assert without_times(metrics_of(stopped)) == without_times(metrics_of(undisturbed))
    samples = [(run / "samples.jsonl").read_bytes() for run in (stopped, undisturbed)]
    assert samples[0] == samples[1]
    json.loads((stopped / "trace.json").read_text(encoding="utf-8"))


@pytest.mark.complete
def test_a_finished_run_given_more_steps_learns_as_it_is_asked_to(undisturbed, tmp_path):
    """At another layout: one rank -> two tensor-parallel ones, whose two engines share the prompts.

    The first nine steps ended at learning rate 0. The next three are those of a linear schedule
    from 1e-3 over twelve. The last one is kept.
    """
    run = tmp_path / "runs" / "run"
    shutil.copytree(undisturbed, run)
    flags = [*SMALL_RUN, "--steps", "12", "--lr", "1e-3", "--lr-schedule", "linear"]
    flags += ["--tp", "2", "--name", "run", "--resume"]
    torchrun(ROOT / "loop_sync.py", *flags, ranks=2, cwd=tmp_path)
    rows = metrics_of(run)
    assert rows[:10] == metrics_of(undisturbed)
    assert [row["step"] for row in rows] == list(range(13))
    expected = [1e-3 * left / 12 for left in (3, 2, 1)]
    assert [row["lr"] for row in rows[10:]] == pytest.approx(expected, rel=1e-4)  # of 8 digits
    for row in rows[10:]:
        assert row["logprob_shift"] == 0
        assert row["mismatch_abs"] < 0.1
    assert json.loads((run / "settings.json").read_text(encoding="utf-8"))["train"]["lr"] == 1e-3
    # Without --save-every: the next --resume loses nothing
    assert checkpoints_of(run)[-1].name == "step-000012"


@pytest.mark.complete
@pytest.mark.parametrize("script, ranks", [("loop_sync.py", 1), ("loop_async.py", 2)])
def test_training_on_a_dump_of_rollouts_writes_the_same_metrics_digit_for_digit(
    undisturbed, tmp_path, script, ranks
):
    flags = ["--steps", "9", "--name", "again", "--load-rollouts", undisturbed / "rollouts"]
    torchrun(ROOT / script, *SMALL_RUN, *flags, ranks=ranks, cwd=tmp_path)
    rows = without_times(metrics_of(undisturbed))
    of_an_engine = {"held_out", "pass@1", "pass@2", "majority@2"}
    expected = [{key: row[key] for key in row if key not in of_an_engine} for row in rows]
    again = without_times(metrics_of(tmp_path / "runs" / "again"))
    assert again == expected
    assert len(again) == 10


@pytest.mark.complete
def test_the_asynchronous_loop_loses_and_repeats_no_prompt(tmp_path):
    """Killed after a checkpoint with groups in flight, it trains each of them once.

    Its samples are others, as they depend on when updates arrive.
    """
    flags = [*SMALL_RUN, "--max-staleness", "2", "--steps", "9", "--name", "run"]
    run = tmp_path / "runs" / "run"

    def steps(part: str, *more: str) -> list[dict]:
        (tmp_path / part).mkdir()
        words = [ROOT / "tests/workers/async_run.py", tmp_path / part, "none", *flags, *more]
        torchrun(*words, ranks=2, cwd=tmp_path)
        return json.loads((tmp_path / part / "rank-0.json").read_text(encoding="utf-8"))["steps"]

    before = steps("before", "--save-every", "5")[:5]
    shutil.rmtree(run / "checkpoints" / "step-000009")  # as if it had been killed before
    rows = metrics_of(run)[:6]
    after = steps("after", "--resume")
    assert [step["version"] for step in before + after] == list(range(9))
    trained = [tuple(name) for step in before + after for name in step["trained"]]
    assert sorted(trained) == [(group, index) for group in range(9 * 4) for index in range(8)]
    assert metrics_of(run)[:6] == rows
    assert max(row.get("staleness_max", 0) for row in metrics_of(run)) <= 2


@pytest.mark.complete
def test_a_full_disk_leaves_the_checkpoint_before(stopped, tmp_path):
    """Files may not grow beyond 4 MiB, as on a disk that has no room.

    The run ends with an error, and what it had resumed from is whole.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "1", str(ROOT / "loop_sync.py"), *SMALL_RUN]
    command += ["--steps", "9", "--save-every", "1", "--name", "run", "--resume"]

    def no_room():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**22, 2**22))

    how = dict(cwd=tmp_path, capture_output=True, text=True, timeout=300, preexec_fn=no_room)
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **how)
    assert done.returncode != 0
    assert "the checkpoint of step 7 could not be written" in done.stderr
    assert "step-000006 is whole" in done.stderr
    assert checkpoint.describe_damage(stopped / "checkpoints" / "step-000006") == ""
    assert not (stopped / "checkpoints" / "step-000007").exists()


# --- export, and evaluation without training -----------------------------------------------------


def files_in(folder) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def held_out(row: dict) -> dict:
    return {key: row[key] for key in row if key.startswith(("held_out", "pass@", "majority@"))}


@pytest.mark.complete
def test_a_checkpoint_is_exported_at_another_layout(undisturbed, tmp_path):
    flags = ["--checkpoint", undisturbed, "--dtype", "bf16", "fp8", "--tp", "2"]
    torchrun(ROOT / "tools" / "export.py", *flags, "--out", tmp_path / "out", ranks=2)
    for dtype in ("bf16", "fp8"):
        assert files_in(tmp_path / f"out-{dtype}") == files_in(undisturbed / f"model-{dtype}")


def test_an_export_of_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(BadInput, match=f"--checkpoint {tmp_path} holds no checkpoint"):
        export.main(export.ExportSettings(checkpoint=str(tmp_path)))


@pytest.mark.complete
def test_an_evaluation_of_a_checkpoint_gives_what_the_run_measured_then(
    undisturbed, stopped, tmp_path
):
    """The same prompts, seeds and weights: every number agrees to the last digit.

    The run is left as it is.
    """
    before = files_in(stopped)
    flags = [*SMALL_RUN, "--eval-only", "--name", "run", "--resume"]
    done = torchrun(ROOT / "loop_sync.py", *flags, ranks=1, cwd=tmp_path)
    (folder,) = (tmp_path / "runs").glob("run-eval-*")
    (row,) = metrics_of(folder)
    assert row["step"] == 6
    assert held_out(row) == held_out(metrics_of(undisturbed)[6])
    line = f"held-out reward of runs/run/checkpoints/step-000006: {row['held_out']:.3f}"
    assert done.stdout.splitlines() == [f"{line}; metrics and samples are in runs/{folder.name}"]
    assert files_in(stopped) == before


@pytest.mark.complete
def test_an_evaluation_of_an_exported_folder_gives_what_the_run_measured_at_its_end(
    undisturbed, tmp_path
):
    flags = [*SMALL_RUN, "--eval-only", "--model", undisturbed / "model-bf16", "--name", "a"]
    done = torchrun(ROOT / "loop_async.py", *flags, ranks=2, cwd=tmp_path)
    (row,) = metrics_of(tmp_path / "runs" / "a")
    assert row["step"] == 0
    assert held_out(row) == held_out(metrics_of(undisturbed)[9])
    assert f"held-out reward of {undisturbed}/model-bf16: {row['held_out']:.3f}" in done.stdout
    assert not list((tmp_path / "runs" / "a").glob("*/"))  # neither checkpoints nor an export
