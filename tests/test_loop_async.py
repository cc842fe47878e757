"""loop_async.py on the real stack: bounded staleness under artificial slowness, updates in flight,
and what happens when a rank dies.

The queue's own promises are tested without an engine in test_in_flight.py, log-probs across an
update in test_engine.py, learning and speed by bench/overlap.py. Not covered: GPUs, several nodes,
NCCL.
"""

import json
import math
import signal
from pathlib import Path

import loop_async
import pytest
from conftest import ROOT, metrics_of, start_main, torchrun

from common import errors

TESTS = Path(__file__).parent
QUICK = ["--eval-samples", "8", "--prompts-per-step", "4", "--samples-per-prompt", "4", "--export"]
LONG = ["--max-response-tokens", "40"]


class Done:
    """A finished run of tests/workers/async_run.py: what each rank saw, and the metrics."""

    def __init__(self, folder: Path, *flags, slow: str = "none", ranks: int = 2):
        torchrun(
            TESTS / "workers" / "async_run.py",
            folder,
            slow,
            *QUICK,
            "--name",
            "a",
            *flags,
            ranks=ranks,
            cwd=folder,
        )
        self.ranks = [
            json.loads((folder / f"rank-{rank}.json").read_text(encoding="utf-8"))
            for rank in range(ranks)
        ]
        self.evaluation, *self.metrics = metrics_of(folder / "runs" / "a")
        self.steps = self.ranks[0]["steps"]
        self.trace = json.loads((folder / "runs" / "a" / "trace.json").read_text(encoding="utf-8"))

    def check(self, *, bound: int, samples_per_prompt: int = 4) -> None:
        """What must hold of every run."""
        trained, dropped, replaced = (
            [tuple(name) for step in self.steps for name in step[kind]]
            for kind in ("trained", "dropped", "replaced")
        )
        started = sorted(
            (group, index)
            for rank in self.ranks
            for group in rank["started"]
            for index in range(samples_per_prompt)
        )
        assert sorted(trained + dropped + replaced) == started and len(set(started)) == len(
            started
        )  # once each, and none lost
        assert sum(row["dropped"] for row in self.metrics) == len(dropped) and sum(
            row["replaced"] for row in self.metrics
        ) == len(replaced)
        for step, row in zip(self.steps, self.metrics):
            ages = [
                step["version"] - version
                for versions in step["weight_versions"]
                for version in versions
            ]
            assert 0 <= min(ages) and max(ages) <= bound
            assert (
                row["staleness"] == [ages.count(age) for age in range(max(ages) + 1)]
                and sum(row["staleness"]) >= row["tokens"]
            )
            assert row["logprob_shift"] == 0.0 and all(
                math.isfinite(value) for value in row.values() if not isinstance(value, list)
            )
        for first, last, responses in (
            record for rank in self.ranks for record in rank["versions"]
        ):
            for versions in (
                responses
            ):  # never decreasing, from the engine's version at the start to its version at the end
                assert versions == sorted(versions) and all(
                    first <= version <= last for version in versions
                )  # one that was stopped may be empty

    def spanning(self) -> int:
        return sum(
            len(set(versions)) > 1 for step in self.steps for versions in step["weight_versions"]
        )


def test_staleness_0_is_the_synchronous_result(tmp_path):
    done = Done(
        tmp_path,
        "--steps",
        "30",
        "--eval-every",
        "30",
        "--max-staleness",
        "0",
        slow="trainer,engine,sync",
    )
    done.check(bound=0)
    assert all(
        {group for group, _ in step["trained"]} == set(range(4 * i, 4 * i + 4))
        for i, step in enumerate(done.steps)
    )
    assert done.spanning() == 0 and sum(row["mismatch_abs"] for row in done.metrics) / 30 < 0.1


def test_staleness_1_without_learning_does_not_drift(tmp_path):
    """Thirty updates with requests in flight, of weights that do not change: the mismatch stays
    where it was, across versions and over time.
    """
    done = Done(tmp_path, "--steps", "30", "--eval-every", "30", "--lr", "0", *LONG)
    done.check(bound=1)
    assert done.spanning() > 20
    early, late = (
        sum(row["mismatch_abs"] for row in half) / 15
        for half in (done.metrics[:15], done.metrics[15:])
    )
    assert late == pytest.approx(early, rel=0.5) and early < 0.1
    assert done.metrics[-1]["held_out"] == pytest.approx(done.evaluation["held_out"], abs=0.5)


def test_staleness_4_with_stragglers(tmp_path):
    done = Done(
        tmp_path,
        "--steps",
        "30",
        "--eval-every",
        "15",
        "--max-staleness",
        "4",
        "--oversample",
        "2",
        *LONG,
        slow="trainer,engine,sync",
    )
    done.check(bound=4)
    assert max(row["staleness_max"] for row in done.metrics) > 1 and done.spanning() > 20
    assert {step["version"] for step in done.steps} == set(range(30))


