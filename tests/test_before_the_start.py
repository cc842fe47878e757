"""Flags, dumps and folders that would fail, or do something else, only after the start.

Why: hours of a cluster can pass before such a mistake shows. Each case runs a loop's own main() up
to its first process group. test_fuzz.py generates more cases without looking at the messages. Not
covered: mistakes that only a started engine can find.
"""

import json
import shutil

import loop_async
import loop_sync
import pytest
from conftest import ROOT, start_main

from common import distributed
from common.errors import BadInput
from common.settings import RunSettings
from data.sample import Sample
from harness.record import Record


class Started(Exception):
    """Raised where the run would have begun."""


@pytest.fixture
def start(monkeypatch, tmp_path):
    def started(*args, **kwargs):
        raise Started

    def call(*flags, loop=loop_sync, ranks=1):
        for name, value in dict(RANK=0, WORLD_SIZE=ranks, LOCAL_RANK=0).items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr("sys.argv", [f"{loop.__name__}.py", *map(str, flags)])
        start_main(loop)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(distributed, "init_distributed", started)
    return call


@pytest.mark.parametrize("flags, message", [
    (["--seed", "-1"], "--seed -1 must be at least 0 and below 2147483648"),
    (["--seed", str(2**31)], f"--seed {2**31} must be at least 0"),
    (["--judge-timeout-s", "nan"], "--judge-timeout-s nan must be positive"),
    (["--minibatches", "257"], "a step has 256 answers, .* use at most 256"),
    (["--wandb", "a:b"], "--wandb 'a:b' holds ':'"),
    (["--megatron", "recompute_num_layers=x"],
     "'x' is of the wrong type: the field is int or null"),
    (["--megatron", "recompute_num_layers=1.0"], "=1.0 is of the wrong type"),
    (["--megatron", "adam_eps=NaN"], "--megatron adam_eps=nan must be finite"),
    (["--megatron", "adam_eps=1e-9", "adam_eps=1e-8"], "--megatron adam_eps is given twice"),
    (["--sglang", "log_level=info", "log_level=info"], "--sglang log_level is given twice"),
    (["--freeze-moe-router"], "--freeze-moe-router needs a model with experts"),
    (["--routing-replay", "compare"], "--routing-replay compare needs a model with experts"),
    (["--train-numerics", "fp8", "--rollout-dtype", "bf16"], "it needs --rollout-dtype fp8"),
    (["--train-numerics", "fp8", "--train-dtype", "fp32"], "it needs --train-dtype bf16"),
    (["--load-rollouts", "none", "--steps", str(10**12)], "none has no step-000001.jsonl"),
])  # fmt: skip
def test_flags_that_are_refused(start, flags, message):
    with pytest.raises(BadInput, match=message):
        start(*flags)


@pytest.mark.parametrize("flags", [
    ["--seed", str(2**31 - 1)], ["--seed", "0"], ["--minibatches", "256"],
    ["--megatron", "adam_eps=1e-9", "adam_beta1=0.8"], ["--train-numerics", "fp8"],
    ["--megatron", "recompute_granularity=full", "recompute_method=uniform",
     "recompute_num_layers=1"],
])  # fmt: skip
def test_flags_that_hold(start, flags):
    with pytest.raises(Started):
        start(*flags)


def write_dumps(folder, *versions: int, answers: int = 4) -> None:
    """Write one dump a version, sampled by the weights of that version."""
    folder.mkdir()
    for step, version in enumerate(versions, start=1):
        fields = dict(response_ids=[5], rollout_logprobs=[-1.0], loss_mask=[1])
        samples = [
            Sample([4], weight_versions=[version], reward=1.0, **fields) for _ in range(answers)
        ]
        lines = b"\n".join(sample.to_json() for sample in samples)
        # The blank line at the end is no sample.
        (folder / f"step-{step:06d}.jsonl").write_bytes(lines + b"\n\n")


def test_dumps_older_than_the_bound_are_refused(start, tmp_path):
    write_dumps(tmp_path / "dumps", 0, 1, 0)
    flags = ["--load-rollouts", tmp_path / "dumps", "--steps", "3"]
    rule = "step-000003.jsonl has tokens 2 versions old, --max-staleness is 1"
    with pytest.raises(BadInput, match=rule):
        start(*flags, loop=loop_async, ranks=2)
    with pytest.raises(Started):
        start(*flags, "--max-staleness", "2", loop=loop_async, ranks=2)


def test_a_dump_with_fewer_answers_than_updates_is_refused(start, tmp_path):
    write_dumps(tmp_path / "dumps", 0)
    flags = ["--load-rollouts", tmp_path / "dumps", "--steps", "1", "--minibatches"]
    with pytest.raises(BadInput, match="has 4 answers to train on, --minibatches is 5"):
        start(*flags, "5")
    with pytest.raises(Started):
        start(*flags, "4")


def test_a_blank_line_of_a_dump_is_no_sample(tmp_path):
    write_dumps(tmp_path / "dumps", 0)
    settings = RunSettings(load_rollouts=str(tmp_path / "dumps"))
    record = type("Stub", (), {"settings": settings})
    assert len(Record.save_or_load(record, 1, [])) == 4


@pytest.fixture
def toy(tmp_path):
    ignored = shutil.ignore_patterns("__pycache__")
    return shutil.copytree(ROOT / "toy", tmp_path / "model", ignore=ignored)


def test_a_token_beyond_the_model_s_vocabulary_is_refused(start, toy):
    """A tokenizer with gaps among its ids has fewer tokens than its largest id suggests."""
    file = toy / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    tokenizer["model"]["vocab"]["+"] = 5000
    file.write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(BadInput, match="the tokenizer has 5001 tokens, the model 32"):
        start("--model", toy)


def test_a_reference_without_weights_is_refused(start, toy):
    (toy / "model.safetensors").unlink()
    with pytest.raises(BadInput, match=r"has no \*.safetensors file"):
        start("--kl-coef", "0.1", "--reference", toy)
