"""Prompts -> Samples: prompt data, engine settings, generation, and the exchange of samples between ranks.

Tokens go into the engine and tokens come out; the text of a response is for judges and readers and is never tokenized again. Each engine starts with empty
weights of the right shapes and quantization; weight_sync.py gives it its first.
"""

import json
import math
import os
import random
import signal
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import orjson
import torch
import torch.distributed as dist

from problems import BadInput, Problems, all_problems
from run import EngineDied, all_gather_bytes, check_installation, parse_overrides

check_installation()
if not torch.cuda.is_available():
    import cpu

from sglang.srt.server_args import ServerArgs
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from engine import Engine
from hf_names import fp8_config, generation_eos
from toy.task import problems

MEM_FRACTION_STATIC = 0.5  # of the GPU memory that is free when an engine starts, what it takes for weights and cache, unless --sglang says otherwise
DROPPED, REPLACED = "dropped", "replaced"  # finish reasons of samples that are not trained: too old; in a group whose rewards are all equal


@dataclass
class Sample:
    """One prompt and, once generated, one response. Plain data: one JSON line holds all of it."""

    prompt_ids: list[int]
    prompt: str = ""
    label: Any = None
    group: int = -1
    """The prompt's number in the run's prompt stream: the samples of one group answer the same prompt."""
    index: int = 0
    """Place in its group; (group, index) names a sample."""
    response_ids: list[int] = field(default_factory=list)
    response: str = ""
    rollout_logprobs: list[float] = field(default_factory=list)
    """Per response token, by the engine, at the sampling temperature."""
    loss_mask: list[int] = field(default_factory=list)
    """Per response token: 1 if the policy sampled it, 0 if it came from elsewhere (a tool's output)."""
    weight_versions: list[int] = field(default_factory=list)
    """Per response token: the version of the weights that sampled it."""
    finish_reason: str = ""
    """stop, length or abort; or what became of a sample that is not trained, DROPPED or REPLACED."""
    reward: float | None = None
    old_logprobs: Sequence[float] = field(default_factory=list)
    """Per response token, by the trainer before it learns from the batch."""
    ref_logprobs: Sequence[float] = field(default_factory=list)
    """Per response token, by the frozen reference, where there is one."""
    advantages: Sequence[float] = field(default_factory=list)
    """Per response token."""
    metadata: dict = field(default_factory=dict)

    def to_json(self) -> bytes:
        return orjson.dumps(self, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS)

    @classmethod
    def from_json(cls, line: bytes | str) -> "Sample":
        return cls(**orjson.loads(line))


@dataclass(frozen=True)
class RolloutSettings:
    """Prompts, sampling, and the engine."""

    prompts: str = "toy"
    """toy, or a JSONL file: prompt (text, or a list of chat messages), label, optionally metadata."""
    eval_prompts: str = ""
    """JSONL file of held-out prompts; the toy has its own. Empty with a prompts file: no evaluation."""
    eval_samples: int = 512
    """How many held-out prompts an evaluation answers, one answer each."""
    prompts_per_step: int = 16
    """Prompts in a step, over all engines."""
    samples_per_prompt: int = 16
    """Answers sampled for each prompt: the group that GRPO compares."""
    temperature: float = 1.0
    """Sampling temperature, of training and of evaluation. The trainer computes its log-probs at the same."""
    max_response_tokens: int = 8
    """A response is cut off after so many tokens."""
    stop: tuple[str, ...] = ()
    """Further tokens that end a response, beside the model's own end-of-sequence tokens."""
    rollout_dtype: Literal["fp8", "bf16", "fp32"] = "fp8"
    """What the engine computes with: block-scaled FP8 weights and activations, or plain BF16 or FP32."""
    engine_tp: int = 1
    """Ranks that share one engine (SGLang tensor parallelism)."""
    engine_ep: int = 1
    """Of those, ranks over which whole experts are spread (SGLang expert parallelism); the rest of --engine-tp splits each expert."""
    sglang: tuple[str, ...] = ()
    """Further ServerArgs fields, key=value; for instance mem_fraction_static=0.5."""


# --- prompts ----------------------------------------------------------------------------------------------------------------------------------


