"""Training steps on one rank: settings, refusals, mini-batches, learning rate, log-probs.

Why: a step that trains on a NaN, or counts an empty answer, spoils the weights for all that follow.
Packing is in test_batches.py, what the packed model computes on several ranks in test_layouts.py
and test_splits.py, the loss in test_whole_loss.py. Not covered: GPUs.
"""

from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train_step
from backends.huggingface.config import read_config
from backends.megatron.microbatch_plan import plan_microbatches
from common.errors import BadInput
from common.settings import TrainSettings
from data.sample import Sample
from harness.checks import check_train_flags
from harness.model_checks import check_train_settings
from losses import LossSettings


ASKED = dict(steps=9, seed=1, temperature=1.0, max_response_tokens=8)


def test_a_sample_longer_than_a_micro_batch_is_refused_by_name(trainer):
    """No number of micro-batches would ever be enough."""
    with pytest.raises(
        ValueError, match="a sample has 101 tokens, .* at most 100.* raise --microbatch-tokens"
    ):
        plan_microbatches([5, 101, 7], microbatch_tokens=100, dp=2)
    long = sample(
        3,
        response_ids=[7] * 9000,
        rollout_logprobs=[-1.0] * 9000,
        loss_mask=[1] * 9000,
        advantages=[1.0] * 9000,
    )
    with pytest.raises(
        ValueError, match="sample 3 of group 5: a sample has 9002 tokens, .* at most 8192"
    ):
        step(trainer, [sample(0), long])


@pytest.mark.parametrize("changes, message", [
    (dict(tp=3), "--tp 3 does not divide the 4 ranks"),
    (dict(cp=3), "--cp 3 does not divide the 4 ranks"),
    (dict(ep=3), "--ep 3 must divide the 4 ranks of a pipeline stage"),
    (dict(lr=-1.0), "--lr -1.0"),
    (dict(lr=float("nan")), "--lr nan"),
    (dict(lr=float("inf")), "--lr inf"),
    (dict(min_lr=1e-5, lr_schedule="constant"),
     "--min-lr 1e-05 has no effect with --lr-schedule constant"),
    (dict(offload_reference=True), "--offload-reference has no effect without --kl-coef"),
    (dict(reference="toy"), "--reference toy is not used without --kl-coef"),
    (dict(adam_beta2=1.0), "--adam-beta2 1.0"),
    (dict(weight_decay=-0.1), "--weight-decay -0.1"),
    (dict(microbatch_tokens=0), "--microbatch-tokens 0 must be at least 1"),
    (dict(clip_grad=float("nan")), "--clip-grad nan"),
    (dict(min_lr=1.0), "min-lr"),
    (dict(lr_warmup_steps=10), "--lr-warmup-steps 10"),
    (dict(minibatches=0), "--minibatches 0"),
    (dict(clip_grad=0.0), "--clip-grad 0.0"),
    (dict(megatron=("recompute_granularity",)),
     "--megatron 'recompute_granularity' is not of the form key=value"),
])  # fmt: skip
def test_flags_that_cannot_work(changes, message):
    with pytest.raises(BadInput, match=message):
        check_train_flags(TrainSettings(**changes), LossSettings(), steps=10, ranks=4)


