"""prompts.py and reasoning_gym_tasks.py: files, fields, chat, mixtures, generated problems.

Whoever mistypes an input learns file, row, rule and fix.

reasoning-gym is no requirement of this repository, so a stand-in takes its place: a module with the
four names that are used of it, which behave as those of reasoning-gym 0.1.25 do (create_dataset and
its seed + index, factory.DATASETS, score_answer's parts of 1, utils.extract_answer). Not covered:
that a later version still has them, and that its tasks which are not refused evaluate nothing.
"""

import gzip
import json
import os
import random
import re
import shutil
import sys
from collections import Counter
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow
import pyarrow.parquet
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from backends.huggingface.config import read_config
from common.errors import BadInput
from common.settings import REPOSITORY, DataSettings, RolloutSettings, parse_weights
from data import reasoning_gym_tasks
from data.chat import check_template_kwargs
from reward import RewardSettings
from data.prompts import (
    drop_long_prompts,
    generated,
    load_data,
    mixture,
    short_names,
    read_prompts,
    toy_prompts,
)
from data.sample import Sample, read_dump
from data.tokenizer import encode, end_tokens, load_tokenizer
from harness.checks import check_reward_flags, check_rollout_flags
from reward import reasoning_gym_reward
from rollout import PromptStream, write_outputs
from toy.task import is_held_out, problems

TOY = str(REPOSITORY / "toy")
ROLES = "{'user': '1', 'system': '2', 'assistant': '3', 'tool': '4'}"
CHAT = "{% for m in messages %}{{ " + ROLES + "[m['role']] }}+{{ m['content'] }}={% endfor %}"
"""Writes digits for roles: the toy's alphabet is 0 to 9, + and =."""


@pytest.fixture
def tokenizer():
    return load_tokenizer(TOY)


def write(path, *rows):
    path.write_text(
        "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows),
        encoding="utf-8",
    )
    return str(path)


def write_parquet(path, *rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return str(path)


def read(path, tokenizer, *, max_prompt_tokens=40, **settings) -> list[Sample]:
    return read_prompts(
        path, tokenizer, DataSettings(**settings), name="file", max_prompt_tokens=max_prompt_tokens
    )


def data(**settings):
    return load_data(TOY, RolloutSettings(**settings), read_config(TOY), seed=1)


def test_a_sample_is_one_json_line():
    logprobs = np.float32([-0.1, -2.3333333])
    sample = Sample(
        [1, 5],
        "3",
        "7",
        4,
        0,
        [6, 2],
        "4",
        list(logprobs),
        [1, 0],
        [3, 3],
        "stop",
        0.5,
        source="töy\n",
    )
    line = replace(sample, rollout_logprobs=logprobs).to_json()
    assert b"\n" not in line
    assert np.array_equal(
        np.float32(Sample.from_json(line).rollout_logprobs), logprobs
    )  # float32 survives the text exactly
    assert replace(Sample.from_json(line), rollout_logprobs=sample.rollout_logprobs) == sample


# --- the toy ------------------------------------------------------------------------------------


def test_toy_problems_are_right_disjoint_and_seeded():
    train, held = (list(islice(problems(seed=0, held_out=held), 2000)) for held in (False, True))
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held}
    assert all(is_held_out(row["prompt"]) for row in held)
    for row in train[:50]:
        a, b = row["prompt"][:-1].split("+")
        assert int(row["label"][::-1]) == int(a) + int(b)
    assert (
        train[:5]
        == list(islice(problems(seed=0, held_out=False), 5))
        != list(islice(problems(seed=1, held_out=False), 5))
    )


def test_the_toy_prompt_is_one_token_a_character(tokenizer):
    assert tokenizer("046+789=").input_ids == [1, 3, 7, 9, 13, 10, 11, 12, 14]
    assert tokenizer.decode([8, 6, 11, 2], skip_special_tokens=True) == "538"


def test_by_default_a_run_gets_the_toy_as_it_comes():
    toy = data()
    stream, held_out = list(islice(toy.stream, 300)), toy.held_out
    assert [sample.prompt for sample in stream] == [
        row["prompt"] for row in islice(problems(seed=1, held_out=False), 300)
    ]
    assert [sample.prompt for sample in held_out] == [
        row["prompt"] for row in islice(problems(seed=0, held_out=True), 512)
    ]
    assert [sample.group for sample in stream] == list(range(300)) and [
        sample.group for sample in held_out
    ] == list(range(512))
    assert stream[0].source == "toy" and toy.longest == 9 + 8


def test_end_tokens(models, tokenizer, tmp_path):
    assert end_tokens(str(models["qwen3"]), tokenizer, ("=",)) == [2, 14]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}', encoding="utf-8")
    assert end_tokens(str(tmp_path), tokenizer, ()) == [2, 7, 8]
    with pytest.raises(BadInput, match="not one token"):
        end_tokens(str(tmp_path), tokenizer, ("==",))


# --- rows ---------------------------------------------------------------------------------------


def test_text_and_chat_prompts(tokenizer, tmp_path):
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}={% endfor %}"
    rows = (
        {"prompt": "1+2=", "label": "3", "metadata": {"level": 4}},
        {"prompt": [{"role": "user", "content": "1+2"}], "label": 3},
    )
    text, chat = read(write(tmp_path / "p.jsonl", *rows), tokenizer)
    assert text.prompt_ids == [1, *chat.prompt_ids] and chat.prompt == "1+2=" and chat.label == 3
    assert (
        text.metadata == {"level": 4}
        and chat.metadata == {}
        and text.source == chat.source == "file"
    )
    # A template writes its own special tokens: nothing is added to it.


