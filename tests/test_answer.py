"""examples/answer.py, and that transformers alone loads a folder in the environment of the README.

Each program runs in a process of its own, from another folder. test_loop_sync.py does the same with
the folder that a run has exported.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "examples"))
import answer

# requirements.txt has no torchvision; one that is installed here may not fit torch.
PLAIN = """
import sys
sys.modules["torchvision"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer(sys.argv[2], return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=8)[0], skip_special_tokens=True))
"""


def python(*words, cwd: Path) -> subprocess.CompletedProcess:
    words = [sys.executable, *map(str, words)]
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=300)


def test_transformers_alone_answers(tmp_path):
    done = python("-c", PLAIN, ROOT / "toy", "123+456=", cwd=tmp_path)
    assert done.stdout == "123+456=975\n", done.stderr


def test_the_script_answers_each_prompt_on_a_line(tmp_path):
    prompts = ["123+456=", "200+008="]
    done = python(ROOT / "examples" / "answer.py", ROOT / "toy", *prompts, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    first, second = done.stdout.splitlines()
    assert first == "975"
    assert len(second) == 3


@pytest.mark.parametrize("words, message", [
    (["none", "1+1="], "none has no config.json: give the folder of a model"),
    (["run", "1+1="], "did you mean run/model-bf16?"),
    (["quantized", "1+1="], "quantized is quantized"),
    (["toy", "1+1=", "--max-response-tokens", "0"], "--max-response-tokens 0 must be at least 1"),
    (["toy", "hello"], "does not know 'h'"),
    (["toy", "1+1=", "--chat"], "the tokenizer has none"),
    (["toy", "1+1=", "--stop", "foo"], "--stop 'foo' is not one token"),
])  # fmt: skip
def test_what_cannot_be_answered_is_refused(words, message, tmp_path, monkeypatch, capsys):
    shutil.copytree(ROOT / "toy", tmp_path / "toy")
    shutil.copytree(ROOT / "toy", tmp_path / "run" / "model-bf16")
    (tmp_path / "quantized").mkdir()
    (tmp_path / "quantized" / "config.json").write_text(
        '{"quantization_config": {}}', encoding="utf-8"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["answer.py", *words])
    with pytest.raises(SystemExit) as ended:
        answer.main()
    assert ended.value.code == 2 and message in capsys.readouterr().err
