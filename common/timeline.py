"""What each part of a rank does when: the spans that harness/record.py writes to trace.json.

A span is (activity, from, to); times are in seconds since the epoch.
"""

import contextlib
import threading
import time
from collections.abc import Iterator

Span = tuple[str, float, float]
SHORTEST_WAIT_S = 1e-4


class Clock:
    """Times the stages of one step."""

    def __init__(self):
        self.started = time.time()
        self.spans: list[Span] = []

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what stands below `with clock.stage(name):`."""
        start = time.time()
        yield
        self.spans.append((name, start, time.time()))

    def seconds(self) -> dict[str, float]:
        """Return the metrics {"STAGE_s": seconds}, in the order of the stages."""
        return {f"{name}_s": end - start for name, start, end in self.spans}


class Timeline:
    """Records what an engine or a judge does; any thread may switch its activity."""

    def __init__(self):
        self._lock = threading.Lock()
        self._spans: list[Span] = []
        self._activity, self._since = "wait", time.time()

    def switch_to(self, activity: str) -> None:
        """Note that another activity begins now."""
        if activity != self._activity:
            with self._lock:
                self._close()
                self._activity = activity

    def pop_spans(self) -> list[Span]:
        """Return the spans since the last call, up to now."""
        with self._lock:
            self._close()
            spans, self._spans = self._spans, []
        return spans

    def _close(self) -> None:
        """End the current span. Spans of one activity become one."""
        now = time.time()
        # Hundreds of answers, judged in microseconds each, are one span.
        is_short_wait = self._activity == "wait" and now - self._since < SHORTEST_WAIT_S
        if self._spans and (is_short_wait or self._spans[-1][0] == self._activity):
            activity, start, _ = self._spans.pop()
            self._spans.append((activity, start, now))
        else:
            self._spans.append((self._activity, self._since, now))
        self._since = now


def mark_evaluation(spans: list[Span], start: float, end: float) -> list[Span]:
    """Return the spans, with "evaluation" for what is generated and judged from start to end.

    Spans that cross one of the two times are cut there.
    """
    parts = []
    for activity, begin, stop in spans:
        cuts = [begin, *(cut for cut in (start, end) if begin < cut < stop), stop]
        for left, right in zip(cuts, cuts[1:]):
            is_inside = start <= left and right <= end
            is_evaluation = is_inside and activity in ("rollout", "reward")
            parts.append(("evaluation" if is_evaluation else activity, left, right))
    return parts


def waiting_share(
    ranks: list[list[Span]], busy: tuple[str, ...], start: float, end: float
) -> float:
    """Return which share of a step the ranks spent on other activities than busy ones.

    ranks: the spans of each; 1.0 where there are none.
    """
    if not ranks:
        return 1.0
    busy_s = 0.0
    for spans in ranks:
        for activity, began, ended in spans:
            if activity in busy:
                busy_s += max(min(ended, end) - max(began, start), 0)
    return 1 - busy_s / len(ranks) / (end - start)
