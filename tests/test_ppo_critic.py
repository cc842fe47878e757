"""examples/ppo_critic.py: the value loss and the advantages by hand, a critic that learns what
there is to see, and a short run on two ranks.

Not covered: that values and gradients are the same at every layout (the run shows only that tensor
parallelism works), learning of the toy, GPUs.
"""

import math
import sys

import numpy as np
import pytest
import torch
from common import distributed
from conftest import ROOT, metrics_of, start_main, torchrun

sys.path.insert(0, str(ROOT / "examples"))
import ppo_critic

from backends.huggingface.config import read_config
from common import errors
from ppo_critic import CriticSample, CriticSettings
from common.settings import TrainSettings
from train_step import build_trainer, pack


# --- by hand ------------------------------------------------------------------------------------


def test_the_value_loss_by_hand():
    # All values were 0 before the step and may move by 0.2; the returns are 1. A value of 0.1 is
    # inside: (0.1 - 1)^2 / 2. One of 0.5 is nearer to the return, but counts as 0.2: (0.2 - 1)^2 /
    # 2, without gradient. One of -0.5 went the wrong way and pays in full: (-0.5 - 1)^2 / 2.
    values = torch.tensor([0.1, 0.5, -0.5], requires_grad=True)
    loss = ppo_critic.value_loss(values, torch.zeros(3), torch.ones(3), value_clip=0.2)
    assert loss.tolist() == pytest.approx([0.405, 0.32, 1.125])
    loss.sum().backward()
    assert values.grad.tolist() == pytest.approx([-0.9, 0.0, -1.5])
    assert ppo_critic.value_loss(
        values, torch.zeros(3), torch.ones(3), value_clip=0.0
    ).tolist() == pytest.approx([0.405, 0.125, 1.125])


def test_returns_and_advantages_by_hand():
    """With gamma and lambda 1 every return is the reward; the advantages are what it exceeds the
    values by, whitened over the four tokens that count.
    """
    samples = [
        CriticSample(
            [5], response_ids=[7, 8, 9], loss_mask=[1, 1, 0], reward=1.0
        ),  # the last token is not the policy's own: the reward stands at the second
        CriticSample([5], response_ids=[7, 8], loss_mask=[1, 1], reward=0.0),
        CriticSample([5], response_ids=[7], loss_mask=[0], reward=None),  # its judge failed
    ]
    for sample, values in zip(samples, ([0.5, 0.75, 0.0], [0.5, 0.25], [0.5])):
        sample.values = values
    ppo_critic.add_advantages(samples, CriticSettings(), overlong_buffer=0, max_response_tokens=8)
    assert [sample.returns.tolist() for sample in samples] == [[1, 1, 0], [0, 0], [0]]
    assert samples[2].loss_mask == [0]
    # 0.5, 0.25, -0.5, -0.25: mean 0, variance 0.15625
    expected = np.array([0.5, 0.25, 0, -0.5, -0.25, 0]) / math.sqrt(0.15625)
    assert ppo_critic.joined(samples, "advantages") == pytest.approx(expected, rel=1e-6)


# --- the critic ---------------------------------------------------------------------------------


@pytest.fixture
def critic(fresh_megatron, models):
    settings = TrainSettings(train_dtype="fp32", lr=1e-3, lr_schedule="constant")
    return build_trainer(
        str(models["qwen3"]),
        settings,
        read_config(models["qwen3"]),
        steps=100,
        seed=1,
        temperature=1.0,
        max_response_tokens=8,
        head=ppo_critic.ValueHead,
    )


def answers() -> list[CriticSample]:
    """Eight answers of three tokens to one prompt; those that begin with a 7 are right."""
    return [
        CriticSample(
            [5, 6], response_ids=[7 + i % 2, 9, 10], loss_mask=[1, 1, 1], reward=1.0 - i % 2
        )
        for i in range(8)
    ]


def one_step(critic, samples, **settings) -> dict:
    settings = CriticSettings(**settings)
    batches = pack(critic, samples)
    ppo_critic.add_values(critic, batches)
    ppo_critic.add_advantages(samples, settings, overlong_buffer=0, max_response_tokens=8)
    return ppo_critic.critic_step(critic, batches, settings)


def test_a_value_is_that_of_the_state_before_its_token(critic):
    """With gamma 1/2 the returns of a right answer are 1/4, 1/2 and 1.

    Before the first token nobody can know, and the value is the mean of 1/4 and 0; from the second
    on the critic has seen it. A value that looked one token ahead would know at once; a return of
    the token before or after would be another number.
    """
    metrics = [one_step(critic, answers(), gamma=0.5, value_clip=0.0) for _ in range(40)]
    assert metrics[-1]["explained_variance"] > 0.9
    samples = answers()
    ppo_critic.add_values(critic, pack(critic, samples))
    for sample in samples:
        assert sample.values == pytest.approx([0.125, 0.5 * sample.reward, sample.reward], abs=0.05)


