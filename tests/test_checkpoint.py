"""checkpoint.py: a run that was stopped goes on as if it had not been; at other layouts too; and what is damaged is refused by name.

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

import pytest
import torch
from conftest import ROOT, metrics_of, torchrun
from megatron.core import dist_checkpointing

import checkpoint
import loop_async
from loop_sync import Settings
from run import BadInput, RunSettings

QUICK = ["--eval-every", "3", "--eval-samples", "32", "--prompts-per-step", "4", "--samples-per-prompt", "8", "--lr-schedule", "cosine", "--export"]
QUICK += ["--prompts", "toy:3", "more.jsonl", "--eval-samples-per-prompt", "2"]


def write_more(folder):
    """The other half of the mixture: a prompts file where the run is started."""
    (folder / "more.jsonl").write_text("".join(json.dumps({"prompt": f"{i:03d}+111=", "label": str(i + 111)[::-1]}) + "\n" for i in range(7)), encoding="utf-8")


@pytest.fixture(autouse=True)
def more(tmp_path):
    write_more(tmp_path)


def without_times(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if not key.endswith(("_s", "_wait"))} for row in rows]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Nine steps on one rank, with checkpoints of 3, 6 and 9, every sample on disk, and the weights exported at the end."""
    folder = tmp_path_factory.mktemp("undisturbed")
    write_more(folder)
    flags = ["--export", "bf16", "fp8", "--steps", "9", "--save-every", "3", "--keep", "3", "--save-rollouts", "--name", "run"]
    torchrun(ROOT / "loop_sync.py", *QUICK, *flags, ranks=1, cwd=folder)
    return folder / "runs" / "run"


@pytest.fixture
def stopped(undisturbed, tmp_path):
    """The undisturbed run as a kill after step 6 would have left it, in the middle of writing the next checkpoint."""
    run = tmp_path / "runs" / "run"
    shutil.copytree(undisturbed, run)
    (run / "checkpoints" / "step-000009").rename(run / "checkpoints" / "step-000009.part")
    return run


