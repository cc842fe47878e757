"""What every run needs and no stage owns: settings from the command line, the run folder, the progress bar, and a clean end.

    runs/NAME/settings.json    every setting as resolved, versions and the command line
    runs/NAME/metrics.jsonl    one object a step; README.md explains each key
    runs/NAME/samples.jsonl    a few generated answers of every evaluation, with their rewards
    runs/NAME/trace.json       what every rank did when, in Chrome's trace format: open it at ui.perfetto.dev
    runs/NAME/checkpoints/     what --resume goes on from; see checkpoint.py
    runs/NAME/model-bf16/      the trained weights as a Hugging Face folder

Only global rank 0 writes. Lines are flushed as they are written, so that whatever ends a run, the record up to then is there.
"""

import contextlib
import dataclasses
import difflib
import gc
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import tyro
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm

from problems import BadInput, all_problems

# The engines warn at import about what a CPU lacks; they say it in every process. Errors still show.
os.environ.setdefault("PYTHONWARNINGS", "ignore")
warnings.simplefilter("ignore")

ROWS = ("trainer", "engine", "judge")  # of each rank's part of the timeline
REPOSITORY = Path(__file__).resolve().parent
CPU_SGLANG = "0.5.21"  # the version that cpu.py is written for


_told_to_stop = threading.Event()


class EngineDied(Exception):
    """A process of the inference engine ended while it was needed."""


@dataclass(frozen=True)
class RunSettings:
    """What to train, for how long, and where the record goes."""

    model: str = str(REPOSITORY / "toy")
    """Hugging Face folder (Qwen3, Qwen2.5 or Llama; safetensors) to train and to generate with."""
    name: str = ""
    """Name of the run folder below runs/; empty: the loop's name and the time."""
    steps: int = 80
    """Training steps: each is one rollout, one optimizer step, one weight hand-off."""
    eval_every: int = 10
    """Evaluate on the held-out prompts every so many steps, and before the first and after the last."""
    seed: int = 1
    """Seeds prompts, sampling and Megatron."""
    check_sync: bool = False
    """Read every weight back from the engine after every hand-off; always done after the first and the last."""
    save_every: int = 0
    """Write a checkpoint every so many steps; 0: only when the run is told to stop (SIGTERM)."""
    keep: int = 2
    """How many checkpoints are kept; older ones are removed."""
    resume: bool = False
    """Go on from the newest checkpoint of the run --name."""
    export: tuple[str, ...] = ("bf16",)
    """Write the trained weights as Hugging Face folders at the end: any of bf16, fp8; none with an empty list."""


def check_installation() -> None:
    """End the program, exit code 2, with the right install line if the packages are those of another kind of machine. Called before sglang's import."""
    missing = {name for name in ("sglang", "sgl_kernel", "megatron") if importlib.util.find_spec(name) is None}
    has_gpu = torch.cuda.is_available()
    line = "pip install -r requirements-gpu.txt" if has_gpu else "pip install -r requirements.txt && pip install --no-deps -r requirements-engine.txt"
    if missing & {"sglang", "megatron"}:
        problem = "sglang or megatron-core is not installed"
    elif has_gpu and "sgl_kernel" in missing:
        problem = "this machine has a GPU, but sglang's GPU kernels (sglang-kernel) are not installed"
    elif not has_gpu and importlib.metadata.version("sglang") != CPU_SGLANG:
        problem = f"no GPU is visible, and without one only sglang {CPU_SGLANG} runs; installed is {importlib.metadata.version('sglang')}"
    else:
        return
    print(f"error: {problem}. In a fresh virtual environment: {line}", file=sys.stderr, flush=True)
    sys.exit(2)


def parse_settings(settings_class: type):
    """Settings from the command line; a wrong flag ends the program with the nearest right one named (tyro), exit code 2."""
    if "RANK" not in os.environ and "--plan" not in sys.argv:
        script = Path(sys.argv[0]).name
        raise BadInput(f"RANK is not set: a loop runs under torchrun. Use `torchrun {script}` or `torchrun --nproc-per-node 2 {script}`")
    return tyro.cli(settings_class, description=sys.modules["__main__"].__doc__, config=(tyro.conf.OmitArgPrefixes,))


@all_problems
def check_run_settings(settings: RunSettings):
    """What cannot work, before anything is started."""
    if settings.steps < 1 or settings.eval_every < 1:
        yield f"--steps {settings.steps} and --eval-every {settings.eval_every} must be at least 1"
    if unknown := set(settings.export) - {"bf16", "fp8"}:
        yield f"--export {' '.join(sorted(unknown))} is none of: bf16, fp8"
    if settings.save_every < 0 or settings.keep < 1:
        yield f"--save-every {settings.save_every} must not be negative, --keep {settings.keep} must be at least 1"
    if settings.resume and not settings.name:
        yield "--resume needs the --name of the run that is to go on"
    if settings.name and not settings.resume and os.path.exists(f"runs/{settings.name}/metrics.jsonl"):
        yield f"runs/{settings.name} already holds a run: choose another --name, remove that folder, or go on with it by --resume"


