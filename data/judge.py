"""The judge: calls a reward function on many samples at once, within limits of number and time."""

import asyncio
import math
import threading
import traceback
from collections.abc import Awaitable, Callable
from concurrent.futures import Future

from common.timeline import Timeline
from data.sample import Sample, by_answer, by_group

# Of one sample; or of all samples of a group, in a list, where it has a true attribute of_group.
Reward = Callable[..., float | list[float] | Awaitable[float] | Awaitable[list[float]]]


class Judge:
    """Calls a reward function on all samples of a batch at once, `judges` of them at a time.

    Its event loop runs in a thread of its own. A coroutine function runs on that loop; it is the
    right form for a reward that waits for a service. A plain function gets a thread for each
    answer. If it hangs, the thread is left behind: neither later answers nor the end of the process
    wait for it.
    """

    def __init__(self, reward: Reward, judges: int = 32, timeout_s: float = 120.0):
        self.reward, self.timeout_s, self.timeline = reward, timeout_s, Timeline()
        self._busy, self._failed = 0, False
        self._of_group = getattr(reward, "of_group", False)
        # What waits for a place is not yet on the clock of --judge-timeout-s.
        self._places = asyncio.Semaphore(min(judges, getattr(reward, "at_a_time", judges)))
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="judge-loop", daemon=True).start()

    def submit(self, samples: list[Sample]) -> Future:
        """Start to judge: set every sample's reward. The future is done when all have one.

        Where the reward function fails, the reward stays None, sample.error says why, and the
        tokens are masked.
        """
        return asyncio.run_coroutine_threadsafe(self._judge_all(samples), self._loop)

    async def _judge_all(self, samples: list[Sample]) -> None:
        whole = [sample for sample in samples if not sample.is_part]
        units = by_group(whole) if self._of_group else [[sample] for sample in whole]
        await asyncio.gather(*map(self._judge, units))
        for *parts, judged in by_answer(samples):
            for part in parts:  # of one answer, which is judged by its end
                part.reward, part.error = judged.reward, judged.error
                if judged.reward is None:
                    part.loss_mask = [0] * len(part.response_ids)

    async def _judge(self, samples: list[Sample]) -> None:
        """Judge one sample, or one group with a reward function of groups."""
        async with self._places:
            self._count(1)
            call = asyncio.ensure_future(self._call(samples if self._of_group else samples[0]))
            try:
                done, _ = await asyncio.wait([call], timeout=self.timeout_s)
                if not done:
                    limit = f"--judge-timeout-s {self.timeout_s:g}"
                    raise TimeoutError(f"the reward function has not returned within {limit}")
                result = done.pop().result()
                rewards = list(result) if self._of_group else [result]
                if len(rewards) != len(samples):
                    what = f"the reward function returned {len(rewards)} rewards"
                    raise ValueError(f"{what} for a group of {len(samples)} samples")
            except Exception as error:  # a user's function may raise anything
                for sample in samples:
                    self._note_failure(sample, error)
                return
            finally:
                call.cancel()  # a coroutine that takes too long would go on; a thread does
                self._count(-1)
        for sample, reward in zip(samples, rewards):
            try:
                sample.reward = float(reward)
                if not math.isfinite(sample.reward):
                    raise ValueError(f"the reward function returned {sample.reward}")
            except (TypeError, ValueError, OverflowError) as error:
                self._note_failure(sample, error)

    def _note_failure(self, sample: Sample, error: Exception) -> None:
        """Set the sample aside. Print the traceback of the first failure on this rank."""
        sample.reward, sample.loss_mask = None, [0] * len(sample.response_ids)
        sample.error = _shortened(repr(error))
        if not self._failed:
            trace = "\n".join(map(_shortened, traceback.format_exc().splitlines()))
            shown = _shortened(repr(sample.response), most=80)
            print(f"reward error, the first on this rank, on {shown}:\n{trace}", flush=True)
        self._failed = True

    async def _call(self, given: Sample | list[Sample]):
        if asyncio.iscoroutinefunction(self.reward):
            return await self.reward(given)
        result = Future()
        result.set_running_or_notify_cancel()

        def run() -> None:
            try:
                result.set_result(self.reward(given))
            except Exception as error:  # it is the caller's, in another thread
                result.set_exception(error)

        threading.Thread(target=run, name="judge", daemon=True).start()
        return await asyncio.wrap_future(result)

    def _count(self, change: int) -> None:
        self._busy += change
        self.timeline.switch_to("reward" if self._busy else "wait")


def _shortened(text: str, *, most: int = 1000) -> str:
    """Return a text without its end where it is long: an answer can have 100,000 characters."""
    return text if len(text) <= most else f"{text[:most]} ... [{len(text)} characters]"


def compute_rewards(samples: list[Sample], judge: Judge) -> None:
    """Judge all samples and wait for the last. Where the reward function fails, reward is None."""
    judge.submit(samples).result()
