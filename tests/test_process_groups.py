"""process_groups.py: how long ranks wait, who is named, restarts by torchrun, and what listens.

Ranks without an engine show what does not need one. Whole runs show that an engine that hangs is
named, that torchrun --max-restarts goes on, and that two nodes train. Not covered: NCCL, a node
that is replaced by another machine.
"""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta

import loop_async
import loop_sync
import psutil
import pytest
import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from conftest import ROOT, metrics_of, torchrun

from backends.megatron import model as megatron_model
from common import process_groups
from common.settings import InFlightSettings, RolloutSettings, TrainSettings
from harness.run_folder import checkpoints_of
from reward import RewardSettings
from workers.groups import drop_megatron

WORKERS = ROOT / "tests" / "workers"
QUICK = ["--eval-every", "50", "--eval-samples", "8", "--prompts-per-step", "4", "--export"]
QUICK += ["--samples-per-prompt", "4"]


# --- how long a rank may wait -----------------------------------------------------------------


def judged(sample):
    return 1.0


def wait_of(loop, *, rewards=None, ranks=1, turns=1, **rollout) -> float:
    """The limit, without what is there for work that no flag limits."""
    sizes = dict(prompts_per_step=4, samples_per_prompt=8, eval_samples=1, answer_timeout_s=100.0)
    parts = dict(rollout=RolloutSettings(**{**sizes, **rollout}))
    parts["reward"] = RewardSettings(judges=8, judge_timeout_s=10.0, **(rewards or {}))
    if loop is loop_async:
        parts["in_flight"] = InFlightSettings(max_staleness=1)
    settings = loop.Settings(**parts)
    limit = process_groups.longest_wait_s(settings, judged, rollout_ranks=ranks, turns=turns)
    return limit - process_groups.UNLIMITED_WORK_S


@pytest.mark.parametrize("changes, seconds", [
    (dict(), 200 + 200 + 4 * 10),  # a hand-off, answers, and 32 of them judged 8 at a time
    (dict(ranks=2), 200 + 200 + 2 * 10),
    (dict(answer_timeout_s=1.0), 2 + 2 + 40),
    (dict(turns=3), 200 + 600 + 40),
    (dict(rewards=dict(dynamic_sampling=2)), 200 + 3 * 240),
    (dict(eval_samples=80), 200 + 200 + 10 * 10),  # an evaluation takes longer than a step
])  # fmt: skip
def test_a_rank_waits_for_what_the_flags_allow_another(changes, seconds):
    assert wait_of(loop_sync, **changes) == pytest.approx(seconds)


def test_the_asynchronous_loop_waits_for_all_that_its_judge_has():
    assert wait_of(loop_async) == pytest.approx(200 + 200 + 8 * 10)
    replaced = wait_of(loop_async, rewards=dict(dynamic_sampling=1))
    assert replaced == pytest.approx(200 + (1 + 4) * (200 + 8 * 10))  # one group, four times


def test_a_judge_with_fewer_places_takes_longer(monkeypatch):
    monkeypatch.setattr(judged, "at_a_time", 4, raising=False)
    assert wait_of(loop_sync) == pytest.approx(200 + 200 + 8 * 10)


@pytest.mark.parametrize("limit", [math.inf, 1e30])
def test_a_run_without_a_limit_waits_for_a_year(limit):
    wait_s = wait_of(loop_sync, answer_timeout_s=limit) + process_groups.UNLIMITED_WORK_S
    assert timedelta(seconds=wait_s) == timedelta(days=365)


def test_every_group_of_megatron_has_the_limit(one_rank, monkeypatch):
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        monkeypatch.setattr(c10d, name, getattr(c10d, name))  # set back at the end
    monkeypatch.setattr(process_groups._Start, "wait_s", 1800.0)
    process_groups.set_wait(77.0)
    drop_megatron()  # an earlier test's groups have another limit
    before = set(c10d._world.pg_map)
    megatron_model.init_parallel(TrainSettings(), seed=1)
    made = set(c10d._world.pg_map) - before
    waits = {group._get_backend(torch.device("cpu")).options._timeout for group in made}
    drop_megatron()
    assert made
    assert waits == {timedelta(seconds=77)}


def test_a_connection_whose_other_end_is_gone_ends():
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname()) as link:
            fds = len(os.listdir("/proc/self/fd"))
            process_groups.watch_links()
            assert link.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            limit = link.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
            assert limit == process_groups.LOST_LINK_S * 1000
            assert len(os.listdir("/proc/self/fd")) == fds


