"""What every run needs and no stage owns: settings from the command line, process groups, and a clean end."""

import contextlib
import ctypes
import difflib
import gc
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path

import torch
import torch.distributed as dist
import tyro
from torch.distributed.rendezvous import rendezvous

from problems import BadInput, all_problems

# The engines warn at import about what a CPU lacks; they say it in every process. Errors still show.
os.environ.setdefault("PYTHONWARNINGS", "ignore")
warnings.simplefilter("ignore")

REPOSITORY = Path(__file__).resolve().parent
CPU_SGLANG = "0.5.21"  # the version that cpu.py is written for


told_to_stop = threading.Event()


class EngineDied(Exception):
    """A process of the inference engine ended while it was needed."""


class ExportError(Exception):
    """What of an export could not be written. The rest of it is there."""


@dataclass(frozen=True)
class RunSettings:
    """What to train, for how long, and where the record goes."""

    model: str = str(REPOSITORY / "toy")
    """Hugging Face folder (Qwen3, Qwen2.5, Llama, Qwen3-MoE or GLM-4.5; safetensors) to train and to generate with."""
    name: str = ""
    """The run's folder below runs/, for instance lr1/seed1; empty: the loop's name and the time."""
    steps: int = 80
    """Training steps in all, those before --resume included: each is one rollout, one update (of --minibatches optimizer steps), one weight hand-off."""
    eval_every: int = 10
    """Evaluate on the held-out prompts every so many steps, and before the first and after the last."""
    seed: int = 1
    """Seeds prompts, sampling and Megatron."""
    check_sync: bool = False
    """Read every weight back from the engine after every hand-off; always done after the first and the last."""
    save_every: int = 0
    """Write a checkpoint every so many steps and after the last; 0: only when the run is told to stop (SIGTERM), and after the last step of a resumed run."""
    keep: int = 2
    """How many checkpoints are kept; older ones are removed."""
    resume: bool = False
    """Go on from the newest checkpoint of the run --name."""
    export: tuple[str, ...] = ("bf16",)
    """Write the trained weights as Hugging Face folders at the end: any of bf16, fp8; none with an empty list."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard as well, into the run folder."""
    wandb: str = ""
    """Send the metrics to this Weights & Biases project as well."""
    save_rollouts: bool = False
    """Write every step's samples to runs/NAME/rollouts."""
    load_rollouts: str = ""
    """Train on the samples of such a folder, without an engine: to look at training alone, or to repeat it exactly."""
    debug_rollout_only: bool = False
    """Generate and judge, but never train: to look at generation alone."""
    profile: tuple[int, ...] = ()
    """Steps of which every rank writes PyTorch's profile; open it at ui.perfetto.dev."""


# Numpy takes seeds below 2**32. Engine and trainer add a number to --seed on each rank.
SEEDS = 2**31
NOT_IN_PROJECTS = "/\\#?%:"  # W&B refuses them only when the run has begun
EXTRAS = {"tensorboard": "tensorboard==2.21.0", "wandb": "wandb==0.31.0"}  # what a flag needs beside requirements.txt


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
        raise BadInput(f"RANK is not set: {script} runs under torchrun. Use `torchrun {script}` or `torchrun --nproc-per-node 2 {script}`")
    return tyro.cli(settings_class, description=sys.modules["__main__"].__doc__, config=(tyro.conf.OmitArgPrefixes,))


@all_problems
def check_run_settings(settings: RunSettings) -> None:
    """What cannot work, before anything is started."""
    if settings.steps < 1 or settings.eval_every < 1:
        yield f"--steps {settings.steps} and --eval-every {settings.eval_every} must be at least 1"
    if not 0 <= settings.seed < SEEDS:
        yield f"--seed {settings.seed} must be at least 0 and below {SEEDS}"
    if odd := set(settings.wandb) & set(NOT_IN_PROJECTS):
        which = f"--wandb {settings.wandb!r} holds {''.join(sorted(odd))!r}"
        yield f"{which}: the name of a project may hold none of {NOT_IN_PROJECTS}"
    if unknown := set(settings.export) - {"bf16", "fp8"}:
        yield f"--export {' '.join(sorted(unknown))} is none of: bf16, fp8"
    if settings.save_every < 0 or settings.keep < 1:
        yield f"--save-every {settings.save_every} must not be negative, --keep {settings.keep} must be at least 1"
    for name, line in EXTRAS.items():
        if getattr(settings, name) and importlib.util.find_spec(name) is None:
            yield f"--{name} needs a package that is not installed: pip install {line}"
    if settings.load_rollouts and (settings.save_rollouts or settings.debug_rollout_only):
        yield "--load-rollouts starts no engine: leave out --save-rollouts and --debug-rollout-only, which are about what an engine generates"
    dumps = (rollouts_file(settings.load_rollouts, step) for step in range(1, settings.steps + 1))
    if settings.load_rollouts and (file := next((f for f in dumps if not os.path.isfile(f)), None)):
        yield f"--load-rollouts {settings.load_rollouts} has no {file.name}: give a folder that --save-rollouts wrote, or fewer --steps"
    if settings.resume and not settings.name:
        yield "--resume needs the --name of the run that is to go on"
    if problem := name_problem(settings.name):
        yield problem
    elif settings.name and not settings.resume and os.path.lexists(f"runs/{settings.name}"):
        yield f"runs/{settings.name} already exists: choose another --name, remove it, or go on with its run by --resume"
    elif inside := [parent for parent in Path(settings.name).parents if os.path.lexists(Path("runs") / parent / "settings.json")]:
        yield f"--name {settings.name} lies inside the run {inside[0]}: choose a name beside it"
    if late := [step for step in settings.profile if not 1 <= step <= settings.steps]:
        yield f"--profile {late[0]} is no step of the run, which has steps 1 to {settings.steps}"