def test_metrics_by_hand(critic):
    """A critic that has learned nothing says 0 everywhere: half of the mean of 1/16, 1/4 and 1 over
    right answers and 0 over as many wrong ones, 7/64.
    """
    metrics = one_step(critic, answers(), gamma=0.5, critic_epochs=1)
    assert metrics["critic_loss"] == pytest.approx(7 / 64)
    assert metrics["value"] == metrics["explained_variance"] == 0


def test_a_loss_that_is_not_finite_leaves_the_critic_as_it_was(critic):
    samples = answers()
    one_step(critic, samples)
    before = [parameter.detach().clone() for parameter in critic.gpt.parameters()]
    samples[3].returns[1] = math.nan
    with pytest.raises(RuntimeError, match="step 2: the critic has loss nan"):
        ppo_critic.critic_step(critic, pack(critic, samples), CriticSettings())
    assert all(
        torch.equal(parameter, old) for parameter, old in zip(critic.gpt.parameters(), before)
    )


def test_a_batch_without_a_token_that_counts_changes_nothing(critic):
    """A judge that fails on a whole step does not end the run: there is nothing to learn, and the
    schedule goes on.
    """
    before = [parameter.detach().clone() for parameter in critic.gpt.parameters()]
    assert (
        one_step(critic, [CriticSample([5, 6], response_ids=[7], loss_mask=[0], reward=None)]) == {}
    )
    assert all(
        torch.equal(parameter, old) for parameter, old in zip(critic.gpt.parameters(), before)
    )
    assert critic.scheduler.num_steps == 1


# --- the loop -----------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments, message", [
    (["--value-clip", "-0.1"], "--value-clip -0.1 must not be negative"),
    (["--gamma", "0"], "--gamma 0.0 must lie in"),
    (["--lam", "1.5"], "--lam 1.5 must lie in"),
    (["--critic-epochs", "0"], "--critic-epochs 0"),
    (["--save-every", "1"], "leave them out"),
    (["--prompts", "a.jsonl", "--max-epochs", "2"], "--max-epochs 2: this example's schedules"),
    (["--critic-warmup-steps", "3"], "smaller than --steps 3"),
    (["--lr-warmup-steps", "1"], "--lr-warmup-steps 1 must be smaller than --steps less --critic-"),
    (["--pp", "2"], "use --pp 1"),
    (["--advantage", "rloo"], "leave them out"),
    (["--kl-coef", "0.1", "--kl-in", "reward"], "use --kl-in loss"),
    (["--lora-rank", "8"], "the critic would have adapters too"),
])  # fmt: skip
def test_bad_flags_stop_before_anything_starts(monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ppo_critic.py", "--steps", "3", *arguments])
    for name, value in dict(RANK=0, WORLD_SIZE=2, LOCAL_RANK=0).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(
        distributed, "init_distributed", lambda *_, **__: pytest.fail("a process group was started")
    )
    with pytest.raises(errors.BadInput, match=message):
        start_main(ppo_critic, ppo_critic.check_critic_flags)


@pytest.mark.complete
def test_a_run_on_two_ranks(tmp_path):
    """From another folder, tensor parallel, one warm-up step and two of both models."""
    flags = ["--steps", "3", "--eval-every", "3", "--eval-samples", "16", "--prompts-per-step", "4"]
    flags += ["--samples-per-prompt", "4", "--name", "a", "--export"]
    flags += ["--tp", "2", "--critic-warmup-steps", "1"]
    torchrun(ROOT / "examples" / "ppo_critic.py", *flags, ranks=2, cwd=tmp_path)
    start, *steps = metrics_of(tmp_path / "runs" / "a")
    assert start["step"] == 0
    assert [row["step"] for row in steps] == [1, 2, 3]
    for row in steps:
        assert all(math.isfinite(value) for value in row.values() if not isinstance(value, list))
        assert row["critic_loss"] > 0
        assert row["critic_grad_norm"] > 0
        assert row["explained_variance"] <= 1
    assert "grad_norm" not in steps[0]
    for row in steps[1:]:
        assert row["logprob_shift"] == 0.0
        assert row["grad_norm"] > 0
    assert steps[0]["value"] == 0.0
    assert len({row["value"] for row in steps}) == 3
