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
from common.held_out import short_names
from harness import start

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


def model(given: str, *, weights: bool = True) -> str:
    return f"hub.model_folder({given!r}, flag='--model', weights={weights})"


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
    assert sorted(os.listdir(folder)) == sorted([*SMALL, "model.safetensors"])
    assert ask(hub, tmp_path, model("some/toy@v1")) == folder
    assert set(hub.sent.values()) == {1}


def test_a_plan_needs_no_weights(hub, tmp_path):
    folder = ask(hub, tmp_path, model("some/toy", weights=False))
    assert "config.json" in os.listdir(folder)
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


def test_a_private_model_needs_the_token(hub, tmp_path):
    hub.token = "hf_secret"
    assert "set HF_TOKEN if it is private" in ask(hub, tmp_path, model("some/toy"))
    assert COMMIT in ask(hub, tmp_path, model("some/toy"), HF_TOKEN="hf_secret")


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
    ("some/none", "the dataset some/none is neither on this machine"),
    ("some/sums:dev", "has no JSONL or Parquet file of the split dev; it has .*: name another"),
    ("some/sums/other", "of the split train of other; it has main/test"),
])  # fmt: skip
def test_a_split_that_is_not_there_is_refused(hub, tmp_path, given, refusal):
    assert re.search(refusal, ask(hub, tmp_path, files(given)))


def test_without_the_hub_a_name_means_what_it_means_with_it(hub, tmp_path):
    """Not what happens to be in the cache: another configuration, or some of the shards."""
    ask(hub, tmp_path, files("some/sums/socratic"))
    offline = dict(HF_HUB_OFFLINE="1")
    for given in ("some/sums", "some/sums:test"):
        assert "is not complete in the cache" in ask(hub, tmp_path, files(given), **offline)
    shards = ask(hub, tmp_path, "*hub.dataset_files('some/sums')").split()
    os.unlink(shards[1])
    assert "is not complete in the cache" in ask(hub, tmp_path, files("some/sums"), **offline)


NO_SPLIT, SEVERAL = "has no JSONL or Parquet file of the split", "has several sets of files for"


@pytest.mark.parametrize("present, config, split, expected", [
    ("train.jsonl test.jsonl train_socratic.jsonl", None, None, "train.jsonl"),
    ("train.jsonl train_socratic.jsonl", None, "train_socratic", "train_socratic.jsonl"),
    ("data/train-00000-of-00002-a09b74b3ef9c data/train-00001-of-00002-b19b74b3ef9c", None, None,
     "data/train-00000-of-00002-a09b74b3ef9c data/train-00001-of-00002-b19b74b3ef9c"),
    ("train/part-0.jsonl train/part-1.jsonl test/part-0.jsonl", None, None,
     "train/part-0.jsonl train/part-1.jsonl"),
    ("main/train/0000 main/train/0001 other/train/0000", None, None,
     "main/train/0000 main/train/0001"),
    ("mnli/validation_matched-0 mnli/validation_mismatched-0", None, "validation_matched",
     "mnli/validation_matched-0"),
    ("a/train b/train", "b", None, "b/train"),
    ("a/train default/train", None, None, "default/train"),
    ("data/dapo-math-17k README.md", None, None, "data/dapo-math-17k"),
    ("codecontests latest/0", None, None, SEVERAL), ("en/0 de/0", "en", None, "en/0"),
    ("gsm8k.jsonl math.jsonl", None, "math", "math.jsonl"),
    ("gsm8k.jsonl math.jsonl", None, None, SEVERAL),
    ("math_train code_train", None, None, NO_SPLIT),
    ("all/auxiliary_train-00000-of-00001", None, None, NO_SPLIT),
    ("train_sft-00000-of-00001 train_gen-00000-of-00001", None, None, NO_SPLIT),
    ("mnli/validation_matched-0 mnli/validation_mismatched-0", None, "validation", NO_SPLIT),
    ("post-train/test default/partial-train/0000", None, None, NO_SPLIT),
    ("train/test.jsonl", None, None, NO_SPLIT), ("train-1k train-10k", None, None, NO_SPLIT),
    ("a/train b/train", None, None, SEVERAL), ("train.jsonl train.parquet", None, None, SEVERAL),
    ("test.jsonl", None, None, NO_SPLIT), ("train.csv", None, None, "it has train.csv"),
    ("", None, None, "it has no file at all"),
])  # fmt: skip
def test_which_files_are_a_split(present, config, split, expected):
    """Of layouts as they are published. A name without an ending is a Parquet file."""

    def with_endings(text):
        return [name if "." in name else f"{name}.parquet" for name in text.split()]

    def chosen():
        return names.files_of_split(with_endings(present), "a/b", config=config, split=split)

    if set(with_endings(expected)) <= set(with_endings(present)) and expected:
        assert chosen() == with_endings(expected)
    else:
        with pytest.raises(BadInput, match=expected):
            chosen()


