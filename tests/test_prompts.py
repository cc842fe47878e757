"""prompts.py and reasoning_gym_tasks.py: files, fields, chat, mixtures, generated problems. Whoever mistypes an input learns file, row, rule and fix.

reasoning-gym is no requirement of this repository, so a stand-in takes its place: a module with the four names that are used of it, which behave as those of
reasoning-gym 0.1.25 do (create_dataset and its seed + index, factory.DATASETS, score_answer's parts of 1, utils.extract_answer). Not covered: that a later
version still has them, and that its tasks which are not refused evaluate nothing.
"""

import json
import random
import re
import sys
from collections import Counter
from dataclasses import replace
from itertools import islice
from types import ModuleType

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import reasoning_gym_tasks
from hf_config import read_config
from prompts import fitting, load_data, mixture, names, read_prompts, toy_prompts, weighted
from reward import RewardSettings, check_reward_settings, reasoning_gym_reward
from rollout import Prompts, RolloutSettings
from run import REPOSITORY, BadInput
from sample import DataSettings, Sample, end_tokens, load_tokenizer
from toy.task import is_held_out, problems

TOY = str(REPOSITORY / "toy")
CHAT = "{% for m in messages %}{{ m['role'][0] }}{{ m['content'] }}={% endfor %}"


@pytest.fixture
def tokenizer():
    return load_tokenizer(TOY)


def write(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def write_parquet(path, *rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return str(path)


def read(path, tokenizer, *, max_prompt_tokens=40, **settings) -> list[Sample]:
    return read_prompts(path, tokenizer, DataSettings(**settings), name="file", max_prompt_tokens=max_prompt_tokens)


def data(**settings):
    return load_data(TOY, RolloutSettings(**settings), read_config(TOY), seed=1)


def test_a_sample_is_one_json_line():
    logprobs = np.float32([-0.1, -2.3333333])
    sample = Sample([1, 5], "3", "7", 4, 0, [6, 2], "4", list(logprobs), [1, 0], [3, 3], "stop", 0.5, source="töy\n")
    line = replace(sample, rollout_logprobs=logprobs).to_json()
    assert b"\n" not in line
    assert np.array_equal(np.float32(Sample.from_json(line).rollout_logprobs), logprobs)  # float32 survives the text exactly
    assert replace(Sample.from_json(line), rollout_logprobs=sample.rollout_logprobs) == sample


# --- the toy ----------------------------------------------------------------------------------------------------------------------------------


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


def test_by_default_a_run_gets_the_toy_as_it_comes():
    toy = data()
    stream, held_out = list(islice(toy.stream, 300)), toy.held_out
    assert [sample.prompt for sample in stream] == [row["prompt"] for row in islice(problems(seed=1, held_out=False), 300)]
    assert [sample.prompt for sample in held_out] == [row["prompt"] for row in islice(problems(seed=0, held_out=True), 512)]
    assert [sample.group for sample in stream] == list(range(300)) and [sample.group for sample in held_out] == list(range(512))
    assert stream[0].source == "toy" and toy.longest == 9 + 8


def test_end_tokens(models, tokenizer, tmp_path):
    assert end_tokens(str(models["qwen3"]), tokenizer, ("=",)) == [2, 14]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}', encoding="utf-8")
    assert end_tokens(str(tmp_path), tokenizer, ()) == [2, 7, 8]
    with pytest.raises(BadInput, match="not one token"):
        end_tokens(str(tmp_path), tokenizer, ("==",))


# --- rows -------------------------------------------------------------------------------------------------------------------------------------


def test_text_and_chat_prompts(tokenizer, tmp_path):
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}={% endfor %}"
    rows = {"prompt": "1+2=", "label": "3", "metadata": {"level": 4}}, {"prompt": [{"role": "user", "content": "1+2"}], "label": 3}
    text, chat = read(write(tmp_path / "p.jsonl", *rows), tokenizer)
    assert text.prompt_ids == [1, *chat.prompt_ids] and chat.prompt == "1+2=" and chat.label == 3
    assert text.metadata == {"level": 4} and chat.metadata == {} and text.source == chat.source == "file"
    # A template writes its own special tokens: nothing is added to it.