@pytest.mark.parametrize("changes, message", [
    (dict(tp=3), "--tp 3 does not divide the 4 ranks"),
    (dict(tp=4), "num_key_value_heads 2 is not divisible by --tp 4"),
    (dict(ep=2), "--ep 2 must divide the model's 0 experts"),
    (dict(microbatch_tokens=10), "--microbatch-tokens 10"),
    (dict(megatron=("recompute_granulariti=full",)), "nearest is recompute_granularity"),
    (dict(megatron=("hidden_size=8",)), "is not a field"),
    (dict(megatron=("moe_router_pre_softmax=true",)), "is not a field that can be set there"),
    (dict(megatron=("softmax_scale=0.5",)), "is not a field that can be set there"),
    (dict(megatron=("window_size=4",)), "is not a field that can be set there"),
    (dict(megatron=("optimizer=sgd",)), "optimizer is not a field that can be set there"),
    (dict(megatron=("calculate_per_token_loss=false",)), "is not a field"),
    (dict(megatron=("adam_eps=small",)),
     "--megatron adam_eps='small' is of the wrong type: the field is float or int"),
    (dict(megatron=("use_precision_aware_optimizer=1",)), "wrong type: the field is bool"),
    (dict(megatron=("fp32_residual_connection=true",)), "is not a field that can be set there"),
    (dict(megatron=("recompute_granularity=full",)), "megatron-core refuses it"),
])  # fmt: skip
def test_settings_that_the_model_does_not_allow(models, changes, message):
    with pytest.raises(BadInput, match=message):
        check_train_settings(
            TrainSettings(**changes), read_config(models["qwen3"]), world_size=4, longest=40
        )


@pytest.fixture
def trainer(fresh_megatron, models):
    return built(models)


def sample(index: int, **changes) -> Sample:
    fields = dict(
        response_ids=[7, 8],
        rollout_logprobs=[-1.0, -1.0],
        loss_mask=[1, 1],
        advantages=[1.0, 1.0],
        group=5,
        index=index,
    )
    return Sample([5, 6], **{**fields, **changes})


def step(trainer, samples, **settings) -> dict:
    batches = train_step.pack(trainer, samples)
    train_step.add_logprobs(trainer, batches)
    return train_step.update_policy(trainer, batches, LossSettings(**settings))


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_no_token_is_multiplied_alone_with_the_vocabulary_matrix(fresh_megatron, models, lora_rank):
    """With odd strides and a frozen matrix torch would, and SmolLM2's step takes minutes."""
    trainer = built(models, lora_rank=lora_rank)
    with torch.profiler.profile(record_shapes=True) as profile:
        step(trainer, [sample(i) for i in range(4)])
    vocab = trainer.config["vocab_size"]
    alone = [event for event in profile.events() if event.name == "aten::bmm"]
    assert [e.input_shapes for e in alone if any(vocab in shape for shape in e.input_shapes)] == []


EMPTY = dict(response_ids=[], rollout_logprobs=[], loss_mask=[], advantages=[])


def state_of(trainer) -> list[torch.Tensor]:
    """Return copies of weights, FP32 main weights and Adam's moments."""
    groups = trainer.optimizer.param_groups
    main = [parameter for group in groups for parameter in group["params"]]
    moments = [
        value
        for inner in trainer.optimizer.optimizer.state.values()
        for value in inner.values()
        if torch.is_tensor(value)
    ]
    return [tensor.detach().clone() for tensor in [*trainer.gpt.parameters(), *main, *moments]]


@pytest.mark.parametrize("minibatches", [1, 2])
@pytest.mark.parametrize("batch", [
    lambda: [sample(0, loss_mask=[0, 0]), sample(1, loss_mask=[0, 0])],
    lambda: [sample(0, **EMPTY), sample(1, **EMPTY)],
    lambda: [sample(0, **EMPTY), sample(1, loss_mask=[0, 0])],
    lambda: [],
], ids=["all masked", "all empty", "masked and empty", "no samples"])  # fmt: skip
def test_a_batch_without_a_token_that_counts_is_no_update(
    fresh_megatron, models, batch, minibatches
):
    """A judge that fails on a whole step must not end the run. The schedule counts the step."""
    trainer = built(
        models,
        minibatches=minibatches,
        with_reference=True,
    )
    step(trainer, [sample(0), sample(1)])  # gives Adam its moments
    before, lr = state_of(trainer), trainer.optimizer.param_groups[0]["lr"]
    assert step(trainer, batch(), kl_coef=0.1) == {"tokens": 0, "lr": lr}
    assert len(before) > 20 and all(map(torch.equal, state_of(trainer), before))
    assert trainer.scheduler.num_steps == 2 and trainer.optimizer.param_groups[0]["lr"] < lr
    assert step(trainer, [sample(0), sample(1)])["tokens"] == 4


