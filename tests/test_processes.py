"""processes.py and exits.run_main: signals, exit codes, limits and folders of a rank.

Whole runs that are told to stop are in test_checkpoint_signals.py, killed ones in
test_loop_sync.py.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import ROOT

from common.processes import end_signals_blocked


def python(code: str, **changes) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "RANK": "0", **changes.pop("env", {})}
    how = dict(cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment)
    return subprocess.run(command, **how, **changes)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_child_outlives_a_signal_that_comes_while_it_starts(number):
    code = "from common import processes; processes.ignore_end_signals(); print('lives')"
    with end_signals_blocked():
        child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    child.send_signal(number)
    assert child.communicate(timeout=60)[0] == b"lives\n"
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_process_ends_although_its_judge_ignores_sigterm():
    code = """
import os, signal, time
from data.math_judge import call_in_worker
before = call_in_worker(os.getpid)
os.kill(before, signal.SIGTERM)
os.kill(before, signal.SIGHUP)
time.sleep(0.2)
print(call_in_worker(os.getpid) == before)
"""
    done = python(code)
    assert (done.stdout, done.stderr, done.returncode) == ("True\n", "", 0)


def test_how_a_signal_ends_a_rank():
    """Before the first step at once, by 128 + its number. Afterwards the loop decides."""
    code = """
import json, os, resource, signal, time
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
from harness import exits
codes = []
def told(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)
        time.sleep(0.01)
def ended_by(*numbers):
    exits.told_to_stop.clear()
    try:
        exits.run_main(lambda: told(*numbers))
        codes.append(0)
    except SystemExit as end:
        codes.append(end.code)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    ended_by(number)
exits.is_training.set()
ended_by(signal.SIGTERM, signal.SIGHUP, signal.SIGTERM)
heard_all = len(exits.told_to_stop) == 3
ended_by(signal.SIGINT)
soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
print(json.dumps([codes, heard_all, soft == min(hard, 2**16)]))
"""
    done = python(code)
    assert json.loads(done.stdout) == [[130, 143, 129, 0, 130], True, True], done.stderr
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGINT")
    said = [f"interrupted by {name}: rank 0 has ended its engine" for name in names]
    assert done.stderr.splitlines() == said


def test_a_run_under_nohup_does_not_end_with_its_terminal():
    code = """
import os, signal
from harness import exits
exits.run_main(lambda: os.kill(os.getpid(), signal.SIGHUP))
print("went on")
"""
    ignore = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731
    assert python(code, preexec_fn=ignore).stdout == "went on\n"


HOME = (
    "import os; from common import processes; processes.use_writable_home();"
    " print(os.environ['HOME'])"
)


@pytest.mark.parametrize("home", ["/proc/nothing", "/dev/null/x"])
def test_a_home_that_cannot_be_written_is_replaced(home, tmp_path):
    done = python(HOME, env=dict(HOME=home, TMPDIR=str(tmp_path)))
    taken = Path(done.stdout.strip())
    assert taken.parent == tmp_path
    assert taken.stat().st_mode & 0o777 == 0o700
    assert f"the home {home} cannot be written" in done.stderr


def test_a_home_that_can_be_written_is_kept(tmp_path):
    done = python(HOME, env=dict(HOME=str(tmp_path)))
    assert (done.stdout, done.stderr) == (f"{tmp_path}\n", "")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_others_can_write_is_no_home():
    """Whoever plants a compiled kernel in a cache runs code in all processes that use it."""
    with tempfile.TemporaryDirectory() as folder:
        planted = Path(folder) / f"nanoslime-home-{os.getuid()}"
        planted.mkdir()
        planted.chmod(0o777)
        done = python(HOME, env=dict(HOME="/proc/nothing", TMPDIR=folder))
        assert done.stdout.strip() not in ("", str(planted))
        assert done.stdout.startswith(folder)