def test_chat_wraps_text_and_the_system_message_goes_first(tokenizer, tmp_path):
    tokenizer.chat_template = CHAT
    path = write(tmp_path / "p.jsonl", {"prompt": "1+2", "label": 3}, {"prompt": [{"role": "user", "content": "4+5"}], "label": 9})
    assert [sample.prompt for sample in read(path, tokenizer, chat=True)] == ["u1+2=", "u4+5="]
    assert [sample.prompt for sample in read(path, tokenizer, chat=True, system_prompt="7")] == ["s7=u1+2=", "s7=u4+5="]
    stream = toy_prompts(tokenizer, DataSettings(chat=True), seed=1, held_out=False)
    assert re.fullmatch(r"u\d{3}\+\d{3}==", next(stream).prompt)


@pytest.mark.parametrize("template, settings, prompt, message", [
    (None, dict(chat=True), "1+2", "line 1: chat messages need a chat template, and the tokenizer has none"),
    (CHAT, dict(system_prompt="7"), "1+2", "--system-prompt needs chat messages, and the prompt of .* line 1 is text: add --chat"),
    (CHAT, dict(system_prompt="7"), [{"role": "system", "content": "8"}], "line 1 has a system message of its own"),
    ("{{ raise_exception('no system') }}", dict(chat=True), "1+2", r"line 1: the tokenizer's chat template refuses these messages \(no system\)"),
])  # fmt: skip
def test_chat_that_cannot_be(tokenizer, tmp_path, template, settings, prompt, message):
    tokenizer.chat_template = template
    with pytest.raises(BadInput, match=message):
        read(write(tmp_path / "p.jsonl", {"prompt": prompt, "label": 1}), tokenizer, **settings)


@pytest.mark.parametrize("line, message", [
    ("{not json", "line 2 is not JSON"),
    ("1" * 5000, "line 2 is not JSON"),
    ("[" * 100_000, "line 2 is not JSON"),
    ("[]", "line 2 is no object"),
    ({"label": 1}, "line 2 has no prompt; its fields are label: name the right one with --prompt-key"),
    ({"prompt": "", "label": 1}, "line 2 has no prompt"),
    ({"prompt": [], "label": 1}, "line 2 has no prompt"),
    ({"prompt": "1+1="}, r"line 2 has no label \(null if the reward uses none\); its fields are prompt: name the right one with --label-key"),
    ({"prompt": "1+1=", "label": 2, "metadata": [1]}, "metadata"),
    ({"prompt": "1+1=", "label": 10**20}, "must fit in a line of JSON"),
    ('{"prompt": "\\ud800", "label": 1}', "must fit in a line of JSON"),
    ({"prompt": 12, "label": 1}, "is a int"),
    ({"prompt": [{"role": "user", "content": "1"}], "label": 1}, "the tokenizer has none"),
    ({"prompt": "1" * 30, "label": 1}, "has 31 tokens; it must have 1 to 20"),
])  # fmt: skip
def test_a_bad_line_is_named(tokenizer, tmp_path, line, message):
    with pytest.raises(BadInput, match=message):
        read(write(tmp_path / "p.jsonl", {"prompt": "1+1=", "label": 2}, line), tokenizer, max_prompt_tokens=20)


def test_a_line_ends_only_where_a_line_ends(tokenizer, tmp_path):
    """U+2028 and its like may stand in a JSON string as they are; str.splitlines() would cut the row there."""
    (tmp_path / "p.jsonl").write_bytes('{"prompt": "1+1=", "label": "a\u2028b\x85c"}\r\n\r\n{"prompt": "2+2=", "label": 4}'.encode())
    assert [sample.label for sample in read(str(tmp_path / "p.jsonl"), tokenizer)] == ["a\u2028b\x85c", 4]


