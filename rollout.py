"""Prompts -> Samples: engine settings, generation, and the exchange of samples between ranks.

What the prompts are is in prompts.py.

Tokens go into the engine and tokens come out; the text of a response is for judges and readers and
is never tokenized again. Each engine starts with empty weights of the right shapes and
quantization; weight_sync.py gives it its first.
"""

import json
import math
import os
import signal
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice

import torch
import torch.distributed as dist

from common.distributed import all_gather_bytes
from common.errors import BadInput, EngineDied, all_problems
from harness.run_folder import rollouts_file

from backends.cpu.sglang import SERVER_ARGS
from backends.huggingface.names import fp8_config
from backends.sglang.checks import server_overrides
from backends.sglang.engine import Engine
from common.settings import RolloutSettings
from data.prompts import ENGINE_KEEPS, Data
from data.sample import Sample, read_dump

# Of the GPU memory that is free when an engine starts, what it takes for weights and cache, unless
# --sglang says otherwise
MEM_FRACTION_STATIC = 0.5
DROPPED, REPLACED = (
    "dropped",
    "replaced",
)  # finish reasons of samples that are not trained: too old; in a group whose rewards are all equal


# --- settings and engine ------------------------------------------------------------------------


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
    most = None if on_gpu else SERVER_ARGS["max_total_tokens"]
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


def start_engine(
    model_folder: str,
    settings: RolloutSettings,
    config: dict,
    *,
    seed: int,
    longest: int | None = None,
) -> Engine | None:
    """Start the engine of this rank's group of --engine-tp ranks, on the group's first rank.

    Returns None on the others. The engine has shapes, but no weights yet.
    longest: prompt and response tokens of the longest possible sample.
    Raises BadInput if the engine has found no memory for so many.
    """
    rank = dist.get_rank()
    if rank % settings.engine_tp:
        return None
    arguments = dict(
        model_path=model_folder,
        dtype={"fp8": "bfloat16", "bf16": "bfloat16", "fp32": "float32"}[settings.rollout_dtype],
        load_format="dummy",
        tp_size=settings.engine_tp,
        ep_size=settings.engine_ep,
        skip_tokenizer_init=True,
        custom_weight_loader=[
            "backends.sglang.buckets.load_bucket",
            "backends.sglang.buckets.compare_loader",
        ],
        custom_sigquit_handler=signal.getsignal(signal.SIGQUIT),
        random_seed=seed + rank,
        log_level="error",
    )
    if torch.cuda.is_available():
        arguments.update(
            base_gpu_id=int(os.environ["LOCAL_RANK"]),
            enable_memory_saver=True,
            mem_fraction_static=MEM_FRACTION_STATIC,
        )
    else:
        arguments.update(SERVER_ARGS)
    if settings.rollout_dtype == "fp8":
        quantization = fp8_config(
            config, engine_tp=settings.engine_tp, engine_ep=settings.engine_ep
        )
        arguments["json_model_override_args"] = json.dumps({"quantization_config": quantization})
    arguments |= server_overrides(settings.sglang, on_gpu=torch.cuda.is_available())
    engine = Engine(settings.answer_timeout_s, **arguments)
    # SGLang's TpModelWorker takes off 5 for a prompt; of these the last position stays free.
    room = engine.tokenizer_manager.max_req_input_len + 4
    if longest is not None and longest > room:
        engine.shutdown()
        fix = "raise --sglang mem_fraction_static, or lower --max-response-tokens"
        raise BadInput(
            f"the longest sample has {longest} tokens, but the engine has memory for {room}, and "
            f"would cut the answer: {fix}"
        )
    return engine


# --- generation ---------------------------------------------------------------------------------


def sampling_params(data: Data, settings: RolloutSettings, samples: list[Sample]) -> list[dict]:
    """How the engine samples each response.

    Each has a seed of its own, so that what a resumed run samples does not depend on what was
    sampled before.

    On a CPU cpu.py makes the sampler keep to it; on a GPU SGLang does with --sglang
    enable_deterministic_inference=true, and samples from one stream without.
    """
    common = {
        "temperature": settings.temperature,
        "max_new_tokens": settings.max_response_tokens,
        "stop_token_ids": data.end_ids,
    }
    return [
        {
            **common,
            "sampling_seed": (
                zlib.crc32(f"{data.seed} {s.group} {s.index} {s.prompt}".encode()) // 2
            ),
        }
        for s in samples
    ]


def new_group(prompt: Sample, n: int) -> list[Sample]:
    """A group: n samples of one prompt, still without responses."""
    return [
        replace(prompt, index=index, metadata=dict(prompt.metadata), notes=dict(prompt.notes))
        for index in range(n)
    ]


