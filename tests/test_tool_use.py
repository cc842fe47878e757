"""examples/tool_use.py: conversations by hand with a scripted engine, what the calculator accepts,
demonstrations, and a short run on the real stack. Slow tools and chat models: test_tool_turns.py.

What goes wrong here shows late and far away: a mask or log-prob one token off still trains, only
worse. So the lists are compared token by token, and the run in fp32, where engine and trainer must
agree on what follows a result as they do on what comes before. Not covered: learning, GPUs.
"""

import asyncio
import math
import sys
import time

import pytest
import torch
from common import distributed
from conftest import ROOT, metrics_of, start_main, torchrun

sys.path.insert(0, str(ROOT / "examples"))
import tool_use

from backends.huggingface.config import read_config
from common.errors import BadInput, EngineDied
from common.settings import REPOSITORY, RolloutSettings
from data.prompts import load_data
from data.sample import Sample
from losses import LossSettings, ppo
from harness.metrics import batch_metrics
import rollout
from tool_use import (
    CALL_END,
    LONGEST_DEMONSTRATION,
    calculator,
    ToolSettings,
    conversation,
    demonstration,
    right_answer,
)

TOY = str(REPOSITORY / "toy")
SETTINGS = RolloutSettings(max_response_tokens=24, stop=(CALL_END,))
PLUS, EQUALS, END, PAD, UNUSED = 13, 14, 2, 0, 20  # token ids of the toy; digit d is 3 + d
PROMPT = [1, 3, 7, 9, PLUS, 10, 11, 12, EQUALS]  # <s>046+789=
CALL = [PLUS, *PROMPT[1:]]  # +046+789=
SUM = [8, 6, 11]  # 538, which is 835 with the lowest digit first
RESULT = [*SUM, 3]  # 5380: the calculator's numbers have four digits or more


class Scripted:
    """Says what the script has for each turn, one list of ids per conversation that goes on;
    log-probs -1.00, -1.01, … in turn 1, -2.00, … in turn 2.
    """

    def __init__(self, *script: list[list[int]], abort: bool = False):
        self.script, self.abort, self.prompts, self.limits, self.caches = script, abort, [], [], []

    def call(self, coroutine):
        return asyncio.run(coroutine)

    async def generate(self, prompts_ids, sampling, *, request_ids, cache, keep=True):
        self.prompts.append(prompts_ids)
        self.limits.append([params["max_new_tokens"] for params in sampling])
        self.caches.append(cache)
        turn = len(self.prompts)
        said = self.script[turn - 1]
        assert len(said) == len(prompts_ids) == len(sampling)
        return [
            self.output(turn, ids[: params["max_new_tokens"]], params, prompt)
            for ids, params, prompt in zip(said, sampling, prompts_ids)
        ]

    def output(self, turn, ids, params, prompt):
        reason = (
            "abort" if self.abort else "stop" if ids[-1] in params["stop_token_ids"] else "length"
        )
        logprobs = [(-turn - i / 100, token, None) for i, token in enumerate(ids)]
        meta = {
            "finish_reason": {"type": reason, "message": "out of memory"},
            "output_token_logprobs": logprobs,
            "cached_tokens": len(prompt) - 1 if turn > 1 else 0,
        }
        return {
            "output_ids": ids,
            "meta_info": meta,
            "weight_versions": [turn + 4] * len(ids),
            "routed_experts": bytes([turn]) * (len(prompt) + len(ids) - 1),
        }  # as if new weights had come in between


@pytest.fixture(scope="module")
def data():
    return load_data(TOY, SETTINGS, read_config(TOY), seed=1)


def talk(
    data, *script, n=1, max_turns=3, max_response_tokens=24, **options
) -> tuple[list[Sample], Scripted]:
    """n conversations about 046+789=, of which turn t is script[t]."""
    engine = Scripted(*script, **options)
    settings = RolloutSettings(max_response_tokens=max_response_tokens, stop=(CALL_END,))
    prompts = [Sample(PROMPT, "046+789=", "538", group=7)]
    answer = conversation(ToolSettings(max_turns=max_turns))
    samples = rollout.generate(engine, prompts, data, settings, n=n, answer=answer)
    assert len(engine.prompts) == len(script)  # nothing of the script is left
    for s in samples:
        assert (
            len(s.response_ids)
            == len(s.loss_mask)
            == len(s.rollout_logprobs)
            == len(s.weight_versions)
            <= max_response_tokens
        )
    return samples, engine


