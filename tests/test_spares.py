"""Spare processes: what they share, how they get their work, how they end, which ranks fork them.

Why: they are copies of a process made before it knows what it needs them for. Not covered: engines
in them, which every run of the loops' tests has.
"""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import loop_async
import loop_sync
import psutil
import pytest
from conftest import ROOT

from harness import flags, start


def printed(code: str, **environment):
    """Run code in a fresh process with one thread; return what its last line says in JSON.

    The code may call fork_spares, of_spare, and ask(WORK), which runs WORK, more code, in a process
    of of_spare and returns what that assigns to `found`. ask calls `change` before the start.
    """
    before = """
        import json, multiprocessing, os, signal, sys, threading, time
        from common import spares
        from common.spares import fork_spares, of_spare

        def ask(work, change=lambda: None):
            reader, writer = multiprocessing.Pipe(duplex=False)
            process = of_spare(exec, (work + "\\nwriter.send(found)", {"writer": writer}))
            change()
            process.start()
            found = reader.recv()
            process.join()
            return found
    """
    code = textwrap.dedent(before) + textwrap.dedent(code)
    environment = {**os.environ, **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_spare_does_the_work_and_has_what_its_parent_had_imported():
    found = printed("""
        spares.mark = "set by the parent"  # a spawned process would import the module anew
        fork_spares(1)
        waiting, _ = spares.spares[0]
        print(json.dumps([waiting.pid, *ask("import os; from common import spares\\n"
              "found = [os.getpid(), spares.mark]")]))
    """)
    assert found[0] == found[1] and found[2] == "set by the parent"


def test_work_finds_the_environment_of_its_start_and_not_of_the_fork():
    found = printed(
        """
        fork_spares(1)
        def change():
            os.environ["ADDED"] = "1"
            del os.environ["REMOVED"]
        print(json.dumps(ask("import os; found = [os.environ.get('ADDED'),"
              " os.environ.get('REMOVED'), os.environ.get('KEPT')]", change)))
        """,
        REMOVED="1",
        KEPT="1",
    )
    assert found == ["1", None, "1"]


def test_when_none_is_left_a_process_is_spawned():
    found = printed("""
        spares.mark = "set by the parent"
        fork_spares(1)
        work = "from common import spares; found = getattr(spares, 'mark', 'imported anew')"
        print(json.dumps([ask(work), ask(work)]))
    """)
    assert found == ["set by the parent", "imported anew"]


def test_a_spare_that_was_killed_is_passed_over():
    found = printed("""
        fork_spares(2)
        (first, _), (second, _) = spares.spares
        first.kill(); first.join()
        print(json.dumps(ask("import os; found = os.getpid()") == second.pid))
    """)
    assert found is True


def test_whoever_reads_what_a_dead_spare_would_have_written_sees_its_end():
    """So SGLang notices a scheduler that dies while it starts."""
    found = printed("""
        fork_spares(1)
        reader, writer = multiprocessing.Pipe(duplex=False)
        process = of_spare(exec, ("import time; writer.send(1); time.sleep(600)",
                                  {"writer": writer}))
        process.start()
        del writer
        reader.recv()
        process.kill()
        try:
            print(json.dumps(reader.poll(60) and reader.recv()))
        except EOFError:
            print(json.dumps("end"))
    """)
    assert found == "end"


def test_a_loop_has_one_thread_when_it_could_fork():
    """Also where no OMP_NUM_THREADS is set: numpy's OpenBLAS would start one for each core."""
    code = "import os, loop_sync, reward, rollout, train_step, weight_sync;"
    code += "from harness import checkpoint, evaluate, export, start;"
    code += "print(len(os.listdir('/proc/self/task')))"
    threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if name not in threads}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.stdout.split()[-1:] == ["1"], done.stderr


def test_a_process_with_threads_is_not_forked():
    found = printed("""
        threading.Thread(target=time.sleep, args=(1,), daemon=True).start()
        fork_spares(1)
        print(len(spares.spares))
    """)
    assert found == 0


def test_a_signal_that_ends_a_run_leaves_its_spare_to_the_parent():
    """SIGTERM goes to the whole group; what a parent does on SIGQUIT is not for its copy to do."""
    found = printed("""
        signal.signal(signal.SIGQUIT, lambda *_: None)
        fork_spares(2)
        (first, _), (second, _) = spares.spares
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(first.pid, number)
        time.sleep(0.2)
        os.kill(second.pid, signal.SIGQUIT)
        second.join()
        print(json.dumps([ask("import os; found = os.getpid()") == first.pid, second.exitcode]))
    """)
    assert found == [True, -signal.SIGQUIT]


@pytest.mark.parametrize("how", ["os.kill(os.getpid(), 9)", "sys.exit()"])
def test_spares_without_work_end_with_their_parent(how):
    code = "import os, sys; from common import spares; spares.fork_spares(2);"
    code += f"print(*(p.pid for p, _ in spares.spares), flush=True); {how}"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
    end = time.monotonic() + 20
    while any(map(psutil.pid_exists, pids)) and time.monotonic() < end:
        time.sleep(0.01)
    assert len(pids) == 2 and not any(map(psutil.pid_exists, pids))


class Forked(Exception):
    """Raised where a rank would fork its spares."""


@pytest.mark.parametrize("loop, given, rank, forked", [
    (loop_sync, [], 1, 1),
    (loop_sync, ["--engine-tp", "2"], 0, 2),  # one engine of two ranks, started by the first
    (loop_sync, ["--engine-tp", "2"], 1, None),
    (loop_async, [], 0, None),  # a trainer
    (loop_async, [], 1, 1),
    (loop_sync, ["--plan", "--plan-gpus", "8"], 0, None),
    (loop_sync, ["--load-rollouts", "folder"], 0, None),
    (loop_sync, ["--sglang", "numa_node=[0]"], 0, None),  # SGLang binds what it spawns
    (loop_sync, ["--engine-tp", "999"], 0, 2),  # what is refused a moment later
])  # fmt: skip
def test_a_rank_forks_as_many_as_its_engine_has_ranks(monkeypatch, loop, given, rank, forked):
    def fork_spares(n):
        raise Forked(n)

    def checked_next(*_, **__):
        raise Forked(None)

    for name, value in dict(RANK=rank, WORLD_SIZE=2, LOCAL_RANK=rank).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("sys.argv", ["loop.py", *given])
    monkeypatch.setattr(start, "fork_spares", fork_spares)
    monkeypatch.setattr(start, "fetch_models", checked_next)
    with pytest.raises(Forked) as end:
        start.prepare(flags.parse_settings(loop.Settings), loop="any")
    assert end.value.args == (forked,)


def test_on_a_gpu_machine_none_is_forked(monkeypatch, pretend):
    pretend()
    test_a_rank_forks_as_many_as_its_engine_has_ranks(monkeypatch, loop_sync, [], 1, None)
