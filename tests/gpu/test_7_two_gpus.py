"""Two GPUs: data and tensor parallelism, the asynchronous loop, an engine of two ranks.

As every test of this folder, one that has not been run says so in docs/gpu.md.
"""

import json

import pytest
import torch
from conftest import metrics_of, torchrun
from on_gpu import STAND_IN, Run, evidence, has_gpu

two_gpus = pytest.mark.skipif(
    not STAND_IN and torch.cuda.device_count() < 2 if has_gpu else not STAND_IN,
    reason="needs two GPUs",
)


def last_row(run: Run) -> dict:
    """Return the metrics of the last step; its evaluation may have a row of its own."""
    code = run.process.wait(400)
    assert code == 0, run.text()[-6000:]
    rows = metrics_of(run.folder)
    return {**[row for row in rows if "step_s" in row][-1], **rows[-1]}


@two_gpus
@pytest.mark.parametrize(
    "script, flags",
    [
        ("loop_sync.py", []),  # two trainers, two engines
        ("loop_sync.py", ["--tp", "2"]),
        ("loop_sync.py", ["--tp", "2", "--engine-tp", "2"]),  # one engine on both
        ("loop_sync.py", ["--pp", "2"]),
        ("loop_sync.py", ["--cp", "2"]),
        ("loop_async.py", []),
    ],
)
def test_the_toy_learns_on_two(tmp_path, script, flags):
    if STAND_IN and "--engine-tp" in flags:
        pytest.skip("the stand-in has engines of one rank")
    steps = ["--steps", "30", "--check-sync"]
    row = last_row(Run(tmp_path, script, *flags, *steps, ranks=2))
    shown = {name: row[name] for name in ("held_out", "step_s", "sync_s", "mismatch_abs")}
    evidence(f"{' '.join([script, *flags])}, two ranks, every byte compared each step", **shown)
    assert row["held_out"] > 0.5


@two_gpus
def test_the_gate_sees_a_wrong_shard_on_the_second_gpu():
    """Over NCCL; test_gpu_engine.py asks the same of gloo."""
    (first,), (second,) = json.loads(torchrun("tests/workers/gate.py", ranks=2).stdout)
    evidence("an engine of two ranks, the second with other weights", first=first, second=second)
    assert first == [16, 0, 0] and second[1] > 0
