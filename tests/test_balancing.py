"""What keeps experts equally busy: the auxiliary loss, the moving correction bias, frozen routers.

Why: each changes what is learned, and none is seen in the policy loss. The auxiliary loss is also
the one thing here that depends on how a batch is split into micro-batches: a test says by how much.
Not covered: whether balance helps.
"""

import json
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, metrics_of, torchrun
from megatron.core.transformer.moe.router import TopKRouter
from safetensors.torch import load_file

import train_step
from backends.huggingface.config import read_config
from backends.huggingface.folder import HFWeights
from backends.megatron.balancing import balance_metrics, without_balancing
from backends.megatron.batches import collate
from backends.megatron.model import check_overrides
from common.errors import BadInput
from common.settings import TrainSettings
from data.sample import Sample
from losses import LossSettings

GLM = str(ROOT / "toy" / "glm")
AUX = ("moe_router_load_balancing_type=aux_loss", "moe_aux_loss_coeff=0.5")
BIAS = "e_score_correction_bias"


def build(*megatron: str, **settings) -> train_step.Trainer:
    settings = TrainSettings(train_dtype="fp32", megatron=megatron, **settings)
    config = read_config(GLM)
    return train_step.build_trainer(
        GLM, settings, config, steps=4, seed=1, temperature=1.0, max_response_tokens=8
    )


def routers(trainer) -> list[TopKRouter]:
    return [module for module in trainer.gpt.modules() if isinstance(module, TopKRouter)]


def samples(n: int = 16) -> list[Sample]:
    """Return answers of several lengths, which have no gradient of their own."""
    generator = torch.Generator().manual_seed(0)

    def ids(length):
        return torch.randint(3, 15, (length,), generator=generator).tolist()

    answers = []
    for i in range(n):
        sample = Sample(ids(5 + i % 3), index=i, response_ids=ids(length := 2 + i % 5))
        sample.loss_mask, sample.weight_versions = [1] * length, [0] * length
        sample.rollout_logprobs, sample.advantages = [-1.0] * length, [0.0] * length
        answers.append(sample)
    return answers


def gradient(trainer, **loss) -> list[torch.Tensor]:
    """Return the gradient of each router's weight. All of it comes from the auxiliary loss."""
    (batch,) = train_step.pack(trainer, samples())
    train_step.backward(trainer, batch, LossSettings(**loss))
    return [router.weight.main_grad.clone() for router in routers(trainer)]


# --- the auxiliary loss ---------------------------------------------------------------------------


def test_it_is_the_switch_transformers_a_mean_over_tokens(fresh_megatron):
    """By the formula, from the last router's own inputs: later layers would add to its gradient."""
    trainer, seen = build(*AUX), []
    router = routers(trainer)[-1]
    router.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    last = gradient(trainer)[-1]
    (batch,) = train_step.pack(trainer, samples())
    counts_T = ~batch.microbatches[0].is_filler_T
    weight = router.weight.detach().requires_grad_()
    scores_TE = torch.sigmoid(seen[0].flatten(0, 1)[counts_T] @ weight.T)
    scores_TE = scores_TE / scores_TE.sum(-1, keepdim=True)
    chosen = torch.zeros_like(scores_TE).scatter(1, scores_TE.topk(2).indices, 1)
    share_E = chosen.mean(0) / 2
    loss = 8 * (share_E * scores_TE.mean(0)).sum()
    (0.5 * loss).backward()
    torch.testing.assert_close(last, weight.grad, rtol=1e-4, atol=1e-7)
    assert 1 <= float(loss) < 2  # 1: all experts are alike


@pytest.mark.parametrize("aggregation", ["sequence", "constant"])
def test_it_does_not_depend_on_what_the_policy_loss_is_a_mean_over(fresh_megatron, aggregation):
    trainer = build(*AUX)
    by_token, other = gradient(trainer), gradient(trainer, aggregation=aggregation)
    for a, b in zip(by_token, other):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-8)


def test_it_depends_on_the_split_into_micro_batches(fresh_megatron):
    """A share of tokens is counted in each; docs/usage.md says so, and how much it is here."""
    trainer = build(*AUX)
    whole = torch.cat(gradient(trainer))
    trainer.settings = replace(trainer.settings, microbatch_tokens=48)
    split = torch.cat(gradient(trainer))
    differs = (split - whole).norm() / whole.norm()
    print(f"gradient of the auxiliary loss, whole against four micro-batches: {differs:.2f}")
    assert 0.05 < differs < 1.0


def test_its_mean_is_a_metric(fresh_megatron):
    trainer = build(*AUX)
    batches = train_step.pack(trainer, samples())
    balance_metrics(trainer, batches)  # of what ran before
    gradient(trainer)
    assert 1 <= balance_metrics(trainer, batches)["moe_aux_loss"] < 2
    assert balance_metrics(build(), batches) == {}


