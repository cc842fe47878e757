"""rollout.py without an engine: samples, prompt data, settings. Whoever mistypes an input learns file, line, rule and fix before anything starts.

Generation itself is tested in test_engine.py.
"""

import json
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

import rollout
from hf_names import read_config
from rollout import RolloutSettings, Sample, check_rollout_settings, end_tokens, load_data, load_tokenizer, read_prompts
from run import BadInput
from toy.task import is_held_out, problems


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(rollout.Path(rollout.__file__).parent / "toy"))


def test_a_sample_is_one_json_line():
    logprobs = np.float32([-0.1, -2.3333333])
    sample = Sample([1, 5], "3", "7", 4, [6, 2], "4", list(logprobs), [1, 0], [3, 3], "stop", 0.5, -1.25, {"source": "töy\n"})
    line = replace(sample, rollout_logprobs=logprobs).to_json()
    assert b"\n" not in line
    assert np.array_equal(np.float32(Sample.from_json(line).rollout_logprobs), logprobs)  # float32 survives the text exactly
    assert replace(Sample.from_json(line), rollout_logprobs=sample.rollout_logprobs) == sample


def test_toy_problems_are_right_disjoint_and_seeded():
    train, held = (list(islice(problems(seed=0, held_out=held), 2000)) for held in (False, True))
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held}
    assert all(is_held_out(row["prompt"]) for row in held)
    for row in train[:50]:
        a, b = row["prompt"][:-1].split("+")
        assert int(row["label"][::-1]) == int(a) + int(b)
    assert train[:5] == list(islice(problems(seed=0, held_out=False), 5)) != list(islice(problems(seed=1, held_out=False), 5))


def test_the_toy_prompt_is_one_token_a_character(tokenizer):
    assert tokenizer("046+789=").input_ids == [1, 3, 7, 9, 13, 10, 11, 12, 14]
    assert tokenizer.decode([8, 6, 11, 2], skip_special_tokens=True) == "538"


def write(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def test_text_and_chat_prompts(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{% for m in messages %}{{ m['content'] }}={% endfor %}")
    rows = {"prompt": "1+2=", "label": "3", "metadata": {"source": "text"}}, {"prompt": [{"role": "user", "content": "1+2"}], "label": 3}
    text, chat = read_prompts(write(tmp_path / "p.jsonl", *rows), tokenizer, max_prompt_tokens=9)
    assert text.prompt_ids == [1, *chat.prompt_ids] and chat.prompt == "1+2=" and chat.label == 3 and text.metadata == {"source": "text"}
    # A template writes its own special tokens: nothing is added to it.


@pytest.mark.parametrize("line, message", [
    ("{not json", "line 2 is not JSON"),
    ("[]", "line 2 has no prompt"),
    ({"label": 1}, "line 2 has no prompt"),
    ({"prompt": "", "label": 1}, "line 2 has no prompt"),
    ({"prompt": [], "label": 1}, "line 2 has no prompt"),
    ({"prompt": "1+1="}, 'line 2 needs a "label"'),
    ({"prompt": "1+1=", "label": 2, "metadata": [1]}, "metadata"),
    ({"prompt": 12, "label": 1}, "is a int"),
    ({"prompt": [{"role": "user", "content": "1"}], "label": 1}, "no chat template"),
    ({"prompt": "1" * 30, "label": 1}, "has 31 tokens; it must have 1 to 20"),
])  # fmt: skip
def test_a_bad_line_is_named(tokenizer, tmp_path, line, message):
    with pytest.raises(BadInput, match=message):
        read_prompts(write(tmp_path / "p.jsonl", {"prompt": "1+1=", "label": 2}, line), tokenizer, max_prompt_tokens=20)


def test_no_prompts_at_all(tokenizer, tmp_path):
    with pytest.raises(BadInput, match="holds no prompts"):
        read_prompts(write(tmp_path / "p.jsonl", "", ""), tokenizer, max_prompt_tokens=20)
    with pytest.raises(BadInput, match="does not exist"):
        read_prompts(str(tmp_path / "none.jsonl"), tokenizer, max_prompt_tokens=20)


def test_file_prompts_come_in_new_seeded_orders(models, tmp_path):
    path = write(tmp_path / "p.jsonl", *({"prompt": f"{i}+1=", "label": str(i + 1)} for i in range(5)))
    settings, model = RolloutSettings(prompts=path), str(models["qwen3"])
    config = read_config(model)
    first, again, other = (list(islice(load_data(model, settings, config, seed=seed).stream, 10)) for seed in (0, 0, 1))
    assert first == again != other
    assert {sample.label for sample in first[:5]} == {sample.label for sample in first[5:]} == {"1", "2", "3", "4", "5"}
    assert [sample.group for sample in first] == list(range(10))
    assert load_data(model, settings, config, seed=0).held_out == []


@pytest.mark.parametrize("changes, message", [
    (dict(temperature=0.0), "--temperature 0.0 must be above 0"),
    (dict(prompts_per_step=3), "not divisible by the 2 engines"),
    (dict(engine_tp=3), "--engine-tp 3 does not divide the 2 ranks"),
    (dict(samples_per_prompt=1), "at least 2"),
    (dict(max_response_tokens=256), "context, 256"),
    (dict(eval_samples=0), "--eval-samples 0"),
    (dict(sglang=("mem_fraction_sttic=0.5",)), "nearest is mem_fraction_static"),
    (dict(sglang=("dtype=half",)), "is not a field"),
    (dict(sglang=("log_level",)), "key=value"),
])  # fmt: skip
def test_settings_that_cannot_work(models, changes, message):
    with pytest.raises(BadInput, match=message):
        check_rollout_settings(RolloutSettings(**changes), read_config(models["qwen3"]), world_size=2)


def test_end_tokens(models, tokenizer, tmp_path):
    assert end_tokens(str(models["qwen3"]), tokenizer, ("=",)) == [2, 14]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert end_tokens(str(tmp_path), tokenizer, ()) == [2, 7, 8]
    with pytest.raises(BadInput, match="not one token"):
        end_tokens(str(tmp_path), tokenizer, ("==",))
