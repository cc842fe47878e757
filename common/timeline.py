"""Records what each part of a rank does when; harness/record.py writes trace.json from the spans.

A span is (what, from, to), with times in seconds since the epoch.
"""

import threading
import time

SHORT_WAIT_S = 1e-4


class Stopwatch:
    """The stages of a step, one after the other, as seconds and as spans."""

    def __init__(self):
        self.started = self.last = time.time()
        self.spans: list[tuple[str, float, float]] = []

    def lap(self, stage: str) -> float:
        """Record that this stage has taken the time since the last call. Return the seconds."""
        previous, self.last = self.last, time.time()
        self.spans.append((stage, previous, self.last))
        return self.last - previous


class Timeline:
    """The activities of a part of this rank, as spans. Any thread may report a change."""

    def __init__(self):
        self._lock = threading.Lock()
        self._spans: list[tuple[str, float, float]] = []
        self._activity, self._since = "wait", time.time()

    def switch_to(self, activity: str) -> None:
        """Record that this activity begins now."""
        if activity != self._activity:
            with self._lock:
                self._close()
                self._activity = activity

    def pop_spans(self) -> list[tuple[str, float, float]]:
        """Return the spans since the last call, up to now, and forget them."""
        with self._lock:
            self._close()
            spans, self._spans = self._spans, []
        return spans

    def _close(self) -> None:
        now = time.time()
        # Hundreds of answers, each judged in microseconds, become one span.
        short_wait = self._activity == "wait" and now - self._since < SHORT_WAIT_S
        if self._spans and (short_wait or self._spans[-1][0] == self._activity):
            activity, start, _ = self._spans.pop()
            self._spans.append((activity, start, now))
        else:
            self._spans.append((self._activity, self._since, now))
        self._since = now


def renamed(
    spans: list[tuple[str, float, float]], start: float, end: float
) -> list[tuple[str, float, float]]:
    """Return the spans, with rollout and reward from start to end called "evaluation".

    A span that crosses start or end is cut there.
    """
    parts = []
    for activity, begin, stop in spans:
        cuts = [begin, *(cut for cut in (start, end) if begin < cut < stop), stop]
        for left, right in zip(cuts, cuts[1:]):
            inside = start <= left and right <= end and activity in ("rollout", "reward")
            parts.append(("evaluation" if inside else activity, left, right))
    return parts