@all_problems
def parse_overrides(pairs: tuple[str, ...], *, flag: str, fields: list[str]) -> dict:
    """("key=value", …) -> {key: value}; values are read as JSON where they are JSON (true, 4, 0.1, null), else as text.

    fields: the names that may be set. Raises BadInput for others, naming the nearest of each.
    """
    overrides = {}
    for pair in pairs:
        key, separator, text = pair.partition("=")
        if not separator:
            yield f"{flag} {pair!r} is not of the form key=value"
        elif key not in fields:
            nearest = difflib.get_close_matches(key, fields, n=1, cutoff=0.0)[0]
            yield f"{flag} {key} is not a field that can be set there; the nearest is {nearest}"
        else:
            try:
                overrides[key] = json.loads(text)
            except json.JSONDecodeError:
                overrides[key] = text
    return overrides


def init_distributed(rollout_ranks: int = 0) -> dist.ProcessGroup:
    """Join torchrun's process groups and return the one that all ranks share: gloo for CPU tensors, NCCL for CUDA tensors where there are any.

    With rollout_ranks, the last so many ranks are a default world of their own and the others, the trainers, another: megatron-core builds its groups from
    the default world. The shared group is made beside the two from the same store, as SGLang makes its weight-update groups.
    """
    gc.collect()
    gc.freeze()  # what imports have made is never garbage; to look through it would take 0.3 s now and then, in which every other rank waits
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    if not rollout_ranks:
        dist.init_process_group(backend)
        return dist.group.WORLD
    from sglang.srt.utils import init_custom_process_group

    store, rank, world_size = next(rendezvous("env://"))
    trainers = world_size - rollout_ranks
    name, size, rank_there = ("trainers", trainers, rank) if rank < trainers else ("rollout", rollout_ranks, rank - trainers)
    dist.init_process_group(backend, store=dist.PrefixStore(name, store), world_size=size, rank=rank_there)
    return init_custom_process_group(backend, store=dist.PrefixStore("shared", store), world_size=world_size, rank=rank, group_name="shared")


def all_gather_bytes(mine: bytes, group: dist.ProcessGroup) -> list[bytes]:
    """Every rank's bytes on every rank of the group, in rank order. Collective (gloo)."""
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(group.size())]
    dist.all_gather(sizes, torch.tensor([len(mine)]), group=group)
    padded = torch.zeros(int(max(sizes)), dtype=torch.uint8)
    padded[: len(mine)] = torch.frombuffer(bytearray(mine), dtype=torch.uint8) if mine else padded[:0]
    rows = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(rows, padded, group=group)
    return [row[: int(size)].numpy().tobytes() for row, size in zip(rows, sizes)]


@contextlib.contextmanager
def main_module_hidden():
    """Spawned children run the parent's main script again, to find functions that were defined there. Ours need none of it, and save its imports."""
    main = sys.modules["__main__"]
    file, spec = main.__dict__.pop("__file__", None), main.__spec__
    main.__spec__ = None
    try:
        yield
    finally:
        main.__spec__ = spec
        if file is not None:
            main.__file__ = file


def end_with_parent() -> None:
    """In a spawned child: end when the parent is gone, however it went, and be it before this is called."""
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def broadcast_bytes(mine: bytes, group: dist.ProcessGroup, *, source: int = 0) -> bytes:
    """The bytes of one rank of the group on all of its ranks. Collective (gloo)."""
    size = torch.tensor([len(mine)])
    dist.broadcast(size, group=group, group_src=source)
    data = torch.frombuffer(bytearray(mine), dtype=torch.uint8) if group.rank() == source else torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(data, group=group, group_src=source)
    return data.numpy().tobytes()


class Stopwatch:
    """Seconds between calls of lap(), which are also kept as spans of the timeline: (stage, from, to), in seconds since the epoch."""

    def __init__(self):
        self.started = self.last = time.time()
        self.spans: list[tuple[str, float, float]] = []

    def lap(self, stage: str) -> float:
        previous, self.last = self.last, time.time()
        self.spans.append((stage, previous, self.last))
        return self.last - previous


