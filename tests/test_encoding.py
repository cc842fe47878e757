"""Text files are UTF-8 on every machine, whatever its locale.

Why: without an encoding Python takes the locale's. A prompt with an é then ends a run, or reads as
two other letters. The test reads the sources: each call that opens text must name an encoding. Not
covered: what other programs write to a pipe, and consoles.
"""

import ast

import pytest
from conftest import ROOT, SOURCES

OTHER_OPENS = {"os.open", "zipfile.ZipFile.open", "Image.open", "webbrowser.open"}


def opens_text(call: ast.Call) -> bool:
    """Return whether a call opens a file as text, with an encoding or without.

    Looks at open, Path.open, os.fdopen, read_text and write_text.
    """
    name = ast.unparse(call.func).rpartition(".")[2]
    if name in ("read_text", "write_text"):
        return True
    if name not in ("open", "fdopen") or ast.unparse(call.func) in OTHER_OPENS:
        return False
    # A method `path.open` takes the mode first, the functions take it second.
    is_method = isinstance(call.func, ast.Attribute) and name == "open"
    place = 0 if is_method and ast.unparse(call.func) != "io.open" else 1
    modes = [keyword.value for keyword in call.keywords if keyword.arg == "mode"]
    modes = modes or call.args[place : place + 1]
    return not (modes and isinstance(modes[0], ast.Constant) and "b" in str(modes[0].value))


def without_encoding(source: str) -> list[str]:
    calls = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and opens_text(node)
    ]
    return [
        f"line {call.lineno}: {ast.unparse(call)}"
        for call in calls
        if "encoding" not in {keyword.arg for keyword in call.keywords}
    ]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_text_file_is_opened_with_an_encoding(path):
    assert without_encoding(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("call, is_named", [
    ("open(p)", True), ("open(p, 'w')", True), ("open(p, mode='a')", True), ("p.open()", True),
    ("p.open('w')", True), ("p.read_text()", True),
    ("p.write_text(t)", True), ("os.fdopen(f)", True), ("open(p, 'a' if x else 'w')", True),
    ("Path.read_text(p)", True),
    ("open(p, encoding='utf-8')", False), ("open(p, 'rb')", False), ("open(p, mode='wb')", False),
    ("p.open('rb')", False), ("p.read_bytes()", False),
    ("os.fdopen(f, 'rb')", False), ("p.write_text(t, encoding='utf-8')", False),
    ("os.open(p, 0)", False),
])  # fmt: skip
def test_the_search_finds_what_it_should(call, is_named):
    assert (len(without_encoding(call)) == 1) == is_named
