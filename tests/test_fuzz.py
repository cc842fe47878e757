"""Generated bad input: flags, prompt files, model configs, checkpoints.

Each is refused with a message before anything is started, none with a traceback. All of it goes
through the loop's own main() in this process, up to the point where process groups would be
started. What reaches that point was no bad input. test_loop_sync.py tests the exit codes that
run_main makes of these errors.
"""

import contextlib
import dataclasses
import json
import pickle
import random
import shutil
import typing

import loop_sync
import pyarrow
import pyarrow.parquet
import pytest
from torch.distributed.checkpoint.metadata import Metadata
from conftest import ROOT, start_main

from common import distributed, errors
from harness import checkpoint

ODD = [
    "-1",
    "0",
    "-0.5",
    "1e9",
    "nan",
    "inf",
    "x",
    "",
    "3.7",
    "99999999999999999999",
    "None",
    "true",
    "[1]",
    "a=b",
    "--",
    "\x00",
    "é" * 300,
]
VALUES = [
    None,
    -1,
    0,
    1.5,
    "x",
    "",
    [],
    {},
    [1],
    {"a": 1},
    True,
    False,
    10**12,
    float("inf"),
    -(10**12),
    "128",
    [[]],
    {"rope_type": 3},
    {"rope_theta": "x"},
]


class Started(Exception):
    """The run would have begun."""


@pytest.fixture
def outcome(monkeypatch, tmp_path):
    """Call main() with these flags; "refused", or "started" where all of them were good.

    Any other end fails the test.
    """
    monkeypatch.chdir(tmp_path)
    for name, value in dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0).items():
        monkeypatch.setenv(name, str(value))

    def started(*args, **kwargs):
        raise Started

    monkeypatch.setattr(distributed, "init_distributed", started)

    def call(*flags: str) -> str:
        monkeypatch.setattr("sys.argv", ["loop_sync.py", *flags])
        try:
            start_main(loop_sync)
        except errors.BadInput as error:
            assert len(str(error)) > 20, flags
            return "refused"
        except Started:
            return "started"
        except BaseException as error:
            error.add_note(f"flags: {flags}")
            raise
        assert "--plan" in flags, f"{flags}: main() has returned"
        return "planned"

    return call


def types_of_flags() -> dict[str, type]:
    """Return the type of every flag but --plan, which ends without a run."""
    parts = typing.get_type_hints(loop_sync.Settings).values()
    return {
        "--" + name.replace("_", "-"): type_
        for part in parts
        for name, type_ in typing.get_type_hints(part).items()
        if name != "plan"
    }


def can_be_read(type_: type, value: str) -> bool:
    """Tell whether a flag of this type takes the value, so that rules beyond its type judge it."""
    if type_ is bool:
        return False  # it takes none
    if type_ in (int, float):
        try:
            type_(value)
        except ValueError:
            return False
    return True


def odd_values(*, others: int) -> list[tuple[str, str]]:
    """Return (flag, value): every value that the flag can read, and some others of each flag."""
    rng, cases = random.Random(0), []
    for flag, type_ in types_of_flags().items():
        readable = [value for value in ODD if can_be_read(type_, value)]
        unreadable = [value for value in ODD if value not in readable]
        values = readable + rng.sample(unreadable, min(others, len(unreadable)))
        cases += [(flag, value) for value in values]
    return cases


@pytest.mark.complete
def test_flags(outcome):
    rng, flags, cases = random.Random(0), list(types_of_flags()), odd_values(others=3)
    cases += [(flag[:-1] + rng.choice("xyz"), "1") for flag in flags] + [(flag,) for flag in flags]
    refused = [outcome(*case) for case in cases].count("refused")
    assert refused > 200
    assert outcome() == "started"


@pytest.mark.complete
def test_flags_of_a_plan(outcome):
    """The arithmetic meets what a run would be refused for, too.

    No division by zero, no layout of no ranks.
    """
    outcomes = [outcome("--plan", *case) for case in odd_values(others=0)]
    assert outcomes.count("refused") > 100
    assert outcome("--plan", "--plan-gpus", "1") == "planned"


def test_lines_of_prompt_files(outcome, tmp_path):
    rng, refused = random.Random(1), 0
    good = json.dumps({"prompt": "1+1=", "label": "2", "metadata": {"a": 1}})
    assert file_outcome(outcome, tmp_path, good.encode()) == "started"
    for _ in range(60):
        data = bytearray(good.encode())
        for _ in range(rng.randint(1, 4)):
            at, kind = rng.randrange(len(data)), rng.randrange(3)
            data[at : at + (kind > 0)] = b"" if kind == 1 else bytes([rng.randrange(256)])
        refused += file_outcome(outcome, tmp_path, bytes(data)) == "refused"
    for field in ("prompt", "label", "metadata", "tools"):
        for value in VALUES:
            refused += (
                file_outcome(
                    outcome,
                    tmp_path,
                    json.dumps({"prompt": "1+1=", "label": "2", field: value}).encode(),
                )
                == "refused"
            )
    assert refused > 60