class Row:
    """What a part of this rank does when, as spans of the timeline; any thread may mark a change."""

    def __init__(self):
        self._lock, self._spans, self._activity, self._since = threading.Lock(), [], "wait", time.time()

    def mark(self, activity: str) -> None:
        """From now on it does this."""
        if activity != self._activity:
            with self._lock:
                self._close()
                self._activity = activity

    def take(self) -> list[tuple[str, float, float]]:
        """(activity, from, to), in seconds since the epoch, since the last call and up to now."""
        with self._lock:
            self._close()
            spans, self._spans = self._spans, []
        return spans

    def _close(self) -> None:
        now = time.time()
        short_wait = self._activity == "wait" and now - self._since < 1e-4  # hundreds of answers, judged in microseconds each, are one span
        if self._spans and (short_wait or self._spans[-1][0] == self._activity):
            activity, start, _ = self._spans.pop()
            self._spans.append((activity, start, now))
        else:
            self._spans.append((self._activity, self._since, now))
        self._since = now


FILES = {"metrics": "metrics.jsonl", "samples": "samples.jsonl", "trace": "trace.json"}


class Run:
    """The run folder and the progress bar. group: all ranks of the run; its rank 0, a trainer, is the one that writes. trains: whether this rank does.

    resumed: the checkpoint.Checkpoint that the run goes on from: what was written after it is cut off.
    """

    def __init__(self, settings, loop: str, group: dist.ProcessGroup, trains: bool = True, resumed=None):
        self.group, self.loop, self.trains, self.is_writer = group, loop, trains, group.rank() == 0
        name = settings.run.name or f"{loop}-{time.strftime('%Y%m%d-%H%M%S')}"
        self.folder = Path("runs") / broadcast_bytes(name.encode(), group).decode()
        self.started, self.accuracy = time.time(), []
        self.stopping = False
        """Whether a rank has been told to stop: the same on all ranks, from the end of a step on."""
        if not self.is_writer:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.files = {name: open(self.folder / file, "a" if resumed else "w", buffering=1) for name, file in FILES.items()}
            if resumed:
                self.started = resumed.state["record"]["started"]
                for name, file in self.files.items():
                    file.truncate(resumed.state["record"][name])
                rows = map(json.loads, (self.folder / FILES["metrics"]).read_text().splitlines())
                self.accuracy = [row["held_out"] for row in rows if "held_out" in row]
            else:
                names = [{"name": "process_name", "ph": "M", "pid": rank, "args": {"name": f"rank {rank}"}} for rank in range(group.size())]
                names += [{"name": "thread_name", "ph": "M", "pid": n["pid"], "tid": i, "args": {"name": row}} for n in names for i, row in enumerate(ROWS)]
                self.files["trace"].write("[" + ",\n".join(map(json.dumps, names)))
            versions = {name: importlib.metadata.version(name) for name in ("torch", "megatron-core", "sglang", "transformers")}
            record = {"command": sys.argv, "world_size": group.size(), "versions": versions, **dataclasses.asdict(settings)}
            (self.folder / "settings.json").write_text(json.dumps(record, indent=2) + "\n")
        except OSError as error:
            raise BadInput(f"the run folder {self.folder} cannot be written ({error.strerror}): run where you may write, or choose --name") from error
        self.bar = tqdm(total=settings.run.steps, initial=resumed.step if resumed else 0, unit="step", dynamic_ncols=True)

    def positions(self) -> dict[str, float]:
        """Where the files of the record stand, for a checkpoint."""
        return {"started": self.started, **{name: os.fstat(file.fileno()).st_size for name, file in self.files.items()}}

    def say(self, text: str) -> None:
        """One line above the progress bar."""
        if self.is_writer:
            self.bar.write(text, file=sys.stderr)

    def log(self, metrics: dict) -> None:
        """One line of metrics.jsonl; the bar shows the reward and where the step's time went."""
        if not self.is_writer:
            return
        self.files["metrics"].write(json.dumps({k: round(v, 8) if isinstance(v, float) else v for k, v in metrics.items()}) + "\n")
        if "reward" in metrics:
            stages = "  ".join(f"{stage} {metrics[f'{stage}_s']:.2f} s" for stage in ("rollout", "wait", "train", "sync") if f"{stage}_s" in metrics)
            self.bar.set_postfix_str(f"reward {metrics['reward']:.2f}  {stages}", refresh=False)
            self.bar.update()

    def trace(self, watch: Stopwatch, engine, judge) -> dict[str, float]:
        """Add every rank's step to trace.json; returns the step's seconds and the shares of it that trainers and engines wait. Collective: the step's end.

        watch: of the step. engine: None on ranks without one. A trainer waits while it neither trains nor hands over weights, for the last rank at the
        step's end too; an engine waits while it generates nothing. Clocks of several machines are taken as they are.
        """
        rows = {"trainer": watch.spans, "stop": _told_to_stop.is_set()} if self.trains else {"stop": _told_to_stop.is_set()}
        rows |= {"engine": engine.row.take(), "judge": judge.row.take()} if engine else {}
        ranks = [json.loads(row) for row in all_gather_bytes(json.dumps(rows).encode(), self.group)]
        self.stopping = any([rank.pop("stop") for rank in ranks])
        if not self.is_writer:
            return {}
        for rank, rows in enumerate(ranks):
            for row, spans in rows.items():
                for stage, start, end in spans:
                    times = {"ts": round((start - self.started) * 1e6), "dur": round((end - start) * 1e6)}  # microseconds
                    self.files["trace"].write(",\n" + json.dumps({"name": stage, "ph": "X", **times, "pid": rank, "tid": ROWS.index(row)}))

        def waiting(row: str, busy: tuple[str, ...]) -> float:
            rows = [rank[row] for rank in ranks if row in rank]
            busy_s = sum(max(min(end, ended) - max(start, watch.started), 0) for spans in rows for stage, start, end in spans if stage in busy)
            return 1 - busy_s / len(rows) / step_s

        ended = time.time()
        step_s = ended - watch.started
        return {"step_s": step_s, "trainer_wait": waiting("trainer", ("train", "sync")), "engine_wait": waiting("engine", ("rollout",))}

    def log_eval(self, step: int, samples: list) -> dict:
        """The held-out accuracy on the console and as a metric, the first answers in samples.jsonl; {} where there are no samples."""
        if not samples:
            return {"step": step}
        scores = [sample.reward or 0.0 for sample in samples]
        self.accuracy.append(sum(scores) / len(scores))
        self.say(f"step {step:4d}  held-out accuracy {self.accuracy[-1]:.3f} on {len(samples)} prompts")
        for sample in samples[:8] if self.is_writer else ():
            row = {"step": step, "prompt": sample.prompt, "response": sample.response, "label": sample.label, "reward": sample.reward}
            self.files["samples"].write(json.dumps(row, ensure_ascii=False) + "\n")
        return {"step": step, "held_out": self.accuracy[-1]}

    def finish(self) -> None:
        """The last line: what was learned, and where the record is; or how to go on."""
        if not self.is_writer:
            return
        self.bar.close()
        if self.stopping:
            print(f"stopped after step {self.bar.n}, as asked by SIGTERM: go on with --name {self.folder.name} --resume", flush=True)
            return
        self.files["trace"].write("]\n")
        learned = f"held-out accuracy {self.accuracy[0]:.3f} -> {self.accuracy[-1]:.3f}" if self.accuracy else "no held-out prompts to judge by"
        print(f"{learned} in {self.bar.total} steps, {time.time() - self.started:.0f} s; metrics, samples and weights are in {self.folder}", flush=True)


