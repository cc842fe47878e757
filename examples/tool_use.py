"""A rollout with a tool: a response is a conversation in which the policy may call a calculator.

    python examples/tool_use.py                             the toy, on one CPU core or one GPU
    torchrun --nproc-per-node 2 examples/tool_use.py        two ranks, data parallel
    torchrun --nproc-per-node 2 examples/tool_use_async.py  the same under the asynchronous loop

A turn of the policy that ends with "=" is a call; one that ends with </s> is the answer. After the
prompt "046+789=" the policy may go on (46 + 789 = 0835, lowest digit first as in toy/task.py):

    who                the policy            the calculator    the policy
    response_ids       + 0 4 6 + 7 8 9 =     5 3 8 0           5 3 8 </s>
    loss_mask          1 1 1 1 1 1 1 1 1     0 0 0 0           1 1 1 1
    rollout_logprobs   as sampled            0 0 0 0           as sampled

Tokens in, tokens out: a conversation is one list of ids that grows, and all of it is the prompt of
the next turn. What the policy sampled is decoded to read a call, and is never tokenized again:
other tokens can have the same text, and nobody has sampled those. Only the calculator's text
becomes tokens. For the trainer it is a Sample like any other. In 30 steps, less than two minutes on
one rank, the share of responses with a call goes from 0.52 to 0.99, and held-out reward from 0.44
to 0.89.

What it gives to the loop:
    converse()      in place of rollout.answer; it runs in both loops
    right_answer()  in place of --reward
    warm_start()    before the loop. The toy has never seen a call, so a trainer learns from
                    demonstrations and writes the folder that the loop starts from. The policy then
                    calls in half of the cases, and copies with errors.
    --lr            5e-5. A new optimizer's first step moves every weight by it, and 2e-4 would undo
                    half of what the warm start has taught.

A tool that is slow holds up its own conversation only. One that raises, or takes longer than
--tool-timeout-s, ends it: the sample is masked, for that says nothing about the policy.

A chat model needs no warm start. Its results come with what its chat template writes around them,
found by data/turns.py. --call-end is the token that ends its tool calls:

    python examples/tool_use.py --model FOLDER --chat --call-end "</tool_call>" --warm-steps 0 \\
        --prompts FILE.jsonl --system-prompt "To add, write <tool_call>1+2</tool_call>. ..."
"""

import asyncio
import re
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
from harness import checks, flags
from tool_settings import (
    CALL_END,
    LONGEST_DEMONSTRATION,
    Settings,
    ToolSettings,
    check_tool_flags,
)

# A wrong flag is refused here: the imports below take half a minute.
if __name__ == "__main__":
    settings = flags.parse_or_exit(Settings, checks.check_flags, check_tool_flags)

import numpy as np

import loop_sync
import reward
import rollout
import train_step
import weight_sync
from common.distributed import all_gather_bytes
from common.settings import RolloutSettings
from data.prompts import Data, toy_prompts
from data.sample import Sample
from data.tokenizer import load_tokenizer
from data.turns import Turns, find_turns
from harness import export, start
from harness.exits import run_main
from losses import LossSettings
from toy.task import DIGITS

# --- the tool -----------------------------------------------------------------------------------

CALL = re.compile(r"(\+[0-9]{1,9}){2,4}=")
"""Two to four numbers, each with its sign: no answer begins with one, so a turn's first token says
whether it is a call.
"""
CHAT_CALL = re.compile(r"(?<![0-9+.])[0-9]{1,9}(?: ?\+ ?[0-9]{1,9}){1,3}(?![0-9.]| ?\+)")
"""The same in a chat model's turn, where more stands around it."""
ERROR = "+"
"""What the calculator says to all else: the toy's alphabet has no words, and no number looks like
it.
"""
TOOL_FAILED = "tool_failed"
"""finish_reason of a conversation whose tool raised, or took too long."""


