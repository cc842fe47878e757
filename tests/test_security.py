"""What a model folder, a checkpoint, a peer or a model's answer may do to this machine: nothing.

Here the test reads the sources: a call that is not written there cannot happen. Real runs are
elsewhere. test_checkpoint_signals.py and test_nodes.py show that nothing listens beyond the
loopback. test_checkpoint_refused.py shows that a hostile checkpoint runs no code. test_tool_use.py
shows that the calculator of examples/tool_use.py evaluates nothing. Not covered: the code of SGLang
and Megatron.
"""

import ast

import pytest
from conftest import ROOT, SOURCES

SHIPPED = [path for path in SOURCES if not {"tests", "bench"} & set(path.relative_to(ROOT).parts)]
RUNS_CODE = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load",
    "pickle.loads", "torch.load", "dill.load", "marshal.loads",
}  # fmt: skip
OPENS_UP = {"trust_remote_code", "shell", "allow_pickle", "weights_only"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_runs_what_it_was_given(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in RUNS_CODE, f"line {node.lineno}"
            assert not {keyword.arg for keyword in node.keywords} & OPENS_UP, f"line {node.lineno}"
        if isinstance(node, ast.ClassDef) and "pickle.Unpickler" in map(ast.unparse, node.bases):
            assert "find_class" in [
                part.name for part in node.body if isinstance(part, ast.FunctionDef)
            ]


def test_the_tool_reaches_neither_files_nor_network():
    """The calculator of the example calls nothing but arithmetic and text functions."""
    tree = ast.parse((ROOT / "examples" / "tool_use.py").read_text(encoding="utf-8"))
    (calculator,) = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name == "calculator"
    ]
    called = {ast.unparse(node.func) for node in ast.walk(calculator) if isinstance(node, ast.Call)}
    assert called <= {"CALL.fullmatch", "call[1:-1].split", "sum", "int"}
