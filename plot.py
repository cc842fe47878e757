"""Draw runs as one picture: reward and held-out accuracy, mismatch of trainer and engine, and where a step's time goes.

    python plot.py OUT.png runs/A [runs/B …]              needs matplotlib: pip install matplotlib==3.11.2
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def read(folder: Path) -> tuple[list[dict], list[dict]]:
    """(rows of training steps, rows with an evaluation) of a run's metrics.jsonl."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "reward" in row], [row for row in rows if "held_out" in row]


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit("usage: python plot.py OUT.png runs/A [runs/B …]")
    figure, (learning, mismatch, times) = plt.subplots(1, 3, figsize=(14, 4), constrained_layout=True)
    for i, folder in enumerate(map(Path, sys.argv[2:])):
        steps, evaluations = read(folder)
        x, color = [row["step"] for row in steps], f"C{i}"
        learning.plot(x, [row["reward"] for row in steps], color=color, alpha=0.35, label=f"{folder.name}: training reward")
        learning.plot([row["step"] for row in evaluations], [row["held_out"] for row in evaluations], "o-", color=color, label=f"{folder.name}: held-out")
        mismatch.plot(x, [row["mismatch_abs"] for row in steps], color=color, label=f"{folder.name}: mean |difference|")
        mismatch.plot(x, [row["mismatch_k3"] for row in steps], ":", color=color, label=f"{folder.name}: k3")
        stages = [stage for stage in ("rollout_s", "wait_s", "train_s", "sync_s") if stage in steps[0]]
        for stage, style in zip(stages, ("-", "--", ":")):
            times.plot(x, [row[stage] for row in steps], style, color=color, label=f"{folder.name}: {stage}")
    learning.set(title="learning", xlabel="step", ylim=(0, 1))
    mismatch.set(title="log-probs: trainer against engine", xlabel="step", yscale="log")
    times.set(title="seconds per stage", xlabel="step", ylim=(0, None))
    for axis in (learning, mismatch, times):
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    figure.savefig(sys.argv[1], dpi=90)


if __name__ == "__main__":
    main()
