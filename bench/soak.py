"""Kill a job again and again; it goes on by itself; look at what it has trained in the end.

    python bench/soak.py sync    [--kills 20] [--ranks 1] [--steps 40]
    python bench/soak.py async   [--kills 20] [--ranks 3] [--steps 40]

The job is `torchrun --max-restarts N ... --resume auto`. Each kill is a SIGKILL at a random moment
of generate, train, sync or save, in turn. The victim is a rank, an engine's process, or torchrun
itself. A killed torchrun is started again with the same command, as a scheduler would do it. Nobody
else does anything.

sync: on one rank metrics, answers and weights must be those of an undisturbed run, digit for digit
and byte for byte. Several ranks may add in another order, so there held-out reward is compared.

async: the last two ranks generate, and an engine that dies is started again on its rank. Every
prompt must have been trained once, and no token may be older than the bound.
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
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import psutil
import tyro

STAGES = {
    "generate": {"sync": ("rollout", "generate"), "async": ("loop_async", "GroupQueue.take_step")},
    "train": ("train_step", "update_policy"),
    "sync": ("weight_sync", "send_weights"),
    "save": ("harness.checkpoint", "save"),
}
# About the length of a stage. The kill comes at a random moment of it.
LENGTHS_S = {"generate": 0.4, "train": 0.3, "sync": 0.05, "save": 0.2}
# In the asynchronous loop most victims are engines: only these come back within the run.
VICTIMS = {
    "sync": ("rank", "rank", "engine", "torchrun"),
    "async": ("engine", "engine", "engine", "rank", "torchrun"),
}
PER_STEP, SAMPLES, STALENESS = 8, 8, 1


@dataclass(frozen=True)
class SoakSettings:
    loop: tyro.conf.Positional[Literal["sync", "async"]]
    kills: int = 20
    ranks: int = 0
    """0: one rank of the synchronous loop, three of the asynchronous one."""
    steps: int = 40
    seed: int = 0


# --- the job ------------------------------------------------------------------------------------


def worker(loop: str, seed: int, kills: int) -> None:
    """Run one rank of the loop. Rank 0 kills one victim after another."""
    from harness import checks, exits, flags
    import loop_async
    import loop_sync

    if os.environ["RANK"] == "0":
        killer = Killer(loop, seed, kills)
        for stage, place in STAGES.items():
            module, name = place[loop] if isinstance(place, dict) else place
            owner = sys.modules[module]
            if "." in name:
                owner, name = getattr(owner, name.partition(".")[0]), name.partition(".")[2]
            setattr(owner, name, killer.watched(stage, getattr(owner, name)))
    module = {"sync": loop_sync, "async": loop_async}[loop]
    settings = flags.parse_or_exit(module.Settings, checks.check_flags)
    exits.run_main(lambda: module.main(settings))


class Killer:
    """Kills a victim at a random moment of a stage, and notes it in the file `kills` before."""

    def __init__(self, loop: str, seed: int, kills: int):
        self.loop, self.seed, self.kills, self.file = loop, seed, kills, Path("kills")
        self.draw()

    def draw(self) -> None:
        """Choose the next kill: it depends on how many there were."""
        done = len(self.file.read_text(encoding="utf-8").splitlines()) if self.file.exists() else 0
        rng = random.Random(f"{self.seed} {done}")
        self.stage = list(STAGES)[done % len(STAGES)] if done < self.kills else ""
        self.victim, self.calls_left = rng.choice(VICTIMS[self.loop]), rng.randint(1, 3)
        self.after_s = rng.uniform(0, LENGTHS_S.get(self.stage, 0))

    def watched(self, name: str, stage):
        """Return a stage that sets off the kill in one of its next calls."""

        def call(*args, **kwargs):
            if name == self.stage:
                self.calls_left -= 1
                if self.calls_left == 0:
                    threading.Timer(self.after_s, self.kill).start()
            return stage(*args, **kwargs)

        return call

    def kill(self) -> None:
        torchrun = psutil.Process(os.getppid())
        ranks = torchrun.children()
        engines = []
        while not engines:  # one may be on its way back
            children = [child for rank in ranks for child in rank.children(recursive=True)]
            engines = [p for p in children if title(p).startswith("sglang::scheduler")]
        victims = {"engine": engines, "rank": ranks, "torchrun": [torchrun]}[self.victim]
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": self.stage, "victim": self.victim}) + "\n")
        random.Random(self.after_s).choice(victims).kill()
        self.draw()


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has just ended
        return ""


def start(folder: Path, settings: SoakSettings, *, kills: int) -> int:
    """Run the job in this folder until torchrun ends or is killed. Return its exit code.

    Waits until no process of it is left.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--max-restarts", str(settings.kills + 1)]
    command += ["--nproc-per-node", str(settings.ranks), __file__]
    command += ["--steps", str(settings.steps), "--save-every", "1", "--eval-every", "4"]
    command += ["--eval-samples", "64", "--name", "run", "--resume", "auto", "--save-rollouts"]
    command += ["--prompts-per-step", str(PER_STEP), "--samples-per-prompt", str(SAMPLES)]
    if settings.loop == "async":
        command += ["--rollout-ranks", "2", "--max-staleness", str(STALENESS)]
        command += ["--engine-restarts", str(settings.kills)]
    plan = json.dumps([settings.loop, settings.seed, kills])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SOAK_PLAN": plan}
    with open(folder / "output", "a", encoding="utf-8") as output:
        apart = dict(stdout=output, stderr=output, start_new_session=True)
        process = subprocess.Popen(command, cwd=folder, env=environment, **apart)
        code, end = process.wait(3600), time.time() + 60
    while any(p.pid != os.getpid() and belongs(p, folder) for p in psutil.process_iter()):
        assert time.time() < end, "a process of the killed run is still there"
        time.sleep(0.1)
    return code


