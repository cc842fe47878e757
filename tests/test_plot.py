"""tools/plot.py: a picture of what a run has measured so far, or one line that says what is wrong.

Why: people watch a run by this picture, while its files are still being written. The tests look at
matplotlib's objects: panels, lines, limits and labels. Not covered: what the picture looks like.
"""

import json
import math
import os
import subprocess
import sys

from tools import plot
import pytest
from conftest import ROOT

NAN_AT = "mismatch_abs"


def row(step: int, **changes) -> dict:
    """Return a step's metrics, all that plot.py draws."""
    return {
        "step": step, "reward": 0.5, "mismatch_abs": 0.01, "mismatch_k3": 1e-4, "tokens": 10,
        "rollout_s": 0.3, "reward_s": 0.05, "train_s": 0.2, "sync_s": 0.1, "step_s": 0.6,
        "staleness": [8, 2], "staleness_max": 1, "response_tokens": 4.0, "truncated": 0.0,
        "entropy": 0.7, "grad_norm": 2.0, "clipfrac": 0.1, "tis_clipfrac": 0.0,
        "kl": 0.0, "approx_kl": 0.0, "zero_std_groups": 0.25,
    } | changes  # fmt: skip


def events(steps: int = 3) -> list[dict]:
    names = [
        {"name": "thread_name", "ph": "M", "pid": 0, "tid": tid, "args": {"name": name}}
        for tid, name in enumerate(("trainer", "engine"))
    ]
    bars = [
        {"name": "train", "ph": "X", "pid": 0, "tid": 0, "ts": step * 600_000, "dur": 200_000}
        for step in range(steps)
    ]
    return names + bars


def trace(steps: int = 3) -> str:
    return "[\n" + ",\n".join(map(json.dumps, events(steps))) + "\n]\n"


def write_run(folder, rows, trace_text: str | None = None):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8"
    )
    if trace_text != "":
        (folder / "trace.json").write_text(
            trace() if trace_text is None else trace_text, encoding="utf-8"
        )
    return folder


def draw(monkeypatch, tmp_path, *arguments) -> None:
    monkeypatch.setattr("sys.argv", ["plot.py", *map(str, arguments)])
    plot.main()
    assert (tmp_path / "p.png").stat().st_size > 10_000


def refused(monkeypatch, *arguments) -> str:
    monkeypatch.setattr("sys.argv", ["plot.py", *map(str, arguments)])
    with pytest.raises(plot.BadInput) as error:
        plot.main()
    return "; ".join(error.value.problems)