def write_outputs(samples: list[Sample], outputs: list[dict], data: Data) -> None:
    """Write the engine's outputs into the samples they answer.

    The token that ended a response stays in response_ids; the text does not show it.
    """
    for sample, output in zip(samples, outputs):
        sample.finish_reason = output["meta_info"]["finish_reason"]["type"]
        sample.response_ids = output["output_ids"]
        said = list(sample.response_ids)
        if sample.finish_reason == "stop" and said and said[-1] in data.end_ids:
            said.pop()
        sample.response = data.tokenizer.decode(
            said, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        sample.rollout_logprobs = [
            logprob for logprob, *_ in output["meta_info"]["output_token_logprobs"]
        ]
        sample.loss_mask = [1] * len(sample.response_ids)
        sample.weight_versions = output["weight_versions"]
        if sample.finish_reason == "abort":
            sample.error = str(output["meta_info"]["finish_reason"].get("message"))


def generate(
    engine: Engine | None,
    prompts: list[Sample],
    data: Data,
    settings: RolloutSettings,
    *,
    n: int,
    cache: str = "",
) -> list[Sample]:
    """n responses to each of this engine's prompts, with log-probs at the sampling temperature, in
    order. Raises EngineDied if one was aborted.

    cache: calls of one name share cached prefixes.
    """
    if engine is None or not prompts:
        return []
    samples = [sample for prompt in prompts for sample in new_group(prompt, n)]
    write_outputs(
        samples,
        engine.call(
            engine.generate(
                [s.prompt_ids for s in samples],
                sampling_params(data, settings, samples),
                cache=cache,
            )
        ),
        data,
    )
    check_aborts(samples)
    return samples


def release_memory(engine: Engine | None) -> None:
    """Let the trainer have the GPU memory of this rank's engine, if it has one, until the next
    hand-off.
    """
    if engine is not None:
        engine.release_memory()


def check_aborts(samples: list[Sample]) -> None:
    """Raise EngineDied if the engine gave up on one of these."""
    for sample in samples:
        if sample.finish_reason == "abort":
            raise EngineDied(
                f"the engine aborted sample {sample.index} of group {sample.group}: {sample.error}"
            )


def my_share(prompts: Iterable[Sample], engine_tp: int) -> Iterator[Sample]:
    """The prompts that this rank's engine answers: every engine takes its turn; none on ranks
    without one.
    """
    engine, engines = dist.get_rank() // engine_tp, dist.get_world_size() // engine_tp
    return islice(prompts, engine, None, engines) if dist.get_rank() % engine_tp == 0 else iter(())


class Prompts:
    """This engine's share of the prompt stream, and how many were taken from it."""

    def __init__(self, data: Data, settings: RolloutSettings, *, taken: int = 0):
        self._share, self.taken = my_share(data.stream, settings.engine_tp), taken
        for _ in islice(self._share, taken):
            pass

    def take(self, n: int) -> list[Sample]:
        prompts = list(islice(self._share, n))
        self.taken += len(prompts)
        return prompts


def prompts_taken_before(ranks: list[dict] | None, settings: RolloutSettings) -> int:
    """How many prompts this rank's engine had taken at a checkpoint, of whose ranks these are the
    states; if there were other engines, so many that none comes twice. 0 without a checkpoint.
    """
    if ranks is None or dist.get_rank() % settings.engine_tp:
        return 0
    before = [state["prompts"] for state in ranks if state.get("prompts") is not None] or [0]
    engine, engines = (
        dist.get_rank() // settings.engine_tp,
        dist.get_world_size() // settings.engine_tp,
    )
    return before[engine] if len(before) == engines else -(-max(before) * len(before) // engines)


def step_share(settings: RolloutSettings) -> int:
    """How many prompts of a step an engine answers."""
    return settings.prompts_per_step * settings.engine_tp // dist.get_world_size()


def marks(samples: list[Sample], reason: str) -> list[Sample]:
    """What is left of samples that are not trained, so that they are counted."""
    return [
        Sample(sample.prompt_ids, group=sample.group, index=sample.index, finish_reason=reason)
        for sample in samples
    ]


def split_discarded(samples: list[Sample]) -> tuple[list[Sample], dict[str, int]]:
    """The samples to train, and how many others were set aside, for which reason."""
    kept = [sample for sample in samples if sample.finish_reason not in (DROPPED, REPLACED)]
    return kept, {
        reason: sum(sample.finish_reason == reason for sample in samples)
        for reason in (DROPPED, REPLACED)
    }


def all_gather_samples(samples: list[Sample], group: dist.ProcessGroup) -> list[Sample]:
    """Every rank's samples on every rank of the group, in rank order; as JSON lines in tensors of
    bytes, never pickled. Collective (gloo).
    """
    gathered = all_gather_bytes(b"\n".join(sample.to_json() for sample in samples), group)
    return [Sample.from_json(line) for lines in gathered for line in lines.split(b"\n") if line]


@all_problems
def longest_of_dumps(settings, config: dict | None) -> int:
    """Return the tokens of the longest sample of --load-rollouts. settings: a loop's.

    Raises BadInput for a step that cannot be trained on.
    """
    longest, minibatches, vocab_size = (
        0,
        settings.train.minibatches,
        config and config["vocab_size"],
    )
    for step in range(1, settings.run.steps + 1):
        file = rollouts_file(settings.run.load_rollouts, step)
        if not os.path.isfile(file):
            break  # checks.check_run_flags names it
        dump, _ = split_discarded(read_dump(file, vocab_size=vocab_size))
        longest = max([longest, *(len(s.prompt_ids) + len(s.response_ids) for s in dump)])
        if len(dump) < minibatches:
            yield (
                f"{file} has {len(dump)} answers to train on, --minibatches is {minibatches}: use "
                f"at most {len(dump)}, and another folder if that is 0"
            )
        oldest = min((v for s in dump for v in s.weight_versions), default=step - 1)
        if hasattr(settings, "in_flight") and step - 1 - oldest > settings.in_flight.max_staleness:
            yield (
                f"{file} has tokens {step - 1 - oldest} versions old, --max-staleness is "
                f"{settings.in_flight.max_staleness}: raise it"
            )
    return longest


def save_or_load(record, step: int, samples: list[Sample]) -> list[Sample]:
    """A step's samples, of all ranks: given, and with --save-rollouts written; with --load-rollouts
    read in their place. record: record.Record.
    """
    if record.settings.load_rollouts:
        return read_dump(rollouts_file(record.settings.load_rollouts, step))
    if record.settings.save_rollouts and record.is_writer:
        rollouts_file(record.folder / "rollouts", step).write_bytes(
            b"".join(sample.to_json() + b"\n" for sample in samples)
        )
    return samples
