"""A field that Sample declares per response token reaches the loss, and nothing else names it.

Why: a forker adds a teacher's log-probs in one place. Not covered: several ranks, where
test_layouts.py compares whole steps.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from backends.megatron.batches import pack_batch
from common.settings import TrainSettings
from data.sample import Sample, per_token_field


@dataclass
class Taught(Sample):
    teacher_logprobs: list[float] = per_token_field()


def packed(*samples: Sample):
    alone = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    config = SimpleNamespace(fp8=None)
    gpt = SimpleNamespace(parameters=lambda: iter([torch.zeros(1)]), config=config)
    groups = dict(dp_group=alone, cp_group=alone)
    trainer = SimpleNamespace(settings=TrainSettings(), gpt=gpt, replay=None, **groups)
    return pack_batch(trainer, list(samples))


def test_a_declared_field_reaches_the_micro_batch():
    """Two samples share a micro-batch. The first token of an answer is predicted one before it."""
    first = Taught([5, 6], response_ids=[7, 8], loss_mask=[1, 1], teacher_logprobs=[-0.5, -2.0])
    second = Taught([9], response_ids=[3], loss_mask=[0], teacher_logprobs=[-1.0])
    batch = packed(first, second)
    batch.read_samples()
    [microbatch] = batch.microbatches
    tokens, values = microbatch.tokens_T.tolist(), microbatch.per_token["teacher_logprobs"].tolist()
    assert tokens[:6] == [5, 6, 7, 8, 9, 3]
    assert values[:6] == [0, -0.5, -2.0, 0, -1.0, 0]
    assert not any(values[6:])  # filler


def test_a_field_that_no_sample_has_yet_is_zero():
    batch = packed(Taught([5, 6], response_ids=[7, 8], loss_mask=[1, 1]))
    batch.read_samples()
    assert not batch.microbatches[0].per_token["teacher_logprobs"].any()


def test_a_field_of_another_length_is_refused():
    sample = Taught([5], response_ids=[7, 8], loss_mask=[1, 1], teacher_logprobs=[-1.0], group=3)
    with pytest.raises(
        ValueError, match="sample 0 of group 3: teacher_logprobs has 1 values for 2"
    ):
        packed(sample).read_samples()


def test_a_loss_mask_that_changed_after_packing_is_refused():
    """The micro-batches hold the old mask. Here as many tokens count as before, but another one."""
    sample = Taught([5], response_ids=[7, 8], loss_mask=[1, 0])
    batch = packed(sample)
    sample.loss_mask = [0, 1]
    with pytest.raises(ValueError, match="a loss mask has changed since pack()"):
        batch.read_samples()