@pytest.mark.parametrize("minibatches, loss, old, ref", [
    (1, {}, 0, 0), (2, {}, 2, 0), (1, dict(kl_coef=0.1), 0, 2),
    (1, dict(kl_coef=0.1, kl_in="reward"), 2, 2), (2, dict(old_logprobs="rollout"), 0, 0),
    (2, dict(old_logprobs="rollout", kl_coef=0.1, kl_in="reward"), 0, 2),
])  # fmt: skip
def test_what_is_scored_is_what_is_needed(fresh_megatron, models, minibatches, loss, old, ref):
    """A second update needs old log-probs, and so does a KL that is taken from the reward.

    Unless the engine's stand in for them.
    """
    trainer = built(models, minibatches=minibatches, with_reference="kl_coef" in loss)
    samples = [sample(0), sample(1)]
    train_step.add_logprobs(trainer, train_step.pack(trainer, samples), LossSettings(**loss))
    for one in samples:
        assert (len(one.old_logprobs), len(one.ref_logprobs)) == (old, ref)


@pytest.mark.parametrize("minibatches", [1, 2])
def test_the_engines_log_probs_stand_in_for_the_old_ones(fresh_megatron, models, minibatches):
    """The ratio starts from them, and mismatch is that of the weights that the engine has.

    With two mini-batches the second has moved weights; only the first is measured.
    """
    trainer = built(models, minibatches=minibatches)
    samples = [sample(0), sample(1, response_ids=[8, 8])]
    train_step.add_logprobs(trainer, train_step.pack(trainer, samples))
    apart = []
    for one, far in zip(samples, (0.5, -0.25)):
        one.rollout_logprobs, one.old_logprobs = one.old_logprobs - np.float32(far), []
        apart += [far] * 2
    measured = apart[: 4 // minibatches]
    batches, loss = train_step.pack(trainer, samples), dict(old_logprobs="rollout")
    metrics = train_step.update_policy(trainer, batches, LossSettings(correction="none", **loss))
    assert metrics["mismatch_abs"] == pytest.approx(np.abs(measured).mean(), rel=1e-4)
    assert metrics["mismatch_max"] == pytest.approx(np.abs(measured).max(), rel=1e-4)
    assert metrics["tokens"] == 4 and metrics["tis_clipfrac"] == 0
    if minibatches == 1:
        assert metrics["ratio"] == pytest.approx(np.exp(apart).mean(), rel=1e-4)
        assert metrics["logprob_shift"] == pytest.approx(np.mean(apart), rel=1e-4)


def test_a_sample_without_the_engines_log_probs_is_refused(trainer):
    """Of such a sample every ratio would be exp(logprobs)."""
    batch = [sample(0), sample(1, rollout_logprobs=[])]
    loss = LossSettings(old_logprobs="rollout", correction="none")
    with pytest.raises(ValueError, match="sample 1 of group 5 has no rollout_logprobs"):
        train_step.update_policy(trainer, train_step.pack(trainer, batch), loss)


def test_the_learning_rate_of_the_metrics_is_that_of_the_step(trainer):
    lr = trainer.optimizer.param_groups[0]["lr"]
    assert step(trainer, [sample(0)])["lr"] == lr != trainer.optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("field", ["old_logprobs", "ref_logprobs"])
def test_a_batch_of_which_some_are_not_scored_is_refused(trainer, field):
    """Their log-probs would count as 0, as if the token had been certain."""
    values = dict(old_logprobs=[-1.0, -1.0], ref_logprobs=[-1.0, -1.0])
    batch = [sample(0, **values), sample(1, **{**values, field: []})]
    loss = LossSettings(kl_coef=0.1)
    with pytest.raises(ValueError, match=f"sample 1 of group 5 has no {field}"):
        train_step.update_policy(trainer, train_step.pack(trainer, batch), loss)


def test_scoring_gives_every_sample_its_own_length(trainer):
    batch = [sample(0, **EMPTY), sample(1), sample(2, **EMPTY)]
    train_step.add_logprobs(trainer, train_step.pack(trainer, batch))
    assert [len(one.old_logprobs) for one in batch] == [0, 2, 0]
    train_step.add_logprobs(trainer, train_step.pack(trainer, []))


def test_a_token_that_the_trainer_holds_impossible_is_named(trainer):
    """Its logit is -inf and so is its log-prob, so no loss can be computed from it."""
    stock = trainer.gpt.output_layer.forward

    def without_8(*args, **kwargs):
        logits, bias = stock(*args, **kwargs)
        return logits.masked_fill(torch.arange(logits.shape[-1]) == 8, -torch.inf), bias

    trainer.gpt.output_layer.forward = without_8
    with pytest.raises(RuntimeError, match="step 1, rank 0: sample 1 of group 5 has loss nan"):
        step(trainer, [sample(0, response_ids=[7, 7]), sample(1)])


@pytest.mark.parametrize(
    "changes", [dict(rollout_logprobs=[-1.0, float("nan")]), dict(advantages=[3e38, 3e38])]
)
def test_a_loss_or_gradient_that_is_not_finite_names_the_sample(trainer, changes):
    """In the second case the loss is finite and its gradient is not.

    In both cases the weights stay as before the step.
    """
    step(trainer, [sample(0), sample(1)])
    before = [parameter.detach().clone() for parameter in trainer.gpt.parameters()]
    rule = "step 2, rank 0: sample 2 of group 5 has loss .* the optimizer has made no step"
    with pytest.raises(RuntimeError, match=rule):
        step(trainer, [sample(0), sample(1), sample(2, **changes), sample(3)])
    assert all(map(torch.equal, trainer.gpt.parameters(), before))


def test_an_empty_response_changes_nothing(trainer):
    """An engine that gives up at once returns no token. Such a sample adds nothing to the step."""
    metrics = step(trainer, [sample(0), sample(1, **EMPTY)])
    assert metrics["tokens"] == 2
    assert all(np.isfinite(value) for value in metrics.values())


def test_the_only_update_of_a_batch_needs_no_old_logprobs(fresh_megatron, models):
    """Old log-probs from the update itself give the same step, to the bit."""
    steps = []
    for settings in (None, LossSettings()):
        trainer = built(models)
        samples = [sample(0), sample(1, advantages=[-1.0, 0.5])]
        batches = train_step.pack(trainer, samples)
        train_step.add_logprobs(trainer, batches, settings)
        lengths = [len(one.old_logprobs) for one in samples]
        assert lengths == ([2, 2] if settings is None else [0, 0])
        metrics = train_step.update_policy(trainer, batches, LossSettings())
        steps.append((metrics, [parameter.clone() for parameter in trainer.gpt.parameters()]))
    (metrics, weights), (other_metrics, other_weights) = steps
    assert metrics == other_metrics
    assert all(map(torch.equal, weights, other_weights))


def test_what_does_not_count_cannot_spoil_the_batch(trainer):
    spoiled = sample(
        1, rollout_logprobs=[float("nan"), -1.0], advantages=[float("inf"), 1.0], loss_mask=[0, 1]
    )
    metrics = step(trainer, [sample(0), spoiled], kl_coef=0.0)
    assert metrics["tokens"] == 3
    assert all(np.isfinite(value) for value in metrics.values())


def test_mini_batches_are_equal_parts_and_steps_of_their_own(fresh_megatron, models):
    trainer = built(models, minibatches=3, lr=1e-2)
    samples = [sample(i) for i in range(7)]
    batches = train_step.pack(trainer, samples)
    assert [[s.index for s in batch.samples] for batch in batches] == [[0, 1], [2, 3], [4, 5, 6]]
    samples[2].loss_mask = samples[3].loss_mask = [0, 0]
    metrics = step(trainer, samples)
    # The third part is trained with the weights that the first has changed.
    assert metrics["tokens"] == 10
    assert metrics["logprob_shift"] != 0
    assert trainer.scheduler.num_steps == 1  # a rollout batch is one step of the schedule


def built(models, *, steps=9, with_reference=False, **settings):
    """Build a trainer of the small Llama in FP32."""
    settings, folder = TrainSettings(train_dtype="fp32", **settings), str(models["llama"])
    more = dict(steps=steps, seed=1, with_reference=with_reference)
    more |= dict(temperature=1.0, max_response_tokens=8)
    return train_step.build_trainer(folder, settings, read_config(folder), **more)


def test_the_metrics_of_mini_batches_are_a_mean_and_a_largest(fresh_megatron, models):
    """With lr 0 each part has the gradient that it has alone. The first has more mismatch."""
    trainer = built(models, lr=0.0, minibatches=2)
    batch = [
        sample(0, rollout_logprobs=[-20.0, -1.0]),
        sample(1, advantages=[3.0, -2.0]),
        sample(2, response_ids=[9, 4], advantages=[-0.5, 0.5]),
        sample(3),
    ]
    both = step(trainer, batch, correction="none")
    trainer = built(models, lr=0.0)
    alone = [step(trainer, part, correction="none") for part in (batch[:2], batch[2:])]
    norms, mismatches = ([m[k] for m in alone] for k in ("grad_norm", "mismatch_max"))
    assert norms[0] != pytest.approx(norms[1], rel=0.1)
    assert mismatches[0] > mismatches[1]
    assert both["grad_norm"] == pytest.approx(sum(norms) / 2, rel=1e-5)
    assert both["mismatch_max"] == mismatches[0]


@pytest.mark.parametrize("schedule, rates", [
    (dict(lr_schedule="linear"), [0, 0.5, 1, 0.75, 0.5, 0.25, 0]),
    (dict(lr_schedule="linear", min_lr=0.4), [0, 0.5, 1, 0.85, 0.7, 0.55, 0.4]),
    (dict(lr_schedule="cosine", min_lr=0.4), [0, 0.5, 1, 0.912132, 0.7, 0.487868, 0.4]),
    (dict(lr_schedule="constant"), [0, 0.5, 1, 1, 1, 1, 1]),
])  # fmt: skip
def test_the_learning_rate_follows_its_schedule(fresh_megatron, models, schedule, rates):
    """The schedule has 2 steps of warm-up and 4 of decay, counted in rollout batches."""
    trainer = built(models, steps=6, lr=1.0, lr_warmup_steps=2, **schedule)
    got = []
    for _ in range(7):
        got.append(step(trainer, [])["lr"])
    assert got == pytest.approx(rates, abs=1e-6)


def test_the_optimizer_is_the_one_that_was_asked_for(fresh_megatron, models):
    trainer = built(models, weight_decay=0.3, adam_beta2=0.9)
    step(trainer, [sample(0)])
    for group in trainer.optimizer.param_groups:
        assert group["betas"] == (0.9, 0.9)
        assert group["weight_decay"] == 0.3 * group["wd_mult"]
    assert any(group["weight_decay"] for group in trainer.optimizer.param_groups)


@pytest.mark.parametrize("clip_grad", [1e-3, 1e-2])
def test_the_gradient_is_clipped_to_its_norm(fresh_megatron, models, clip_grad):
    """With Adam's epsilon at 1 the first step is lr g / (|g| + 1), as long as the gradient."""
    settings = dict(lr=1.0, lr_schedule="constant", clip_grad=clip_grad, megatron=("adam_eps=1.0",))
    trainer = built(models, **settings)
    before = [parameter.detach().clone() for parameter in trainer.gpt.parameters()]
    assert step(trainer, [sample(0)])["grad_norm"] > 10 * clip_grad
    moved = zip(trainer.gpt.parameters(), before)
    length = sum(float((now - then).square().sum()) for now, then in moved) ** 0.5
    assert length == pytest.approx(clip_grad, rel=0.02)


def scored(trainer, batch, temperature: float) -> list[Sample]:
    """Return copies of the samples with the log-probs that add_logprobs sets."""
    batch = [
        Sample(one.prompt_ids, response_ids=one.response_ids, loss_mask=[1, 1]) for one in batch
    ]
    trainer.temperature = temperature
    train_step.add_logprobs(trainer, train_step.pack(trainer, batch))
    return batch


def test_scores_are_the_policys_and_the_references_at_the_temperature(fresh_megatron, models):
    """The test changes the reference. Then the policy takes the reference's weights."""
    trainer, batch = built(models, lr=0.0, with_reference=True), [sample(0), sample(1)]
    with torch.no_grad():
        for parameter in trainer.reference.parameters():
            parameter.mul_(0.7)
    first = scored(trainer, batch, 0.7)
    apart = np.abs(first[0].old_logprobs - first[0].ref_logprobs)
    assert apart.min() > 1e-3
    assert np.abs(first[0].old_logprobs - scored(trainer, batch, 1.0)[0].old_logprobs).min() > 1e-3
    trainer.gpt.load_state_dict(trainer.reference.state_dict())
    for one, now in zip(first, scored(trainer, batch, 0.7)):
        assert one.ref_logprobs.tolist() == now.old_logprobs.tolist() == now.ref_logprobs.tolist()


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_the_first_mini_batch_starts_from_ratio_one(fresh_megatron, models, temperature):
    """add_logprobs packs each mini-batch as its update does. The numbers are equal to the bit."""
    trainer, rng = built(models, lr=0.0, minibatches=3), np.random.default_rng(0)
    batch = []
    for i in range(9):
        n = 1 + 5 * i % 17
        fields = dict(rollout_logprobs=[-1.0] * n, loss_mask=[1] * n, advantages=[1.0] * n)
        batch.append(sample(i, response_ids=rng.integers(3, 90, n).tolist(), **fields))
    trainer.temperature = temperature
    batches = train_step.pack(trainer, batch)
    train_step.add_logprobs(trainer, batches)
    metrics = train_step.update_policy(trainer, batches, LossSettings())
    assert (metrics["logprob_shift"], metrics["ratio"], metrics["approx_kl"]) == (0, 1, 0)


def test_an_offloaded_reference_is_on_the_device_for_its_pass_only(fresh_megatron, models):
    trainer = built(models, with_reference=True, offload_reference=True)
    with mock.patch.object(trainer.reference, "to", wraps=trainer.reference.to) as moved:
        train_step.add_logprobs(trainer, train_step.pack(trainer, [sample(0)]))
    device = next(trainer.gpt.parameters()).device
    assert [call.args[0] for call in moved.call_args_list] == [device, "cpu"]


@pytest.mark.parametrize("changes", [
    (dict(min_lr=1e-5), {}), (dict(offload_reference=True), dict(kl_coef=0.1)),
    (dict(clip_grad=float("inf")), {}), (dict(lr=0.0), {}),
])  # fmt: skip
def test_settings_that_work(models, changes):
    train, loss = TrainSettings(**changes[0]), LossSettings(**changes[1])
    check_train_flags(train, loss, steps=10, ranks=4)
    check_train_settings(train, read_config(models["qwen3"]), world_size=4, longest=40)


def test_the_routers_correction_bias_is_not_rounded(fresh_megatron, models):
    """GLM-4.5 keeps it in FP32. Rounded to BF16 it could choose other experts than the engine's."""
    trainer = train_step.build_trainer(
        str(models["glm4_moe"]), TrainSettings(), read_config(models["glm4_moe"]), **ASKED
    )
    weights = load_file(models["glm4_moe"] / "model.safetensors")
    stored = weights["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert torch.equal(trainer.gpt.decoder.layers[1].mlp.router.expert_bias, stored)
    assert not torch.equal(stored, stored.bfloat16().float())
