"""examples/tool_use.py: conversations token by token, with a scripted engine, and a short run of the whole.

What matters: the policy's tokens come back as they were sampled and are never made from text again, the tool's tokens are masked, and all per-token lists stay
aligned. Not covered: that it learns, which bench-sized runs show, and a chat model's own tool calls.
"""

import math
import sys

import pytest
from conftest import ROOT, metrics_of, torchrun

sys.path.insert(0, str(ROOT / "examples"))
import tool_use
from hf_names import read_config
from rollout import RolloutSettings, Sample, load_data
from run import BadInput

TOY = str(ROOT / "toy")
SETTINGS = RolloutSettings(max_response_tokens=24)


@pytest.fixture
def data(one_rank):
    return load_data(TOY, RolloutSettings(stop=("=",), max_response_tokens=24), read_config(TOY), seed=1)


class Scripted:
    """Says the next line of each conversation's script; a token's log-prob is minus its number, its version the number of the turn."""

    def __init__(self, data, *scripts: list[str]):
        self.tokenizer, self.scripts, self.seen, self.rooms = data.tokenizer, [list(script) for script in scripts], [], []

    def call(self, output):
        return output

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def generate(self, prompts_ids, sampling, *, cache=""):
        self.seen.append(prompts_ids)
        self.rooms.append([params["max_new_tokens"] for params in sampling])
        outputs = []
        for script, room in zip([script for script in self.scripts if script], self.rooms[-1]):
            ids = self.ids(script.pop(0))
            reason = "stop" if ids[-1] in (2, self.ids("=")[0]) and len(ids) <= room else "length"
            ids = ids[:room]
            meta = {"finish_reason": {"type": reason}, "output_token_logprobs": [(-float(i), i, None) for i in ids]}
            outputs.append({"output_ids": ids, "meta_info": meta, "weight_versions": [len(self.seen)] * len(ids)})
        return outputs


def converse(data, *scripts: list[str], max_turns: int = 3, **changes) -> tuple[list[Sample], Scripted]:
    engine = Scripted(data, *scripts)
    prompts = [Sample(data.tokenizer("046+789=").input_ids, "046+789=", "538", group) for group in range(len(scripts))]
    settings = RolloutSettings(**{"max_response_tokens": 24, **changes})
    return tool_use.converse(engine, prompts, data, settings, max_turns=max_turns, n=1), engine


def test_a_conversation_by_hand(data):
    (sample,), engine = converse(data, ["+046+789=", "538</s>"])
    call, result, answer = engine.ids("+046+789="), engine.ids("538"), engine.ids("538</s>")
    assert sample.response_ids == call + result + answer
    assert sample.loss_mask == [1] * 9 + [0] * 3 + [1] * 4
    assert sample.rollout_logprobs == [-float(i) for i in call] + [0.0] * 3 + [-float(i) for i in answer]
    assert sample.weight_versions == [1] * 9 + [1] * 3 + [2] * 4  # the result is as old as the call
    assert engine.seen[1] == [sample.prompt_ids + call + result]  # the second turn sees the very tokens of the first
    assert engine.rooms == [[24], [12]]
    assert sample.finish_reason == "stop" and tool_use.right_answer(sample) == 1
    assert tool_use.tool_metrics([sample]) == {"tool_calls": 1, "tool_share": 1, "tool_errors": 0}


def test_sampled_tokens_are_never_made_from_text_again(data, monkeypatch):
    """With a tokenizer that reads everything as 99: only what the calculator says may come out so."""
    engine = Scripted(data, ["+1+1=", "2</s>"])
    ids = engine.ids("+1+1=")

    class Misreading:
        def __getattr__(self, name):
            return getattr(engine.tokenizer, name)

        def __call__(self, text, **kwargs):
            return type("Encoded", (), {"input_ids": [99] * len(text)})

    monkeypatch.setattr(data, "tokenizer", Misreading())
    sample = tool_use.converse(engine, [Sample([1], "1+1=", "2", 0)], data, SETTINGS, max_turns=3, n=1)[0]
    assert sample.response_ids == ids + [99] + engine.ids("2</s>") and sample.loss_mask == [1] * 5 + [0] + [1] * 2


