"""A run that is told to stop writes a checkpoint, ends well, and goes on from it.

Schedulers and closed terminals send the signal to torchrun, a preemption to the ranks. What a
signal does to one process is tested in test_processes.py, killed ranks in test_loop_sync.py.
"""

import json
import os
import signal

import pytest
from conftest import ROOT, SMALL_RUN, false_alarms, metrics_of, torchrun

from harness import checkpoint
from harness.run_folder import checkpoints_of

pytestmark = pytest.mark.usefixtures("more")


@pytest.mark.complete
@pytest.mark.parametrize("script, number, reward", [
    ("loop_sync.py", signal.SIGTERM, "math"),
    ("loop_async.py", signal.SIGHUP, "exact"),
])  # fmt: skip
def test_torchrun_told_to_stop_leaves_a_checkpoint(start_loop, tmp_path, script, number, reward):
    """torchrun hands the signal to every process of each rank's group, engines and judges too.

    A second one changes nothing.
    """
    started = start_loop(script, *SMALL_RUN, "--reward", reward, rows=3)
    for rank in range(2):
        os.killpg(started.rank(rank).pid, number)
    started.process.send_signal(number)
    assert started.end(60) != 0  # torchrun's own code for a signal
    rows = metrics_of(tmp_path / "runs" / "long")
    (saved,) = checkpoints_of(tmp_path / "runs" / "long")
    assert checkpoint.describe_damage(saved) == ""
    assert saved.name == f"step-{rows[-1]['step']:06d}"
    assert not any(row.get("reward_errors") for row in rows)
    said = started.text()
    assert f"as asked by {number.name}: go on" in said
    assert "SGLang engine died" not in said


@pytest.mark.complete
def test_a_run_that_is_told_to_stop_before_its_first_step_ends_at_once(start_loop, tmp_path):
    started = start_loop("loop_sync.py", *SMALL_RUN, rows=0)
    started.wait_for(lambda: len(started.engines()) == 2, 120)
    started.process.send_signal(signal.SIGTERM)
    assert started.end(25) != 0  # torchrun kills after 30 s
    assert started.text().count("interrupted by SIGTERM: rank") == 2
    assert metrics_of(tmp_path / "runs" / "long") == []


@pytest.mark.complete
@pytest.mark.parametrize("script, flags", [
    ("loop_sync.py", []),
    ("loop_async.py", ["--max-staleness", "2"]),
])  # fmt: skip
def test_told_to_stop_it_saves_and_ends_well(start_loop, tmp_path, script, flags):
    """SIGTERM to the ranks; the asynchronous loop has groups in flight then."""
    started = start_loop(script, *SMALL_RUN, *flags, rows=3)
    # Nobody outside this machine can reach a rank or an engine. torchrun's own store is not ours.
    connections = [c for process in started.family for c in process.net_connections()]
    assert {c.laddr.ip for c in connections if c.status == "LISTEN"} == {"127.0.0.1"}
    for rank in (0, 1) if script == "loop_async.py" else (1,):  # one that is told tells the others
        started.rank(rank).send_signal(signal.SIGTERM)
    assert started.end(60) == 0
    run = tmp_path / "runs" / "long"
    (saved,) = checkpoints_of(run)
    assert checkpoint.describe_damage(saved) == ""
    assert "go on with --name long --resume" in started.text()
    assert false_alarms(started.whole_output()) == []
    last = metrics_of(run)[-1]["step"]
    assert saved.name == f"step-{last:06d}"
    if script == "loop_async.py":
        state = json.loads((saved / "state.json").read_text(encoding="utf-8"))
        assert len(state["ranks"][1]["in_flight"]) == 2 * 4
    more = ["--steps", str(last + 4), "--name", "long", "--resume"]
    torchrun(ROOT / script, *SMALL_RUN, *flags, *more, ranks=2, cwd=tmp_path)
    rows = metrics_of(run)
    steps = [row["step"] for row in rows if "step_s" in row]  # an evaluation may have its own row
    assert steps == list(range(1, last + 5))
    assert max(row.get("staleness_max", 0) for row in rows) <= 2
