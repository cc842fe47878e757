"""The synchronous loop with a tool: a response is a conversation in which the policy may call a
calculator, and learns that calling pays.

    python examples/tool_use.py                             the toy, on one CPU core or one GPU
    torchrun --nproc-per-node 2 examples/tool_use.py        two ranks, data parallel

A turn of the policy that ends with "=" is a call, one that ends with </s> the answer. After the
prompt "046+789=" the policy may go on

    who                the policy            the calculator    the policy
    response_ids       + 0 4 6 + 7 8 9 =     5 3 8 0           5 3 8 </s>        46 + 789 = 0835, lowest digit first as in toy/task.py
    loss_mask          1 1 1 1 1 1 1 1 1     0 0 0 0           1 1 1 1
    rollout_logprobs   as sampled            0 0 0 0           as sampled

Tokens in, tokens out: a conversation is one list of ids that grows, and all of it is the prompt of
the next turn. What the policy sampled is decoded to read a call, and never tokenized again: other
tokens can have the same text, and nobody has sampled those. Only the calculator's text becomes
tokens. For the trainer it is a Sample like any other. In 30 steps, less than two minutes on one
rank, the share of responses with a call goes from 0.52 to 0.99, and held-out reward from 0.44 to
0.89.

What differs from loop_sync.py, otherwise line by line the same, but for --plan and the flags that
record and replay rollouts:
    converse()      in place of rollout.generate(); evaluate() and right_answer() go with it
    warm_start()    before the loop: the toy has never seen a call, so a trainer of its own learns from demonstrations, by the same train_step, and writes the
                    folder that the loop starts from. The policy then calls in half of the cases,
                    and copies with errors.
    --lr            5e-5. A new optimizer's first step moves every weight by it, and 2e-4 would undo half of what the warm start has taught.
    flags           --dynamic-sampling and --reward are refused, as they generate and judge single turns; --prompts, as the calculator writes like the toy

For a chat model, CALL_END is the token that ends its tool calls (</tool_call>), calculator() reads
what stands before it, and say_result() appends what the model's chat template puts between two
turns of the assistant: end of the call's turn, the result's turn, begin of the next. It needs no
warm start.
"""

import contextlib
import math
import re
import sys
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.errors import ProblemList, all_problems
from common.settings import (
    RewardSettings,
    RolloutSettings,
    RunSettings,
    SyncSettings,
    TrainSettings,
)
from harness import checks, flags
from losses import LossSettings
from toy.task import DIGITS

CALL = re.compile(r"(\+[0-9]{1,9}){2,4}=")
"""Two to four numbers, each with its sign: no answer begins with one, so a turn's first token says
whether it is a call.
"""
CALL_END = "="
ERROR = "+"
"""What the calculator says to all else: the toy's alphabet has no words, and no number looks like
it.
"""
LONGEST_DEMONSTRATION = (2 * DIGITS + 3) + 2 * (DIGITS + 1) + 1  # call, result, answer, </s>


@dataclass(frozen=True)
class ToolSettings:
    """Conversations with the calculator, and the demonstrations they begin with."""

    max_turns: int = 3
    """The policy speaks at most so many times; a call in its last turn gets no result."""
    warm_steps: int = 600
    """Optimizer steps on demonstrations before the loop; 0: none, --model knows how to call."""
    warm_samples: int = 16
    """Demonstrations in a step."""
    warm_calls: float = 0.5
    """Share of demonstrations that call the calculator; the others answer at once."""
    warm_lr: float = 1e-3
    """Learning rate of the first of these steps; it falls to 0."""


@dataclass(frozen=True)
class Settings:
    run: RunSettings = RunSettings(steps=30)
    rollout: RolloutSettings = RolloutSettings(max_response_tokens=24)
    reward: RewardSettings = RewardSettings()
    train: TrainSettings = TrainSettings(lr=5e-5)
    loss: LossSettings = LossSettings()
    sync: SyncSettings = SyncSettings()
    tools: ToolSettings = ToolSettings()