def calculator(call: str) -> str | None:
    """Return the sum that a call asks for, lowest digit first; None if it is no such call.

    Nothing of it is evaluated: a pattern is matched, and numbers are added. The sum has at least
    four digits. So what the policy repeats always stands four tokens back; with three or four
    digits, some seeds never learned to repeat it.
    """
    if not CALL.fullmatch(call):
        return None
    return f"{sum(int(number) for number in call[1:-1].split('+')):0{DIGITS + 1}d}"[::-1]


def chat_calculator(call: str) -> str | None:
    """Return the sum of the last addition in a chat model's call, as people write it, or None."""
    additions = CHAT_CALL.findall(call)
    return str(sum(map(int, additions[-1].split("+")))) if additions else None


# EDIT HERE: a tool. One that blocks belongs into asyncio.to_thread.
async def ask(call: str, tools: ToolSettings) -> str | None:
    """Return the calculator's result, after --tool-delay-s. Raises TimeoutError."""
    async with asyncio.timeout(tools.tool_timeout_s):
        await asyncio.sleep(tools.tool_delay_s)
        return (calculator if tools.call_end == CALL_END else chat_calculator)(call)


# --- conversations -------------------------------------------------------------------------------


def begin(sample: Sample) -> Sample:
    """Make a sample a conversation in which nothing has been said yet; return it.

    Its metrics count results of the calculator, errors among them, and calls that failed; then the
    prompt tokens of all turns but the first, and how many the engine had in its cache.
    """
    sample.answer, sample.finish_reason = "", ""
    names = ("tool_calls", "tool_share", "tool_errors", "tool_failures")
    sample.metrics = dict.fromkeys((*names, "later_prompt_tokens", "later_cached_tokens"), 0)
    return sample


def say(
    sample: Sample,
    ids: list[int],
    text: str,
    *,
    logprobs: list[float],
    versions: list[int],
    mask: int,
) -> None:
    """Append tokens to a conversation: its per-token lists grow here and nowhere else.

    They become new lists: all samples of a prompt share the empty ones.
    """
    sample.response_ids = sample.response_ids + ids
    sample.response += text
    sample.rollout_logprobs = sample.rollout_logprobs + logprobs
    sample.weight_versions = sample.weight_versions + versions
    sample.loss_mask = sample.loss_mask + [mask] * len(ids)


def say_result(
    sample: Sample,
    result: str | None,
    data: Data,
    *,
    max_response_tokens: int,
    turns: Turns | None = None,
) -> None:
    """Append the calculator's result, cut off where the response is full; None is an error.

    turns: of a chat model's template, whose end of turn and begin of the next come along. In the
    text, which is for readers, the result stands in brackets.
    """
    text = result or ERROR
    if turns:
        ids = turns.result_ids(text, sampled=sample.response_ids[-1])
    else:
        ids = data.tokenizer(text, add_special_tokens=False).input_ids
    ids = ids[: max_response_tokens - len(sample.response_ids)]
    n = len(ids)
    # Nothing sampled these tokens; they are as old as the turn that asked for them.
    versions = [sample.weight_versions[-1]] * n
    say(sample, ids, f"[{text}]", logprobs=[0.0] * n, versions=versions, mask=0)
    sample.metrics["tool_calls"] += 1
    sample.metrics["tool_share"] = 1
    sample.metrics["tool_errors"] += result is None


def end_turn(sample: Sample, turn: Sample, data: Data, tools: ToolSettings) -> None:
    """Append a turn of the policy; sample.notes["call"] is then its call, if a result is due.

    finish_reason is set where the conversation ends: with the answer, at a limit, or where the
    engine was told to stop.
    """
    call_end = data.tokenizer.convert_tokens_to_ids(tools.call_end)
    is_call = turn.finish_reason == "stop" and turn.response_ids[-1] == call_end
    # A response's text does not show the token that ended it.
    text = turn.response + (data.tokenizer.decode([call_end]) if is_call else "")
    spoken = dict(logprobs=turn.rollout_logprobs, versions=turn.weight_versions, mask=1)
    say(sample, turn.response_ids, text, **spoken)
    # With --routing-replay. A turn reports all tokens before it, and they stay as they were taken.
    sample.routed_experts += turn.routed_experts[len(sample.routed_experts) :]
    if not is_call:
        sample.finish_reason, sample.answer = turn.finish_reason, turn.response
        sample.error = turn.error
    elif sample.metrics["tool_calls"] == tools.max_turns - 1:
        sample.finish_reason = "length"
    else:
        sample.notes["call"] = text


