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

For a chat model, CALL_END is the token that ends its tool calls (</tool_call>), and calculator()
reads what stands before it. say_result() appends what the chat template puts between two turns of
the assistant: end of the call's turn, the result's turn, begin of the next. It needs no warm start.
"""

import re
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
from harness import checks, flags
from tool_settings import LONGEST_DEMONSTRATION, Settings, check_tool_flags

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
from harness import export, start
from harness.exits import run_main
from losses import LossSettings
from toy.task import DIGITS

# --- the tool -----------------------------------------------------------------------------------

CALL = re.compile(r"(\+[0-9]{1,9}){2,4}=")
"""Two to four numbers, each with its sign: no answer begins with one, so a turn's first token says
whether it is a call.
"""
CALL_END = "="
ERROR = "+"
"""What the calculator says to all else: the toy's alphabet has no words, and no number looks like
it.
"""


def calculator(call: str) -> str | None:
    """Return the sum that a call asks for, lowest digit first; None if it is no such call.

    Nothing of it is evaluated: a pattern is matched, and numbers are added. The sum has at least
    four digits. So what the policy repeats always stands four tokens back; with three or four
    digits, some seeds never learned to repeat it.
    """
    if not CALL.fullmatch(call):
        return None
    return f"{sum(int(number) for number in call[1:-1].split('+')):0{DIGITS + 1}d}"[::-1]


# --- conversations -------------------------------------------------------------------------------


def begin(sample: Sample) -> Sample:
    """Make a sample a conversation in which nothing has been said yet; return it.

    Its metrics count results of the calculator, errors among them.
    """
    sample.answer, sample.finish_reason = "", ""
    sample.metrics = {"tool_calls": 0, "tool_share": 0, "tool_errors": 0}
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


def say_result(sample: Sample, call: str, data: Data, *, max_response_tokens: int) -> None:
    """Append the calculator's result, cut off where the response is full.

    In the text, which is for readers, it stands in brackets.
    """
    result = calculator(call)
    room = max_response_tokens - len(sample.response_ids)
    ids = data.tokenizer(result or ERROR, add_special_tokens=False).input_ids[:room]
    n = len(ids)
    # Nothing sampled these tokens; they are as old as the turn that asked for them.
    versions = [sample.weight_versions[-1]] * n
    say(sample, ids, f"[{result or ERROR}]", logprobs=[0.0] * n, versions=versions, mask=0)
    sample.metrics["tool_calls"] += 1
    sample.metrics["tool_share"] = 1
    sample.metrics["tool_errors"] += result is None


def end_turn(
    sample: Sample, turn: Sample, data: Data, *, max_turns: int, max_response_tokens: int
) -> None:
    """Append a turn of the policy, and the result if it is a call.

    finish_reason is set where the conversation ends: with the answer, at a limit, or where the
    engine was told to stop.
    """
    call_end = data.tokenizer.convert_tokens_to_ids(CALL_END)
    is_call = turn.finish_reason == "stop" and turn.response_ids[-1] == call_end
    # A response's text does not show the token that ended it.
    text = turn.response + CALL_END if is_call else turn.response
    spoken = dict(logprobs=turn.rollout_logprobs, versions=turn.weight_versions, mask=1)
    say(sample, turn.response_ids, text, **spoken)
    # With --routing-replay. A turn reports all tokens before it, and they stay as they were taken.
    sample.routed_experts += turn.routed_experts[len(sample.routed_experts) :]
    if not is_call:
        sample.finish_reason, sample.answer = turn.finish_reason, turn.response
        sample.error = turn.error
    elif sample.metrics["tool_calls"] == max_turns - 1:
        sample.finish_reason = "length"
    else:
        say_result(sample, text, data, max_response_tokens=max_response_tokens)
        if len(sample.response_ids) == max_response_tokens:
            sample.finish_reason = "length"


def conversation(max_turns: int) -> rollout.Answer:
    """Return the rollout of conversations with so many turns of the policy at most."""

    async def converse(
        engine, samples: list[Sample], data: Data, settings: RolloutSettings, *, cache: str = ""
    ) -> None:
        """Hold a conversation in each sample; as rollout.answer. data.end_ids hold CALL_END.

        The next turns of all that go on are one batch. The engine has what was said before in its
        prefix cache, computed with the same version of the weights.
        """
        live = [begin(sample) for sample in samples]
        limit = settings.max_response_tokens
        while live:
            # A turn is a Sample too: its prompt is all that was said. Group and index, from which
            # its sampling seed comes, are those of the conversation.
            turns = [replace(s, prompt_ids=s.prompt_ids + s.response_ids) for s in live]
            sampling = rollout.sampling_params(data, settings, turns)
            for sample, params in zip(live, sampling):
                params["max_new_tokens"] = limit - len(sample.response_ids)
            names = rollout.request_ids(turns, cache)
            prompts = [turn.prompt_ids for turn in turns]
            asked = dict(request_ids=names, cache=cache)
            rollout.write_outputs(turns, await engine.generate(prompts, sampling, **asked), data)
            for sample, turn in zip(live, turns):
                end_turn(sample, turn, data, max_turns=max_turns, max_response_tokens=limit)
            live = [sample for sample in live if not sample.finish_reason]

    return converse


def right_answer(sample: Sample) -> float:
    """Return reward.exact_match of what the policy said last, behind the last result."""
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
        say_result(sample, sample.response, data, max_response_tokens=LONGEST_DEMONSTRATION)
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
    turns = settings.tools.max_turns
    run = start.prepare(settings, name, reward_function=right_answer, turns=turns, stop=(CALL_END,))
    if settings.tools.warm_steps and run.resumed_from:
        run.model = str(run.resumed_from.folder.parent.parent / "warm-start")
    elif settings.tools.warm_steps:
        if run.is_trainer:
            warm_start(run)
        all_gather_bytes(b"", run.group)  # rank 0 has written it
        run.model = str(run.record.folder / "warm-start")
    loop.train(run, answer=conversation(turns))


if __name__ == "__main__":
    run_main(lambda: main(settings))
