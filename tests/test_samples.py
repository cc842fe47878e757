"""Sample: what becomes of an answer, and dumps of samples that come back as they were written.

Why: --load-rollouts trains on a dump. A field that is lost or changed on the way trains on another
batch than the one that was sampled. Not covered: dumps by another version of this project.
"""

from dataclasses import asdict, replace

import numpy as np
import pytest

from common.errors import BadInput
from data.sample import Sample, read_dump
from data.tokenizer import end_tokens
from prompt_helpers import data, write
from rollout import new_group, write_outputs

pytest_plugins = ["prompt_helpers"]  # the fixture tokenizer


def test_a_sample_is_one_json_line():
    logprobs = np.float32([-0.1, -2.3333333])
    sample = Sample(**dump_line(rollout_logprobs=list(logprobs), source="töy\n"))
    line = replace(sample, rollout_logprobs=logprobs).to_json()
    assert b"\n" not in line
    # A float32 survives as JSON text exactly.
    assert np.array_equal(np.float32(Sample.from_json(line).rollout_logprobs), logprobs)
    assert replace(Sample.from_json(line), rollout_logprobs=sample.rollout_logprobs) == sample


def test_the_samples_of_a_group_share_no_dictionary():
    """What a rollout or a reward function writes into one must not stand in the others."""
    prompt = Sample([5])
    first, second = new_group(prompt, 2)
    for name in ("metadata", "notes", "metrics"):
        getattr(first, name)["calls"] = 1
        assert getattr(second, name) == getattr(prompt, name) == {}, name


def test_end_tokens(models, tokenizer, tmp_path):
    assert end_tokens(str(models["qwen3"]), tokenizer, ("=",)) == [2, 14]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}', encoding="utf-8")
    assert end_tokens(str(tmp_path), tokenizer, ()) == [2, 7, 8]
    with pytest.raises(BadInput, match="not one token"):
        end_tokens(str(tmp_path), tokenizer, ("==",))


# --- the answer's text, and dumps ---------------------------------------------------------------


def test_the_token_that_ends_a_response_is_not_in_its_text(tokenizer):
    ended = data(stop=("=",))

    def text(ids, reason):
        sample = Sample([1])
        logprobs = [(-1.0, token, None) for token in ids]
        output = {
            "output_ids": ids,
            "meta_info": {"finish_reason": {"type": reason}, "output_token_logprobs": logprobs},
            "weight_versions": [0] * len(ids),
            "routed_experts": b"",
        }
        write_outputs([sample], [output], ended)
        assert sample.response_ids == ids  # the trainer gets every token
        return sample.response

    assert text([5, 6, 14], "stop") == "23"
    assert text([5, 6, 2], "stop") == "23"
    assert text([5, 6, 14], "length") == "23="
    assert text([5, 14, 6, 14], "stop") == "2=3"
    assert text([14], "stop") == ""
    assert text([], "length") == ""


def dump_line(**changes) -> dict:
    """Return the fields of a whole sample."""
    sample = Sample(prompt_ids=[1, 5], prompt="3", label="7", group=4, finish_reason="stop")
    sample.response_ids, sample.response, sample.reward = [6, 2], "4", 0.5
    sample.rollout_logprobs, sample.loss_mask = [-0.5, -1.0], [1, 1]
    sample.weight_versions = [3, 3]
    return {**asdict(sample), "routed_experts": "", **changes}


def test_a_dump_comes_back_as_it_was_written(tmp_path):
    samples = [
        Sample(**dump_line(routed_experts=bytes(range(256)))),
        Sample(**dump_line(response="a\u2028b\r\n", reward=None)),
        Sample([1], discarded="dropped"),
    ]
    (tmp_path / "d.jsonl").write_bytes(b"".join(sample.to_json() + b"\n" for sample in samples))
    assert read_dump(tmp_path / "d.jsonl", vocab_size=7) == samples


@pytest.mark.parametrize("line, message", [
    ("{no", "line 2 is not JSON"),
    ("[]", "line 2: it is not an object"),
    (dump_line(colour=1), "line 2: 'colour' is not a field of a sample"),
    ({k: v for k, v in dump_line().items() if k != "loss_mask"},
     "line 2: the field 'loss_mask' is missing"),
    (dump_line(loss_mask=[1]),
     "its lists differ in length.*response_ids 2, rollout_logprobs 2, loss_mask 1, weight_versions "
     "2"),
    (dump_line(rollout_logprobs=[-0.5, None]),
     "rollout_logprobs holds null at place 1, which is not a number"),
    (dump_line(rollout_logprobs=[-0.5, "x"]), "rollout_logprobs holds 'x' at place 1"),
    (dump_line(response_ids=[6, 2.0]), "_ids holds 2.0 at place 1, which is not an integer"),
    (dump_line(response_ids=[6, True]), "_ids holds True at place 1, which is not an integer"),
    (dump_line(response_ids="62"), "response_ids is a str; it must be a list"),
    (dump_line(response_ids=[6, 32]),
     "response_ids holds 32; a token id must be at least 0 and below the model's vocabulary, 32"),
    (dump_line(prompt_ids=[-1]), "prompt_ids holds -1"),
    (dump_line(prompt_ids=[]), "prompt_ids is empty"),
    (dump_line(loss_mask=[1, 2]), "loss_mask holds a value other than 0 and 1"),
    (dump_line(old_logprobs=[-1.0]), "old_logprobs has 1 values for 2 response tokens"),
    (dump_line(reward="1"), "reward is a str"),
    (dump_line(group=None), "group is a NoneType"),
    (dump_line(routed_experts="AA=A"), "routed_experts is not base64"),
    (dump_line(routed_experts=[1, 2]), "routed_experts is a list"),
    (dump_line(metadata=[]), "metadata is a list"),
    (dump_line(metrics={"calls": None}), "metrics holds None for calls, which is not a number"),
])  # fmt: skip
def test_a_bad_line_of_a_dump_is_named(tmp_path, line, message):
    with pytest.raises(BadInput, match=message):
        read_dump(write(tmp_path / "d.jsonl", dump_line(), line), vocab_size=32)


def test_dumps_that_are_none(tmp_path):
    with pytest.raises(BadInput, match="holds no samples"):
        read_dump(write(tmp_path / "d.jsonl", ""))
    with pytest.raises(BadInput, match="cannot be read"):
        read_dump(tmp_path / "absent.jsonl")
