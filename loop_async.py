"""The asynchronous loop: the last ranks generate while the first ranks train; one step's samples
are handed over while later ones are on their way.

    torchrun --nproc-per-node 2 loop_async.py                                       one trainer, one engine
    torchrun --nproc-per-node 4 loop_async.py --tp 2 --rollout-ranks 2              two trainers, two engines
    torchrun --nproc-per-node 2 loop_async.py --max-staleness 0                     nothing runs ahead: the synchronous result

    process groups, W ranks of which the last R generate:
    rank            0 ............ W-R-1   W-R ............ W-1
    default world   [ trainers: DP, TP ]   [ rollout, engines ]      Megatron's groups are made from the trainers' world
    everyone        [ samples and timelines -> all;   FP8 weights: rank 0 -> all ]

Every rank runs the same loop body, so collectives come in one order on all of them. What overlaps
is inside the engines: they answer the groups of the next steps all the while. Invariants: no
trained token is older than --max-staleness versions; every group is trained once or counted as
dropped.
"""

import contextlib
from dataclasses import dataclass

from common.errors import ProblemList
from common.settings import (
    InFlightSettings,
    PlanSettings,
    RewardSettings,
    RolloutSettings,
    RunSettings,
    SyncSettings,
    TrainSettings,
)
from harness import checks, flags
from losses import LossSettings


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


# The imports below take half a minute: what is wrong with a flag is said before them.
if __name__ == "__main__":
    settings = flags.parse_or_exit(Settings, checks.check_flags)

from backends.huggingface import folder as hf_folder
from backends.huggingface.config import read_config
from common import distributed, process_groups
from common.timeline import Stopwatch
from data.prompts import check_held_out, load_data
from harness import checkpoint, exits, export as hf_export, plan
from harness.record import Record
import in_flight
import reward
import rollout
import train_step
import weight_sync