@all_problems
def check_tool_flags(settings: Settings) -> None:
    """What cannot work, and flags that would do nothing here, before anything is started."""
    if settings.run.debug_rollout_only or settings.run.load_rollouts or settings.run.save_rollouts:
        yield (
            "--debug-rollout-only, --load-rollouts and --save-rollouts are not part of this"
            " example: leave them out"
        )
    tools, max_response_tokens = settings.tools, settings.rollout.max_response_tokens
    if settings.run.eval_only and tools.warm_steps and not settings.run.resume:
        fix = "use --warm-steps 0 with a --model that can call the calculator, or --resume"
        yield f"--eval-only trains nothing, and --warm-steps {tools.warm_steps} trains: {fix}"
    if settings.reward.reward != "exact" or settings.reward.dynamic_sampling:
        yield (
            "--reward and --dynamic-sampling judge and generate single turns, not conversations:"
            " leave them out"
        )
    if settings.rollout.prompts != ("toy",) or settings.rollout.eval_prompts:
        yield (
            "--prompts and --eval-prompts: the calculator and the demonstrations are those of the"
            " toy: leave them out"
        )
    for name in ("max_turns", "warm_samples"):
        if getattr(tools, name) < 1:
            yield f"--{name.replace('_', '-')} {getattr(tools, name)} must be at least 1"
    if tools.warm_steps < 0:
        yield f"--warm-steps {tools.warm_steps} must not be negative"
    if not 0 <= tools.warm_calls <= 1:
        yield f"--warm-calls {tools.warm_calls} must lie between 0 and 1"
    if not 0 <= tools.warm_lr < math.inf:
        yield f"--warm-lr {tools.warm_lr} must be finite and must not be negative"
    if max_response_tokens < LONGEST_DEMONSTRATION:
        yield (
            f"--max-response-tokens {max_response_tokens} has no room for a call, its result and"
            f" the answer: use at least {LONGEST_DEMONSTRATION}"
        )


# The imports below take half a minute: what is wrong with a flag is said before them.
if __name__ == "__main__":
    settings = flags.parse_or_exit(Settings, checks.check_flags, check_tool_flags)

import rollout
import numpy as np
import torch.distributed as dist
from backends.huggingface import folder as hf_folder
from backends.huggingface.config import read_config
from backends.sglang.engine import Engine
from common import distributed, process_groups
from common.timeline import Stopwatch
from data.prompts import Data, check_held_out, load_data, toy_prompts
from data.sample import Sample
from harness import checkpoint, exits, export as hf_export
from harness.record import Record
import reward
import train_step
import weight_sync

# --- the tool -----------------------------------------------------------------------------------


def calculator(call: str) -> str | None:
    """The sum that a call asks for, lowest digit first; None if it is no such call.

    Nothing of it is evaluated: a pattern is matched, and numbers are added.

    It has at least four digits, so that what the policy repeats always stands four tokens back:
    with three or four, some seeds never learned to repeat it.
    """
    if not CALL.fullmatch(call):
        return None
    return f"{sum(int(number) for number in call[1:-1].split('+')):0{DIGITS + 1}d}"[::-1]


# --- conversations ------------------------------------------------------------------------------


def begin(prompt: Sample) -> Sample:
    """A conversation in which nothing has been said yet.

    Its notes: results that the calculator gave, errors among them.
    """
    return replace(prompt, notes={**prompt.notes, "calls": 0, "errors": 0}, answer="")


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

    They are new lists, as all copies of a prompt share the empty ones.
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
    ids = data.tokenizer(result or ERROR, add_special_tokens=False).input_ids[
        : max_response_tokens - len(sample.response_ids)
    ]
    version = sample.weight_versions[
        -1
    ]  # nothing sampled these tokens; they are as old as the turn that asked for them
    say(
        sample,
        ids,
        f"[{result or ERROR}]",
        logprobs=[0.0] * len(ids),
        versions=[version] * len(ids),
        mask=0,
    )
    sample.notes["calls"] += 1
    sample.notes["errors"] += result is None


