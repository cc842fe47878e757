"""Files of prompts, JSONL and Parquet: which rows are read, and how a bad one is named.

Why: whoever mistypes a file learns the file, the row, the rule and the fix. A row that is dropped
or misread in silence would train on the wrong task. What a tokenizer or a chat template makes of a
prompt is in test_prompt_text.py. Not covered: files that do not fit into memory.
"""

import gzip
import json
import os
import random
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from backends.huggingface.config import read_config
from common.errors import BadInput
from common.settings import DataSettings, RolloutSettings
from data.prompts import (
    load_data,
    read_prompts,
    toy_prompts,
)
from prompt_helpers import CHAT, TOY, data, read, write, write_parquet

pytest_plugins = ["prompt_helpers"]  # the fixture tokenizer


# --- rows ---------------------------------------------------------------------------------------


def test_text_and_chat_prompts(tokenizer, tmp_path):
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}={% endfor %}"
    rows = (
        {"prompt": "1+2=", "label": "3", "metadata": {"level": 4}},
        {"prompt": [{"role": "user", "content": "1+2"}], "label": 3},
    )
    text, chat = read(write(tmp_path / "p.jsonl", *rows), tokenizer)
    assert text.prompt_ids == [1, *chat.prompt_ids] and chat.prompt == "1+2=" and chat.label == 3
    assert text.metadata == {"level": 4}
    assert chat.metadata == {}
    assert text.source == chat.source == "file"
    # A template writes its own special tokens, so the chat prompt gets no start token.


def test_chat_wraps_text_and_the_system_message_goes_first(tokenizer, tmp_path):
    tokenizer.chat_template = CHAT
    path = write(
        tmp_path / "p.jsonl",
        {"prompt": "1+2", "label": 3},
        {"prompt": [{"role": "user", "content": "4+5"}], "label": 9},
    )
    assert [sample.prompt for sample in read(path, tokenizer, chat=True)] == ["1+1+2=", "1+4+5="]
    samples = read(path, tokenizer, chat=True, system_prompt="7")
    assert [sample.prompt for sample in samples] == ["2+7=1+1+2=", "2+7=1+4+5="]
    stream = toy_prompts(tokenizer, DataSettings(chat=True), seed=1, held_out=False)
    assert re.fullmatch(r"1\+\d{3}\+\d{3}==", next(stream).prompt)


@pytest.mark.parametrize("template, settings, prompt, message", [
    (None, dict(chat=True), "1+2",
     "line 1: chat messages need a chat template, and the tokenizer has none"),
    (CHAT, dict(system_prompt="7"), "1+2",
     "--system-prompt needs chat messages, and the prompt of .* line 1 is text: add --chat"),
    (CHAT, dict(system_prompt="7"), [{"role": "system", "content": "8"}],
     "line 1 has a system message of its own"),
    ("{{ raise_exception('no system') }}", dict(chat=True), "1+2",
     r"line 1: the tokenizer's chat template refuses these messages \(no system\)"),
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
    ('{"prompt": "1=", "label": 1, "label": 2}',
     r"line 2 is not JSON \(the field 'label' is given twice\)"),
    ({"prompt": json.dumps([{"role": "user", "content": "1"}]), "label": 1},
     "line 2: the prompt is JSON text of chat messages: give the list itself"),
    ({"label": 1},
     "line 2 has no prompt; its fields are label: name the right one with --prompt-key"),
    ({"prompt": "", "label": 1}, "line 2 has no prompt"),
    ({"prompt": [], "label": 1}, "line 2 has no prompt"),
    ({"prompt": "1+1="},
     r"line 2 has no label \(null if the reward needs none\); its fields are prompt: name the "
     r"right one with --label-key"),
    ({"prompt": "1+1=", "label": 2, "metadata": [1]}, "metadata"),
    ({"prompt": "1+1=", "label": 10**20}, "must fit in a line of JSON"),
    ('{"prompt": "\\ud800", "label": 1}', "must fit in a line of JSON"),
    ({"prompt": 12, "label": 1}, "is a int"),
    ({"prompt": [{"role": "user", "content": "1"}], "label": 1}, "the tokenizer has none"),
    ({"prompt": "1" * 30, "label": 1}, "has 31 tokens; it must have 1 to 20"),
])  # fmt: skip
def test_a_bad_line_is_named(tokenizer, tmp_path, line, message):
    path = write(tmp_path / "p.jsonl", {"prompt": "1+1=", "label": 2}, line)
    with pytest.raises(BadInput, match=message):
        read(path, tokenizer, max_prompt_tokens=20)