def test_a_resumed_run_writes_the_same_metrics_digit_for_digit(undisturbed, stopped, tmp_path):
    torchrun(ROOT / "loop_sync.py", *QUICK, "--steps", "9", "--name", "run", "--resume", ranks=1, cwd=tmp_path)
    assert without_times(metrics_of(stopped)) == without_times(metrics_of(undisturbed))
    assert (stopped / "samples.jsonl").read_text(encoding="utf-8") == (undisturbed / "samples.jsonl").read_text(encoding="utf-8")
    json.loads((stopped / "trace.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("script, ranks", [("loop_sync.py", 1), ("loop_async.py", 2)])
def test_training_on_a_dump_of_rollouts_writes_the_same_metrics_digit_for_digit(undisturbed, tmp_path, script, ranks):
    flags = [*QUICK, "--steps", "9", "--name", "again", "--load-rollouts", str(undisturbed / "rollouts")]
    torchrun(ROOT / script, *flags, ranks=ranks, cwd=tmp_path)
    again, first = (without_times(metrics_of(run)) for run in (tmp_path / "runs" / "again", undisturbed))
    of_an_engine = {"held_out", "pass@1", "pass@2", "majority@2"}
    assert again == [{key: value for key, value in row.items() if key not in of_an_engine} for row in first] and len(again) == 10


def test_a_checkpoint_is_exported_at_another_layout(undisturbed, tmp_path):
    torchrun(ROOT / "export.py", "--checkpoint", undisturbed, "--dtype", "bf16", "fp8", "--tp", "2", "--out", tmp_path / "out", ranks=2)
    for dtype in ("bf16", "fp8"):
        theirs, ours = undisturbed / f"model-{dtype}", tmp_path / f"out-{dtype}"
        assert {path.name: path.read_bytes() for path in theirs.iterdir()} == {path.name: path.read_bytes() for path in ours.iterdir()}
    done = torchrun(ROOT / "export.py", "--checkpoint", tmp_path, ranks=1, check=False)
    assert done.returncode != 0 and f"error: --checkpoint {tmp_path} holds no checkpoint" in done.stderr


def test_the_asynchronous_loop_loses_and_repeats_no_prompt(tmp_path):
    """Killed after a checkpoint with groups in flight, it trains each of them once; its samples are others, as they depend on when updates arrive."""
    flags = [*QUICK, "--max-staleness", "2", "--steps", "9", "--name", "run"]

    def steps(part: str, *more: str) -> list[dict]:
        (tmp_path / part).mkdir()
        torchrun(ROOT / "tests/workers/async_run.py", tmp_path / part, "none", *flags, *more, ranks=2, cwd=tmp_path)
        return json.loads((tmp_path / part / "rank-0.json").read_text(encoding="utf-8"))["steps"]

    before = steps("before", "--save-every", "5")[:5]
    rows = metrics_of(tmp_path / "runs" / "run")[:6]
    after = steps("after", "--resume")
    assert [step["version"] for step in before + after] == list(range(9))
    trained = [tuple(name) for step in before + after for name in step["trained"]]
    assert sorted(trained) == [(group, index) for group in range(9 * 4) for index in range(8)]
    assert metrics_of(tmp_path / "runs" / "run")[:6] == rows and max(row.get("staleness_max", 0) for row in metrics_of(tmp_path / "runs" / "run")) <= 2


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
    with pytest.raises(BadInput, match="not safe to read: model/.metadata: it names posix.mkdir, which is no part of a checkpoint"):
        find(stopped, monkeypatch)
    assert not trap.exists()
    pickle.loads(pickle.dumps(Runs(trap)))
    assert trap.exists()  # it would have


def test_both_sources_were_trained_on(undisturbed):
    keys = {key for row in metrics_of(undisturbed) for key in row}
    assert {"reward/toy", "reward/more", "pass@1", "pass@2", "majority@2"} <= keys and "held_out/toy" not in keys


def test_keep_removes_the_oldest(undisturbed):
    assert [path.name for path in checkpoint.checkpoints_of(undisturbed)] == ["step-000003", "step-000006", "step-000009"]


def test_resuming_at_another_layout(undisturbed, stopped, tmp_path):
    """One rank -> two tensor-parallel ones: two engines share the prompts, so the samples are others, and the run goes on from the same weights."""
    torchrun(ROOT / "loop_sync.py", *QUICK, "--steps", "7", "--name", "run", "--resume", "--tp", "2", ranks=2, cwd=tmp_path)
    rows = metrics_of(stopped)
    assert [row["step"] for row in rows] == list(range(8)) and without_times(rows[:7]) == without_times(metrics_of(undisturbed)[:7])
    assert rows[7]["lr"] == metrics_of(undisturbed)[7]["lr"] and rows[7]["logprob_shift"] == 0 and rows[7]["mismatch_abs"] < 0.1


def find(folder, monkeypatch, loop="sync", **changes):
    monkeypatch.chdir(folder.parent.parent)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    settings = loop_async.Settings if loop == "async" else Settings
    return checkpoint.find(settings(run=RunSettings(name=folder.name, **changes)), loop)


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
def test_a_damaged_checkpoint_is_refused_and_the_one_before_offered(stopped, monkeypatch, damage, message):
    monkeypatch.setattr(checkpoint, "MUST_AGREE", ())
    newest = stopped / "checkpoints" / "step-000006"
    assert find(stopped, monkeypatch).step == 6
    damage(newest)
    with pytest.raises(BadInput, match=rf"step-000006 is damaged: (model/)?{message}.*the one before; step-000003 before it is whole"):
        find(stopped, monkeypatch)
    shutil.rmtree(newest)
    assert find(stopped, monkeypatch).step == 3


def test_a_checkpoint_of_another_run_is_refused(stopped, monkeypatch):
    with pytest.raises(BadInput, match="is of loop_sync.py"):
        find(stopped, monkeypatch, loop="async")
    with pytest.raises(BadInput, match="--seed was 1 when .* and is 2: it must stay the same"):
        find(stopped, monkeypatch, seed=2)
    with pytest.raises(BadInput, match=r"--prompts was \['toy:3', 'more.jsonl'\] when .* and is \['toy'\]: it must stay the same"):
        find(stopped, monkeypatch)


def test_an_asynchronous_run_goes_on_with_the_same_engines_and_bound(stopped, monkeypatch):
    """Its groups in flight belong to ranks, and may be as old as the bound was. The checkpoint is the synchronous loop's, made to look like the other's."""
    newest = checkpoint.open_checkpoint
    monkeypatch.setattr(checkpoint, "MUST_AGREE", ())

    def written_with(**in_flight):
        def opened(folder):
            found = newest(folder)
            state = {**found.state, "loop": "async", "settings": {**found.state["settings"], "in_flight": in_flight}}
            return checkpoint.Checkpoint(found.folder, found.step, state)

        monkeypatch.setattr(checkpoint, "open_checkpoint", opened)

    written_with(rollout_ranks=1, max_staleness=1)
    assert find(stopped, monkeypatch, loop="async").step == 6
    written_with(rollout_ranks=1, max_staleness=4)
    with pytest.raises(BadInput, match="--max-staleness was 4 when .* and is 1: it must stay the same"):
        find(stopped, monkeypatch, loop="async")


def test_a_full_disk_leaves_the_checkpoint_before(stopped, tmp_path):
    """Files may not grow beyond 4 MiB, as on a disk that has no room: the run ends with an error, and what it had resumed from is whole."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", str(ROOT / "loop_sync.py"), *QUICK]
    command += ["--steps", "9", "--save-every", "1", "--name", "run", "--resume"]

    def no_room():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**22, 2**22))

    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, preexec_fn=no_room)
    assert done.returncode != 0 and "the checkpoint of step 7 could not be written" in done.stderr and "step-000006 is whole" in done.stderr
    assert checkpoint.damage(stopped / "checkpoints" / "step-000006") == "" and not (stopped / "checkpoints" / "step-000007").exists()


@pytest.mark.parametrize("script, flags", [("loop_sync.py", []), ("loop_async.py", ["--max-staleness", "2"])])
def test_told_to_stop_it_saves_and_ends_well(start_loop, tmp_path, script, flags):
    """SIGTERM to the ranks, as a scheduler sends it before preemption; the asynchronous loop has groups in flight then."""
    started = start_loop(script, *QUICK, *flags, rows=3)
    listening = [c.laddr.ip for process in started.family for c in process.net_connections() if c.status == "LISTEN"]
    assert set(listening) == {"127.0.0.1"}  # nobody outside this machine can reach a rank or an engine; torchrun's own store is not ours
    for rank in range(2):
        started.rank(rank).send_signal(signal.SIGTERM)
    assert started.end(60) == 0
    run = tmp_path / "runs" / "long"
    (saved,) = checkpoint.checkpoints_of(run)
    assert checkpoint.damage(saved) == "" and "go on with --name long --resume" in started.text()
    last = metrics_of(run)[-1]["step"]
    assert saved.name == f"step-{last:06d}"
    torchrun(ROOT / script, *QUICK, *flags, "--steps", str(last + 4), "--name", "long", "--resume", ranks=2, cwd=tmp_path)
    rows = metrics_of(run)
    assert [row["step"] for row in rows] == list(range(last + 5)) and max(row.get("staleness_max", 0) for row in rows) <= 2
    if script == "loop_async.py":
        assert len(json.loads((saved / "state.json").read_text(encoding="utf-8"))["ranks"][1]["in_flight"]) == 2 * 4