def test_no_prompts_at_all(tokenizer, tmp_path):
    with pytest.raises(BadInput, match="holds no prompts"):
        read(write(tmp_path / "p.jsonl", "", ""), tokenizer)
    with pytest.raises(BadInput, match="does not exist"):
        read(str(tmp_path / "none.jsonl"), tokenizer)


# --- fields and Parquet -----------------------------------------------------------------------------------------------------------------------


DAPO = {"data_source": "math_dapo", "prompt": [{"role": "user", "content": "3+4"}], "reward_model": {"ground_truth": "7", "style": "rule"}, "index": 0}
GSM8K = {"question": "1+2=", "answer": "1 and 2 are <<1+2=3>>3\n#### 3"}


def test_parquet_rows_are_those_of_jsonl(tokenizer, tmp_path):
    tokenizer.chat_template = CHAT
    settings = dict(prompt_key=("prompt", "question"), label_key=("reward_model.ground_truth", "answer"), label_after="####")
    for row, label in ((DAPO, "7"), (GSM8K, "3")):
        lines = read(write(tmp_path / "p.jsonl", row, row), tokenizer, **settings)
        assert lines == read(write_parquet(tmp_path / "p.parquet", row, row), tokenizer, **settings)
        assert len(lines) == 2 and lines[0].label == label
    assert read(write_parquet(tmp_path / "p.parquet", GSM8K), tokenizer, prompt_key=("question",), label_key=("answer",))[0].label == GSM8K["answer"]


def test_a_key_is_a_field_or_a_path(tokenizer, tmp_path):
    row = {"prompt": "1+2=", "a.b": 1, "a": {"b": 2, "c": None}}
    path = write(tmp_path / "p.jsonl", row)
    labels = [read(path, tokenizer, label_key=key)[0].label for key in (("a.b",), ("a.c",), ("x", "a.x", "a"))]
    assert labels == [1, None, {"b": 2, "c": None}]  # the field of that very name comes first; null is a label; the first key that the row has
    with pytest.raises(BadInput, match=r"line 1 has no a.x or a.b.c \(null.*its fields are prompt, a.b, a: name the right one with --label-key"):
        read(path, tokenizer, label_key=("a.x", "a.b.c"))


def test_labels_are_cut_in_a_file_that_has_the_mark_throughout(tokenizer, tmp_path):
    rows = [{"prompt": "1=", "label": label} for label in ("#### 1 #### 2", "#### 3")]
    assert [sample.label for sample in read(write(tmp_path / "p.jsonl", *rows), tokenizer, label_after="####")] == ["2", "3"]
    assert read(write(tmp_path / "p.jsonl", {"prompt": "1=", "label": 3}), tokenizer, label_after="####")[0].label == 3
    with pytest.raises(BadInput, match="1 of 3 labels do not hold --label-after '####', the first is '4'"):
        read(write(tmp_path / "p.jsonl", *rows, {"prompt": "1=", "label": "4"}), tokenizer, label_after="####")


def test_parquet_that_cannot_be_used(tokenizer, tmp_path):
    with pytest.raises(BadInput, match="row 2 has no prompt: it needs a non-empty one"):
        read(write_parquet(tmp_path / "p.parquet", {"prompt": "1=", "label": 1}, {"prompt": None, "label": 1}), tokenizer)
    with pytest.raises(BadInput, match="row 1: prompt, label and metadata must fit in a line of JSON"):
        read(write_parquet(tmp_path / "p.parquet", {"prompt": "1=", "label": b"1"}), tokenizer)
    with pytest.raises(BadInput, match="cannot be read as UTF-8 text.*must end in .parquet"):
        read(str((tmp_path / "p.parquet").rename(tmp_path / "p.pq")), tokenizer)
    rng, whole = random.Random(0), (tmp_path / "p.pq").read_bytes()
    for at in [0, 4, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(40))]:  # refused, or read all the same, but never a crash
        (tmp_path / "p.parquet").write_bytes(whole[:at])
        with pytest.raises(BadInput, match="cannot be read as Parquet"):
            read(str(tmp_path / "p.parquet"), tokenizer)