def name_problem(name: str) -> str:
    """Say what is wrong with a --name, "" if nothing. It names a folder, a command of --resume and a run of W&B: only what is plain in all three."""
    part = "[A-Za-z0-9_][A-Za-z0-9_.-]*"
    if not name or (re.fullmatch(f"{part}(/{part})*", name) and len(name) <= 128):
        return ""
    rule = "at most 128 letters, digits and _.-, in parts divided by /, each of which begins with a letter, a digit or _"
    return f"--name {name!r} must be {rule}: for instance lr1/seed1"


def new_run_folder(name: str, loop: str) -> Path:
    """Create the folder of a new run, and no other run's: runs/NAME, or the loop's name, the time and, if need be, a number. Raises BadInput."""
    stem = f"{loop}-{time.strftime('%Y%m%d-%H%M%S')}"
    for candidate in [name] if name else chain([stem], (f"{stem}-{i}" for i in count(2))):
        folder = Path("runs") / candidate
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.mkdir(mode=0o700)  # prompts and answers are the user's; fails if it is there: two runs that start together do not share it
            return folder
        except FileExistsError as error:
            if name:
                raise BadInput(f"{folder} already exists: choose another --name, or remove it") from error
    raise AssertionError("the names of an unnamed run never end")


def rollouts_file(folder: str | Path, step: int) -> Path:
    """Where the samples of a step are: a Sample a line."""
    return Path(folder) / f"step-{step:06d}.jsonl"


@all_problems
def parse_overrides(pairs: tuple[str, ...], *, flag: str, fields: list[str] | None) -> dict:
    """("key=value", …) -> {key: value}; values are read as JSON where they are JSON (true, 4, 0.1, null), else as text.

    fields: the names that may be set; None: any. Raises BadInput for others, naming the nearest of each,
    and for a name that is given twice.
    """
    overrides, seen = {}, set()
    for pair in pairs:
        key, separator, text = pair.partition("=")
        if not separator:
            yield f"{flag} {pair!r} is not of the form key=value"
        elif key in seen:
            yield f"{flag} {key} is given twice: give it once"
        elif fields is not None and key not in fields:
            nearest = difflib.get_close_matches(key, fields, n=1, cutoff=0.0)[0]
            yield f"{flag} {key} is not a field that can be set there; the nearest is {nearest}"
        else:
            try:
                overrides[key] = json.loads(text)
            except json.JSONDecodeError:
                overrides[key] = text
            except (ValueError, RecursionError) as error:  # JSON, but of a number or depth too large
                yield f"{flag} {key} cannot be read as JSON ({error}): give another value"
        seen.add(key)
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


def signal_when_parent_ends(number: int) -> None:
    """Ask Linux to send this process a signal when the one that started it is gone (PR_SET_PDEATHSIG; children do not inherit it)."""
    ctypes.CDLL(None).prctl(1, number)


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


def run_main(main: Callable[[], None]) -> None:
    """Call main and turn how it ends into an exit code: 0 done, 1 failed, 2 bad input, 130 interrupted.

    The engine's children are ended by main's own `with`. Should this process be killed, they notice that their parent is gone and end themselves.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # an answer may hold what the console's encoding has not; to print it must not end the run
    signal.signal(signal.SIGQUIT, _engine_child_died)
    signal.signal(signal.SIGTERM, lambda signum, frame: told_to_stop.set())  # at the end of the step: a checkpoint, and exit code 0
    signal_when_parent_ends(signal.SIGTERM)  # should torchrun be killed, nobody else would end this rank
    try:
        main()
        if dist.is_initialized():  # not after --plan
            dist.destroy_process_group()
    except BadInput as error:
        # All ranks usually see the same mistake. Rank 0 says it at once; torchrun then ends the others while they wait.
        time.sleep(0 if os.environ.get("RANK", "0") == "0" else 3)
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except (EngineDied, ExportError) as error:
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
