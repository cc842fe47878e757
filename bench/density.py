"""What share of the weights changes in one RL step, and how closely the FP8 policy follows.

    python bench/density.py                shares, by learning rate
        [--model FOLDER …] [--steps 12] [--lr 1e-6 …] [--spread]
    python bench/density.py lag            how the policy follows
        [--model FOLDER …] [--steps 50] [--lr 1e-6 …] [--spread] [--every 1]
    python bench/density.py draw           tables and figure, of what was measured before

Every run is loop_sync.py itself on one rank, at a constant learning rate, with its FP8 engine.
bench/density_run.py runs it. The JSON file beside --out (docs/density.png) collects the rows of
every step. Tables and figure are made from that file.

FOLDER is a Hugging Face folder; the toy unless given. Another model than the toy needs
FOLDER/word_problems.jsonl, as examples/get_smollm2.py writes it. Its steps are small: 2 prompts
with 4 answers of up to 24 tokens. Its reward is the parity of the sum of the answer's token ids.
Answers of a group then differ in reward, so almost every step has a gradient.

Shares: what differs, bit by bit, from the step before.
    codes          FP8 codes of the hand-off
    scales         their fp32 scales, one per 128 x 128 block
    other          values that stay BF16: embeddings, norms, layers that SGLang does not quantize
    bf16           the BF16 values that the codes are made of, as a BF16 hand-off would see them
    ue8m0 codes, ue8m0 scales    the same with each scale rounded up to a power of two, as
                   DeepSeek-V3.1 does; the project does not, so this file quantizes them itself
    in moved blocks    of the codes that changed, those whose block has another scale than before
    sign of 0      of the codes that changed, those that were 0 and are 0: +0 and -0 are two codes

Lag: how the policy moves since step 0, on the first step's samples. Three sets of weights are
compared: fp32 (the optimizer's main weights), bf16 (what trains) and fp8 (codes times scales; what
is not quantized stays BF16). Each is written into one more model that computes in fp32. So the
rounding of activations is left out, and only weights differ.
    slope x/y      of the log-prob changes under x, regressed on those under y, over all tokens
    r x/y          their correlation
    follow x/y     <x(t) - x(0), y(t) - y(0)> / |y(t) - y(0)|^2 over the weights handed over in FP8:
                   1 where x follows y on average
    norm x/y       |x(t) - x(0)| / |y(t) - y(0)|: above "follow" by what is noise

A run's main weights start as BF16 values: each stands in the middle of those that round to it.
--spread first moves each to a random one of these, as a long training would.
"""

import argparse
import datetime
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from density_run import KINDS, OF_CODES, PAIRS, WAYS

RATES = ("1e-7", "1e-6", "1e-5", "1e-4", "1e-3")
DRAWN = ("bf16", "codes", "scales", "ue8m0 codes")  # in the figure
LAG_DRAWN = "1e-6"
LAG_TITLES = {
    "lag": f"lag at {LAG_DRAWN}, from BF16 weights",
    "lag spread": f"lag at {LAG_DRAWN}, main weights spread",
}
SMALL_BATCH = "--prompts-per-step 2 --samples-per-prompt 4 --max-response-tokens 24"


def run(what: str, model: Path, *, steps: int, lr: str, every: int = 1) -> list[dict]:
    """Run the loop once. Return what the worker found after each step."""
    arguments = ["--model", str(model), "--steps", str(steps), "--eval-every", str(steps)]
    arguments += ["--lr", lr, "--lr-schedule", "constant", "--eval-samples", "2", "--export"]
    if model != ROOT / "toy":
        arguments += ["--prompts", str(model / "word_problems.jsonl"), "--stop", "<|im_end|>"]
        arguments += SMALL_BATCH.split()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        command = [sys.executable, str(ROOT / "bench/density_run.py"), what, str(file), str(every)]
        quiet = dict(stdin=subprocess.DEVNULL, capture_output=True, text=True, encoding="utf-8")
        done = subprocess.run([*command, *arguments, "--name", "run"], cwd=folder, **quiet)
        if done.returncode:
            print(f"{what} at {lr} ended with {done.returncode}:\n{done.stderr[-3000:]}")
        if not file.exists():
            sys.exit(1)
        rows = json.loads(file.read_text(encoding="utf-8"))
    return [row for row in rows if row["step"] % every == 0]


