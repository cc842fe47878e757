"""loop_async.py with artificial slowness and a record of everything that passes, run under torchrun
by test_loop_async.py.

    torchrun --nproc-per-node 2 async_run.py OUT_FOLDER SLOW flags of loop_async.py …

SLOW is "none", or what is slowed down: trainer, engine, sync, with commas between them. Every rank
writes OUT_FOLDER/rank-R.json: the groups its queue started, what each step was given, and the
weight version of its engine at each reply.
"""

import asyncio
import json
import os
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent.parent)]

from backends.sglang.engine import Engine
from harness import checks, exits, flags
import loop_async
import rollout
import train_step

OUT, SLOW = Path(sys.argv[1]), sys.argv[2].split(",")
started, steps, versions = [], [], []
generate, load, train = Engine.generate, Engine.load, train_step.update_policy
start_group = loop_async.GroupQueue._start
split_discarded, check_staleness = rollout.split_discarded, loop_async.check_staleness


async def recorded_generate(self, prompts_ids, sampling, *, request_ids, cache="", keep=True):
    """Every fourth group writes on to the token limit, over several versions; the slow engine takes
    its time for every tenth.
    """
    if cache:  # an evaluation
        return await generate(self, prompts_ids, sampling, request_ids=request_ids, cache=cache)
    group, version = int(request_ids[0].split("-")[1]), self.version
    if "engine" in SLOW and group % 10 == 9:
        await asyncio.sleep(1.5)
        version = self.version
    outputs = await generate(
        self,
        prompts_ids,
        [{**one, "ignore_eos": group % 4 == 3} for one in sampling],
        request_ids=request_ids,
        keep=keep,
    )
    versions.append([version, self.version, [output["weight_versions"] for output in outputs]])
    return outputs


def recorded_start(self, prompt, *arguments):
    """Note a group when it enters the queue: the last step may drop it before it is asked for."""
    started.append(prompt.group)
    start_group(self, prompt, *arguments)


def slow_load(self, named, *, version, **base):
    time.sleep(0.5 if "sync" in SLOW and version % 3 == 0 else 0)
    load(self, named, version=version, **base)


def slow_train(trainer, samples, settings, **arguments):
    time.sleep(0.7 if trainer and "trainer" in SLOW and len(steps) % 5 == 4 else 0)
    return train(trainer, samples, settings, **arguments)


def recorded_step(samples):
    """Record what a step is given: the trained samples, and the discarded ones by reason."""
    names = {
        reason: [(s.group, s.index) for s in samples if s.discarded == reason]
        for reason in (rollout.DROPPED, rollout.REPLACED)
    }
    trained, set_aside = split_discarded(samples)
    steps.append(
        {
            "trained": [(s.group, s.index) for s in trained],
            **names,
            "weight_versions": [s.weight_versions for s in trained],
        }
    )
    return trained, set_aside


def recorded_version(samples, version, max_staleness):
    """In front of the invariant's own check."""
    steps[-1]["version"] = version
    check_staleness(samples, version, max_staleness)


if __name__ == "__main__":
    Engine.generate, Engine.load = recorded_generate, slow_load
    loop_async.GroupQueue._start = recorded_start
    train_step.update_policy, rollout.split_discarded, loop_async.check_staleness = (
        slow_train,
        recorded_step,
        recorded_version,
    )
    sys.argv = ["loop_async.py", *sys.argv[3:]]
    settings = flags.parse_or_exit(loop_async.Settings, checks.check_flags)
    exits.run_main(lambda: loop_async.main(settings))
    (OUT / f"rank-{os.environ['RANK']}.json").write_text(
        json.dumps({"started": started, "steps": steps, "versions": versions}), encoding="utf-8"
    )
