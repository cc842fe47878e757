"""PPO with a learned critic: loop_sync.py, except that an answer is compared with what a second
model expected of it, not with other answers.

    python examples/ppo_critic.py                                    the toy, on one CPU core or one GPU
    torchrun --nproc-per-node 2 examples/ppo_critic.py --tp 2        two ranks, tensor parallel

                   critic             GAE
    samples with ----------> values -------+--> returns -----> critic: clipped value loss, --critic-epochs times over the batch
    rewards                                +--> advantages --> policy: clipped policy loss, once

How it differs from loop_sync.py, in the order of `diff loop_sync.py examples/ppo_critic.py`:
    the critic     a second trainer of the same folder and layout, whose output layer is a ValueHead: at each token one number, the return it expects
    advantages     generalized advantage estimation over each response (arXiv 1506.02438), whitened over the tokens of the global batch
    a step         trains the critic on the returns, then the policy on the advantages; in the first --critic-warmup-steps the critic only
    groups         are not used: --samples-per-prompt says how often a prompt is answered, and flags that compare the answers of a group are refused
    the record     has four more metrics, see critic_step; the critic is neither exported nor saved, and without it a checkpoint would be none: there are none

Held-out reward of the toy after `--steps 40` on one CPU rank, seeds 1, 2, 3: 0.869, 0.869, 0.867;
of loop_sync.py 0.881, 0.885, 0.848. The critic has no part in that yet. It learns how often answers
are right, not which: explained_variance stays near 0, because the prompts are about equally hard,
and to see that a digit is wrong is to do the sum. tests/test_ppo_critic.py shows it learn what can
be seen.

Position t predicts token t + 1 in both models: what the critic says there, having seen the tokens
up to t, is the value of the state in which that token is chosen. So values, like log-probs, belong
to response tokens, and go back to their samples the same way. Samples get two more fields, values
and returns, once they are on all ranks: JSON would not bring those along.

Shape letters: T packed tokens of a micro-batch, C those that count, R response tokens of all
samples, L those of one response, H hidden size.
"""

import contextlib
import dataclasses
import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.errors import ProblemList, all_problems
from common.settings import (
    RewardSettings,
    RolloutSettings,
    RunSettings,
    SyncSettings,
    TrainSettings,
)
from harness import checks, flags
from losses import LossSettings


@dataclass(frozen=True)
class CriticSettings:
    """The critic, and how its values become advantages."""

    critic_lr: float = 3e-4
    """Learning rate of the critic, constant.

    Its other optimizer settings, and its layout, are those of the policy.
    """
    critic_epochs: int = 2
    """How often the critic goes over each batch.

    It starts from knowing nothing about rewards; the policy goes over it once.
    """
    critic_warmup_steps: int = 2
    """Steps at the start that train the critic only: at first all values are 0, which is no
    baseline.
    """
    value_clip: float = 0.2
    """A value that has come nearer to its return by more than this within a step gains nothing by
    going on; 0: no clip.
    """
    gamma: float = 1.0
    """Discount per token. 1: an answer is worth the same however long it is."""
    lam: float = 1.0
    """GAE's lambda. 1: an advantage is the reward less the value; below: values on the way stand in
    for part of it, with less variance and their errors.
    """


@dataclass(frozen=True)
class Settings:
    run: RunSettings = RunSettings()
    rollout: RolloutSettings = RolloutSettings()
    reward: RewardSettings = RewardSettings()
    train: TrainSettings = TrainSettings()
    loss: LossSettings = LossSettings()
    sync: SyncSettings = SyncSettings()
    critic: CriticSettings = CriticSettings()