# --- mixtures ---------------------------------------------------------------------------------------------------------------------------------


def test_file_prompts_come_in_new_seeded_orders(models, tmp_path):
    path = write(tmp_path / "p.jsonl", *({"prompt": f"{i}+1=", "label": str(i + 1)} for i in range(5)))
    settings, model = RolloutSettings(prompts=(path,)), str(models["qwen3"])
    config = read_config(model)
    first, again, other = (list(islice(load_data(model, settings, config, seed=seed).stream, 10)) for seed in (0, 0, 1))
    assert first == again != other
    assert {sample.label for sample in first[:5]} == {sample.label for sample in first[5:]} == {"1", "2", "3", "4", "5"}
    assert [sample.group for sample in first] == list(range(10))
    assert load_data(model, settings, config, seed=0).held_out == []


def test_a_mixture_draws_by_weight_and_numbers_as_it_draws(one_rank, tmp_path):
    a = write(tmp_path / "a.jsonl", *({"prompt": f"{i}=", "label": i} for i in range(3)))
    b = write_parquet(tmp_path / "b.parquet", *({"prompt": f"{i}+1=", "label": i} for i in range(7)))
    settings = RolloutSettings(prompts=(f"{a}:3", b, "toy:0.5"))
    config = read_config(TOY)
    stream, again = (list(islice(load_data(TOY, settings, config, seed=1).stream, 900)) for _ in range(2))
    counts = Counter(sample.source for sample in stream)
    assert stream == again and [sample.group for sample in stream] == list(range(900))
    assert 550 < counts["a"] < 650 and 170 < counts["b"] < 230 and 75 < counts["toy"] < 125  # of 900: 600, 200, 100
    own = list(islice(load_data(TOY, RolloutSettings(prompts=(b,)), config, seed=1).stream, counts["b"]))
    assert [sample.prompt for sample in own] == [sample.prompt for sample in stream if sample.source == "b"]  # each source in its own order
    prompts = Prompts(load_data(TOY, settings, config, seed=1), settings, taken=123)  # as after a checkpoint
    assert prompts.take(5) == stream[123:128] and prompts.taken == 128


@pytest.mark.parametrize("prompts, weights", [
    (("toy",), {"toy": 1}),
    (("a.jsonl:0.25", "dir:2/b.parquet"), {"a.jsonl": 0.25, "dir:2/b.parquet": 1}),
    (("reasoning-gym:gcd", "reasoning-gym:lcm:3"), {"reasoning-gym:gcd": 1, "reasoning-gym:lcm": 3}),
    ((":2",), {":2": 1}),
])  # fmt: skip
def test_weights(prompts, weights):
    assert weighted(prompts) == weights


@pytest.mark.parametrize("settings, message", [
    (dict(prompts=("toy:0",)), "--prompts toy:0: the weight 0 must be a positive number"),
    (dict(prompts=("toy:nan",)), "the weight nan must be"),
    (dict(prompts=("toy:1e999",)), "the weight 1e999 must be"),
    (dict(prompts=("toy", "toy:2")), "toy is given twice"),
    (dict(prompts=()), "names nothing to learn from"),
    (dict(eval_prompts=("toy:2",)), "--eval-prompts toy:2: a held-out set has no weight"),
    (dict(eval_prompts=("toy", "toy")), "--eval-prompts toy toy: a source is given twice"),
    (dict(chat=True), "toy: chat messages need a chat template"),
    (dict(max_response_tokens=505), "a prompt of toy has 9 tokens, more than 5"),
])  # fmt: skip
def test_sources_that_cannot_work(settings, message):
    with pytest.raises(BadInput, match=message):
        data(**settings)