def print_shares(rates: dict[str, dict]) -> None:
    """Print a row for the first step and one for the later ones, of each learning rate."""
    first, columns = next(iter(rates.values()))["rows"][0], (*KINDS, *OF_CODES)
    about = first["about"]
    print("  " + ", ".join(f"{first['total'][kind]:,} {kind}" for kind in KINDS[:4]))
    for kind in ("bf16", "other"):
        zeros = f"{100 * about[f'{kind} zeros']:.3g} % are exactly 0 at step 0"
        print(f"  {kind}: root mean square {about[f'{kind} rms']:.3g}, {zeros}")
    print("  in %, mean ± deviation over the steps; learned: steps with a gradient")
    print(f"{'lr':>6} {'steps':>8} {'learned':>8}" + "".join(f"{name:>18}" for name in columns))
    for lr, of_lr in rates.items():
        rows = of_lr["rows"]
        for when, some in (("1", rows[:1]), (f"2 to {len(rows)}", rows[1:])):
            learned = sum(row["grad_norm"] > 0 for row in some)
            cells = "".join(f"{cell(some, name):>18}" for name in columns)
            print(f"{lr:>6} {when:>8} {learned:8}{cells}")


def cell(rows: list[dict], name: str) -> str:
    """Return the mean of a share in percent, with the deviation over the steps."""
    values = [100 * row["shares"][name] for row in rows]
    values = [value for value in values if not math.isnan(value)]
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3g}{deviation}"


def print_lag(rates: dict[str, dict]) -> None:
    """Print how weights and log-probs have moved, a row for each measured step."""
    for lr, of_lr in rates.items():
        rows = of_lr["rows"]
        cost, tokens = rows[0]["|fp8 - bf16| at 0"], rows[0]["tokens"]
        print(f"  lr {lr}, {tokens} response tokens of step 1")
        print(f"  at step 0 fp8 differs from bf16 by {cost:.4f} nats a token")
        keys = ["moved", "bf16 differ", "codes differ"]
        keys += [f"{how} {x}/{y}" for how in ("follow", "norm") for x, y in PAIRS]
        print_columns("weights", keys, rows)
        keys = [f"|shift| {way}" for way in WAYS]
        keys += [f"{how} {x}/{y}" for how in ("slope", "r") for x, y in PAIRS]
        print_columns("log-probs", keys, rows)


def print_columns(name: str, keys: list[str], rows: list[dict]) -> None:
    print(f"  {name}\n  step" + "".join(f"{key:>18}" for key in keys))
    for row in rows:
        print(f"  {row['step']:4}" + "".join(f"{row[key]:18.4g}" for key in keys))


def title(model: Path) -> str:
    """Return what to call a model in tables, in the JSON file and in the figure."""
    if model == ROOT / "toy":
        return "toy"
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    if config.get("_model_name_or_path", "").startswith("Smollm2 135M"):
        return "SmolLM2-135M, from an 8-bit GGUF"  # examples/get_smollm2.py
    return model.name


# --- the figure ---------------------------------------------------------------------------------


