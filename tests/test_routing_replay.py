"""Routing replay: the trainer's routers take the engine's experts, at every layout.

Why: an expert that differs from the engine's is a jump of the log-prob, and no error shows it. The
samples come from real engines in fp32. To make replay matter, the trainer's routers are disturbed:
their own choice is then another. Not covered: CUDA, experts that SGLang fuses there.
"""

import asyncio
import base64
import json
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, torchrun
from safetensors.torch import load_file
from test_engine import Pair

import rollout
import train_step
import weight_sync
from backends.huggingface.config import read_config
from backends.megatron.routing_replay import ReplayedTopK
from backends.routed_experts import pack_reported, unpack
from common.settings import TrainSettings
from data.sample import Sample
from tests.test_problems import changed_config

FAMILIES = ("qwen3_moe", "glm4_moe")
NOISE = 0.2
FULL = ["recompute_granularity=full", "recompute_method=uniform", "recompute_num_layers=1"]
MOE = ["recompute_granularity=selective", 'recompute_modules=["moe"]']
LAYOUTS = {  # ranks, [tp, ep, pp, cp], --megatron
    "one rank": (1, [1, 1, 1, 1], []),
    "full recomputation": (1, [1, 1, 1, 1], FULL),
    "experts recomputed": (1, [1, 1, 1, 1], MOE),
    "tp 2": (2, [2, 1, 1, 1], []),
    "ep 2": (2, [1, 2, 1, 1], []),
    "tp 2 ep 2": (2, [2, 2, 1, 1], []),
    "pp 2": (2, [1, 1, 2, 1], []),
    "pp 2 full recomputation": (2, [1, 1, 2, 1], FULL),
    "cp 2": (2, [1, 1, 1, 2], []),
}


# --- bytes ----------------------------------------------------------------------------------------


def config_of(tmp_path, family: str, **fields) -> dict:
    return read_config(changed_config(tmp_path, family, **fields))


def report(experts_TLK: np.ndarray) -> str:
    """Return what SGLang would report."""
    return base64.b64encode(experts_TLK.astype(np.int32).tobytes()).decode()


def test_a_sample_holds_one_byte_an_expert_and_no_dense_layer(tmp_path):
    config = config_of(tmp_path, "glm4_moe")
    random = np.random.default_rng(0)
    experts_TLK = random.permuted(np.tile(np.arange(4), (5, 2, 1)), axis=-1)[..., :2]
    packed = pack_reported(report(experts_TLK), config)
    assert len(packed) == 5 * (config["num_hidden_layers"] - 1) * 2
    sample = Sample([1, 2, 3], response_ids=[4, 5, 6], loss_mask=[1, 1, 1], routed_experts=packed)
    assert np.array_equal(unpack(sample, config), experts_TLK[:, 1:])


def test_beyond_256_experts_it_holds_two_bytes(tmp_path):
    config = config_of(tmp_path, "qwen3_moe", num_experts=300, num_local_experts=300)
    experts_TLK = np.array([[[299, 3], [0, 298]]])
    packed = pack_reported(report(experts_TLK), config)
    assert len(packed) == 2 * experts_TLK.size
    sample = Sample([1], response_ids=[2], routed_experts=packed)
    assert np.array_equal(unpack(sample, config), experts_TLK)


@pytest.mark.parametrize("tokens, mask, message", [
    (4, [1, 1, 1], "has 4 tokens; it must have 5 at least, and less than 6"),
    (0, [1, 1, 1], "has 0 tokens"),
    (6, [1, 1, 1], "has 6 tokens"),
    (3, [1, 0, 0], ""),  # nothing was sampled behind the others
    (0, [0, 0, 0], ""),
])  # fmt: skip
def test_experts_must_cover_what_was_sampled_behind_them(tmp_path, tokens, mask, message):
    config = config_of(tmp_path, "qwen3_moe")
    experts_TLK = np.tile([1, 3], (tokens, config["num_hidden_layers"], 1))
    packed = pack_reported(report(experts_TLK), config)
    sample = Sample([1, 2, 3], response_ids=[4, 5, 6], loss_mask=mask, routed_experts=packed)
    if not message:
        assert len(unpack(sample, config)) == tokens
        return
    with pytest.raises(ValueError, match=f"sample 0 of group -1: routed_experts {message}"):
        unpack(sample, config)


def test_experts_of_another_model_are_refused(tmp_path):
    config = config_of(tmp_path, "qwen3_moe")
    row = config["num_hidden_layers"] * 2
    cases = ((bytes(row + 1), "no multiple"), (bytes([4]) * row, "expert 4 of 4"))
    cases += ((bytes(row), "names an expert twice"),)  # a table that nothing was written to
    for packed, message in cases:
        with pytest.raises(ValueError, match=message):
            unpack(Sample([1], response_ids=[2], routed_experts=packed), config)


