"""Shared by the tests of prompts: the toy's tokenizer, files of rows, and reading them."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from backends.huggingface.config import read_config
from common.settings import REPOSITORY, DataSettings, RolloutSettings
from data.prompts import (
    load_data,
    read_prompts,
)
from data.sample import Sample
from data.tokenizer import load_tokenizer

TOY = str(REPOSITORY / "toy")
ROLES = "{'user': '1', 'system': '2', 'assistant': '3', 'tool': '4'}"
CHAT = "{% for m in messages %}{{ " + ROLES + "[m['role']] }}+{{ m['content'] }}={% endfor %}"
"""Write digits for roles, since the toy's alphabet is 0 to 9, + and =."""


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
