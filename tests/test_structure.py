"""The project's own shape: how much there is to read, how wide it is, and which way imports go.

Why: a reader reads the files at the top in one sitting. That holds only while they stay few, short
and narrow, and while what stands below a file never leads back up to it. A fork may grow as it
likes: which files are at the top, and the size of those that a fork edits, is asked by .ci/run
alone. Not covered: whether the prose is good.
"""

import ast
import difflib
import os
import re

import pytest
from conftest import ROOT, SOURCES

LOOPS = ("loop_sync.py", "loop_async.py")
STAGES = ("rollout.py", "reward.py", "train_step.py", "weight_sync.py", "fp8_quant.py")
ALGORITHMS = ("losses.py", "advantages.py")
STORY = (*LOOPS, *STAGES, *ALGORITHMS)
# Each layer may import its own and those before it.
LAYERS = (ALGORITHMS, ("common",), ("backends", "fp8_quant.py"), ("data",), STAGES, ("harness",))
ABOVE = ("tools", "examples", "bench", "tests", *LOOPS)
TEXT = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in SOURCES}
IN_CI = pytest.mark.skipif("CI" not in os.environ, reason="a fork may grow; .ci/run sets CI")


# --- size -----------------------------------------------------------------------------------------


@IN_CI
def test_the_top_holds_the_story_alone():
    assert {name for name in TEXT if "/" not in name} == set(STORY)


@IN_CI
def test_the_story_is_short():
    assert sum(len(TEXT[name].splitlines()) for name in STORY) <= 2_700
    assert sum(len(TEXT[name].encode()) for name in STORY) <= 110_000


@pytest.mark.parametrize("name", TEXT)
def test_no_line_is_wide(name):
    assert [i for i, line in enumerate(TEXT[name].splitlines(), 1) if len(line) > 100] == []


def test_no_file_is_long():
    lines = {name: len(text.splitlines()) for name, text in TEXT.items()}
    growing = set() if "CI" in os.environ else set(ALGORITHMS)  # by a fork's algorithm
    assert {name: n for name, n in lines.items() if n > 450 and name not in growing} == {}


@pytest.mark.parametrize("name", STORY)
def test_functions_of_the_story_are_short(name):
    functions = [node for node in ast.walk(ast.parse(TEXT[name])) if is_function(node)]
    lines = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    assert {name: n for name, n in lines.items() if n > 75} == {}


def is_function(node: ast.AST) -> bool:
    return isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))


# --- the loops ------------------------------------------------------------------------------------


def mains_of(loop: str) -> list[str]:
    """The lines of main() and train(), which it calls."""
    lines = TEXT[loop].splitlines()
    nodes = [node for node in ast.parse(TEXT[loop]).body if is_function(node)]
    mains = [node for node in nodes if node.name in ("main", "train")]
    return [line for node in mains for line in lines[node.lineno - 1 : node.end_lineno]]


@pytest.mark.parametrize("loop", LOOPS)
def test_a_loop_fits_on_a_screen(loop):
    assert 40 < len(mains_of(loop)) <= 65


def test_the_loops_differ_where_they_must():
    differing = difflib.ndiff(*map(mains_of, LOOPS))
    assert len([line for line in differing if line[0] in "+-"]) < 50


@pytest.mark.parametrize("cut", ["rollout.py", "reward.py", "train_step.py", "losses.py"])
def test_a_cut_is_marked(cut):
    assert "# EDIT HERE" in TEXT[cut]


# --- imports --------------------------------------------------------------------------------------


def room_of(name: str) -> str:
    """The folder of a file, or the file itself at the top."""
    return name.partition("/")[0]


def imports_of(name: str) -> set[str]:
    """The project's files and folders that a file imports, wherever in it."""
    modules = set()
    for node in ast.walk(ast.parse(TEXT[name])):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module)
    first = {module.partition(".")[0] for module in modules}
    rooms = {room_of(other).removesuffix(".py"): room_of(other) for other in TEXT}
    return {rooms[module] for module in first if module in rooms}


@pytest.mark.parametrize("name", [n for n in TEXT if room_of(n) not in (*ABOVE, "toy")])
def test_no_import_goes_up(name):
    layer = next(i for i, rooms in enumerate(LAYERS) if room_of(name) in rooms)
    allowed = {room for rooms in LAYERS[: layer + 1] for room in rooms} | {"toy"}
    assert imports_of(name) <= allowed


def test_the_toy_imports_no_stage():
    for name in ("toy/task.py", "toy/make_toy.py"):
        assert imports_of(name) <= {"toy", "backends", "common"}


def modules_of(name: str) -> set[str]:
    """The project's files that a file imports when it is imported itself."""
    found, paths = set(), set(TEXT)
    for node in ast.parse(TEXT[name]).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    files = {module.replace(".", "/") + ".py" for module in found if module}
    return files & paths


def test_no_circle_of_imports():
    graph = {name: modules_of(name) for name in TEXT if room_of(name) != "tests"}
    left = dict(graph)
    while ends := [name for name, others in left.items() if not others & set(left)]:
        for name in ends:
            del left[name]
    assert left == {}


def test_the_stages_are_named_once_each_in_the_loops():
    """README, loop, stage: what a loop calls stands in the file of its name."""
    for loop in LOOPS:
        called = set(re.findall(r"\b(rollout|reward|train_step|weight_sync)\.\w+\(", TEXT[loop]))
        assert called == {"rollout", "reward", "train_step", "weight_sync"}