def test_a_line_ends_only_where_a_line_ends(tokenizer, tmp_path):
    """JSON allows U+2028 inside a string. str.splitlines() would cut the row there."""
    rows = ['{"prompt": "1+1=", "label": "a\u2028b\x85c"}', "", '{"prompt": "2+2=", "label": 4}']
    (tmp_path / "p.jsonl").write_bytes("\r\n".join(rows).encode())
    labels = [sample.label for sample in read(str(tmp_path / "p.jsonl"), tokenizer)]
    assert labels == ["a\u2028b\x85c", 4]


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
        assert [sample.label for sample in lines] == [label] * 2
    path = write_parquet(tmp_path / "p.parquet", GSM8K)
    (uncut,) = read(path, tokenizer, prompt_key=("question",), label_key=("answer",))
    assert uncut.label == GSM8K["answer"]


def test_a_key_is_a_field_or_a_path(tokenizer, tmp_path):
    row = {"prompt": "1+2=", "a.b": 1, "a": {"b": 2, "c": None}}
    path = write(tmp_path / "p.jsonl", row)
    labels = [
        read(path, tokenizer, label_key=key)[0].label
        for key in (("a.b",), ("a.c",), ("x", "a.x", "a"), ("a.c", "a.b"))
    ]
    # A field of exactly that name wins over a path. Null is a label. Of several keys, the first one
    # counts whose value is not null.
    assert labels == [1, None, {"b": 2, "c": None}, 1]
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
    samples = read(write(tmp_path / "p.jsonl", *rows), tokenizer, label_after="####")
    assert [sample.label for sample in samples] == ["2", "3"]
    without = write(tmp_path / "p.jsonl", {"prompt": "1=", "label": 3})
    assert read(without, tokenizer, label_after="####")[0].label == 3
    for label, message in {
        "4": "line 3: the label '4' does not hold --label-after '####'",
        5: "line 3: the label 5 does not hold",
        None: "line 3: the label null does not hold",
        "6 ####  ": "line 3: nothing follows --label-after '####' in the label '6 ####  '",
    }.items():
        path = write(tmp_path / "p.jsonl", *rows, {"prompt": "1=", "label": label})
        with pytest.raises(BadInput, match=message):
            read(path, tokenizer, label_after="####")


def test_parquet_that_cannot_be_used(tokenizer, tmp_path):
    rows = {"prompt": "1=", "label": 1}, {"prompt": None, "label": 1}
    path = write_parquet(tmp_path / "p.parquet", *rows)
    with pytest.raises(BadInput, match="row 2 has no prompt: it needs a non-empty one"):
        read(path, tokenizer)
    path = write_parquet(tmp_path / "p.parquet", {"prompt": "1=", "label": b"1"})
    too_rich = "row 1: prompt, label and metadata must fit in a line of JSON"
    with pytest.raises(BadInput, match=too_rich):
        read(path, tokenizer)
    with pytest.raises(BadInput, match="is a Parquet file: its name must end in .parquet"):
        read(str((tmp_path / "p.parquet").rename(tmp_path / "p.pq")), tokenizer)
    rng, whole = random.Random(0), (tmp_path / "p.pq").read_bytes()
    lengths = [0, 4, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(40))]
    for at in lengths:  # each cut file is refused; none crashes the reader
        (tmp_path / "p.parquet").write_bytes(whole[:at])
        with pytest.raises(BadInput, match="cannot be read as Parquet"):
            read(str(tmp_path / "p.parquet"), tokenizer)


