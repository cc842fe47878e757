"""examples/tool_use.py beside slow tools, tools that fail, new weights between turns, chat models.

Why: each conversation waits for its own tool, so turns overlap in every order. What a conversation
holds must not depend on that. Stand-in engines answer at once; the last test asks a real one what
it had in its cache. Not covered: GPUs.
"""

import asyncio
import os
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from test_engine import Pair
from test_tool_use import (
    CALL,
    END,
    PLUS,
    PROMPT,
    RESULT,
    SETTINGS,
    SUM,
    TOY,
    Scripted,
)
from turn_templates import QWEN3, chat_tokenizer

sys.path.insert(0, str(ROOT / "examples"))
import tool_use

from backends.huggingface.config import read_config
from common.settings import RolloutSettings
from data.prompts import load_data
from data.sample import Sample
from data.turns import find_turns
from harness.metrics import batch_metrics
from reward import Judge, compute_rewards
import rollout
from tool_use import ToolSettings, calculator, chat_calculator, conversation, right_answer


@pytest.fixture(scope="module")
def data():
    return load_data(TOY, SETTINGS, read_config(TOY), seed=1)


class Replies:
    """Answers "046+789=" with a call, and what follows a result with the sum; counts requests.

    Each answer's tokens have the engine's version; update() makes a new one, which empties the
    cache.
    """

    def __init__(self):
        self.version, self.batches, self.cached = 5, [], []

    def call(self, coroutine):
        return asyncio.run(asyncio.wait_for(coroutine, 20))

    def update(self) -> None:
        self.version, self.cached = self.version + 1, []

    async def generate(self, prompts_ids, sampling, *, request_ids, cache, keep=True):
        self.batches.append(len(prompts_ids))
        await asyncio.sleep(0.001)
        outputs = []
        for prompt in prompts_ids:
            ids = [*SUM, END] if PLUS in prompt[len(PROMPT) :] else CALL
            read = max(
                (len(os.path.commonprefix([prompt, held])) for held in self.cached), default=0
            )
            self.cached.append(prompt + ids[:-1])
            meta = {
                "finish_reason": {"type": "stop"},
                "output_token_logprobs": [(-1.0 - self.version, token, None) for token in ids],
                "cached_tokens": min(read, len(prompt) - 1),  # the last one is always computed
            }
            versions = [self.version] * len(ids)
            outputs.append(dict(output_ids=ids, meta_info=meta, weight_versions=versions))
        return [{**output, "routed_experts": b""} for output in outputs]

    async def abort(self, request_ids):
        pass


def group_of(n: int) -> list[Sample]:
    return rollout.new_group(Sample(PROMPT, "046+789=", "538", group=7), n)


def test_a_slow_call_holds_up_its_own_conversation_only(data, monkeypatch):
    """The tool takes long for the first sample of four. The others are finished when it answers,
    and were one batch in each turn.
    """
    engine, samples, gate, calls = Replies(), group_of(4), asyncio.Event(), []

    async def ask(call, tools):
        calls.append(call)
        if len(calls) == 1:
            await gate.wait()
        return calculator(call)

    async def check():
        answering = asyncio.ensure_future(
            conversation(ToolSettings())(engine, samples, data, SETTINGS)
        )
        while engine.batches != [4, 3] or not all(s.finish_reason for s in samples[1:]):
            await asyncio.sleep(0.001)
        assert samples[0].finish_reason == ""
        gate.set()
        await answering

    monkeypatch.setattr(tool_use, "ask", ask)
    engine.call(check())
    assert engine.batches == [4, 3, 1]
    assert [sample.response_ids for sample in samples] == [CALL + RESULT + [*SUM, END]] * 4


