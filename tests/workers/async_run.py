"""loop_async.py with artificial slowness and a record of everything that passes, run under torchrun by test_loop_async.py.

    torchrun --nproc-per-node 2 async_run.py OUT_FOLDER SLOW flags of loop_async.py …        SLOW: comma-separated trainer, engine, sync; or none

Every rank writes OUT_FOLDER/rank-R.json: the groups its engine started, what each step was given, and what its engine's weight version was at each reply.
"""

import asyncio
import json
import os
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent.parent)]

import rollout  # noqa: F401  first, as in the loop
import in_flight
import loop_async
import run
import train_step
from engine import Engine

OUT, SLOW = Path(sys.argv[1]), sys.argv[2].split(",")
started, steps, versions = [], [], []
generate, load, train = Engine.generate, Engine.load, train_step.train_step
without_dropped = in_flight.without_dropped


async def recorded_generate(self, prompts_ids, sampling, *, request_ids=None):
    """Every fourth group writes on to the token limit, over several versions; the slow engine takes its time for every tenth."""
    if request_ids is None:
        return await generate(self, prompts_ids, sampling)
    group, version = int(request_ids[0].split("-")[1]), self.version
    started.append(group)
    if "engine" in SLOW and group % 10 == 9:
        await asyncio.sleep(1.5)
        version = self.version
    outputs = await generate(self, prompts_ids, {**sampling, "ignore_eos": group % 4 == 3}, request_ids=request_ids)
    versions.append([version, self.version, [output["weight_versions"] for output in outputs]])
    return outputs


def slow_load(self, named, *, version):
    time.sleep(0.5 if "sync" in SLOW and version % 3 == 0 else 0)
    load(self, named, version=version)


def slow_train(trainer, samples, *, temperature):
    time.sleep(0.7 if "trainer" in SLOW and len(steps) % 5 == 4 else 0)
    return train(trainer, samples, temperature=temperature)


def recorded_step(samples, *, version, max_staleness):
    """In front of the invariant's own check: what it is given."""
    names = {kind: [(s.group, s.index) for s in samples if (s.finish_reason == in_flight.DROPPED) == kind] for kind in (False, True)}
    spans = [s.weight_versions for s in samples if s.finish_reason != in_flight.DROPPED]
    steps.append({"version": version, "trained": names[False], "dropped": names[True], "weight_versions": spans})
    return without_dropped(samples, version=version, max_staleness=max_staleness)


if __name__ == "__main__":
    Engine.generate, Engine.load = recorded_generate, slow_load
    train_step.train_step, in_flight.without_dropped = slow_train, recorded_step
    sys.argv = ["loop_async.py", *sys.argv[3:]]
    run.run_main(loop_async.main)
    (OUT / f"rank-{os.environ['RANK']}.json").write_text(json.dumps({"started": started, "steps": steps, "versions": versions}))
