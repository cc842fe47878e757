"""The folder of a run: one run creates it, locks it while it writes, and all its ranks see it."""

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

from common import process_groups
from common.distributed import all_gather_bytes, broadcast_bytes
from common.errors import BadInput
from common.settings import RunSettings

FILES = {"metrics": "metrics.jsonl", "samples": "samples.jsonl", "trace": "trace.json"}
SHARED_S = 60.0  # how late a network file system may show a new file to other machines


def name_problems(settings: RunSettings) -> Iterator[str]:
    """Yield why a run cannot have its --name.

    The name becomes a folder, a word on a command line and the name of a W&B run. It may hold only
    characters that have no special meaning in any of them.
    """
    name, part = settings.name, "[A-Za-z0-9_][A-Za-z0-9_.-]*"
    is_auto = settings.resume == "auto"
    if settings.resume and not name:
        yield "--resume needs the --name of the run that is to go on"
    if is_auto and not settings.save_every:
        rule = "without checkpoints every start would begin again"
        yield f"--resume auto with --save-every 0: {rule}: give --save-every N"
    if is_auto and settings.eval_only:
        rule = "there must be a checkpoint to evaluate"
        yield f"--resume auto with --eval-only: {rule}: write --resume alone"
    if name and not (re.fullmatch(f"{part}(/{part})*", name) and len(name) <= 128):
        rule = "at most 128 letters, digits and _.-, in parts divided by /"
        begin = "each of which begins with a letter, a digit or _"
        yield f"--name {name!r} must be {rule}, {begin}: for instance lr1/seed1"
        return
    if name and not settings.resume and os.path.lexists(f"runs/{name}"):
        fix = "choose another --name, remove it, or go on with its run by --resume"
        yield f"runs/{name} already exists: {fix}"
        return
    if name and is_auto and os.path.lexists(f"runs/{name}") and not _is_run(Path("runs") / name):
        yield f"runs/{name} is there, and is no run's folder: choose another --name, or remove it"
        return
    for parent in Path(name).parents:
        if os.path.lexists(Path("runs") / parent / "settings.json"):
            yield f"--name {name} lies inside the run {parent}: choose a name beside it"
            return


def _is_run(folder: Path) -> bool:
    """Tell whether a run has made this folder: its first file is the lock."""
    return folder.is_dir() and ((folder / "lock").is_file() or not any(folder.iterdir()))


def open_run_folder(
    name: str, loop: str, *, resumed_step: int | None, is_auto: bool
) -> tuple[Path, TextIO, str]:
    """Create a run's folder, or go back to it, and lock it. Only rank 0 calls this.

    Returns the folder, the lock's file, and what was done with files that an earlier start left: ""
    for nothing. The caller must keep the lock's file open. Raises BadInput if another run writes
    there.
    resumed_step: of the checkpoint; None without one. is_auto: --resume auto.
    """
    said = ""
    if is_auto and resumed_step is None:
        said = _set_aside_unsaved(name)
    folder = new_run_folder(name, loop) if resumed_step is None else Path("runs") / name
    if not is_auto:  # which looks for itself after a restart
        process_groups.remember_run(str(folder.relative_to("runs")))
    lock = lock_run_folder(folder)
    remove_parts(folder)
    if resumed_step is not None:
        said = _set_aside_damaged(folder, after=resumed_step)
    return folder, lock, said


def _set_aside_unsaved(name: str) -> str:
    """Rename the folder of a run that has no checkpoint; say what was done, for --resume auto.

    Raises BadInput if another run writes there.
    """
    folder = Path("runs") / name
    if not folder.exists():
        return f"{folder} has no checkpoint: the run starts afresh"
    with lock_run_folder(folder):
        if whole := checkpoints_of(folder):  # the last ranks of another start were still ending
            raise RuntimeError(f"{whole[-1]} was written during this start: start again")
        aside = process_groups.set_aside(folder)
    return f"{folder} has no checkpoint: the run starts afresh, and its files are kept in {aside}"


def _set_aside_damaged(run_folder: Path, *, after: int) -> str:
    """Rename the checkpoints of steps behind `after`; say so, or "" where there are none.

    --resume auto has passed over them. Under their names they would count as the newest, and those
    that are written from now on would be removed in their place.
    """
    names = []
    for folder in checkpoints_of(run_folder):
        if step_of(folder) > after:
            damaged = folder.with_suffix(".damaged")
            shutil.rmtree(damaged, ignore_errors=True)
            names.append(folder.rename(damaged).name)
    return f"newer checkpoints are damaged, and kept as {', '.join(names)}" if names else ""


