"""train_step.py without running a model: packing and settings. What the packed model computes is tested in test_layouts.py."""

import numpy as np
import pytest
import torch

import train_step
from hf_names import read_config
from rollout import Sample
from run import BadInput
from train_step import TrainSettings, check_train_settings, collate, plan_microbatches


def test_collate_by_hand():
    samples = [
        Sample([5, 6], response_ids=[7, 8], rollout_logprobs=[-0.5, -0.25], loss_mask=[1, 1], advantage=2.0),
        Sample([9], response_ids=[3], rollout_logprobs=[-1.0], loss_mask=[0], advantage=-1.0),
    ]
    batch = collate(samples, tp=4, device=torch.device("cpu"))
    assert batch.tokens_T.tolist() == [5, 6, 7, 8, 9, 3, 0, 0]  # two filler tokens make 8
    assert batch.labels_T.tolist() == [6, 7, 8, 8, 3, 3, 0, 0]
    assert batch.mask_T.tolist() == [0, 1, 1, 0, 0, 0, 0, 0]  # token 6 predicts 7, the first answer token; the second sample is masked
    assert batch.rollout_logprobs_T.tolist() == [0, -0.5, -0.25, 0, -1, 0, 0, 0]
    assert batch.advantages_T.tolist() == [0, 2, 2, 0, -1, 0, 0, 0]
    assert batch.packed.cu_seqlens_q.tolist() == [0, 4, 6, 8]


def test_an_empty_micro_batch_is_filler_only():
    batch = collate([], tp=2, device=torch.device("cpu"))
    assert len(batch.tokens_T) == 2 and batch.mask_T.sum() == 0


def test_context_parallel_ranks_share_each_sequence():
    # A sequence of 5 tokens is padded to 8, four chunks of 2. Rank 0 holds the first and the last, rank 1 the two between; 3 tokens are padded to 4.
    samples = [
        Sample([5, 6, 7], response_ids=[8, 9], rollout_logprobs=[-1.0, -2.0], loss_mask=[1, 1]),
        Sample([4], response_ids=[3, 3], rollout_logprobs=[0.0, 0.0], loss_mask=[1, 1]),
    ]
    first, second = (collate(samples, cp=2, cp_rank=rank, device=torch.device("cpu")) for rank in range(2))
    assert first.tokens_T.tolist() == [5, 6, 0, 0, 4, 0] and second.tokens_T.tolist() == [7, 8, 9, 0, 3, 3]
    assert first.labels_T.tolist() == [6, 7, 0, 0, 3, 0] and second.labels_T.tolist() == [8, 9, 9, 0, 3, 3]
    assert second.mask_T.tolist() == [1, 1, 0, 0, 1, 0] and first.mask_T.tolist() == [0, 0, 0, 0, 1, 0]
    assert first.packed.cu_seqlens_q.tolist() == second.packed.cu_seqlens_q.tolist() == [0, 8, 12]


@pytest.mark.parametrize("dp", [1, 2, 4])
def test_the_plan_covers_everything_once_within_budget_and_balanced(dp):
    lengths = np.random.default_rng(0).integers(1, 400, 97).tolist()
    plan = plan_microbatches(lengths, microbatch_tokens=1000, dp=dp)
    assert sorted(i for rank in plan for bin in rank for i in bin) == list(range(97))
    assert len({len(rank) for rank in plan}) == 1  # collectives inside the model pair up
    loads = [[sum(lengths[i] for i in bin) for bin in rank] for rank in plan]
    assert max(load for rank in loads for load in rank) <= 1000
    per_rank = [sum(rank) for rank in loads]
    assert max(per_rank) - min(per_rank) < max(lengths)


def test_fewer_samples_than_ranks_leaves_an_empty_bin():
    assert plan_microbatches([10], microbatch_tokens=100, dp=2) == [[[0]], [[]]]


@pytest.mark.parametrize("changes, message", [
    (dict(tp=3), "--tp 3 does not divide the 4 ranks"),
    (dict(cp=3), "--cp 3 does not divide the 4 ranks"),
    (dict(tp=4), "num_key_value_heads 2 is not divisible by --tp 4"),
    (dict(lr=-1.0), "--lr -1.0"),
    (dict(min_lr=1.0), "min-lr"),
    (dict(lr_warmup_steps=10), "--lr-warmup-steps 10"),
    (dict(microbatch_tokens=10), "--microbatch-tokens 10"),
    (dict(clip_low=1.5), "--clip-low"),
    (dict(megatron=("recompute_granulariti=full",)), "nearest is recompute_granularity"),
    (dict(megatron=("hidden_size=8",)), "is not a field"),
])  # fmt: skip
def test_settings_that_cannot_work(models, changes, message):
    with pytest.raises(BadInput, match=message):
        check_train_settings(TrainSettings(**changes), read_config(models["qwen3"]), world_size=4, steps=10, longest=40)


def test_a_batch_without_a_token_that_counts_is_an_error(fresh_megatron, models):
    trainer = train_step.build_trainer(str(models["llama"]), TrainSettings(), read_config(models["llama"]), steps=1, seed=1)
    masked = [Sample([5, 6], response_ids=[7], rollout_logprobs=[-1.0], loss_mask=[0], advantage=1.0)]
    with pytest.raises(RuntimeError, match="none of the 1 samples"):
        train_step.train_step(trainer, masked, temperature=1.0)
    broken = [Sample([5, 6], response_ids=[7], rollout_logprobs=[float("nan")], loss_mask=[1], advantage=1.0)]
    with pytest.raises(RuntimeError, match="loss is nan"):
        train_step.train_step(trainer, broken, temperature=1.0)