@pytest.mark.complete
@pytest.mark.parametrize("where, exchange", [("stopped", 2), ("stopped_inside", 1)])
def test_a_rank_that_stands_still_is_named_within_the_limit(tmp_path, where, exchange):
    done = torchrun(WORKERS / "two_ranks.py", where, tmp_path, ranks=2, check=False)
    assert done.returncode != 0
    named = f"error: rank 0 has waited 4 s for rank 1 at or after exchange {exchange};"
    assert named in done.stderr


@pytest.mark.parametrize("text, meaning", [
    ("Read error [10.0.0.2]:3: Connection reset by peer", "lost its connection to another rank"),
    ("Read error [10.0.0.2]:3: Connection timed out", "cannot reach the rank at 10.0.0.2: its"),
    ("Network is unreachable", "cannot reach another rank: its machine, or the link to it"),
    ("Timed out waiting 4000ms for recv operation to complete", "for another rank; the traceback"),
    ("shape '[2]' is invalid", None),
])  # fmt: skip
def test_what_an_error_of_a_collective_means(text, meaning):
    explained = process_groups.explain(RuntimeError(text))
    assert meaning in explained if meaning else explained == ""


@pytest.mark.complete
def test_a_hanging_engine_is_named_by_its_own_rank(start_loop):
    """The other ranks wait for it meanwhile, with 2 s for what no flag limits."""
    limits = ["--answer-timeout-s", "5", "--judge-timeout-s", "1"]
    started = start_loop("tests/workers/impatient.py", *QUICK, *limits, rows=3)
    engine = started.engine()
    guilty = engine.parent().environ()["RANK"]
    engine.send_signal(signal.SIGSTOP)
    assert started.end(120) != 0
    assert f"error: rank {guilty}: the engine has not finished" in started.text()
    assert "has waited" not in started.text()


# --- restarts ---------------------------------------------------------------------------------


@pytest.mark.complete
@pytest.mark.parametrize("rollout_ranks", [0, 1])
def test_restarted_ranks_meet_anew(tmp_path, monkeypatch, rollout_ranks):
    monkeypatch.setenv("ROLLOUT_RANKS", str(rollout_ranks))
    restarts = ["--max-restarts", "1"]
    torchrun(*restarts, WORKERS / "two_ranks.py", "killed_once", tmp_path, ranks=2)
    assert json.loads((tmp_path / "seen.json").read_text(encoding="utf-8")) == ["1", "1"]


