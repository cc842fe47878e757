"""Whole runs on one GPU: the toy learns in FP8, a model of real size, and what a kill leaves."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, metrics_of
from on_gpu import (
    FLAGS,
    QWEN3_1_7B,
    Run,
    evidence,
    has_gpu,
    on_gpu,
    on_gpu_only,
    used_bytes,
    write_qwen3_1_7b,
)


@on_gpu
def test_the_toy_learns_in_fp8(tmp_path):
    start = time.perf_counter()
    run = Run(tmp_path, "loop_sync.py")
    code = run.process.wait(400)
    took = time.perf_counter() - start
    assert code == 0, run.text()[-6000:]
    rows = metrics_of(run.folder)
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


@on_gpu_only
def test_two_ranks_on_one_gpu_are_refused(tmp_path):
    if torch.cuda.device_count() > 1:
        pytest.skip("there are several GPUs here")
    run = Run(tmp_path, "loop_async.py", ranks=2)
    assert run.process.wait(90) != 0
    said = next(line for line in run.text().splitlines() if line.startswith("error: "))
    evidence("loop_async.py on one GPU", said=said)
    assert "2 ranks on a machine of 1 GPUs" in said and "exitcode  : 2" in run.text()


LOAD = "--prompts-per-step 16 --samples-per-prompt 8 --max-response-tokens 512"
LOAD += " --microbatch-tokens 8192 --lr 1e-6 --steps 4 --eval-samples 8"
PLANNED = "--plan-gpus 1 --plan-gpu-gb 141 --plan-prompt-tokens 9".split()


@on_gpu
def test_a_model_of_real_size(tmp_path):
    """Qwen3-1.7B with random weights: seconds of each stage, and memory beside the plan's."""
    write_qwen3_1_7b(tmp_path / "model")
    planned = subprocess.run(
        [
            sys.executable,
            ROOT / "loop_sync.py",
            "--plan",
            "--model",
            QWEN3_1_7B,
            *PLANNED,
            *LOAD.split(),
        ],
        capture_output=True,
        text=True,
    ).stdout
    plan = {name: float(GB) for name, GB in re.findall(r"^  ([a-z-]+) +([\d.]+) GB", planned, re.M)}

    before, most = used_bytes(), 0
    run = Run(tmp_path, "loop_sync.py", "--model", str(tmp_path / "model"), *LOAD.split())
    while run.process.poll() is None:
        most = max(most, used_bytes())
        time.sleep(0.02)
    assert run.process.returncode == 0, run.text()[-6000:]
    rows = metrics_of(run.folder)
    last = rows[-2]  # after the last step every byte is compared, too
    evidence(
        "Qwen3-1.7B, 128 answers of 512 tokens",
        **{name: last[name] for name in ("step_s", "rollout_s", "train_s", "sync_s")},
        sync_GB=last["sync_bytes"] / 1e9,
        most_GB_in_use=(most - before) / 1e9,
        planned_GB=", ".join(f"{name} {plan[name]}" for name in ("train", "hand-off", "generate")),
        mismatch_abs=last["mismatch_abs"],
        tokens=last["tokens"],
    )


@on_gpu
@pytest.mark.parametrize("victim", ["scheduler", "torchrun"])
def test_a_kill_leaves_no_process_and_no_memory(start_loop, victim):
    used = used_bytes()
    started = start_loop("loop_sync.py", *FLAGS, rows=2, ranks=1)
    during = used_bytes()
    process = started.engine() if victim == "scheduler" else started.process
    os.kill(process.pid, signal.SIGKILL)
    assert started.end(90) != 0
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
        assert "a process of the SGLang engine" in started.whole_output()
