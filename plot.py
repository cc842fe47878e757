"""Draw runs as one picture: reward and held-out reward, mismatch of trainer and engine, stage times, staleness, and the timeline of a few steps.

    python plot.py runs/A [runs/B …] [--out plot.png] [--timeline-steps 3]

The timeline is that of the last run given: its last steps, a bar for each rank's trainer, engine and judge; white is waiting. All of it is in trace.json.
What a step did not measure, such as the mismatch where nothing was trained, is a gap in its line.
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from problems import BadInput, Problems, all_problems

COLORS = {"rollout": "C0", "reward": "C1", "train": "C2", "sync": "C3"}


@dataclass(frozen=True)
class PlotSettings:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders."""
    out: Path = Path("plot.png")
    """The picture."""
    timeline_steps: int = 3
    """How many steps the timeline shows."""


@all_problems
def read(folder: Path) -> tuple[list[dict], list[dict]]:
    """Return (rows of training steps, rows with an evaluation) of a run's metrics.jsonl.

    A last line that is still being written is left out.
    """
    path = folder / "metrics.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise BadInput(
            f"{folder} is no run that can be read ({error}): give folders such as runs/NAME"
        ) from error
    rows = []
    for at, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            if at < len(lines):
                yield f"{path}: line {at} is not JSON: give a run whose metrics are whole"
            continue
        if isinstance(row, dict) and type(row.get("step")) is int:
            rows.append(row)
        else:
            yield f"{path}: line {at} is no row of a step: give a folder that a run has written"
    steps = [row for row in rows if "reward" in row]
    if not steps:
        yield f"{folder} has no training step yet: wait for one"
    return steps, [row for row in rows if "held_out" in row]


def spans(folder: Path) -> list[tuple[str, str, float, float]]:
    """Return (row, activity, from, to), in seconds, of a run's trace.json.

    The trace of a run that goes on, or was killed, may end anywhere: its whole lines count.
    """
    path = folder / "trace.json"
    try:
        text = path.read_text(encoding="utf-8").rstrip().removesuffix("]").rstrip(",\n")
    except (OSError, ValueError) as error:
        raise BadInput(
            f"{folder} has no trace of its stages ({error}): give a run whose trace.json is there "
            "as the last"
        ) from error
    try:
        events = json.loads(text + "]")
    except ValueError:
        events = _whole_events(path, text)
    try:
        names = {
            (event["pid"], event["tid"]): f"rank {event['pid']} {event['args']['name']}"
            for event in events
            if event["name"] == "thread_name"
        }
        bars = [event for event in events if event["ph"] == "X"]
        return [
            (
                names[bar["pid"], bar["tid"]],
                bar["name"],
                bar["ts"] / 1e6,
                (bar["ts"] + bar["dur"]) / 1e6,
            )
            for bar in bars
        ]
    except (KeyError, TypeError) as error:
        raise BadInput(
            f"{path} is no trace of a run ({error!r} is amiss): give a folder that a run has "
            "written"
        ) from error


def _whole_events(path: Path, text: str) -> list[dict]:
    """Return the events of a trace whose last line is cut."""
    try:
        return json.loads(text.rpartition("\n")[0].rstrip(",\n") + "]")
    except ValueError as error:
        raise BadInput(
            f"{path} is no JSON ({error}): give a folder that a run has written"
        ) from error


def number(row: dict, key: str) -> float:
    """Return a measured number, or nan, which is drawn as a gap."""
    value = row.get(key)
    return value if type(value) in (int, float) else math.nan


def mean_age(row: dict) -> float:
    """Return the mean age of a step's tokens; nan where none was trained."""
    counts = row.get("staleness") or []
    return sum(age * n for age, n in enumerate(counts)) / sum(counts) if sum(counts) else math.nan


def draw_timeline(
    axis, folder: Path, bars: list[tuple[str, str, float, float]], steps: list[dict], shown: int
) -> None:
    end = max((stop for *_, stop in bars), default=0.0)
    seconds = [number(row, "step_s") for row in steps[-shown:]]
    start = end - sum(s for s in seconds if not math.isnan(s))
    rows = sorted({row for row, *_ in bars}, reverse=True)
    for row, activity, begin, stop in bars:
        if activity in COLORS and stop > start:
            axis.barh(
                rows.index(row),
                stop - max(begin, start),
                left=max(begin, start) - start,
                color=COLORS[activity],
                edgecolor="white",
                linewidth=0.3,
            )
    for activity, color in COLORS.items():
        axis.barh(0, 0, color=color, label=activity)
    axis.set(
        title=f"the last {shown} steps of {folder.name}",
        xlabel="seconds",
        yticks=range(len(rows)),
        yticklabels=rows,
        xlim=(0, max(end - start, 1e-9)),
    )


