"""A path that is no file, or holds no JSON that can be read, is refused by name and at once.

Why: every rank would wait for a pipe in place of config.json without end, and read a device without
end. 100,000 brackets end json in a RecursionError that names no file. The tests try each place that
reads a user's file. A call that hangs fails after WAIT_S. Not covered: files that change while they
are read, and network file systems that hang.
"""

import os
import shutil
import threading
from pathlib import Path

import pytest
from conftest import ROOT

from backends.huggingface.config import generation_eos, read_config
from backends.huggingface.folder import INDEX, HFWeights
from common.errors import SMALL_FILE, BadInput, check_file, read_file, read_json
from common.overrides import parse_overrides
from common.settings import DataSettings, RunSettings
from data.prompt_files import read_prompts
from data.sample import read_dump
from data.tokenizer import load_tokenizer
from harness import checkpoint
from harness.run_folder import new_run_folder
from loop_sync import Settings
from tools import plot

WAIT_S = 60
BRACKETS = "[" * 100_000


def refused(call, *arguments) -> str:
    """Return the problems that a call raises as BadInput.

    Fail if it hangs, returns, or raises anything else.
    """
    told = []

    def run() -> None:
        try:
            told.append(call(*arguments))
        except BaseException as error:  # the assertion below shows it
            told.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(WAIT_S)
    assert told, "it hangs"
    assert isinstance(told[0], BadInput), told[0]
    return "; ".join(told[0].problems)


@pytest.fixture
def model(tmp_path) -> Path:
    shutil.copytree(ROOT / "toy", tmp_path / "model")
    return tmp_path / "model"


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def make_folder(path: Path) -> None:
    path.mkdir()


def make_broken_link(path: Path) -> None:
    path.symlink_to(path.parent / "absent")


KINDS = pytest.mark.parametrize("make, kind", [
    (make_pipe, "is a pipe"), (make_device, "is a device"), (make_folder, "is a folder"),
    (make_broken_link, "is a broken link"),
])  # fmt: skip


def read_toy_prompts(path: Path) -> list:
    tokenizer = load_tokenizer(str(ROOT / "toy"))
    return read_prompts(str(path), tokenizer, DataSettings(), name="p", max_prompt_tokens=99)


def find_checkpoint(path: Path):
    """Resume the run in whose folder the path lies."""
    (path.parent / "checkpoints" / "step-000001").mkdir(parents=True)
    os.chdir(path.parent.parent.parent)
    return checkpoint.find_latest_checkpoint(
        Settings(run=RunSettings(name=path.parent.name)), "sync", {}
    )


# Each file of a model folder, and what reads it.
MODEL_FILES = {
    "config.json": read_config,
    "generation_config.json": generation_eos,
    "tokenizer.json": lambda folder: load_tokenizer(str(folder)),
    "tokenizer_config.json": lambda folder: load_tokenizer(str(folder)),
    "special_tokens_map.json": lambda folder: load_tokenizer(str(folder)),
    "chat_template.jinja": lambda folder: load_tokenizer(str(folder)),
    "model.safetensors": HFWeights,
    INDEX: HFWeights,
}
OTHER_FILES = {
    "p.jsonl": read_toy_prompts,
    "p.parquet": read_toy_prompts,
    "step-000001.jsonl": read_dump,
    "run/metrics.jsonl": lambda path: plot.read(path.parent),
    "run/trace.json": lambda path: plot.spans(path.parent),
    "runs/a/settings.json": find_checkpoint,
}


@KINDS
@pytest.mark.parametrize("name", MODEL_FILES)
def test_what_is_no_file_of_a_model_is_refused_by_name(model, name, make, kind):
    (model / name).unlink(missing_ok=True)
    make(model / name)
    problem = refused(MODEL_FILES[name], model)
    assert name in problem and kind in problem


@KINDS
@pytest.mark.parametrize("name", OTHER_FILES)
def test_what_is_no_file_is_refused_by_name(monkeypatch, tmp_path, name, make, kind):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    make(path)
    problem = refused(OTHER_FILES[name], path)
    assert Path(name).name in problem and kind in problem