# --- conversations ------------------------------------------------------------------------------


def test_two_turns_by_hand(data):
    (sample,), engine = talk(data, [CALL], [[*SUM, END]])
    assert sample.response_ids == CALL + RESULT + [*SUM, END]
    assert sample.loss_mask == [1] * 9 + [0] * 4 + [1] * 4
    assert sample.rollout_logprobs == [-1 - i / 100 for i in range(9)] + [0.0] * 4 + [
        -2.0,
        -2.01,
        -2.02,
        -2.03,
    ]
    assert (
        sample.weight_versions == [5] * 13 + [6] * 4
    )  # the result is as old as the turn that asked for it
    # Each token took its experts in the turn that first saw it: SUM's last has taken none.
    assert sample.routed_experts == bytes([1] * (9 + 8) + [2] * (1 + 4 + 3))
    assert sample.response == "+046+789=[5380]538"
    assert sample.finish_reason == "stop"
    assert sample.metrics == {
        "tool_calls": 1,
        "tool_share": 1,
        "tool_errors": 0,
        "tool_failures": 0,
        "later_prompt_tokens": 9 + 9 + 4,  # prompt, call and result, which the second turn reads
        "later_cached_tokens": 21,
    }
    assert sample.answer == "538"
    assert right_answer(sample) == 1
    assert engine.prompts == [[PROMPT], [PROMPT + CALL + RESULT]]
    assert engine.limits == [[24], [11]]


def test_what_was_sampled_is_never_tokenized_again(data):
    """A <pad> disappears from the text, and the text of an unused token would come back as ten
    tokens: only ids lead to the next prompt.
    """
    said = [PLUS, PAD, 3, 7, 9, UNUSED, EQUALS]
    assert data.tokenizer(data.tokenizer.decode(said), add_special_tokens=False).input_ids != said
    (sample,), engine = talk(data, [said], [[UNUSED, PAD, END]])
    assert engine.prompts[1] == [PROMPT + said + [PLUS]]
    assert sample.response_ids == said + [PLUS] + [UNUSED, PAD, END]


def test_what_goes_on_is_one_batch(data):
    """Of three conversations one answers at once, one after a call, one after two; each keeps its
    place, and the copies of a prompt share no list.
    """
    answer, two_and_two = [*SUM, END], [PLUS, 5, PLUS, 5, EQUALS]
    samples, engine = talk(
        data, [CALL, answer, two_and_two], [answer, CALL], [answer], n=3, max_response_tokens=32
    )
    assert [len(prompts) for prompts in engine.prompts] == [3, 2, 1]
    assert engine.prompts[2] == [PROMPT + two_and_two + [7, 3, 3, 3] + CALL + RESULT]
    assert engine.limits[2] == [32 - 5 - 4 - 9 - 4]
    assert [sample.response for sample in samples] == [
        "+046+789=[5380]538",
        "538",
        "+2+2=[4000]+046+789=[5380]538",
    ]
    assert [sample.metrics["tool_calls"] for sample in samples] == [1, 0, 2]
    assert [sample.index for sample in samples] == [0, 1, 2]
    assert all(right_answer(sample) == 1 for sample in samples)
    logged = batch_metrics(samples, version=6)
    assert [logged[f"tool_{name}"] for name in ("calls", "share", "errors")] == [1.0, 2 / 3, 0.0]


def test_the_answer_is_what_follows_the_last_result(data):
    (sample,), _ = talk(data, [CALL], [[*SUM, *SUM, END]])
    assert right_answer(sample) == 0  # 538 stands in it, and is not all of it
    (sample,), _ = talk(data, [CALL], [[END]])
    assert right_answer(sample) == 0  # the result is the calculator's word, not the policy's


def test_a_call_in_the_last_turn_gets_no_result(data):
    (sample,), _ = talk(data, [CALL], [CALL], max_turns=2)
    assert sample.response_ids == CALL + RESULT + CALL
    assert sample.finish_reason == "length"
    assert sample.metrics["tool_calls"] == 1
    assert right_answer(sample) == 0
    (sample,), _ = talk(data, [CALL], max_turns=1)
    assert sample.response_ids == CALL
    assert sample.finish_reason == "length"
    assert right_answer(sample) == 0