def test_chat_wraps_text_and_the_system_message_goes_first(tokenizer, tmp_path):
    tokenizer.chat_template = CHAT
    path = write(
        tmp_path / "p.jsonl",
        {"prompt": "1+2", "label": 3},
        {"prompt": [{"role": "user", "content": "4+5"}], "label": 9},
    )
    assert [sample.prompt for sample in read(path, tokenizer, chat=True)] == ["1+1+2=", "1+4+5="]
    assert [sample.prompt for sample in read(path, tokenizer, chat=True, system_prompt="7")] == [
        "2+7=1+1+2=",
        "2+7=1+4+5=",
    ]
    stream = toy_prompts(tokenizer, DataSettings(chat=True), seed=1, held_out=False)
    assert re.fullmatch(r"1\+\d{3}\+\d{3}==", next(stream).prompt)


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
    ("[]", "line 2 is not an object"),
    ('{"prompt": "1=", "label": 1, "label": 2}', r"line 2 is not JSON \(the field 'label' is given twice\)"),
    ({"prompt": json.dumps([{"role": "user", "content": "1"}]), "label": 1}, "line 2: the prompt is JSON text of chat messages: give the list itself"),
    ({"label": 1}, "line 2 has no prompt; its fields are label: name the right one with --prompt-key"),
    ({"prompt": "", "label": 1}, "line 2 has no prompt"),
    ({"prompt": [], "label": 1}, "line 2 has no prompt"),
    ({"prompt": "1+1="}, r"line 2 has no label \(null if the reward needs none\); its fields are prompt: name the right one with --label-key"),
    ({"prompt": "1+1=", "label": 2, "metadata": [1]}, "metadata"),
    ({"prompt": "1+1=", "label": 10**20}, "must fit in a line of JSON"),
    ('{"prompt": "\\ud800", "label": 1}', "must fit in a line of JSON"),
    ({"prompt": 12, "label": 1}, "is a int"),
    ({"prompt": [{"role": "user", "content": "1"}], "label": 1}, "the tokenizer has none"),
    ({"prompt": "1" * 30, "label": 1}, "has 31 tokens; it must have 1 to 20"),
])  # fmt: skip
def test_a_bad_line_is_named(tokenizer, tmp_path, line, message):
    with pytest.raises(BadInput, match=message):
        read(
            write(tmp_path / "p.jsonl", {"prompt": "1+1=", "label": 2}, line),
            tokenizer,
            max_prompt_tokens=20,
        )


def test_a_line_ends_only_where_a_line_ends(tokenizer, tmp_path):
    """U+2028 and its like may stand in a JSON string as they are; str.splitlines() would cut the
    row there.
    """
    (tmp_path / "p.jsonl").write_bytes(
        '{"prompt": "1+1=", "label": "a\u2028b\x85c"}\r\n\r\n{"prompt": "2+2=", "label": 4}'.encode()
    )
    assert [sample.label for sample in read(str(tmp_path / "p.jsonl"), tokenizer)] == [
        "a\u2028b\x85c",
        4,
    ]


def test_no_prompts_at_all(tokenizer, tmp_path):
    with pytest.raises(BadInput, match="holds no prompts"):
        read(write(tmp_path / "p.jsonl", "", ""), tokenizer)
    with pytest.raises(BadInput, match="does not exist"):
        read(str(tmp_path / "none.jsonl"), tokenizer)


# --- fields and Parquet -------------------------------------------------------------------------


DAPO = {
    "data_source": "math_dapo",
    "prompt": [{"role": "user", "content": "3+4"}],
    "reward_model": {"ground_truth": "7", "style": "rule"},
    "index": 0,
}
GSM8K = {"question": "1+2=", "answer": "1 and 2 are <<1+2=3>>3\n#### 3"}


def test_parquet_rows_are_those_of_jsonl(tokenizer, tmp_path):
    tokenizer.chat_template = CHAT
    settings = dict(
        prompt_key=("prompt", "question"),
        label_key=("reward_model.ground_truth", "answer"),
        label_after="####",
    )
    for row, label in ((DAPO, "7"), (GSM8K, "3")):
        lines = read(write(tmp_path / "p.jsonl", row, row), tokenizer, **settings)
        assert lines == read(write_parquet(tmp_path / "p.parquet", row, row), tokenizer, **settings)
        assert len(lines) == 2 and lines[0].label == label
    assert (
        read(
            write_parquet(tmp_path / "p.parquet", GSM8K),
            tokenizer,
            prompt_key=("question",),
            label_key=("answer",),
        )[0].label
        == GSM8K["answer"]
    )


def test_a_key_is_a_field_or_a_path(tokenizer, tmp_path):
    row = {"prompt": "1+2=", "a.b": 1, "a": {"b": 2, "c": None}}
    path = write(tmp_path / "p.jsonl", row)
    labels = [
        read(path, tokenizer, label_key=key)[0].label
        for key in (("a.b",), ("a.c",), ("x", "a.x", "a"), ("a.c", "a.b"))
    ]
    assert (
        labels == [1, None, {"b": 2, "c": None}, 1]
        # The field of that very name comes first; null is a label; the first key whose value is not
        # null
    )
    with pytest.raises(
        BadInput,
        match=(
            r"line 1 has no a.x or a.b.c \(null.*its fields are prompt, a.b, a: name the right one"
            r" with --label-key"
        ),
    ):
        read(path, tokenizer, label_key=("a.x", "a.b.c"))


def test_labels_are_cut_in_a_file_that_has_the_mark_throughout(tokenizer, tmp_path):
    rows = [{"prompt": "1=", "label": label} for label in ("#### 1 #### 2", "#### 3")]
    assert [
        sample.label
        for sample in read(write(tmp_path / "p.jsonl", *rows), tokenizer, label_after="####")
    ] == ["2", "3"]
    assert (
        read(
            write(tmp_path / "p.jsonl", {"prompt": "1=", "label": 3}), tokenizer, label_after="####"
        )[0].label
        == 3
    )
    for label, message in {
        "4": "line 3: the label '4' does not hold --label-after '####'",
        5: "line 3: the label 5 does not hold",
        None: "line 3: the label null does not hold",
        "6 ####  ": "line 3: nothing follows --label-after '####' in the label '6 ####  '",
    }.items():
        with pytest.raises(BadInput, match=message):
            read(
                write(tmp_path / "p.jsonl", *rows, {"prompt": "1=", "label": label}),
                tokenizer,
                label_after="####",
            )


