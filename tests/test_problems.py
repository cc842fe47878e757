"""A run with several mistakes names all of them, once, before anything is started.

Why: a mistake that shows only when another one is mended costs one more start. Mistakes of model
folders are here too. Other single mistakes are tested beside the code that finds them, odd values
in test_fuzz.py. Not covered: that a good model is never refused.
"""

import json

import loop_async
import loop_sync
import pytest
from conftest import FAMILIES, ROOT, SMALL, start_main, write_model
from safetensors.torch import load_file, save_file

from backends.huggingface.config import FAMILIES as ARCHITECTURES, read_config, rope_of
from backends.huggingface.folder import check_model_folder
from common import distributed
from common.errors import BadInput, ProblemList, all_problems
from common.settings import DataSettings
from data.prompts import read_prompts
from data.tokenizer import load_tokenizer


@all_problems
def check_number(number: int):
    if number % 2:
        yield f"{number} is odd"
    if number > 9:
        yield f"{number} is large"
    if number > 99:
        raise BadInput(f"{number} is so large that nothing more can be said", "and a second thing")
    return number // 2


def test_a_check_returns_or_raises_all_it_has_found():
    assert check_number(8) == 4
    with pytest.raises(BadInput) as refused:
        check_number(101)
    assert refused.value.problems == (
        "101 is odd",
        "101 is large",
        "101 is so large that nothing more can be said",
        "and a second thing",
    )
    assert str(refused.value).splitlines()[:2] == ["4 problems:", "  - 101 is odd"]
    assert str(BadInput("one")) == "one"


def test_problems_of_several_checks_are_each_said_once():
    problems = ProblemList()
    problems.raise_if_any()
    assert [problems.collect(check_number, number) for number in (3, 8, 13, 3)] == [
        None,
        4,
        None,
        None,
    ]
    with pytest.raises(BadInput) as refused:
        problems.raise_if_any()
    assert refused.value.problems == ("3 is odd", "13 is odd", "13 is large")


def problems_of(monkeypatch, loop, *arguments, ranks: int) -> tuple[str, ...]:
    monkeypatch.setattr("sys.argv", ["loop.py", *map(str, arguments)])
    for name, value in dict(RANK=0, WORLD_SIZE=ranks, LOCAL_RANK=0).items():
        monkeypatch.setenv(name, str(value))

    def started(*_, **__):
        pytest.fail("a process group was started")

    monkeypatch.setattr(distributed, "init_distributed", started)
    with pytest.raises(BadInput) as refused:
        start_main(loop)
    return refused.value.problems


def assert_each_once(problems: tuple[str, ...], expected: list[str]) -> None:
    missing = [part for part in expected if not any(part in text for text in problems)]
    assert missing == [], problems
    assert len(problems) == len(expected), problems


def test_mistakes_of_all_flags_are_said_at_once(monkeypatch, tmp_path):
    """Every stage has about two mistakes. The model is not read yet."""
    monkeypatch.chdir(tmp_path)
    flags = ["--model", "absent", "--prompts", "toy", "absent.jsonl", "--eval-prompts", "toy:2"]
    flags += ["--steps", "0", "--temperature", "-1", "--sglang", "log_level", "--judges", "0"]
    flags += ["--clip-low", "2", "--minibatches", "0", "--lr", "-1", "--tp", "3", "--ep", "7"]
    flags += ["--rollout-ranks", "2", "--max-staleness", "-1", "--resume", "--bucket-bytes", "0"]
    expected = ["absent has no config.json", "absent.jsonl does not exist", "--eval-prompts toy:2"]
    expected += ["--steps 0", "--temperature -1.0", "--sglang 'log_level'", "--judges 0"]
    expected += ["--lr -1.0", "--clip-low 2.0", "--minibatches 0", "--ep 7"]
    expected += ["--tp 3 does not divide the 2 ranks"]
    expected += ["--max-staleness -1", "--resume needs the --name", "--bucket-bytes 0"]
    assert_each_once(problems_of(monkeypatch, loop_async, *flags, ranks=4), expected)


