"""The asynchronous loop's engines come back: one that dies is started again, and the run goes on.

    rollout rank     its engine dies -> end it -> start it again, without weights ----+
    all ranks        exchange: whose engine died? --> all of the weights, into that one only
    rollout rank     ask again what was not answered, in its old place  <-------------+

The other engines generate all the time, on threads of their own. A rank notices at its next turn to
hand over answers: there every rank waits for it anyway. Until then it takes its part in weight
updates and drops them. The new engine gets the version that the others hold. So a group that is
asked again is younger than before, and the bound on staleness holds.

Prompts, seeds and finished answers are those of before, as after --resume: none is lost, none is
asked for twice. In the synchronous loop an engine's death ends the run.
"""

import sys
from collections.abc import Callable

import torch

from backends.sglang.buckets import failure_note
from common.distributed import all_gather_bytes
from common.errors import BadInput, EngineDied
from data.sample import Sample
from harness import exits
import rollout
import weight_sync


class LastingEngine:
    """An engine that is started again when it dies, --engine-restarts times; else an Engine.

    All ranks have one; on those without an engine it holds a NoEngine. before_restart is called
    while the dead engine's event loop still runs.
    """

    def __init__(self, engine, run, weights: weight_sync.WeightPath):
        """run: harness.start.Run. engine: as rollout.start_engine returned it."""
        self.engine, self.run, self.weights = engine, run, weights
        self.before_restart: Callable[[], None] | None = None
        self.sent_version = -1
        """Of the weights that all other engines hold."""
        self.restarts = 0
        """Of this rank's engine."""
        self.restarts_of_step = 0
        """Of all engines, since they were last asked for by pop_restarts."""
        self.is_down = False
        self.lost: EngineDied | None = None
        """Why the engine holds only a part of the weights."""
        self._note_deaths()

    def __getattr__(self, name: str):
        return getattr(self.engine, name)

    def __enter__(self) -> "LastingEngine":
        self.engine.__enter__()
        return self

    def __exit__(self, *error) -> None:
        exits.note_engine_death = None
        self.engine.__exit__(*error)

    # --- answers

    def all_gather(self, work: Callable[[], list[Sample]]) -> list[Sample]:
        """Return the samples that work() returns on every rank, in rank order. Collective.

        work: asks the engine; it is called again where that was started again.
        """
        samples = None
        while True:
            why = ""
            if samples is None:
                try:
                    if self.lost:
                        raise self.lost
                    samples = work()
                except EngineDied as error:
                    why = str(error)
                    self._start_again(error)
            died = [text.decode() for text in all_gather_bytes(why.encode(), self.run.group)]
            if not any(died):
                return rollout.all_gather(samples, self.run.group)
            ranks = [rank for rank, text in enumerate(died) if text]
            self.restarts_of_step += len(ranks)
            self.run.record.say(
                f"the engine of rank {' and '.join(map(str, ranks))} was started again: it gets"
                " all of the weights, and what it had not answered is asked again"
            )
            self._send_all(into=self if why else rollout.NoEngine())

    def pop_restarts(self) -> dict[str, int]:
        """Return {"engine_restarts": number} since the last call; nothing where there was none."""
        n, self.restarts_of_step = self.restarts_of_step, 0
        return {"engine_restarts": n} if n else {}

    def _start_again(self, error: EngineDied) -> None:
        """End what is left of the engine and start it again, without weights.

        Raises `error` if it has been started again as often as it may be.
        """
        most, old = self.run.settings.in_flight.engine_restarts, self.engine
        while self.engine is old:
            if self.restarts >= most:
                raise error
            self.restarts += 1
            print(f"{error}: restart {self.restarts} of {most}", file=sys.stderr, flush=True)
            if not self.is_down:
                if self.before_restart is not None:
                    self.before_restart()
                old.timeline.switch_to("wait")
                # SGLang's watchdog may signal the death of the old one until this returns. Later
                # signals are about the new one, and end its start.
                old.shutdown()
                self.is_down, exits.note_engine_death = True, None
            try:
                self.engine = rollout.start_engine(self.run, self.run.settings.rollout)
            except (EngineDied, BadInput) as died:  # BadInput: it found too little memory
                error = EngineDied(str(died))
        self.engine.timeline, self.lost, self.is_down = old.timeline, None, False
        self._note_deaths()

    def _note_deaths(self) -> None:
        """Let a signal that the engine died do no more than make its next call raise EngineDied.

        The main thread may be in a collective, which the other ranks need it to finish.
        """
        if self.run.engine_index is not None and self.run.settings.in_flight.engine_restarts:
            loop, note = self.engine.loop, self.engine.note_death
            exits.note_engine_death = lambda: loop.call_soon_threadsafe(note)

    # --- weights

    def _send_all(self, *, into) -> None:
        """Give the engines that were started again all of the weights. Collective."""
        if self.weights.sent:
            self.weights.sent.version = None  # else only changes would come
        weight_sync.send_weights(self.weights, into, version=self.sent_version, verify=True)

    @property
    def holds_weights(self) -> bool:
        """Whether the engine takes weights: not while it has died of an update."""
        return self.engine.holds_weights and not self.lost

    def begin_update(self) -> None:
        """Do as Engine.begin_update."""
        self._unless_lost(self.engine.begin_update)

    def load(self, named, **how) -> None:
        """Do as Engine.load."""
        self._unless_lost(self.engine.load, named, **how)

    def settle(self) -> None:
        """Do as Engine.settle."""
        self._unless_lost(self.engine.settle)

    def end_update(self, version: int) -> None:
        """Do as Engine.end_update, and remember the version."""
        self.sent_version = version
        self._unless_lost(self.engine.end_update, version)

    def compare(self, named) -> torch.Tensor:
        """Return what Engine.compare does; of a dead engine that nothing differs."""
        report = self._unless_lost(self.engine.compare, named)
        # Of a dead engine: one byte of each tensor compared, and equal. holds_weights is False now.
        nothing = torch.tensor([1, 0, 0]).expand(1, len(named), 3)
        return nothing if report is None else report

    def _unless_lost(self, part: Callable, *args, **how):
        """Do a part of an update. If the engine dies of it, drop this part and all later ones.

        The other ranks send the rest, and need this one to receive it.
        """
        if self.lost:
            return None
        try:
            return part(*args, **how)
        except EngineDied as error:
            if not self.run.settings.in_flight.engine_restarts:
                raise
            error.add_note(failure_note(*self.engine.last_phase))
            self.lost = error
            return None