def end_turn(
    sample: Sample, turn: Sample, data: Data, *, max_turns: int, max_response_tokens: int
) -> None:
    """Append a turn of the policy, and the result if it is a call. finish_reason is set where the
    conversation ends: with the answer, or at a limit.
    """
    is_call = turn.finish_reason == "stop" and turn.response_ids[
        -1
    ] == data.tokenizer.convert_tokens_to_ids(CALL_END)
    text = (
        turn.response + CALL_END if is_call else turn.response
    )  # a response's text does not show the token that ended it
    say(
        sample,
        turn.response_ids,
        text,
        logprobs=turn.rollout_logprobs,
        versions=turn.weight_versions,
        mask=1,
    )
    if not is_call:
        sample.finish_reason, sample.answer = turn.finish_reason, turn.response
    elif sample.notes["calls"] == max_turns - 1:
        sample.finish_reason = "length"
    else:
        say_result(sample, text, data, max_response_tokens=max_response_tokens)
        if len(sample.response_ids) == max_response_tokens:
            sample.finish_reason = "length"


def converse(
    engine: Engine | None,
    prompts: list[Sample],
    data: Data,
    settings: RolloutSettings,
    *,
    max_turns: int,
    n: int,
    cache: str = "",
) -> list[Sample]:
    """n conversations about each of this engine's prompts, in order; as rollout.generate.
    data.end_ids hold CALL_END. Raises EngineDied on an aborted turn.

    The next turns of all that go on are one batch. The engine has what was said before in its
    prefix cache, computed with the same version of the weights.
    """
    if engine is None:
        return []
    live = samples = [
        begin(sample) for prompt in prompts for sample in rollout.new_group(prompt, n)
    ]
    while live:
        # A turn is a Sample too: its prompt is all that was said, its group and index, from which
        # its sampling seed comes, are those of the conversation.
        turns = [
            replace(sample, prompt_ids=sample.prompt_ids + sample.response_ids) for sample in live
        ]
        sampling = rollout.sampling_params(data, settings, turns)
        for sample, params in zip(live, sampling):
            params["max_new_tokens"] = settings.max_response_tokens - len(sample.response_ids)
        rollout.write_outputs(
            turns,
            engine.call(
                engine.generate([turn.prompt_ids for turn in turns], sampling, cache=cache)
            ),
            data,
        )
        rollout.check_aborts(turns)
        for sample, turn in zip(live, turns):
            end_turn(
                sample,
                turn,
                data,
                max_turns=max_turns,
                max_response_tokens=settings.max_response_tokens,
            )
        live = [sample for sample in live if not sample.finish_reason]
    return samples


def right_answer(sample: Sample) -> float:
    """reward.exact_match of what the policy said after the last result, or of all it said if it
    never called.
    """
    return reward.exact_match(replace(sample, response=sample.answer))


def evaluate(
    engine: Engine | None,
    data: Data,
    settings: RolloutSettings,
    judge: reward.Judge,
    group: dist.ProcessGroup,
    *,
    max_turns: int,
):
    """reward.evaluate with conversations. Collective."""
    mine, n = (
        list(rollout.my_share(data.held_out, settings.engine_tp)),
        settings.eval_samples_per_prompt,
    )
    samples = converse(engine, mine, data, settings, max_turns=max_turns, n=n, cache="held-out")
    reward.compute_rewards(samples, judge)
    samples = sorted(rollout.all_gather_samples(samples, group), key=lambda sample: sample.group)
    return samples, reward.eval_metrics(samples)


def tool_metrics(samples: list[Sample]) -> dict[str, float]:
    """Means over the samples: results that the calculator gave, whether it gave one, results that
    were errors.
    """
    calls, errors = ([sample.notes[name] for sample in samples] for name in ("calls", "errors"))
    return {
        "tool_calls": sum(calls) / len(samples),
        "tool_share": sum(map(bool, calls)) / len(samples),
        "tool_errors": sum(errors) / len(samples),
    }


# --- demonstrations -----------------------------------------------------------------------------


