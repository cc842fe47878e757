"""The asynchronous loop: the last ranks generate while the first ranks train.

    torchrun --nproc-per-node 2 loop_async.py                             one trainer, one engine
    torchrun --nproc-per-node 4 loop_async.py --tp 2 --rollout-ranks 2    two trainers, two engines
    torchrun --nproc-per-node 2 loop_async.py --max-staleness 0           nothing runs ahead

    trainers      | train v0 | sync | train v1 | sync | train v2 | sync |
    rollout ranks | groups of steps 2, 3, 4 ...  || paused in place while weights load || go on

A trained token is at most --max-staleness weight versions older than the weights it trains. Each
rollout rank keeps that bound by the length of its queue of groups, GroupQueue below. Samples reach
all ranks over one process group of all ranks. Beside it, trainers and rollout ranks each have a
default process group of their own, because Megatron builds its groups from the default one.
"""

import asyncio
import json
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from common.errors import EngineDied
from common.settings import (
    InFlightSettings,
    PlanSettings,
    RolloutSettings,
    RunSettings,
    SyncSettings,
    TrainSettings,
)
from harness import checks, flags
from losses import LossSettings
from reward import RewardSettings


@dataclass(frozen=True)
class Settings:
    run: RunSettings = RunSettings()
    rollout: RolloutSettings = RolloutSettings()
    in_flight: InFlightSettings = InFlightSettings()
    reward: RewardSettings = RewardSettings()
    train: TrainSettings = TrainSettings()
    loss: LossSettings = LossSettings()
    sync: SyncSettings = SyncSettings()
    plan: PlanSettings = PlanSettings()


# A wrong flag is refused here: the imports below take half a minute.
if __name__ == "__main__":
    settings = flags.parse_or_exit(Settings, checks.check_flags)

import torch.distributed as dist

import reward
import rollout
import train_step
import weight_sync
from data import deal
from data.sample import Sample
from harness import checkpoint, comeback, evaluate, export, start
from harness.exits import run_main


def main(settings: Settings) -> None:
    # Checks flags, files and machine, and says all mistakes at once before anything is started.
    # Then joins the process groups and opens the run folder. --plan prints a plan and ends here.
    train(start.prepare(settings, loop="async"))


def train(run: start.Run, answer: rollout.Answer = rollout.answer) -> None:
    """Train as run.settings say. answer: how the engine answers samples; see rollout.answer."""
    settings, record = run.settings, run.record
    trainer = train_step.start_trainer(run)  # None on rollout ranks
    checkpoint.restore(run.resumed_from, trainer)
    weights = weight_sync.open_path(run, trainer)  # rank 0 broadcasts to all ranks
    engine = rollout.start_engine(run, settings.rollout)  # a NoEngine on trainers
    engine = comeback.LastingEngine(engine, run, weights)  # is started again when it dies
    judge = reward.Judge(run.reward, settings.reward.judges, settings.reward.judge_timeout_s)

    with engine, record:
        # The engine's first weights come on the path of all later ones.
        weight_sync.send_weights(weights, engine, version=run.first_step - 1, verify=True)
        evaluation = evaluate.Evaluation(run, engine, judge, answer)
        if run.evaluates_first:
            evaluation.start(run.first_step - 1)
        if settings.run.eval_only:
            evaluation.finish()
            return record.finish_evaluation()

        queue = GroupQueue(run, engine, judge, answer)
        for step in range(run.first_step, settings.run.steps + 1):
            clock = record.start_step(step)

            with clock.stage("wait"):
                # Finished groups come out, new ones start and generate during all that follows.
                take = partial(queue.take_step, version=step - 1)
                samples = engine.all_gather(take)  # every rank has the whole batch
                samples = record.save_or_load(step, samples)  # --save-rollouts, --load-rollouts
                samples, discarded = rollout.split_discarded(samples)
                check_staleness(samples, step - 1, settings.in_flight.max_staleness)

            with clock.stage("train"):
                metrics = {}
                if run.trains:
                    batches = train_step.pack(trainer, samples)  # they refer to the samples
                    train_step.add_logprobs(trainer, batches, settings.loss)
                    longest = settings.rollout.max_response_tokens
                    reward.add_advantages(samples, settings.reward, settings.loss, longest)
                    metrics = train_step.update_policy(trainer, batches, settings.loss)

            with clock.stage("wait"):
                evaluation.finish()  # of the weights that are replaced now
            with clock.stage("sync"):
                queue.drain()  # with --updates drain; else running requests pause and go on
                verify = settings.run.check_sync or step == settings.run.steps
                sent = weight_sync.send_weights(weights, engine, version=step, verify=verify)

            ended = record.end_step(step, clock, samples, engine, judge)
            record.log({"step": step, **metrics, **discarded, **ended, **sent})
            if run.evaluates_after(step):
                evaluation.start(step)  # the queue's groups go first
            if record.checkpoint_due(step):
                checkpoint.save(run, trainer, step=step, rank_state=queue.state())
            if record.stopping:
                return record.finish()
        evaluation.finish()
    export.write_folders(run, weights)
    record.finish()


