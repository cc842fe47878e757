"""What model, prompts and dumps do not allow, whatever the flags alone would.

harness/checks.py looks at flags, before the heavy imports. What is here needs config.json, the
prompts or the engine's own rules; harness/start.py calls it before anything is started.
"""

import math
import os
from collections.abc import Iterator

import torch

from backends.huggingface.config import check_layout, is_sparse, read_config
from backends.huggingface.folder import HFWeights, check_shapes
from backends.huggingface.fp8 import fp8_weights
from backends.megatron.batches import padded_length
from backends.megatron.fp8_numerics import check_numerics
from backends.megatron.model import (
    check_overrides,
    has_transformer_engine,
    overrides,
    reference_settings,
)
from backends.sglang.checks import server_overrides
from backends.routed_experts import unpack
from common.errors import ProblemList, all_problems
from common.held_out import held_out_sets
from common.overrides import parse_overrides
from common.settings import RolloutSettings, RunSettings, TrainSettings, check_ranks
from data.prompts import ENGINE_KEEPS
from data.sample import read_dump
from data.tokenizer import token_table
from harness import checks
from harness.memory import parameters, trained_parameters
from harness.run_folder import rollouts_file
from megatron.core.transformer import TransformerConfig
from rollout import split_discarded

# Fields of --megatron by which a layer would be computed without its adapters, or which train
# something else than adapters.
NOT_WITH_LORA = {
    "moe_grouped_gemm": "each expert's layers have adapters of their own",
    "moe_shared_expert_overlap": "it computes parts of a layer that has adapters",
    "moe_router_load_balancing_type": "routers stay as they are",
    "moe_aux_loss_coeff": "routers stay as they are",
    "moe_router_bias_update_rate": "routers stay as they are",
}


@all_problems
def check_held_out(settings: RunSettings, held_out: list | None) -> None:
    """Refuse --eval-only without held-out prompts; held_out is None if they were not loaded."""
    if settings.eval_only and held_out == []:
        fix = "give --eval-prompts FILE, or raise --eval-samples"
        yield f"--eval-only has no held-out prompts to evaluate on: {fix}"


def longest_sample(settings, config: dict | None, data) -> int | None:
    """Return the tokens of the longest sample that may be trained, prompt and response.

    None where they could not be found out. Those of a planned run are as its flags say. Dumps of
    --load-rollouts may hold longer samples than the prompts and --max-response-tokens of now allow.
    Raises BadInput for a dump that cannot be trained on. settings: a loop's.
    """
    if checks.is_plan(settings):
        return settings.plan.plan_prompt_tokens + settings.rollout.max_response_tokens
    if not settings.run.load_rollouts or data is None:
        return data.longest if data else None
    return max(data.longest, longest_of_dumps(settings, config))


def longest_request(settings, longest: int | None, data) -> int | None:
    """Return the tokens of the longest sample that an engine answers, evaluation included.

    longest: of training, as longest_sample returns it; None where it could not be found out.
    """
    if longest is None:
        return None
    if checks.is_plan(settings):
        responses = [of_set.max_response_tokens for of_set in held_out_sets(settings.rollout)]
        return settings.plan.plan_prompt_tokens + max(
            [settings.rollout.max_response_tokens, *responses]
        )
    return max(longest, data.longest_held_out)


@all_problems
def longest_of_dumps(settings, config: dict | None) -> int:
    """Return the tokens of the longest sample of --load-rollouts. settings: a loop's.

    Raises BadInput for a step that cannot be trained on.
    """
    longest, minibatches = 0, settings.train.minibatches
    vocab_size = config and config["vocab_size"]
    for step in range(1, settings.run.steps + 1):
        file = rollouts_file(settings.run.load_rollouts, step)
        if not os.path.isfile(file):
            break  # checks.check_run_flags names it
        dump, _ = split_discarded(read_dump(file, vocab_size=vocab_size))
        longest = max([longest, *(len(s.prompt_ids) + len(s.response_ids) for s in dump)])
        if settings.train.routing_replay != "none" and config and config["num_experts"]:
            for sample in dump:
                try:
                    unpack(sample, config)
                except ValueError as error:
                    yield f"{file}: {error}: use a dump of a run with --routing-replay"
                    break
        if len(dump) < minibatches:
            yield (
                f"{file} has {len(dump)} answers to train on, --minibatches is {minibatches}: use "
                f"at most {len(dump)}, and another folder if that is 0"
            )
        oldest = min((v for s in dump for v in s.weight_versions), default=step - 1)
        age = step - 1 - oldest
        if checks.is_async(settings) and age > (most := settings.in_flight.max_staleness):
            yield f"{file} has tokens {age} versions old, --max-staleness is {most}: raise it"
    return longest