def load_tokenizer(model_folder: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(model_folder, local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise many kinds, and all are about these files
        raise BadInput(f"--model {model_folder}: no tokenizer loads ({error}); copy tokenizer.json and tokenizer_config.json there") from error


MOST_EVAL_SAMPLES = 100_000  # the toy's held-out prompts never end
SHOWN_LINES = 5  # of a prompts file's bad lines; a wrong file has thousands


@all_problems
def read_prompts(path: str, tokenizer: PreTrainedTokenizerBase | None, *, max_prompt_tokens: float) -> list[Sample]:
    """All rows of a JSONL file as samples without a response. Raises BadInput naming the first lines that cannot be used.

    tokenizer: None where it could not be read; what needs it is then not looked at.
    """
    if not os.path.isfile(path):
        raise BadInput(f"prompts file {path} does not exist: give a JSONL file, or leave the flag out for the toy task")
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"prompts file {path} cannot be read as UTF-8 text: {error}") from error
    samples, bad = [], []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                samples.append(_read_prompt(line, f"{path} line {number}", tokenizer, max_prompt_tokens))
            except BadInput as error:
                bad += error.problems
    yield from bad[:SHOWN_LINES]
    if len(bad) > SHOWN_LINES:
        yield f"{path}: {len(bad) - SHOWN_LINES} more lines cannot be used"
    if not samples and not bad:
        yield f"{path} holds no prompts"
    return samples


def _read_prompt(line: str, where: str, tokenizer: PreTrainedTokenizerBase | None, max_prompt_tokens: float) -> Sample:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadInput(f"{where} is not JSON ({error.msg} at column {error.colno}): every line must be one object") from error
    if not isinstance(row, dict) or not row.get("prompt"):
        raise BadInput(f"{where} has no prompt: every line needs a non-empty \"prompt\", text or a list of chat messages")
    if "label" not in row or not isinstance(row.get("metadata", {}), dict):
        raise BadInput(f'{where} needs a "label" (null if the reward uses none), and "metadata", if given, must be an object')
    prompt = row["prompt"]
    if not isinstance(prompt, str | list):
        raise BadInput(f"{where}: the prompt is a {type(prompt).__name__}; it must be text or a list of chat messages")
    if tokenizer is None:
        return Sample([])
    if isinstance(prompt, list):
        if tokenizer.chat_template is None:
            raise BadInput(f"{where} holds chat messages, but the tokenizer has no chat template: give the prompt as text")
        if not all(isinstance(message, dict) and isinstance(message.get("content"), str) and message.get("role") for message in prompt):
            raise BadInput(f'{where}: every chat message needs a "role" and a text "content"')
        prompt = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
    else:
        ids = tokenizer(prompt).input_ids
    if not ids or len(ids) > max_prompt_tokens:
        raise BadInput(
            f"{where}: the prompt has {len(ids)} tokens; it must have 1 to {max_prompt_tokens} "
            "(the model's context less --max-response-tokens): shorten it or lower that flag"
        )
    return Sample(ids, prompt, row["label"], metadata=row.get("metadata", {}))


def toy_prompts(tokenizer: PreTrainedTokenizerBase, *, seed: int, held_out: bool) -> Iterator[Sample]:
    """Endless problems of the toy task, as samples without a response."""
    for group, row in enumerate(problems(seed=seed, held_out=held_out)):
        yield Sample(tokenizer(row["prompt"]).input_ids, row["prompt"], row["label"], group)


def shuffled(samples: list[Sample], *, seed: int) -> Iterator[Sample]:
    """Endless passes over a file's prompts, each in a new seeded order, the same on every rank."""
    rng, group = random.Random(seed), 0
    while True:
        for i in rng.sample(range(len(samples)), len(samples)):
            yield replace(samples[i], group=group)
            group += 1


@all_problems
def end_tokens(model_folder: str, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...]) -> list[int]:
    """Token ids that end a response: of generation_config.json, of the tokenizer, and of --stop."""
    ids = {token for token in generation_eos(model_folder) if type(token) is int} | {tokenizer.eos_token_id}  # others: see hf_folder.check_model_folder
    for text in stop:
        token = tokenizer.convert_tokens_to_ids(text)
        if token is None or token == tokenizer.unk_token_id:
            yield f"--stop {text!r} is not one token of this tokenizer: give a token such as {tokenizer.eos_token!r}"
        ids.add(token)
    ids.discard(None)
    if not ids:
        yield f"{model_folder} names no end-of-sequence token in generation_config.json or its tokenizer: give one with --stop"
    return sorted(ids)


@dataclass
class Data:
    """What a run generates from."""

    tokenizer: PreTrainedTokenizerBase
    stream: Iterator[Sample]
    held_out: list[Sample]
    """Evaluation prompts; empty where there are none."""
    end_ids: list[int]
    """Tokens that end a response."""
    longest: int
    """Prompt and response tokens of the longest possible sample."""
    seed: int