def demonstration(prompt: Sample, data: Data, *, calls: bool) -> Sample:
    """A conversation to learn from: the problem as a call, its result, the answer as it stands
    there; or the answer at once.
    """
    sample = begin(prompt)

    def policy_says(text: str) -> None:
        ids = data.tokenizer(text, add_special_tokens=False).input_ids
        say(sample, ids, text, logprobs=[0.0] * len(ids), versions=[0] * len(ids), mask=1)

    if calls:
        policy_says("+" + prompt.prompt)
        say_result(sample, sample.response, data, max_response_tokens=LONGEST_DEMONSTRATION)
    policy_says(prompt.label + data.tokenizer.eos_token)
    return sample


def warm_start(record: Record, data: Data, settings: Settings, config: dict) -> str:
    """The Hugging Face folder of a policy that has learned from demonstrations. Collective.

    train_step is a supervised step where advantages are 1 at the tokens to learn and the ratio is
    1, as it is right after score(): its gradient is then that of -logprobs. There is no importance
    weight, for no engine has sampled these tokens.
    """
    folder, tools, temperature = (
        record.folder / "warm-start",
        settings.tools,
        settings.rollout.temperature,
    )
    schedule = dict(
        lr=tools.warm_lr, lr_schedule="linear", lr_warmup_steps=0, min_lr=0.0, minibatches=1
    )
    trainer = train_step.build_trainer(
        settings.run.model,
        replace(settings.train, **schedule),
        config,
        steps=tools.warm_steps,
        seed=settings.run.seed,
    )
    prompts = toy_prompts(
        data.tokenizer, settings.rollout, seed=settings.run.seed + 1, held_out=False
    )  # the same on every rank
    for _ in range(tools.warm_steps):
        samples = [
            demonstration(prompt, data, calls=i < tools.warm_calls * tools.warm_samples)
            for i, prompt in enumerate(islice(prompts, tools.warm_samples))
        ]
        for sample in samples:
            sample.advantages = sample.loss_mask
        batch = train_step.add_logprobs(trainer, samples, temperature=temperature)
        train_step.update_policy(
            trainer,
            batch,
            LossSettings(correction="none"),
            temperature=temperature,
            max_response_tokens=LONGEST_DEMONSTRATION,
        )
    logprobs_T, mask_T = (
        np.concatenate([getattr(sample, name) for sample in samples])
        for name in ("old_logprobs", "loss_mask")
    )
    record.say(
        f"warm start: {tools.warm_steps} steps; log-prob of a demonstrated token"
        f" {(logprobs_T * mask_T).sum() / mask_T.sum():.2f}"
    )
    weights = weight_sync.WeightPath(trainer, config, frozenset(), settings.sync.bucket_bytes)
    hf_export.export_hf(weights, folder, source=settings.run.model, dtype="bf16")
    distributed.all_gather_bytes(b"", record.group)  # rank 0 has written it
    return str(folder)


# --- the loop -----------------------------------------------------------------------------------


