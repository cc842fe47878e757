"""The synchronous loop: rollout -> reward -> advantage -> train -> sync, one after the other; every rank is a trainer with an engine at its side.

    torchrun loop_sync.py                                   the toy, on one CPU core or one GPU
    torchrun --nproc-per-node 2 loop_sync.py                two ranks, data parallel
    torchrun --nproc-per-node 2 loop_sync.py --tp 2         two ranks, tensor parallel

             prompts                  samples with rewards                gradient               FP8 weights, version v + 1
    stream ----------> rank's engine ----------------------> every rank ----------> optimizer --------------------------> rank's engine
                       FP8, version v      all_gather          BF16                 FP32

Nothing overlaps, so every token of a step was sampled by the weights that the step starts from: staleness is 0.
"""

import contextlib
from dataclasses import dataclass

import rollout  # first: on a machine without a GPU it prepares the imports that follow
import checkpoint
import hf_folder
import packing
import plan
import process_groups
import reward
import run
import train_step
import weight_sync
from hf_config import read_config
from losses import LossSettings
from plan import PlanSettings
from problems import Problems
from prompts import load_data
from record import Record, Stopwatch
from reward import RewardSettings
from rollout import RolloutSettings
from run import RunSettings
from train_step import TrainSettings
from weight_sync import SyncSettings


@dataclass(frozen=True)
class Settings:
    run: RunSettings = RunSettings()
    rollout: RolloutSettings = RolloutSettings()
    reward: RewardSettings = RewardSettings()
    train: TrainSettings = TrainSettings()
    loss: LossSettings = LossSettings()
    sync: SyncSettings = SyncSettings()
    plan: PlanSettings = PlanSettings()