@all_problems
def check_critic_flags(settings: Settings) -> None:
    """What cannot work, and flags that would do nothing here, before anything is started."""
    if settings.run.debug_rollout_only or settings.run.load_rollouts or settings.run.save_rollouts:
        yield (
            "--debug-rollout-only, --load-rollouts and --save-rollouts are not part of this"
            " example: leave them out"
        )
    critic, steps = settings.critic, settings.run.steps
    if settings.run.save_every or settings.run.resume:
        yield (
            "--save-every and --resume: a checkpoint has one trainer, and this example has two:"
            " leave them out"
        )
    if not 0 <= critic.critic_lr < math.inf:
        yield f"--critic-lr {critic.critic_lr} must be finite and must not be negative"
    if not critic.value_clip >= 0:
        yield f"--value-clip {critic.value_clip} must not be negative"
    if critic.critic_epochs < 1:
        yield f"--critic-epochs {critic.critic_epochs} must be at least 1"
    if not 0 < critic.gamma <= 1:
        yield f"--gamma {critic.gamma} must lie in (0, 1]"
    if not 0 <= critic.lam <= 1:
        yield f"--lam {critic.lam} must lie in [0, 1]"
    if not 0 <= critic.critic_warmup_steps < steps:
        yield (
            f"--critic-warmup-steps {critic.critic_warmup_steps} must be smaller than --steps"
            f" {steps}, or the policy is never trained"
        )
    elif not settings.train.lr_warmup_steps < (left := steps - critic.critic_warmup_steps):
        rule = f"must be smaller than --steps less --critic-warmup-steps, {left}"
        yield f"--lr-warmup-steps {settings.train.lr_warmup_steps} {rule}"
    if settings.train.pp != 1:
        yield (
            f"--pp {settings.train.pp}: only the last stage would know the critic's loss; use --pp"
            " 1, and --tp or --cp to split the models"
        )
    if settings.reward.advantage != RewardSettings().advantage or settings.reward.dynamic_sampling:
        yield (
            "--advantage and --dynamic-sampling compare the answers of a group, which a critic"
            " makes unnecessary: leave them out"
        )
    if settings.loss.kl_coef and settings.loss.kl_in == "reward":
        yield "--kl-in reward is not part of this example: use --kl-in loss"


# The imports below take half a minute: what is wrong with a flag is said before them.
if __name__ == "__main__":
    settings = flags.parse_or_exit(Settings, checks.check_flags, check_critic_flags)

from advantages import gae, overlong_penalty, whiten
from backends.huggingface import folder as hf_folder
from backends.huggingface.config import read_config
from backends.megatron import batches
from common import distributed, process_groups
from common.timeline import Stopwatch
from data.prompts import check_held_out, load_data
from data.sample import Sample
from harness import exits, export as hf_export
from harness.record import Record
import reward
import rollout
import train_step
from train_step import Trainer
import weight_sync
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

# --- the critic ---------------------------------------------------------------------------------


class ValueHead(torch.nn.Module):
    """hidden [T, 1, H] -> value [T, 1, 1], called as Megatron calls its output layer.

    Values start at 0: what has learned nothing adds no noise.
    """

    def __init__(self, config):
        super().__init__()
        self.weight = torch.nn.Parameter(
            torch.zeros(
                1, config.hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device()
            )
        )
        self.sequence_parallel = config.sequence_parallel

    def forward(self, hidden_T1H, weight=None, runtime_gather_output=None):
        if self.sequence_parallel:
            # Every tensor-parallel rank computes all values and the whole loss. The gradient is
            # whole on each, of the weight and of hidden, and must not be summed over them:
            # tensor_parallel_output_grad=False hands each rank its part of the sequence instead.
            hidden_T1H = gather_from_sequence_parallel_region(
                hidden_T1H, tensor_parallel_output_grad=False
            )
        return F.linear(hidden_T1H, self.weight), None


@torch.no_grad()
def score_values(critic: Trainer, samples: list[Sample]) -> None:
    """Set every sample's values, float32 [L], on every rank: those of the critic before it learns
    from the batch. A forward pass. Collective.
    """

    def loss_function(batch, output_T1):
        return (
            output_T1.sum() * 0,
            torch.tensor(0, dtype=torch.int),
            {"values": output_T1[:, 0].float()},
        )

    microbatches = batches.local_microbatches(critic, samples)
    reports = train_step.run_schedule(critic, microbatches, loss_function, forward_only=True)
    batches.give_to_samples(
        critic, samples, microbatches, [report["values"] for report in reports], "values"
    )


