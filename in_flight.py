"""Groups in flight: generation in the background, for the asynchronous loop.

Each rollout rank keeps a queue of groups, oldest first, that its engine answers and its judge
scores while the trainers train. Once a step it refills the queue, waits until a step's worth is
finished, and hands that over:

    version v arrives -> start new groups ... -> b finished groups -> hand over -> (trainers train
    version v + 1) -> version v + 1 arrives -> ...

With b groups a step and K = --max-staleness, the queue holds (K + 1) b groups. That number is all
there is to the bound: the b groups at its head were started when version v - K arrived, so no token
of theirs is older, and they are due now. A step waits for its due groups, however long one of them
takes, and never trains newer ones instead; so nothing starves, nothing is too old, and with K = 0
the steps are those of the synchronous loop. A long answer has K steps of time before anything waits
for it, and is continued over them on ever newer weights: long tails want a larger K.

--oversample S lets a step go on without up to S of its due groups: newer finished ones take their
place. Those left behind are carried over while the bound allows; then they are stopped, and counted
as dropped. With K = 0 nothing newer is in flight, so S groups more are started than a step needs.

--dynamic-sampling N: a group whose rewards are all equal leaves the queue, and a new one is started
at its end. The others only move forward, so the bound holds.

The queue belongs to the engine's event loop: everything `async` below runs there, so there are no
locks.
"""

import asyncio
import json
from dataclasses import dataclass, field

import torch.distributed as dist

from backends.sglang.engine import Engine
from common.settings import InFlightSettings, RewardSettings, RolloutSettings
from data.prompts import Data
from data.sample import Sample
from reward import Judge, is_uninformative
from rollout import (
    DROPPED,
    REPLACED,
    Prompts,
    check_aborts,
    new_group,
    write_outputs,
    marks,
    sampling_params,
    step_share,
    prompts_taken_before,
)


@dataclass(eq=False)
class Group:
    """The samples of one prompt, on their way."""

    prompt: Sample
    samples: list[Sample]
    version: int
    """Of the weights when it was started: no token of it is older."""
    stopped: bool = False
    task: asyncio.Future = field(init=False)

    def request_ids(self) -> list[str]:
        return [f"group-{sample.group}-{sample.index}" for sample in self.samples]


