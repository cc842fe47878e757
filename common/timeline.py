"""What each part of a rank does when: the spans of which record.py makes trace.json."""

import threading
import time


class Stopwatch:
    """Seconds between calls of lap(), which are also kept as spans of the timeline: (stage, from,
    to), in seconds since the epoch.
    """

    def __init__(self):
        self.started = self.last = time.time()
        self.spans: list[tuple[str, float, float]] = []

    def lap(self, stage: str) -> float:
        previous, self.last = self.last, time.time()
        self.spans.append((stage, previous, self.last))
        return self.last - previous


class Timeline:
    """What a part of this rank does when, as spans of the timeline; any thread may mark a change."""

    def __init__(self):
        self._lock, self._spans, self._activity, self._since = (
            threading.Lock(),
            [],
            "wait",
            time.time(),
        )

    def switch_to(self, activity: str) -> None:
        """From now on it does this."""
        if activity != self._activity:
            with self._lock:
                self._close()
                self._activity = activity

    def pop_spans(self) -> list[tuple[str, float, float]]:
        """(activity, from, to), in seconds since the epoch, since the last call and up to now."""
        with self._lock:
            self._close()
            spans, self._spans = self._spans, []
        return spans

    def _close(self) -> None:
        now = time.time()
        short_wait = (
            self._activity == "wait" and now - self._since < 1e-4
        )  # hundreds of answers, judged in microseconds each, are one span
        if self._spans and (short_wait or self._spans[-1][0] == self._activity):
            activity, start, _ = self._spans.pop()
            self._spans.append((activity, start, now))
        else:
            self._spans.append((self._activity, self._since, now))
        self._since = now


def renamed(
    spans: list[tuple[str, float, float]], start: float, end: float
) -> list[tuple[str, float, float]]:
    """Call "evaluation" what is generated and judged from start to end; cut spans that cross."""
    parts = []
    for activity, begin, stop in spans:
        cuts = [begin, *(cut for cut in (start, end) if begin < cut < stop), stop]
        for left, right in zip(cuts, cuts[1:]):
            inside = start <= left and right <= end and activity in ("rollout", "reward")
            parts.append(("evaluation" if inside else activity, left, right))
    return parts