def test_ranks_that_cannot_be_divided_are_not_divided_further(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    flags = ["--rollout-ranks", "2", "--tp", "3"]
    problems = problems_of(monkeypatch, loop_async, *flags, ranks=2)
    assert_each_once(problems, ["--rollout-ranks 2 must leave"])


def test_mistakes_of_model_data_and_layout_are_said_at_once(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    model = write_model(tmp_path / "model", "qwen3", vocab_size=16)
    weights = load_file(model / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    rows = '{"prompt": "1+1="}\n{"prompt": "1+1=", "label": 2}\nno json\n'
    (tmp_path / "p.jsonl").write_text(rows, encoding="utf-8")
    flags = ["--model", model, "--prompts", "p.jsonl", "--sglang", "mem_fraction_sttic=1"]
    flags += ["--prompts-per-step", "3"]
    flags += ["--tp", "3", "--ep", "3", "--megatron", "num_layer=3"]
    expected = ["do not belong together", "line 1 has no label", "line 3 is not JSON"]
    expected += ["nearest is mem_fraction_static", "lm_head.weight is missing"]
    expected += ["--ep 3 must divide"]
    expected += ["num_attention_heads 4 is not divisible", "num_key_value_heads 2 is not divisible"]
    expected += ["intermediate_size 512 is not divisible", "--megatron num_layer"]
    assert_each_once(problems_of(monkeypatch, loop_sync, *flags, ranks=3), expected)


def test_without_a_readable_config_the_prompts_form_is_checked_all_the_same(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("no json", encoding="utf-8")
    (tmp_path / "p.jsonl").write_text("no json\n", encoding="utf-8")
    flags = ["--model", str(tmp_path), "--prompts", "p.jsonl", "--sglang", "x=1"]
    expected = ["config.json is not JSON", "line 1 is not JSON", "--sglang x"]
    assert_each_once(problems_of(monkeypatch, loop_async, *flags, ranks=2), expected)


def test_of_many_bad_lines_the_first_are_named(tmp_path):
    (tmp_path / "p.jsonl").write_text("bad\n" * 40, encoding="utf-8")
    path, tokenizer = str(tmp_path / "p.jsonl"), load_tokenizer(str(ROOT / "toy"))
    with pytest.raises(BadInput) as refused:
        read_prompts(path, tokenizer, DataSettings(), name="p", max_prompt_tokens=9)
    assert len(refused.value.problems) == 6
    assert "line 5" in refused.value.problems[4]
    assert "35 more rows" in refused.value.problems[5]


@pytest.mark.parametrize("name, changes, message", [
    ("config.json", dict(hidden_size=0, vocab_size=0, hidden_act="gelu", mamba=1),
     ["hidden_size", "vocab_size", "hidden_act", "mamba"]),
    ("config.json", dict(rope_parameters=dict(rope_type="default", factor=8.0)),
     ["'default' with {'factor': 8.0} are not implemented"]),
    ("config.json", dict(tie_word_embeddings=True),
     ["lm_head.weight is not the embedding and would be lost"]),
    ("config.json", dict(intermediate_size=384),
     ["mlp.gate_proj.weight has shape (512, 128), config.json implies (384, 128)"]),
    ("config.json", dict(eos_token_id=7),
     ["end at token 7 ('4') by config.json and generation_config.json, at 2 ('</s>') by the "
     "tokenizer"]),
    ("generation_config.json", dict(eos_token_id=[2, 97]), ["eos_token_id 97", "model's 97"]),
])  # fmt: skip
def test_what_does_not_agree_in_a_model_folder(tmp_path, name, changes, message):
    model = write_model(tmp_path, "qwen3")
    file = model / name
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    file.write_text(json.dumps(before | changes), encoding="utf-8")
    with pytest.raises(BadInput) as refused:
        check_model_folder(model, read_config(model), load_tokenizer(str(model)), stop=())
    assert all(part in str(refused.value) for part in message), refused.value


def changed_config(folder, family: str, *, without=(), **changes):
    """Write a model folder that holds config.json alone: transformers' own, changed."""
    config_class, fields = FAMILIES[family]
    fields = fields | {"num_local_experts": 0}  # transformers' name for num_experts
    architecture = {"architectures": [ARCHITECTURES[family]]}
    config = (
        json.loads(config_class(**{**SMALL, **FAMILIES[family][1]}).to_json_string(use_diff=False))
        | architecture
        | changes
    )
    known = json.loads((ROOT / "toy" / "config.json").read_text(encoding="utf-8")).keys()
    kept = {
        name: value
        for name, value in config.items()
        if name not in without and (name in known | fields.keys() | changes.keys() | set(SMALL))
    }
    (folder / "config.json").write_text(json.dumps(kept), encoding="utf-8")
    return folder


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("architectures", [
    "absent", None, [], ["Qwen3Model"], ["Qwen3ForSequenceClassification"],
    ["Qwen3ForCausalLM", "LlamaForCausalLM", "Qwen2ForCausalLM"],
])  # fmt: skip
def test_a_model_of_another_architecture_is_refused(tmp_path, family, architectures):
    folder = changed_config(
        tmp_path, family, **({} if architectures == "absent" else {"architectures": architectures})
    )
    if architectures == "absent":
        changed_config(tmp_path, family, without=("architectures",))
    fix = f'write "architectures": ."{ARCHITECTURES[family]}"'
    with pytest.raises(BadInput, match=fix) as refused:
        read_config(folder)
    assert len(refused.value.problems) == 1


@pytest.mark.parametrize("family, changes, message", [
    ("qwen3", dict(rope_parameters=dict(rope_type="default", rope_theta=1e6), rope_theta=5e5),
     "contradict one another"),
    ("qwen3", dict(rope_parameters=dict(rope_type="default", rope_theta=1e6),
                   rope_scaling=dict(rope_type="yarn", factor=4.0)), "yarn"),
    ("qwen3",
     dict(rope_theta=1e6, rope_scaling=dict(rope_type="yarn", factor=4.0), rope_parameters=None),
     "yarn"),
    ("qwen3", dict(head_dim=33), "rope would turn 33"),
    ("glm4_moe", dict(head_dim=66, partial_rotary_factor=0.5), "rope would turn 33"),
    ("qwen3", dict(use_sliding_window=True), "use_sliding_window is True"),
    ("qwen3", dict(layer_types=["full_attention", "sliding_attention"]), "only full_attention"),
    ("qwen3", dict(quantization_config=dict(quant_method="fp8")), "quantization_config"),
    ("qwen3", dict(auto_map=dict(AutoModelForCausalLM="model.Mine")), "auto_map"),
    ("qwen3", dict(num_labels=3), "num_labels"),
    ("qwen3_moe", dict(num_experts_per_tok=5), "num_experts_per_tok 5 must be at most"),
    ("glm4_moe", dict(n_group=3), "n_group 3 must divide the 4 experts"),
    ("glm4_moe", dict(topk_group=2), "topk_group 2 must be at most n_group"),
    ("glm4_moe", dict(first_k_dense_replace=3), "first_k_dense_replace is 3"),
    ("glm4_moe", dict(n_shared_experts=-1), "n_shared_experts is -1"),
    ("glm4_moe", dict(routed_scaling_factor=0.0), "routed_scaling_factor is 0.0"),
])  # fmt: skip
def test_a_config_that_trainer_and_engine_would_read_otherwise_is_refused(
    tmp_path, family, changes, message
):
    with pytest.raises(BadInput, match=message):
        read_config(changed_config(tmp_path, family, **changes))


@pytest.mark.parametrize("family, field, value", [
    ("qwen3", "head_dim", 128), ("qwen2", "num_key_value_heads", 32),
    ("glm4_moe", "rms_norm_eps", 1e-5), ("glm4_moe", "first_k_dense_replace", 1),
    ("glm4_moe", "n_shared_experts", 1), ("glm4_moe", "routed_scaling_factor", 1.0),
    ("llama", "num_key_value_heads", 4), ("llama", "head_dim", 32),
])  # fmt: skip
def test_a_field_that_is_left_out_has_transformers_value(tmp_path, family, field, value):
    wide = dict(num_attention_heads=32) if value == 32 and field == "num_key_value_heads" else {}
    assert read_config(changed_config(tmp_path, family, without=(field,), **wide))[field] == value


def test_a_mixture_of_experts_without_their_number_is_no_dense_model(tmp_path):
    with pytest.raises(BadInput, match="num_experts is 0; it must be a positive integer"):
        read_config(
            changed_config(tmp_path, "qwen3_moe", without=("num_experts", "num_local_experts"))
        )


def test_glm_turns_half_of_each_head_unless_it_says_otherwise(tmp_path):
    folder = changed_config(
        tmp_path, "glm4_moe", without=("rope_parameters", "partial_rotary_factor"), rope_theta=1e6
    )
    assert rope_of(read_config(folder)) == {"rotary_base": 1e6, "rotary_percent": 0.5}


@pytest.mark.parametrize("config_eos, generation_eos, stop", [
    # Qwen3: config.json and tokenizer end at <|im_end|>; generation_config.json also lists
    # <|endoftext|>.
    (2, [2, 1], ()),
    ([5, 2, 7], None, ()),  # GLM-4.5 and Llama 3.1: the tokenizer's is one of several
    # Llama 3: config.json has the base model's token; generation_config.json adds the chat's.
    (5, [5, 2], ()),
    (None, None, ()),
    (5, None, ("</s>",)),  # they differ, and --stop says which one ends a response
])  # fmt: skip
def test_good_end_tokens_are_not_refused(tmp_path, config_eos, generation_eos, stop):
    model = write_model(tmp_path, "qwen3", eos_token_id=config_eos)
    text = json.dumps({"eos_token_id": generation_eos})
    (model / "generation_config.json").write_text(text, encoding="utf-8")
    check_model_folder(model, read_config(model), load_tokenizer(str(model)), stop=stop)


def test_a_stored_head_that_equals_the_embedding_is_not_refused(tmp_path):
    """Qwen3-0.6B has tied embeddings and stores the head all the same."""
    model = write_model(tmp_path, "qwen2")
    weights = load_file(model / "model.safetensors")
    save_file(
        weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()},
        model / "model.safetensors",
        metadata={"format": "pt"},
    )
    check_model_folder(model, read_config(model), load_tokenizer(str(model)), stop=())


def test_rope_settings_of_published_models_are_not_refused():
    older = {"rope_theta": 1000000, "rope_scaling": None, "partial_rotary_factor": 0.5}
    assert rope_of(older) == {"rotary_base": 1000000, "rotary_percent": 0.5}
    newer = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "factor": None}}
    assert rope_of(newer) == {"rotary_base": 1e6, "rotary_percent": 1.0}


@pytest.mark.parametrize("family, changes, message", [
    ("qwen3", dict(partial_rotary_factor=0.5),
     "partial_rotary_factor 0.5 is implemented for glm4_moe"),
    ("qwen3_moe", dict(n_group=2), "n_group"),
    ("qwen3", dict(num_hidden_layers=10**9), "num_hidden_layers 1000000000 must be at most 10000"),
])  # fmt: skip
def test_a_config_that_the_engine_reads_otherwise_or_nobody_has_is_refused(
    tmp_path, family, changes, message
):
    with pytest.raises(BadInput, match=message):
        read_config(changed_config(tmp_path, family, **changes))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_config_that_transformers_could_not_read_is_refused(tmp_path, encoding):
    text = (changed_config(tmp_path, "qwen3") / "config.json").read_text(encoding="utf-8")
    (tmp_path / "config.json").write_text(text, encoding=encoding)
    with pytest.raises(BadInput, match="config.json is not JSON"):
        read_config(tmp_path)
