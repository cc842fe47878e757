"""What every run needs and no stage owns: settings from the command line, process groups, and a clean end."""

import difflib
import gc
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

import process_groups
from problems import RANK_0_SPEAKS_WITHIN_S, BadInput, all_problems
from processes import signal_when_parent_ends, use_writable_home

# The engines warn at import about what a CPU lacks; they say it in every process. Errors still show.
os.environ.setdefault("PYTHONWARNINGS", "ignore")
warnings.simplefilter("ignore")
use_writable_home()

CPU_SGLANG = "0.5.21"  # the version that cpu.py is written for


# The signals that asked this rank to stop. No Event: a second signal, while the handler of the
# first holds its lock, would wait for that lock for ever.
told_to_stop: list[int] = []
# Set when the first step begins. Until then nothing is lost by an end in the middle.
is_training = threading.Event()
MOST_OPEN_FILES = 2**16  # as SGLang sets it


class EngineDied(Exception):
    """A process of the inference engine ended while it was needed."""


class ExportError(Exception):
    """What of an export could not be written. The rest of it is there."""


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


def init_distributed(
    rollout_ranks: int = 0, *, wait_s: float = process_groups.UNLIMITED_WORK_S
) -> dist.ProcessGroup:
    """Join torchrun's process groups and return the one that all ranks share: gloo for CPU tensors, NCCL for CUDA tensors where there are any.

    wait_s: how long any rank may wait for another in a collective, process_groups.longest_wait_s.

    With rollout_ranks, the last so many ranks are a default world of their own and the others, the trainers, another: megatron-core builds its groups from
    the default world. The shared group is made beside the two from the same store, as SGLang makes its weight-update groups.
    """
    gc.collect()
    gc.freeze()  # what imports have made is never garbage; to look through it would take 0.3 s now and then, in which every other rank waits
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    store, rank, world_size = process_groups.join_store()
    process_groups.set_wait(wait_s)
    trainers = world_size - rollout_ranks
    name, size, rank_there = ("trainers", trainers, rank) if rank < trainers else ("rollout", rollout_ranks, rank - trainers)
    world = dict(store=dist.PrefixStore(name, store), timeout=process_groups.timeout())
    dist.init_process_group(backend, world_size=size, rank=rank_there, **world)
    everyone = dist.group.WORLD
    if rollout_ranks:
        from sglang.srt.utils import init_custom_process_group

        shared = dict(store=dist.PrefixStore("shared", store), timeout=process_groups.timeout())
        everyone = init_custom_process_group(
            backend, world_size=world_size, rank=rank, group_name="shared", **shared
        )
    process_groups.watch_links()
    return everyone


def all_gather_bytes(mine: bytes, group: dist.ProcessGroup) -> list[bytes]:
    """Every rank's bytes on every rank of the group, in rank order. Collective (gloo)."""
    process_groups.joins_exchange(group)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(group.size())]
    dist.all_gather(sizes, torch.tensor([len(mine)]), group=group)
    padded = torch.zeros(int(max(sizes)), dtype=torch.uint8)
    padded[: len(mine)] = torch.frombuffer(bytearray(mine), dtype=torch.uint8) if mine else padded[:0]
    rows = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(rows, padded, group=group)
    return [row[: int(size)].numpy().tobytes() for row, size in zip(rows, sizes)]


def broadcast_bytes(mine: bytes, group: dist.ProcessGroup, *, source: int = 0) -> bytes:
    """The bytes of one rank of the group on all of its ranks. Collective (gloo)."""
    process_groups.joins_exchange(group)
    size = torch.tensor([len(mine)])
    dist.broadcast(size, group=group, group_src=source)
    data = torch.frombuffer(bytearray(mine), dtype=torch.uint8) if group.rank() == source else torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(data, group=group, group_src=source)
    return data.numpy().tobytes()


def run_main(main: Callable[[], None]) -> None:
    """Call main and turn how it ends into an exit code.

    0 is done, or stopped with a checkpoint; 1 failed; 2 bad input. 128 + n is ended by signal n:
    130 by Ctrl-C, 143 by SIGTERM and 129 by SIGHUP before the first step. From the first step on
    SIGTERM and SIGHUP let the step end and a checkpoint be written; a second one changes nothing.
    torchrun kills what is left after 30 s, or after its --shutdown-timeout.

    main's own `with` ends the engine's children. Should this process be killed, they end
    themselves.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # an answer may hold what the console's encoding has not; to print it must not end the run
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    signal.signal(signal.SIGQUIT, _engine_child_died)
    signal.signal(signal.SIGTERM, _stop)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
        signal.signal(signal.SIGHUP, _stop)
    if dist.is_torchelastic_launched():  # not under a shell, which a run may outlive (nohup)
        # Should torchrun be killed, nobody else would end this rank.
        signal_when_parent_ends(signal.SIGTERM)
    try:
        _call(main)
    except KeyboardInterrupt as error:
        number = signal.Signals(*error.args or [signal.SIGINT])
        who = f"rank {os.environ.get('RANK', '0')}"
        said = f"interrupted by {number.name}: {who} has ended its engine"
        print(said, file=sys.stderr, flush=True)
        sys.exit(128 + number)
    finally:
        for child in multiprocessing.active_children():
            child.kill()  # multiprocessing would send SIGTERM, and wait for those that ignore it


def _call(main: Callable[[], None]) -> None:
    try:
        main()
        if dist.is_initialized():  # not after --plan
            dist.destroy_process_group()
    except BadInput as error:
        # All ranks usually see the same mistake. Rank 0 says it at once; torchrun then ends the others while they wait.
        if os.environ.get("RANK", "0") == "0" or not _told_within(RANK_0_SPEAKS_WITHIN_S):
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except (EngineDied, ExportError) as error:
        print("\n".join([f"error: {error}", *getattr(error, "__notes__", [])]), file=sys.stderr, flush=True)
        sys.exit(1)
    except RuntimeError as error:
        if not (explained := process_groups.explain(error)):
            raise
        print(f"error: {explained}", file=sys.stderr, flush=True)
        # A rank that is gone is the cause, and torchrun must see it first: it then ends this rank while it waits.
        if "by peer" in str(error) and _told_within(2 if told_to_stop else 20):
            sys.exit(1)
        raise


def _told_within(seconds: float) -> bool:
    """Wait for torchrun's SIGTERM, which ends the ranks that are left when one has failed."""
    is_training.set()  # the signal is waited for: it must not interrupt
    before, end = len(told_to_stop), time.monotonic() + seconds
    while len(told_to_stop) == before and time.monotonic() < end:
        time.sleep(0.05)
    return len(told_to_stop) > before


def _stop(signum, frame) -> None:
    told_to_stop.append(signum)
    if not is_training.is_set() and len(told_to_stop) == 1:  # a second one would disturb the end
        raise KeyboardInterrupt(signum)


def engine_died() -> EngineDied:
    """Return what to raise when a process of this rank's engine has ended."""
    rank = os.environ.get("RANK", "0")
    return EngineDied(
        f"rank {rank}: a process of the SGLang engine died; its own error, if it left one, is "
        "printed above"
    )


def _engine_child_died(signum, frame) -> None:
    """Raise what SIGQUIT of SGLang tells: a child has failed, or its watchdog found it dead.

    Where the main thread is in a finalizer, Python drops what is raised here. Engine.call notices
    the death too.
    """
    raise engine_died()