def test_parquet_that_cannot_be_used(tokenizer, tmp_path):
    with pytest.raises(BadInput, match="row 2 has no prompt: it needs a non-empty one"):
        read(
            write_parquet(
                tmp_path / "p.parquet", {"prompt": "1=", "label": 1}, {"prompt": None, "label": 1}
            ),
            tokenizer,
        )
    with pytest.raises(
        BadInput, match="row 1: prompt, label and metadata must fit in a line of JSON"
    ):
        read(write_parquet(tmp_path / "p.parquet", {"prompt": "1=", "label": b"1"}), tokenizer)
    with pytest.raises(BadInput, match="is a Parquet file: its name must end in .parquet"):
        read(str((tmp_path / "p.parquet").rename(tmp_path / "p.pq")), tokenizer)
    rng, whole = random.Random(0), (tmp_path / "p.pq").read_bytes()
    for at in [
        0,
        4,
        len(whole) - 1,
        *(rng.randrange(len(whole)) for _ in range(40)),
    ]:  # refused, or read all the same, but never a crash
        (tmp_path / "p.parquet").write_bytes(whole[:at])
        with pytest.raises(BadInput, match="cannot be read as Parquet"):
            read(str(tmp_path / "p.parquet"), tokenizer)


# --- null, NaN and what is no JSON --------------------------------------------------------------


def test_a_null_or_nan_is_no_value(tokenizer, tmp_path):
    """Parquet files of two makers in one: each row has both columns, and one of them is null."""
    rows = (
        {"label": "3", "answer": None, "n": None},
        {"label": None, "answer": "4", "n": float("nan")},
        {"label": None, "answer": None, "n": 0.0},
    )
    rows = [{"prompt": "1+2=", **row} for row in rows]
    for path in (write_parquet(tmp_path / "p.parquet", *rows), write(tmp_path / "p.jsonl", *rows)):
        assert [
            sample.label for sample in read(path, tokenizer, label_key=("label", "answer"))
        ] == ["3", "4", None]
        assert [sample.label for sample in read(path, tokenizer, label_key=("n",))] == [
            None,
            None,
            0.0,
        ]
        assert [
            sample.prompt for sample in read(path, tokenizer, prompt_key=("absent", "prompt"))
        ] == ["1+2="] * 3


@pytest.mark.parametrize("label", [0, False, "", 0.0, [], {"a": None}, 2**63, -(2**63)])
def test_a_label_that_is_false_is_a_label(tokenizer, tmp_path, label):
    (sample,) = read(
        write(tmp_path / "p.jsonl", {"prompt": "1=", "label": label, "answer": 7}),
        tokenizer,
        label_key=("label", "answer"),
    )
    assert sample.label == label and type(sample.label) is type(label)


@pytest.mark.parametrize("field, value", [
    ("metadata", {"a": float("nan")}), ("metadata", {"a": [float("inf")]}), ("label", float("inf")), ("label", [float("nan")]), ("label", 2**64),
])  # fmt: skip
def test_what_json_cannot_hold_is_refused(tokenizer, tmp_path, field, value):
    with pytest.raises(
        BadInput, match="line 1: prompt, label and metadata must fit in a line of JSON"
    ):
        read(write(tmp_path / "p.jsonl", {"prompt": "1=", "label": 1, field: value}), tokenizer)


def test_columns_of_parquet_are_plain_values(tokenizer, tmp_path):
    words = pyarrow.array(["1=", "2="], pyarrow.large_string())
    columns = {
        "prompt": words.dictionary_encode(),
        "label": pyarrow.array([[1, 2], [3]], pyarrow.large_list(pyarrow.int16())),
    }
    columns["metadata"] = pyarrow.array([{"a": [{"b": 1.5}]}, None])
    columns["unused"] = pyarrow.nulls(2)
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "p.parquet")
    first, second = read(str(tmp_path / "p.parquet"), tokenizer)
    assert (first.prompt, first.label, first.metadata) == ("1=", [1, 2], {"a": [{"b": 1.5}]})
    assert (second.prompt, second.label, second.metadata) == ("2=", [3], {})
    columns["label"] = pyarrow.array([0, 1], pyarrow.timestamp("ns"))
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "p.parquet")
    with pytest.raises(BadInput, match="p.parquet"):
        read(str(tmp_path / "p.parquet"), tokenizer)


def test_files_of_other_kinds_are_named(tokenizer, tmp_path):
    row = b'{"prompt": "1=", "label": 1}'
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + row + b"\r\n")
    assert read(str(tmp_path / "bom.jsonl"), tokenizer)[0].label == 1
    for name, content, message in [
        ("p.jsonl.gz", gzip.compress(row), "is compressed by gzip: unpack it first"),
        ("p.json", b" \n[" + row + b"]", "is one JSON array: write one object per line"),
        ("p.csv", b"prompt,label\n1=,1\n", "is a table of text: convert it"),
        ("p.jsonl", row.decode().encode("utf-16"), "cannot be read as UTF-8 text"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadInput, match=message):
            read(str(tmp_path / name), tokenizer)
    with pytest.raises(BadInput, match="is a folder: name the JSONL or Parquet files in it"):
        read(str(tmp_path), tokenizer)


@pytest.mark.parametrize("prompt", [" \n", [{"role": "user", "content": " "}]])
def test_a_blank_prompt_is_none(tokenizer, tmp_path, prompt):
    tokenizer.chat_template = CHAT
    with pytest.raises(BadInput, match="line 1 has no prompt"):
        read(write(tmp_path / "p.jsonl", {"prompt": prompt, "label": 1}), tokenizer)


# --- labels that cannot be judged ---------------------------------------------------------------


def test_labels_that_cannot_be_judged_are_named_by_row(tmp_path):
    def label_problems(labels):
        return ["" if label == "2" else "is no 2" for label in labels]

    def load(label, **settings):
        path = write(
            tmp_path / "p.jsonl",
            {"prompt": "1+1=", "label": "x 2"},
            {"prompt": "1+1=", "label": label},
        )
        files = {settings.pop("flag"): (path,)}
        return load_data(
            TOY,
            RolloutSettings(label_after="x", **files),
            read_config(TOY),
            seed=1,
            label_problems=label_problems,
        )

    for flag in ("prompts", "eval_prompts"):
        load("x2", flag=flag)  # the label is judged as it is after --label-after
        with pytest.raises(BadInput) as raised:
            load("x" + "7" * 100, flag=flag)
        (problem,) = raised.value.problems
        assert re.fullmatch(r".*p.jsonl line 2: the label '7{58}… is no 2", problem)


def test_of_many_such_labels_some_are_shown(tokenizer, tmp_path):
    path = write(tmp_path / "p.jsonl", *({"prompt": "1=", "label": None} for _ in range(9)))
    with pytest.raises(BadInput) as raised:
        read_prompts(
            path,
            tokenizer,
            DataSettings(),
            name="p",
            max_prompt_tokens=9,
            label_problems=lambda labels: ["is null"] * len(labels),
        )
    assert len(raised.value.problems) == 6 and raised.value.problems[0].endswith(
        "line 1: the label null is null"
    )
    assert raised.value.problems[5].endswith("4 more rows cannot be used")


def test_label_after_that_cuts_nothing(tmp_path):
    one, other = (
        write(tmp_path / name, {"prompt": "1=", "label": label})
        for name, label in (("a.jsonl", "#### 1"), ("b.jsonl", 1))
    )
    assert (
        data(prompts=(one, other), label_after="####").held_out
        == data(prompts=(other,), eval_prompts=(one,), label_after="####").held_out[1:]
    )
    for prompts in ((other,), ("toy",)):
        with pytest.raises(BadInput, match="--label-after '####': no label of any file holds it"):
            data(prompts=prompts, label_after="####")


# --- what the tokenizer makes of a text ---------------------------------------------------------


@pytest.mark.parametrize("template, text, ids", [
    ("<s> $A </s>", "1+2=", [1, 4, 13, 5, 14]),  # the end token would end the prompt
    ("$A </s>", "1+2=", [4, 13, 5, 14]),
    ("$A </s>", "1+2=</s>", [4, 13, 5, 14, 2]),  # the text's own stays
    ("<s> $A", "<s>1+2=", [1, 4, 13, 5, 14]),  # one start token is enough
    ("<s> $A </s>", "<s>1+2=</s>", [1, 4, 13, 5, 14, 2]),
    ("<s> <unused15> $A <unused16>", "1+2=", [1, 15, 4, 13, 5, 14]),  # as [CLS] and [SEP]
    ("<s> <unused15> $A", "<s><unused15>1+2=", [1, 15, 4, 13, 5, 14]),
    ("$A", "1+2=", [4, 13, 5, 14]),
])  # fmt: skip
def test_a_prompt_begins_once_and_does_not_end(tokenizer, template, text, ids):
    tokens = [
        (token, tokenizer.convert_tokens_to_ids(token))
        for token in ("<s>", "</s>", "<unused15>", "<unused16>")
    ]
    tokenizer.add_special_tokens({"extra_special_tokens": ["<unused15>"]})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=tokens
    )
    assert encode(text, tokenizer, DataSettings(), where="row")[1] == ids


