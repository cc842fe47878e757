"""Kill a run again and again, resume it each time, and compare its end with an undisturbed run's.

    python bench/soak.py [--kills 20] [--ranks 1] [--steps 40]

Each start of loop_sync.py is killed by SIGKILL at a random moment inside generate, train, sync or
save, in turn. The victim is a rank, the engine's process, or torchrun itself. The last start is
left alone. On one rank metrics, answers and weights must then be those of the undisturbed run,
digit for digit and byte for byte. Several ranks may add in another order, so there held-out reward
is compared.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import psutil
import tyro

STAGES = {
    "generate": ("rollout", "generate"),
    "train": ("train_step", "update_policy"),
    "sync": ("weight_sync", "send_weights"),
    "save": ("harness.checkpoint", "save"),
}
# About the length of a stage. The kill comes at a random moment of it.
LENGTHS_S = {"generate": 0.4, "train": 0.3, "sync": 0.05, "save": 0.2}


@dataclass(frozen=True)
class SoakSettings:
    kills: int = 20
    ranks: int = 1
    steps: int = 40
    seed: int = 0


def worker(plan: dict) -> None:
    """Run one rank of loop_sync.py. Rank 0 kills the victim, after_s into the call-th call of a
    stage.
    """
    from harness import checks, exits, flags
    import loop_sync

    if plan and os.environ["RANK"] == "0":
        module_name, name = STAGES[plan["stage"]]
        module, calls = sys.modules[module_name], iter(range(1, 10**6))
        stage = getattr(module, name)

        def kill() -> None:
            ranks = psutil.Process(os.getppid()).children()
            children = [p for rank in ranks for p in rank.children(recursive=True)]
            titles = [(p, " ".join(p.cmdline())) for p in children]
            engines = [p for p, title in titles if title.startswith("sglang::scheduler")]
            torchrun = psutil.Process(os.getppid())
            victims = {"rank": ranks[-1], "engine": engines[0], "torchrun": torchrun}
            victim = victims[plan["victim"]]
            Path("killed").write_text("", encoding="utf-8")
            victim.kill()

        def until_killed(*args, **kwargs):
            if next(calls) == plan["call"]:
                threading.Timer(plan["after_s"], kill).start()
            return stage(*args, **kwargs)

        setattr(module, name, until_killed)
    settings = flags.parse_or_exit(loop_sync.Settings, checks.check_flags)
    exits.run_main(lambda: loop_sync.main(settings))


def start(folder: Path, settings: SoakSettings, plan: dict | None, *flags: str) -> int:
    """Run the loop in this folder until it ends or is killed. Return its exit code.

    Waits until no process of it is left.
    """
    (folder / "killed").unlink(missing_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(settings.ranks), __file__]
    command += ["--steps", str(settings.steps), "--save-every", "1", "--eval-every", "4"]
    command += ["--eval-samples", "64", "--name", "run", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SOAK_PLAN": json.dumps(plan)}
    with open(folder / "output", "a", encoding="utf-8") as output:
        apart = dict(stdout=output, stderr=output, start_new_session=True)
        process = subprocess.Popen(command, cwd=folder, env=environment, **apart)
        code, end = process.wait(900), time.time() + 60
    while any(p.pid != os.getpid() and belongs(p, folder) for p in psutil.process_iter()):
        assert time.time() < end, "a process of the killed run is still there"
        time.sleep(0.1)
    return code


def belongs(process: psutil.Process, folder: Path) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and Path(process.cwd()) == folder
    except psutil.Error:
        return False


def result(folder: Path) -> tuple[list[dict], str, dict[str, bytes]]:
    """Return a run's rows of metrics without times, its samples, and its exported files."""
    run = folder / "runs" / "run"
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [
        {key: value for key, value in json.loads(line).items() if not is_time(key)}
        for line in lines
    ]
    samples = (run / "samples.jsonl").read_text(encoding="utf-8")
    return rows, samples, {path.name: path.read_bytes() for path in (run / "model-bf16").iterdir()}


def is_time(key: str) -> bool:
    return key.endswith(("_s", "_wait"))


def end_of_output(folder: Path) -> str:
    return (folder / "output").read_text(encoding="utf-8")[-3000:]


def main() -> None:
    settings = tyro.cli(SoakSettings, description=__doc__)
    rng, where = random.Random(settings.seed), Path(tempfile.mkdtemp())
    undisturbed, disturbed = where / "undisturbed", where / "disturbed"
    undisturbed.mkdir()
    disturbed.mkdir()
    assert start(undisturbed, settings, None) == 0, end_of_output(undisturbed)
    kills = 0
    checkpoints = disturbed / "runs" / "run" / "checkpoints"
    while kills < settings.kills:
        stage = list(STAGES)[kills % len(STAGES)]
        victim, call = rng.choice(("rank", "rank", "engine", "torchrun")), rng.randint(1, 3)
        after_s = rng.uniform(0, LENGTHS_S[stage])
        plan = {"stage": stage, "victim": victim, "call": call, "after_s": after_s}
        whole = sorted(path.name for path in checkpoints.glob("step-??????"))
        if not whole:  # --resume needs a checkpoint, and a name that is taken is refused
            shutil.rmtree(disturbed / "runs", ignore_errors=True)
        if whole and whole[-1] == f"step-{settings.steps:06d}":
            break
        code = start(disturbed, settings, plan, *(["--resume"] if whole else []))
        if not (disturbed / "killed").exists():
            continue  # the run ended before the kill
        kills += 1
        parts = [path.name for path in checkpoints.glob("*.part")]
        after = sorted(path.name for path in checkpoints.glob("step-??????"))[-1:]
        what = f"{victim:8s} killed in {stage:8s} exit code {code:4d}"
        print(f"{kills:3d}  {what}; whole then: {*after, *parts}", flush=True)
    assert kills == settings.kills, f"the run ended after {kills} kills: give more --steps"
    assert start(disturbed, settings, None, "--resume") == 0, end_of_output(disturbed)
    ours, theirs = result(disturbed), result(undisturbed)
    if settings.ranks == 1:
        assert ours == theirs, f"another end than undisturbed; see {where}"
        what = f"metrics, answers and weights after {settings.steps} steps"
        same = "those of the undisturbed run, digit for digit and byte for byte"
        print(f"{kills} kills: {what} are {same}")
    else:
        ends = [rows[-1]["held_out"] for rows, *_ in (ours, theirs)]
        same = "the same, digit for digit" if ours == theirs else "not the same digits"
        rewards = f"held-out reward {ends[0]:.3f}, undisturbed {ends[1]:.3f}"
        print(f"{kills} kills: {rewards}; metrics and weights are {same}")
    shutil.rmtree(where)


if __name__ == "__main__":
    worker(json.loads(os.environ["SOAK_PLAN"])) if "SOAK_PLAN" in os.environ else main()