@all_problems
def load_data(model_folder: str, settings: RolloutSettings, config: dict | None, *, seed: int) -> Data:
    """Tokenizer and prompts, all checked. Raises BadInput. config: None where it could not be read; the prompts' form is checked all the same."""
    found = Problems()
    tokenizer = None if config is None else found.of(load_tokenizer, model_folder)
    if tokenizer is not None and len(tokenizer) > config["vocab_size"]:
        yield f"{model_folder}: the tokenizer has {len(tokenizer)} tokens, the model {config['vocab_size']}: they do not belong together"
    room = math.inf if config is None else config["max_position_embeddings"] - settings.max_response_tokens
    prompts, held_out = (
        None if path == none else found.of(read_prompts, path, tokenizer, max_prompt_tokens=room)
        for path, none in ((settings.prompts, "toy"), (settings.eval_prompts, ""))
    )
    end_ids = None if tokenizer is None else found.of(end_tokens, model_folder, tokenizer, settings.stop)
    yield from found.found
    if tokenizer is None or found.found:
        return None
    if held_out is None:
        held_out = toy_prompts(tokenizer, seed=0, held_out=True) if prompts is None else []
    held_out = list(islice(held_out, min(max(settings.eval_samples, 0), MOST_EVAL_SAMPLES)))
    longest = max((len(prompt.prompt_ids) for prompt in [*(prompts or []), *held_out]), default=0) + settings.max_response_tokens
    stream = toy_prompts(tokenizer, seed=seed, held_out=False) if prompts is None else shuffled(prompts, seed=seed)
    return Data(tokenizer, stream, held_out, end_ids, longest, seed)


@all_problems
def check_rollout_settings(settings: RolloutSettings, config: dict | None, *, world_size: int):
    """What cannot work, before anything is started. world_size: of the ranks that generate. config: None where it could not be read."""
    if settings.temperature <= 0:
        yield f"--temperature {settings.temperature} must be above 0: a greedy rollout has no log-probs to learn from"
    if settings.samples_per_prompt < 2:
        yield f"--samples-per-prompt {settings.samples_per_prompt}: GRPO compares answers to one prompt and needs at least 2"
    if not 1 <= settings.eval_samples <= MOST_EVAL_SAMPLES:
        yield f"--eval-samples {settings.eval_samples} must be at least 1, and at most {MOST_EVAL_SAMPLES}"
    if settings.engine_tp < 1 or world_size % settings.engine_tp:
        yield f"--engine-tp {settings.engine_tp} does not divide the {world_size} ranks: use a divisor"
    elif (engines := world_size // settings.engine_tp) > 0 and (settings.prompts_per_step < 1 or settings.prompts_per_step % engines):
        yield f"--prompts-per-step {settings.prompts_per_step} is not divisible by the {engines} engines: use a multiple of {engines}"
    experts = config["num_experts"] if config else settings.engine_ep
    if settings.engine_ep < 1 or settings.engine_tp % settings.engine_ep or experts % settings.engine_ep or (settings.engine_ep > 1 and not experts):
        yield f"--engine-ep {settings.engine_ep} must divide --engine-tp {settings.engine_tp} and the model's {experts} experts; it is 1 for a dense model"
    if config is not None:
        for field_name in ("num_attention_heads", "num_key_value_heads"):
            if settings.engine_tp > 0 and config[field_name] % settings.engine_tp:
                yield f"{field_name} {config[field_name]} is not divisible by --engine-tp {settings.engine_tp}: use a --engine-tp that divides it"
        if not 1 <= settings.max_response_tokens < config["max_position_embeddings"]:
            yield f"--max-response-tokens {settings.max_response_tokens} must lie below the model's context, {config['max_position_embeddings']}"
    _server_overrides(settings)


def _server_overrides(settings: RolloutSettings) -> dict:
    """--sglang as a dict. What another flag decides is not among the fields."""
    names = getattr(ServerArgs, "__struct_fields__", None) or ServerArgs.__dataclass_fields__
    decided = {"model_path", "dtype", "tp_size", "ep_size", "load_format", "quantization", "skip_tokenizer_init"}
    decided |= {"custom_weight_loader", "custom_sigquit_handler"}
    return parse_overrides(settings.sglang, flag="--sglang", fields=[name for name in names if name not in decided])


def start_engine(model_folder: str, settings: RolloutSettings, config: dict, *, seed: int) -> Engine | None:
    """The engine of this rank's group of --engine-tp ranks, on the group's first rank; None on the others. It has shapes, but no weights yet."""
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
        custom_weight_loader=["weight_sync.load_bucket", "weight_sync.compare_loader"],
        custom_sigquit_handler=signal.getsignal(signal.SIGQUIT),
        random_seed=seed + rank,
        log_level="error",
    )
    if torch.cuda.is_available():
        arguments.update(base_gpu_id=int(os.environ["LOCAL_RANK"]), enable_memory_saver=True, mem_fraction_static=MEM_FRACTION_STATIC)
    else:
        arguments.update(cpu.SERVER_ARGS)
    if settings.rollout_dtype == "fp8":
        quantization = fp8_config(config, engine_tp=settings.engine_tp, engine_ep=settings.engine_ep)
        arguments["json_model_override_args"] = json.dumps({"quantization_config": quantization})
    return Engine(**{**arguments, **_server_overrides(settings)})


# --- generation -------------------------------------------------------------------------------------------------------------------------------