def compute_advantages(
    samples: list[Sample],
    settings: CriticSettings,
    *,
    overlong_buffer: int,
    max_response_tokens: int,
) -> None:
    """Set every sample's returns and advantages, float64 [L], from rewards and values of the whole
    batch; every rank computes the same.

    The reward stands at the last token that counts. Samples without a reward get advantages 0 and
    an all-zero loss mask.
    """
    for sample in samples:
        length = len(sample.response_ids)
        if sample.reward is None:
            sample.loss_mask = [0] * length
        mask_L, rewards_L = np.array(sample.loss_mask), np.zeros(length)
        if mask_L.any():
            rewards_L[np.flatnonzero(mask_L)[-1]] = sample.reward + overlong_penalty(
                length, max_tokens=max_response_tokens, buffer=overlong_buffer
            )
        sample.advantages, sample.returns = gae(
            rewards_L, sample.values, mask_L, gamma=settings.gamma, lam=settings.lam
        )
    # After the returns are taken: the critic learns rewards, not multiples of their deviation.
    white_R = whiten(joined(samples, "advantages"), joined(samples, "loss_mask"))
    for sample, mine in zip(
        samples, np.split(white_R, np.cumsum([len(sample.response_ids) for sample in samples])[:-1])
    ):
        sample.advantages = mine


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, *, value_clip: float
) -> torch.Tensor:
    """PPO's clipped value loss of each token, as in OpenAI's baselines (the paper has the unclipped
    one):

        loss = max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) / 2

    The maximum is pessimistic, as in the policy loss: a value that has come nearer to its return by
    more than c gains nothing by that; one that has gone away pays in full. value_clip 0: no clip.
    """
    loss = (values - returns).square()
    if value_clip:
        clipped = torch.clamp(values, old_values - value_clip, old_values + value_clip)
        loss = torch.maximum(loss, (clipped - returns).square())
    return loss / 2


def critic_backward(
    critic: Trainer, samples: list[Sample], *, value_clip: float
) -> tuple[float, float]:
    """Gradient of the value loss of these samples, into the critic's buffers; returns (sum of the
    loss, tokens it is over), equal on every rank. Collective.
    """
    device = next(critic.gpt.parameters()).device
    old_values_R, returns_R = (
        torch.from_numpy(joined(samples, name)).to(device, torch.float32)
        for name in ("values", "returns")
    )

    def loss_function(batch, output_T1):
        # Only what counts is looked at, so that nothing else can spoil the batch: 0 times infinity
        # is not 0.
        counts_T = batch.mask_T > 0
        values_C, place_C = output_T1[counts_T, 0].float(), batch.response_index_T[counts_T]
        loss = value_loss(
            values_C, old_values_R[place_C], returns_R[place_C], value_clip=value_clip
        ).sum()
        tokens = counts_T.sum()
        return loss, tokens.int(), {"sums": torch.stack([loss.detach().double(), tokens.double()])}

    critic.ddp.zero_grad_buffer()
    critic.optimizer.zero_grad()
    reports = train_step.run_schedule(
        critic, batches.local_microbatches(critic, samples), loss_function, forward_only=False
    )
    sums = torch.stack([report["sums"] for report in reports]).sum(0)
    dist.all_reduce(sums, group=critic.dp_cp_group)
    return tuple(sums.tolist())


def critic_step(
    critic: Trainer, samples: list[Sample], settings: CriticSettings
) -> dict[str, float]:
    """In every epoch an optimizer step of the critic on each mini-batch; returns metrics that are
    equal on every rank. Collective.

        critic_loss          mean over the tokens that count, and over the epochs
        critic_grad_norm     global, before clipping; mean over the optimizer steps
        value                mean of the values before the step
        explained_variance   1 - var(returns - values) / var(returns): 1 if the critic knew them, 0 if it did no better than a constant; 0 if they are all equal

    samples: with values and returns; where none of their tokens counts, nothing changes, and there
    are no metrics. Raises RuntimeError on every rank when loss or gradient are not finite; the
    weights are then those of before that optimizer step.
    """
    loss, tokens, grad_norms = 0.0, 0.0, []
    for part in settings.critic_epochs * train_step.minibatches(critic, samples):
        part_loss, part_tokens = critic_backward(critic, part, value_clip=settings.value_clip)
        grad_norms.append(train_step.gradient_norm(critic))
        if not np.isfinite(part_loss) or not np.isfinite(grad_norms[-1]):
            found = (
                f"the critic has loss {part_loss / part_tokens} and gradient norm {grad_norms[-1]}"
            )
            raise RuntimeError(
                f"step {critic.scheduler.num_steps + 1}: {found}; its weights are as before this"
                " optimizer step"
            )
        critic.optimizer.step()
        loss, tokens = loss + part_loss, tokens + part_tokens
    critic.scheduler.step(1)
    if not tokens:
        return {}
    counts_R = joined(samples, "loss_mask") > 0
    values_C, returns_C = (joined(samples, name)[counts_R] for name in ("values", "returns"))
    explained = 1 - (returns_C - values_C).var() / returns_C.var() if returns_C.var() > 0 else 0.0
    metrics = {"critic_loss": loss / tokens, "critic_grad_norm": sum(grad_norms) / len(grad_norms)}
    return metrics | {"value": float(values_C.mean()), "explained_variance": float(explained)}