# --- null, NaN and what is no JSON --------------------------------------------------------------


def test_a_null_or_nan_is_no_value(tokenizer, tmp_path):
    """In a file joined from two sources, each row has both columns, and one of them is null."""
    rows = (
        {"label": "3", "answer": None, "n": None},
        {"label": None, "answer": "4", "n": float("nan")},
        {"label": None, "answer": None, "n": 0.0},
    )
    rows = [{"prompt": "1+2=", **row} for row in rows]
    for path in (write_parquet(tmp_path / "p.parquet", *rows), write(tmp_path / "p.jsonl", *rows)):
        samples = read(path, tokenizer, label_key=("label", "answer"))
        assert [sample.label for sample in samples] == ["3", "4", None]
        samples = read(path, tokenizer, label_key=("n",))
        assert [sample.label for sample in samples] == [None, None, 0.0]
        samples = read(path, tokenizer, prompt_key=("absent", "prompt"))
        assert [sample.prompt for sample in samples] == ["1+2="] * 3


@pytest.mark.parametrize("label", [0, False, "", 0.0, [], {"a": None}, 2**63, -(2**63)])
def test_a_label_that_is_false_is_a_label(tokenizer, tmp_path, label):
    path = write(tmp_path / "p.jsonl", {"prompt": "1=", "label": label, "answer": 7})
    (sample,) = read(path, tokenizer, label_key=("label", "answer"))
    assert sample.label == label
    assert type(sample.label) is type(label)


@pytest.mark.parametrize("field, value", [
    ("metadata", {"a": float("nan")}), ("metadata", {"a": [float("inf")]}), ("label", float("inf")),
    ("label", [float("nan")]), ("label", 2**64),
])  # fmt: skip
def test_what_json_cannot_hold_is_refused(tokenizer, tmp_path, field, value):
    path = write(tmp_path / "p.jsonl", {"prompt": "1=", "label": 1, field: value})
    rule = "line 1: prompt, label and metadata must fit in a line of JSON"
    with pytest.raises(BadInput, match=rule):
        read(path, tokenizer)


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
        return ["is long" if len(label) > 90 else "" for label in labels]

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
            label_problems=lambda reward: label_problems,
        )

    for flag in ("prompts", "eval_prompts"):
        load("x2", flag=flag)  # --label-after cuts the label before it is judged
        with pytest.raises(BadInput) as raised:
            load("x" + "7" * 100, flag=flag)
        (problem,) = raised.value.problems
        assert re.fullmatch(r".*p.jsonl line 2: the label '7{58}… is long", problem)


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
    assert len(raised.value.problems) == 6
    assert raised.value.problems[0].endswith("line 1: the label null is null")
    assert raised.value.problems[5].endswith("4 more rows cannot be used")


def test_label_after_that_cuts_nothing(tmp_path):
    one, other = (
        write(tmp_path / name, {"prompt": "1=", "label": label})
        for name, label in (("a.jsonl", "#### 1"), ("b.jsonl", 1))
    )
    trained = data(prompts=(one, other), label_after="####")
    held_out = data(prompts=(other,), eval_prompts=(one,), label_after="####")
    assert trained.held_out == held_out.held_out[1:]
    for prompts in ((other,), ("toy",)):
        with pytest.raises(BadInput, match="--label-after '####': no label of any file holds it"):
            data(prompts=prompts, label_after="####")


def test_a_file_name_that_is_no_utf8_names_a_source(tokenizer, tmp_path):
    """Where the locale is not UTF-8, Python reads an é in a file's name as a lone surrogate.

    JSON cannot hold a surrogate, so the source's name is escaped.
    """
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jsonl")
    write(Path(path), {"prompt": "1+2=", "label": "3"})
    stream = data(prompts=(path,)).stream
    assert next(stream).source == "caf\\xe9"
    assert json.loads(next(stream).to_json())["source"] == "caf\\xe9"