def conversation(tools: ToolSettings, turns: Turns | None = None) -> rollout.Answer:
    """Return the rollout of conversations. turns: of a chat model's template; None: the toy."""

    async def converse(
        engine, samples: list[Sample], data: Data, settings: RolloutSettings, *, cache: str = ""
    ) -> None:
        """Hold a conversation in each sample; as rollout.answer. data.end_ids hold tools.call_end.

        A batch of turns comes back together. Then each conversation waits for its own result only:
        those whose results are there take their next turn as one batch, while others wait. The
        engine has what was said before in its prefix cache, if its weights are still the same.
        Cancelling this coroutine ends all conversations, in a turn or in a call.
        """
        limit = settings.max_response_tokens

        async def speak(live: list[Sample]) -> None:
            # A turn is a Sample too: its prompt is all that was said. Group and index, from which
            # its sampling seed comes, are those of the conversation.
            spoken = [replace(s, prompt_ids=s.prompt_ids + s.response_ids) for s in live]
            sampling = rollout.sampling_params(data, settings, spoken)
            for sample, params in zip(live, sampling):
                params["max_new_tokens"] = limit - len(sample.response_ids)
            names = rollout.request_ids(spoken, cache)
            prompts = [turn.prompt_ids for turn in spoken]
            outputs = await engine.generate(prompts, sampling, request_ids=names, cache=cache)
            rollout.write_outputs(spoken, outputs, data)
            for sample, turn, output in zip(live, spoken, outputs):
                if sample.response_ids:  # not the first turn
                    sample.metrics["later_prompt_tokens"] += len(turn.prompt_ids)
                    sample.metrics["later_cached_tokens"] += output["meta_info"]["cached_tokens"]
                end_turn(sample, turn, data, tools)

        async def hear(sample: Sample) -> None:
            try:
                result = await ask(sample.notes.pop("call"), tools)
            except Exception as error:  # a tool may raise anything
                sample.finish_reason, sample.error = TOOL_FAILED, repr(error)
                sample.metrics["tool_failures"] += 1
                return
            say_result(sample, result, data, max_response_tokens=limit, turns=turns)
            if len(sample.response_ids) == limit:
                sample.finish_reason = "length"

        async def go_on(live: list[Sample]) -> None:
            await speak(live)
            calls = {asyncio.ensure_future(hear(s)): s for s in live if not s.finish_reason}
            later = []
            try:
                while calls:
                    done, _ = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        task.result()
                    heard = [calls.pop(task) for task in [*calls] if task in done]
                    if live_on := [sample for sample in heard if not sample.finish_reason]:
                        later.append(asyncio.ensure_future(go_on(live_on)))
                await asyncio.gather(*later)
            finally:
                for task in (*calls, *later):
                    task.cancel()

        await go_on([begin(sample) for sample in samples])

    return converse


def right_answer(sample: Sample) -> float:
    """Return reward.exact_match of what the policy said last, behind the last result.

    Raises RuntimeError where a tool has failed: that says nothing about the policy. Such a sample
    is masked, and counted in reward_errors; see reward.py.
    """
    if sample.finish_reason == TOOL_FAILED:
        raise RuntimeError(f"the tool failed: {sample.error}")
    return reward.exact_match(replace(sample, response=sample.answer))


# --- demonstrations ------------------------------------------------------------------------------