def fast(model, normalizer, pre_tokenizer, decoder, **special) -> PreTrainedTokenizerFast:
    backend = Tokenizer(model)
    backend.normalizer, backend.pre_tokenizer, backend.decoder = normalizer, pre_tokenizer, decoder
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2 and Qwen: every byte is a token, and the end token stands for pad and unknown too."""
    vocab = {
        byte: i for i, byte in enumerate(["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    parts = (
        normalizers.NFC(),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    return fast(
        models.BPE(vocab, []), *parts, eos_token="<|end|>", unk_token="<|end|>", pad_token="<|end|>"
    )


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2: blanks become ▁, and bytes stand for what has no token."""
    vocab = {
        token: i
        for i, token in enumerate(
            ["<unk>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *"▁abcdefgh"]
        )
    }
    model = models.BPE(vocab, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    blanks = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return fast(model, blanks, None, decoder, eos_token="</s>", unk_token="<unk>", pad_token="</s>")


def unigram(*more: str) -> PreTrainedTokenizerFast:
    """As T5 and XLM-R: NFKC, blanks, and one unknown token."""
    model = models.Unigram(
        [
            ("<unk>", 0.0),
            ("</s>", 0.0),
            *((c, -2.0) for c in ("▁", *"abcdefgh0123456789+=", *more)),
        ],
        unk_id=0,
        byte_fallback=False,
    )
    parts = (
        normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]),
        pre_tokenizers.Metaspace(),
        decoders.Metaspace(),
    )
    return fast(model, *parts, eos_token="</s>", unk_token="<unk>")


def word_piece() -> PreTrainedTokenizerFast:
    """As BERT: small letters without accents."""
    vocab = {
        token: i for i, token in enumerate(["[UNK]", "[CLS]", "[SEP]", "cafe", "##s", "1", "+"])
    }
    parts = (normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer(), decoders.WordPiece())
    return fast(
        models.WordPiece(vocab, unk_token="[UNK]"), *parts, unk_token="[UNK]", sep_token="[SEP]"
    )


def dropping() -> PreTrainedTokenizerFast:
    """Knows a, b and ^, and has no token for anything else."""
    vocab = {"</s>": 0, "a": 1, "b": 2, "^": 3}
    return fast(
        models.BPE(vocab, []), None, pre_tokenizers.Whitespace(), decoders.Fuse(), eos_token="</s>"
    )


ODD_TEXT = (
    "  Zażółć\n\n“x” 你好 😀👩\u200d👧 e\u0301 ﬁ ½ ² \u00a0\x00 \ufffd ´ `^ ǅ ẞ العربية\r\n\tend "
)


@pytest.mark.parametrize("make, text", [
    (byte_level, ODD_TEXT), (byte_level, "a<|end|>b"), (byte_fallback, ODD_TEXT), (byte_fallback, "a <unk> b</s>"), (unigram, "  ＡＢ ② １\u3000h"),
    (word_piece, "Café\u200b CAFÉS\x07 1"), (dropping, "a b^\n"),
])  # fmt: skip
def test_a_good_prompt_is_never_refused(make, text):
    assert encode(text, make(), DataSettings(), where="row")[0] == text


@pytest.mark.parametrize("make, text, piece", [
    (unigram, "ab 你 c", "你"), (unigram, "1*2", r"\*"), (word_piece, "cafe xyz", "xyz"), (dropping, "a c b", "c"), (dropping, "a<b", "<"),
    (lambda: load_tokenizer(TOY), "1*2=", r"\*"), (lambda: load_tokenizer(TOY), "1+2=\n", r"\\n"), (lambda: load_tokenizer(TOY), "１+2=", "１"),
])  # fmt: skip
def test_what_the_tokenizer_does_not_know_is_named(make, text, piece):
    with pytest.raises(BadInput, match=f"row: the model's tokenizer does not know '{piece}'"):
        encode(text, make(), DataSettings(), where="row")