def test_a_malformed_call_gets_an_error_and_goes_on(data):
    (sample,), engine = talk(data, [[PLUS, PLUS, EQUALS]], [[*SUM, END]])
    assert engine.prompts[1] == [PROMPT + [PLUS, PLUS, EQUALS] + [PLUS]]  # the error is "+"
    assert sample.loss_mask == [1, 1, 1, 0, 1, 1, 1, 1]
    assert sample.response == "++=[+]538"
    assert [sample.metrics[f"tool_{name}"] for name in ("calls", "share", "errors")] == [1, 1, 1]
    assert sample.answer == "538"
    assert right_answer(sample) == 1


@pytest.mark.parametrize("limit", [11, 13])
def test_the_token_limit_inside_or_right_after_a_result(data, limit):
    (sample,), _ = talk(data, [CALL], max_response_tokens=limit)
    assert sample.response_ids == (CALL + RESULT)[:limit]
    assert sample.loss_mask == [1] * 9 + [0] * (limit - 9)
    assert sample.finish_reason == "length"
    assert sample.answer == ""
    assert right_answer(sample) == 0


def test_the_token_limit_inside_a_turn(data):
    (sample,), _ = talk(data, [CALL], [[*SUM, END]], max_response_tokens=16)
    assert sample.response_ids == CALL + RESULT + SUM
    assert sample.finish_reason == "length"
    assert (
        right_answer(sample) == 0
    )  # it says 538, but whether it would have ended there is unknown


def test_an_aborted_turn_ends_the_run(data):
    with pytest.raises(EngineDied, match="sample 0 of group 7: out of memory"):
        talk(data, [CALL], abort=True)


# --- the calculator -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, result",
    [
        ("+046+789=", "5380"),
        ("+1+2+3+4=", "0100"),
        ("+0+0=", "0000"),
        ("+999999999+1=", "0000000001"),
    ],
)
def test_sums(call, result):
    assert calculator(call) == result


@pytest.mark.parametrize("call", [
    "", "=", "+1=", "046+789=", "+1+2", "+1+2==", "+1+2=\n", " +1+2=", "+1 +2=", "++1+2=",
    "+1+-2=", "+1-2=", "+1*2=", "+1.5+2=", "+1e9+2=", "+0x1+2=", "+1_0+2=", "+9**9**9=",
    "+1+2;+3=", "+1+a=", "+१+२=", "__import__('os').system('ls')=",
    "+1+open('/etc/passwd').read()=", "+1+{0.__class__}=", "+1234567890+1=", "+1" * 5 + "=",
])  # fmt: skip
def test_all_else_is_refused(call):
    assert calculator(call) is None


def test_a_huge_call_costs_nothing():
    started = time.time()
    assert (
        calculator("+1" * 10**6 + "=")
        is calculator("+" + "9" * 10**6 + "+1=")
        is calculator("+" * 10**6 + "=")
        is None
    )
    assert time.time() - started < 1


# --- demonstrations -----------------------------------------------------------------------------


def test_demonstrations_by_hand(data):
    prompt = Sample(PROMPT, "046+789=", "538")
    called, direct = (demonstration(prompt, data, calls=calls) for calls in (True, False))
    assert called.response_ids == CALL + RESULT + [*SUM, END]
    assert called.loss_mask == [1] * 9 + [0] * 4 + [1] * 4
    assert direct.response_ids == [*SUM, END]
    assert direct.loss_mask == [1] * 4
    longest = demonstration(
        Sample(prompt_ids=PROMPT, prompt="999+999=", label="8991"), data, calls=True
    )
    assert len(longest.response_ids) == LONGEST_DEMONSTRATION
    assert longest.response.endswith("=[8991]8991</s>")
    assert prompt.response_ids == []
    assert prompt.notes == {}


