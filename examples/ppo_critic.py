"""PPO with a learned critic: a fork of loop_sync.py.

An answer is compared with what a second model expected of it, not with other answers.

    python examples/ppo_critic.py                               the toy, on one CPU core or one GPU
    torchrun --nproc-per-node 2 examples/ppo_critic.py --tp 2   two ranks, tensor parallel

                   critic             GAE                              critic: clipped value loss,
    samples with ----------> values -------+--> returns -------------> --critic-epochs times
    rewards                                +--> advantages ----------> policy: clipped loss, once

How it differs from loop_sync.py:
    the critic     a second trainer of the same folder and layout, whose output layer is a
                   ValueHead: at each token one number, the return it expects
    advantages     generalized advantage estimation over each response (arXiv 1506.02438), whitened
                   over the tokens of the global batch
    a step         trains the critic on the returns, then the policy on the advantages; in the first
                   --critic-warmup-steps the critic only
    groups         are not used: --samples-per-prompt says how often a prompt is answered, and flags
                   that compare the answers of a group are refused
    the memory     that is checked before the start is that of one trainer, and here are two
    the record     has four more metrics, see critic_step; the critic is neither exported nor saved,
                   and a checkpoint without it would be none: so there are none

Held-out reward of the toy after `--steps 40` on one CPU rank, seeds 1, 2, 3: 0.869, 0.869, 0.867;
of loop_sync.py 0.881, 0.885, 0.848. The critic has no part in that yet. It learns how often answers
are right, not which: explained_variance stays near 0. The prompts are about equally hard, and to
see that a digit is wrong is to do the sum. tests/test_ppo_critic.py shows it learn what can be
seen.

Position t predicts token t + 1 in both models. What the critic says there, having seen the tokens
up to t, is the value of the state in which that token is chosen. So values, like log-probs, belong
to response tokens, and go back to their samples the same way.

Shape letters: T packed tokens of a micro-batch, C those that count, R response tokens of all
samples, L those of one response, H hidden size.
"""

import dataclasses
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.errors import all_problems
from common.settings import RolloutSettings, RunSettings, SyncSettings, TrainSettings
from harness import checks, flags
from losses import LossSettings
from reward import RewardSettings


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
    """Refuse what cannot work, and flags that would do nothing here."""
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
    if settings.run.max_epochs:
        given = f"--max-epochs {settings.run.max_epochs}"
        yield f"{given}: this example's schedules count --steps: leave it out, and give that"
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
    if settings.train.lora_rank:
        yield "--lora-rank: the critic would have adapters too, at a rate for weights: leave it out"
    if settings.loss.kl_coef and settings.loss.kl_in == "reward":
        yield "--kl-in reward is not part of this example: use --kl-in loss"


# A wrong flag is refused here: the imports below take half a minute.
if __name__ == "__main__":
    settings = flags.parse_or_exit(Settings, checks.check_flags, check_critic_flags)

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import reward
import rollout
import train_step
import weight_sync
from advantages import gae, overlong_penalty, whiten
from backends.megatron.balancing import without_balancing
from backends.megatron.batches import Batch, give_to_samples
from backends.megatron.optimizer import gradient_norm
from data.sample import Sample, per_token_field
from harness import evaluate, export, start
from harness.exits import run_main
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from train_step import Trainer


@dataclass
class CriticSample(Sample):
    """A sample with what the critic says of it; the trainers get both as float32 [T]."""

    values: Sequence[float] = per_token_field()
    """By the critic, before it learns from the batch."""
    returns: Sequence[float] = per_token_field()


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
def add_values(critic: Trainer, batches: list[Batch]) -> None:
    """Set every sample's values, float32 [L], on every rank, by a forward pass. Collective.

    They are those of the critic before it learns from the batch.
    """

    def loss_function(microbatch, output_T1):
        values_T = output_T1[:, 0].float()
        return output_T1.sum() * 0, torch.tensor(0, dtype=torch.int), {"values": values_T}

    for batch in batches:
        reports = train_step.run_schedule(
            critic, batch.microbatches, loss_function, forward_only=True
        )
        give_to_samples(critic, batch, [report["values"] for report in reports], "values")