EMPTY_STEP = {"step": 2, "reward": 0.5, "tokens": 0}
ROWS = {
    "whole": [row(1), row(2, held_out=0.4), row(3)],
    "nothing trained": [row(1), EMPTY_STEP | {"step_s": 0.6, "staleness": []}, row(3)],
    "nothing trained first": [EMPTY_STEP, row(3)],
    "nothing but rewards": [EMPTY_STEP],
    "not a number": [
        row(1),
        row(2, mismatch_abs=None, reward=float("nan"), staleness=None),
        row(3),
    ],
    "ages all nought": [row(1, staleness=[0, 0])],
    "an evaluation alone": [{"step": 0, "held_out": 0.1}, row(1)],
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_rows_without_some_measures_are_drawn(monkeypatch, tmp_path, rows):
    draw(monkeypatch, tmp_path, write_run(tmp_path / "run", rows), "--out", tmp_path / "p.png")


@pytest.mark.parametrize(
    "text",
    [trace()[:-30], trace()[:-3], trace().removesuffix("]\n"), trace() * 0 + "[\n"],
    ids=["cut", "no end", "running", "empty"],
)
def test_a_trace_that_is_still_written_is_drawn(monkeypatch, tmp_path, text):
    folder = write_run(tmp_path / "run", [row(1)], text)
    draw(monkeypatch, tmp_path, folder, "--out", tmp_path / "p.png", "--timeline-steps", 9)


def test_a_last_line_cut_in_the_middle_is_left_out(tmp_path):
    folder = write_run(tmp_path / "run", [row(1), row(2)])
    (folder / "metrics.jsonl").write_bytes((folder / "metrics.jsonl").read_bytes()[:-9])
    assert [one["step"] for one in plot.read(folder)[0]] == [1]


def test_what_was_not_measured_is_a_gap():
    assert plot.number({}, NAN_AT) != plot.number({}, NAN_AT)
    assert plot.mean_staleness({"staleness": [0]}) != 0
    assert plot.number(row(1), NAN_AT) == 0.01
    assert plot.mean_staleness(row(1)) == pytest.approx(0.2)


def test_a_line_that_is_cut_in_the_middle_of_the_file_is_refused(monkeypatch, tmp_path):
    folder = write_run(tmp_path / "run", [row(1), row(2)])
    text = '{"step": 1, "rew\n' + json.dumps(row(2)) + "\n"
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    assert "line 1 is not JSON" in refused(monkeypatch, folder, "--out", tmp_path / "p.png")


@pytest.mark.parametrize("text, message", [
    ("", "has no training step yet"), ("[1, 2]\n", "line 1 is not the row of a step"),
    ('{"reward": 1}\n', "line 1 is not the row of a step"),
    ('{"step": 0, "held_out": 0.1}\n', "has no training step yet"),
    ("\xff\n", "is not a run that can be read"), ("\n\n", "line 1 is not JSON"),
])  # fmt: skip
def test_metrics_that_are_none_are_refused(monkeypatch, tmp_path, text, message):
    folder = write_run(tmp_path / "run", [])
    (folder / "metrics.jsonl").write_bytes(text.encode("latin-1"))
    assert message in refused(monkeypatch, folder, "--out", tmp_path / "p.png")


@pytest.mark.parametrize("text, message", [
    ("", "cannot be read"), ("\n", "has no trace of its stages"), ("{", "is not JSON"),
    ('[{"a": 1}]', "is not the trace"), ("[1]", "is not the trace"),
])  # fmt: skip
def test_a_trace_that_is_none_is_refused(monkeypatch, tmp_path, text, message):
    folder = write_run(tmp_path / "run", [row(1)], text)
    assert message in refused(monkeypatch, folder, "--out", tmp_path / "p.png")


@pytest.mark.parametrize("arguments, message", [
    (["--out", "absent/p.png"], "--out absent/p.png is in a folder that does not exist"),
    (["--out", "p.doc"], "--out p.doc must end in one of"),
    (["--out", "p"], "--out p must end in one of"),
    (["--out", "folder.png"], "--out folder.png is a folder"),
    (["--timeline-steps", 0], "--timeline-steps 0 must be at least 1"),
    (["--timeline-steps", -3], "--timeline-steps -3 must be at least 1"),
    (["absent"], "absent is not a run that can be read"),
])  # fmt: skip
def test_what_cannot_be_drawn_or_written_is_refused(monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    assert message in refused(monkeypatch, write_run(tmp_path / "run", [row(1)]), *arguments)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_console_that_is_not_utf_8_shows_the_help(tmp_path, encoding):
    environment = {**os.environ, "PYTHONUTF8": "0", "PYTHONIOENCODING": encoding}
    command = [sys.executable, ROOT / "tools" / "plot.py", "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert b"timeline-steps" in done.stdout


def test_a_refusal_is_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, ROOT / "tools" / "plot.py", "--timeline-steps", "0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: no run is given") and "--timeline-steps 0" in line


# --- what is drawn ------------------------------------------------------------------------------


def picture(tmp_path, *runs: list[dict], shown: int = 3) -> dict:
    """Return {title: axes} of a picture of runs with these rows."""
    folders = [write_run(tmp_path / f"run{i}", rows) for i, rows in enumerate(runs)]
    read = [(folder, plot.read(folder)) for folder in folders]
    figure = plot.draw(read, plot.spans(folders[-1]), shown=shown)
    return {axis.get_title(): axis for axis in figure.axes}


def labels(axis) -> list[str]:
    return [line.get_label() for line in axis.get_lines()]


def test_the_panels_answer_the_questions_of_the_trade(tmp_path):
    axes = picture(tmp_path, [row(1), row(2, held_out=0.4, kl=0.1)])
    drawn = {title: labels(axis) for title, axis in axes.items() if labels(axis)}
    assert drawn == {
        "reward": ["training", "held-out"],
        "shares": [
            "groups whose rewards are equal", "responses cut off", "tokens clipped (ratio)",
            "tokens corrected (mismatch)",
        ],
        "response length": ["mean"],
        "entropy of the policy": ["mean"],
        "gradient norm, before clipping": ["mean of the mini-batches"],
        "log-probs: trainer against engine": ["mean |difference|", "KL, k3 estimate"],
        "KL": ["to the reference"],
        "seconds per stage": ["rollout", "reward", "train", "sync"],
        "age of trained tokens": ["mean", "largest"],
    }  # fmt: skip


def test_every_axis_says_what_it_measures(tmp_path):
    *panels, timeline = picture(tmp_path, [row(1)]).values()
    assert all(axis.get_xlabel() == "step" and axis.get_ylabel() for axis in panels)
    assert timeline.get_xlabel() == "seconds" and timeline.get_yticklabels()


def test_what_a_synchronous_run_has_not_is_no_empty_panel(tmp_path):
    rows = [row(1, staleness=[10], staleness_max=0), row(2, staleness=[], staleness_max=0)]
    titles = picture(tmp_path, rows)
    assert not {"age of trained tokens", "KL"} & titles.keys()


@pytest.mark.parametrize("rewards", [(-3.0, 7.5), (0.2, 0.4), (-2.0, -1.0)])
def test_rewards_beyond_0_and_1_are_seen_whole(tmp_path, rewards):
    axis = picture(tmp_path, [row(1, reward=rewards[0]), row(2, held_out=rewards[1])])["reward"]
    low, high = axis.get_ylim()
    assert low < min(rewards) and max(rewards) < high


def test_several_runs_are_told_apart(tmp_path):
    axis = picture(tmp_path, [row(1)], [row(1), row(2)])["entropy of the policy"]
    assert labels(axis) == ["run0: mean", "run1: mean"]
    first, second = axis.get_lines()
    assert first.get_color() != second.get_color()


# --- the timeline -------------------------------------------------------------------------------

TRAINER, ENGINE = "rank 0 trainer", "rank 0 engine"


def bars_of_steps(steps: int, *, evaluated_before: int) -> list[tuple[str, str, float, float]]:
    """Return the bars of steps of 2 s, with an evaluation of 10 s before one of them.

    Each step begins with its rollout.
    """
    bars, now = [], 0.0
    for step in range(1, steps + 1):
        if step == evaluated_before:
            bars.append((ENGINE, "evaluation", now, now + 10))
            now += 10
        bars += [(TRAINER, "rollout", now, now + 1), (ENGINE, "rollout", now, now + 1)]
        bars.append((TRAINER, "train", now + 1, now + 2))
        now += 2
    return bars


@pytest.mark.parametrize("shown, begins", [(1, 18.0), (2, 16.0), (3, 4.0), (99, 0.0)])
def test_the_last_steps_are_as_many_as_asked_for(shown, begins):
    """Of five steps the fourth has an evaluation before it. No step counts its seconds."""
    bars = bars_of_steps(5, evaluated_before=4)
    assert plot.last_steps(bars, shown) == (min(shown, 5), begins, 20.0)


def test_an_evaluation_has_a_color_of_its_own(tmp_path):
    figure = plot.Figure()
    axis = figure.add_subplot()
    plot.draw_timeline(axis, tmp_path, bars_of_steps(3, evaluated_before=3), 3)
    colors = {bar.get_label(): bar.patches[0].get_facecolor() for bar in axis.containers}
    assert colors.keys() >= {"rollout", "train", "evaluation"}
    assert len({colors[name] for name in ("rollout", "train", "evaluation")}) == 3
    assert axis.get_title().startswith("the last 3 steps of")


def test_runs_of_one_name_are_told_apart(tmp_path):
    runs = [tmp_path / "lr1" / "seed1", tmp_path / "lr2" / "seed1"]
    assert plot.short_names(runs) == ["lr1/seed1", "lr2/seed1"]
    assert plot.short_names(runs[:1]) == ["seed1"]
    assert plot.short_names(runs[:1] * 2) == ["seed1"] * 2


@pytest.mark.parametrize("staleness", [5, "abc", [None], None, [], {"0": 1}])
def test_ages_that_are_none_are_a_gap(staleness):
    assert math.isnan(plot.mean_staleness({"staleness": staleness}))


def test_a_number_beyond_every_axis_is_a_gap():
    assert math.isnan(plot.number({"reward": 10**400}, "reward"))