@all_problems
def check_plot_settings(settings: PlotSettings) -> None:
    """Yield what cannot be drawn, or not be written."""
    if not settings.runs:
        yield "no run is given: python plot.py runs/NAME"
    if settings.timeline_steps < 1:
        yield f"--timeline-steps {settings.timeline_steps} must be at least 1"
    suffixes = sorted(Figure().canvas.get_supported_filetypes())
    if settings.out.suffix.removeprefix(".").lower() not in suffixes:
        yield (
            f"--out {settings.out} must end in one of: "
            f"{', '.join('.' + suffix for suffix in suffixes)}"
        )
    if not settings.out.parent.is_dir():
        yield f"--out {settings.out} is in a folder that does not exist: make {settings.out.parent}"
    elif settings.out.is_dir():
        yield f"--out {settings.out} is a folder: give the name of a picture"


def draw(axes, i: int, folder: Path, steps: list[dict], evaluations: list[dict]) -> None:
    """Draw the i-th run into all axes but the timeline's."""
    (learning, mismatch, times), (staleness, lengths, _) = axes
    x, color, name = [row["step"] for row in steps], f"C{i}", folder.resolve().name

    def line(axis, key: str, style: str, label: str, **options) -> None:
        axis.plot(
            x,
            [number(row, key) for row in steps],
            style,
            color=color,
            label=f"{name}: {label}",
            **options,
        )

    line(learning, "reward", "-", "training reward", alpha=0.35)
    held_out = [number(row, "held_out") for row in evaluations]
    learning.plot(
        [row["step"] for row in evaluations], held_out, "o-", color=color, label=f"{name}: held-out"
    )
    if any("mismatch_abs" in row for row in steps):
        line(mismatch, "mismatch_abs", "-", "mean |difference|")
        line(mismatch, "mismatch_k3", ":", "k3")
    stages = [
        stage
        for stage in ("rollout_s", "wait_s", "train_s", "sync_s")
        if any(stage in row for row in steps)
    ]
    for stage, style in zip(stages, ("-", "--", ":", "-.")):
        line(times, stage, style, stage)
    staleness.plot(x, [mean_age(row) for row in steps], color=color, label=f"{name}: mean")
    line(staleness, "staleness_max", ":", "largest")
    line(lengths, "response_tokens", "-", "tokens of a response")
    line(lengths, "truncated", ":", "share cut off")


def main() -> None:
    settings, problems = tyro.cli(PlotSettings, description=__doc__), Problems()
    problems.of(check_plot_settings, settings)
    runs = [(folder, problems.of(read, folder)) for folder in settings.runs]
    bars = problems.of(spans, settings.runs[-1]) if settings.runs and runs[-1][1] else None
    problems.refuse()
    figure, axes = plt.subplots(2, 3, figsize=(15, 8), constrained_layout=True)
    for i, (folder, (steps, evaluations)) in enumerate(runs):
        draw(axes, i, folder, steps, evaluations)
    (learning, mismatch, times), (staleness, lengths, timeline) = axes
    draw_timeline(timeline, folder.resolve(), bars, steps, min(settings.timeline_steps, len(steps)))
    learning.set(title="learning", xlabel="step", ylim=(0, 1))
    mismatch.set(title="log-probs: trainer against engine", xlabel="step", yscale="log")
    times.set(title="seconds per stage", xlabel="step", ylim=(0, None))
    staleness.set(
        title="age of trained tokens, in weight versions", xlabel="step", ylim=(-0.1, None)
    )
    lengths.set(title="responses", xlabel="step", ylim=(0, None))
    for axis in axes.flat:
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    try:
        figure.savefig(settings.out, dpi=80)
    except OSError as error:
        raise BadInput(
            f"--out {settings.out} cannot be written ({error}): choose another place"
        ) from error
    print(settings.out)


if __name__ == "__main__":
    sys.stdout.reconfigure(
        errors="backslashreplace"
    )  # a console that is not UTF-8 lacks letters, of folder names for instance
    try:
        main()
    except BadInput as error:
        print(f"error: {'; '.join(error.problems)}", file=sys.stderr)
        sys.exit(2)
