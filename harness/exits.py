"""How a run ends: signals, exit codes, and what is printed."""

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
from common.processes import signal_when_parent_ends

# The signals that asked this rank to stop. No Event: a second signal, while the handler of the
# first holds its lock, would wait for that lock for ever.
told_to_stop: list[int] = []
# Set when the first step begins. Until then nothing is lost by an end in the middle.
is_training = threading.Event()
MOST_OPEN_FILES = 2**16  # as SGLang sets it


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
        stream.reconfigure(
            errors="backslashreplace"
            # An answer may hold what the console's encoding has not; to print it must not end the run
        )
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
        # All ranks usually see the same mistake. Rank 0 says it at once; torchrun then ends the
        # others while they wait.
        if os.environ.get("RANK", "0") == "0" or not _told_within(RANK_0_SPEAKS_WITHIN_S):
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except (EngineDied, ExportError) as error:
        print(
            "\n".join([f"error: {error}", *getattr(error, "__notes__", [])]),
            file=sys.stderr,
            flush=True,
        )
        sys.exit(1)
    except RuntimeError as error:
        if not (explained := process_groups.explain(error)):
            raise
        print(f"error: {explained}", file=sys.stderr, flush=True)
        # A rank that is gone is the cause, and torchrun must see it first: it then ends this rank
        # while it waits.
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


def _engine_child_died(signum, frame) -> None:
    """Raise what SIGQUIT of SGLang tells: a child has failed, or its watchdog found it dead.

    Where the main thread is in a finalizer, Python drops what is raised here. Engine.call notices
    the death too.
    """
    raise engine_died()