def new_run_folder(name: str, loop: str) -> Path:
    """Create the folder of a new run, runs/NAME, and return it. Raises BadInput if that fails.

    Without a name it is called by the loop's name and the time, and by a number if that is taken.
    """
    if name:
        folder = Path("runs") / name
        if not _create(folder):
            raise BadInput(f"{folder} already exists: choose another --name, or remove it")
        return folder
    stem = f"{loop}-{time.strftime('%Y%m%d-%H%M%S')}"
    for candidate in chain([stem], (f"{stem}-{i}" for i in count(2))):
        folder = Path("runs") / candidate
        if _create(folder):
            return folder


def _create(folder: Path) -> bool:
    """Create a folder; return False if it exists already. Raises BadInput if it cannot be created.

    Of two runs that start at the same time, only one gets True.
    """
    try:
        os.makedirs(folder.parent, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)  # prompts and answers are the user's own
            return True
    except OSError as error:
        fix = "run where you may write, or choose --name"
        about = f"a folder below runs/ cannot be created ({error.strerror})"
        raise BadInput(f"{about}: {fix}") from error
    return False


def lock_run_folder(folder: Path) -> TextIO:
    """Lock a run folder and return the lock's file, which the caller must keep open.

    The kernel frees the lock, however this process ends. Raises BadInput if another run holds it.
    """
    try:
        file = open(folder / "lock", "a+", encoding="utf-8")
    except OSError as error:
        raise unwritable(folder, error) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        owner = file.read().strip() or "just started"
        fix = "wait for its end, stop it, or choose another --name"
        raise BadInput(f"{folder} is being written by another run, {owner}: {fix}") from error
    except OSError as error:
        # NFS without its lock service, and Lustre mounted without flock, have no such locks.
        what = f"the file system of {folder} has no locks ({error.strerror})"
        print(f"{what}: start no second run of this name", file=sys.stderr, flush=True)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def rollouts_file(folder: str | Path, step: int) -> Path:
    """Return the file of --save-rollouts that holds the samples of a step, one a line."""
    return Path(folder) / f"step-{step:06d}.jsonl"


def checkpoints_of(run_folder: Path) -> list[Path]:
    """Return a run's finished checkpoints, oldest first: the folders named step- and a number."""
    paths = (run_folder / "checkpoints").glob("step-*")
    finished = [path for path in paths if re.fullmatch(r"step-\d+", path.name) and path.is_dir()]
    return sorted(finished, key=step_of)


def step_of(folder: Path) -> int:
    """Return the step in a checkpoint's name.

    Compare steps as numbers: as texts, step 1,000,000 would come before step 999,999.
    """
    return int(folder.name.removeprefix("step-"))


def remove_parts(run_folder: Path) -> None:
    """Remove unfinished checkpoints of ranks that were killed.

    The caller must hold the run folder's lock, or the checkpoint of a living run would be removed.
    """
    for path in (run_folder / "checkpoints").glob("step-*.part"):
        if re.fullmatch(r"step-\d+\.part", path.name):
            shutil.rmtree(path, ignore_errors=True)


def unwritable(folder: Path, error: OSError) -> BadInput:
    """Return the error of a run folder that cannot be written."""
    fix = "run where you may write, or choose --name"
    return BadInput(f"the run folder {folder} cannot be written ({error.strerror}): {fix}")


def check_shared(folder: Path, group: dist.ProcessGroup, *, is_new: bool) -> None:
    """Raise BadInput on all ranks unless all of them see the same run folder. Collective.

    Otherwise each machine would keep its ranks' part of a checkpoint to itself.
    is_new: this run has just created the folder; if it is refused it is removed.
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
    # Each rank says where it is if it does not see rank 0's file, and nothing otherwise.
    mine = b"" if seen else f"on {socket.gethostname()} in {Path.cwd()}".encode()
    where = [text.decode() for text in all_gather_bytes(mine, group)]
    blind = [f"rank {rank} {text}" for rank, text in enumerate(where) if text]
    if is_writer:
        file.unlink()
        if blind and is_new:
            shutil.rmtree(folder)
    if blind:
        ranks = f"{len(blind)} of {len(where)} ranks do not see what rank 0 has written to"
        fix = "start all ranks in one folder, on a file system that all machines share"
        raise BadInput(f"{ranks} {folder}; the first is {blind[0]}: {fix}")


def _holds(file: Path, content: bytes) -> bool:
    """Tell whether a file can be read and holds these bytes."""
    try:
        return file.read_bytes() == content
    except OSError:  # not there yet; a network file system also raises other errors meanwhile
        return False


def has_whole_rows(folder: Path, *, size: int) -> bool:
    """Tell whether the first `size` bytes of metrics.jsonl are whole rows, as a run writes them."""
    if size == 0:
        return True
    written = (folder / FILES["metrics"]).read_bytes()[:size]
    if not written.endswith(b"\n"):
        return False
    try:
        return all(type(json.loads(row)) is dict for row in written.split(b"\n")[:-1])
    except (ValueError, RecursionError):  # not JSON; or too many brackets within one another
        return False
