"""The synchronous loop: rollout -> reward -> train -> sync, one after the other.

    python loop_sync.py                                     the toy, on one CPU core or one GPU
    torchrun --nproc-per-node 2 loop_sync.py                two ranks, data parallel
    torchrun --nproc-per-node 2 loop_sync.py --tp 2         two ranks, tensor parallel

Every rank is a trainer with an engine at its side. One step:

    prompts -> rank's engine -> answers -> rewards -> every rank -> gradient -> optimizer
               FP8, version v             all_gather              BF16         FP32
                    ^                                                            |
                    +------------- FP8 weights, version v + 1 -------------------+

Nothing overlaps. So every token of a step was sampled by the weights that the step starts from:
staleness is 0. `diff loop_sync.py loop_async.py` shows what the other loop does differently.
"""

from dataclasses import dataclass

from common.settings import PlanSettings, RolloutSettings, RunSettings, SyncSettings, TrainSettings
from harness import checks, flags
from losses import LossSettings
from reward import RewardSettings


@dataclass(frozen=True)
class Settings:
    run: RunSettings = RunSettings()
    rollout: RolloutSettings = RolloutSettings()
    reward: RewardSettings = RewardSettings()
    train: TrainSettings = TrainSettings()
    loss: LossSettings = LossSettings()
    sync: SyncSettings = SyncSettings()
    plan: PlanSettings = PlanSettings()


# A wrong flag is refused here: the imports below take half a minute.
if __name__ == "__main__":
    settings = flags.parse_or_exit(Settings, checks.check_flags)

import reward
import rollout
import train_step
import weight_sync
from harness import checkpoint, evaluate, export, start
from harness.exits import run_main


def main(settings: Settings) -> None:
    # Checks flags, files and machine, and says all mistakes at once before anything is started.
    # Then joins the process groups and opens the run folder. --plan prints a plan and ends here.
    train(start.prepare(settings, loop="sync"))


def train(run: start.Run, answer: rollout.Answer = rollout.answer) -> None:
    """Train as run.settings say. answer: how the engine answers samples; see rollout.answer."""
    settings, record = run.settings, run.record
    trainer = train_step.start_trainer(run)
    checkpoint.restore(run.resumed_from, trainer)
    weights = weight_sync.open_path(run, trainer)
    engine = rollout.start_engine(run, settings.rollout)  # it has no weights yet
    judge = reward.Judge(run.reward, settings.reward.judges, settings.reward.judge_timeout_s)

    with engine, record:
        # The engine's first weights come on the path of all later ones.
        weight_sync.send_weights(weights, engine, version=run.first_step - 1, verify=True)
        evaluation = evaluate.Evaluation(run, engine, judge, answer)
        if run.evaluates_first:
            step = run.first_step - 1
            record.log({"step": step, **evaluation.evaluate(step)})
        if settings.run.eval_only:
            return record.finish_evaluation()

        prompts = rollout.PromptStream(run, settings.rollout)
        for step in range(run.first_step, settings.run.steps + 1):
            clock = record.start_step(step)

            with clock.stage("rollout"):
                asked = prompts.take_step()
                samples = rollout.generate(engine, asked, run.data, settings.rollout, answer=answer)

            with clock.stage("reward"):
                reward.compute_rewards(samples, judge)
                samples = rollout.replace_uninformative(  # with --dynamic-sampling
                    samples, engine, prompts, judge, run.data, settings, answer=answer
                )
                engine.release_memory()  # on a GPU; send_weights takes it back
                samples = rollout.all_gather(samples, run.group)  # every rank has the whole batch
                samples = record.save_or_load(step, samples)  # --save-rollouts, --load-rollouts
                samples, discarded = rollout.split_discarded(samples)

            with clock.stage("train"):
                metrics = {}
                if run.trains:
                    batches = train_step.pack(trainer, samples)  # they refer to the samples
                    train_step.add_logprobs(trainer, batches, settings.loss)
                    longest = settings.rollout.max_response_tokens
                    reward.add_advantages(samples, settings.reward, settings.loss, longest)
                    metrics = train_step.update_policy(trainer, batches, settings.loss)

            with clock.stage("sync"):
                verify = settings.run.check_sync or step == settings.run.steps
                sent = weight_sync.send_weights(weights, engine, version=step, verify=verify)

            ended = record.end_step(step, clock, samples, engine, judge)
            metrics |= discarded | ended | sent
            if run.evaluates_after(step):
                metrics |= evaluation.evaluate(step)
            record.log({"step": step, **metrics})
            if record.checkpoint_due(step):
                checkpoint.save(run, trainer, step=step, rank_state=prompts.state())
            if record.stopping:
                return record.finish()
    export.write_folders(run, weights)
    record.finish()


if __name__ == "__main__":
    run_main(lambda: main(settings))
