"""loop_async.py on the real stack: bounded staleness under artificial slowness, updates in flight,
and what happens when a rank dies.

test_in_flight.py tests the queue without an engine, test_engine.py log-probs across an update,
bench/overlap.py learning and speed. Not covered: GPUs, several nodes, NCCL.
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
        worker = TESTS / "workers" / "async_run.py"
        torchrun(worker, folder, slow, *QUICK, "--name", "a", *flags, ranks=ranks, cwd=folder)
        run = folder / "runs" / "a"
        seen = [(folder / f"rank-{rank}.json").read_text(encoding="utf-8") for rank in range(ranks)]
        self.ranks = list(map(json.loads, seen))
        rows = metrics_of(run)
        self.metrics = [row for row in rows if "step_s" in row]
        self.evaluations = [row for row in rows if "held_out" in row]
        self.steps = self.ranks[0]["steps"]
        self.trace = json.loads((run / "trace.json").read_text(encoding="utf-8"))

    def names(self, kind: str) -> list[tuple[int, int]]:
        """Return (group, index) of the samples that all steps were given: trained, dropped, …"""
        return [tuple(name) for step in self.steps for name in step[kind]]

    def check(self, *, bound: int, samples_per_prompt: int = 4) -> None:
        """Check what must hold of every run."""
        self.check_each_sample_is_accounted_for_once(samples_per_prompt)
        for step, row in zip(self.steps, self.metrics):
            self.check_staleness(step, row, bound)
            assert row["logprob_shift"] == 0.0
            numbers = [value for value in row.values() if not isinstance(value, list)]
            assert all(map(math.isfinite, numbers))
        for rank in self.ranks:
            for first, last, responses in rank["versions"]:
                self.check_versions(first, last, responses)

    def check_each_sample_is_accounted_for_once(self, samples_per_prompt: int) -> None:
        started = [group for rank in self.ranks for group in rank["started"]]
        assert len(set(started)) == len(started)
        samples = [(group, index) for group in started for index in range(samples_per_prompt)]
        given = [self.names(kind) for kind in ("trained", "dropped", "replaced")]
        assert sorted(name for names in given for name in names) == sorted(samples)
        for kind in ("dropped", "replaced"):
            assert sum(row[kind] for row in self.metrics) == len(self.names(kind))

    @staticmethod
    def check_staleness(step: dict, row: dict, bound: int) -> None:
        """Check that no token is older than the bound, and that the metrics count every age."""
        versions = [version for sample in step["weight_versions"] for version in sample]
        ages = [step["version"] - version for version in versions]
        assert min(ages) >= 0
        assert max(ages) <= bound
        assert row["staleness"] == [ages.count(age) for age in range(max(ages) + 1)]
        assert sum(row["staleness"]) >= row["tokens"]

    @staticmethod
    def check_versions(first: int, last: int, responses: list[list[int]]) -> None:
        """Check a reply's versions: from the engine's at the start to its version at the end.

        A response that was stopped may be empty.
        """
        for versions in responses:
            assert versions == sorted(versions)
            assert all(first <= version <= last for version in versions)

    def spanning(self) -> int:
        """Return how many responses hold tokens of several weight versions."""
        return sum(
            len(set(versions)) > 1 for step in self.steps for versions in step["weight_versions"]
        )


@pytest.mark.complete
def test_staleness_0_is_the_synchronous_result(tmp_path):
    flags = ["--steps", "15", "--eval-every", "15", "--max-staleness", "0"]
    done = Done(tmp_path, *flags, slow="trainer,engine,sync")
    done.check(bound=0)
    for i, step in enumerate(done.steps):
        assert {group for group, _ in step["trained"]} == set(range(4 * i, 4 * i + 4))
    assert done.spanning() == 0
    assert sum(row["mismatch_abs"] for row in done.metrics) / 15 < 0.1


@pytest.mark.complete
def test_staleness_1_without_learning_does_not_drift(tmp_path):
    """Twenty updates of weights that do not change, with requests in flight.

    The mismatch stays where it was, across versions and over time.
    """
    done = Done(tmp_path, "--steps", "20", "--eval-every", "20", "--lr", "0", *LONG)
    done.check(bound=1)
    assert done.spanning() > 20
    mismatches = [row["mismatch_abs"] for row in done.metrics]
    early, late = sum(mismatches[:10]) / 10, sum(mismatches[10:]) / 10
    assert early < 0.1
    assert late == pytest.approx(early, rel=0.5)
    first, last = done.evaluations
    assert last["held_out"] == pytest.approx(first["held_out"], abs=0.5)


@pytest.mark.complete
def test_an_engine_that_has_room_takes_the_next_prompt(tmp_path):
    """Two engines. Each prompt is trained once, in the step of its number."""
    flags = ["--steps", "8", "--eval-every", "4", "--rollout-ranks", "2", "--deal", "room", *LONG]
    done = Done(tmp_path, *flags, ranks=3, slow="engine")
    done.check(bound=1)
    for i, step in enumerate(done.steps):
        assert {group for group, _ in step["trained"]} == set(range(4 * i, 4 * i + 4))
    assert [row["step"] for row in done.evaluations] == [0, 4, 8]


@pytest.mark.complete
def test_staleness_4_with_stragglers(tmp_path):
    flags = ["--steps", "20", "--eval-every", "10", "--max-staleness", "4", "--oversample", "2"]
    done = Done(tmp_path, *flags, *LONG, slow="trainer,engine,sync")
    done.check(bound=4)
    assert max(row["staleness_max"] for row in done.metrics) > 1
    assert done.spanning() > 20
    assert {step["version"] for step in done.steps} == set(range(20))


@pytest.mark.complete
def test_draining_leaves_no_response_with_two_versions(tmp_path):
    done = Done(tmp_path, "--steps", "6", "--eval-every", "6", "--updates", "drain", *LONG)
    done.check(bound=1)
    assert done.spanning() == 0


def test_dynamic_sampling_loses_count_of_none(tmp_path):
    flags = ["--steps", "6", "--eval-every", "6", "--dynamic-sampling", "2", "--max-staleness", "2"]
    done = Done(tmp_path, *flags)
    done.check(bound=2)
    assert sum(row["replaced"] for row in done.metrics) > 0


@pytest.fixture(scope="module")
def two_and_two(tmp_path_factory):
    """Two tensor-parallel trainers and two engines, with requests in flight.

    The gate runs after every update.
    """
    flags = ["--steps", "4", "--eval-every", "2", "--tp", "2", "--rollout-ranks", "2"]
    return Done(tmp_path_factory.mktemp("four"), *flags, "--check-sync", *LONG, ranks=4)


@pytest.mark.complete
def test_several_trainers_and_engines(two_and_two):
    two_and_two.check(bound=1)
    # Every engine took its turn, and every rank sees the same steps.
    assert [len(rank["started"]) for rank in two_and_two.ranks] == [0, 0, 8, 8]
    assert all(rank["steps"] == two_and_two.steps for rank in two_and_two.ranks)


@pytest.mark.complete
def test_the_timeline_has_a_row_for_every_rank(two_and_two):
    trace = two_and_two.trace
    rows = {
        (event["pid"], event["tid"]): event["args"]["name"]
        for event in trace
        if event["name"] == "thread_name"
    }
    events = [event for event in trace if event["ph"] == "X"]
    assert len(events) + 4 + len(rows) == len(trace)
    assert all(event["dur"] >= 0 for event in events)
    names = {row: set() for row in rows}
    for event in events:
        names[event["pid"], event["tid"]].add(event["name"])
    trainer, engine, judge = range(3)
    assert [rows[0, i] for i in range(3)] == ["trainer", "engine", "judge"]
    assert names[0, trainer] == names[1, trainer] == {"wait", "train", "sync"}
    assert names[2, trainer] == names[0, engine] == set()
    assert names[2, engine] >= {"rollout", "sync"}
    assert "reward" in names[3, judge]
    for row in names:  # spans of one row follow one another
        of_row = [event for event in events if (event["pid"], event["tid"]) == row]
        spans = sorted((event["ts"], event["ts"] + event["dur"]) for event in of_row)
        assert all(end <= start + 2 for (_, end), (start, _) in zip(spans, spans[1:]))


@pytest.mark.complete
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


@pytest.mark.parametrize("when, rank", [
    pytest.param("starting", 0, marks=pytest.mark.complete),
    pytest.param("starting", 1, marks=pytest.mark.complete),
    ("running", 0),
    pytest.param("running", 1, marks=pytest.mark.complete),
])  # fmt: skip
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


@pytest.mark.complete
def test_a_dying_engine_ends_the_job(start_loop):
    started = start_loop("loop_async.py", *QUICK, *LONG, "--engine-restarts", "0", rows=4)
    started.engine().kill()
    assert started.end(60) != 0
    assert "rank 1: a process of the SGLang engine died" in started.text()


@pytest.mark.complete
def test_an_engine_that_hangs_ends_the_job(start_loop):
    """A stopped process is one that never answers, and never dies either."""
    limits = ["--answer-timeout-s", "10", "--engine-restarts", "0"]
    started = start_loop("loop_async.py", *QUICK, *LONG, *limits, rows=4)
    started.engine().suspend()
    assert started.end(60) != 0
    assert "rank 1: the engine has not finished" in started.text()
    assert "within --answer-timeout-s 10" in started.text()