def test_characters_of_which_a_byte_is_missing_are_named():
    tokenizer = byte_level()
    vocab = {
        token: i for i, token in enumerate(t for t in tokenizer.get_vocab() if t != "©")
    }  # é is two bytes, the second of which is ©
    tokenizer = fast(
        models.BPE(vocab, []),
        None,
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    with pytest.raises(BadInput, match="does not know 'é'"):
        encode("café", tokenizer, DataSettings(), where="row")


def test_unknown_characters_of_chat_and_generated_prompts(tokenizer, tmp_path):
    tokenizer.chat_template = CHAT
    with pytest.raises(BadInput, match="p.jsonl line 1: the model's tokenizer does not know 'x'"):
        read(write(tmp_path / "p.jsonl", {"prompt": "1x2", "label": 1}), tokenizer, chat=True)
    with pytest.raises(BadInput, match="toy: the model's tokenizer does not know 'b'"):
        next(
            toy_prompts(
                tokenizer, DataSettings(chat=True, system_prompt="be good"), seed=1, held_out=False
            )
        )
    known = ({"prompt": "1=" if i != 70 else "x", "label": i} for i in range(73))
    assert [sample.label for sample in generated(known, tokenizer, DataSettings(), name="g")][
        -3:
    ] == [
        69,
        71,
        72,
    ]  # never ends a run
    tokenizer.chat_template = "é" + CHAT
    with pytest.raises(BadInput, match="does not know 'é'"):
        read(write(tmp_path / "p.jsonl", {"prompt": "12", "label": 1}), tokenizer, chat=True)


# --- tools, chat_template_kwargs, and what a template leaves out --------------------------------


TOOLS = [{"type": "function", "function": {"name": "13", "parameters": {"n": None}}}]
CALLS = (
    "{% if tools %}{% for t in tools %}{{ t.function.name }}+{{ t.function.parameters | length"
    " }}={% endfor %}{% endif %}{% for m in messages if m.role != 'developer' %}{{ m.content }}{%"
    " for c in m.tool_calls or [] %}+{{ c.name }}{% endfor %}={% endfor %}{% if deep is defined and"
    " deep is true %}9{% elif deep is defined %}8{% endif %}"
)
USER = {"role": "user", "content": "1+2"}


def chat_row(
    tokenizer, folder, prompt, *, template=CALLS, tools=None, file=write, **settings
) -> str:
    """The prompt's text of a row."""
    tokenizer.chat_template = template
    row = {"prompt": prompt, "label": 1, **({"tools": tools} if tools is not None else {})}
    path = folder / ("p.jsonl" if file is write else "p.parquet")
    (sample,) = read(file(path, row), tokenizer, **settings)
    return sample.prompt


def test_tools_reach_the_template(tokenizer, tmp_path):
    assert chat_row(tokenizer, tmp_path, [USER], tools=TOOLS) == "13+1=1+2="
    assert chat_row(tokenizer, tmp_path, "1+2", tools=TOOLS, chat=True) == "13+1=1+2="
    assert (
        chat_row(tokenizer, tmp_path, [USER], tools=json.dumps(TOOLS), file=write_parquet)
        == "13+1=1+2="
    )
    assert (
        chat_row(
            tokenizer,
            tmp_path,
            [USER],
            tools=[json.dumps(tool) for tool in TOOLS],
            file=write_parquet,
        )
        == "13+1=1+2="
    )
    assert (
        chat_row(tokenizer, tmp_path, [USER], tools=[])
        == chat_row(tokenizer, tmp_path, [USER], tools="null")
        == "1+2="
    )


def test_fields_that_parquet_adds_are_no_fields(tokenizer, tmp_path):
    """Objects of a column have the same fields there: what only another object has is null in this
    one.
    """
    two = [
        *TOOLS,
        {"type": "function", "function": {"name": "7", "parameters": {"m": {"type": "string"}}}},
    ]
    assert chat_row(tokenizer, tmp_path, [USER], tools=two, file=write_parquet) == "13+0=7+1=1+2="


@pytest.mark.parametrize("prompt, settings, message", [
    ("1+2", dict(tools=TOOLS), """the row's "tools" needs chat messages, and the prompt of .* is text: add --chat"""),
    ([USER], dict(tools=TOOLS, template=CHAT), """chat template leaves out the row's "tools": remove it"""),
    ([USER], dict(tools="no json"), '"tools" cannot be read'),
    ([USER], dict(tools={"a": 1}), "\"tools\" is {'a': 1}; it must be a list of objects"),
    ([USER], dict(tools=["3"]), '"tools" is .*; it must be a list of objects'),
    ([USER], dict(tools=7), '"tools" is 7; it must be a list of objects'),
    ([{"role": "developer", "content": "2"}, USER], {}, "leaves out message 1, of role 'developer'"),
    ([{**USER, "name": "7"}], {}, """leaves out the messages' field "name": remove it"""),
    ([USER, {"role": "assistant", "content": None, "tool_calls": [{"name": "5"}]}, USER], dict(template=CHAT), 'leaves out the messages\' field "tool_calls"'),
    ([{"role": "user", "content": [{"type": "text", "text": "1"}]}], {}, 'text "content" \\(join the parts of a list\\)'),
    ([{"role": "user", "content": None}], {}, 'needs a "role" and a text "content"'),
    ([{"role": ["user"], "content": "1"}], {}, 'needs a "role"'),
    (["1"], {}, 'needs a "role"'),
    ([USER, {"role": "assistant", "content": "3"}], {}, "the last message is the assistant's, but a prompt ends before the answer"),
])  # fmt: skip
def test_what_a_template_would_leave_out_is_refused(tokenizer, tmp_path, prompt, settings, message):
    with pytest.raises(BadInput, match=message):
        chat_row(tokenizer, tmp_path, prompt, **settings)


def test_calls_and_results_reach_the_template(tokenizer, tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "5"}], "name": None}
    result = {
        "role": "tool",
        "content": "8",
        "tool_call_id": "x",
        "name": "5",
    }  # which call it answers need not be in the text
    for file in (write, write_parquet):
        assert chat_row(tokenizer, tmp_path, [USER, call, result], file=file) == "1+2=+5=8="