def draw(found: dict, out: Path) -> None:
    """Draw the shares above, a panel for each model, and below them the lag and its --spread."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models = {name: of["density"] for name, of in found.items() if "density" in of}
    figure = plt.figure(figsize=(9, 7.5), layout="constrained")
    grid = figure.add_gridspec(2, max(2, len(models)))
    panels = [figure.add_subplot(grid[0, i]) for i in range(len(models))]
    for axis, (name, rates) in zip(panels, models.items()):
        axis.sharey(panels[0])
        draw_shares(axis, rates)
        axis.set_title(name, fontsize=10)
        axis.legend(fontsize=7, handlelength=3)
    panels = [figure.add_subplot(grid[1, i]) for i in (0, 1)]
    for axis, (what, title) in zip(panels, LAG_TITLES.items()):
        axis.sharey(panels[0])
        for color, (name, of) in zip(("C0", "C1", "C2", "C3"), found.items()):
            rows = of.get(what, {}).get(LAG_DRAWN, {"rows": []})["rows"]
            for way, style in {"fp32": "-", "bf16": "--", "fp8": ":"}.items():
                values = [row[f"|shift| {way}"] for row in rows]
                look = dict(color=color, label=f"{way}, {name.split(',')[0]}")
                axis.plot([row["step"] for row in rows], values, style, **look)
        axis.set(xlabel="step", ylabel="|shift| of a token's log-prob, nats", yscale="log")
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, handlelength=3)
    figure.savefig(out, dpi=100)
    print(out)


def draw_shares(axis, rates: dict[str, dict]) -> None:
    """Draw a model's panel. A share of 0 has no place on a log scale and is left out."""
    for color, kind in zip(("C0", "C1", "C2", "k"), DRAWN):
        for when, style, at in (("later", "-", slice(1, None)), ("first", "--", slice(1))):
            if kind == "ue8m0 codes":
                style = ":"
            points = []
            for lr, of_lr in rates.items():
                shares = [row["shares"][kind] for row in of_lr["rows"][at]]
                if any(shares):
                    points.append((float(lr), 100 * statistics.mean(shares)))
            if points and (style, when) != (":", "first"):
                look = dict(color=color, label=f"{kind}, {when}", marker="o", markersize=2)
                axis.plot(*zip(*sorted(points)), style, **look)
    axis.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="% changed in a step")
    axis.grid(alpha=0.3)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=("density", "lag", "draw"), default="density")
    parser.add_argument("--model", nargs="+", type=Path, default=[ROOT / "toy"])
    parser.add_argument("--steps", type=int, help="of each run: 12, or 50 of lag")
    parser.add_argument("--lr", nargs="+", help="learning rates: five, or 1e-6 of lag")
    parser.add_argument("--every", type=int, default=1, help="of lag: measure so many steps apart")
    parser.add_argument("--spread", action="store_true", help="see the top of this file")
    parser.add_argument("--out", type=Path, default=Path("docs/density.png"))
    flags = parser.parse_args()
    file = flags.out.with_suffix(".json")
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    is_lag, what = flags.what == "lag", flags.what + " spread" * flags.spread
    steps, every = flags.steps or (50 if is_lag else 12), flags.every if is_lag else 1
    for model in [] if flags.what == "draw" else map(Path.resolve, flags.model):
        of_model = found.setdefault(title(model), {}).setdefault(what, {})
        for lr in flags.lr or ([LAG_DRAWN] if is_lag else RATES):
            started = time.perf_counter()
            rows = run(what, model, steps=steps, lr=lr, every=every)
            seconds, when = time.perf_counter() - started, f"{datetime.date.today()}, {processor()}"
            of_model[lr] = {"rows": rows, "measured": when, "seconds": round(seconds)}
            file.write_text(json.dumps(found), encoding="utf-8")
        print_tables({title(model): {what: of_model}})
    if flags.what == "draw":
        print_tables(found)
    draw(found, flags.out)


def print_tables(found: dict) -> None:
    for name, of_model in found.items():
        for what, rates in of_model.items():
            measured = sorted({of_lr["measured"] for of_lr in rates.values()})
            seconds = sum(of_lr["seconds"] for of_lr in rates.values())
            print(f"{name}, {what}: {'; '.join(measured)}, {seconds} s")
            if what.startswith("lag"):
                print_lag(rates)
            else:
                print_shares(rates)


def processor() -> str:
    """Return the processor as lscpu names it, with the number of its cores."""
    printed = subprocess.run(["lscpu"], capture_output=True, text=True, check=True).stdout
    rows = dict(line.split(":", 1) for line in printed.splitlines() if ":" in line)
    wide = " with AVX512" if "avx512f" in rows.get("Flags", "") else ""
    return f"{os.cpu_count()} cores of {rows['Model name'].strip()}{wide}"


if __name__ == "__main__":
    main()
