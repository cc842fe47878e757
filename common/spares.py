"""Processes that are forked early and given their work late.

    fork_spares(n)          while this process has one thread
    of_spare(target, args)  later, in place of multiprocessing.Process

A spawned process imports everything again: seconds, and 400 MB for SGLang. A spare shares the
memory of what its parent had imported. It cannot be forked when it is needed: a process with
threads may hold locks that its copy would wait for, for ever.
"""

import gc
import multiprocessing
import os
import signal
from multiprocessing.connection import Connection

from common.processes import end_signals_blocked, ignore_end_signals, kill_at_exit

# Each with the pipe that brings its work.
spares: list[tuple[multiprocessing.Process, Connection]] = []


def fork_spares(n: int) -> None:
    """Fork n copies of this process that wait for work; none if it has more than one thread.

    It has more with an OMP_NUM_THREADS above 1. Those that wait end with this process.
    """
    if len(os.listdir("/proc/self/task")) > 1:
        return
    # What is frozen the garbage collector does not visit. Else it would write to pages of memory
    # that parent and copy share, and each would get its own.
    gc.collect()
    gc.freeze()
    fork = multiprocessing.get_context("fork")
    for _ in range(n):
        ours, theirs = fork.Pipe()
        process = fork.Process(target=_wait_for_work, args=(theirs, ours), name="spare")
        with end_signals_blocked():
            process.start()
        theirs.close()
        kill_at_exit(process)
        spares.append((process, ours))


def of_spare(target, args: tuple = ()) -> multiprocessing.Process:
    """Return a process whose start() calls target(*args): a spare if one is left, else a new one.

    Either finds this process's environment of then. Arguments are pickled as for a spawned process.
    """
    while spares:
        process, pipe = spares.pop(0)
        if process.is_alive():
            break
    else:
        return multiprocessing.get_context("spawn").Process(target=target, args=args)

    def start():
        del process.start  # it holds args: whoever reads a pipe among them waits for its end
        with pipe:
            pipe.send((dict(os.environ), target, args))

    process.start = start
    return process


def _wait_for_work(pipe: Connection, parents_end: Connection) -> None:
    """Do what the parent sends; end if the parent ends before."""
    ignore_end_signals()
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)  # else the parent's handler
    parents_end.close()
    try:
        with pipe:
            environment, target, args = pipe.recv()
    except EOFError:
        return
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    # No more than what differs: setproctitle needs the rest where it is.
    os.environ.update(environment.items() - os.environ.items())
    target(*args)