@pytest.mark.parametrize("failure", ["raises", "hangs"])
def test_a_tool_that_fails_says_nothing_about_the_policy(data, monkeypatch, failure):
    """The conversation ends, is counted, and is masked; the others go on."""
    engine, samples, calls = Replies(), group_of(3), []

    def breaks(call):
        calls.append(call)
        if len(calls) == 2:
            raise OSError("no route to the calculator")
        return sums(call)

    sums, tools = calculator, ToolSettings()
    if failure == "raises":
        monkeypatch.setattr(tool_use, "calculator", breaks)
    else:
        tools = ToolSettings(tool_delay_s=9.0, tool_timeout_s=0.01)
    engine.call(conversation(tools)(engine, samples, data, SETTINGS))
    compute_rewards(samples, Judge(right_answer, 4))
    failed = [samples[1]] if failure == "raises" else samples
    for sample in samples:
        assert (sample in failed) == (sample.finish_reason == "tool_failed")
        assert sample.reward == (None if sample in failed else 1.0)
        assert sample.metrics["tool_failures"] == (sample in failed)
        assert any(sample.loss_mask) == (sample not in failed)
        if sample in failed:
            assert ("OSError" if failure == "raises" else "TimeoutError") in sample.error
    logged = batch_metrics(samples, version=5)
    assert logged["reward_errors"] == len(failed)
    assert logged["tool_failures"] == len(failed) / 3


@pytest.mark.parametrize("batched", [True, False])
def test_per_token_lists_are_right_where_weights_change_between_turns(data, monkeypatch, batched):
    """Versions, masks and log-probs belong to the turn that sampled a token; a result has the
    version of its call. The new weights read nothing that the old ones had cached.
    """
    engine, samples = Replies(), group_of(2)
    asked = []

    async def ask(call, tools):
        asked.append(call)
        if not batched:
            await asyncio.sleep(0.05 * len(asked))
        if batched == (len(asked) == 1):
            engine.update()
        return calculator(call)

    monkeypatch.setattr(tool_use, "ask", ask)
    engine.call(conversation(ToolSettings())(engine, samples, data, SETTINGS))
    for sample, new in zip(samples, (6, 6) if batched else (6, 7)):
        assert sample.weight_versions == [5] * 13 + [new] * 4
        assert sample.loss_mask == [1] * 9 + [0] * 4 + [1] * 4
        assert sample.rollout_logprobs == [-6.0] * 9 + [0.0] * 4 + [-1.0 - new] * 4
        assert sample.metrics["later_prompt_tokens"] == 22
    cached = [sample.metrics["later_cached_tokens"] for sample in samples]
    assert cached == ([0, 21] if batched else [0, 0])


def test_cancelling_ends_a_conversation_in_the_middle_of_a_call(data):
    engine, samples = Replies(), group_of(2)
    answer = conversation(ToolSettings(tool_delay_s=0.05))

    async def check():
        answering = asyncio.ensure_future(answer(engine, samples, data, SETTINGS))
        await asyncio.sleep(0.02)
        assert engine.batches == [2]  # the calls are on their way
        answering.cancel()
        others = asyncio.all_tasks() - {answering}
        await asyncio.sleep(0.1)
        assert asyncio.all_tasks() <= others
        assert len(asyncio.all_tasks()) == 2  # this one, and the one that waits for it

    engine.call(check())
    assert engine.batches == [2]
    assert [sample.metrics["tool_calls"] for sample in samples] == [0, 0]


# --- chat models --------------------------------------------------------------------------------