def main(settings: Settings) -> None:
    # What model, data and machine do not allow is found before anything is started, and said at
    # once.
    problems = ProblemList()
    model, seed, steps, max_turns = (
        settings.run.model,
        settings.run.seed,
        settings.run.steps,
        settings.tools.max_turns,
    )
    config = problems.collect(read_config, model)
    data = problems.collect(
        load_data,
        model,
        replace(settings.rollout, stop=(*settings.rollout.stop, CALL_END)),
        config,
        seed=seed,
    )
    problems.collect(
        hf_folder.check_model_folder,
        model,
        config,
        data and data.tokenizer,
        stop=settings.rollout.stop,
    )
    problems.collect(check_held_out, settings.run, data and data.held_out)
    problems.collect(
        rollout.check_rollout_settings, settings.rollout, config, longest=data and data.longest
    )
    sizes = dict(world_size=checks.world_size(settings), longest=data and data.longest)
    problems.collect(train_step.check_train_settings, settings.train, config, **sizes)
    temperature, max_response_tokens = (
        settings.rollout.temperature,
        settings.rollout.max_response_tokens,
    )
    read = problems.collect(checkpoint.what_was_read, settings, data) if data else {}
    resumed = (
        problems.collect(checkpoint.find_latest_checkpoint, settings, "tool", read)
        if settings.run.resume and settings.run.name
        else None
    )
    problems.raise_if_any()
    start, ranks = (resumed.step, resumed.ranks) if resumed else (0, None)

    asked = dict(rollout_ranks=checks.world_size(settings), turns=max_turns)
    wait_s = process_groups.longest_wait_s(settings, right_answer, **asked)
    everyone = distributed.init_distributed(wait_s=wait_s)
    record = Record(settings, "tool", everyone, resumed=resumed)
    split = dict(engine_tp=settings.rollout.engine_tp, engine_ep=settings.rollout.engine_ep)
    fp8 = weight_sync.fp8_weights(config, rollout_dtype=settings.rollout.rollout_dtype, **split)
    record.say(weight_sync.describe(config, fp8))
    if settings.tools.warm_steps:
        model = (
            warm_start(record, data, settings, config)
            if not resumed
            else str(resumed.folder.parent.parent / "warm-start")
        )
    with_reference = settings.loss.kl_coef > 0
    trainer = train_step.build_trainer(
        model, settings.train, config, steps=steps, seed=seed, with_reference=with_reference
    )
    checkpoint.restore(resumed, trainer)
    weights = weight_sync.WeightPath(trainer, config, fp8, settings.sync.bucket_bytes)
    engine = rollout.start_engine(model, settings.rollout, config, seed=seed, longest=data.longest)
    judge = reward.Judge(right_answer, settings.reward.judges, settings.reward.judge_timeout_s)
    with engine or contextlib.nullcontext(), record:
        weight_sync.sync_weights(weights, engine, version=start, check=True)
        if not resumed or settings.run.eval_only:
            record.log(
                record.log_eval(
                    start,
                    *evaluate(engine, data, settings.rollout, judge, everyone, max_turns=max_turns),
                )
            )
        else:
            record.profile(start)
        if settings.run.eval_only:
            return record.finish_evaluation()
        prompts = rollout.Prompts(
            data, settings.rollout, taken=rollout.prompts_taken_before(ranks, settings.rollout)
        )
        for step in range(start + 1, steps + 1):
            watch = Stopwatch()
            n = settings.rollout.samples_per_prompt
            samples = converse(
                engine,
                prompts.take(rollout.step_share(settings.rollout)),
                data,
                settings.rollout,
                max_turns=max_turns,
                n=n,
            )
            rollout_s = watch.lap("rollout")

            reward.compute_rewards(samples, judge)
            samples = rollout.all_gather_samples(samples, everyone)
            reward_s = watch.lap("reward")

            rollout.release_memory(engine)  # on a GPU; the hand-off takes it back
            batch = train_step.add_logprobs(
                trainer, samples, settings.loss, temperature=temperature
            )  # log-probs of trainer and reference, where needed
            reward.add_advantages(
                batch, settings.reward, settings.loss, max_response_tokens=max_response_tokens
            )
            metrics = train_step.update_policy(
                trainer,
                batch,
                settings.loss,
                temperature=temperature,
                max_response_tokens=max_response_tokens,
            )
            train_s = watch.lap("train")

            sync_bytes = weight_sync.sync_weights(
                weights, engine, version=step, check=settings.run.check_sync or step == steps
            )
            sync_s = watch.lap("sync")

            metrics |= (
                reward.batch_metrics(samples, version=step - 1)
                | tool_metrics(samples)
                | record.trace(watch, engine, judge)
            )
            metrics |= {
                "rollout_s": rollout_s,
                "reward_s": reward_s,
                "train_s": train_s,
                "sync_s": sync_s,
                "sync_bytes": sync_bytes,
            }
            record.log_samples(step, samples)
            if step % settings.run.eval_every == 0 or step == steps:
                metrics |= record.log_eval(
                    step,
                    *evaluate(engine, data, settings.rollout, judge, everyone, max_turns=max_turns),
                )
            record.log({"step": step, **metrics})
            if record.checkpoint_due(step):
                checkpoint.save(
                    record,
                    settings,
                    trainer,
                    step=step,
                    read=read,
                    rank_state={"prompts": prompts.taken} if engine else {},
                )
            if record.stopping:
                return record.finish()
    hf_export.export_all(weights, record.exports(), source=model)
    record.finish()


if __name__ == "__main__":
    exits.run_main(lambda: main(settings))