def add_advantages(
    samples: list[CriticSample],
    settings: CriticSettings,
    *,
    overlong_buffer: int,
    max_response_tokens: int,
) -> None:
    """Set every sample's returns and advantages, float64 [L], from rewards and values.

    The whole batch counts; every rank computes the same.

    The reward stands at the last token that counts. The judge has masked samples without a reward;
    they get advantages 0.
    """
    for sample in samples:
        length = len(sample.response_ids)
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


def critic_backward(critic: Trainer, batch: Batch, *, value_clip: float) -> tuple[float, float]:
    """Compute the gradient of the value loss, into the critic's buffers. Collective.

    Returns (sum of the loss, tokens it is over), equal on every rank.
    """
    batch.read_samples()

    def loss_function(microbatch, output_T1):
        # Only what counts is looked at, so that nothing else can spoil the batch: 0 times infinity
        # is not 0.
        counts_T = microbatch.mask_T > 0
        old_values_C = microbatch.per_token["values"][counts_T]
        returns_C = microbatch.per_token["returns"][counts_T]
        values_C = output_T1[counts_T, 0].float()
        loss = value_loss(values_C, old_values_C, returns_C, value_clip=value_clip).sum()
        tokens = counts_T.sum()
        return loss, tokens.int(), {"sums": torch.stack([loss.detach().double(), tokens.double()])}

    critic.ddp.zero_grad_buffer()
    critic.optimizer.zero_grad()
    reports = train_step.run_schedule(critic, batch.microbatches, loss_function, forward_only=False)
    sums = torch.stack([report["sums"] for report in reports]).sum(0)
    dist.all_reduce(sums, group=critic.dp_cp_group)
    return tuple(sums.tolist())


def critic_step(
    critic: Trainer, batches: list[Batch], settings: CriticSettings
) -> dict[str, float]:
    """Make in every epoch an optimizer step of the critic on each mini-batch. Collective.

    Returns metrics that are equal on every rank:

        critic_loss          mean over the tokens that count, and over the epochs
        critic_grad_norm     global, before clipping; mean over the optimizer steps
        value                mean of the values before the step
        explained_variance   1 - var(returns - values) / var(returns): 1 if the critic knew them, 0
                             if it did no better than a constant; 0 if they are all equal

    The samples have values and returns. Where none of their tokens counts, nothing changes, and
    there are no metrics. Raises RuntimeError on every rank when loss or gradient are not finite;
    the weights are then those of before that optimizer step.
    """
    loss, tokens, grad_norms = 0.0, 0.0, []
    for batch in settings.critic_epochs * [batch for batch in batches if batch.has_tokens]:
        batch_loss, batch_tokens = critic_backward(critic, batch, value_clip=settings.value_clip)
        grad_norms.append(gradient_norm(critic.optimizer))
        if not np.isfinite(batch_loss) or not np.isfinite(grad_norms[-1]):
            mean, norm = batch_loss / batch_tokens, grad_norms[-1]
            raise RuntimeError(
                f"step {critic.scheduler.num_steps + 1}: the critic has loss {mean} and gradient "
                f"norm {norm}; its weights are as before this optimizer step"
            )
        critic.optimizer.step()
        loss, tokens = loss + batch_loss, tokens + batch_tokens
    critic.scheduler.step(1)
    if not tokens:
        return {}
    samples = [sample for batch in batches for sample in batch.samples]
    counts_R = joined(samples, "loss_mask") > 0
    values_C, returns_C = (joined(samples, name)[counts_R] for name in ("values", "returns"))
    explained = 1 - (returns_C - values_C).var() / returns_C.var() if returns_C.var() > 0 else 0.0
    metrics = {"critic_loss": loss / tokens, "critic_grad_norm": sum(grad_norms) / len(grad_norms)}
    return metrics | {"value": float(values_C.mean()), "explained_variance": float(explained)}