def sampling_params(data: Data, settings: RolloutSettings, samples: list[Sample]) -> list[dict]:
    """How the engine samples each response. Each has a seed of its own, so that what a resumed run samples does not depend on what was sampled before.

    On a CPU cpu.py makes the sampler keep to it; on a GPU SGLang does with --sglang enable_deterministic_inference=true, and samples from one stream without.
    """
    common = {"temperature": settings.temperature, "max_new_tokens": settings.max_response_tokens, "stop_token_ids": data.end_ids}
    return [{**common, "sampling_seed": zlib.crc32(f"{data.seed} {s.group} {s.index} {s.prompt}".encode()) // 2} for s in samples]


def copies(prompt: Sample, n: int) -> list[Sample]:
    """A group: n samples of one prompt, still without responses."""
    return [replace(prompt, index=index, metadata=dict(prompt.metadata)) for index in range(n)]


def fill(samples: list[Sample], outputs: list[dict], data: Data) -> None:
    """Write the engine's outputs into the samples they answer."""
    for sample, output in zip(samples, outputs):
        sample.finish_reason = output["meta_info"]["finish_reason"]["type"]
        sample.response_ids = output["output_ids"]
        sample.response = data.tokenizer.decode(sample.response_ids, skip_special_tokens=True)
        sample.rollout_logprobs = [logprob for logprob, *_ in output["meta_info"]["output_token_logprobs"]]
        sample.loss_mask = [1] * len(sample.response_ids)
        sample.weight_versions = output["weight_versions"]
        if sample.finish_reason == "abort":
            sample.metadata["abort"] = output["meta_info"]["finish_reason"].get("message")


def generate(engine: Engine | None, prompts: list[Sample], data: Data, settings: RolloutSettings, *, n: int, cache: str = "") -> list[Sample]:
    """n responses to each of this engine's prompts, with log-probs at the sampling temperature, in order. Raises EngineDied if one was aborted.

    cache: calls of one name share cached prefixes.
    """
    if engine is None or not prompts:
        return []
    samples = [sample for prompt in prompts for sample in copies(prompt, n)]
    fill(samples, engine.call(engine.generate([s.prompt_ids for s in samples], sampling_params(data, settings, samples), cache=cache)), data)
    check_aborts(samples)
    return samples


def release_memory(engine: Engine | None) -> None:
    """Let the trainer have the GPU memory of this rank's engine, if it has one, until the next hand-off."""
    if engine is not None:
        engine.release_memory()


def check_aborts(samples: list[Sample]) -> None:
    """Raise EngineDied if the engine gave up on one of these."""
    for sample in samples:
        if sample.finish_reason == "abort":
            raise EngineDied(f"the engine aborted sample {sample.index} of group {sample.group}: {sample.metadata['abort']}")


def my_share(prompts: Iterable[Sample], engine_tp: int) -> Iterator[Sample]:
    """The prompts that this rank's engine answers: every engine takes its turn; none on ranks without one."""
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


def taken_before(ranks: list[dict] | None, settings: RolloutSettings) -> int:
    """How many prompts this rank's engine had taken at a checkpoint, of whose ranks these are the states; if there were other engines, so many that none
    comes twice. 0 without a checkpoint."""
    if ranks is None or dist.get_rank() % settings.engine_tp:
        return 0
    before = [state["prompts"] for state in ranks if state.get("prompts") is not None]
    engine, engines = dist.get_rank() // settings.engine_tp, dist.get_world_size() // settings.engine_tp
    return before[engine] if len(before) == engines else -(-max(before) * len(before) // engines)


def step_share(settings: RolloutSettings) -> int:
    """How many prompts of a step an engine answers."""
    return settings.prompts_per_step * settings.engine_tp // dist.get_world_size()


def marks(samples: list[Sample], reason: str) -> list[Sample]:
    """What is left of samples that are not trained, so that they are counted."""
    return [Sample(sample.prompt_ids, group=sample.group, index=sample.index, finish_reason=reason) for sample in samples]


def without_marks(samples: list[Sample]) -> tuple[list[Sample], dict[str, int]]:
    """The samples to train, and how many others were set aside, for which reason."""
    kept = [sample for sample in samples if sample.finish_reason not in (DROPPED, REPLACED)]
    return kept, {reason: sum(sample.finish_reason == reason for sample in samples) for reason in (DROPPED, REPLACED)}


def all_gather_samples(samples: list[Sample], group: dist.ProcessGroup) -> list[Sample]:
    """Every rank's samples on every rank of the group, in rank order; as JSON lines in tensors of bytes, never pickled. Collective (gloo)."""
    gathered = all_gather_bytes(b"\n".join(sample.to_json() for sample in samples), group)
    return [Sample.from_json(line) for lines in gathered for line in lines.split(b"\n") if line]