def test_a_chat_models_conversation_is_the_templates_own(monkeypatch, data):
    """Behind a call that a stop token ended stands the end of the turn, which nobody sampled."""
    tokenizer = chat_tokenizer(QWEN3)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    call_end = tokenizer.convert_tokens_to_ids("</tool_call>")
    chat = SimpleNamespace(tokenizer=tokenizer, end_ids=[end, call_end], seed=1)
    messages = [{"role": "user", "content": "What is 46 + 789?"}]
    options = dict(add_generation_prompt=True, tokenize=False)

    def ids_of(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    prompt = ids_of(tokenizer.apply_chat_template(messages, **options))
    call, answer = ids_of("I add. <tool_call>\n46 + 789\n</tool_call>"), [*ids_of("835"), end]
    engine = Scripted([call], [answer])
    tools = ToolSettings(call_end="</tool_call>")
    settings = RolloutSettings(max_response_tokens=200)
    (sample,) = rollout.generate(
        engine,
        [Sample(prompt, "What is 46 + 789?", "835", group=7)],
        chat,
        settings,
        n=1,
        answer=conversation(tools, find_turns(tokenizer)),
    )
    messages += [
        {"role": "assistant", "content": "I add. <tool_call>\n46 + 789\n</tool_call>"},
        {"role": "tool", "content": "835"},
    ]
    whole = ids_of(tokenizer.apply_chat_template(messages, **options))
    assert engine.prompts[1] == [whole]
    assert sample.prompt_ids + sample.response_ids == whole + answer
    between = len(whole) - len(prompt) - len(call)
    assert sample.loss_mask == [1] * len(call) + [0] * between + [1] * len(answer)
    assert right_answer(sample) == 1


@pytest.mark.parametrize("call, result", [
    ("<tool_call>046+789</tool_call>", "835"),
    ('{"name": "add", "arguments": {"sum": "1 + 2 + 3 + 4"}}', "10"),
    ("First 1+1, no: 2+2", "4"),
    ("1.5+2", None), ("1+2+3+4+5", None), ("1234567890+1", None), ("add", None), ("", None),
])  # fmt: skip
def test_sums_that_a_chat_model_asks_for(call, result):
    assert chat_calculator(call) == result


# --- the prefix cache of a real engine -----------------------------------------------------------


@pytest.fixture(scope="module")
def pair(one_rank):
    pair = Pair("fp32", "fp32")
    yield pair
    pair.engine.shutdown()


def test_a_turn_reads_from_the_cache_what_was_said_before_it(pair):
    """All but the result and the last token sampled, of which the engine has no keys and values.

    With new weights nothing: each version has a cache of its own.
    """
    prompt = PROMPT + CALL

    async def cached(ids: list[int]) -> int:
        sampling = {"max_new_tokens": 4, "ignore_eos": True}
        (output,) = await pair.engine.generate([ids], sampling)
        ids += output["output_ids"] + RESULT
        return output["meta_info"]["cached_tokens"]

    said = list(prompt)
    assert pair.engine.call(cached(said)) == 0
    assert len(said) == len(prompt) + 8
    assert pair.engine.call(cached(said)) == len(prompt) + 3
    pair.sync()
    assert pair.engine.call(cached(said)) == 0
    before = len(said) - 8
    assert pair.engine.call(cached(said)) == before + 8 - 4 - 1


@pytest.mark.parametrize("keep", [True, False])
def test_only_an_answer_that_may_go_on_stays_in_the_cache(pair, keep):
    """Others would fill it with what nobody asks for again; a shared prompt always stays."""

    def ask(prompts: list[list[int]], **more) -> list[dict]:
        sampling = {"max_new_tokens": 4, "ignore_eos": True}
        generated = pair.engine.generate(prompts, sampling, cache=f"keep {keep}", **more)
        return pair.engine.call(generated)

    first, _ = ask([PROMPT, PROMPT], keep=keep)
    (output,) = ask([PROMPT + first["output_ids"] + RESULT])
    # The last token sampled was never an input, so it has no keys.
    cached = len(PROMPT) + (len(first["output_ids"]) - 1 if keep else 0)
    assert output["meta_info"]["cached_tokens"] == cached


def test_a_prompt_in_chunks_that_is_not_kept(one_rank):
    """Eight prompts are cut where a batch is full, and one has several chunks of its own."""
    pair = Pair("fp32", "fp32", sglang=("chunked_prefill_size=64",))
    try:
        generator = torch.Generator().manual_seed(0)
        sampling = {"max_new_tokens": 4, "ignore_eos": True, "temperature": 0.0}

        def ask(prompts: list[list[int]], *, keep: bool) -> list[list[int]]:
            generated = pair.engine.generate(prompts, sampling, cache=f"{keep}", keep=keep)
            return [output["output_ids"] for output in pair.engine.call(generated)]

        for prompts, tokens in ((8, 20), (1, 150), (8, 20)):
            asked = torch.randint(3, 15, (prompts, tokens), generator=generator).tolist()
            assert ask(asked, keep=True) == ask(asked, keep=False)
    finally:
        pair.engine.shutdown()