def test_at_ratio_1_and_advantage_1_the_policy_loss_is_supervised():
    """d loss / d logprob = -1 at every token: the gradient of -sum of logprobs."""
    logprobs_T = torch.tensor([-0.1, -5.0, -30.0], requires_grad=True)
    clips = LossSettings().clips
    low, high = clips["clip_low"], clips["clip_high"]
    loss_T, ratio_T, _ = ppo(
        logprobs_T,
        logprobs_T.detach(),
        torch.ones(3),
        None,
        clip_low=low,
        clip_high=high,
        dual_clip=0.0,
    )
    loss_T.sum().backward()
    assert ratio_T.tolist() == [1, 1, 1]
    assert logprobs_T.grad.tolist() == [-1, -1, -1]


# --- settings and a run -------------------------------------------------------------------------


@pytest.mark.parametrize("flags, message", [
    (["--reward", "math"], "--reward math judges single turns"),
    (["--max-response-tokens", "17"], "--max-response-tokens 17 .* use at least 18"),
    (["--max-turns", "0"], "--max-turns 0"),
    (["--warm-steps", "-1"], "--warm-steps -1"),
    (["--warm-samples", "0"], "--warm-samples 0"),
    (["--warm-calls", "1.5"], "--warm-calls 1.5"),
    (["--warm-lr", "-1"], "--warm-lr -1.0"),
    (["--tool-delay-s", "-1"], "--tool-delay-s -1.0"),
    (["--tool-delay-s", "nan"], "--tool-delay-s nan"),
    (["--tool-timeout-s", "0"], "--tool-timeout-s 0.0 must be above 0"),
    (["--tool-timeout-s", "9", "--answer-timeout-s", "8"], "--tool-timeout-s 9.0 .* at most"),
    (["--call-end", "+"], r"--call-end \+: the toy's calls end with ="),
    (["--result-role", "user"], "--result-role user is read from a chat template"),
    (["--chat"], "--chat with --warm-steps 600"),
    (["--chat", "--warm-steps", "0"], "--chat with --call-end ="),
    (["--chat", "--warm-steps", "0", "--call-end", "+"], "the tokenizer has none"),
    (["--prompts", "PROMPTS"], "--prompts and --eval-prompts"),
])  # fmt: skip
def test_flags_that_cannot_work(monkeypatch, tmp_path, flags, message):
    (tmp_path / "PROMPTS").write_text('{"prompt": "1+1=", "label": "2"}', encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tool_use.py", *flags])
    for name, value in dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(
        distributed, "init_distributed", lambda *_, **__: pytest.fail("a process group was started")
    )
    with pytest.raises(BadInput, match=message):
        start_main(tool_use, tool_use.check_tool_flags)


@pytest.mark.complete
@pytest.mark.parametrize("script, ranks", [("tool_use.py", 1), ("tool_use_async.py", 2)])
def test_a_run_of_each_loop(tmp_path, script, ranks):
    """Two steps after a warm start so short that turns are half noise.

    There are results, errors, and answers without a call. In fp32 engine and trainer differ by
    rounding only, unless a token stands in one place for the one and in another for the other.
    """
    flags = ["--steps", "2", "--eval-samples", "16", "--prompts-per-step", "4"]
    flags += ["--samples-per-prompt", "8", "--warm-steps", "60", "--warm-samples", "32"]
    flags += ["--rollout-dtype", "fp32", "--train-dtype", "fp32", "--name", "a", "--export"]
    torchrun(ROOT / "examples" / script, *flags, ranks=ranks, cwd=tmp_path)
    start, *rows = metrics_of(tmp_path / "runs" / "a")
    steps = [row for row in rows if "loss" in row]  # an evaluation may have a row of its own
    assert start["step"] == 0
    assert [row["step"] for row in steps] == [1, 2]
    assert (tmp_path / "runs" / "a" / "warm-start" / "model.safetensors").is_file()
    for row in steps:
        assert all(math.isfinite(value) for value in row.values() if not isinstance(value, list))
        assert row["logprob_shift"] == 0.0
        assert row["mismatch_max"] < 1e-3
        assert row["tool_calls"] >= row["tool_share"] > 0
        assert row["tokens"] < row["response_tokens"] * 32  # results do not count
        # All but the result and the token before it, where no new weights came in between.
        assert row["later_cached_tokens"] / row["later_prompt_tokens"] > (0.6, 0.2)[ranks - 1]
