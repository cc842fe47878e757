"""Judges mathematical answers in worker processes, within a limit of CPU time.

math_rules/ decides which answers are right. SymPy may compute forever on a model's text, and a
thread cannot be stopped, so processes judge. The limit counts the CPU time of one process. Waiting
for a worker, and other load on the machine, therefore change no verdict.

Two mechanisms stop an answer at the limit. A timer raises TooHard in the worker's Python code, and
the worker continues with the next answer. If a long call into C delays the timer, the kernel ends
the process (RLIMIT_CPU), and a new process takes its place.
"""

import multiprocessing
import os
import queue
import re
import resource
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

import psutil

from common.processes import (
    end_signals_blocked,
    ignore_end_signals,
    kill_at_exit,
    main_module_hidden,
)
from data import math_rules

LIMIT_S = 5.0  # CPU seconds for one answer
STUCK_S = 30.0  # a worker that uses no CPU time for this long is replaced
MOST_BYTES = 4 * 2**30  # address space of a worker
# The machine's ranks share a quarter of the processors that this process may use.
WORKERS = max(1, len(os.sched_getaffinity(0)) // 4 // int(os.environ.get("LOCAL_WORLD_SIZE") or 1))


class TooHard(BaseException):
    """An answer exceeded the limit. Not an Exception, because math-verify catches all of those."""


class WorkerLost(Exception):
    """A worker ended, or stopped working, before it had answered."""


def judged_in_worker(response: str, label: str) -> tuple[bool, str, bool]:
    """Return (is right, the answer, is too hard) of a response.

    The first two are those of math_rules.judged; an answer that is too hard is wrong. Any thread
    may call this. Raises ValueError for a label that is not mathematics, and WorkerLost if two
    workers in a row were killed from outside.
    """
    try:
        return *call_in_worker(math_rules.judged, response, label), False
    except TooHard:
        pass
    try:
        answer = call_in_worker(math_rules.answer_of, response)
    except TooHard:
        answer = ""
    return False, answer[: math_rules.MOST_CHARACTERS], True


def label_text(label: Any) -> str:
    """Return a label as text, without surrounding blanks.

    Raises ValueError, with the reason, for a label that no answer can equal.
    """
    if label is None or label != label:
        raise ValueError("is null" if label is None else "is NaN")
    if isinstance(label, bool) or not isinstance(label, str | int | float):
        raise ValueError(f"is a {type(label).__name__}, neither text nor a number")
    if not str(label).strip():
        raise ValueError("is blank")
    return str(label).strip()


def label_problems(labels: list, *, reward: str) -> list[str]:
    """Return for each label why --reward `reward` cannot judge by it; "" if it can.

    Numbers are recognized by their form. The workers parse the other labels, each one once.
    """
    found = [_problem(label, reward) for label in labels]
    unsure = {str(label).strip(): "" for label, problem in zip(labels, found) if problem is None}
    with ThreadPoolExecutor(WORKERS) as threads:
        parsed = dict(zip(unsure, threads.map(_parse_problem, unsure)))
    return [
        parsed[str(label).strip()] if problem is None else problem
        for label, problem in zip(labels, found)
    ]


def _problem(label: Any, reward: str) -> str | None:
    """Return what is wrong with a label, "" if nothing is; None if only a parser can tell."""
    try:
        text = label_text(label)
    except ValueError as error:
        return f"{error}, and --reward {reward} needs text or a number"
    if "####" in text:
        return 'holds ####: add --label-after "####"'
    if reward == "exact" or re.fullmatch(r"[-+]?\d{1,300}(\.\d{1,300})?", text):
        return ""
    is_number = len(text) < 300 and math_rules.number_of(math_rules.normalized(text)) is not None
    return "" if is_number else None


def _parse_problem(label: str) -> str:
    """Return why math-verify cannot judge by a label; "" if it can."""
    try:
        if call_in_worker(math_rules.is_judgeable, label):
            return ""
    except TooHard:
        return f"takes longer than {LIMIT_S:g} s to parse"
    except (ValueError, RuntimeError) as error:  # what the parser raised
        return f"cannot be parsed ({error})"
    return "is not a number, an expression or a short text; the mathematical reward needs one"


def call_in_worker(function: Callable, *arguments):
    """Return function(*arguments), computed in a worker. Raises what the function raises.

    Raises TooHard after LIMIT_S CPU seconds. If the worker was killed from outside, a new worker
    gets the call once more; then WorkerLost is raised.
    """
    worker = _free.get()
    try:
        for attempt in range(2):
            try:
                worker = worker or _Worker()
                return worker.call(function, arguments)
            except (WorkerLost, TooHard) as error:
                if worker is not None and worker.is_lost:
                    worker = None
                if attempt or isinstance(error, TooHard):
                    raise
    finally:
        _free.put(worker)


_free = queue.SimpleQueue()  # idle workers; None: a worker that is not started yet
for _ in range(WORKERS):
    _free.put(None)
_starting = threading.Lock()


class _Worker:
    """A handle to a process that computes one call at a time."""

    def __init__(self):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs,), daemon=True, name="math judge")
        self.is_lost = False
        with _starting, main_module_hidden(), end_signals_blocked():
            self.process.start()
        kill_at_exit(self.process)
        theirs.close()
        self._receive()

    def call(self, function: Callable, arguments: tuple):
        """Return function(*arguments). Raises TooHard, WorkerLost, or what the function raises."""
        try:
            self._pipe.send((LIMIT_S, function, arguments))
        except OSError as error:
            raise self._lost("has ended") from error
        result, error = self._receive()
        if error is not None:
            raise error
        return result

    def _receive(self):
        """Wait for the worker's next message and return it. Raises TooHard or WorkerLost."""
        used = self._cpu_s()
        try:
            while not self._pipe.poll(STUCK_S):
                used, before = self._cpu_s(), used
                if used == before:
                    raise self._lost(f"used no CPU time for {STUCK_S:g} s")
            return self._pipe.recv()
        except (EOFError, OSError) as error:
            self.process.join(STUCK_S)
            if self.process.exitcode == -signal.SIGXCPU:
                self.is_lost = True
                raise TooHard from error
            raise self._lost("has ended") from error

    def _cpu_s(self) -> float:
        """Return the CPU seconds that the worker has used; 0 if it is gone."""
        try:
            return sum(psutil.Process(self.process.pid).cpu_times()[:2])
        except psutil.NoSuchProcess:
            return 0.0

    def _lost(self, why: str) -> WorkerLost:
        """Kill the worker and return the exception to raise."""
        self.is_lost = True
        self.process.kill()
        self._pipe.close()
        exit_code = self.process.exitcode
        return WorkerLost(f"a process that judges mathematics {why}, exit code {exit_code}")


def _work(pipe: Connection) -> None:
    """Compute the calls that come through the pipe, until the parent closes it or is gone.

    A computation that outlives the parent ends at its limit.
    """
    ignore_end_signals()
    signal.signal(signal.SIGPROF, _raise_too_hard)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # A very large number would otherwise take the memory of the machine's other processes.
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    import math_verify  # noqa: F401  now, so that its import counts against no answer

    try:
        pipe.send(None)
        while True:
            pipe.send(_limited(*pipe.recv()))
    except (EOFError, OSError):
        pass


def _limited(limit_s: float, function: Callable, arguments: tuple) -> tuple:
    """Return (function(*arguments), None), or (None, what it raised)."""
    used_s, (_, hard) = sum(os.times()[:2]), resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used_s + 2 * limit_s) + 2, hard))
    try:
        signal.setitimer(signal.ITIMER_PROF, limit_s)
        try:
            return function(*arguments), None
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    except (TooHard, MemoryError, RecursionError):
        return None, TooHard()
    except ValueError as error:
        return None, ValueError(str(error)[:1000])
    except Exception as error:  # not every exception can be pickled
        return None, RuntimeError(repr(error)[:1000])


def _raise_too_hard(signum, frame) -> None:
    raise TooHard
