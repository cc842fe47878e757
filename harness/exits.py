"""How a run ends: what a signal does, which exit code follows, and what is printed."""

import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable

import torch.distributed as dist

from common import process_groups
from common.errors import RANK_0_SPEAKS_WITHIN_S, BadInput, EngineDied, ExportError, engine_died
from common.processes import forgo_restarts, signal_when_parent_ends

# The signals that have asked this rank to stop. This is a list and no Event. A second signal may
# come while the handler of the first holds an Event's lock, and would wait for it for ever.
told_to_stop: list[int] = []
# Set when the first step begins. Until then an end in the middle loses nothing.
is_training = threading.Event()
# In place of raising, where the run can go on without the engine for a while; see comeback.py.
note_engine_death: Callable[[], object] | None = None
MOST_OPEN_FILES = 2**16  # the limit that SGLang sets


def run_main(main: Callable[[], None]) -> None:
    """Call main and end the process with an exit code that says how main ended.

        0        done, or stopped after a checkpoint
        1        failed
        2        bad input
        128 + n  ended by signal n: 130 by Ctrl-C; 143 by SIGTERM and 129 by SIGHUP before the
                 first step

    From the first step on, SIGTERM and SIGHUP let the step finish and a checkpoint be written. A
    second signal changes nothing. torchrun kills what is left after 30 s, or after its
    --shutdown-timeout.

    main's own `with` statement ends the engine's processes. If this process is killed they end by
    themselves.
    """
    for stream in (sys.stdout, sys.stderr):
        # A response may hold characters that the console's encoding lacks. Printing it must not
        # end the run.
        stream.reconfigure(errors="backslashreplace")
    _raise_open_file_limit()
    signal.signal(signal.SIGQUIT, _engine_child_died)
    signal.signal(signal.SIGTERM, _stop)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # under nohup it stays ignored
        signal.signal(signal.SIGHUP, _stop)
    if dist.is_torchelastic_launched():
        # If torchrun is killed, nobody else ends this rank. Without torchrun the parent is a shell,
        # which a run may outlive (nohup).
        signal_when_parent_ends(signal.SIGTERM)
    try:
        _call(main)
    except KeyboardInterrupt as error:
        number = signal.Signals(*error.args or [signal.SIGINT])
        who = f"rank {os.environ.get('RANK', '0')}"
        _print_error(f"interrupted by {number.name}: {who} has ended its engine")
        sys.exit(128 + number)
    finally:
        for child in multiprocessing.active_children():
            child.kill()  # multiprocessing would send SIGTERM, and wait for those that ignore it


def _raise_open_file_limit() -> None:
    """Raise this process's limit of open files to MOST_OPEN_FILES, as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _call(main: Callable[[], None]) -> None:
    """Call main. Print the errors that need no traceback and exit; raise the others."""
    try:
        main()
        if dist.is_initialized():  # not after --plan
            dist.destroy_process_group()
    except BadInput as error:
        # Usually all ranks find the same mistake. Rank 0 prints it at once and ends. torchrun then
        # ends the other ranks while they wait here.
        if os.environ.get("RANK", "0") == "0" or not _stopped_within(RANK_0_SPEAKS_WITHIN_S):
            _print_error(f"error: {error}")
            forgo_restarts()
        sys.exit(2)
    except (EngineDied, ExportError) as error:
        _print_error("\n".join([f"error: {error}", *getattr(error, "__notes__", [])]))
        sys.exit(1)
    except RuntimeError as error:
        if not (explained := process_groups.explain(error)):
            raise
        _print_error(f"error: {explained}")
        # The cause is another rank, which is gone. torchrun must see that one first, so this rank
        # waits until torchrun ends it.
        if "by peer" in str(error) and _stopped_within(2 if told_to_stop else 20):
            sys.exit(1)
        raise


def _print_error(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _stopped_within(seconds: float) -> bool:
    """Wait for SIGTERM, which torchrun sends to all other ranks when one has failed.

    Return whether it came within so many seconds.
    """
    is_training.set()  # so that the handler only notes the signal
    before, end = len(told_to_stop), time.monotonic() + seconds
    while len(told_to_stop) == before and time.monotonic() < end:
        time.sleep(0.05)
    return len(told_to_stop) > before


def _stop(signum, frame) -> None:
    """Note a signal that asks this rank to stop. Before the first step, interrupt main at once.

    Only the first signal interrupts: a second one would disturb the engine's shutdown.
    """
    told_to_stop.append(signum)
    if not is_training.is_set() and len(told_to_stop) == 1:
        raise KeyboardInterrupt(signum)


def _engine_child_died(signum, frame) -> None:
    """Raise EngineDied, or note it: SGLang sends SIGQUIT when a child has failed or hangs.

    Python drops an exception that is raised here while the main thread is in a finalizer.
    Engine.call notices the death too.
    """
    if note_engine_death is None:
        raise engine_died()
    note_engine_death()
