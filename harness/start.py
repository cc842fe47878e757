"""Start a run: check everything, join the process groups, open the run folder.

settings -> config.json, prompts, machine, checkpoint: all checked, all mistakes said at once
         -> process groups -> run folder -> Run
"""

import json
import os
import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from backends.huggingface.config import read_config
from backends.huggingface.folder import check_model_folder
from backends.huggingface.fp8 import fp8_weights
from common import distributed, hub, process_groups
from common.errors import ProblemList, all_problems
from common.held_out import held_out_sets
from common.spares import fork_spares
from data.prompts import Data, checksum, load_data
from data.remote_reward import check_listens, is_url
from harness import checkpoint, checks, epochs, model_checks, plan
from harness.record import Record
import reward


@dataclass
class Run:
    """What the set-up of each stage needs to know. The functions of a step never take it."""

    settings: Any
    """A loop's Settings."""
    model: str
    """Hugging Face folder that trainer and engine start from."""
    config: dict
    """Its config.json, checked."""
    data: Data
    longest: int
    """Prompt and response tokens of the longest sample that an engine may answer."""
    reward: reward.Reward
    group: dist.ProcessGroup
    """All ranks of the run."""
    is_trainer: bool
    """Whether this rank holds a part of the trained model."""
    engine_index: int | None
    """Which of the engines this rank runs; None if it runs none."""
    engines: int
    record: Record
    inputs: dict[str, str]
    """Checksums of what the run reads, by flag; see checkpoint.what_was_read."""
    resumed_from: checkpoint.Checkpoint | None = None

    @property
    def trains(self) -> bool:
        """Whether this rank learns from samples."""
        return self.is_trainer and not self.settings.run.debug_rollout_only

    @property
    def fp8(self) -> frozenset[str]:
        """The weights that the engines hold in FP8, by their Hugging Face names."""
        rollout = self.settings.rollout
        split = dict(engine_tp=rollout.engine_tp, engine_ep=rollout.engine_ep)
        return fp8_weights(self.config, rollout_dtype=rollout.rollout_dtype, **split)

    @property
    def first_step(self) -> int:
        """The first step to do: 1, or the one after the checkpoint."""
        return self.resumed_from.step + 1 if self.resumed_from else 1

    @property
    def evaluates_first(self) -> bool:
        """Whether the weights of the start are evaluated; a resumed run has done that before.

        Not so in the asynchronous loop: it saves before an evaluation has ended.
        """
        if not self.resumed_from or self.settings.run.eval_only:
            return True
        return self.is_async and self.evaluates_after(self.resumed_from.step)

    def evaluates_after(self, step: int) -> bool:
        """Tell whether the weights of a step are evaluated."""
        run = self.settings.run
        return step % run.eval_every == 0 or step == run.steps

    @property
    def engine_load(self) -> dict:
        """What launch_engine must know of the run. requests: at a time, of one engine, at most."""
        rollout, of_steps = self.settings.rollout, self.training_requests
        held_out = -(-len(self.data.held_out) // self.engines) * rollout.eval_samples_per_prompt
        if self.is_async:  # groups of training go on, and evaluation takes the room that they leave
            held_out = of_steps + rollout.eval_samples_per_prompt
        return dict(
            seed=self.settings.run.seed,
            longest=self.longest,
            colocated=self.is_trainer,
            keeps_weights=self.settings.sync.sync == "delta",
            reports_experts=self.settings.train.routing_replay != "none",
            requests=max(of_steps, held_out),
        )

    @property
    def is_async(self) -> bool:
        """Whether the asynchronous loop runs: engines generate while trainers train."""
        return checks.is_async(self.settings)

    @property
    def training_requests(self) -> int:
        """How many requests one engine has at a time, of training, at most."""
        steps, more, rollout = 1, 0, self.settings.rollout
        if self.is_async:
            in_flight = self.settings.in_flight
            steps, more = in_flight.max_staleness + 1, in_flight.oversample
        groups = rollout.prompts_per_step * steps + more
        return -(-groups // self.engines) * rollout.samples_per_prompt

    @property
    def broadcast_group(self) -> dist.ProcessGroup | None:
        """The group over which rank 0 sends weights to the ranks that generate, if they differ."""
        return self.group if self.is_async else None


def fetch_models(settings, *, weights: bool = True):
    """Return a loop's settings with folders in place of the models that the hub names.

    weights: whether they are needed. Raises BadInput for what the hub does not have.
    """
    run, train = settings.run, settings.train
    model = hub.model_folder(run.model, flag="--model", weights=weights)
    reference = hub.model_folder(train.reference, flag="--reference", weights=weights)
    run, train = replace(run, model=model), replace(train, reference=reference)
    return replace(settings, run=run, train=train)


@all_problems
def check_same_inputs(inputs: dict, group: dist.ProcessGroup) -> None:
    """Refuse ranks that read other prompts or another model than rank 0. Collective.

    inputs: a checksum by flag. Machines may have folders, or caches, of their own.
    """
    of_ranks = distributed.all_gather_bytes(json.dumps(inputs).encode(), group)
    first, *others = map(json.loads, of_ranks)
    for rank, read in enumerate(others, start=1):
        for flag in [flag for flag in first if read[flag] != first[flag]]:
            fix = "give every machine the same files"
            yield f"rank {rank} reads from {flag} something else than rank 0: {fix}"


def prepare(
    settings,
    loop: str,
    *,
    reward_function: reward.Reward | None = None,
    turns: int = 1,
    stop: tuple[str, ...] = (),
) -> Run:
    """Check settings, files and machine, join the process groups, and open the run folder.

    With --plan: print the plan, and end the program. Raises BadInput with all that is wrong before
    anything is started. Collective.

    loop: sync, async, or an example's name; a checkpoint is resumed by the loop that wrote it.
    reward_function: in place of --reward's. turns: how often a rollout asks the engine for one
    sample, at most. stop: further tokens that end a turn, as --stop names them.
    """
    trained_by = "" if reward_function else settings.reward.reward
    reward_function = reward_function or reward.find_reward(trained_by)
    rollout = settings.rollout
    ranks = checks.world_size(settings)
    trainer_ranks, rollout_ranks = checks.split_ranks(settings)
    is_async, is_plan = checks.is_async(settings), checks.is_plan(settings)
    split = dict(ranks=ranks, rollout_ranks=rollout_ranks)
    rank = int(os.environ.get("RANK", 0))
    runs_engine = not is_plan and plan.engine_index(settings, rank, **split) is not None
    # SGLang binds a process to a NUMA node as it spawns it.
    spawns = any(pair.startswith("numa_node=") for pair in rollout.sglang)
    if runs_engine and not (spawns or torch.cuda.is_available()):
        # Now: what follows may start threads. No engine has more ranks than the run.
        fork_spares(min(rollout.engine_tp, ranks))

    found, data, inputs, resumed = ProblemList(), None, {}, None
    named, fetched = settings, found.collect(fetch_models, settings, weights=False)
    settings = fetched or settings
    run_settings, train, model = settings.run, settings.train, settings.run.model
    config = found.collect(read_config, model) if fetched else None
    if not is_plan:
        prompts = replace(rollout, stop=(*rollout.stop, *stop))
        judged = dict(label_problems=lambda name: reward.label_problems(name or trained_by))
        data = found.collect(load_data, model, prompts, config, seed=run_settings.seed, **judged)
        if data:  # all that follows, and the run, goes by the lowered steps
            settings = found.collect(epochs.lower_steps, settings, data) or settings
    longest = found.collect(model_checks.longest_sample, settings, config, data)
    asked = model_checks.longest_request(settings, longest, data)
    # A plan is for GPUs, and the length of its prompts is a guess.
    planned = dict(longest=None if is_plan else asked, on_gpu=is_plan or None)
    found.collect(model_checks.check_rollout_settings, rollout, config, **planned)
    sizes = dict(world_size=trainer_ranks, longest=longest)
    found.collect(model_checks.check_train_settings, train, config, **sizes)
    found.collect(model_checks.check_rounding, settings, config)
    found.collect(model_checks.check_lora, settings, config)
    if not is_plan and fetched != named:  # nothing large is fetched for a run that is refused
        found.raise_if_any()
        fetch_models(named)
    read = None if is_plan else model
    found.collect(model_checks.check_reference, train, config, read, **sizes)
    load = dict(world_size=ranks, trainer_ranks=trainer_ranks, rollout_ranks=rollout_ranks)
    if is_plan:
        found.raise_if_any()
        plan.report(settings, config, **load, longest=asked)
        sys.exit(0)
    tokenizer = data and data.tokenizer
    found.collect(check_model_folder, model, config, tokenizer, stop=rollout.stop)
    found.collect(model_checks.check_held_out, run_settings, data and data.held_out)
    found.collect(plan.check_machine, settings, config, **load, longest=asked)
    if data:
        rewards = {trained_by, *(of_set.reward for of_set in held_out_sets(rollout))}
        for url in sorted(filter(is_url, rewards)) if runs_engine else ():
            flag = "--reward" if url == trained_by else "--eval-reward"
            found.collect(check_listens, url, flag=flag)
        inputs = found.collect(checkpoint.what_was_read, settings, data)
    if run_settings.resume and run_settings.name:
        resumed = found.collect(checkpoint.find_latest_checkpoint, settings, loop, inputs or {})
    found.raise_if_any()

    waits = dict(rollout_ranks=rollout_ranks, turns=turns)
    wait_s = process_groups.longest_wait_s(settings, reward_function, **waits)
    separate = rollout_ranks if is_async else 0
    group = distributed.init_distributed(separate, wait_s=wait_s)
    held_out = {"--eval-prompts": checksum(1.0, data.held_out)}
    check_same_inputs(inputs | held_out, group)
    is_trainer = group.rank() < trainer_ranks
    record = Record(settings, loop, group, is_trainer, resumed=resumed)
    for what, folder in hub.found.items():
        record.say(f"{what}: {folder}")
    if settings.run.max_epochs:
        record.say(epochs.describe(settings, data))
    return Run(
        settings,
        model,
        config,
        data,
        asked,
        reward_function,
        group,
        is_trainer,
        engine_index=plan.engine_index(settings, group.rank(), **split),
        engines=rollout_ranks // rollout.engine_tp,
        record=record,
        inputs=inputs,
        resumed_from=resumed,
    )
