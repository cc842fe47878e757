"""The synchronous loop: rollout -> reward -> advantage -> train -> sync, one after the other; every
rank is a trainer with an engine at its side.

    python loop_sync.py                                     the toy, on one CPU core or one GPU
    torchrun --nproc-per-node 2 loop_sync.py                two ranks, data parallel
    torchrun --nproc-per-node 2 loop_sync.py --tp 2         two ranks, tensor parallel

             prompts                  samples with rewards                gradient               FP8 weights, version v + 1
    stream ----------> rank's engine ----------------------> every rank ----------> optimizer
    --------------------------> rank's engine
                       FP8, version v      all_gather          BF16                 FP32

Nothing overlaps, so every token of a step was sampled by the weights that the step starts from:
staleness is 0.
"""

import contextlib
from dataclasses import dataclass

from common.errors import ProblemList
from common.settings import (
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
    trainer_ranks = rollout_ranks = world_size
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
        problems.collect(checkpoint.find_latest_checkpoint, settings, "sync", read)
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
    everyone = distributed.init_distributed(wait_s=wait_s)
    record = Record(settings, "sync", everyone, resumed=resumed)
    split = dict(engine_tp=settings.rollout.engine_tp, engine_ep=settings.rollout.engine_ep)
    fp8 = weight_sync.fp8_weights(config, rollout_dtype=settings.rollout.rollout_dtype, **split)
    record.say(weight_sync.describe(config, fp8))
    with_reference = settings.loss.kl_coef > 0
    trainer = train_step.build_trainer(
        model, settings.train, config, steps=steps, seed=seed, with_reference=with_reference
    )
    checkpoint.restore(resumed, trainer)
    learner = None if settings.run.debug_rollout_only else trainer
    weights = weight_sync.WeightPath(trainer, config, fp8, settings.sync.bucket_bytes)
    engine = (
        None
        if settings.run.load_rollouts
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
        prompts = rollout.Prompts(
            data, settings.rollout, taken=rollout.prompts_taken_before(ranks, settings.rollout)
        )
        for step in range(start + 1, steps + 1):
            watch = Stopwatch()
            n = settings.rollout.samples_per_prompt
            samples = rollout.generate(
                engine,
                prompts.take(rollout.step_share(settings.rollout)),
                data,
                settings.rollout,
                n=n,
            )
            rollout_s = watch.lap("rollout")

            reward.compute_rewards(samples, judge)
            samples = reward.replace_uninformative(
                samples, engine, prompts, data, settings.rollout, settings.reward, judge
            )  # with --dynamic-sampling
            samples, set_aside = rollout.split_discarded(
                rollout.save_or_load(record, step, rollout.all_gather_samples(samples, everyone))
            )
            reward_s = watch.lap("reward")

            rollout.release_memory(engine)  # on a GPU; the hand-off takes it back
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
                "rollout_s": rollout_s,
                "reward_s": reward_s,
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
                    record,
                    settings,
                    trainer,
                    step=step,
                    read=read,
                    rank_state={"prompts": prompts.taken} if engine else {},
                )
            if record.stopping:
                return record.finish()
    hf_export.export_all(weights, record.exports(), source=model)
    record.finish()


if __name__ == "__main__":
    exits.run_main(lambda: main(settings))