# --- one router -----------------------------------------------------------------------------------


def choose(choice: ReplayedTopK, scores_TX: torch.Tensor):
    return choice.get_replay_topk(
        scores_TX, 2, default_compute_topk=lambda scores, k, *_: torch.topk(scores, k, dim=1)
    )


def test_a_router_takes_the_engines_experts_with_its_own_scores():
    scores_TX = torch.tensor([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1]], requires_grad=True)
    choice = ReplayedTopK(replays=True)
    choice.experts_TK = torch.tensor([[0, 1], [-1, -1]], dtype=torch.int16)
    values_TK, index_TK = choose(choice, scores_TX)
    assert index_TK.tolist() == [[0, 1], [0, 1]]  # the second token's are its own
    values_TK.sum().backward()
    assert scores_TX.grad.tolist() == [[1, 1, 0], [1, 1, 0]]


def test_sets_of_experts_are_compared_not_their_order():
    choice = ReplayedTopK(replays=False)
    choice.counts = torch.zeros(2, dtype=torch.int64)
    choice.experts_TK = torch.tensor([[0, 1], [1, 0], [0, 2], [-1, -1]], dtype=torch.int16)
    _, index_TK = choose(choice, torch.tensor([[0.3, 0.2, 0.1]] * 4))
    assert index_TK.tolist() == [[0, 1]] * 4  # compared only
    assert choice.counts.tolist() == [1, 3]


def test_packed_samples_keep_their_own_experts(fresh_megatron):
    """Between them lies what has none: a last token, and padding."""
    trainer = build_glm(routing_replay="compare")
    samples = []
    for first in (0, 4):
        taken = np.tile([[first, first + 1]], (2, 3, 1)).astype(np.uint8)
        fields = dict(response_ids=[3, 4], loss_mask=[1, 1], routed_experts=taken.tobytes())
        samples.append(Sample([5], **fields))
    experts_TLK = trainer.replay.experts_of(samples, [4, 3, 2])
    assert experts_TLK[:, 0, 0].tolist() == [0, 0, -1, -1, 4, 4, -1, -1, -1]


def test_a_critic_chooses_its_own_experts(fresh_megatron):
    head = build_glm(routing_replay="rollout", head=lambda config: torch.nn.Identity())
    assert head.replay is None


def build_glm(*, head=None, with_reference=False, **settings) -> train_step.Trainer:
    folder, settings = str(ROOT / "toy" / "glm"), TrainSettings(train_dtype="fp32", **settings)
    return train_step.build_trainer(
        folder, settings, read_config(folder), steps=1, seed=1, temperature=1.0,
        max_response_tokens=8, head=head, with_reference=with_reference,
    )  # fmt: skip


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_the_frozen_reference_chooses_its_own_experts(fresh_megatron, lora_rank):
    """The policy takes the given ones, which are drawn at random here.

    The reference is another model, or, with LoRA, the same one without its adapters.
    """
    random = np.random.default_rng(0)
    ids = random.integers(3, 15, (8, 9)).tolist()
    experts = random.permuted(np.tile(np.arange(8), (8, 8, 3, 1)), axis=-1)[..., :2]
    samples = [
        Sample(row[:5], response_ids=row[5:], loss_mask=[1] * 4, rollout_logprobs=[-1.0] * 4,
               routed_experts=taken.astype(np.uint8).tobytes())
        for row, taken in zip(ids, experts)
    ]  # fmt: skip
    found = {}
    for mode in ("none", "rollout"):
        trainer = build_glm(routing_replay=mode, with_reference=True, lora_rank=lora_rank)
        train_step.add_logprobs(trainer, train_step.pack(trainer, samples))
        found[mode] = [
            np.concatenate([getattr(sample, name) for sample in samples])
            for name in ("old_logprobs", "ref_logprobs")
        ]
    (own, reference), (replayed, same_reference) = found["none"], found["rollout"]
    assert np.array_equal(reference, same_reference) and np.array_equal(own, reference)
    assert np.abs(replayed - own).mean() > 0.1


# --- real engines, and every layout ---------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(models) -> dict[str, str]:
    """Return a model of each family. A random GLM would send every token to the same experts."""
    return {"qwen3_moe": str(models["qwen3_moe"]), "glm4_moe": str(ROOT / "toy" / "glm")}


@pytest.fixture(scope="module")
def pairs(one_rank, folders):
    """Return {family: a trainer and an engine that reports experts, both in fp32}."""
    pairs = {name: Pair("fp32", "fp32", folders[name], reports_experts=True) for name in FAMILIES}
    yield pairs
    for pair in pairs.values():
        pair.engine.shutdown()