def test_draining_leaves_no_response_with_two_versions(tmp_path):
    done = Done(tmp_path, "--steps", "6", "--eval-every", "6", "--updates", "drain", *LONG)
    done.check(bound=1)
    assert done.spanning() == 0


def test_dynamic_sampling_loses_count_of_none(tmp_path):
    done = Done(
        tmp_path,
        "--steps",
        "6",
        "--eval-every",
        "6",
        "--dynamic-sampling",
        "2",
        "--max-staleness",
        "2",
    )
    done.check(bound=2)
    assert sum(row["replaced"] for row in done.metrics) > 0


@pytest.fixture(scope="module")
def two_and_two(tmp_path_factory):
    """Two tensor-parallel trainers, two engines, the gate after every update, with requests in
    flight.
    """
    folder = tmp_path_factory.mktemp("four")
    return Done(
        folder,
        "--steps",
        "4",
        "--eval-every",
        "2",
        "--tp",
        "2",
        "--rollout-ranks",
        "2",
        "--check-sync",
        *LONG,
        ranks=4,
    )


def test_several_trainers_and_engines(two_and_two):
    two_and_two.check(bound=1)
    assert [len(rank["started"]) for rank in two_and_two.ranks] == [
        0,
        0,
        8,
        8,
    ]  # every engine took its turn
    assert all(
        rank["steps"] == two_and_two.steps for rank in two_and_two.ranks
    )  # every rank sees the same step


def test_the_timeline_has_a_row_for_every_rank(two_and_two):
    rows = {
        (event["pid"], event["tid"]): event["args"]["name"]
        for event in two_and_two.trace
        if event["name"] == "thread_name"
    }
    events = [event for event in two_and_two.trace if event["ph"] == "X"]
    assert len(events) + 4 + len(rows) == len(two_and_two.trace) and all(
        event["dur"] >= 0 for event in events
    )
    names = {row: set() for row in rows}
    for event in events:
        names[event["pid"], event["tid"]].add(event["name"])
    trainer, engine, judge = range(3)
    assert [rows[0, i] for i in range(3)] == ["trainer", "engine", "judge"]
    assert (
        names[0, trainer] == names[1, trainer] == {"wait", "train", "sync"}
        and names[2, trainer] == names[0, engine] == set()
    )
    assert names[2, engine] >= {"rollout", "sync"} and "reward" in names[3, judge]
    for row in names:  # spans of one row follow one another
        spans = sorted(
            (event["ts"], event["ts"] + event["dur"])
            for event in events
            if (event["pid"], event["tid"]) == row
        )
        assert all(end <= start + 2 for (_, end), (start, _) in zip(spans, spans[1:]))


def test_every_metric_is_in_the_glossary(two_and_two):
    glossary = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert [key for row in two_and_two.metrics for key in row if f"`{key}`" not in glossary] == []
    assert all(
        0 <= row["trainer_wait"] <= 1 and 0 <= row["engine_wait"] <= 1 and row["step_s"] > 0
        for row in two_and_two.metrics
    )


def test_one_rank_is_an_error_that_names_the_command(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["loop_async.py"])
    for name, value in dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0).items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(errors.BadInput, match="torchrun --nproc-per-node 2 loop_async.py"):
        start_main(loop_async)


def test_the_two_loops_read_beside_each_other():
    import difflib

    sync, asynchronous = (
        (ROOT / f"loop_{name}.py").read_text(encoding="utf-8").splitlines()
        for name in ("sync", "async")
    )
    differing = [line for line in difflib.ndiff(sync, asynchronous) if line[0] in "+-"]
    assert len(differing) < 60


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("when", ["starting", "running"])
def test_killing_a_rank_ends_the_job_and_names_it(start_loop, rank, when):
    """No orphans, no hang, whichever side dies: while engines start, or between steps, hand-offs
    and answers.
    """
    started = start_loop("loop_async.py", *QUICK, *LONG, rows=0 if when == "starting" else 4)
    started.rank(rank).send_signal(signal.SIGKILL)
    assert started.end(60) != 0
    assert (
        f"rank      : {rank} (local_rank: {rank})\n  exitcode  : -9"
        in started.text().split("Root Cause")[1]
    )


def test_a_dying_engine_ends_the_job(start_loop):
    started = start_loop("loop_async.py", *QUICK, *LONG, rows=4)
    started.engine().kill()
    assert started.end(60) != 0
    assert "rank 1: a process of the SGLang engine died" in started.text()


def test_an_engine_that_hangs_ends_the_job(start_loop):
    """A stopped process is one that never answers, and never dies either."""
    started = start_loop("loop_async.py", *QUICK, *LONG, "--answer-timeout-s", "10", rows=4)
    started.engine().suspend()
    assert started.end(60) != 0
    assert (
        "rank 1: the engine has not finished" in started.text()
        and "within --answer-timeout-s 10" in started.text()
    )