def check_staleness(samples: list[Sample], version: int, max_staleness: int) -> None:
    """Raise RuntimeError should a token be older than the bound: the invariant of this loop."""
    for sample in samples:
        versions = sorted(set(sample.weight_versions))
        if versions and not version - max_staleness <= versions[0] <= versions[-1] <= version:
            raise RuntimeError(
                f"sample {sample.index} of group {sample.group} has tokens of the weight versions "
                f"{versions}; training version {version} with --max-staleness {max_staleness} may "
                f"see none older than {version - max_staleness}"
            )


# --- groups in flight ---------------------------------------------------------------------------


@dataclass(eq=False)
class Group:
    """The samples of one prompt, on their way."""

    prompt: Sample
    samples: list[Sample]
    version: int
    """Of the weights when it was started: no token of it is older."""
    task: asyncio.Future = field(init=False)
    """Done when all samples are answered and judged."""


class GroupQueue:
    """A rollout rank's groups in flight, oldest first; empty on ranks without an engine.

    Once a step it fills up, waits until a step's worth is finished, and hands that over:

        version v arrives -> start new groups -> b finished groups -> (trainers train v + 1) -> ...

    With b groups a step and K = --max-staleness the queue holds (K + 1) b groups. This length alone
    enforces the bound. The b groups at the head were started with version v - K, so none of their
    tokens is older. They are due: they must be trained in this step. A step waits for its due
    groups however long one takes, and never trains newer ones instead. So no group is left waiting
    for ever, and with K = 0 the steps are those of the synchronous loop. A long answer has K steps
    of time before anything waits for it, and goes on with ever newer weights.

    --oversample S lets a step leave up to S of its due groups behind; newer finished ones take
    their place. Those left behind stay while the bound allows, then they are stopped and counted as
    dropped. With K = 0 nothing newer is in flight, so S groups more are started than a step needs.

    --deal room: the groups in flight of all engines are one queue; an engine that has room takes
    the next prompt. The B groups at its head are due, whichever engine has them.

    --dynamic-sampling N: a group whose rewards are all equal leaves the queue, and a new one starts
    at its end. The others only move forward, so the bound holds.

    All `async` methods run on the engine's event loop, so there are no locks.
    """

    def __init__(
        self, run: start.Run, engine, judge: reward.Judge, answer: rollout.Answer = rollout.answer
    ):
        """Take up the groups in flight of the checkpoint, if the run is resumed."""
        self.engine, self.judge, self.answer = engine, judge, answer
        self.data, self.settings = run.data, run.settings
        self.has_engine = run.engine_index is not None
        self.oversample = run.settings.in_flight.oversample // run.engines
        self.prompts = rollout.PromptStream(run, run.settings.rollout)
        self.shared = self.prompts.shared
        self.per_step = self.prompts.per_step
        self.version = self.limit = 0
        """With --deal room: what new groups are started with, and the first prompt not to start."""
        self.queue: list[Group] = []
        self.replacements = 0
        """How many more groups of this step may be replaced."""
        self.discarded: list[Sample] = []
        self.restored_groups: list[dict] = []
        engine.before_restart = self.leave
        if run.resumed_from and self.has_engine:
            # Of this rank: rollout ranks are the last of all.
            state = run.resumed_from.ranks[dist.get_rank() - dist.get_world_size()]
            self.restored_groups = state["in_flight"]
            self.discarded = [Sample(**sample) for sample in state["discarded"]]

    # --- from the loop

    def take_step(self, version: int) -> list[Sample]:
        """Return this rank's samples for the step that trains weights `version`; wait for them.

        Those that are discarded now are among them, without responses. Raises what went wrong in
        the background: EngineDied for a request that the engine gave up on.
        """
        return self.engine.call(self._take_step(version)) if self.has_engine else []

    def drain(self) -> None:
        """With --updates drain: wait until no request is running."""
        if self.has_engine and self.settings.in_flight.updates == "drain":
            with suppress(EngineDied):  # take_step raises it again
                self.engine.call(self.engine.drain())

    def leave(self) -> None:
        """Stop all groups; the next take_step asks again for those that are not finished."""
        self.restored_groups = self.engine.call(self._leave())

    def state(self) -> dict:
        """Return what a checkpoint must hold of this rank, as JSON.

        That is the prompts taken, and the groups in flight, with their answers where they are
        finished.
        """
        return self.engine.call(self._state()) if self.has_engine else {}

    # --- on the engine's event loop

    async def _take_step(self, version: int) -> list[Sample]:
        for group in self.restored_groups:
            self._start(Sample(**group["prompt"]), version, group)
        self.restored_groups = []
        steps_left = self.settings.run.steps - version
        steps_ahead = min(self.settings.in_flight.max_staleness + 1, steps_left)
        if self.shared:
            self.version, self.limit = version, (version + steps_ahead) * self.shared.per_step
            taken = await self._take_due((version + 1) * self.shared.per_step)
        else:
            length = max(steps_ahead * self.per_step, self.per_step + self.oversample)
            while len(self.queue) < length:
                self._start(*self.prompts.take(1), version)
            self.replacements = self.settings.reward.dynamic_sampling * self.per_step
            while not self._is_ready():
                running = [group.task for group in self.queue if not group.task.done()]
                await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            taken = [group for group in self.queue if group.task.done()][: self.per_step]
        left = [group for group in self.queue if group not in taken]

        oldest = version + 1 - self.settings.in_flight.max_staleness  # of what the next step trains
        too_old = [group for group in left if group.version < oldest or steps_left == 1]
        for group in too_old:
            await self.engine.abort(rollout.request_ids(group.samples))
            group.task.cancel()  # it may wait for a tool, and would ask the engine again
            self.discarded += rollout.discarded(group.samples, rollout.DROPPED)
        self.queue = [group for group in left if group not in too_old]
        discarded, self.discarded = self.discarded, []
        return [sample for group in taken for sample in group.samples] + discarded

    async def _take_due(self, end: int) -> list[Group]:
        """Return this engine's groups of prompts below end, once every engine has started its own.

        For --deal room. They are finished.
        """
        while True:
            self._fill()
            self._raise_failures()
            due = [group for group in self.queue if group.prompt.group < end]
            if all(group.task.done() for group in due) and self.shared.all_started(end):
                return due
            await asyncio.sleep(deal.LOOK_EVERY_S)

    def _fill(self, ended: asyncio.Future | None = None) -> None:
        """With --deal room: start groups while this engine has room. ended: a group's task."""
        if ended and (ended.cancelled() or ended.exception()):  # _raise_failures raises it
            return
        while self.shared:
            unfinished = sum(not group.task.done() for group in self.queue)
            prompt = self.shared.take(unfinished, self.limit)
            if prompt is None:
                return
            self._start(prompt, self.version)

    def _start(self, prompt: Sample, version: int, restored: dict | None = None) -> None:
        """Put a group at the queue's end. restored: what a checkpoint held of it.

        A group that was finished then is finished now, and as old as it was.
        """
        n = self.settings.rollout.samples_per_prompt
        group = Group(prompt, rollout.new_group(prompt, n), version)
        if restored and restored["answers"]:
            group.samples = [Sample(**sample) for sample in restored["answers"]]
            group.version = restored["version"]
            group.task = asyncio.get_running_loop().create_future()
            group.task.set_result(None)
        else:
            group.task = asyncio.ensure_future(self._answer_and_judge(group))
            group.task.add_done_callback(self._fill)
        self.queue.append(group)

    def _is_ready(self) -> bool:
        """Tell whether a step's worth is finished, and no more due groups are missing than may be.

        Raises what a group raised in the background.
        """
        self._raise_failures()
        due = self.queue[: self.per_step]
        unfinished_due = sum(not group.task.done() for group in due)
        finished = sum(group.task.done() for group in self.queue)
        return finished >= self.per_step and unfinished_due <= self.oversample

    def _raise_failures(self) -> None:
        for group in self.queue:
            if group.task.done():
                group.task.result()

    async def _answer_and_judge(self, group: Group) -> None:
        """Answer and judge a group; replace it if it is uninformative.

        The judge has a thread of its own and holds nothing up.
        """
        await self.answer(self.engine, group.samples, self.data, self.settings.rollout)
        rollout.check_aborts(group.samples)
        await asyncio.wrap_future(self.judge.submit(group.samples))
        is_uninformative = reward.is_uninformative(group.samples)
        if self.replacements and is_uninformative:
            self.replacements -= 1
            self.discarded += rollout.discarded(group.samples, rollout.REPLACED)
            self.queue.remove(group)
            self._start(*self.prompts.take(1), self.engine.version)

    async def _leave(self) -> list[dict]:
        state = await self._state()
        for group in self.queue:
            group.task.cancel()
        self.queue, self.limit = [], 0
        return state["in_flight"]

    async def _state(self) -> dict:
        def plain(sample: Sample) -> dict:
            return json.loads(sample.to_json())

        groups = list(self.restored_groups)  # those that wait to be asked again
        for group in self.queue:
            is_finished = group.task.done() and not group.task.exception()
            answers = [plain(sample) for sample in group.samples] if is_finished else []
            prompt = plain(group.prompt)
            groups.append({"prompt": prompt, "version": group.version, "answers": answers})
        discarded = [plain(sample) for sample in self.discarded]
        return {**self.prompts.state(), "in_flight": groups, "discarded": discarded}


if __name__ == "__main__":
    run_main(lambda: main(settings))