def joined(samples: list[Sample], field: str) -> np.ndarray:
    """Return a field of every response token, one sample after the other: float64 [R]."""
    return np.concatenate([np.asarray(getattr(sample, field), np.float64) for sample in samples])


# --- the loop -----------------------------------------------------------------------------------


def main(settings: Settings) -> None:
    train(start.prepare(settings, loop="ppo-critic"))


def build_models(run: start.Run) -> tuple[Trainer, Trainer]:
    """Build policy and critic, two trainers of one layout. Collective."""
    settings, critic = run.settings, run.settings.critic
    common = dict(
        seed=settings.run.seed,
        temperature=settings.rollout.temperature,
        max_response_tokens=settings.rollout.max_response_tokens,
    )
    policy_steps = settings.run.steps - critic.critic_warmup_steps
    trainer = train_step.build_trainer(
        run.model,
        settings.train,
        run.config,
        steps=policy_steps,
        with_reference=settings.loss.kl_coef > 0,
        fp8=run.fp8,
        **common,
    )
    constant = dict(lr=critic.critic_lr, lr_schedule="constant", lr_warmup_steps=0, min_lr=0.0)
    critic_train = dataclasses.replace(without_balancing(settings.train), **constant)
    steps = settings.run.steps
    return trainer, train_step.build_trainer(
        run.model, critic_train, run.config, steps=steps, head=ValueHead, fp8=run.fp8, **common
    )


def train(run: start.Run) -> None:
    settings, record = run.settings, run.record
    trainer, critic = build_models(run)
    weights = weight_sync.open_path(run, trainer)
    engine = rollout.start_engine(run, settings.rollout)  # it has no weights yet
    judge = reward.Judge(run.reward, settings.reward.judges, settings.reward.judge_timeout_s)

    with engine, record:
        weight_sync.send_weights(weights, engine, version=0, verify=True)
        evaluation = evaluate.Evaluation(run, engine, judge)
        record.log({"step": 0, **evaluation.evaluate(0)})
        if settings.run.eval_only:
            return record.finish_evaluation()

        prompts = rollout.PromptStream(run, settings.rollout)
        for step in range(1, settings.run.steps + 1):
            clock = record.start_step(step)

            with clock.stage("rollout"):
                asked = prompts.take_step()
                samples = rollout.generate(engine, asked, run.data, settings.rollout)

            with clock.stage("reward"):
                reward.compute_rewards(samples, judge)
                engine.release_memory()  # on a GPU; send_weights takes it back
                samples = rollout.all_gather(samples, run.group)  # every rank has the whole batch
                samples = [CriticSample(**vars(sample)) for sample in samples]

            with clock.stage("train"):
                batches = train_step.pack(trainer, samples)  # the critic has the same layout
                train_step.add_logprobs(trainer, batches, settings.loss)
                add_values(critic, batches)
                longest = settings.rollout.max_response_tokens
                limits = dict(
                    max_response_tokens=longest, overlong_buffer=settings.reward.overlong_buffer
                )
                add_advantages(samples, settings.critic, **limits)
                metrics = critic_step(critic, batches, settings.critic)
                if step > settings.critic.critic_warmup_steps:
                    metrics |= train_step.update_policy(trainer, batches, settings.loss)

            with clock.stage("sync"):
                verify = settings.run.check_sync or step == settings.run.steps
                sent = weight_sync.send_weights(weights, engine, version=step, verify=verify)

            metrics |= record.end_step(step, clock, samples, engine, judge) | sent
            if run.evaluates_after(step):
                metrics |= evaluation.evaluate(step)
            record.log({"step": step, **metrics})
            if record.stopping:
                raise KeyboardInterrupt  # SIGTERM ends this run as Ctrl-C does, after the step
    export.write_folders(run, weights)
    record.finish()


if __name__ == "__main__":
    run_main(lambda: main(settings))