def belongs(process: psutil.Process, folder: Path) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and Path(process.cwd()) == folder
    except psutil.Error:
        return False


# --- what comes of it ---------------------------------------------------------------------------


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


def compare_with_undisturbed(settings: SoakSettings, disturbed: Path, undisturbed: Path) -> str:
    """Return the last line of the synchronous loop's soak."""
    assert start(undisturbed, settings, kills=0) == 0, end_of_output(undisturbed)
    ours, theirs = result(disturbed), result(undisturbed)
    if settings.ranks == 1:
        assert ours == theirs, f"another end than undisturbed; see {disturbed.parent}"
        what = f"metrics, answers and weights after {settings.steps} steps"
        return f"{what} are those of the undisturbed run, digit for digit and byte for byte"
    ends = [rows[-1]["held_out"] for rows, *_ in (ours, theirs)]
    same = "the same, digit for digit" if ours == theirs else "not the same digits"
    rewards = f"held-out reward {ends[0]:.3f}, undisturbed {ends[1]:.3f}"
    return f"{rewards}; metrics and weights are {same}"


def count_prompts(settings: SoakSettings, disturbed: Path) -> str:
    """Return the last line of the asynchronous loop's soak."""
    groups, rollouts = [], disturbed / "runs" / "run" / "rollouts"
    for file in sorted(rollouts.iterdir()):
        samples = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        of_step = Counter(sample["group"] for sample in samples)
        assert set(of_step.values()) == {SAMPLES}, f"{file}: {of_step}"
        groups += of_step
    assert sorted(groups) == list(range(settings.steps * PER_STEP)), f"{rollouts}: {groups}"
    rows, *_ = result(disturbed)
    steps = [row["step"] for row in rows if "loss" in row]  # the others are evaluations
    assert steps == list(range(1, settings.steps + 1))
    oldest = max(row.get("staleness_max", 0) for row in rows)
    assert oldest <= STALENESS
    trained = f"{len(groups)} prompts in {settings.steps} steps, each trained once, none lost"
    return f"{trained}; the oldest token {oldest} version old"


def main() -> None:
    settings = tyro.cli(SoakSettings, description=__doc__)
    if not settings.ranks:
        settings = SoakSettings(**vars(settings) | {"ranks": 1 if settings.loop == "sync" else 3})
    where, began = Path(tempfile.mkdtemp()), time.time()
    undisturbed, disturbed = where / "undisturbed", where / "disturbed"
    undisturbed.mkdir()
    disturbed.mkdir()
    starts, code = 0, 1
    while code:
        known = len(lines_of(disturbed / "kills"))
        code, starts = start(disturbed, settings, kills=settings.kills), starts + 1
        kills = lines_of(disturbed / "kills")
        assert not code or len(kills) > known, end_of_output(disturbed)
        for number, kill in enumerate(kills[known:], known + 1):
            print(f"{number:3d}  {kill['victim']:8s} killed in {kill['stage']}", flush=True)
    took_s = time.time() - began
    assert len(kills) == settings.kills, f"the run ended after {len(kills)}: give more --steps"
    victims = Counter(kill["victim"] for kill in kills)
    shown = ", ".join(f"{n} {victim}" for victim, n in sorted(victims.items()))
    print(
        f"{len(kills)} kills ({shown}), torchrun started {starts} times, {took_s:.0f} s", flush=True
    )
    if settings.loop == "sync":
        print(compare_with_undisturbed(settings, disturbed, undisturbed))
    else:
        print(count_prompts(settings, disturbed))
    shutil.rmtree(where)


def lines_of(file: Path) -> list[dict]:
    return (
        list(map(json.loads, file.read_text(encoding="utf-8").splitlines()))
        if file.exists()
        else []
    )


if __name__ == "__main__":
    worker(*json.loads(os.environ["SOAK_PLAN"])) if "SOAK_PLAN" in os.environ else main()