def demonstration(prompt: Sample, data: Data, *, calls: bool) -> Sample:
    """Return a conversation to learn from.

    With calls it is the problem as a call, its result, and the answer as it stands there. Without,
    it is the answer at once.
    """
    sample = begin(replace(prompt))

    def policy_says(text: str) -> None:
        ids = data.tokenizer(text, add_special_tokens=False).input_ids
        n = len(ids)
        say(sample, ids, text, logprobs=[0.0] * n, versions=[0] * n, mask=1)

    if calls:
        policy_says("+" + prompt.prompt)
        result = calculator(sample.response)
        say_result(sample, result, data, max_response_tokens=LONGEST_DEMONSTRATION)
    policy_says(prompt.label + data.tokenizer.eos_token)
    return sample


def warm_start(run: start.Run) -> str:
    """Return the Hugging Face folder of a policy that has learned from demonstrations. Collective.

    update_policy is a supervised step where advantages are 1 at the tokens to learn and the ratio
    is 1, as it is right after add_logprobs(): its gradient is then that of -logprobs. There is no
    importance weight, for no engine has sampled these tokens.
    """
    settings, tools, record = run.settings, run.settings.tools, run.record
    folder = record.folder / "warm-start"
    schedule = dict(lr=tools.warm_lr, lr_schedule="linear", lr_warmup_steps=0, min_lr=0.0)
    trainer = train_step.build_trainer(
        run.model,
        replace(settings.train, **schedule, minibatches=1, routing_replay="none"),
        run.config,
        steps=tools.warm_steps,
        fp8=run.fp8,
        seed=settings.run.seed,
        temperature=settings.rollout.temperature,
        max_response_tokens=LONGEST_DEMONSTRATION,
    )
    seed = settings.run.seed + 1  # the same prompts on every rank, and others than the loop's
    prompts = toy_prompts(run.data.tokenizer, settings.rollout, seed=seed, held_out=False)
    calls = tools.warm_calls * tools.warm_samples
    for _ in range(tools.warm_steps):
        samples = [
            demonstration(prompt, run.data, calls=i < calls)
            for i, prompt in enumerate(islice(prompts, tools.warm_samples))
        ]
        for sample in samples:
            sample.advantages = sample.loss_mask
        batches = train_step.pack(trainer, samples)
        train_step.add_logprobs(trainer, batches)
        train_step.update_policy(trainer, batches, LossSettings(correction="none"))
    logprobs_T = np.concatenate([sample.old_logprobs for sample in samples])
    mask_T = np.concatenate([sample.loss_mask for sample in samples])
    mean = (logprobs_T * mask_T).sum() / mask_T.sum()
    record.say(f"warm start: {tools.warm_steps} steps; log-prob of a demonstrated token {mean:.2f}")
    bucket_bytes = settings.sync.bucket_bytes
    weights = weight_sync.WeightPath(
        trainer.gpt, trainer.layout, run.config, frozenset(), bucket_bytes
    )
    export.export_hf(weights, folder, source=run.model, dtype="bf16")
    return str(folder)


# --- the loop ------------------------------------------------------------------------------------


def main(settings: Settings, loop=loop_sync, name: str = "tool") -> None:
    """Run a loop with conversations. loop: loop_sync or loop_async; name: of its checkpoints."""
    tools, turns = settings.tools, None
    if settings.rollout.chat:
        settings = start.fetch_models(settings)
        tokenizer = load_tokenizer(settings.run.model)
        turns = find_turns(tokenizer, settings.rollout.chat_template_kwargs, tools.result_role)
    # Other ranks wait for requests and calls; a call takes no longer than a request may.
    waits = dict(turns=2 * tools.max_turns, stop=(tools.call_end,))
    run = start.prepare(settings, name, reward_function=right_answer, **waits)
    if tools.warm_steps and run.resumed_from:
        run.model = str(run.resumed_from.folder.parent.parent / "warm-start")
    elif tools.warm_steps:
        if run.is_trainer:
            warm_start(run)
        all_gather_bytes(b"", run.group)  # rank 0 has written it
        run.model = str(run.record.folder / "warm-start")
    loop.train(run, answer=conversation(tools, turns))


if __name__ == "__main__":
    run_main(lambda: main(settings))