def test_values_for_the_chat_template(tokenizer, tmp_path):
    values = {(): "1+2=", ("deep=true",): "1+2=9", ("deep=false",): "1+2=8"}
    assert {
        given: chat_row(tokenizer, tmp_path, [USER], chat_template_kwargs=given) for given in values
    } == values
    with pytest.raises(
        BadInput,
        match=(
            "--chat-template-kwargs needs chat messages, and the prompt of .* is text: add --chat"
        ),
    ):
        chat_row(tokenizer, tmp_path, "1+2", chat_template_kwargs=("deep=true",))


@pytest.mark.parametrize("template, given, message", [
    (CALLS, ["dep=true"], "dep is not a name that the chat template reads; it reads deep"),
    (CALLS, ["m=1"], "m is not a name that the chat template reads"),
    (CALLS, ["tools=[]"], "tools is set by the program itself"),
    (CALLS, ["messages=[]"], "messages is set by the program itself"),
    (CALLS, ["tokenize=true"], "tokenize is set by the program itself"),
    (CALLS + "{{ bos_token }}", ["bos_token=1"], "bos_token is set by the program itself"),
    (CALLS, ["deep=False"], "deep=False would be text: write deep=false"),
    (CALLS, ["deep=true", "deep=false"], "deep is given twice"),
    (CALLS, ["deep"], "'deep' is not of the form key=value"),
    (None, ["deep=true"], "needs a chat template, and the tokenizer has none"),
    ("{% if %}", ["deep=true"], "the tokenizer's chat template cannot be read"),
])  # fmt: skip
def test_values_that_would_do_nothing(tokenizer, template, given, message):
    tokenizer.chat_template = template
    with pytest.raises(BadInput, match=message):
        check_template_kwargs(tokenizer, tuple(given))


def test_names_that_a_template_reads(tokenizer):
    """Also where it gives a default, and beside the tag that transformers adds to Jinja."""
    defaults = (
        "{% set think = think | default(true) %}{% if not day is defined %}{% set day = 1 %}{%"
        " endif %}"
    )
    tokenizer.chat_template = "{% generation %}1{% endgeneration %}" + defaults
    check_template_kwargs(tokenizer, ("think=false", "day=2"))
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ style }}"}
    check_template_kwargs(tokenizer, ("style=1",))


# --- the answer's text, and dumps ---------------------------------------------------------------


def test_the_token_that_ends_a_response_is_not_in_its_text(tokenizer):
    ended = data(stop=("=",))

    def text(ids, reason):
        sample = Sample([1])
        logprobs = [(-1.0, token, None) for token in ids]
        output = {
            "output_ids": ids,
            "meta_info": {"finish_reason": {"type": reason}, "output_token_logprobs": logprobs},
            "weight_versions": [0] * len(ids),
        }
        write_outputs([sample], [output], ended)
        assert sample.response_ids == ids  # for the trainer nothing is left out
        return sample.response

    assert [text(*case) for case in (([5, 6, 14], "stop"), ([5, 6, 2], "stop"), ([5, 6, 14], "length"), ([5, 14, 6, 14], "stop"), ([14], "stop"))] == [
        "23", "23", "23=", "2=3", "",
    ]  # fmt: skip
    assert text([], "length") == ""


def dump_line(**changes) -> dict:
    sample = Sample(
        prompt_ids=[1, 5],
        prompt="3",
        label="7",
        group=4,
        response_ids=[6, 2],
        response="4",
        rollout_logprobs=[-0.5, -1.0],
        loss_mask=[1, 1],
        weight_versions=[3, 3],
        finish_reason="stop",
        reward=0.5,
    )
    return {**asdict(sample), **changes}


def test_a_dump_comes_back_as_it_was_written(tmp_path):
    samples = [
        Sample(**dump_line()),
        Sample(**dump_line(response="a\u2028b\r\n", reward=None)),
        Sample([1], finish_reason="dropped"),
    ]
    (tmp_path / "d.jsonl").write_bytes(b"".join(sample.to_json() + b"\n" for sample in samples))
    assert read_dump(tmp_path / "d.jsonl", vocab_size=7) == samples


@pytest.mark.parametrize("line, message", [
    ("{no", "line 2 is not JSON"),
    ("[]", "line 2: it is not an object"),
    (dump_line(colour=1), "line 2: 'colour' is not a field of a sample"),
    ({k: v for k, v in dump_line().items() if k != "loss_mask"}, "line 2: the field 'loss_mask' is missing"),
    (dump_line(loss_mask=[1]), "its lists differ in length.*response_ids 2, rollout_logprobs 2, loss_mask 1, weight_versions 2"),
    (dump_line(rollout_logprobs=[-0.5, None]), "rollout_logprobs holds null at place 1, which is not a number"),
    (dump_line(rollout_logprobs=[-0.5, "x"]), "rollout_logprobs holds 'x' at place 1"),
    (dump_line(response_ids=[6, 2.0]), "response_ids holds 2.0 at place 1, which is not an integer"),
    (dump_line(response_ids=[6, True]), "response_ids holds True at place 1, which is not an integer"),
    (dump_line(response_ids="62"), "response_ids is a str; it must be a list"),
    (dump_line(response_ids=[6, 32]), "response_ids holds 32; a token id must be at least 0 and below the model's vocabulary, 32"),
    (dump_line(prompt_ids=[-1]), "prompt_ids holds -1"),
    (dump_line(prompt_ids=[]), "prompt_ids is empty"),
    (dump_line(loss_mask=[1, 2]), "loss_mask holds a value other than 0 and 1"),
    (dump_line(old_logprobs=[-1.0]), "old_logprobs has 1 values for 2 response tokens"),
    (dump_line(reward="1"), "reward is a str"),
    (dump_line(group=None), "group is a NoneType"),
    (dump_line(metadata=[]), "metadata is a list"),
])  # fmt: skip
def test_a_bad_line_of_a_dump_is_named(tmp_path, line, message):
    with pytest.raises(BadInput, match=message):
        read_dump(write(tmp_path / "d.jsonl", dump_line(), line), vocab_size=32)


def test_dumps_that_are_none(tmp_path):
    with pytest.raises(BadInput, match="holds no samples"):
        read_dump(write(tmp_path / "d.jsonl", ""))
    with pytest.raises(BadInput, match="cannot be read"):
        read_dump(tmp_path / "absent.jsonl")


# --- the digest ---------------------------------------------------------------------------------


