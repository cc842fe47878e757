"""Packing of samples into micro-batches, and the plan of which rank gets which.

Why: a token that is packed one place off learns from its neighbour's advantage, and a plan that is
out of balance makes ranks wait. What the packed model computes is in test_layouts.py and
test_splits.py. Not covered: memory.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from backends.megatron.batches import Batch, collate
from backends.megatron.microbatch_plan import microbatch_plan, plan_microbatches
from common.settings import TrainSettings
from data.sample import Sample


def test_collate_by_hand():
    samples = [
        Sample(
            [5, 6],
            response_ids=[7, 8],
            rollout_logprobs=[-0.5, -0.25],
            loss_mask=[1, 1],
            advantages=[2.0, 3.0],
        ),
        Sample([9], response_ids=[3], rollout_logprobs=[-1.0], loss_mask=[0], advantages=[-1.0]),
    ]
    batch = collate(samples, [0, 2], tp=4, device=torch.device("cpu"))
    assert batch.tokens_T.tolist() == [5, 6, 7, 8, 9, 3, 0, 0]  # two filler tokens make 8
    assert batch.labels_T.tolist() == [6, 7, 8, 8, 3, 3, 0, 0]
    # Token 6 predicts 7, the first answer token. The second sample is masked.
    assert batch.mask_T.tolist() == [0, 1, 1, 0, 0, 0, 0, 0]
    Batch(samples, [], [batch]).read_samples()
    per_token = {name: values_T.tolist() for name, values_T in batch.per_token.items()}
    assert per_token["rollout_logprobs"] == [0, -0.5, -0.25, 0, -1, 0, 0, 0]
    assert per_token["advantages"] == [0, 2, 3, 0, -1, 0, 0, 0]
    assert per_token["old_logprobs"] == [0] * 8  # the samples have none yet
    # The index counts the three response tokens.
    assert batch.response_index_T.tolist() == [-1, 0, 1, -1, 2, -1, -1, -1]
    # The filler is a third sample. None of its tokens counts.
    assert batch.sample_T.tolist() == [0, 0, 0, 0, 1, 1, 2, 2]
    assert batch.counts_N.tolist() == [2, 0, 0]
    assert batch.packed.cu_seqlens_q.tolist() == [0, 4, 6, 8]


@pytest.mark.parametrize("samples", [[], [Sample([])]], ids=["no sample", "no token"])
def test_an_empty_micro_batch_is_filler_only(samples):
    batch = collate(samples, [0] * len(samples), tp=2, device=torch.device("cpu"))
    assert len(batch.tokens_T) == 2
    assert batch.mask_T.sum() == 0


def test_context_parallel_ranks_share_each_sequence():
    # A sequence of 5 tokens is padded to 8, in four chunks of 2. Rank 0 holds the first and the
    # last chunk, rank 1 the two between. The sequence of 3 tokens is padded to 4.
    samples = [
        Sample([5, 6, 7], response_ids=[8, 9], rollout_logprobs=[-1.0, -2.0], loss_mask=[1, 1]),
        Sample([4], response_ids=[3, 3], rollout_logprobs=[0.0, 0.0], loss_mask=[1, 1]),
    ]
    first, second = (
        collate(samples, [0, 2], cp=2, cp_rank=rank, device=torch.device("cpu"))
        for rank in range(2)
    )
    assert first.tokens_T.tolist() == [5, 6, 0, 0, 4, 0]
    assert second.tokens_T.tolist() == [7, 8, 9, 0, 3, 3]
    assert first.labels_T.tolist() == [6, 7, 0, 0, 3, 0]
    assert second.labels_T.tolist() == [8, 9, 9, 0, 3, 3]
    assert second.mask_T.tolist() == [1, 1, 0, 0, 1, 0]
    assert first.mask_T.tolist() == [0, 0, 0, 0, 1, 0]
    assert first.packed.cu_seqlens_q.tolist() == second.packed.cu_seqlens_q.tolist() == [0, 8, 12]


@pytest.mark.parametrize("dp", [1, 2, 4])
def test_the_plan_covers_everything_once_within_budget_and_balanced(dp):
    lengths = np.random.default_rng(0).integers(1, 400, 97).tolist()
    plan = plan_microbatches(lengths, microbatch_tokens=1000, dp=dp)
    assert sorted(i for rank in plan for bin in rank for i in bin) == list(range(97))
    assert len({len(rank) for rank in plan}) == 1  # so that collectives inside the model pair up
    loads = [[sum(lengths[i] for i in bin) for bin in rank] for rank in plan]
    assert max(load for rank in loads for load in rank) <= 1000
    per_rank = [sum(rank) for rank in loads]
    assert max(per_rank) - min(per_rank) < max(lengths)


@pytest.mark.parametrize(
    "lengths, dp",
    [([100], 1), ([60, 40], 1), ([100, 100], 2), ([50, 50, 50, 50], 2), ([100, 60, 40], 1)],
)
def test_a_micro_batch_may_be_exactly_full(lengths, dp):
    plan = plan_microbatches(lengths, microbatch_tokens=100, dp=dp)
    assert sum(len(rank) for rank in plan) == sum(lengths) // 100  # no more bins than needed
    assert {sum(lengths[i] for i in bin) for rank in plan for bin in rank} == {100}


def test_no_samples_are_a_plan_of_empty_bins():
    assert plan_microbatches([], microbatch_tokens=100, dp=2) == [[[]], [[]]]


def test_a_plan_has_as_few_bins_as_fit():
    """Two bins hold 60 + 40 and 50 + 50. Shortest first, 40 + 50 would need a third bin."""
    assert plan_microbatches([40, 50, 50, 60], microbatch_tokens=100, dp=1) == [[[3, 0], [1, 2]]]


def test_context_parallel_ranks_share_the_budget_of_a_micro_batch():
    """With cp 2 a micro-batch has twice the tokens. A sequence of 9 is padded to 12."""
    dp = SimpleNamespace(size=lambda: 1)
    settings = TrainSettings(cp=2, microbatch_tokens=12)
    trainer = SimpleNamespace(settings=settings, dp_group=dp)
    samples = [Sample([5], response_ids=[7] * 8) for _ in range(4)]
    assert microbatch_plan(trainer, samples) == [[[0, 2], [1, 3]]]


def plan_of(samples: list[Sample], *, dp: int, microbatch_tokens: int = 8192) -> list:
    settings = TrainSettings(microbatch_tokens=microbatch_tokens)
    trainer = SimpleNamespace(settings=settings, dp_group=SimpleNamespace(size=lambda: dp))
    return microbatch_plan(trainer, samples, share_prompts=True)


def test_samples_of_a_prompt_stay_together():
    samples = [
        Sample([prompt] * 5, response_ids=[7] * (1 + i)) for i in range(4) for prompt in range(9)
    ]
    for rank in plan_of(samples, dp=2):
        for bin in rank:
            assert all(bin.count(i) == 1 for i in bin)
            prompts = [samples[i].prompt_ids[0] for i in bin]
            assert all(prompts.count(prompt) == 4 for prompt in prompts)


def test_samples_of_one_prompt_are_spread_over_ranks():
    """Fewer prompts than ranks: else some would have nothing to do."""
    samples = [Sample([5, 6], response_ids=[7]) for _ in range(16)]
    assert [sum(map(len, rank)) for rank in plan_of(samples, dp=4)] == [4, 4, 4, 4]


def test_samples_of_one_prompt_that_no_micro_batch_holds_are_split():
    samples = [Sample([5] * 40, response_ids=[7] * 10) for _ in range(16)]
    [bins] = plan_of(samples, dp=1, microbatch_tokens=100)
    assert sorted(i for bin in bins for i in bin) == list(range(16))
    assert [len(bin) for bin in bins] == [2] * 8


def test_bins_of_a_rank_are_not_neighbours_by_load():
    """Of loads 9, 8, 7, 6 one rank gets 9 and 7, the other 8 and 6. With 7 and 6 one would wait."""
    plan = plan_microbatches([9, 8, 7, 6], microbatch_tokens=9, dp=2)
    assert plan == [[[0], [2]], [[1], [3]]]


def test_fewer_samples_than_ranks_leaves_an_empty_bin():
    assert plan_microbatches([10], microbatch_tokens=100, dp=2) == [[[0]], [[]]]