@all_problems
def check_rollout_settings(
    settings: RolloutSettings,
    config: dict | None,
    *,
    longest: int | None = None,
    on_gpu: bool | None = None,
) -> None:
    """Refuse what the model or the engine cannot do. The flags alone are checked in checks.py.

    config: None where it could not be read.
    longest: prompt and response tokens of the longest possible sample, where they are known.
    on_gpu: whether the engines will have GPUs, as in a plan; None: whether this machine has one.
    """
    on_gpu = torch.cuda.is_available() if on_gpu is None else on_gpu
    if config is not None:
        experts, ep, tp = config["num_experts"], settings.engine_ep, settings.engine_tp
        if experts % ep or (ep > 1 and not experts):
            rule = f"must divide the model's {experts} experts"
            yield f"--engine-ep {ep} {rule}; it is 1 for a dense model"
        for name in ("num_attention_heads", "num_key_value_heads"):
            if config[name] % tp:
                rule = f"is not divisible by --engine-tp {tp}"
                yield f"{name} {config[name]} {rule}: use a --engine-tp that divides it"
        context = config["max_position_embeddings"]
        if settings.max_response_tokens >= context - ENGINE_KEEPS:
            kept = f"less the {ENGINE_KEEPS} positions that SGLang keeps"
            given = f"--max-response-tokens {settings.max_response_tokens}"
            yield f"{given} must lie below the model's context, {context}, {kept}"
    overrides = server_overrides(settings.sglang, on_gpu=on_gpu)
    most = None
    if not on_gpu:
        from backends.cpu.sglang import SERVER_ARGS  # here: on a cluster the folder may be gone

        most = SERVER_ARGS["max_total_tokens"]
    server_args = {"max_total_tokens": most, **overrides}
    yield from _length_problems(settings, config, server_args, longest=longest)