class GroupQueue:
    """A rollout rank's queue; on ranks without an engine it is empty and does nothing."""

    def __init__(
        self, engine: Engine | None, data: Data, rollout: RolloutSettings, settings: InFlightSettings, rewards: RewardSettings, judge: Judge, *,
        steps: int, ranks: list[dict] | None = None,
    ):  # fmt: skip
        """ranks: the states of all ranks of a checkpoint that the run goes on from."""
        (
            self.engine,
            self.data,
            self.rollout,
            self.settings,
            self.rewards,
            self.judge,
            self.steps,
        ) = (
            engine,
            data,
            rollout,
            settings,
            rewards,
            judge,
            steps,
        )
        engines = settings.rollout_ranks // rollout.engine_tp
        self.per_step, self.oversample = step_share(rollout), settings.oversample // engines
        self.prompts = Prompts(
            data, rollout, taken=prompts_taken_before(ranks, rollout) if engine else 0
        )
        self.queue: list[Group] = []
        self.replacements = 0  # how many more groups of this step may be replaced
        self.replaced: list[Sample] = []
        self.before: list[dict] = []
        if ranks and engine:
            mine = ranks[dist.get_rank() - dist.get_world_size()]  # the rollout ranks are the last
            self.before, self.replaced = (
                mine["in_flight"],
                [Sample(**mark) for mark in mine["replaced"]],
            )

    def take_step(self, version: int) -> list[Sample]:
        """This rank's samples for the step that trains weights `version`, and those that are
        dropped now, without responses; blocks until they are there.

        Raises what went wrong in the background: EngineDied for a request that the engine gave up
        on.
        """
        return self.engine.call(self._take_step(version)) if self.engine else []

    def drain(self) -> None:
        """With --updates drain: block until no request is running."""
        if self.engine and self.settings.updates == "drain":
            self.engine.call(self.engine.drain())

    def state(self) -> dict:
        """What a checkpoint must hold of this rank: the prompts taken, and the groups in flight,
        with their answers where they are finished.
        """
        return self.engine.call(self._state()) if self.engine else {}

    async def _state(self) -> dict:
        groups = []
        for group in self.queue:
            finished = group.task.done() and not group.task.exception()
            answers = [json.loads(sample.to_json()) for sample in group.samples] if finished else []
            groups.append(
                {
                    "prompt": json.loads(group.prompt.to_json()),
                    "version": group.version,
                    "answers": answers,
                }
            )
        return {
            "prompts": self.prompts.taken,
            "in_flight": groups,
            "replaced": [json.loads(sample.to_json()) for sample in self.replaced],
        }

    async def _take_step(self, version: int) -> list[Sample]:
        for group in self.before:
            self._start(Sample(**group["prompt"]), version, group)
        self.before = []
        steps_ahead = min(self.settings.max_staleness + 1, self.steps - version)
        while len(self.queue) < max(steps_ahead * self.per_step, self.per_step + self.oversample):
            self._start(*self.prompts.take(1), version)
        self.replacements = self.rewards.dynamic_sampling * self.per_step

        while not self._ready():
            await asyncio.wait(
                [group.task for group in self.queue if not group.task.done()],
                return_when=asyncio.FIRST_COMPLETED,
            )
        taken = [group for group in self.queue if group.task.done()][: self.per_step]
        left = [group for group in self.queue if group not in taken]

        last = version + 1 == self.steps
        dropped = [
            group
            for group in left
            if last or version + 1 - group.version > self.settings.max_staleness
        ]
        for group in dropped:
            group.stopped = True
            await self.engine.abort(group.request_ids())
        self.queue = [group for group in left if group not in dropped]
        replaced, self.replaced = self.replaced, []
        return (
            [sample for group in taken for sample in group.samples]
            + replaced
            + [mark for group in dropped for mark in marks(group.samples, DROPPED)]
        )

    def _start(self, prompt: Sample, version: int, before: dict | None = None) -> None:
        """Put a group at the queue's end. before: what a checkpoint held of it; if it was finished
        it still is, and as old as it was.
        """
        group = Group(prompt, new_group(prompt, self.rollout.samples_per_prompt), version)
        if before and before["answers"]:
            group.samples, group.version = (
                [Sample(**answer) for answer in before["answers"]],
                before["version"],
            )
            group.task = asyncio.get_running_loop().create_future()
            group.task.set_result(None)
        else:
            group.task = asyncio.ensure_future(self._answer(group))
        self.queue.append(group)

    def _ready(self) -> bool:
        """A step's worth is finished, and of the due groups no more are missing than may be left
        behind. Raises what a group raised in the background.
        """
        for group in self.queue:
            if group.task.done():
                group.task.result()
        unfinished_due = sum(not group.task.done() for group in self.queue[: self.per_step])
        return (
            sum(group.task.done() for group in self.queue) >= self.per_step
            and unfinished_due <= self.oversample
        )

    async def _answer(self, group: Group) -> None:
        """Generate and judge; a group that teaches nothing is replaced.

        The judge has a thread of its own and holds nothing up.
        """
        prompts_ids = [sample.prompt_ids for sample in group.samples]
        outputs = await self.engine.generate(
            prompts_ids,
            sampling_params(self.data, self.rollout, group.samples),
            request_ids=group.request_ids(),
        )
        if group.stopped:
            return
        write_outputs(group.samples, outputs, self.data)
        check_aborts(group.samples)
        await asyncio.wrap_future(self.judge.submit(group.samples))
        if self.replacements and not group.stopped and is_uninformative(group.samples):
            self.replacements -= 1
            self.replaced += marks(group.samples, REPLACED)
            self.queue.remove(group)
            self._start(*self.prompts.take(1), self.engine.version)


def check_staleness(samples: list[Sample], *, version: int, max_staleness: int) -> None:
    """Raise RuntimeError should a token be older than the bound: the invariant of this loop."""
    for sample in samples:
        versions = sorted(set(sample.weight_versions))
        if versions and not version - max_staleness <= versions[0] <= versions[-1] <= version:
            raise RuntimeError(
                f"sample {sample.index} of group {sample.group} has tokens of the weight versions"
                f" {versions}; training version {version} with --max-staleness {max_staleness} may"
                f" see none older than {version - max_staleness}"
            )
