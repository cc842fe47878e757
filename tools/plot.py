"""Draw runs as one picture: rewards, optimization, time per stage, and a timeline of some steps.

    python tools/plot.py runs/A [runs/B …] [--out plot.png] [--timeline-steps 3]

The timeline shows the last steps of the last run given, from its trace.json. It has a bar for each
rank's trainer, engine and judge; white is waiting. A line has a gap where a step did not measure
the metric, such as the mismatch when nothing was trained. The picture leaves out metrics that no
run has, and a KL or a staleness that is always 0.
"""

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.errors import BadInput, ProblemList, all_problems, parse_json, read_file

COLORS = {"rollout": "C0", "reward": "C1", "train": "C2", "sync": "C3", "evaluation": "0.75"}
STAGE_COLORS = {f"{stage}_s": color for stage, color in COLORS.items()} | {"wait_s": "k"}
STYLES = ("-", "--", ":", "-.", (0, (1, 3)))  # of a panel's metrics, if each run has a color


@dataclass(frozen=True)
class Panel:
    """One diagram over the steps. metrics: {key in metrics.jsonl: its name in the legend}."""

    title: str
    unit: str
    metrics: dict[str, str]
    scale: str = "linear"
    from_zero: bool = True


PANELS = (
    Panel("reward", "mean reward", {"reward": "training", "held_out": "held-out"}, from_zero=False),
    Panel(
        "shares",
        "share",
        {
            "zero_std_groups": "groups whose rewards are equal",
            "truncated": "responses cut off",
            "clipfrac": "tokens clipped (ratio)",
            "tis_clipfrac": "tokens corrected (mismatch)",
        },
    ),
    Panel("response length", "tokens", {"response_tokens": "mean"}),
    Panel("entropy of the policy", "nats per token", {"entropy": "mean"}),
    Panel("gradient norm, before clipping", "norm", {"grad_norm": "mean of the mini-batches"}),
    Panel(
        "log-probs: trainer against engine",
        "nats per token (log scale)",
        {"mismatch_abs": "mean |difference|", "mismatch_k3": "KL, k3 estimate"},
        scale="log",
    ),
    Panel(
        "KL",
        "nats per token",
        {"kl": "to the reference", "approx_kl": "old to new policy"},
        from_zero=False,
    ),
    Panel(
        "seconds per stage",
        "seconds",
        {f"{stage}_s": stage for stage in ("rollout", "wait", "reward", "train", "sync")},
    ),
    Panel(
        "age of trained tokens",
        "weight versions",
        {"staleness_mean": "mean", "staleness_max": "largest"},
    ),
)
LEFT_OUT_IF_ZERO = {"kl", "approx_kl", "staleness_mean", "staleness_max"}


@dataclass(frozen=True)
class PlotSettings:
    """What to draw, and where to write it"""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders."""
    out: Path = Path("plot.png")
    """File of the picture; its ending sets the format."""
    timeline_steps: int = 3
    """Number of steps in the timeline."""


@all_problems
def read(folder: Path) -> tuple[list[dict], list[dict]]:
    """Return (rows of training steps, rows with an evaluation) of a run's metrics.jsonl.

    The last line may be incomplete, because the run is still writing it: it is then skipped.
    """
    path = folder / "metrics.jsonl"
    lines = text_of(path, fix="give folders such as runs/NAME").split("\n")
    rows = []
    for at, line in enumerate(lines, start=1):
        try:
            row = parse_json(line, where=f"{path}: line {at}")
        except BadInput as error:
            if at < len(lines):
                yield f"{error.problems[0]}; give a run whose metrics are complete"
            continue
        if isinstance(row, dict) and type(row.get("step")) is int:
            rows.append(row | {"staleness_mean": mean_staleness(row)})
        else:
            fix = "give a folder that a run has written"
            yield f"{path}: line {at} is not the row of a step: {fix}"
    steps = [row for row in rows if "reward" in row]
    if not steps:
        yield f"{folder} has no training step yet: wait for one"
    return steps, [row for row in rows if "held_out" in row]


def text_of(path: Path, *, fix: str) -> str:
    """Return the text of a run's file. Raises BadInput, which ends with `fix`."""
    try:
        return read_file(path, most=math.inf).decode("utf-8")
    except BadInput as error:
        why = error.problems[0]
        raise BadInput(f"{path.parent} is not a run that can be read ({why}): {fix}") from error
    except ValueError as error:
        raise BadInput(f"{path.parent} is not a run that can be read ({error}): {fix}") from error