@pytest.fixture(scope="module")
def engines_samples(pairs, tmp_path_factory):
    """Return {family: dump of 16 samples}."""
    dumps = {}
    for family, pair in pairs.items():
        samples = pair.generate(prompts=8, n=2)
        dumps[family] = tmp_path_factory.mktemp("dumps") / f"{family}.jsonl"
        dumps[family].write_bytes(b"".join(sample.to_json() + b"\n" for sample in samples))
    return dumps


def measure(cases: dict[str, dict], out, *, ranks: int) -> dict:
    """Return {case: (its report, its gradient)}."""
    (out / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    torchrun("tests/workers/routed.py", out, out / "cases.json", ranks=ranks, timeout=900)
    return {
        name: (
            json.loads((out / f"{name}.json").read_text(encoding="utf-8")),
            load_file(out / f"{name}.safetensors"),
        )
        for name in cases
    }


@pytest.fixture(scope="module")
def measured(engines_samples, folders, tmp_path_factory):
    """Return {(family, layout, noise): (report, gradient)}, all with replay; and without, noise."""
    found = {}
    for ranks in (1, 2):
        cases = {}
        for family in FAMILIES:
            common = dict(folder=folders[family], samples=str(engines_samples[family]))
            for layout, (of_ranks, splits, megatron) in LAYOUTS.items():
                if of_ranks != ranks:
                    continue
                train = dict(train_dtype="fp32", routing_replay="rollout", megatron=megatron)
                for noise in (0, NOISE):
                    case = dict(splits=splits, train=train, noise=noise)
                    cases[f"{family}|{layout}|{noise}"] = common | case
            if ranks == 1:
                train = dict(train_dtype="fp32", routing_replay="compare")
                case = dict(splits=[1, 1, 1, 1], train=train, noise=NOISE)
                cases[f"{family}|without|{NOISE}"] = common | case
        found |= measure(cases, tmp_path_factory.mktemp("routed"), ranks=ranks)
    return {tuple(name.split("|")): value for name, value in found.items()}


each_layout = pytest.mark.parametrize("layout", LAYOUTS)
each_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.mark.complete
@each_layout
@each_family
def test_logprobs_equal_the_engines(measured, family, layout):
    report, _ = measured[family, layout, "0"]
    assert report["largest"] < 1e-4
    assert report["route_mismatch"] < 1e-3


@pytest.mark.complete
@each_layout
@each_family
def test_gradients_equal_one_ranks_behind_disturbed_routers(measured, family, layout):
    report, gradient = measured[family, layout, str(NOISE)]
    expected_report, expected = measured[family, "one rank", str(NOISE)]
    assert 0.1 < report["route_mismatch"] == pytest.approx(expected_report["route_mismatch"])
    assert gradient.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(gradient[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.complete
@each_family
def test_without_replay_disturbed_routers_take_other_experts(measured, family):
    """Gate values alone move a log-prob less than other experts do."""
    with_replay, gradient = measured[family, "one rank", str(NOISE)]
    without, other = measured[family, "without", str(NOISE)]
    assert without["route_mismatch"] > 0.1
    assert without["mean"] > with_replay["mean"] * 1.1
    differs = [name for name in gradient if not torch.allclose(gradient[name], other[name])]
    assert differs


@pytest.mark.complete
def test_requests_that_continue_over_an_update_append(pairs):
    """What older weights have routed stays as it was; what comes after is routed by the new ones.

    The same requests, undisturbed, show what the older weights do.
    """
    pair = pairs["glm4_moe"]
    engine = pair.engine
    samples = [one for prompt in pair.data.held_out[:8] for one in rollout.new_group(prompt, 2)]
    sampling = [
        {**one, "max_new_tokens": 100, "ignore_eos": True}
        for one in rollout.sampling_params(pair.data, pair.settings, samples)
    ]
    prompts, before = [sample.prompt_ids for sample in samples], engine.version
    started = time.perf_counter()
    undisturbed = engine.call(engine.generate(prompts, sampling))
    undisturbed_s = time.perf_counter() - started
    running = asyncio.run_coroutine_threadsafe(engine.generate(prompts, sampling), engine.loop)
    time.sleep(undisturbed_s / 3)
    with torch.no_grad():
        for name, parameter in pair.trainer.gpt.named_parameters():
            if name.endswith("router.weight"):
                parameter.add_(torch.randn_like(parameter))
    weight_sync.send_weights(pair.weights, engine, version=before + 1)
    changed = 0
    for prompt, output, alone in zip(prompts, running.result(), undisturbed):
        versions = output["weight_versions"]
        assert set(versions) == {before, before + 1}
        rows = len(prompt) + len(versions) - 1
        row = len(output["routed_experts"]) // rows
        assert len(output["routed_experts"]) == rows * 3 * 2  # three layers, two experts
        old = (len(prompt) + versions.index(before + 1) - 1) * row
        assert output["routed_experts"][:old] == alone["routed_experts"][:old]
        changed += output["routed_experts"][old:] != alone["routed_experts"][old:]
    assert changed == len(prompts)