@pytest.mark.parametrize("given, expected", [
    (["openai/gsm8k/main:test@refs/convert/parquet"], ["gsm8k/main:test"]),
    (["a/math-1.5:test", "b/math-1.5:test"], ["a/math-1.5:test", "b/math-1.5:test"]),
    (["openai/gsm8k:test", "gsm8k/test.jsonl"], ["gsm8k:test", "test"]),
])  # fmt: skip
def test_the_name_of_a_held_out_set_of_the_hub(given, expected):
    assert list(short_names(given).values()) == expected


# --- a hub in trouble ---------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", [429, 500, 503, "drop"])
def test_what_is_in_the_cache_does_not_need_a_hub_that_is_well(hub, tmp_path, trouble):
    calls = model("some/toy"), files("some/sums")
    well = [ask(hub, tmp_path, call) for call in calls]
    hub.trouble = trouble
    assert [ask(hub, tmp_path, call) for call in calls] == well
    assert "refused: --model some/toy@v1 " in ask(hub, tmp_path, model("some/toy@v1"))


def test_what_is_no_hub_is_named(hub, tmp_path):
    hub.trouble = "odd"
    for call in (model("some/toy"), files("some/sums")):
        assert f"{hub.url} answers as no Hugging Face hub does" in ask(hub, tmp_path, call)
    refusal = ask(hub, tmp_path, model("some/toy"), HF_ENDPOINT="http://[")
    assert "HF_ENDPOINT http://[ is no address" in refusal


def test_all_files_are_of_one_commit(hub, tmp_path):
    """A branch that moves between configuration and weights changes nothing."""
    calls = ", ".join([model("some/toy", weights=False), model("some/toy"), files("some/sums")])
    small, whole, *_ = ask(hub, tmp_path, calls).split()
    assert small == whole
    assert hub.resolved == 2  # of the model and of the dataset


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
    folder = tmp_path / "home" / "hub" / "models--some--toy" / "snapshots" / COMMIT
    assert f"--model some/toy: {folder}" in done.stderr
    assert "held_out" in metrics_of(tmp_path / "runs" / "a")[-1]


@pytest.mark.complete
def test_nothing_large_is_fetched_for_a_run_that_is_refused(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    flags = ["--model", "some/toy", "--prompts", "some/none", "--eval-prompts", "some/sums:dev"]
    done = torchrun(ROOT / "loop_sync.py", *flags, ranks=1, cwd=tmp_path, check=False)
    assert "exitcode  : 2" in done.stderr
    assert "the dataset some/none is neither on this machine nor on" in done.stderr
    assert "no JSONL or Parquet file of the split dev" in done.stderr
    assert "config.json" in hub.sent
    assert "model.safetensors" not in hub.sent


@pytest.mark.parametrize("flag", ["--model", "--eval-prompts"])
def test_ranks_that_read_other_files_are_refused(monkeypatch, flag):
    inputs = {"--model": "12", "--prompts": {"1": "34"}, "--eval-prompts": "56"}
    texts = [json.dumps(inputs | {flag: seen}).encode() for seen in ("12", "99", "12")]
    monkeypatch.setattr(start.distributed, "all_gather_bytes", lambda mine, group: texts)
    with pytest.raises(BadInput) as raised:
        start.check_same_inputs(inputs, None)
    assert raised.value.problems == (
        f"rank 1 reads from {flag} something else than rank 0: give every machine the same files",
    )