def run_main(main: Callable[[], None]) -> None:
    """Call main and turn how it ends into an exit code: 0 done, 1 failed, 2 bad input, 130 interrupted.

    The engine's children are ended by main's own `with`. Should this process be killed, they notice that their parent is gone and end themselves.
    """
    signal.signal(signal.SIGQUIT, _engine_child_died)
    signal.signal(signal.SIGTERM, lambda signum, frame: _told_to_stop.set())  # at the end of the step: a checkpoint, and exit code 0
    try:
        main()
        if dist.is_initialized():  # not after --plan
            dist.destroy_process_group()
    except BadInput as error:
        # All ranks usually see the same mistake. Rank 0 says it at once; torchrun then ends the others while they wait.
        time.sleep(0 if os.environ.get("RANK", "0") == "0" else 3)
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except EngineDied as error:
        print("\n".join([f"error: {error}", *getattr(error, "__notes__", [])]), file=sys.stderr, flush=True)
        sys.exit(1)
    except RuntimeError as error:
        if "by peer" not in str(error):
            raise
        # Another rank is gone. It is the cause, and torchrun must see it first: it then ends this rank while it waits.
        print(f"error: rank {os.environ['RANK']} lost its connection to another rank; torchrun names that rank below", file=sys.stderr, flush=True)
        time.sleep(20)
        raise
    except KeyboardInterrupt:
        print(f"interrupted: rank {os.environ.get('RANK', '0')} has ended its engine", file=sys.stderr, flush=True)
        sys.exit(130)


def _engine_child_died(signum, frame) -> None:
    """SGLang sends SIGQUIT to this process when one of its children fails or is found dead (its SubprocessWatchdog looks every second)."""
    raise EngineDied(f"rank {os.environ.get('RANK', '0')}: a process of the SGLang engine died; its own error, if it left one, is printed above")
