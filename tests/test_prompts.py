"""Which prompts a run gets, and in which order: toy, mixtures, held-out sets, the digest.

Why: a resumed run goes on with the very prompts that would have come, and one seed gives one order.
The digest tells a resumed run that its data have changed. Rows of files are in
test_prompt_files.py, their text in test_prompt_text.py, reasoning-gym in test_reasoning_gym.py.
"""

import json
import shutil
from collections import Counter
from itertools import islice
from types import SimpleNamespace

import pytest

from backends.huggingface.config import read_config
from common.errors import BadInput
from common.settings import RolloutSettings, parse_weights
from data.prompts import (
    drop_long_prompts,
    load_data,
    mixture,
    short_names,
)
from data.sample import Sample
from harness.checks import check_rollout_flags
from prompt_helpers import TOY, data, write, write_parquet
from reasoning_gym_stand_in import gym  # noqa: F401  other tests take it from here
from rollout import PromptStream
from toy.task import is_held_out, problems

pytest_plugins = ["prompt_helpers"]  # the fixture tokenizer


# --- the toy ------------------------------------------------------------------------------------


def test_toy_problems_are_right_disjoint_and_seeded():
    train, held = (list(islice(problems(seed=0, held_out=held), 2000)) for held in (False, True))
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held}
    assert all(is_held_out(row["prompt"]) for row in held)
    for row in train[:50]:
        a, b = row["prompt"][:-1].split("+")
        assert int(row["label"][::-1]) == int(a) + int(b)
    same, other = (list(islice(problems(seed=seed, held_out=False), 5)) for seed in (0, 1))
    assert train[:5] == same != other


def test_the_toy_prompt_is_one_token_a_character(tokenizer):
    assert tokenizer("046+789=").input_ids == [1, 3, 7, 9, 13, 10, 11, 12, 14]
    assert tokenizer.decode([8, 6, 11, 2], skip_special_tokens=True) == "538"


def test_by_default_a_run_gets_the_toy_as_it_comes():
    toy = data()
    stream, held_out = list(islice(toy.stream, 300)), toy.held_out
    of_seed_1 = islice(problems(seed=1, held_out=False), 300)
    assert [sample.prompt for sample in stream] == [row["prompt"] for row in of_seed_1]
    of_seed_0 = islice(problems(seed=0, held_out=True), 512)
    assert [sample.prompt for sample in held_out] == [row["prompt"] for row in of_seed_0]
    assert [sample.group for sample in stream] == list(range(300))
    assert [sample.group for sample in held_out] == list(range(512))
    assert stream[0].source == "toy"
    assert toy.longest == 9 + 8


# --- the digest ---------------------------------------------------------------------------------