@pytest.mark.parametrize(
    "name", ["notes", "tokenizer.extra", "additional_chat_templates/tools.jinja"]
)
def test_a_pipe_of_any_name_in_a_model_folder_is_refused(model, name):
    (model / name).parent.mkdir(exist_ok=True)
    os.mkfifo(model / name)
    assert f"{name} is a pipe" in refused(load_tokenizer, str(model))


def test_a_checkpoint_whose_list_of_files_is_a_pipe_is_damaged(tmp_path):
    os.mkfifo(tmp_path / "files.json")
    assert "files.json cannot be read" in checkpoint.describe_damage(tmp_path)


@pytest.mark.parametrize("name", [name for name in MODEL_FILES if name.endswith(".json")])
@pytest.mark.parametrize("text", [BRACKETS, '{"a": ' * 100_000, "{", "\xff", "1" * 5000])
def test_json_of_a_model_that_cannot_be_read_is_refused_by_name(model, name, text):
    (model / name).write_bytes(text.encode("latin-1"))
    assert name in refused(MODEL_FILES[name], model)


@pytest.mark.parametrize("text", [BRACKETS, '{"a": ' * 100_000])
@pytest.mark.parametrize("name", [name for name in OTHER_FILES if not name.endswith(".parquet")])
def test_json_that_cannot_be_read_is_refused_by_name(monkeypatch, tmp_path, name, text):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n" + text + "\n", encoding="utf-8")
    assert Path(name).name in refused(OTHER_FILES[name], path)


@pytest.mark.parametrize("depth", [200, 300, 900, 2000])
@pytest.mark.parametrize("field", ["prompt", "label", "metadata", "tools"])
def test_a_row_of_any_depth_is_read_or_refused_by_line(tmp_path, field, depth):
    """orjson reads 1,024 nested lists and writes 254. json's limit is Python's depth of calls."""
    values = dict(prompt='"1+1="', label="2", metadata="{}", tools="[]")
    values[field] = '{"a": ' + "[" * depth + "]" * depth + "}"
    row = ", ".join(f'"{name}": {value}' for name, value in values.items())
    (tmp_path / "p.jsonl").write_text(f"{{{row}}}\n", encoding="utf-8")
    try:
        read_toy_prompts(tmp_path / "p.jsonl")
    except BadInput as error:
        assert "p.jsonl line 1" in str(error)


@pytest.mark.parametrize("depth", [100, 500, 900])
def test_a_config_of_any_depth_is_refused_by_name(model, depth):
    text = (model / "config.json").read_text(encoding="utf-8").rstrip().removesuffix("}")
    deep = "[" * depth + "]" * depth
    (model / "config.json").write_text(f'{text}, "unknown": {deep}}}', encoding="utf-8")
    assert "config.json" in refused(read_config, model)


@pytest.mark.parametrize("text", [BRACKETS, "1" * 5000])
def test_a_value_of_a_flag_that_json_cannot_read_is_refused(text):
    problem = refused(lambda: parse_overrides((f"a={text}",), flag="--sglang", fields=None))
    assert "--sglang a cannot be read as JSON" in problem


def test_a_file_that_may_not_be_read_is_refused(monkeypatch, tmp_path):
    (tmp_path / "a.json").write_text("{}", encoding="utf-8")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "may not be read by this user" in refused(check_file, tmp_path / "a.json")


def test_a_file_that_is_too_large_to_be_of_its_kind_is_refused(tmp_path):
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(SMALL_FILE + 1)
    assert f"more than {SMALL_FILE}" in refused(read_config, tmp_path)


def test_a_regular_file_is_read_through_a_link(tmp_path):
    """The caches of model hubs hold such links."""
    (tmp_path / "blob").write_text('{"a": 1}', encoding="utf-8")
    (tmp_path / "config.json").symlink_to(tmp_path / "blob")
    assert read_json(tmp_path / "config.json") == {"a": 1}
    assert read_file(tmp_path / "config.json") == b'{"a": 1}'


def test_a_run_folder_is_its_owners_alone(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert new_run_folder("a", "sync").stat().st_mode & 0o777 == 0o700
