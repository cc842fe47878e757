"""Draw runs as one picture: reward and held-out accuracy, mismatch of trainer and engine, stage times, staleness, and the timeline of a few steps.

    python plot.py runs/A [runs/B …] [--out plot.png] [--timeline-steps 3]

The timeline is that of the last run given: its last steps, a bar for each rank's trainer, engine and judge; white is waiting. All of it is in trace.json.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLORS = {"rollout": "C0", "reward": "C1", "train": "C2", "sync": "C3"}


@dataclass(frozen=True)
class PlotSettings:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders."""
    out: Path = Path("plot.png")
    """The picture."""
    timeline_steps: int = 3
    """How many steps the timeline shows."""


def read(folder: Path) -> tuple[list[dict], list[dict]]:
    """(rows of training steps, rows with an evaluation) of a run's metrics.jsonl."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "reward" in row], [row for row in rows if "held_out" in row]


def spans(folder: Path) -> list[tuple[str, str, float, float]]:
    """(row, activity, from, to), in seconds, of a run's trace.json; of one that is still running, or was killed, the end is not there yet."""
    text = (folder / "trace.json").read_text().rstrip().removesuffix("]").rstrip(",\n")
    events = json.loads(text + "]")
    names = {(event["pid"], event["tid"]): f"rank {event['pid']} {event['args']['name']}" for event in events if event["name"] == "thread_name"}
    bars = [event for event in events if event["ph"] == "X"]
    return [(names[bar["pid"], bar["tid"]], bar["name"], bar["ts"] / 1e6, (bar["ts"] + bar["dur"]) / 1e6) for bar in bars]


def draw_timeline(axis, folder: Path, steps: list[dict], shown: int) -> None:
    bars = spans(folder)
    end = max(stop for *_, stop in bars)
    start = end - sum(row["step_s"] for row in steps[-shown:])
    rows = sorted({row for row, *_ in bars}, reverse=True)
    for row, activity, begin, stop in bars:
        if activity in COLORS and stop > start:
            axis.barh(rows.index(row), stop - max(begin, start), left=max(begin, start) - start, color=COLORS[activity], edgecolor="white", linewidth=0.3)
    for activity, color in COLORS.items():
        axis.barh(0, 0, color=color, label=activity)
    axis.set(title=f"the last {shown} steps of {folder.name}", xlabel="seconds", yticks=range(len(rows)), yticklabels=rows, xlim=(0, end - start))


def main() -> None:
    settings = tyro.cli(PlotSettings, description=__doc__)
    figure, axes = plt.subplots(2, 3, figsize=(15, 8), constrained_layout=True)
    (learning, mismatch, times), (staleness, lengths, timeline) = axes
    for i, folder in enumerate(settings.runs):
        steps, evaluations = read(folder)
        if not steps:
            raise SystemExit(f"{folder} has no training step yet: wait for one")
        x, color = [row["step"] for row in steps], f"C{i}"
        learning.plot(x, [row["reward"] for row in steps], color=color, alpha=0.35, label=f"{folder.name}: training reward")
        learning.plot([row["step"] for row in evaluations], [row["held_out"] for row in evaluations], "o-", color=color, label=f"{folder.name}: held-out")
        if "mismatch_abs" in steps[0]:
            mismatch.plot(x, [row["mismatch_abs"] for row in steps], color=color, label=f"{folder.name}: mean |difference|")
            mismatch.plot(x, [row["mismatch_k3"] for row in steps], ":", color=color, label=f"{folder.name}: k3")
        stages = [stage for stage in ("rollout_s", "wait_s", "train_s", "sync_s") if stage in steps[0]]
        for stage, style in zip(stages, ("-", "--", ":")):
            times.plot(x, [row[stage] for row in steps], style, color=color, label=f"{folder.name}: {stage}")
        ages = [sum(age * n for age, n in enumerate(row["staleness"])) / sum(row["staleness"]) for row in steps]
        staleness.plot(x, ages, color=color, label=f"{folder.name}: mean")
        staleness.plot(x, [row["staleness_max"] for row in steps], ":", color=color, label=f"{folder.name}: largest")
        lengths.plot(x, [row["response_tokens"] for row in steps], color=color, label=f"{folder.name}: tokens of a response")
        lengths.plot(x, [row["truncated"] for row in steps], ":", color=color, label=f"{folder.name}: share cut off")
    draw_timeline(timeline, folder, steps, min(settings.timeline_steps, len(steps)))
    learning.set(title="learning", xlabel="step", ylim=(0, 1))
    mismatch.set(title="log-probs: trainer against engine", xlabel="step", yscale="log")
    times.set(title="seconds per stage", xlabel="step", ylim=(0, None))
    staleness.set(title="age of trained tokens, in weight versions", xlabel="step", ylim=(-0.1, None))
    lengths.set(title="responses", xlabel="step", ylim=(0, None))
    for axis in axes.flat:
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    figure.savefig(settings.out, dpi=80)
    print(settings.out)


if __name__ == "__main__":
    main()