@pytest.mark.complete
def test_ranks_of_two_nodes_meet_anew_though_each_node_counts_its_own_restarts(tmp_path, held_port):
    endpoint = f"127.0.0.1:{held_port}"
    env = {**os.environ, "ROLLOUT_RANKS": "0", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
    command += ["--max-restarts", "1"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--local-addr", "127.0.0.1"]
    command += [str(WORKERS / "two_ranks.py"), "killed_once", str(tmp_path)]
    with open(tmp_path / "output", "w", encoding="utf-8") as output:
        streams = dict(env=env, stdout=output, stderr=subprocess.STDOUT)
        nodes = [subprocess.Popen(command, **streams) for _ in range(2)]
        try:
            codes = [node.wait(120) for node in nodes]
        finally:
            for node in nodes:
                node.kill()
    assert codes == [0, 0], (tmp_path / "output").read_text(encoding="utf-8")[-3000:]
    seen = json.loads((tmp_path / "seen.json").read_text(encoding="utf-8"))
    assert sorted(seen) == ["0", "1"]


@pytest.mark.complete
@pytest.mark.parametrize("script, victim", [("loop_sync.py", "engine"), ("loop_async.py", "rank")])
def test_a_restarted_run_goes_on_from_its_checkpoint(tmp_path, script, victim):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "1"]
    command += ["--nproc-per-node", "2", str(ROOT / script), *QUICK, "--steps", "40"]
    with open(tmp_path / "output", "w+", encoding="utf-8") as output:
        job = subprocess.Popen(
            [*command, "--save-every", "2"], cwd=tmp_path, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            deadline = time.time() + 240
            while not (folders := checkpoint_folders(tmp_path)):
                assert job.poll() is None
                assert time.time() < deadline
                time.sleep(0.1)
            family = psutil.Process(job.pid).children(recursive=True)
            ranks = [p for p in family if p.ppid() == job.pid]
            engines = [p for p in family if p.cmdline()[0].startswith("sglang::scheduler")]
            {"rank": ranks, "engine": engines}[victim][-1].kill()
            code = job.wait(400)
        finally:
            job.kill()
        output.seek(0)
        text = output.read()
    assert code == 0, text[-5000:]
    (run,) = (tmp_path / "runs").iterdir()
    assert folders[0].parent.parent == run
    steps = [row["step"] for row in metrics_of(run) if "loss" in row]  # the others: evaluations
    assert steps == list(range(1, 41))
    assert "going on from" in text


def checkpoint_folders(folder):
    return [path for run in folder.glob("runs/*") for path in checkpoints_of(run)]


@pytest.fixture
def restarted(monkeypatch, tmp_path):
    """A start of one rank in a job that had begun runs/a before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    job = dist.HashStore()
    job.set("run", "a")
    for name, value in dict(of_the_job=job, store=dist.HashStore(), goes_on=False).items():
        monkeypatch.setattr(process_groups._Start, name, value)
    (tmp_path / "runs" / "a" / "checkpoints").mkdir(parents=True)
    return tmp_path / "runs"


def test_a_restarted_run_without_a_checkpoint_begins_again(restarted):
    for name in ("step-000002.part", "step-000001-bf16"):
        (restarted / "a" / "checkpoints" / name).mkdir()
    settings = process_groups.after_restart(loop_sync.Settings())
    assert settings.run.name == "a"
    assert not settings.run.resume
    assert [path.name for path in restarted.iterdir()] == ["a-restarted-1"]


def test_a_restarted_run_with_a_checkpoint_resumes(restarted):
    (restarted / "a" / "checkpoints" / "step-000002").mkdir()
    settings = process_groups.after_restart(loop_sync.Settings())
    assert settings.run.name == "a"
    assert settings.run.resume
    assert process_groups.goes_on()


def test_without_restarts_nothing_is_looked_at(restarted, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    assert process_groups.after_restart(loop_sync.Settings()) == loop_sync.Settings()


# --- file systems -----------------------------------------------------------------------------


@pytest.mark.complete
def test_ranks_on_file_systems_of_their_own_are_refused(tmp_path):
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    done = torchrun(WORKERS / "two_ranks.py", "apart", tmp_path, ranks=2, check=False)
    assert "1 of 2 ranks do not see what rank 0 has written to runs/a" in done.stderr
    assert f"rank 1 on {socket.gethostname()} in {tmp_path / '1'}" in done.stderr
    assert "on a file system that all machines share" in done.stderr
    assert "exitcode  : 2" in done.stderr
    assert list((tmp_path / "0" / "runs").iterdir()) == []


# --- what listens -----------------------------------------------------------------------------


def test_one_rank_without_torchrun_has_a_store_that_does_not_listen(monkeypatch):
    monkeypatch.setattr(process_groups, "listen_on_loopback", lambda: None)
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    store, rank, world_size = process_groups._job_store()
    assert isinstance(store, dist.HashStore)
    assert (rank, world_size) == (0, 1)


def test_a_held_port_is_free_for_its_listener_alone():
    with process_groups.held_port() as port:
        with pytest.raises(OSError, match="in use"), socket.socket() as other:
            other.bind(("127.0.0.1", port))
        with socket.create_server(("127.0.0.1", port)) as listener:  # as TCPStore's
            socket.create_connection(("127.0.0.1", port)).close()
            listener.accept()[0].close()
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", port))


def test_a_store_listens_once_however_often_it_was_asked_to(monkeypatch, held_port):
    """A restarted rank has asked before it forks; so its engine's process, a copy, asks again."""
    module = sys.modules["torch.distributed.rendezvous"]
    monkeypatch.setattr(module, "TCPStore", module.TCPStore)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    process_groups.listen_on_loopback()
    process_groups.listen_on_loopback()
    store = module.TCPStore("127.0.0.1", held_port, 1, is_master=True)
    store.set("key", "value")
    assert store.get("key") == b"value"


@pytest.mark.parametrize("addresses, env, is_refused", [
    (["127.0.1.1"], {}, True), (["::1"], {}, True), ([], {}, True),
    (["10.0.0.3"], {}, False), (["127.0.1.1", "10.0.0.3"], {}, False),
    (["127.0.1.1"], {"GLOO_SOCKET_IFNAME": "lo"}, False),
    (["127.0.1.1"], {"LOCAL_WORLD_SIZE": "4"}, False),
])  # fmt: skip
def test_a_name_that_other_machines_cannot_use_is_refused(monkeypatch, addresses, env, is_refused):
    def getaddrinfo(name, *args, **kwargs):
        if not addresses:
            raise socket.gaierror("Name or service not known")
        return [(0, 0, 0, "", (address, 0)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    for name, value in {"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "4", **env}.items():
        monkeypatch.setenv(name, value)
    problem = process_groups.interface_problem()
    assert ("GLOO_SOCKET_IFNAME=eth0" in problem) == is_refused == bool(problem)


def test_an_interface_that_is_none_is_refused(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,eth77")
    problem = process_groups.interface_problem()
    assert "'eth77' is no network interface of this machine, which has lo" in problem
