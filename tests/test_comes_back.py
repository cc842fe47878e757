"""A job that goes on without a person: --resume auto, torchrun's restarts, what is not restarted.

Whole runs are killed, and end with the metrics of one that was not. What --resume auto takes up is
tested in test_resume.py. Not covered: GPUs, and a node that is replaced by another machine.
"""

import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
from conftest import ROOT, metrics_of, torchrun

from common import processes
from common.errors import BadInput
from common.settings import RunSettings
from harness import run_folder
from harness.run_folder import checkpoints_of, name_problems, open_run_folder

RUN = ["--eval-every", "4", "--eval-samples", "8", "--prompts-per-step", "4"]
RUN += ["--samples-per-prompt", "4", "--steps", "24", "--export"]
AUTO = ["--name", "x", "--save-every", "4", "--resume", "auto"]


# --- the folder of the run ----------------------------------------------------------------------


@pytest.fixture
def here(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs" / "x"


def problems(**changes) -> list[str]:
    auto = dict(name="x", save_every=4, resume="auto")
    return list(name_problems(RunSettings(**{**auto, **changes})))


@pytest.mark.parametrize("changes, message", [
    ({"name": ""}, "--resume needs the --name"),
    ({"save_every": 0}, "--resume auto with --save-every 0: .*: give --save-every N"),
    ({"eval_only": True}, "--resume auto with --eval-only: .*: write --resume alone"),
])  # fmt: skip
def test_resume_auto_needs_what_it_goes_on_from(here, changes, message):
    (problem,) = problems(**changes)
    assert re.search(message, problem)


def test_a_folder_that_no_run_has_made_is_left_alone(here):
    """For instance that of several runs, runs/x/seed1 and so on."""
    (here / "seed1").mkdir(parents=True)
    (problem,) = problems()
    assert "runs/x is there, and is no run's folder: choose another --name" in problem


def test_a_run_without_a_checkpoint_is_set_aside_and_said(here):
    for files in ("first", "second"):
        here.mkdir(parents=True)
        (here / "lock").touch()
        (here / "metrics.jsonl").write_text(files, encoding="utf-8")
        assert problems() == []
        folder, lock, said = open_run_folder("x", "sync", resumed_step=None, is_auto=True)
        lock.close()
        assert os.listdir(folder) == ["lock"]
        (folder / "lock").unlink()
        folder.rmdir()
    assert "runs/x has no checkpoint: the run starts afresh, and its files are kept in" in said
    kept = [here.parent / f"x-restarted-{i}" / "metrics.jsonl" for i in (1, 2)]
    assert [file.read_text(encoding="utf-8") for file in kept] == ["first", "second"]


def test_the_folder_of_a_living_run_is_not_set_aside(here):
    folder, lock, _ = open_run_folder("x", "sync", resumed_step=None, is_auto=True)
    with lock, pytest.raises(BadInput, match="runs/x is being written by another run"):
        open_run_folder("x", "sync", resumed_step=None, is_auto=True)
    assert here.is_dir()


def test_damaged_checkpoints_make_room_for_new_ones(here):
    """Under their names they would be the newest, and new ones would be removed in their place."""
    for step in (4, 8, 12):
        (here / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
    _, lock, said = open_run_folder("x", "sync", resumed_step=4, is_auto=True)
    lock.close()
    assert [path.name for path in checkpoints_of(here)] == ["step-000004"]
    assert "kept as step-000008.damaged, step-000012.damaged" in said
    assert run_folder.checkpoints_of(here)[0].is_dir()


# --- what is not restarted ----------------------------------------------------------------------


@pytest.mark.complete
@pytest.mark.parametrize("words, message", [
    (["--steps", "0"], "--steps 0 must be at least 1"),  # found before the imports
    (["--prompts", "none.jsonl"], "prompts file none.jsonl does not exist"),  # found after them
])  # fmt: skip
def test_refused_input_is_not_restarted(tmp_path, words, message):
    restarts = ["--max-restarts", "3"]
    done = torchrun(*restarts, ROOT / "loop_sync.py", *words, ranks=2, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert done.stderr.count(message) == 1
    assert "SignalException: Process" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("restarts, done, parent, is_told", [
    ("3", "0", ["/venv/bin/python", "/venv/bin/torchrun", "loop_sync.py"], True),
    ("3", "0", ["python", "-m", "torch.distributed.run", "loop_sync.py"], True),
    ("3", "1", ["python", "/venv/bin/torchrun", "loop_sync.py"], False),  # accepted before
    ("0", "0", ["python", "/venv/bin/torchrun", "loop_sync.py"], False),  # it ends by itself
    ("3", "0", ["/sbin/init"], False),  # torchrun is gone, and this rank has a new parent
])  # fmt: skip
def test_only_a_torchrun_that_would_restart_is_told_to_end(
    monkeypatch, restarts, done, parent, is_told
):
    told = []
    process = SimpleNamespace(cmdline=lambda: parent, send_signal=told.append)
    monkeypatch.setattr(psutil, "Process", lambda pid: process if pid == os.getppid() else None)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", done)
    processes.forgo_restarts()
    assert told == [signal.SIGTERM] * is_told


# --- what is killed -----------------------------------------------------------------------------


class Job:
    """torchrun --max-restarts 3 with --resume auto, of which processes are killed."""

    def __init__(self, folder, *words):
        self.folder, self.output = folder, open(folder / "output", "a+", encoding="utf-8")
        command = [sys.executable, "-m", "torch.distributed.run", "--max-restarts", "3", *words]
        command += [str(ROOT / "loop_sync.py"), *RUN, *AUTO]
        env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        # With a shared store torch 2.11 does not tell a node that comes later where rank 0 is.
        env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        streams = dict(stdout=self.output, stderr=subprocess.STDOUT)
        self.process = subprocess.Popen(command, cwd=folder, env=env, **streams)

    def wait_for_checkpoint(self, step: int) -> None:
        deadline = time.time() + 240
        while not any(
            run_folder.step_of(f) >= step for f in checkpoints_of(self.folder / "runs/x")
        ):
            assert self.process.poll() is None and time.time() < deadline, self.text()
            time.sleep(0.1)

    def processes(self) -> dict[str, list[psutil.Process]]:
        family = psutil.Process(self.process.pid).children(recursive=True)
        engines = [p for p in family if p.cmdline()[:1] and "sglang::sch" in p.cmdline()[0]]
        ranks = [p for p in family if p.ppid() == self.process.pid]
        return {"rank": ranks, "engine": engines, "all": family}

    def text(self) -> str:
        self.output.seek(0)
        return self.output.read()


def rows_of(folder) -> list[dict]:
    return [
        {key: value for key, value in row.items() if not key.endswith(("_s", "_wait"))}
        for row in metrics_of(folder / "runs" / "x")
    ]


@pytest.fixture(scope="module")
def undisturbed_rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    torchrun(ROOT / "loop_sync.py", *RUN, "--name", "x", ranks=2, cwd=folder)
    return rows_of(folder)


@pytest.mark.complete
def test_after_kills_the_job_goes_on_by_itself_digit_for_digit(tmp_path, undisturbed_rows):
    """Of two ranks one is killed before the first checkpoint, then one's engine, then the other."""
    job = Job(tmp_path, "--standalone", "--nproc-per-node", "2")
    try:
        for victim, step in (("rank", None), ("engine", 4), ("rank", 12)):
            if step is None:
                while not (tmp_path / "runs/x/metrics.jsonl").exists():
                    assert job.process.poll() is None, job.text()
                    time.sleep(0.1)
            else:
                job.wait_for_checkpoint(step)
            job.processes()[victim][-1].kill()
        assert job.process.wait(200) == 0, job.text()
    finally:
        job.process.kill()
    assert rows_of(tmp_path) == undisturbed_rows
    assert (tmp_path / "runs" / "x-restarted-1").is_dir()
    assert "runs/x has no checkpoint: the run starts afresh, and its files are kept" in job.text()


@pytest.mark.complete
def test_a_node_that_comes_back_is_taken_up_again(tmp_path, held_port, undisturbed_rows):
    """Two launchers on one machine stand for two nodes. Every process of the second is killed."""
    endpoint = f"127.0.0.1:{held_port}"
    words = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"]
    words += ["--rdzv-endpoint", endpoint, "--local-addr", "127.0.0.1", "--rdzv-conf"]
    nodes = [Job(tmp_path, *words, f"is_host={int(node == 0)}") for node in range(2)]
    try:
        nodes[0].wait_for_checkpoint(8)
        (rank,) = nodes[0].processes()["rank"]
        lost = nodes[1].processes()["all"]
        for process in [nodes[1].process, *lost]:
            process.kill()
        nodes[1].process.wait()
        rank.wait(60)  # then torchrun has noticed; one that came before would meet the lost node
        nodes.append(Job(tmp_path, *words, "is_host=0"))
        assert nodes[0].process.wait(240) == 0, nodes[0].text()
        assert nodes[2].process.wait(60) == 0, nodes[2].text()
    finally:
        for node in nodes:
            node.process.kill()
    assert rows_of(tmp_path) == undisturbed_rows
