"""packing.py, and train_step.py's settings and refusals. What the packed model computes is tested in test_layouts.py and test_splits.py."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train_step
from hf_config import read_config
from losses import LossSettings
from packing import collate, plan_microbatches
from run import BadInput
from sample import Sample
from train_step import TrainSettings, check_train_settings


def test_collate_by_hand():
    samples = [
        Sample([5, 6], response_ids=[7, 8], rollout_logprobs=[-0.5, -0.25], loss_mask=[1, 1], advantages=[2.0, 3.0]),
        Sample([9], response_ids=[3], rollout_logprobs=[-1.0], loss_mask=[0], advantages=[-1.0]),
    ]
    batch = collate(samples, [0, 2], tp=4, device=torch.device("cpu"))
    assert batch.tokens_T.tolist() == [5, 6, 7, 8, 9, 3, 0, 0]  # two filler tokens make 8
    assert batch.labels_T.tolist() == [6, 7, 8, 8, 3, 3, 0, 0]
    assert batch.mask_T.tolist() == [0, 1, 1, 0, 0, 0, 0, 0]  # token 6 predicts 7, the first answer token; the second sample is masked
    assert batch.rollout_logprobs_T.tolist() == [0, -0.5, -0.25, 0, -1, 0, 0, 0]
    assert batch.advantages_T.tolist() == [0, 2, 3, 0, -1, 0, 0, 0]
    assert batch.old_logprobs_T.tolist() == [0] * 8  # not there yet
    assert batch.place_T.tolist() == [-1, 0, 1, -1, 2, -1, -1, -1]  # among the three response tokens
    assert batch.sample_T.tolist() == [0, 0, 0, 0, 1, 1, 2, 2] and batch.counts_N.tolist() == [2, 0, 0]  # filler is a third sample that has none
    assert batch.packed.cu_seqlens_q.tolist() == [0, 4, 6, 8]


def test_an_empty_micro_batch_is_filler_only():
    batch = collate([], [], tp=2, device=torch.device("cpu"))
    assert len(batch.tokens_T) == 2 and batch.mask_T.sum() == 0


def test_context_parallel_ranks_share_each_sequence():
    # A sequence of 5 tokens is padded to 8, four chunks of 2. Rank 0 holds the first and the last, rank 1 the two between; 3 tokens are padded to 4.
    samples = [
        Sample([5, 6, 7], response_ids=[8, 9], rollout_logprobs=[-1.0, -2.0], loss_mask=[1, 1]),
        Sample([4], response_ids=[3, 3], rollout_logprobs=[0.0, 0.0], loss_mask=[1, 1]),
    ]
    first, second = (collate(samples, [0, 2], cp=2, cp_rank=rank, device=torch.device("cpu")) for rank in range(2))
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
    (dict(minibatches=0), "--minibatches 0"),
    (dict(clip_grad=0.0), "--clip-grad 0.0"),
    (dict(megatron=("recompute_granulariti=full",)), "nearest is recompute_granularity"),
    (dict(megatron=("hidden_size=8",)), "is not a field"),
    (dict(megatron=("optimizer=sgd",)), "optimizer is not a field that can be set there"),
    (dict(megatron=("calculate_per_token_loss=false",)), "is not a field"),
    (dict(megatron=("adam_eps=small",)), "--megatron adam_eps='small' is of the wrong type: the field is a float"),
    (dict(megatron=("fp32_residual_connection=1",)), "wrong type: the field is a bool"),
    (dict(megatron=("recompute_granularity=full",)), "megatron-core refuses it"),
])  # fmt: skip
def test_settings_that_cannot_work(models, changes, message):
    with pytest.raises(BadInput, match=message):
        check_train_settings(TrainSettings(**changes), LossSettings(), read_config(models["qwen3"]), world_size=4, steps=10, longest=40)


def test_a_reference_must_fit(models):
    config, sizes = read_config(models["qwen3"]), dict(world_size=1, steps=10, longest=40)
    with pytest.raises(BadInput, match="not used without --kl-coef"):
        check_train_settings(TrainSettings(reference=str(models["qwen3"])), LossSettings(), config, **sizes)
    with pytest.raises(BadInput, match="differs from the model in .*qk_layernorm.*same architecture"):
        check_train_settings(TrainSettings(reference=str(models["llama"])), LossSettings(kl_coef=0.1), config, **sizes)


@pytest.fixture
def trainer(fresh_megatron, models):
    return train_step.build_trainer(str(models["llama"]), TrainSettings(train_dtype="fp32"), read_config(models["llama"]), steps=9, seed=1)


def sample(index: int, **changes) -> Sample:
    fields = dict(response_ids=[7, 8], rollout_logprobs=[-1.0, -1.0], loss_mask=[1, 1], advantages=[1.0, 1.0], group=5, index=index)
    return Sample([5, 6], **{**fields, **changes})


def step(trainer, samples, **settings) -> dict:
    return train_step.train_step(trainer, train_step.score(trainer, samples, temperature=1.0), LossSettings(**settings), temperature=1.0, max_response_tokens=8)


def test_a_batch_without_a_token_that_counts_is_an_error(trainer):
    with pytest.raises(RuntimeError, match="none of the 2 samples"):
        step(trainer, [sample(0, loss_mask=[0, 0]), sample(1, loss_mask=[0, 0])])


@pytest.mark.parametrize("changes", [dict(rollout_logprobs=[-1.0, float("nan")]), dict(advantages=[3e38, 3e38])])
def test_a_loss_or_gradient_that_is_not_finite_names_the_sample(trainer, changes):
    """The second loss is finite and its gradient is not. Either way the weights stay those of before the step."""
    step(trainer, [sample(0), sample(1)])
    before = [parameter.detach().clone() for parameter in trainer.gpt.parameters()]
    with pytest.raises(RuntimeError, match="step 2, rank 0: sample 2 of group 5 has loss .* the weights are unchanged"):
        step(trainer, [sample(0), sample(1), sample(2, **changes), sample(3)])
    assert all(torch.equal(parameter, old) for parameter, old in zip(trainer.gpt.parameters(), before))


def test_an_empty_response_changes_nothing(trainer):
    """An engine that gives up at once returns no token; such a sample has nothing to learn from, and is in nobody's way."""
    empty = sample(1, response_ids=[], rollout_logprobs=[], loss_mask=[], advantages=[])
    metrics = step(trainer, [sample(0), empty])
    assert metrics["tokens"] == 2 and all(np.isfinite(value) for value in metrics.values())
    with pytest.raises(RuntimeError, match="none of the 1 samples"):
        step(trainer, [empty])


