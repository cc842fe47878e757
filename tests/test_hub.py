"""hub.py: models and prompts by their names on the hub, from a hub on the loopback.

Why: a name must mean the same files on every rank, or be refused with what the user can do. Each
test starts a Python of its own, as huggingface_hub reads its settings when it is imported. Not
covered: the real hub, and its storage of large files (Xet).
"""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, metrics_of, torchrun
from loopback_hub import COMMIT, Hub

from common import hub as names
from common.errors import BadInput

SMALL = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")


@pytest.fixture
def hub(tmp_path):
    """A hub with the toy as a model, and sums as a dataset of two configurations."""
    root = tmp_path / "hub"
    model = root / "models" / "some" / "toy"
    model.mkdir(parents=True)
    for file in (ROOT / "toy").iterdir():
        if file.name in SMALL or file.suffix == ".safetensors":
            shutil.copy(file, model)
    (model / "pytorch_model.bin").write_bytes(b"never read")
    (model / "modeling_toy.py").write_text("raise SystemExit('never run')", encoding="utf-8")
    (model / "onnx").mkdir()
    (model / "onnx" / "config.json").write_text("{}", encoding="utf-8")
    for config, of_split in {"main": 3, "socratic": 2}.items():
        for split in ("train", "test"):
            for shard in range(of_split):
                row = {"prompt": f"{shard}+{of_split}=", "label": f"{shard + of_split}"}
                name = f"{config}/{split}-{shard:05d}-of-{of_split:05d}.jsonl"
                write(root / "datasets" / "some" / "sums" / name, row)
    served = Hub(root)
    yield served
    served.close()


def write(path, *rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def ask(hub, tmp_path, call: str, **environment) -> str:
    """Return what a call of hub.py's functions prints, or its refusal."""
    lines = ["from common import errors, hub", f"try: print({call})"]
    lines += ["except errors.BadInput as error: print('refused:', error)"]
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), **environment}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert not done.returncode, done.stderr
    return done.stdout.strip()


def model(given: str, *, weights: bool = True, check: str = "str") -> str:
    return f"hub.model_folder({given!r}, flag='--model', check={check}, weights={weights})"


def files(given: str) -> str:
    return f"*[file[-28:] for file in hub.dataset_files({given!r})]"


# --- what is a name -----------------------------------------------------------------------------


@pytest.mark.parametrize("given, is_name", [
    ("Qwen/Qwen3-0.6B", True), ("Qwen/Qwen3-0.6B@refs/pr/1", True), ("toy", False),
    ("toy/glm", False),  # a folder of this machine comes first
    ("./a/b", False), ("/a/b", False), ("a/b/c", False), ("../a", False), ("-a/b", False),
    ("", False), ("a/b@", False), ("a/b\n", False),
])  # fmt: skip
def test_the_name_of_a_model(monkeypatch, given, is_name):
    monkeypatch.chdir(ROOT)
    assert names.is_model(given) == is_name


@pytest.mark.parametrize("given, is_name", [
    ("openai/gsm8k", True), ("openai/gsm8k/main:test@v1", True), ("openai/gsm8k:2x", False),
    ("openslr/librispeech:train.clean.100", True),
    ("data/train.jsonl", False), ("data/train.parquet", False), ("data/train.json.gz", False),
    ("docs/configs", False), ("toy", False), ("reasoning-gym:gcd", False),
])  # fmt: skip
def test_the_name_of_a_dataset(monkeypatch, given, is_name):
    monkeypatch.chdir(ROOT)
    assert names.is_dataset(given) == is_name


# --- models -------------------------------------------------------------------------------------


def test_a_model_is_fetched_once_and_without_what_is_not_needed(hub, tmp_path):
    folder = ask(hub, tmp_path, model("some/toy@v1"))
    assert folder.endswith(f"models--some--toy/snapshots/{COMMIT}")
    assert sorted(os.listdir(folder)) == sorted({*SMALL, "model.safetensors"} & set(hub.sent))
    assert "model.safetensors" in hub.sent
    assert ask(hub, tmp_path, model("some/toy@v1")) == folder
    assert set(hub.sent.values()) == {1}


def test_a_plan_needs_no_weights(hub, tmp_path):
    folder = ask(hub, tmp_path, model("some/toy", weights=False))
    assert "config.json" in os.listdir(folder)
    assert "model.safetensors" not in hub.sent


def test_what_cannot_be_used_is_refused_before_its_weights_are_fetched(hub, tmp_path):
    config = hub.root / "models" / "some" / "toy" / "config.json"
    config.write_text('{"architectures": ["GPT2LMHeadModel"]}', encoding="utf-8")
    check = "__import__('backends.huggingface.config', fromlist=['']).read_config"
    assert ask(hub, tmp_path, model("some/toy", check=check)).startswith("refused: ")
    assert "model.safetensors" not in hub.sent


def test_without_the_hub_the_cache_counts_if_it_is_complete(hub, tmp_path):
    offline = dict(HF_HUB_OFFLINE="1")
    refusal = ask(hub, tmp_path, model("some/toy"), **offline)
    assert re.search("some/toy is not complete in the cache .*home.*HF_HUB_OFFLINE is set", refusal)
    ask(hub, tmp_path, model("some/toy", weights=False))
    assert "is not complete" in ask(hub, tmp_path, model("some/toy"), **offline)
    folder = ask(hub, tmp_path, model("some/toy"))
    assert ask(hub, tmp_path, model("some/toy"), **offline) == folder
    assert ask(hub, tmp_path, model("some/toy"), HF_ENDPOINT="http://127.0.0.1:9") == folder


