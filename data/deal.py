"""Which engine answers which prompt: dealt in advance, or taken by the engine that has room.

    --deal fixed   engines take turns: prompt p belongs to engine p mod engines
    --deal room    an engine takes the next prompt of all when it has room for one

Fixed dealing repeats exactly. With room a slow engine answers fewer prompts, and no engine waits
for it as long. What a step trains is the same either way: with B prompts a step, step s trains the
prompts (s - 1) B to s B - 1 of the stream.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import islice

from common import process_groups
from common.settings import RolloutSettings
from data.sample import Sample

NEXT_PROMPT = "next prompt"  # key of the counter that all engines share
LOOK_EVERY_S = 0.01  # so often an engine looks whether others have taken the last prompts of a step


def shared_prompts(run, settings: RolloutSettings) -> "SharedPrompts | None":
    """Return the prompts that engines share with --deal room; None otherwise, or with no engine.

    run: harness.start.Run.
    """
    if run.engine_index is None or settings.deal == "fixed":
        return None
    return SharedPrompts(run)


class SharedPrompts:
    """The prompts of all engines, each taken by one of them.

    Prompt p, a Sample with group p, is trained in step p // B + 1. In a resumed run the prompts
    that no engine held at the checkpoint come first.
    """

    def __init__(self, run):
        """run: harness.start.Run, of a rank with an engine."""
        settings, states = run.settings, run.resumed_from.ranks if run.resumed_from else []
        self._store = process_groups.join_store()[0]
        self.per_step = settings.rollout.prompts_per_step
        steps = 1 + (settings.in_flight.max_staleness if run.is_async else 0)
        self.most = -(-self.per_step * steps // (2 * run.engines))
        first = (run.first_step - 1) * self.per_step
        held = {group["prompt"]["group"] for rank in states for group in rank.get("in_flight", ())}
        self._end = max([first, *(p + 1 for p in held)])  # the first prompt behind all of these
        self._open = sorted(set(range(first, self._end)) - held)
        self._stream, self._passed = run.data.stream, 0
        self._drawn: int | None = None  # a prompt that this engine holds, and may not start yet

    def take(self, unfinished: int, limit: int) -> Sample | None:
        """Return the next prompt below limit, if this engine has room for it; else None.

        An engine has room while fewer than `most` of its groups are unfinished: half of its even
        share of what may be in flight. With all of it a slow engine would take as many as a fast
        one. unfinished: how many of this engine's groups are.
        """
        if unfinished >= self.most:
            return None
        if self._drawn is None:
            self._drawn = self._number(self._store.add(NEXT_PROMPT, 1) - 1)
        if self._drawn >= limit:
            return None
        (prompt,) = islice(self._stream, self._drawn - self._passed, self._drawn - self._passed + 1)
        self._drawn, self._passed = None, prompt.group + 1
        return prompt

    def all_started(self, limit: int) -> bool:
        """Tell whether all prompts below limit are taken, those of this engine also started."""
        is_mine = self._drawn is None or self._drawn >= limit
        return is_mine and self._number(self._store.add(NEXT_PROMPT, 0)) >= limit

    def _number(self, draw: int) -> int:
        """Return the number of the prompt that a draw gets; draws are counted from 0."""
        if draw < len(self._open):
            return self._open[draw]
        return self._end + draw - len(self._open)


@dataclass(frozen=True)
class SharedStep:
    """The prompts of a step of the synchronous loop, before an engine has taken any."""

    shared: SharedPrompts
    end: int
    """The first prompt of the next step."""

    async def answer(self, ask: Callable[[list[Sample]], Awaitable[list[Sample]]]) -> list[Sample]:
        """Return the answered samples of the prompts that this engine takes, in prompts' order.

        ask: answers prompts. It is called with one, as long as this engine has room.
        """
        tasks: dict[int, asyncio.Future] = {}  # by the number of the prompt
        try:
            while True:
                under_way = [task for task in tasks.values() if not task.done()]
                while prompt := self.shared.take(len(under_way), self.end):
                    tasks[prompt.group] = asyncio.ensure_future(ask([prompt]))
                    under_way.append(tasks[prompt.group])
                if not under_way:
                    groups = await asyncio.gather(*(tasks[number] for number in sorted(tasks)))
                    return [sample for group in groups for sample in group]
                done, _ = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
                await asyncio.gather(*done)  # raises what one raised
        finally:
            for task in tasks.values():
                task.cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)
