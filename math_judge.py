"""Whether a response gives the right mathematical answer, judged in processes of their own.

math-verify limits its time with an alarm signal, which only the main thread of a process can receive, and SymPy can compute for ever on what a model writes.
So neither runs in the judge's threads: workers do, which import nothing else and end with the process that started them.
"""

import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from run import end_with_parent, main_module_hidden

TIMEOUT_S = 60
_lock, _pool = threading.Lock(), None


def judged(response: str, label: str) -> tuple[bool, str]:
    """Whether the last \\boxed{} of the response, or else its last number, equals the label in value; and its text, "" if there is none.

    Raises ValueError for a label that is no mathematics. Parsing and comparison are math-verify's, which evaluates nothing: it parses LaTeX to SymPy.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    gold = parse(f"\\boxed{{{label}}}")
    if not gold:
        raise ValueError(f"the label {label!r} is not a mathematical expression")
    _, boxed, tail = response.rpartition("\\boxed{")
    if boxed:
        answer = parse(boxed + tail, extraction_config=[LatexExtractionConfig(boxed_match_priority=0)])
    else:
        answer = parse(response, extraction_config=[ExprExtractionConfig(), LatexExtractionConfig()])
    return bool(answer) and bool(verify(gold, answer)), str(answer[-1]) if answer else ""


def judged_in_worker(response: str, label: str) -> tuple[bool, str]:
    """judged(), in a worker process; from any thread. Raises TimeoutError after TIMEOUT_S, and ends the workers: one of them would hang for ever."""
    global _pool
    for attempt in range(2):
        with _lock:
            _pool = _pool or ProcessPoolExecutor(max(1, os.cpu_count() // 4), multiprocessing.get_context("spawn"), _start_worker)
            pool = _pool
            with main_module_hidden():
                future = pool.submit(judged, response, label)
        try:
            return future.result(TIMEOUT_S)
        except (BrokenProcessPool, TimeoutError) as error:  # a worker was killed: memory ran out, or an engine ended, which ends all children of its process
            with _lock:
                if _pool is pool:
                    _pool = None
                    for worker in list((pool._processes or {}).values()):  # ProcessPoolExecutor.kill_workers comes with Python 3.14
                        worker.kill()
            if attempt or isinstance(error, TimeoutError):
                raise


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    end_with_parent()