def joined(samples: list[Sample], field: str) -> np.ndarray:
    """A field of every response token, one sample after the other: float64 [R]."""
    return np.concatenate([np.asarray(getattr(sample, field), np.float64) for sample in samples])


# --- the loop -----------------------------------------------------------------------------------


def main(settings: Settings) -> None:
    # What model, data and machine do not allow is found before anything is started, and said at
    # once.
    problems = ProblemList()
    model, seed, steps = settings.run.model, settings.run.seed, settings.run.steps
    config = problems.collect(read_config, model)
    policy_steps = steps - settings.critic.critic_warmup_steps
    data = problems.collect(
        load_data,
        model,
        settings.rollout,
        config,
        seed=seed,
        label_problems=reward.label_problems(settings.reward),
    )
    problems.collect(
        hf_folder.check_model_folder,
        model,
        config,
        data and data.tokenizer,
        stop=settings.rollout.stop,
    )
    problems.collect(check_held_out, settings.run, data and data.held_out)
    problems.collect(
        rollout.check_rollout_settings, settings.rollout, config, longest=data and data.longest
    )
    sizes = dict(world_size=checks.world_size(settings), longest=data and data.longest)
    problems.collect(train_step.check_train_settings, settings.train, config, **sizes)
    problems.raise_if_any()
    temperature, max_response_tokens = (
        settings.rollout.temperature,
        settings.rollout.max_response_tokens,
    )

    judged_by = reward.REWARDS[settings.reward.reward]
    wait_s = process_groups.longest_wait_s(
        settings, judged_by, rollout_ranks=checks.world_size(settings)
    )
    everyone = distributed.init_distributed(wait_s=wait_s)
    record = Record(settings, "ppo-critic", everyone)
    split = dict(engine_tp=settings.rollout.engine_tp, engine_ep=settings.rollout.engine_ep)
    fp8 = weight_sync.fp8_weights(config, rollout_dtype=settings.rollout.rollout_dtype, **split)
    record.say(weight_sync.describe(config, fp8))
    with_reference = settings.loss.kl_coef > 0
    trainer = train_step.build_trainer(
        model, settings.train, config, steps=policy_steps, seed=seed, with_reference=with_reference
    )
    critic_train = dataclasses.replace(
        settings.train,
        lr=settings.critic.critic_lr,
        lr_schedule="constant",
        lr_warmup_steps=0,
        min_lr=0.0,
    )
    critic = train_step.build_trainer(
        model, critic_train, config, steps=steps, seed=seed, head=ValueHead
    )
    weights = weight_sync.WeightPath(trainer, config, fp8, settings.sync.bucket_bytes)
    engine = rollout.start_engine(model, settings.rollout, config, seed=seed, longest=data.longest)
    judge = reward.Judge(judged_by, settings.reward.judges, settings.reward.judge_timeout_s)
    with engine or contextlib.nullcontext(), record:
        weight_sync.sync_weights(weights, engine, version=0, check=True)
        record.log(
            record.log_eval(0, *reward.evaluate(engine, data, settings.rollout, judge, everyone))
        )
        if settings.run.eval_only:
            return record.finish_evaluation()
        prompts = rollout.Prompts(data, settings.rollout)
        for step in range(1, steps + 1):
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
            samples = rollout.all_gather_samples(samples, everyone)
            reward_s = watch.lap("reward")

            rollout.release_memory(engine)  # on a GPU; the hand-off takes it back
            batch = train_step.add_logprobs(
                trainer, samples, settings.loss, temperature=temperature
            )  # log-probs of trainer and reference, where needed
            score_values(critic, batch)
            compute_advantages(
                batch,
                settings.critic,
                overlong_buffer=settings.reward.overlong_buffer,
                max_response_tokens=max_response_tokens,
            )
            metrics = critic_step(critic, batch, settings.critic)
            if step > settings.critic.critic_warmup_steps:
                metrics |= train_step.update_policy(
                    trainer,
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

            metrics |= reward.batch_metrics(samples, version=step - 1) | record.trace(
                watch, engine, judge
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
            if record.stopping:
                # SIGTERM ends this run as Ctrl-C does, at the end of the step
                raise KeyboardInterrupt
    hf_export.export_all(weights, record.exports(), source=model)
    record.finish()


if __name__ == "__main__":
    exits.run_main(lambda: main(settings))