@pytest.mark.parametrize("given, refusal", [
    ("some/none", "--model some/none is neither on this machine nor on http.*: check the name"),
    ("some/toy@v9", "--model some/toy@v9 has no revision v9: name a branch"),
])  # fmt: skip
def test_what_the_hub_does_not_have_is_refused(hub, tmp_path, given, refusal):
    assert re.match(f"refused: {refusal}", ask(hub, tmp_path, model(given)))


def test_a_gated_model_says_where_its_terms_are(hub, tmp_path):
    hub.gated.add("some/toy")
    refusal = ask(hub, tmp_path, model("some/toy"))
    assert f"is gated: accept its terms at {hub.url}/some/toy, and set HF_TOKEN" in refusal


def test_a_hub_that_cannot_be_reached_is_named(hub, tmp_path):
    refusal = ask(hub, tmp_path, model("some/toy"), HF_ENDPOINT="http://127.0.0.1:9")
    assert "http://127.0.0.1:9 cannot be reached: " in refusal


# --- prompts ------------------------------------------------------------------------------------


def test_the_files_of_a_split_in_order(hub, tmp_path):
    test = [f"main/test-{i:05d}-of-00003.jsonl"[-28:] for i in range(3)]
    for given in ("some/sums:test", "some/sums/main:test@v1"):
        assert ask(hub, tmp_path, files(given)).split() == test
    assert {*hub.sent.values()} == {1}
    assert not any("train" in name or "socratic" in name for name in hub.sent)
    assert ask(hub, tmp_path, files("some/sums:test"), HF_HUB_OFFLINE="1").split() == test


def test_train_is_the_split_unless_another_is_named(hub, tmp_path):
    assert "c/train-00000-of-00002.jsonl" in ask(hub, tmp_path, files("some/sums/socratic"))


@pytest.mark.parametrize("given, refusal", [
    ("some/none", "is neither on this machine"),
    ("some/sums:dev", "has no JSONL or Parquet file of a split dev; it has .*: name another split"),
    ("some/sums/other", "of a split train of other; it has main/test"),
])  # fmt: skip
def test_a_split_that_is_not_there_is_refused(hub, tmp_path, given, refusal):
    assert re.search(refusal, ask(hub, tmp_path, files(given)))


@pytest.mark.parametrize("present, config, found", [
    (["train.jsonl", "test.jsonl"], None, ["train.jsonl"]),
    (["data/train-0.parquet", "data/train-1.parquet"], None,
     ["data/train-0.parquet", "data/train-1.parquet"]),
    (["train/0.parquet", "test/0.parquet"], None, ["train/0.parquet"]),
    (["gsm8k_train.jsonl", "retrain.jsonl", "trainer.jsonl"], None, ["gsm8k_train.jsonl"]),
    (["a/train.jsonl", "default/train.jsonl"], None, ["default/train.jsonl"]),
    (["a/train.jsonl", "b/train.jsonl"], "b", ["b/train.jsonl"]),
    (["a/train.jsonl", "b/train.jsonl"], None, "several sets of files.*a/train.jsonl, b/train"),
    (["train.jsonl", "train.parquet"], None, "several sets of files"),
    (["train_sft-0-of-1.parquet", "train_gen-0-of-1.parquet"], None, "no JSONL or Parquet file"),
    (["data/dapo-math-17k.parquet", "README.md"], None, ["data/dapo-math-17k.parquet"]),
    (["codecontests.jsonl"], None, ["codecontests.jsonl"]),
    (["en/0.jsonl", "de/0.jsonl"], "en", ["en/0.jsonl"]),
    (["main/train/0.parquet", "main/train/1.parquet", "other/train/0.parquet"], None,
     ["main/train/0.parquet", "main/train/1.parquet"]),
    (["test.jsonl"], None, "no JSONL or Parquet file of a split train"),
    (["train.csv"], None, "it has train.csv"), ([], None, "it has no file at all"),
])  # fmt: skip
def test_which_files_are_a_split(present, config, found):
    def choose():
        return names._files_of_split(present, "a/b", config=config, split=None)

    if isinstance(found, list):
        assert choose() == found
    else:
        with pytest.raises(BadInput, match=found):
            choose()


# --- a run --------------------------------------------------------------------------------------


@pytest.mark.complete
def test_two_ranks_train_a_model_of_the_hub_on_its_prompts(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    flags = ["--model", "some/toy", "--prompts", "some/sums:train", "--eval-prompts"]
    flags += ["some/sums/socratic:test", "--eval-samples", "2", "--steps", "1", "--name", "a"]
    flags += ["--prompts-per-step", "2", "--samples-per-prompt", "2", "--export"]
    done = torchrun(ROOT / "loop_sync.py", *flags, ranks=2, cwd=tmp_path)
    assert {*hub.sent.values()} == {1}  # once for both ranks
    assert f"some/toy: {tmp_path}/home/hub/models--some--toy/snapshots/{COMMIT}" in done.stderr
    assert "held_out" in metrics_of(tmp_path / "runs" / "a")[-1]