def test_mini_batches_without_tokens_are_not_in_the_mean(fresh_megatron):
    trainer, answers = build(*AUX, minibatches=2), samples()
    for sample in answers[8:]:
        sample.loss_mask = [0] * len(sample.loss_mask)
    balance_metrics(trainer, train_step.pack(trainer, answers))
    metrics = train_step.update_policy(trainer, train_step.pack(trainer, answers), LossSettings())
    assert 1 <= metrics["moe_aux_loss"] < 2


def test_a_micro_batch_of_filler_has_no_auxiliary_loss(fresh_megatron):
    """A data-parallel rank has one where there are fewer samples than ranks."""
    trainer = build(*AUX)
    (batch,) = train_step.pack(trainer, samples())
    empty = collate([], [], device=torch.device("cpu"))
    batch.microbatches.append(empty)
    batch.plan[0].append([])
    balance_metrics(trainer, [batch])  # of what ran before
    train_step.backward(trainer, batch, LossSettings())
    assert 1 <= balance_metrics(trainer, [batch])["moe_aux_loss"] < 2
    with_filler = [router.weight.main_grad.clone() for router in routers(trainer)]
    for a, b in zip(with_filler, gradient(trainer)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-8)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Return {layout: (report, gradient)} of the auxiliary loss alone."""
    out, found = tmp_path_factory.mktemp("aux"), {}
    (out / "d.jsonl").write_bytes(b"".join(sample.to_json() + b"\n" for sample in samples(24)))
    layouts = {"one": (1, [1, 1, 1, 1]), "tp": (2, [2, 2, 1, 1]), "pp": (2, [1, 1, 2, 1])}
    layouts |= {"cp": (2, [1, 1, 1, 2]), "tp pp": (4, [2, 2, 2, 1])}
    for ranks in (1, 2, 4):
        cases = {
            name: dict(
                folder=GLM, samples=str(out / "d.jsonl"), splits=splits, noise=0,
                train=dict(train_dtype="fp32", microbatch_tokens=4096, megatron=AUX),
            )
            for name, (of_ranks, splits) in layouts.items()
            if of_ranks == ranks
        }  # fmt: skip
        (out / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
        torchrun("tests/workers/routed.py", out, out / "cases.json", ranks=ranks)
        for name in cases:
            report = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
            found[name] = report, load_file(out / f"{name}.safetensors")
    return found


@pytest.mark.complete
@pytest.mark.parametrize("layout", ["tp", "pp", "cp", "tp pp"])
def test_ranks_that_share_a_micro_batch_count_together(measured, layout):
    (report, gradient), (expected_report, expected) = measured[layout], measured["one"]
    assert report["moe_aux_loss"] == pytest.approx(expected_report["moe_aux_loss"], rel=1e-4)
    for name, tensor in expected.items():
        torch.testing.assert_close(gradient[name], tensor, rtol=1e-3, atol=1e-5)


# --- the correction bias --------------------------------------------------------------------------


def test_the_bias_rises_where_an_expert_has_few_tokens(fresh_megatron):
    trainer = build("moe_router_bias_update_rate=0.25")
    counts, before = [], [router.expert_bias.clone() for router in routers(trainer)]
    for router in routers(trainer):
        router.register_forward_hook(lambda _, __, output: counts.append(output[1].sum(0)))
    (batch,) = train_step.pack(trainer, samples())
    batch.microbatches.append(collate([], [], tp=64, device=torch.device("cpu")))  # all filler
    train_step.backward(trainer, batch, LossSettings())
    for router, count, bias in zip(routers(trainer), counts, before):
        moved = (count.float().mean() - count).sign() * 0.25
        torch.testing.assert_close(router.expert_bias, bias + moved)
        assert moved.abs().sum() > 0


@pytest.mark.complete
def test_the_bias_is_alike_on_all_ranks_and_counts_their_tokens(tmp_path):
    """--check-sync: every rank's engine gets the same; the last exported bias is one rank's."""
    given = ["--model", GLM, "--megatron", "moe_router_bias_update_rate=0.01", "--check-sync"]
    given += ["--prompts-per-step", "4", "--eval-samples", "16", "--steps", "1", "--name"]
    biases = {}
    for name, ranks, more in (("one", 1, []), ("ep", 2, ["--ep", "2"]), ("pp", 2, ["--pp", "2"])):
        run = [*given, name, *more, "--rollout-dtype", "fp32", "--train-dtype", "fp32"]
        torchrun(ROOT / "loop_sync.py", *run, ranks=ranks, cwd=tmp_path)
        export = HFWeights(tmp_path / "runs" / name / "model-bf16")
        names = sorted(name for name in export.file_of if name.endswith(BIAS))
        biases[name] = torch.stack([export.slice(name, None, 0, 0) for name in names])
    torch.testing.assert_close(biases["pp"], biases["one"], rtol=0, atol=1e-6)
    torch.testing.assert_close(biases["ep"], biases["one"], rtol=0, atol=1e-6)


def test_tokens_are_counted_exactly_in_bf16_too(fresh_megatron):
    """A count in BF16 has eight bits: beyond 256 tokens the bias would follow rounding errors."""
    config = read_config(GLM)
    bf16 = train_step.build_trainer(
        GLM, TrainSettings(), config, steps=4, seed=1, temperature=1.0, max_response_tokens=8
    )
    for router in routers(bf16):
        assert router.local_tokens_per_expert.dtype == router.expert_bias.dtype == torch.float32


@pytest.mark.complete
def test_the_moving_bias_reaches_the_engine_checkpoints_and_exports(tmp_path):
    """--check-sync compares it in each step; a resumed run goes on from it, digit for digit."""
    given = ["--model", GLM, "--megatron", "moe_router_bias_update_rate=0.01", "--check-sync"]
    given += ["--prompts-per-step", "4", "--eval-samples", "16", "--save-every", "2"]
    given += ["--lr-schedule", "constant", "--steps"]
    for name, *runs in (("whole", ["4"]), ("resumed", ["2"], ["4", "--resume"])):
        for more in runs:
            torchrun(ROOT / "loop_sync.py", *given, *more, "--name", name, ranks=1, cwd=tmp_path)
    whole, resumed = (metrics_of(tmp_path / "runs" / name)[-1] for name in ("whole", "resumed"))
    for key in ("loss", "grad_norm", "mismatch_abs"):
        assert whole[key] == resumed[key]
    source, export = HFWeights(GLM), HFWeights(tmp_path / "runs" / "resumed" / "model-bf16")
    for name in (name for name in source.file_of if name.endswith(BIAS)):
        moved = export.slice(name, None, 0, 0) - source.slice(name, None, 0, 0)
        steps = moved / 0.01
        assert steps.abs().max() > 0.5
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)


# --- frozen routers -------------------------------------------------------------------------------


def test_frozen_routers_stay_and_the_rest_learns(fresh_megatron):
    trainer = build(freeze_moe_router=True)
    frozen = [router.weight.detach().clone() for router in routers(trainer)]
    learns = trainer.gpt.decoder.layers[0].mlp.linear_fc1.weight
    before = learns.detach().clone()
    answers = [replace(sample, advantages=[1.0] * len(sample.response_ids)) for sample in samples()]
    batches = train_step.pack(trainer, answers)
    train_step.update_policy(trainer, batches, LossSettings())
    assert all(torch.equal(r.weight, was) for r, was in zip(routers(trainer), frozen))
    assert not torch.equal(learns, before)


# --- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize("megatron, message", [
    (["moe_aux_loss_coeff=0.1"], "give both, or neither"),
    (["moe_router_load_balancing_type=aux_loss"], "give both, or neither"),
    (["moe_router_load_balancing_type=seq_aux_loss", "moe_aux_loss_coeff=0.1"], "for one sequence"),
    (["moe_router_load_balancing_type=global_aux_loss", "moe_aux_loss_coeff=0.1"], "tokens of one"),
    (["moe_router_load_balancing_type=sinkhorn"], "sinkhorn is none of none, aux_loss"),
    (["moe_router_load_balancing_type=aux_loss", "moe_aux_loss_coeff=-1"], "not negative"),
    (["moe_router_bias_update_rate=NaN"], "must be"),
    (["moe_router_bias_update_rate=x"], "wrong type"),
])  # fmt: skip
def test_what_would_do_nothing_or_harm_is_refused(megatron, message):
    with pytest.raises(BadInput, match=message):
        check_overrides(TrainSettings(megatron=tuple(megatron)), read_config(GLM))


def test_frozen_routers_have_no_use_for_an_auxiliary_loss():
    with pytest.raises(BadInput, match="--freeze-moe-router does not: give one"):
        check_overrides(TrainSettings(megatron=AUX, freeze_moe_router=True), read_config(GLM))


def test_a_critic_has_none_of_it():
    given = TrainSettings(megatron=(*AUX, "adam_eps=1e-9"), freeze_moe_router=True)
    assert without_balancing(given) == TrainSettings(megatron=("adam_eps=1e-9",))


def test_a_model_without_such_a_part_is_refused(models):
    dense, without_bias = (read_config(models[name]) for name in ("qwen3", "qwen3_moe"))
    for config, pair in ((dense, AUX[1]), (without_bias, "moe_router_bias_update_rate=0.1")):
        with pytest.raises(BadInput, match="is not a field that can be set there"):
            check_overrides(TrainSettings(megatron=(pair,)), config)
