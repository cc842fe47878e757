"""--reference: a model of any architecture with the same tokenizer, and what is refused.

A teacher, or the reference of a KL, scores the policy's own tokens. One with other token ids would
do so without an error, and teach nonsense. One that the layout cannot hold would fail in the middle
of the start. What such a model computes is compared with transformers in test_distill.py. Not
covered: GPUs.
"""

import json
import shutil

import pytest
from conftest import FAMILIES, write_model

from backends.huggingface.config import read_config
from backends.megatron.model import init_parallel, load_reference
from common.errors import BadInput
from common.settings import TrainSettings
from harness.memory import trainer_bytes
from harness.model_checks import check_reference
from harness.plan import plan_of
from loop_sync import Settings
from losses import LossSettings


def refuse(models, folder, message: str, *, family="qwen3", longest=40, world_size=4, **settings):
    config = read_config(models[family])
    settings = TrainSettings(reference=str(folder), **settings)
    sizes = dict(world_size=world_size, longest=longest)
    with pytest.raises(BadInput, match=message):
        check_reference(settings, config, str(models[family]), **sizes)


@pytest.fixture
def folder(models, tmp_path):
    """A copy of the small Llama, to be spoilt."""
    return shutil.copytree(models["llama"], tmp_path / "reference")


def rewrite(file, change) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content), encoding="utf-8")


def test_a_model_of_another_family_and_size_is_taken(models, tmp_path):
    config, model = read_config(models["qwen3"]), models["qwen3"]
    larger = write_model(tmp_path / "larger", "llama", hidden_size=256, vocab_size=128)
    for name in (models["glm4_moe"], models["qwen2"], larger):
        settings = TrainSettings(reference=str(name), tp=2, pp=2)
        check_reference(settings, config, model, world_size=4, longest=40)


def test_a_dense_reference_of_a_mixture_under_expert_parallelism_is_taken(models):
    config, model = read_config(models["glm4_moe"]), models["glm4_moe"]
    balance = ("moe_router_bias_update_rate=0.001",)
    settings = TrainSettings(reference=str(models["llama"]), ep=2, megatron=balance)
    check_reference(settings, config, model, world_size=4, longest=40)


def test_a_model_with_another_tokenizer_is_refused(models, folder):
    def swap(content):
        vocabulary = content["model"]["vocab"]
        vocabulary["1"], vocabulary["2"] = vocabulary["2"], vocabulary["1"]

    rewrite(folder / "tokenizer.json", swap)
    refuse(models, folder, "has another tokenizer: token 4 is '2', the model's is '1', and 2 dif")


def test_a_model_with_one_token_more_is_refused(models, folder):
    rewrite(folder / "tokenizer.json", lambda content: content["model"]["vocab"].update({"ß": 60}))
    refuse(models, folder, "token 60 is 'ß', the model's is None, and 1 differ in all")


def test_a_model_without_a_tokenizer_is_refused(models, folder):
    (folder / "tokenizer.json").unlink()
    refuse(models, folder, f"{folder}/tokenizer.json cannot be read")


@pytest.mark.parametrize("text", ["", "{}", "[1]", "null"])
def test_a_model_whose_tokenizer_is_none_is_refused(models, folder, text):
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    refuse(models, folder, f"{folder}/tokenizer.json is no tokenizer .*: copy it again")


def test_a_model_without_weights_is_refused(models, folder):
    (folder / "model.safetensors").unlink()
    refuse(models, folder, "has no .*safetensors")


def test_a_model_with_fewer_tokens_is_refused(models, tmp_path):
    small = write_model(tmp_path / "small", "llama", vocab_size=96)
    refuse(models, small, "has vocab_size 96, the model 97: it must know every token")


def test_a_model_that_cannot_read_the_longest_sample_is_refused(models):
    refuse(models, models["qwen2"], "max_position_embeddings 256, and .* 257 tok", longest=257)


@pytest.mark.parametrize("settings, changes, message", [
    (dict(tp=4), dict(num_attention_heads=8, num_key_value_heads=4, intermediate_size=514),
     "--reference .*: intermediate_size 514 is not divisible by --tp 4"),
    (dict(pp=4), dict(num_hidden_layers=1), "--reference .*: --pp 4 leaves the last stage without"),
    (dict(megatron=("recompute_granularity=full",)), {}, "--reference .*megatron-core refuses it"),
])  # fmt: skip
def test_a_model_that_the_layout_cannot_hold_is_refused(
    models, tmp_path, settings, changes, message
):
    folder = write_model(tmp_path / "odd", "llama", **changes)
    refuse(models, folder, message, **settings)


def test_what_the_ranks_do_not_allow_is_said_once_of_the_model(models):
    config, model = read_config(models["qwen3"]), models["qwen3"]
    settings = TrainSettings(reference=str(models["llama"]), tp=3)
    check_reference(settings, config, model, world_size=4, longest=40)


# --- what is taken ------------------------------------------------------------------------------


def test_a_plan_needs_no_weights_and_no_tokenizer(models, folder):
    for name in ("model.safetensors", "tokenizer.json"):
        (folder / name).unlink()
    settings = TrainSettings(reference=str(folder))
    check_reference(settings, read_config(models["qwen3"]), None, world_size=1, longest=40)


def test_a_plan_counts_the_reference_s_own_parameters(models, tmp_path):
    """The same in twice the width, and none of it where it is offloaded."""
    wide = write_model(tmp_path / "wide", "llama", hidden_size=256)
    sizes = {}
    for name, train in {
        "own": {}, "wide": dict(reference=str(wide)),
        "offloaded": dict(reference=str(wide), offload_reference=True),
    }.items():  # fmt: skip
        settings = Settings(train=TrainSettings(**train), loss=LossSettings(kl_coef=0.1))
        load = dict(world_size=1, trainer_ranks=1, rollout_ranks=1, longest=40)
        plan = plan_of(settings, read_config(models["llama"]), **load)
        sizes[name] = plan.reference and plan.reference["hidden_size"]
    assert sizes == {"own": 128, "wide": 256, "offloaded": None}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bytes_that_are_planned_are_those_that_are_held(fresh_megatron, models, family):
    settings = TrainSettings(reference=str(models[family]))
    config, own = read_config(models["qwen3"]), read_config(models[family])
    init_parallel(settings, seed=1)
    module = load_reference(str(models["qwen3"]), settings, config)
    held = sum(p.numel() * p.element_size() for p in module.parameters())
    load = dict(element_bytes=2, tokens=1, microbatches=1, recompute=False, reference=own)
    planned = trainer_bytes(config, ranks=1, tp=1, pp=1, ep=1, **load)["reference"]
    assert planned == held and not any(p.requires_grad for p in module.parameters())