def test_the_only_update_of_a_batch_needs_no_old_logprobs(fresh_megatron, models):
    """Without a pass of their own, old log-probs are the update's: the step is the same to the bit."""
    steps = []
    for settings in (None, LossSettings()):
        trainer = train_step.build_trainer(str(models["llama"]), TrainSettings(train_dtype="fp32"), read_config(models["llama"]), steps=9, seed=1)
        batch = train_step.score(trainer, [sample(0), sample(1, advantages=[-1.0, 0.5])], settings, temperature=1.0)
        assert [len(one.old_logprobs) for one in batch] == ([2, 2] if settings is None else [0, 0])
        metrics = train_step.train_step(trainer, batch, LossSettings(), temperature=1.0, max_response_tokens=8)
        steps.append((metrics, [parameter.clone() for parameter in trainer.gpt.parameters()]))
    assert steps[0][0] == steps[1][0] and all(map(torch.equal, steps[0][1], steps[1][1]))


def test_what_does_not_count_cannot_spoil_the_batch(trainer):
    spoiled = sample(1, rollout_logprobs=[float("nan"), -1.0], advantages=[float("inf"), 1.0], loss_mask=[0, 1])
    metrics = step(trainer, [sample(0), spoiled], kl_coef=0.0)
    assert metrics["tokens"] == 3 and all(np.isfinite(value) for value in metrics.values())


def test_mini_batches_are_equal_parts_and_steps_of_their_own(fresh_megatron, models):
    settings = TrainSettings(train_dtype="fp32", minibatches=3, lr=1e-2)
    trainer = train_step.build_trainer(str(models["llama"]), settings, read_config(models["llama"]), steps=9, seed=1)
    samples = [sample(i) for i in range(7)]
    assert [[s.index for s in part] for part in train_step.minibatches(trainer, samples)] == [[0, 1], [2, 3], [4, 5, 6]]
    samples[2].loss_mask = samples[3].loss_mask = [0, 0]
    metrics = step(trainer, samples)
    assert metrics["tokens"] == 10 and metrics["logprob_shift"] != 0  # the third part sees what the first has changed
    assert trainer.scheduler.num_steps == 1  # one rollout batch, one step of the schedule


def test_the_residual_stream_may_be_fp32(fresh_megatron, models):
    """--megatron fp32_residual_connection=true: norms take fp32 and give BF16, what the linear layers behind them take."""
    config, logprobs = read_config(models["qwen3"]), []
    for changes in ({}, dict(megatron=("fp32_residual_connection=true",))):
        trainer = train_step.build_trainer(str(models["qwen3"]), TrainSettings(**changes), config, steps=1, seed=1)
        batches = train_step.local_microbatches(trainer, [sample(0), sample(1)])
        logprobs.append(torch.cat(train_step.compute_logprobs(trainer, batches, temperature=1.0)))
    assert (logprobs[0] - logprobs[1]).abs().max() < 0.1  # other roundings at most, the same model


def test_the_routers_correction_bias_is_not_rounded(fresh_megatron, models):
    """GLM-4.5 keeps it in FP32: rounded to BF16, the choice of experts could be another, here and in the engine."""
    trainer = train_step.build_trainer(str(models["glm4_moe"]), TrainSettings(), read_config(models["glm4_moe"]), steps=9, seed=1)
    stored = load_file(models["glm4_moe"] / "model.safetensors")["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert torch.equal(trainer.gpt.decoder.layers[1].mlp.router.expert_bias, stored) and not torch.equal(stored, stored.bfloat16().float())