def test_the_digest_is_of_what_was_read(models, tmp_path):
    rows = [{"prompt": f"{i}=", "label": f"x{i}", "metadata": {"i": i}} for i in range(4)]
    (tmp_path / "elsewhere").mkdir()

    def digest(*rows, file=write, to="p.jsonl", weight="", model=TOY, **settings):
        settings = RolloutSettings(prompts=(file(tmp_path / to, *rows) + weight, "toy"), **settings)
        return load_data(model, settings, read_config(model), seed=1).digest

    first = digest(*rows)
    assert list(first) == ["1", "2"]
    assert json.loads(json.dumps(first)) == first
    # The same rows from another path, and as Parquet.
    assert digest(*rows, to="elsewhere/q.jsonl") == first
    assert digest(*rows, to="p.parquet", file=write_parquet) == first
    changed = [
        digest(*rows[1:]),
        digest(*rows[::-1]),
        digest(*rows, rows[0]),
        digest(*rows[:3], {**rows[3], "label": "x7"}),
        digest(*rows[:3], {**rows[3], "prompt": "7="}),
        digest(*rows[:3], {**rows[3], "metadata": {"i": 7}}),
        digest(*rows, weight=":2"),
        digest(*rows, label_after="x"),
    ]
    assert len({one["1"] for one in [first, *changed]}) == 9
    assert {one["2"] for one in changed} == {first["2"]}
    shutil.copytree(TOY, tmp_path / "model", ignore=shutil.ignore_patterns("__pycache__"))
    written = json.loads((tmp_path / "model" / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = written["model"]["vocab"]
    vocab["8"], vocab["9"] = vocab["9"], vocab["8"]  # a different tokenizer
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(written), encoding="utf-8")
    other = digest(*rows, model=str(tmp_path / "model"))
    # The file holds no 8 or 9. The toy's problems do.
    assert other["1"] == first["1"]
    assert other["2"] != first["2"]


# --- mixtures -----------------------------------------------------------------------------------


def test_file_prompts_come_in_new_seeded_orders(models, tmp_path):
    rows = ({"prompt": f"{i}+1=", "label": str(i + 1)} for i in range(5))
    path = write(tmp_path / "p.jsonl", *rows)
    settings, model = RolloutSettings(prompts=(path,)), str(models["qwen3"])
    config = read_config(model)
    first, again, other = (
        list(islice(load_data(model, settings, config, seed=seed).stream, 10)) for seed in (0, 0, 1)
    )
    assert first == again != other
    for epoch in (first[:5], first[5:]):
        assert {sample.label for sample in epoch} == {"1", "2", "3", "4", "5"}
    assert [sample.group for sample in first] == list(range(10))
    assert load_data(model, settings, config, seed=0).held_out == []


def test_a_mixture_draws_by_weight_and_numbers_as_it_draws(one_rank, tmp_path):
    a = write(tmp_path / "a.jsonl", *({"prompt": f"{i}=", "label": i} for i in range(3)))
    rows = ({"prompt": f"{i}+1=", "label": i} for i in range(7))
    b = write_parquet(tmp_path / "b.parquet", *rows)
    settings = RolloutSettings(prompts=(f"{a}:3", b, "toy:0.5"))
    config = read_config(TOY)
    stream, again = (
        list(islice(load_data(TOY, settings, config, seed=1).stream, 900)) for _ in range(2)
    )
    counts = Counter(sample.source for sample in stream)
    assert stream == again and [sample.group for sample in stream] == list(range(900))
    # Expected of 900: 600, 200, 100.
    assert 550 < counts["a"] < 650
    assert 170 < counts["b"] < 230
    assert 75 < counts["toy"] < 125
    # Each source keeps its own order.
    alone = load_data(TOY, RolloutSettings(prompts=(b,)), config, seed=1).stream
    of_b = [sample.prompt for sample in stream if sample.source == "b"]
    assert [sample.prompt for sample in islice(alone, counts["b"])] == of_b
    # A resumed run goes on behind the prompts that were taken.
    checkpoint = SimpleNamespace(ranks=[{"prompts": 123}])
    again = load_data(TOY, settings, config, seed=1)
    run = SimpleNamespace(data=again, engine_index=0, engines=1, resumed_from=checkpoint)
    prompts = PromptStream(run, settings)
    assert prompts.take(5) == stream[123:128]
    assert prompts.state() == {"prompts": 128}


@pytest.mark.parametrize("prompts, weights", [
    (("toy",), {"toy": 1}),
    (("a.jsonl:0.25", "dir:2/b.parquet"), {"a.jsonl": 0.25, "dir:2/b.parquet": 1}),
    (("reasoning-gym:gcd", "reasoning-gym:lcm:3"),
     {"reasoning-gym:gcd": 1, "reasoning-gym:lcm": 3}),
    ((":2",), {":2": 1}),
    (("toy:1e-300",), {"toy": 1e-300}),  # of a single source the share is 1
])  # fmt: skip
def test_weights(prompts, weights):
    assert parse_weights(prompts) == weights


@pytest.mark.parametrize("settings, message", [
    (dict(prompts=("toy:0",)), "--prompts toy:0: the weight 0 must be a positive number"),
    (dict(prompts=("toy:nan",)), "the weight nan must be"),
    (dict(prompts=("toy:1e999",)), "the weight 1e999 must be"),
    (dict(prompts=("toy:1e-300", "reasoning-gym:gcd")),
     "--prompts toy:1e-300 beside reasoning-gym:gcd:1: each source's share of the prompts must be"),
    # The sum of the weights is infinite.
    (dict(prompts=("toy:1e308", "reasoning-gym:gcd:1e308")),
     "share of the prompts must be at least 1e-09"),
    (dict(prompts=("toy", "toy:2")), "toy is given twice"),
    (dict(prompts=()), "names nothing to learn from"),
    (dict(eval_prompts=("toy:2",)), "--eval-prompts toy:2: a held-out set has no weight"),
    (dict(eval_prompts=("toy", "toy")), "--eval-prompts toy toy: a source is given twice"),
    (dict(chat_template_kwargs=("a",)), "--chat-template-kwargs 'a' is not of the form key=value"),
])  # fmt: skip
def test_sources_that_cannot_be(settings, message):
    with pytest.raises(BadInput, match=message):
        check_rollout_flags(RolloutSettings(**settings), ranks=1)


@pytest.mark.parametrize("settings, message", [
    (dict(chat=True), "toy: chat messages need a chat template"),
    (dict(max_response_tokens=505), "a prompt of toy has 9 tokens; at most 5 fit"),
])  # fmt: skip
def test_sources_that_cannot_work(settings, message):
    with pytest.raises(BadInput, match=message):
        data(**settings)


def test_names_are_as_short_as_they_can_be():
    def of(*sources):
        return list(short_names(list(sources)).values())

    assert of("toy", "data/aime.jsonl", "reasoning-gym:chain_sum") == ["toy", "aime", "chain_sum"]
    assert of("d/gsm8k/train.parquet", "d/math/train.parquet") == ["gsm8k/train", "math/train"]
    assert of("gcd.jsonl", "reasoning-gym:gcd") == ["gcd", "reasoning-gym/gcd"]
    assert of("a.jsonl", "a.parquet") == ["a.jsonl", "a.parquet"] and of() == []


def test_held_out_sets(tmp_path):
    files = [
        write(tmp_path / f"{name}.jsonl", *({"prompt": f"{i}=", "label": i} for i in range(n)))
        for name, n in (("a", 5), ("b", 2))
    ]

    def sets(**settings):
        held_out = data(eval_samples=3, **settings).held_out
        assert [sample.group for sample in held_out] == list(range(len(held_out)))
        of_files = [(s.source, s.prompt) for s in held_out if s.source != "toy"]
        return of_files, len(held_out)

    in_order = [("a", "0="), ("a", "1="), ("a", "2="), ("b", "0="), ("b", "1=")]
    assert sets(eval_prompts=tuple(files)) == (in_order, 5)
    assert sets(eval_prompts=("toy", files[1])) == (in_order[3:], 5)
    # The toy has held-out problems of its own. A file has none.
    assert sets(prompts=(files[0], "toy:0.1")) == ([], 3)
    assert sets(prompts=tuple(files)) == ([], 0)


def test_what_is_longer_than_the_first_problems_is_passed_over():
    stream, longest = drop_long_prompts(
        (Sample([1] * n) for n in [3, 5, *[2] * 70, 6, 5, 9, 1]), name="x", max_prompt_tokens=5
    )
    assert longest == 5
    assert [len(sample.prompt_ids) for sample in stream] == [3, 5, *[2] * 70, 5, 1]


def test_a_mixture_of_one_is_that_one():
    stream = mixture([iter([Sample([1], label=i) for i in range(3)])], [0.5], seed=3)
    drawn = [(sample.label, sample.group) for sample in islice(stream, 3)]
    assert drawn == [(0, 0), (1, 1), (2, 2)]
