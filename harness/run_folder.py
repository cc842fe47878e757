"""The folder of a run: made once, locked by the run that writes it, and seen by all of its ranks."""

import contextlib
import fcntl
import json
import os
import re
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from itertools import chain, count
from pathlib import Path
from typing import TextIO

import torch.distributed as dist

from common.distributed import all_gather_bytes, broadcast_bytes
from common.errors import BadInput
from common.settings import RunSettings

FILES = {"metrics": "metrics.jsonl", "samples": "samples.jsonl", "trace": "trace.json"}
SHARED_S = 60.0  # a network file system may show a new file late


def name_problems(settings: RunSettings) -> Iterator[str]:
    """Yield what keeps a run from having its --name.

    It names a folder, a command of --resume and a run of W&B: it may hold what is plain in all.
    """
    name, part = settings.name, "[A-Za-z0-9_][A-Za-z0-9_.-]*"
    if settings.resume and not name:
        yield "--resume needs the --name of the run that is to go on"
    if name and not (re.fullmatch(f"{part}(/{part})*", name) and len(name) <= 128):
        rule = "at most 128 letters, digits and _.-, in parts divided by /"
        begin = "each of which begins with a letter, a digit or _"
        yield f"--name {name!r} must be {rule}, {begin}: for instance lr1/seed1"
        return
    if name and not settings.resume and os.path.lexists(f"runs/{name}"):
        fix = "choose another --name, remove it, or go on with its run by --resume"
        yield f"runs/{name} already exists: {fix}"
        return
    for parent in Path(name).parents:
        if os.path.lexists(Path("runs") / parent / "settings.json"):
            yield f"--name {name} lies inside the run {parent}: choose a name beside it"
            return


def new_run_folder(name: str, loop: str) -> Path:
    """Create the folder of a new run, and no other run's. Raises BadInput.

    It is runs/NAME; without a name, the loop's name, the time and, if need be, a number.
    """
    stem = f"{loop}-{time.strftime('%Y%m%d-%H%M%S')}"
    for candidate in [name] if name else chain([stem], (f"{stem}-{i}" for i in count(2))):
        folder = Path("runs") / candidate
        try:
            os.makedirs(folder.parent, exist_ok=True)
            if _made(folder):
                break
        except OSError as error:
            fix = "run where you may write, or choose --name"
            about = f"a folder below runs/ cannot be created ({error.strerror})"
            raise BadInput(f"{about}: {fix}") from error
        if name:
            raise BadInput(f"{folder} already exists: choose another --name, or remove it")
    return folder


def _made(folder: Path) -> bool:
    """Make a folder, or tell that it is there: two runs that start together do not share it."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)  # prompts and answers are the user's
        return True
    return False


def lock_run_folder(folder: Path) -> TextIO:
    """Lock a run folder for the life of this process; the kernel frees it however the process ends.

    Keep what is returned. Raises BadInput where another run holds the lock.
    """
    try:
        file = open(folder / "lock", "a+", encoding="utf-8")
    except OSError as error:
        raise unwritable(folder, error) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        raise BadInput(
            f"{folder} is being written by another run, {file.read().strip() or 'just started'}: "
            "wait for its end, stop it, or choose another --name"
        ) from error
    except OSError as error:
        # NFS without its lock service, and Lustre mounted without flock, have no such locks.
        fix = f"the file system of {folder} has no locks ({error.strerror})"
        print(f"{fix}: start no second run of this name", file=sys.stderr, flush=True)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def rollouts_file(folder: str | Path, step: int) -> Path:
    """Where the samples of a step are: a Sample a line."""
    return Path(folder) / f"step-{step:06d}.jsonl"


def checkpoints_of(run_folder: Path) -> list[Path]:
    """Return a run's finished checkpoints, oldest first: folders named step- and a number."""
    found = (run_folder / "checkpoints").glob("step-*")
    whole = [path for path in found if re.fullmatch(r"step-\d+", path.name) and path.is_dir()]
    return sorted(whole, key=step_of)


def step_of(folder: Path) -> int:
    """Return the number in a checkpoint's name.

    As text, step 1,000,000 would come before step 999,999.
    """
    return int(folder.name.removeprefix("step-"))


def remove_parts(run_folder: Path) -> None:
    """Remove what killed ranks have left of checkpoints. The caller holds the run folder's lock."""
    for path in (run_folder / "checkpoints").glob("step-*.part"):
        if re.fullmatch(r"step-\d+\.part", path.name):
            shutil.rmtree(path, ignore_errors=True)


def unwritable(folder: Path, error: OSError) -> BadInput:
    """Return what to raise when a run folder cannot be written."""
    return BadInput(
        f"the run folder {folder} cannot be written ({error.strerror}): run where you may write, "
        "or choose --name"
    )


def check_shared(folder: Path, group: dist.ProcessGroup, *, is_new: bool) -> None:
    """Refuse a run folder that is not the same for all ranks: raise BadInput. Collective.

    Each rank would write its part of a checkpoint to another place. is_new: whether the folder has
    been made just now, and goes again if it is refused.
    """
    file, token, is_writer = folder / ".shared", uuid.uuid4().hex.encode(), group.rank() == 0
    if is_writer:
        try:
            file.write_bytes(token)
        except OSError as error:
            raise unwritable(folder, error) from error
    token, deadline = broadcast_bytes(token, group), time.time() + SHARED_S
    while not (seen := _holds(file, token)) and time.time() < deadline:
        time.sleep(0.2)
    mine = b"" if seen else f"on {socket.gethostname()} in {Path.cwd()}".encode()
    where = [text.decode() for text in all_gather_bytes(mine, group)]
    if is_writer:
        file.unlink()
        if any(where) and is_new:
            shutil.rmtree(folder)
    blind = [f"rank {rank} {text}" for rank, text in enumerate(where) if text]
    if blind:
        ranks = f"{len(blind)} of {len(where)} ranks do not see what rank 0 has written to"
        fix = "start all ranks in one folder, on a file system that all machines share"
        raise BadInput(f"{ranks} {folder}; the first is {blind[0]}: {fix}")


def _holds(file: Path, content: bytes) -> bool:
    try:
        return file.read_bytes() == content
    except OSError:  # a network file system has more errors than that it is not there
        return False


def has_whole_rows(folder: Path, *, size: int) -> bool:
    """Tell whether the first `size` bytes of metrics.jsonl are whole rows, as a run wrote them."""
    if size == 0:
        return True
    rows = (folder / FILES["metrics"]).read_bytes()[:size]
    try:
        return rows.endswith(b"\n") and all(
            type(json.loads(row)) is dict for row in rows.split(b"\n")[:-1]
        )
    except (ValueError, RecursionError):
        return False