def spans(folder: Path) -> list[tuple[str, str, float, float]]:
    """Return (row, activity, from, to) of each span in a run's trace.json, times in seconds.

    The trace of a run that is going on, or was killed, may end anywhere; its complete lines count.
    """
    path = folder / "trace.json"
    text = text_of(path, fix="as the last run, give one that has a trace.json")
    text = text.rstrip().removesuffix("]").rstrip(",\n")
    if not text:
        raise BadInput(f"{path} has no trace of its stages: give a folder that a run has written")
    try:
        events = json.loads(text + "]")
    except (ValueError, RecursionError):  # perhaps the last line is incomplete
        events = parse_json(text.rpartition("\n")[0].rstrip(",\n") + "]", where=path)
    try:
        names = {
            (event["pid"], event["tid"]): f"rank {event['pid']} {event['args']['name']}"
            for event in events
            if event["name"] == "thread_name"
        }
        bars = []
        for event in events:
            if event["ph"] == "X":
                row = names[event["pid"], event["tid"]]
                start, end = event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6
                bars.append((row, event["name"], start, end))
        return bars
    except (KeyError, TypeError) as error:
        fix = "give a folder that a run has written"
        raise BadInput(f"{path} is not the trace of a run ({error!r}): {fix}") from error


def number(row: dict, key: str) -> float:
    """Return a metric of a row; nan, which is drawn as a gap, if it is not a finite number."""
    value = row.get(key)
    is_number = type(value) in (int, float) and abs(value) <= sys.float_info.max
    return value if is_number else math.nan


def mean_staleness(row: dict) -> float:
    """Return the mean staleness of a step's tokens; nan if none was trained."""
    counts = row.get("staleness")
    if not isinstance(counts, list) or any(type(n) is not int for n in counts):
        return math.nan
    if not sum(counts):
        return math.nan
    return sum(age * n for age, n in enumerate(counts)) / sum(counts)


# --- the timeline -------------------------------------------------------------------------------


def last_steps(bars: list[tuple[str, str, float, float]], shown: int) -> tuple[int, float, float]:
    """Return (how many, from, to) of the last steps of a trace, at most `shown` of them.

    A step begins when a trainer begins the stage that comes first in its row. An evaluation belongs
    to the step before it.
    """
    end = max((stop for *_, stop in bars), default=0.0)
    row = next((row for row, *_ in bars if row.endswith("trainer")), None)
    stages = [(begin, activity) for owner, activity, begin, _ in bars if owner == row]
    begins = sorted(begin for begin, activity in stages if activity == min(stages)[1])[-shown:]
    return len(begins), min(begins, default=0.0), end


def draw_timeline(
    axis, folder: Path, bars: list[tuple[str, str, float, float]], shown: int
) -> None:
    """Draw the last `shown` steps of a trace. bars: what spans() returns."""
    count, start, end = last_steps(bars, shown)
    rows = sorted({row for row, *_ in bars}, reverse=True)
    seen = dict.fromkeys(COLORS, False)
    for row, activity, begin, stop in bars:
        if activity in COLORS and stop > start:
            axis.barh(
                rows.index(row),
                stop - max(begin, start),
                left=max(begin, start) - start,
                color=COLORS[activity],
                edgecolor="white",
                linewidth=0.3,
                label=None if seen[activity] else activity,
            )
            seen[activity] = True
    which = "the last step" if count == 1 else f"the last {count} steps"
    axis.set(
        title=f"{which} of {folder.name}; white is waiting",
        xlabel="seconds",
        yticks=range(len(rows)),
        yticklabels=rows,
        xlim=(0, max(end - start, 1e-9)),
    )


# --- the panels ---------------------------------------------------------------------------------


@all_problems
def check_plot_settings(settings: PlotSettings) -> Iterator[str]:
    """Yield what cannot be drawn or written."""
    if not settings.runs:
        yield "no run is given: python tools/plot.py runs/NAME"
    if settings.timeline_steps < 1:
        yield f"--timeline-steps {settings.timeline_steps} must be at least 1"
    suffixes = sorted(Figure().canvas.get_supported_filetypes())
    if settings.out.suffix.removeprefix(".").lower() not in suffixes:
        endings = ", ".join("." + suffix for suffix in suffixes)
        yield f"--out {settings.out} must end in one of: {endings}"
    if not settings.out.parent.is_dir():
        yield f"--out {settings.out} is in a folder that does not exist: make {settings.out.parent}"
    elif settings.out.is_dir():
        yield f"--out {settings.out} is a folder: give the name of a picture"