def _length_problems(
    settings: RolloutSettings, config: dict | None, server_args: dict, *, longest: int | None
) -> Iterator[str]:
    """Yield where the engine would refuse a prompt or cut an answer.

    SGLang does the first in validate_input_length, the second in Scheduler.init_req_max_new_tokens.
    """
    page, cached = server_args.get("page_size") or 1, server_args["max_total_tokens"]
    needed = longest or settings.max_response_tokens + 1
    if cached is not None and needed > (room := cached // page * page - 2 * page):
        alone = "an answer alone, by --max-response-tokens, can have"
        what = "prompt and answer of the longest sample have" if longest else alone
        fix = f"raise --sglang max_total_tokens={cached}, or lower --max-response-tokens"
        yield (
            f"{what} {needed} tokens, but the engine keeps {max(room, 0)} and would cut the answer:"
            f" {fix}"
        )
    elif config is not None and longest is not None:
        prompt = longest - settings.max_response_tokens
        most = min(config["max_position_embeddings"], cached or math.inf) - 7
        if prompt > most:
            yield (
                f"the longest prompt has {prompt} tokens; the engine takes at most {most}: leave "
                "longer prompts out"
            )


@all_problems
def check_train_settings(
    settings: TrainSettings, config: dict | None, *, world_size: int, longest: int | None
) -> None:
    """Refuse what does not fit the model. The flags alone are checked in checks.py.

    world_size: of the ranks that train.
    longest: prompt plus response tokens of the longest possible sample.
    config, longest: None where they could not be found out; what needs them is then left out.
    """
    found = ProblemList()
    if config:
        split = dict(tp=settings.tp, pp=settings.pp, cp=settings.cp, ep=settings.ep)
        found.collect(check_layout, config, world_size=world_size, **split)
        if settings.routing_replay != "none" and not config["num_experts"]:
            yield (
                f"--routing-replay {settings.routing_replay} needs a model with experts, and this"
                " one is dense: leave it out"
            )
        if settings.freeze_moe_router and not config["num_experts"]:
            yield "--freeze-moe-router needs a model with experts, and this one is dense"
        found.collect(overrides, settings, config, TransformerConfig)
        if settings.megatron and not found.texts:
            found.collect(check_overrides, settings, config)
    if longest and (cp := settings.cp) > 0:
        needed = padded_length(longest, cp)
        if settings.microbatch_tokens * cp < needed:
            room = f"--microbatch-tokens {settings.microbatch_tokens} times --cp {cp}"
            yield (
                f"{room} is less than the longest possible sample, {needed} tokens: raise one of"
                " them"
            )
    yield from found.texts


@all_problems
def check_rounding(settings, config: dict | None) -> None:
    """Refuse --train-numerics fp8 where it cannot be the engine's rounding. settings: a loop's."""
    rollout, train = settings.rollout, settings.train
    if train.train_numerics != "fp8":
        return
    found = ProblemList()
    for flag, given, needed in (
        ("--rollout-dtype", rollout.rollout_dtype, "fp8"),
        ("--train-dtype", train.train_dtype, "bf16"),
    ):
        if given != needed:
            yield f"--train-numerics fp8 rounds as FP8 engines do: it needs {flag} {needed}"
    if config and min(train.tp, rollout.engine_tp, rollout.engine_ep) > 0:
        split = dict(engine_tp=rollout.engine_tp, engine_ep=rollout.engine_ep)
        fp8 = fp8_weights(config, rollout_dtype="fp8", **split)
        has_te = checks.is_plan(settings) or has_transformer_engine()
        found.collect(check_numerics, config, fp8, tp=train.tp, ep=train.ep, has_te=has_te)
    yield from found.texts


@all_problems
def check_lora(settings, config: dict | None) -> None:
    """Refuse what the model does not allow. config: config.json, checked; None if it could not be.

    settings: a loop's.
    """
    train = settings.train
    if config is None or train.lora_rank < 1:
        return
    trained, whole = trained_parameters(config, lora_rank=train.lora_rank), parameters(config)[0]
    if trained >= whole:
        sizes = f"adapters of {trained:,} parameters beside {whole:,} weights"
        yield f"--lora-rank {train.lora_rank} makes {sizes}: use a smaller rank, or 0"
    given = parse_overrides(train.megatron, flag="--megatron", fields=None)
    for name in NOT_WITH_LORA:
        if given.get(name, 0) not in (False, 0, "none"):
            why = NOT_WITH_LORA[name]
            yield f"--megatron {name}={given[name]} does not go with --lora-rank: {why}"
    if "lora" in settings.run.export and (problem := peft_problem(config)):
        yield f"--export lora: {problem}"


def peft_problem(config: dict) -> str:
    """Say why PEFT could not load the adapters of a model; "" if it can. config: checked."""
    kinds = {is_sparse(config, layer) for layer in range(config["num_hidden_layers"])}
    if config["num_experts"] and (len(kinds) == 2 or config.get("n_shared_experts")):
        found = "of experts and other MLPs in one model PEFT 0.21.2 loads the experts' alone"
        return f"{found}, and says nothing: use bf16, in which they are merged"
    return ""


@all_problems
def check_reference(
    settings: TrainSettings,
    config: dict | None,
    model_folder: str | None,
    *,
    world_size: int,
    longest: int | None,
) -> None:
    """Refuse a --reference that cannot score the policy's samples, or that the layout cannot hold.

    Its architecture is free. config, longest: of the model and its prompts, None where they could
    not be found out. world_size: of the ranks that train. model_folder: None for a plan, which
    reads no weights and no tokenizer.
    """
    folder, found = settings.reference, ProblemList()
    if not folder or (reference := found.collect(read_config, folder)) is None:
        yield from found.texts
        return
    if model_folder is not None:
        found.collect(lambda: check_shapes(HFWeights(folder), reference))
        mine, theirs = (found.collect(token_table, path) for path in (folder, model_folder))
        if mine is not None and theirs is not None and mine != theirs:
            differing = {n for n in mine | theirs if mine.get(n) != theirs.get(n)}
            first = min(differing)
            yield (
                f"--reference {folder} has another tokenizer: token {first} is {mine.get(first)!r},"
                f" the model's is {theirs.get(first)!r}, and {len(differing)} differ in all; a"
                " token must mean the same to both: use a model with the same tokenizer"
            )
    if longest and longest > (most := reference["max_position_embeddings"]):
        yield (
            f"--reference {folder} has max_position_embeddings {most}, and the longest possible"
            f" sample {longest} tokens: lower --max-response-tokens, or use another model"
        )
    if config is not None:
        if (size := reference["vocab_size"]) < config["vocab_size"]:
            yield (
                f"--reference {folder} has vocab_size {size}, the model {config['vocab_size']}: it"
                " must know every token that the model can say: use one of at least that size"
            )
        own_texts = _layout_problems(settings, config, reference, world_size=world_size)
        found.texts += [f"--reference {folder}: {text}" for text in own_texts]
    yield from found.texts


def _layout_problems(
    settings: TrainSettings, config: dict, reference: dict, *, world_size: int
) -> list[str]:
    """Return why the reference cannot be split as the model is, or not take its --megatron."""
    of_ranks, found = ProblemList(), ProblemList()
    split = dict(tp=settings.tp, pp=settings.pp, cp=settings.cp, ep=settings.ep)
    of_ranks.collect(check_ranks, world_size, **split)
    if of_ranks.texts:  # the checks of the model report them
        return []
    built = reference_settings(settings, config, reference)
    found.collect(check_layout, reference, world_size=world_size, **split | dict(ep=built.ep))
    if not found.texts and built.megatron:
        found.collect(check_overrides, built, reference)
    return found.texts
