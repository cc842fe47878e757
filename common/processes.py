"""A rank's process and its children: where their caches lie, how children are spawned, what they
ignore, and when they end.

No torch is imported here: the workers that judge mathematics start without it.
"""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterable
from multiprocessing import resource_tracker, util
from pathlib import Path

import psutil

# Ctrl-C, a scheduler, torchrun and a closed terminal signal every process of a rank's group.
# The rank decides what follows: its children ignore these.
END_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GONE_WITHIN_S = 60.0  # a GPU's memory is given back while a killed process ends


def use_writable_home() -> None:
    """Set HOME to a folder of temporary files where nothing can be written to it.

    torch, Triton and SGLang keep caches there, and fail at import where they cannot. Credentials
    of W&B are still read from the home that was given.
    """
    home = Path(os.path.expanduser("~"))
    try:
        with tempfile.TemporaryFile(dir=home):
            return
    except OSError as error:
        problem = error.strerror
    try:
        folder = Path(tempfile.gettempdir()) / f"nanoslime-home-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if found.st_uid != os.getuid() or found.st_mode & 0o7777 != 0o700 or folder.is_symlink():
            folder = Path(tempfile.mkdtemp())  # what others may write would be run as a cache
    except OSError:
        return  # engine_checks names a folder of temporary files that cannot be written
    os.environ["HOME"] = str(folder)
    os.environ.setdefault("NETRC", str(home / ".netrc"))
    if os.environ.get("RANK", "0") == "0":
        said = f"the home {home} cannot be written ({problem}): caches go to {folder}"
        print(said, file=sys.stderr, flush=True)


@contextlib.contextmanager
def main_module_hidden():
    """Spawned children run the parent's main script again, to find functions that were defined
    there. Ours need none of it, and save its imports.
    """
    main = sys.modules["__main__"]
    file, spec = main.__dict__.pop("__file__", None), main.__spec__
    main.__spec__ = None
    try:
        yield
    finally:
        main.__spec__ = spec
        if file is not None:
            main.__file__ = file


@contextlib.contextmanager
def end_signals_blocked():
    """Spawn processes in which END_SIGNALS wait, through all their imports, for ignore_end_signals.

    This process misses none: what comes meanwhile is delivered at the end.
    """
    resource_tracker.ensure_running()  # its start, within another, would unblock two of them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, END_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_end_signals() -> None:
    """Leave END_SIGNALS to the parent. Called first in a child."""
    for number in END_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, END_SIGNALS)


def signal_when_parent_ends(number: int) -> None:
    """Ask Linux to send this process a signal when the one that started it is gone
    (PR_SET_PDEATHSIG; children do not inherit it).
    """
    ctypes.CDLL(None).prctl(1, number)


def end_with_parent() -> None:
    """In a spawned child: end when the parent is gone, however it went, and be it before this is
    called.
    """
    threading.Thread(
        target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True
    ).start()


def kill_with_children(processes: Iterable[multiprocessing.Process]) -> None:
    """Kill children and all below them, and wait until they are gone.

    Those that have ended are passed over.
    """
    below = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            below += psutil.Process(process.pid).children(recursive=True)
        process.kill()
    for process in below:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    for process in processes:
        process.join(GONE_WITHIN_S)
    psutil.wait_procs(below, timeout=GONE_WITHIN_S)


def kill_at_exit(process: multiprocessing.Process) -> None:
    """Kill a child that ignores SIGTERM when this process exits, or forgets it.

    multiprocessing ends its children by SIGTERM, and waits for them. What is registered here comes
    before that.
    """
    util.Finalize(process, process._popen.kill, exitpriority=10)
