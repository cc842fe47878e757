"""A prompt that several samples share is computed once, and nothing that is learned changes by it.

Why: the trainer packs such a prompt once and lets each response attend to it. A mask or a position
that is wrong by one would train on other log-probs than the engine sampled by, and the curve would
only be a little worse. Log-probs against transformers, at every layout and family, are in
test_layouts.py. Not covered: Transformer Engine, which gets whole samples; every algorithm, as
none sees how its samples are packed.
"""

from unittest import mock

import pytest
import torch
from conftest import ROOT

import train_step
from backends.huggingface.config import read_config
from backends.megatron import batches
from backends.routed_experts import sparse_layers
from common.settings import TrainSettings
from data.sample import Sample
from losses import LossSettings

TOY, GLM = str(ROOT / "toy"), str(ROOT / "toy" / "glm")
CPU = torch.device("cpu")


def sample(prompt: list[int], response: list[int], **more) -> Sample:
    n = len(response)
    fields = dict(response_ids=response, rollout_logprobs=[-1.0] * n, loss_mask=[1] * n)
    return Sample(prompt, **fields, advantages=[1.0] * n, **more)


def collate(samples: list[Sample]) -> batches.MicroBatch:
    starts = [sum(len(s.response_ids) for s in samples[:i]) for i in range(len(samples))]
    return batches.collate(samples, starts, device=CPU, by_position=True, share_prompts=True)


# --- packing --------------------------------------------------------------------------------------


def test_by_hand():
    batch = collate([sample([5, 6], [7, 8]), sample([5, 6], [9])])
    assert batch.tokens_T.tolist() == [5, 6, 7, 8, 6, 9]
    # Token 6 predicts the first token of both responses, so each has it.
    assert batch.labels_T.tolist() == [5, 7, 8, 8, 9, 9]
    assert batch.mask_T.tolist() == [0, 1, 1, 0, 1, 0]
    assert batch.response_index_T.tolist() == [-1, 0, 1, -1, 2, -1]
    assert batch.sample_T.tolist() == [0, 0, 0, 0, 1, 1]
    assert batch.packed.position_T.tolist() == [0, 1, 2, 3, 1, 2]
    assert batch.packed.cu_seqlens_q.tolist() == [0, 1, 4, 6]
    assert batch.packed.prompt_of == [0, 0]


def test_other_samples_stay_whole():
    """Those whose prompt is no other sample's, or has nothing before its last token."""
    batch = collate([sample([5, 6, 7], [8]), sample([9], [3]), sample([9], [4])])
    assert batch.tokens_T.tolist() == [5, 6, 7, 8, 9, 3, 9, 4]
    assert batch.packed.prompt_of == []


def test_samples_stay_whole_where_little_is_saved():
    """Of 200 tokens one. The mask of two responses would have 20,000 elements."""
    batch = collate([sample([5, 6], [7] * 98), sample([5, 6], [8] * 98)])
    assert batch.packed.prompt_of == []


def test_neighbours_are_of_about_one_length():
    """By classes of prompts, then by responses: few calls of attention, with little padding."""
    samples = [sample([5] * p, [7] * n) for p in (8, 9, 40) for n in (4, 3, 4)]
    packed = collate(samples).packed
    lengths = packed.cu_seqlens_q.diff().tolist()
    assert lengths == [39, 8, 7, 5, 5, 4, 5, 5, 5, 5, 4, 4]
    assert [lengths[i] for i in packed.prompt_of] == [39, 39, 39, 7, 7, 8, 8, 7, 8]


def test_filler_stands_before_the_responses():
    """prompt_of counts the last sequences."""
    samples = [sample([5, 6], [7]), sample([5, 6], [8])]
    batch = batches.collate(samples, [0, 1], tp=4, device=CPU, by_position=True, share_prompts=True)
    assert batch.tokens_T.tolist() == [5, 0, 0, 0, 6, 7, 6, 8]
    assert batch.is_filler_T.tolist() == [False, True, True, True] + [False] * 4


# --- what is computed -----------------------------------------------------------------------------


def build(folder: str, **settings) -> train_step.Trainer:
    settings = TrainSettings(train_dtype="fp32", **settings)
    asked = dict(steps=4, seed=1, temperature=1.0, max_response_tokens=8)
    return train_step.build_trainer(folder, settings, read_config(folder), **asked)


def ragged(n_prompts: int = 6) -> list[Sample]:
    """Return groups of 5 samples; prompts of 2 to 42 tokens and responses of 0 to 40.

    The first prompt is too short to be shared.
    """
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(3, 15, (length,), generator=generator).tolist()

    samples = []
    for group in range(n_prompts):
        prompt = ids(2 + 8 * group)
        for i in range(5):
            advantage = float(i - 2)
            one = sample(prompt, ids((7 * i + 5 * group) % 41), group=group, index=i)
            one.advantages = [advantage] * len(one.response_ids)
            samples.append(one)
    return samples


def log_probs_and_gradient(trainer, samples: list[Sample], *, share: bool) -> tuple:
    """Return (tokens of the micro-batch, log-probs of all responses, gradient of every weight).

    share: else samples are whole, and Megatron counts positions itself.
    """
    stock = batches.collate

    def collate(*args, **more):
        return stock(*args, **{**more, "by_position": share, "share_prompts": share})

    with mock.patch.object(batches, "collate", collate):
        (batch,) = train_step.pack(trainer, samples)
    train_step.add_logprobs(trainer, [batch])
    logprobs = torch.cat([torch.as_tensor(s.old_logprobs) for s in samples])
    train_step.backward(trainer, batch, LossSettings())
    gradient = torch.cat([p.main_grad.flatten() for p in trainer.gpt.parameters()])
    return sum(len(one.tokens_T) for one in batch.microbatches), logprobs, gradient.clone()


@pytest.mark.parametrize("folder", [TOY, GLM], ids=["dense", "mixture"])
def test_log_probs_and_gradients_are_those_of_whole_samples(fresh_megatron, folder):
    trainer, samples = build(folder), ragged()
    tokens, expected, expected_gradient = log_probs_and_gradient(trainer, samples, share=False)
    fewer_tokens, got, gradient = log_probs_and_gradient(trainer, samples, share=True)
    assert fewer_tokens < 0.75 * tokens
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
    assert (gradient - expected_gradient).norm() < 1e-5 * expected_gradient.norm()
    assert expected_gradient.norm() > 0


def test_a_step_shares_prompts_by_itself(fresh_megatron):
    (batch,) = train_step.pack(build(TOY), ragged())
    assert sum(len(one.packed.prompt_of) for one in batch.microbatches) == 25


@pytest.mark.parametrize(
    "settings",
    [
        dict(routing_replay="compare"),
        dict(megatron=("moe_router_bias_update_rate=0.001",)),
        dict(
            megatron=("moe_router_load_balancing_type=aux_loss", "moe_aux_loss_coeff=0.5"),
        ),
    ],
    ids=["routing replay", "correction bias", "auxiliary loss"],
)
def test_where_routers_count_tokens_every_sample_has_its_own(fresh_megatron, settings):
    """A prompt that were computed once would count once, and not once for each sample."""
    trainer, samples = build(GLM, **settings), ragged()
    for one in samples if trainer.replay else ():
        tokens = len(one.prompt_ids) + len(one.response_ids) - 1
        one.routed_experts = bytes([0, 1] * tokens * len(sparse_layers(trainer.config)))
    (batch,) = train_step.pack(trainer, samples)
    assert not any(one.packed.prompt_of for one in batch.microbatches)
