"""Whole runs on one GPU: the toy learns in FP8, and a killed run leaves nothing behind."""

import json
import os
import signal
import time

import psutil
import pytest
from on_gpu import Run, evidence, has_gpu, on_gpu, used_bytes


@on_gpu
def test_the_toy_learns_in_fp8(tmp_path):
    start = time.perf_counter()
    run = Run(tmp_path, "loop_sync.py")
    code = run.process.wait(400)
    took = time.perf_counter() - start
    assert code == 0, run.text()[-6000:]
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]

    def median(name):
        values = sorted(row[name] for row in steps)
        return values[len(values) // 2]

    evidence(
        "80 steps of the toy in FP8",
        seconds=took,
        held_out=f"{rows[0]['held_out']} -> {rows[-1]['held_out']}",
        mismatch_abs=median("mismatch_abs"),
        **{name: median(name) for name in ("step_s", "rollout_s", "train_s", "sync_s")},
    )
    assert rows[-1]["held_out"] > 0.9
    assert median("mismatch_abs") < 0.1


@on_gpu
@pytest.mark.parametrize("victim", ["scheduler", "torchrun"])
def test_a_kill_leaves_no_process_and_no_memory(tmp_path, victim):
    used = used_bytes()
    run = Run(tmp_path, "loop_sync.py", "--steps", "5000")
    run.wait_for_rows(2)
    family, during = run.family(), used_bytes()
    process = run.process
    if victim == "scheduler":
        process = next(p for p in family if p.cmdline()[0].startswith("sglang::scheduler"))
    os.kill(process.pid, signal.SIGKILL)
    assert run.process.wait(90) != 0
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive, [process.cmdline() for process in alive]
    end = time.time() + 30
    while used_bytes() > used + 50e6 and time.time() < end:
        time.sleep(0.5)
    evidence(
        f"kill -9 of the {victim}",
        used_MB_during=during / 1e6,
        after=used_bytes() / 1e6,
        before=used / 1e6,
        gpu=has_gpu,
    )
    assert used_bytes() < used + 50e6
    if victim == "scheduler":
        assert "a process of the SGLang engine" in run.text()