def test_names_are_as_short_as_they_can_be():
    def of(*sources):
        return list(names(list(sources), flag="--prompts").values())

    assert of("toy", "data/aime.jsonl", "reasoning-gym:chain_sum") == ["toy", "aime", "chain_sum"]
    assert of("d/gsm8k/train.parquet", "d/math/train.parquet") == ["gsm8k/train", "math/train"]
    assert of("gcd.jsonl", "reasoning-gym:gcd") == ["gcd", "reasoning-gym/gcd"]
    assert of("a.jsonl", "a.parquet") == ["a.jsonl", "a.parquet"] and of() == []


def test_held_out_sets(tmp_path):
    files = [write(tmp_path / f"{name}.jsonl", *({"prompt": f"{i}=", "label": i} for i in range(n))) for name, n in (("a", 5), ("b", 2))]

    def sets(**settings):
        held_out = data(eval_samples=3, **settings).held_out
        assert [sample.group for sample in held_out] == list(range(len(held_out)))
        return [(sample.source, sample.prompt) for sample in held_out if sample.source != "toy"], len(held_out)

    in_order = [("a", "0="), ("a", "1="), ("a", "2="), ("b", "0="), ("b", "1=")]
    assert sets(eval_prompts=tuple(files)) == (in_order, 5) and sets(eval_prompts=("toy", files[1])) == (in_order[3:], 5)
    assert sets(prompts=(files[0], "toy:0.1")) == ([], 3) and sets(prompts=tuple(files)) == ([], 0)  # the toy has held-out problems of its own, a file has not


def test_what_is_longer_than_the_first_problems_is_passed_over():
    stream, longest = fitting((Sample([1] * n) for n in [3, 5, *[2] * 70, 6, 5, 9, 1]), name="x", max_prompt_tokens=5)
    assert longest == 5 and [len(sample.prompt_ids) for sample in stream] == [3, 5, *[2] * 70, 5, 1]


def test_a_mixture_of_one_is_that_one():
    stream = mixture([iter([Sample([1], label=i) for i in range(3)])], [0.5], seed=3)
    assert [(sample.label, sample.group) for sample in islice(stream, 3)] == [(0, 0), (1, 1), (2, 2)]


# --- reasoning-gym ----------------------------------------------------------------------------------------------------------------------------


class Sums:
    """As a task of reasoning-gym: problem i of seed s is made from s + i, and a response that holds the answer gets a part of 1."""

    def __init__(self, seed: int, size: int):
        self.seed, self.size = seed, size

    def __getitem__(self, i: int) -> dict:
        assert 0 <= i < self.size
        a, b = random.Random(self.seed + i).choices(range(10**6), k=2)
        return {"question": f"{a}+{b}=", "answer": str(a + b), "metadata": {"source_dataset": "chain_sum", "source_index": i, "pair": (a, b)}}

    def score_answer(self, answer, entry) -> float:
        assert isinstance(entry["metadata"]["pair"], tuple)  # some tasks compare what JSON would change
        return 1.0 if answer == entry["answer"] else len(entry["answer"]) / len(answer) if answer and entry["answer"] in answer else 0.0


def extract_answer(completion: str) -> str | None:
    found = re.findall(r"<answer>\s?(.*?)\s?</answer>", completion, re.DOTALL)
    return found[-1].strip() if found else None


@pytest.fixture
def gym(monkeypatch):
    package, factory, utils = (ModuleType(name) for name in ("reasoning_gym", "reasoning_gym.factory", "reasoning_gym.utils"))
    package.factory, package.utils, utils.extract_answer = factory, utils, extract_answer
    factory.DATASETS = {"chain_sum": (Sums, None), "gcd": (Sums, None), "countdown": (Sums, None)}
    package.create_dataset = lambda name, **config: factory.DATASETS[name][0](**config)
    for module in (package, factory, utils):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    yield
    reasoning_gym_tasks._problem.cache_clear()
    reasoning_gym_tasks._dataset.cache_clear()


