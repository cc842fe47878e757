"""Starts and ends the child processes of a rank, and sets where their caches are.

This module does not import torch, so that the workers that judge mathematics start fast.
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

# Ctrl-C, a scheduler, torchrun and a closed terminal send these to every process of a rank's group.
# The rank alone decides what to do; its children ignore them.
END_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GONE_WITHIN_S = 60.0  # a killed process first gives back its GPU memory


def use_writable_home() -> None:
    """Set HOME to a temporary folder if the user's home cannot be written.

    torch, Triton and SGLang keep caches there, and fail at import if they cannot. W&B's credentials
    are still read from the user's home.
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
            # Code in a cache is executed, so nobody else may write there.
            folder = Path(tempfile.mkdtemp())
    except OSError:
        return  # backends/sglang/checks.py refuses a temporary folder that cannot be written
    os.environ["HOME"] = str(folder)
    os.environ.setdefault("NETRC", str(home / ".netrc"))
    if os.environ.get("RANK", "0") == "0":
        text = f"the home {home} cannot be written ({problem}): caches go to {folder}"
        print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def main_module_hidden():
    """Hide the main script from children that are spawned inside.

    A spawned child would run the parent's main script again, to find functions defined there. Ours
    need none of them, and without it they save its imports.
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
    """Block END_SIGNALS in processes that are started inside, until they call ignore_end_signals.

    A signal to this process is delivered afterwards; none is lost.
    """
    # Started by the spawn itself, the resource tracker would unblock two of the signals.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, END_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_end_signals() -> None:
    """Ignore END_SIGNALS; the parent handles them. A child calls this first."""
    for number in END_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, END_SIGNALS)


def signal_when_parent_ends(number: int) -> None:
    """Have Linux send this process a signal when its parent ends. Children do not inherit this."""
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def forgo_restarts() -> None:
    """Have torchrun end the job where it would start the ranks again: refused input stays refused.

    Its agent restarts them after any exit code, and a signal is all that ends it. It then sends
    SIGTERM to the ranks, prints a SignalException, and ends with exit code 1. On several nodes each
    node's ranks end their own. Under another launcher this does nothing. Nor does it in ranks that
    were restarted: what was accepted before may be refused for a while, as when a service is gone.
    """
    if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        return
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return
    with contextlib.suppress(psutil.Error):  # the parent is gone, and restarts nothing
        parent = psutil.Process(os.getppid())
        words = [os.path.basename(word) for word in parent.cmdline()]
        if {"torchrun", "torch.distributed.run"} & set(words):
            parent.send_signal(signal.SIGTERM)


def end_with_parent() -> None:
    """End this child process when its parent is gone, even if that was before this call."""

    def wait_and_end():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait_and_end, daemon=True).start()


def kill_with_children(processes: Iterable[multiprocessing.Process]) -> None:
    """Kill children and all their descendants, and wait until they are gone.

    Processes that have ended already are skipped.
    """
    descendants = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            descendants += psutil.Process(process.pid).children(recursive=True)
        process.kill()
    for process in descendants:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    for process in processes:
        process.join(GONE_WITHIN_S)
    psutil.wait_procs(descendants, timeout=GONE_WITHIN_S)


def kill_at_exit(process: multiprocessing.Process) -> None:
    """Kill a child that ignores SIGTERM when this process exits, or when `process` is collected.

    multiprocessing ends its children by SIGTERM and waits for them. This finalizer runs first.
    """
    util.Finalize(process, process._popen.kill, exitpriority=10)