def file_outcome(outcome, folder, line: bytes) -> str:
    (folder / "prompts.jsonl").write_bytes(b'{"prompt": "2+2=", "label": "4"}\n' + line + b"\n")
    return outcome("--prompts", "prompts.jsonl")


def test_sources_and_fields(outcome, tmp_path):
    """Odd weights, tasks, field names and texts, and a Parquet file of which any byte may be
    another.
    """
    rng, refused = random.Random(4), 0
    rows = [
        {
            "prompt": "1+1=",
            "label": str(i),
            "nested": {"label": i, "messages": [{"role": "user", "content": "1"}]},
        }
        for i in range(3)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "good.parquet")
    assert (
        outcome(
            "--prompts",
            "good.parquet",
            "toy:0.5",
            "--label-key",
            "x",
            "nested.label",
            "label",
            "--eval-prompts",
            "toy",
        )
        == "started"
    )
    for odd in ODD:
        for flags in (
            ("--prompts", f"toy:{odd}"),
            ("--prompts", "toy", odd),
            ("--prompts", f"reasoning-gym:{odd}"),
            ("--eval-prompts", "toy", odd),
        ):
            refused += outcome(*flags) == "refused"
        for flag in ("--prompt-key", "--label-key", "--label-after", "--system-prompt"):
            refused += (
                outcome(
                    "--prompts",
                    "good.parquet",
                    flag,
                    rng.choice([odd, f"nested.{odd}", f"{odd}.label"]),
                )
                == "refused"
            )
    assert (
        outcome("--prompts", "good.parquet", "--prompt-key", "nested.messages") == "refused"
    )  # the toy's tokenizer has no chat template
    whole = (tmp_path / "good.parquet").read_bytes()
    for _ in range(100):
        data = bytearray(whole)
        data[rng.randrange(len(data))] = rng.randrange(256)
        (tmp_path / "p.parquet").write_bytes(data)
        refused += outcome("--prompts", "p.parquet") == "refused"
    assert refused > 120


@pytest.mark.complete
def test_model_configs(outcome, tmp_path):
    model, refused = tmp_path / "model", 0
    shutil.copytree(ROOT / "toy", model, ignore=shutil.ignore_patterns("__pycache__"))
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    assert outcome("--model", str(model)) == "started"
    for field in sorted(config):
        for value in VALUES:
            (model / "config.json").write_text(
                json.dumps({**config, field: value}), encoding="utf-8"
            )
            refused += outcome("--model", str(model)) == "refused"
        (model / "config.json").write_text(
            json.dumps({name: kept for name, kept in config.items() if name != field}),
            encoding="utf-8",
        )
        outcome("--model", str(model))
    for text in ("", "{", "[]", "3", '"x"', "null", '{"model_type": []}', "\x00"):
        (model / "config.json").write_text(text, encoding="utf-8")
        assert outcome("--model", str(model)) == "refused", text
    assert refused > 200


def test_bytes_of_checkpoints(outcome, tmp_path):
    """A flipped bit or a cut, anywhere in any file, is found before anything is started."""
    rng, saved = random.Random(2), tmp_path / "runs" / "old" / "checkpoints" / "step-000004"
    (saved / "model").mkdir(parents=True)
    (saved / "model" / "weights").write_bytes(rng.randbytes(3000))
    (saved / "model" / ".metadata").write_bytes(pickle.dumps(Metadata({}, storage_data={})))
    settings = json.loads(json.dumps(dataclasses.asdict(loop_sync.Settings())))
    state = {
        "step": 4,
        "loop": "sync",
        "settings": settings,
        "read": {},
        "record": {},
        "ranks": [{"prompts": 64}],
    }
    (saved / "state.json").write_text(json.dumps(state), encoding="utf-8")
    listed = {
        str(path.relative_to(saved)): (path.stat().st_size, checkpoint._crc(path))
        for path in saved.rglob("*")
        if path.is_file()
    }
    (saved / "files.json").write_text(json.dumps(listed), encoding="utf-8")
    assert outcome("--name", "old", "--resume") == "started"
    whole = {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    for _ in range(60):
        path = rng.choice(list(whole))
        data = bytearray(whole[path])
        if rng.random() < 0.5:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        else:
            del data[rng.randrange(len(data)) :]
        path.write_bytes(data)
        with contextlib.suppress(AssertionError):
            assert outcome("--name", "old", "--resume") == "refused" or path.name == "files.json"
            path.write_bytes(whole[path])
            continue
        pytest.fail(f"{path.name} was damaged, and the run started")