def measured(panel: Panel, steps: list[dict], evaluations: list[dict]) -> dict[str, list]:
    """Return {metric: (step, value) pairs} of a panel, without the metrics that are left out."""
    lines = {}
    for key in panel.metrics:
        rows = evaluations if key == "held_out" else steps
        values = [(row["step"], number(row, key)) for row in rows]
        known = [value for _, value in values if not math.isnan(value)]
        if known and (any(known) or key not in LEFT_OUT_IF_ZERO):
            lines[key] = values
    return lines


def draw_panel(axis, panel: Panel, lines: list[tuple[str, dict[str, list]]]) -> None:
    """Draw a panel. lines: for each run its name, and what measured() returns.

    With one run, each metric has a color. With several, each run has a color and each metric a
    style.
    """
    values = [value for _, of_run in lines for pairs in of_run.values() for _, value in pairs]
    for i, (name, of_run) in enumerate(lines):
        for key, pairs in of_run.items():
            place = list(panel.metrics).index(key)
            look = dict(color=STAGE_COLORS.get(key, f"C{place}"), label=panel.metrics[key])
            if len(lines) > 1:
                label = f"{name}: {panel.metrics[key]}"
                look = dict(color=f"C{i}", linestyle=STYLES[place], label=label)
            marker = "o" if key == "held_out" or len(pairs) == 1 else None
            alpha = 0.4 if key == "reward" else 1.0  # paler than the held-out reward
            axis.plot(*zip(*pairs), marker=marker, markersize=4, alpha=alpha, **look)
    is_log = panel.scale == "log" and any(value > 0 for value in values)
    axis.set(
        title=panel.title, xlabel="step", ylabel=panel.unit, yscale="log" if is_log else "linear"
    )
    if panel.from_zero and not is_log:
        axis.set_ylim(0, 1.08 * max(v for v in values if not math.isnan(v)) or 1.0)
    axis.legend(fontsize=7)
    axis.grid(alpha=0.3)


def short_names(folders: list[Path]) -> list[str]:
    """Return the shortest ends of the paths that tell the folders apart: lr1/seed1, lr2/seed1."""
    parts = [folder.resolve().parts for folder in folders]
    for n in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-n:]) for path in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names


def draw(runs: list[tuple[Path, tuple[list[dict], list[dict]]]], bars, *, shown: int) -> Figure:
    """Return the picture: the panels that have a metric to show, above the timeline."""
    named = list(zip(short_names([folder for folder, _ in runs]), (rows for _, rows in runs)))
    panels = []
    for panel in PANELS:
        lines = [(name, measured(panel, *rows)) for name, rows in named]
        if any(of_run for _, of_run in lines):
            panels.append((panel, lines))
    columns = 3 if len(panels) <= 6 or len(panels) == 9 else 4
    panel_rows, timeline_rows = -(-len(panels) // columns), len({row for row, *_ in bars})
    height = 3.1 * panel_rows + 1.5 + 0.25 * timeline_rows
    figure = plt.figure(figsize=(15, height), layout="constrained")
    ratios = [3.1] * panel_rows + [1.2 + 0.25 * timeline_rows]
    grid = figure.add_gridspec(panel_rows + 1, columns, height_ratios=ratios)
    for i, (panel, lines) in enumerate(panels):
        draw_panel(figure.add_subplot(grid[i // columns, i % columns]), panel, lines)
    timeline = figure.add_subplot(grid[panel_rows, :])
    draw_timeline(timeline, runs[-1][0].resolve(), bars, shown)
    if timeline.get_legend_handles_labels()[0]:
        timeline.legend(fontsize=7, ncols=len(COLORS), loc="lower right", bbox_to_anchor=(1, 1))
    return figure


def main() -> None:
    """Check the flags, read the runs and write the picture."""
    settings, problems = tyro.cli(PlotSettings, description=__doc__), ProblemList()
    problems.collect(check_plot_settings, settings)
    runs = [(folder, problems.collect(read, folder)) for folder in settings.runs]
    bars = problems.collect(spans, settings.runs[-1]) if settings.runs and runs[-1][1] else None
    problems.raise_if_any()
    figure = draw(runs, bars, shown=settings.timeline_steps)
    try:
        figure.savefig(settings.out, dpi=80)
    except OSError as error:
        raise BadInput(
            f"--out {settings.out} cannot be written ({error}): choose another place"
        ) from error
    print(settings.out)


if __name__ == "__main__":
    # A console that is not UTF-8 lacks letters, for instance of folder names.
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except BadInput as error:
        print(f"error: {'; '.join(error.problems)}", file=sys.stderr)
        sys.exit(2)
