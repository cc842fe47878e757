"""Kill a run again and again, resume it each time, and compare its end with that of a run that
nobody disturbed.

    python bench/soak.py [--kills 20] [--ranks 1] [--steps 40]

Each start of loop_sync.py is killed (SIGKILL, no goodbye) at a random moment inside one of
generate, train, sync and save, in turn; the victim is a rank, the engine's process, or torchrun
itself. The last start is left alone. On one rank metrics, answers and weights must then be those of
the undisturbed run, digit for digit and byte for byte; on several, whose sums may come in another
order, held-out reward is compared.
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
    "train": ("train_step", "train_step"),
    "sync": ("weight_sync", "sync_weights"),
    "save": ("checkpoint", "save"),
}
# About what a stage takes: the moment is anywhere in it.
LENGTHS_S = {"generate": 0.4, "train": 0.3, "sync": 0.05, "save": 0.2}


@dataclass(frozen=True)
class SoakSettings:
    kills: int = 20
    ranks: int = 1
    steps: int = 40
    seed: int = 0


def worker(plan: dict) -> None:
    """A rank: loop_sync.py, and on rank 0 the end of the victim, `after_s` into the `call`-th call
    of a stage.
    """
    from harness import checks, exits, flags
    import loop_sync

    if plan and os.environ["RANK"] == "0":
        module_name, name = STAGES[plan["stage"]]
        module, calls = sys.modules[module_name], iter(range(1, 10**6))
        stage = getattr(module, name)

        def kill() -> None:
            ranks = psutil.Process(os.getppid()).children()
            engines = [
                p
                for rank in ranks
                for p in rank.children(recursive=True)
                if p.cmdline() and p.cmdline()[0].startswith("sglang::scheduler")
            ]
            victim = {
                "rank": ranks[-1],
                "engine": engines[0],
                "torchrun": psutil.Process(os.getppid()),
            }[plan["victim"]]
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
    """Run the loop in this folder to its end, whichever that is, and wait until nothing of it is
    left.
    """
    (folder / "killed").unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(settings.ranks),
        __file__,
    ]
    command += [
        "--steps",
        str(settings.steps),
        "--save-every",
        "1",
        "--eval-every",
        "4",
        "--eval-samples",
        "64",
        "--name",
        "run",
        *flags,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SOAK_PLAN": json.dumps(plan)}
    with open(folder / "output", "a", encoding="utf-8") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
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
    run = folder / "runs" / "run"
    rows = [
        json.loads(line)
        for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    rows = [
        {key: value for key, value in row.items() if not key.endswith(("_s", "_wait"))}
        for row in rows
    ]
    return (
        rows,
        (run / "samples.jsonl").read_text(encoding="utf-8"),
        {path.name: path.read_bytes() for path in (run / "model-bf16").iterdir()},
    )


def main() -> None:
    settings = tyro.cli(SoakSettings, description=__doc__)
    rng, where = random.Random(settings.seed), Path(tempfile.mkdtemp())
    undisturbed, disturbed = where / "undisturbed", where / "disturbed"
    undisturbed.mkdir()
    disturbed.mkdir()
    assert start(undisturbed, settings, None) == 0, (undisturbed / "output").read_text(
        encoding="utf-8"
    )[-3000:]
    kills = 0
    checkpoints = disturbed / "runs" / "run" / "checkpoints"
    while kills < settings.kills:
        stage = list(STAGES)[kills % len(STAGES)]
        victim, call = rng.choice(("rank", "rank", "engine", "torchrun")), rng.randint(1, 3)
        plan = {
            "stage": stage,
            "victim": victim,
            "call": call,
            "after_s": rng.uniform(0, LENGTHS_S[stage]),
        }
        whole = sorted(path.name for path in checkpoints.glob("step-??????"))
        if not whole:  # as a user would: --resume needs a checkpoint, and a used name is refused
            shutil.rmtree(disturbed / "runs", ignore_errors=True)
        if whole and whole[-1] == f"step-{settings.steps:06d}":
            break
        code = start(disturbed, settings, plan, *(["--resume"] if whole else []))
        if not (disturbed / "killed").exists():
            continue  # the run was over before
        kills += 1
        parts = [path.name for path in checkpoints.glob("*.part")]
        after = sorted(path.name for path in checkpoints.glob("step-??????"))[-1:]
        print(
            f"{kills:3d}  {victim:8s} killed in {stage:8s} exit code {code:4d}; whole then:"
            f" {*after, *parts}",
            flush=True,
        )
    assert kills == settings.kills, f"the run ended after {kills} kills: give more --steps"
    assert start(disturbed, settings, None, "--resume") == 0, (disturbed / "output").read_text(
        encoding="utf-8"
    )[-3000:]
    ours, theirs = result(disturbed), result(undisturbed)
    if settings.ranks == 1:
        assert ours == theirs, f"another end than undisturbed; see {where}"
        print(
            f"{kills} kills: metrics, answers and weights after {settings.steps} steps are those of"
            " the undisturbed run, digit for digit and byte for byte"
        )
    else:
        ends = [rows[-1]["held_out"] for rows, *_ in (ours, theirs)]
        same = "the same, digit for digit" if ours == theirs else "not the same digits"
        print(
            f"{kills} kills: held-out reward {ends[0]:.3f}, undisturbed {ends[1]:.3f}; metrics and"
            f" weights are {same}"
        )
    shutil.rmtree(where)


if __name__ == "__main__":
    worker(json.loads(os.environ["SOAK_PLAN"])) if "SOAK_PLAN" in os.environ else main()