def test_the_digest_is_of_what_was_read(models, tmp_path):
    rows = [{"prompt": f"{i}=", "label": f"x{i}", "metadata": {"i": i}} for i in range(4)]
    (tmp_path / "elsewhere").mkdir()

    def digest(*rows, file=write, to="p.jsonl", weight="", model=TOY, **settings):
        settings = RolloutSettings(prompts=(file(tmp_path / to, *rows) + weight, "toy"), **settings)
        return load_data(model, settings, read_config(model), seed=1).digest

    first = digest(*rows)
    assert list(first) == ["1", "2"] and json.loads(json.dumps(first)) == first
    assert (
        first
        == digest(*rows, to="elsewhere/q.jsonl")
        == digest(*rows, to="p.parquet", file=write_parquet)
    )
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
    assert len({one["1"] for one in [first, *changed]}) == 9 and {one["2"] for one in changed} == {
        first["2"]
    }
    shutil.copytree(TOY, tmp_path / "model", ignore=shutil.ignore_patterns("__pycache__"))
    written = json.loads((tmp_path / "model" / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = written["model"]["vocab"]
    vocab["8"], vocab["9"] = vocab["9"], vocab["8"]  # another tokenizer
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(written), encoding="utf-8")
    other = digest(*rows, model=str(tmp_path / "model"))
    assert (
        other["1"] == first["1"] and other["2"] != first["2"]
    )  # the file has no 8 or 9; the toy's problems have


# --- mixtures -----------------------------------------------------------------------------------


def test_file_prompts_come_in_new_seeded_orders(models, tmp_path):
    path = write(
        tmp_path / "p.jsonl", *({"prompt": f"{i}+1=", "label": str(i + 1)} for i in range(5))
    )
    settings, model = RolloutSettings(prompts=(path,)), str(models["qwen3"])
    config = read_config(model)
    first, again, other = (
        list(islice(load_data(model, settings, config, seed=seed).stream, 10)) for seed in (0, 0, 1)
    )
    assert first == again != other
    assert (
        {sample.label for sample in first[:5]}
        == {sample.label for sample in first[5:]}
        == {"1", "2", "3", "4", "5"}
    )
    assert [sample.group for sample in first] == list(range(10))
    assert load_data(model, settings, config, seed=0).held_out == []


def test_a_mixture_draws_by_weight_and_numbers_as_it_draws(one_rank, tmp_path):
    a = write(tmp_path / "a.jsonl", *({"prompt": f"{i}=", "label": i} for i in range(3)))
    b = write_parquet(
        tmp_path / "b.parquet", *({"prompt": f"{i}+1=", "label": i} for i in range(7))
    )
    settings = RolloutSettings(prompts=(f"{a}:3", b, "toy:0.5"))
    config = read_config(TOY)
    stream, again = (
        list(islice(load_data(TOY, settings, config, seed=1).stream, 900)) for _ in range(2)
    )
    counts = Counter(sample.source for sample in stream)
    assert stream == again and [sample.group for sample in stream] == list(range(900))
    assert (
        550 < counts["a"] < 650 and 170 < counts["b"] < 230 and 75 < counts["toy"] < 125
    )  # of 900: 600, 200, 100
    own = list(
        islice(load_data(TOY, RolloutSettings(prompts=(b,)), config, seed=1).stream, counts["b"])
    )
    assert [sample.prompt for sample in own] == [
        sample.prompt for sample in stream if sample.source == "b"
    ]  # each source in its own order
    data = load_data(TOY, settings, config, seed=1)
    checkpoint = SimpleNamespace(ranks=[{"prompts": 123}])
    run = SimpleNamespace(data=data, engine_index=0, engines=1, resumed_from=checkpoint)
    prompts = PromptStream(run, settings)
    assert prompts.take(5) == stream[123:128]
    assert prompts.state() == {"prompts": 128}


@pytest.mark.parametrize("prompts, weights", [
    (("toy",), {"toy": 1}),
    (("a.jsonl:0.25", "dir:2/b.parquet"), {"a.jsonl": 0.25, "dir:2/b.parquet": 1}),
    (("reasoning-gym:gcd", "reasoning-gym:lcm:3"), {"reasoning-gym:gcd": 1, "reasoning-gym:lcm": 3}),
    ((":2",), {":2": 1}),
    (("toy:1e-300",), {"toy": 1e-300}),  # alone its share is 1
])  # fmt: skip
def test_weights(prompts, weights):
    assert parse_weights(prompts) == weights


@pytest.mark.parametrize("settings, message", [
    (dict(prompts=("toy:0",)), "--prompts toy:0: the weight 0 must be a positive number"),
    (dict(prompts=("toy:nan",)), "the weight nan must be"),
    (dict(prompts=("toy:1e999",)), "the weight 1e999 must be"),
    (dict(prompts=("toy:1e-300", "reasoning-gym:gcd")), "--prompts toy:1e-300 beside reasoning-gym:gcd:1: each source's share of the prompts must be"),
    # The sum is infinite
    (dict(prompts=("toy:1e308", "reasoning-gym:gcd:1e308")), "share of the prompts must be at least 1e-09"),
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
        return [
            (sample.source, sample.prompt) for sample in held_out if sample.source != "toy"
        ], len(held_out)

    in_order = [("a", "0="), ("a", "1="), ("a", "2="), ("b", "0="), ("b", "1=")]
    assert sets(eval_prompts=tuple(files)) == (in_order, 5) and sets(
        eval_prompts=("toy", files[1])
    ) == (in_order[3:], 5)
    assert sets(prompts=(files[0], "toy:0.1")) == ([], 3) and sets(prompts=tuple(files)) == (
        [],
        0,
    )  # the toy has held-out problems of its own, a file has not


def test_what_is_longer_than_the_first_problems_is_passed_over():
    stream, longest = drop_long_prompts(
        (Sample([1] * n) for n in [3, 5, *[2] * 70, 6, 5, 9, 1]), name="x", max_prompt_tokens=5
    )
    assert longest == 5 and [len(sample.prompt_ids) for sample in stream] == [3, 5, *[2] * 70, 5, 1]


def test_a_mixture_of_one_is_that_one():
    stream = mixture([iter([Sample([1], label=i) for i in range(3)])], [0.5], seed=3)
    assert [(sample.label, sample.group) for sample in islice(stream, 3)] == [
        (0, 0),
        (1, 1),
        (2, 2),
    ]


# --- reasoning-gym ------------------------------------------------------------------------------


class Sums:
    """As a task of reasoning-gym: problem i of seed s is made from s + i, and a response that holds
    the answer gets a part of 1.
    """

    def __init__(self, seed: int, size: int):
        self.seed, self.size = seed, size

    def __getitem__(self, i: int) -> dict:
        assert 0 <= i < self.size
        a, b = random.Random(self.seed + i).choices(range(10**6), k=2)
        return {
            "question": f"{a}+{b}=",
            "answer": str(a + b),
            "metadata": {"source_dataset": "chain_sum", "source_index": i, "pair": (a, b)},
        }

    def score_answer(self, answer, entry) -> float:
        assert isinstance(
            entry["metadata"]["pair"], tuple
        )  # some tasks compare what JSON would change
        return (
            1.0
            if answer == entry["answer"]
            else len(entry["answer"]) / len(answer)
            if answer and entry["answer"] in answer
            else 0.0
        )


def extract_answer(completion: str) -> str | None:
    found = re.findall(r"<answer>\s?(.*?)\s?</answer>", completion, re.DOTALL)
    return found[-1].strip() if found else None


@pytest.fixture
def gym(monkeypatch):
    package, factory, utils = (
        ModuleType(name)
        for name in ("reasoning_gym", "reasoning_gym.factory", "reasoning_gym.utils")
    )
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
        return list(
            islice(reasoning_gym_tasks.problems("chain_sum", seed=seed), 1200)
        )  # beyond the two chunks of 500

    one, again, two, held_out = (rows(seed) for seed in (1, 1, 2, "held-out"))
    assert one == again and len({row["prompt"] for row in [*one, *two, *held_out]}) == 3600
    a, b = one[1100]["prompt"][:-1].split("+")
    assert one[1100]["label"] == str(int(a) + int(b)) and one[1100]["notes"] == {
        "reasoning_gym": ["chain_sum", 1, 1100]
    }


def test_reasoning_gym_judges_its_own_problems(gym):
    both = data(
        prompts=("toy", "reasoning-gym:chain_sum:2"),
        eval_prompts=("reasoning-gym:chain_sum",),
        eval_samples=4,
    )
    assert [sample.source for sample in both.held_out] == ["chain_sum"] * 4
    trained = [sample for sample in islice(both.stream, 60) if sample.source == "chain_sum"]
    assert len(trained) > 20 and not {sample.prompt for sample in trained} & {
        sample.prompt for sample in both.held_out
    }
    sample = trained[0]
    sample = Sample.from_json(sample.to_json())
    for response, expected, answer in [
        (sample.label, 1.0, sample.label),
        (f"thus <answer>1</answer>, no: <answer> {sample.label} </answer>.", 1.0, sample.label),
        (
            f"it is {sample.label}",
            len(sample.label) / len(f"it is {sample.label}"),
            f"it is {sample.label}",
        ),
        ("", 0.0, ""),
    ]:
        sample.response = response
        assert reasoning_gym_reward(sample) == pytest.approx(expected) and sample.answer == answer
    assert (
        reasoning_gym_reward(Sample([1], label="4", response="so \\boxed{4.0}")) == 1
    )  # not one of its problems: judged as mathematics


@pytest.mark.parametrize("task, message", [
    ("chain_sums", "reasoning-gym:chain_sums is not a task of reasoning-gym; it has chain_sum, gcd$"),
    ("countdown", "refused: its scorer runs the model's answer as Python"),
])  # fmt: skip
def test_tasks_that_cannot_be_used(gym, task, message):
    with pytest.raises(BadInput, match=message):
        data(prompts=(f"reasoning-gym:{task}",))


def test_a_row_cannot_name_the_task_that_judges_it(gym, tokenizer, tmp_path):
    """Some scorers run the answer as Python.

    What a row brings is its own, and a refused task judges nothing.
    """
    rows = {
        "prompt": "1+2=",
        "label": "3",
        "metadata": {"reasoning_gym": ["countdown", 1, 0]},
        "notes": {"reasoning_gym": ["countdown", 1, 0]},
    }
    (sample,) = read(write(tmp_path / "p.jsonl", rows), tokenizer)
    assert sample.notes == {}
    with pytest.raises(ValueError, match="reasoning-gym:countdown is refused"):
        reasoning_gym_tasks.score("3", "countdown", 1, 0)


def test_without_the_package_the_install_line_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)  # as if it were not installed
    with pytest.raises(
        BadInput, match="needs the package reasoning-gym .*: pip install reasoning-gym==0.1.25"
    ):
        data(prompts=("reasoning-gym:chain_sum",))


def test_its_reward_needs_its_problems():
    with pytest.raises(
        BadInput,
        match="--prompts has none: add one such as reasoning-gym:chain_sum, or use --reward math",
    ):
        check_reward_flags(RewardSettings(reward="reasoning_gym"), RolloutSettings())
    check_reward_flags(
        RewardSettings(reward="reasoning_gym"),
        RolloutSettings(prompts=("toy", "reasoning-gym:gcd:0.1")),
    )


def test_a_rows_own_fields_are_its_own(tokenizer, tmp_path):
    """Fields that the program writes stand beside metadata: a row may call its own as it likes."""
    own = {"answer": 7, "source": "book", "error": "none", "reasoning_gym": ["gcd"], "abort": 1}
    (sample,) = read(
        write(tmp_path / "p.jsonl", {"prompt": "1+2=", "label": "3", "metadata": own}), tokenizer
    )
    assert (sample.metadata, sample.source, sample.answer, sample.error, sample.notes) == (
        own,
        "file",
        None,
        "",
        {},
    )
    sample.response, sample.finish_reason = "3", "stop"
    assert reasoning_gym_reward(sample) == 1 and sample.metadata == own and sample.answer == "3"


def test_a_file_name_that_is_no_utf8_names_a_source(tokenizer, tmp_path):
    """Where the locale is not UTF-8, an é in a file's name comes as a lone surrogate, which JSON
    cannot hold.
    """
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jsonl")
    write(Path(path), {"prompt": "1+2=", "label": "3"})
    stream = data(prompts=(path,)).stream
    assert (
        next(stream).source == "caf\\xe9"
        and json.loads(next(stream).to_json())["source"] == "caf\\xe9"
    )