def main() -> None:
    # Everything that can be wrong with the input is found before anything is started, and all of it is said at once.
    settings, problems = process_groups.after_restart(run.parse_settings(Settings)), Problems()
    model, seed, steps = settings.run.model, settings.run.seed, settings.run.steps
    problems.of(run.check_run_settings, settings.run)
    problems.of(plan.check_plan_settings, settings.plan)
    config = problems.of(read_config, model)
    world_size = plan.world_size(settings.plan)
    trainer_ranks = rollout_ranks = world_size
    problems.of(reward.check_reward_settings, settings.reward, settings.rollout)
    problems.of(weight_sync.check_sync_settings, settings.sync)
    label_problems = reward.label_problems(settings.reward)
    data = None if settings.plan.plan else problems.of(load_data, model, settings.rollout, config, seed=seed, label_problems=label_problems)
    longest = problems.of(plan.longest_sample, settings, config, data)
    planned = settings.plan.plan  # on GPUs; how long its prompts are is a guess
    sizes = dict(world_size=rollout_ranks, longest=None if planned else longest, on_gpu=planned or None)
    problems.of(rollout.check_rollout_settings, settings.rollout, config, **sizes)
    problems.of(train_step.check_train_settings, settings.train, settings.loss, config, world_size=trainer_ranks, steps=steps, longest=longest)
    if not settings.run.load_rollouts:  # plan.longest_sample looks at what is loaded
        answers = settings.rollout.prompts_per_step * settings.rollout.samples_per_prompt
        problems.of(packing.check_minibatches, settings.train.minibatches, answers=answers)
    load = dict(world_size=world_size, trainer_ranks=trainer_ranks, rollout_ranks=rollout_ranks, longest=longest)
    if settings.plan.plan:
        problems.refuse()
        return plan.report(settings, config, **load)
    problems.of(hf_folder.check_model_folder, model, config, data and data.tokenizer, stop=settings.rollout.stop)
    problems.of(plan.check_machine, settings, config, **load)
    read = problems.of(checkpoint.what_was_read, settings, data) if data else {}
    resumed = problems.of(checkpoint.find, settings, "sync", read) if settings.run.resume and settings.run.name else None
    problems.refuse()
    temperature, max_response_tokens = settings.rollout.temperature, settings.rollout.max_response_tokens
    start, ranks = (resumed.step, resumed.ranks) if resumed else (0, None)

    judged_by = reward.REWARDS[settings.reward.reward]
    wait_s = process_groups.longest_wait_s(settings, judged_by, rollout_ranks=rollout_ranks)
    everyone = run.init_distributed(wait_s=wait_s)
    record = Record(settings, "sync", everyone, resumed=resumed)
    split = dict(engine_tp=settings.rollout.engine_tp, engine_ep=settings.rollout.engine_ep)
    fp8 = weight_sync.fp8_weights(config, rollout_dtype=settings.rollout.rollout_dtype, **split)
    record.say(weight_sync.describe(config, fp8))
    with_reference = settings.loss.kl_coef > 0
    trainer = train_step.build_trainer(model, settings.train, config, steps=steps, seed=seed, with_reference=with_reference)
    checkpoint.restore(resumed, trainer)
    learner = None if settings.run.debug_rollout_only else trainer
    weights = weight_sync.Weights(trainer, config, fp8, settings.sync.bucket_bytes)
    engine = None if settings.run.load_rollouts else rollout.start_engine(model, settings.rollout, config, seed=seed, longest=longest)
    judge = reward.Judge(judged_by, settings.reward.judges, settings.reward.judge_timeout_s)
    with engine or contextlib.nullcontext(), record:
        weight_sync.sync_weights(weights, engine, version=start, check=True)
        if not resumed:
            record.log(record.log_eval(0, *reward.evaluate(engine, data, settings.rollout, judge, everyone)))
        else:
            record.profile(start)
        prompts = rollout.Prompts(data, settings.rollout, taken=rollout.taken_before(ranks, settings.rollout))
        for step in range(start + 1, steps + 1):
            watch = Stopwatch()
            n = settings.rollout.samples_per_prompt
            samples = rollout.generate(engine, prompts.take(rollout.step_share(settings.rollout)), data, settings.rollout, n=n)
            rollout_s = watch.lap("rollout")

            reward.compute_rewards(samples, judge)
            samples = reward.refill(samples, engine, prompts, data, settings.rollout, settings.reward, judge)  # with --dynamic-sampling
            samples, set_aside = rollout.without_marks(rollout.replay(record, step, rollout.all_gather_samples(samples, everyone)))
            reward_s = watch.lap("reward")

            rollout.release_memory(engine)  # on a GPU; the hand-off takes it back
            batch = train_step.score(learner, samples, settings.loss, temperature=temperature)  # log-probs of trainer and reference, where needed
            reward.compute_advantages(batch, settings.reward, settings.loss, max_response_tokens=max_response_tokens)
            metrics = train_step.train_step(learner, batch, settings.loss, temperature=temperature, max_response_tokens=max_response_tokens)
            train_s = watch.lap("train")

            sync_bytes = weight_sync.sync_weights(weights, engine, version=step, check=settings.run.check_sync or step == steps)
            sync_s = watch.lap("sync")

            metrics |= set_aside | reward.batch_metrics(samples, version=step - 1) | record.trace(watch, engine, judge)
            metrics |= {"rollout_s": rollout_s, "reward_s": reward_s, "train_s": train_s, "sync_s": sync_s, "sync_bytes": sync_bytes}
            if step % settings.run.eval_every == 0 or step == steps:
                metrics |= record.log_eval(step, *reward.evaluate(engine, data, settings.rollout, judge, everyone))
            record.log({"step": step, **metrics})
            if record.checkpoint_due(step):
                checkpoint.save(record, settings, trainer, step=step, read=read, rank_state={"prompts": prompts.taken} if engine else {})
            if record.stopping:
                return record.finish()
    hf_folder.export_all(weights, record.exports(), source=model)
    record.finish()


if __name__ == "__main__":
    run.run_main(main)