def test_reasoning_gym_problems_are_endless_seeded_and_disjoint_of_the_held_out(gym):
    def rows(seed):
        return list(islice(reasoning_gym_tasks.problems("chain_sum", seed=seed), 1200))  # beyond the two chunks of 500

    one, again, two, held_out = (rows(seed) for seed in (1, 1, 2, "held-out"))
    assert one == again and len({row["prompt"] for row in [*one, *two, *held_out]}) == 3600
    a, b = one[1100]["prompt"][:-1].split("+")
    assert one[1100]["label"] == str(int(a) + int(b)) and one[1100]["notes"] == {"reasoning_gym": ["chain_sum", 1, 1100]}


def test_reasoning_gym_judges_its_own_problems(gym):
    both = data(prompts=("toy", "reasoning-gym:chain_sum:2"), eval_prompts=("reasoning-gym:chain_sum",), eval_samples=4)
    assert [sample.source for sample in both.held_out] == ["chain_sum"] * 4
    trained = [sample for sample in islice(both.stream, 60) if sample.source == "chain_sum"]
    assert len(trained) > 20 and not {sample.prompt for sample in trained} & {sample.prompt for sample in both.held_out}
    sample = trained[0]
    sample = Sample.from_json(sample.to_json())
    for response, expected, answer in [
        (sample.label, 1.0, sample.label),
        (f"thus <answer>1</answer>, no: <answer> {sample.label} </answer>.", 1.0, sample.label),
        (f"it is {sample.label}", len(sample.label) / len(f"it is {sample.label}"), f"it is {sample.label}"),
        ("", 0.0, ""),
    ]:
        sample.response = response
        assert reasoning_gym_reward(sample) == pytest.approx(expected) and sample.answer == answer
    assert reasoning_gym_reward(Sample([1], label="4", response="so \\boxed{4.0}")) == 1  # not one of its problems: judged as mathematics


@pytest.mark.parametrize("task, message", [
    ("chain_sums", "reasoning-gym:chain_sums is no task of reasoning-gym; it has chain_sum, gcd$"),
    ("countdown", "refused: its scorer runs the model's answer as Python"),
])  # fmt: skip
def test_tasks_that_cannot_be_used(gym, task, message):
    with pytest.raises(BadInput, match=message):
        data(prompts=(f"reasoning-gym:{task}",))


def test_without_the_package_the_install_line_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)  # as if it were not installed
    with pytest.raises(BadInput, match="needs the package reasoning-gym .*: pip install reasoning-gym==0.1.25"):
        data(prompts=("reasoning-gym:chain_sum",))


def test_its_reward_needs_its_problems():
    with pytest.raises(BadInput, match="--prompts has none: add one such as reasoning-gym:chain_sum, or use --reward math"):
        check_reward_settings(RewardSettings(reward="reasoning_gym"), RolloutSettings())
    check_reward_settings(RewardSettings(reward="reasoning_gym"), RolloutSettings(prompts=("toy", "reasoning-gym:gcd:0.1")))


def test_a_rows_own_fields_are_its_own(tokenizer, tmp_path):
    """Fields that the program writes stand beside metadata: a row may call its own as it likes."""
    own = {"answer": 7, "source": "book", "error": "none", "reasoning_gym": ["gcd"], "abort": 1}
    (sample,) = read(write(tmp_path / "p.jsonl", {"prompt": "1+2=", "label": "3", "metadata": own}), tokenizer)
    assert (sample.metadata, sample.source, sample.answer, sample.error, sample.notes) == (own, "file", None, "", {})
    sample.response, sample.finish_reason = "3", "stop"
    assert reasoning_gym_reward(sample) == 1 and sample.metadata == own and sample.answer == "3"
