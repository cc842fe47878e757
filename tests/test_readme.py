"""README.md against the repository: a reader who follows it must not be sent to a file that is
gone, or miss one that is there.

The glossary of metrics is checked against a real run in test_loop_sync.py; the install line is what
.ci/run runs. A fork may add files and algorithms: that the table lists every file is asked by
.ci/run alone, and the files that algorithms are added to have no bound.
"""

import ast
import os
import re

import pytest

from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


LISTED = set(re.findall(r"^\| `([^`]+)` \| [^|]+ \|$", README, re.MULTILINE))
GROWING = ("losses.py", "advantages.py")  # a fork of an algorithm makes them longer


def test_the_table_of_files_lists_what_is_there():
    folders = {f"{name}/" for name in ("toy", "examples", "bench", "tests", "math_rules")}
    assert folders <= LISTED and {"loop_sync.py", *GROWING} <= LISTED
    assert all((ROOT / name).exists() for name in LISTED if "." in name or "/" in name)


@pytest.mark.skipif("CI" not in os.environ, reason="a fork may add files; .ci/run sets CI")
def test_the_table_of_files_is_the_repository():
    assert {path.name for path in ROOT.glob("*.py")} <= LISTED


def test_every_file_is_short_enough_to_read():
    sources = {path: path.read_text(encoding="utf-8") for path in ROOT.glob("*.py")}
    bounded = {path.name: text for path, text in sources.items() if path.name not in GROWING}
    lines = {name: len(text.splitlines()) for name, text in bounded.items()}
    assert {name: count for name, count in lines.items() if count > 350} == {}


@pytest.mark.parametrize("name", GROWING)
def test_functions_of_a_file_that_grows_are_short_enough_to_read(name):
    nodes = ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8")))
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    assert functions and all(node.end_lineno - node.lineno < 60 for node in functions)


def test_the_toy_is_small():
    assert (
        sum(path.stat().st_size for path in (ROOT / "toy").iterdir() if path.is_file()) < 4 * 2**20
    )


def test_every_requirement_is_pinned():
    for name in ("requirements.txt", "requirements-engine.txt", "requirements-gpu.txt"):
        lines = [
            line
            for line in (ROOT / name).read_text(encoding="utf-8").splitlines()
            if line and not line.startswith("#")
        ]
        assert lines and all(re.fullmatch(r"[A-Za-z0-9_.\-]+==[^=\s]+", line) for line in lines), (
            name
        )
