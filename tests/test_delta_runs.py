"""Whole runs that send changes alone: the same run as one that sends every weight, digit for digit.

Every byte of the engine is compared after every step. The coding is in test_delta.py, layouts
without engines in test_layouts.py. Not covered: GPUs.
"""

import re

import pytest
import torch
from conftest import ROOT, metrics_of, torchrun, write_model

SMALL = "--prompts-per-step 4 --samples-per-prompt 8 --eval-samples 16 --eval-every 1000 --export"
OWN = re.compile(r"_s$|_wait$|^sync_")  # what two runs may differ in: seconds, and what was sent


def run(folder, sync: str, script: str, *flags: str, ranks: int) -> list[dict]:
    given = [*SMALL.split(), "--check-sync", "--sync", sync, "--name", sync, *flags]
    torchrun(ROOT / script, *given, ranks=ranks, cwd=folder)
    return metrics_of(folder / "runs" / sync)


def alike(rows: list[dict]) -> list[dict]:
    return [{name: x for name, x in row.items() if not OWN.search(name)} for row in rows]


@pytest.mark.complete
@pytest.mark.parametrize(
    "script, ranks, flags",
    [
        ("loop_sync.py", 1, ["--steps", "20"]),
        ("loop_sync.py", 2, ["--steps", "20", "--tp", "2"]),
        ("loop_sync.py", 2, ["--steps", "20", "--pp", "2"]),
        ("loop_sync.py", 2, ["--steps", "20", "--cp", "2"]),
        ("loop_sync.py", 1, ["--steps", "3", "--rollout-dtype", "bf16", "--lr", "1e-6"]),
        ("loop_async.py", 2, ["--steps", "20", "--max-staleness", "0"]),
    ],
)
def test_a_run_that_sends_changes_is_the_run_that_sends_all(tmp_path, script, ranks, flags):
    full = run(tmp_path, "full", script, *flags, ranks=ranks)
    delta = run(tmp_path, "delta", script, *flags, ranks=ranks)
    assert alike(full) == alike(delta)
    full, delta = ([row for row in rows if "step_s" in row] for rows in (full, delta))
    assert {row["sync_full"] for row in full} == {1} and {row["sync_full"] for row in delta} == {0}
    assert sum(row["sync_bytes"] for row in delta) < 0.9 * sum(row["sync_bytes"] for row in full)
    assert all(0 < row["sync_changed_bf16"] < 1 for row in delta)


@pytest.mark.complete
def test_where_everything_moves_whole_tensors_go(tmp_path):
    """A learning rate of 0.01: the run is ruined, and the engine still holds every byte."""
    flags = ["--steps", "3", "--lr", "1e-2"]
    full = run(tmp_path, "full", "loop_sync.py", *flags, ranks=1)
    delta = run(tmp_path, "delta", "loop_sync.py", *flags, ranks=1)
    for whole, changes in zip(full[1:], delta[1:]):
        assert changes["sync_bytes"] <= 1.01 * whole["sync_bytes"]
    assert delta[1]["sync_changed_fp8"] > 0.5


@pytest.mark.complete
@pytest.mark.parametrize("ranks, flags", [(2, ["--ep", "2"]), (4, ["--tp", "2", "--ep", "2"])])
def test_experts_over_ranks(tmp_path, ranks, flags):
    folder = write_model(
        tmp_path / "model", "qwen3_moe", dtype=torch.bfloat16, max_position_embeddings=512
    )
    flags = ["--model", str(folder), "--steps", "20", "--lr", "1e-5", *flags]
    full = run(tmp_path, "full", "loop_sync.py", *flags, ranks=ranks)
    assert alike(full) == alike(run(tmp_path, "delta", "loop_sync.py", *flags, ranks=ranks))


@pytest.mark.complete
def test_four_tensor_parallel_trainers_and_an_engine(tmp_path):
    """Every byte is compared after every step.

    The engine's batches follow time, so that no two asynchronous runs of this model are alike.
    """
    fields = dict(max_position_embeddings=512, num_key_value_heads=4)
    folder = write_model(tmp_path / "model", "qwen3", dtype=torch.bfloat16, **fields)
    flags = ["--model", str(folder), "--steps", "20", "--lr", "1e-5", "--tp", "4"]
    rows = run(tmp_path, "delta", "loop_async.py", *flags, ranks=5)
    assert [row["sync_full"] for row in rows if "step_s" in row] == [0] * 20


@pytest.mark.complete
def test_a_resumed_run_begins_with_everything(tmp_path):
    """At another layout, too: what a rank has sent is in no checkpoint."""
    script = ROOT / "tests" / "workers" / "logged_hand_offs.py"
    flags = [*SMALL.split(), "--check-sync", "--sync", "delta", "--name", "run"]
    first = torchrun(script, *flags, "--steps", "2", "--save-every", "2", ranks=1, cwd=tmp_path)
    flags += ["--steps", "4", "--resume", "--tp", "2"]
    resumed = torchrun(script, *flags, ranks=2, cwd=tmp_path)

    def sent(run):
        return sorted(set(re.findall(r"sent version \d+, full \d", run.stdout)))

    assert sent(first) == [f"sent version {v}, full {int(v == 0)}" for v in range(3)]
    assert sent(resumed) == [f"sent version {v}, full {int(v == 2)}" for v in (2, 3, 4)]