def test_those_who_have_answered_drop_out_of_the_batch(data):
    samples, engine = converse(data, ["835</s>"], ["+046+789=", "538</s>"], ["+1=", "9</s>"])
    assert [len(prompts) for prompts in engine.seen] == [3, 2]
    assert [tool_use.right_answer(sample) for sample in samples] == [0, 1, 0]
    assert [sample.metadata["errors"] for sample in samples] == [0, 0, 1] and "[+]" in samples[2].response  # one number is no sum
    assert all(len(s.response_ids) == len(s.loss_mask) == len(s.rollout_logprobs) == len(s.weight_versions) for s in samples)


def test_limits(data):
    (sample,), engine = converse(data, ["+1+1=", "+1+1=", "+1+1=", "2</s>"], max_turns=2)
    assert len(engine.seen) == 2 and sample.finish_reason == "length" and sample.metadata["calls"] == 1  # the last turn's call gets no result
    (full,), _ = converse(data, ["+046+789=", "538</s>"], max_response_tokens=11)  # no room for the third digit of the result
    assert len(full.response_ids) == 11 and full.loss_mask == [1] * 9 + [0] * 2 and full.finish_reason == "length"
    assert tool_use.right_answer(sample) == tool_use.right_answer(full) == 0


@pytest.mark.parametrize("call, result", [
    ("+046+789=", "538"), ("+1+2+3=", "6"), ("+999999999+1=", "0000000001"),
    ("+1=", None), ("+1+2+3+4+5=", None), ("+1234567890+1=", None), ("1+1=", None), ("+1+1", None), ("+1-1=", None), ("+1*9**9=", None),
    ("__import__('os')=", None), ("+1+open('x')=", None), ("+１+１=", None), ("+1+1=\n", None), ("", None),
])  # fmt: skip
def test_the_calculator_adds_and_does_nothing_else(call, result):
    assert tool_use.calculator(call) == result


def test_demonstrations(data):
    prompt = next(data.stream)
    called, direct = (tool_use.demonstration(prompt, data, calls=calls) for calls in (True, False))
    assert called.response == f"+{prompt.prompt}[{prompt.label}]{prompt.label}</s>" and direct.response == f"{prompt.label}</s>"
    assert sum(called.loss_mask) == len(called.loss_mask) - len(prompt.label) and all(direct.loss_mask)


@pytest.mark.parametrize("changes, message", [
    (["--max-response-tokens", "8"], "has no room for a call"),
    (["--max-turns", "0"], "--max-turns 0"),
    (["--warm-calls", "2"], "--warm-calls 2"),
    (["--dynamic-sampling", "1"], "single turns"),
])  # fmt: skip
def test_settings_that_cannot_work(monkeypatch, tmp_path, changes, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tool_use.py", *changes])
    for name, value in dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0).items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(BadInput, match=message):
        tool_use.main()


def test_a_short_run(tmp_path):
    """Trainer and engine agree about conversations as they do about single turns: the masks and log-probs stand at the right tokens."""
    quick = ["--steps", "2", "--eval-every", "2", "--eval-samples", "16", "--prompts-per-step", "4", "--samples-per-prompt", "4", "--export"]
    torchrun(ROOT / "examples" / "tool_use.py", *quick, "--warm-steps", "60", "--name", "a", ranks=1, cwd=tmp_path)
    start, *rows = metrics_of(tmp_path / "runs" / "a")
    assert [row["step"] for row in rows] == [1, 2] and 0 <= start["held_out"] <= 1
    for row in rows:
        assert row["logprob_shift"] == 0.0 and row["ratio"] == 1.0 and 0 < row["mismatch_abs"] < 0.1
        assert all(math.isfinite(value) for value in row.values() if not isinstance(value, list))
        assert row["tool_share"] <= row["tool_calls"] <= 2