def main(settings: Settings) -> None:
    # What model, data and machine do not allow is found before anything is started, and said at
    # once.
    problems, world_size = ProblemList(), checks.world_size(settings)
    model, seed, steps = settings.run.model, settings.run.seed, settings.run.steps
    config = problems.collect(read_config, model)
    trainer_ranks, rollout_ranks = (
        world_size - settings.in_flight.rollout_ranks,
        settings.in_flight.rollout_ranks,
    )
    label_problems = reward.label_problems(settings.reward)
    data = (
        None
        if settings.plan.plan
        else problems.collect(
            load_data, model, settings.rollout, config, seed=seed, label_problems=label_problems
        )
    )
    longest = problems.collect(plan.longest_sample, settings, config, data)
    planned = settings.plan.plan  # on GPUs; how long its prompts are is a guess
    sizes = dict(longest=None if planned else longest, on_gpu=planned or None)
    problems.collect(rollout.check_rollout_settings, settings.rollout, config, **sizes)
    problems.collect(
        train_step.check_train_settings,
        settings.train,
        config,
        world_size=trainer_ranks,
        longest=longest,
    )
    load = dict(
        world_size=world_size,
        trainer_ranks=trainer_ranks,
        rollout_ranks=rollout_ranks,
        longest=longest,
    )
    if settings.plan.plan:
        problems.raise_if_any()
        return plan.report(settings, config, **load)
    problems.collect(
        hf_folder.check_model_folder,
        model,
        config,
        data and data.tokenizer,
        stop=settings.rollout.stop,
    )
    problems.collect(check_held_out, settings.run, data and data.held_out)
    problems.collect(plan.check_machine, settings, config, **load)
    read = problems.collect(checkpoint.what_was_read, settings, data) if data else {}
    resumed = (
        problems.collect(checkpoint.find_latest_checkpoint, settings, "async", read)
        if settings.run.resume and settings.run.name
        else None
    )
    problems.raise_if_any()
    temperature, max_response_tokens = (
        settings.rollout.temperature,
        settings.rollout.max_response_tokens,
    )
    start, ranks = (resumed.step, resumed.ranks) if resumed else (0, None)

    judged_by = reward.REWARDS[settings.reward.reward]
    wait_s = process_groups.longest_wait_s(settings, judged_by, rollout_ranks=rollout_ranks)
    everyone = distributed.init_distributed(rollout_ranks, wait_s=wait_s)
    trains = everyone.rank() < trainer_ranks
    record = Record(settings, "async", everyone, trains, resumed=resumed)
    split = dict(engine_tp=settings.rollout.engine_tp, engine_ep=settings.rollout.engine_ep)
    fp8 = weight_sync.fp8_weights(config, rollout_dtype=settings.rollout.rollout_dtype, **split)
    record.say(weight_sync.describe(config, fp8))
    with_reference = settings.loss.kl_coef > 0
    trainer = (
        train_step.build_trainer(
            model, settings.train, config, steps=steps, seed=seed, with_reference=with_reference
        )
        if trains
        else None
    )
    checkpoint.restore(resumed, trainer)
    learner = None if settings.run.debug_rollout_only else trainer
    weights = weight_sync.WeightPath(
        trainer, config, fp8, settings.sync.bucket_bytes, broadcast_group=everyone
    )
    engine = (
        None
        if trains or settings.run.load_rollouts
        else rollout.start_engine(model, settings.rollout, config, seed=seed, longest=longest)
    )
    judge = reward.Judge(judged_by, settings.reward.judges, settings.reward.judge_timeout_s)
    with engine or contextlib.nullcontext(), record:
        weight_sync.sync_weights(weights, engine, version=start, check=True)
        if not resumed or settings.run.eval_only:
            record.log(
                record.log_eval(
                    start, *reward.evaluate(engine, data, settings.rollout, judge, everyone)
                )
            )
        else:
            record.profile(start)
        if settings.run.eval_only:
            return record.finish_evaluation()
        groups = in_flight.GroupQueue(
            engine,
            data,
            settings.rollout,
            settings.in_flight,
            settings.reward,
            judge,
            steps=steps,
            ranks=ranks,
        )
        for step in range(start + 1, steps + 1):
            watch = Stopwatch()
            # The engines start new groups, and hand over finished ones. No trained token is older
            # than the bound, or this raises.
            samples, set_aside = rollout.split_discarded(
                rollout.save_or_load(
                    record,
                    step,
                    rollout.all_gather_samples(groups.take_step(version=step - 1), everyone),
                )
            )
            in_flight.check_staleness(
                samples, version=step - 1, max_staleness=settings.in_flight.max_staleness
            )
            wait_s = watch.lap("wait")

            batch = train_step.add_logprobs(
                learner, samples, settings.loss, temperature=temperature
            )  # log-probs of trainer and reference, where needed
            reward.add_advantages(
                batch, settings.reward, settings.loss, max_response_tokens=max_response_tokens
            )
            metrics = train_step.update_policy(
                learner,
                batch,
                settings.loss,
                temperature=temperature,
                max_response_tokens=max_response_tokens,
            )
            train_s = watch.lap("train")

            # Only if asked to; else requests in flight are paused while the weights change, and go
            # on
            groups.drain()
            sync_bytes = weight_sync.sync_weights(
                weights, engine, version=step, check=settings.run.check_sync or step == steps
            )
            sync_s = watch.lap("sync")

            metrics |= (
                set_aside
                | reward.batch_metrics(samples, version=step - 1)
                | record.trace(watch, engine, judge)
            )
            metrics |= {
                "wait_s": wait_s,
                "train_s": train_s,
                "sync_s": sync_s,
                "sync_bytes": sync_bytes,
            }
            record.log_samples(step, samples)
            if step % settings.run.eval_every == 0 or step == steps:
                metrics |= record.log_eval(
                    step, *reward.evaluate(engine, data, settings.rollout, judge, everyone)
                )
            record.log({"step": step, **metrics})
            if record.checkpoint_due(step):
                checkpoint.save(
                    record, settings, trainer, step=step, read=read, rank_state=groups.state()
                )
            if record.stopping:
                return record.finish()
    hf_export.export_all(weights, record.exports(), source=model)
    record.finish()


if __name__ == "__main__":
    exits.run_main(lambda: main(settings))
