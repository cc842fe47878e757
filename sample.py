"""A Sample: one prompt and its answer; what settings make of a prompt, and where an answer ends. rollout.py must be imported first."""

import dataclasses
import math
import os
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from chat import chat_text
from problems import BadInput, Problems, all_problems, check_file, read_file, read_json
from settings import DataSettings


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
    """stop, length or abort; or what became of a sample that is not trained, rollout.DROPPED or REPLACED."""
    reward: float | None = None
    old_logprobs: Sequence[float] = field(default_factory=list)
    """Per response token, by the trainer before it learns from the batch; empty where the batch has one update only, which starts from them."""
    ref_logprobs: Sequence[float] = field(default_factory=list)
    """Per response token, by the frozen reference, where there is one."""
    advantages: Sequence[float] = field(default_factory=list)
    """Per response token."""
    metadata: dict = field(default_factory=dict)
    """The row's own object of that name, as it was read. The program never writes to it: what it has to say goes to the fields below."""
    source: str = ""
    """Short name of what the prompt is from: a file, or a generator."""
    answer: str | None = None
    """What the reward function took for the answer; None where it does not say."""
    error: str = ""
    """Why the sample has no reward, or why the engine aborted it."""
    notes: dict = field(default_factory=dict)
    """What generators, rollouts and reward functions leave for one another: the problem of reasoning-gym, the calls of a tool."""

    def to_json(self) -> bytes:
        return orjson.dumps(self, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS)

    @classmethod
    def from_json(cls, line: bytes | str) -> "Sample":
        return cls(**orjson.loads(line))


def read_dump(path: str | Path, *, vocab_size: int | None = None) -> list[Sample]:
    """Read a step's samples as --save-rollouts writes them. Raises BadInput naming file, line and field.

    vocab_size: of the model that is to train on them; None leaves the range of the ids unchecked.
    """
    try:
        lines = read_file(path, most=math.inf).split(b"\n")
    except BadInput as error:
        raise BadInput(f"rollouts file {error}") from error
    samples = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = orjson.loads(line)
        except ValueError as error:
            raise BadInput(f"{path} line {number} is not JSON ({error}): a dump has a sample a line") from error
        problem = next(_dump_problems(row, vocab_size), None)
        if problem:
            raise BadInput(f"{path} line {number}: {problem}; give a folder that --save-rollouts wrote")
        samples.append(Sample(**row))
    if not samples:
        raise BadInput(f"{path} holds no samples; give a folder that --save-rollouts wrote")
    return samples


PER_TOKEN = ("response_ids", "rollout_logprobs", "loss_mask", "weight_versions")


def _dump_problems(row: Any, vocab_size: int | None) -> Iterator[str]:
    """What keeps a line of a dump from being a Sample that can be trained on."""
    if not isinstance(row, dict):
        yield "it is no object, and a sample is one"
        return
    names = [spec.name for spec in dataclasses.fields(Sample)]
    yield from (f"{name!r} is no field of a sample" for name in row if name not in names)
    yield from (f"the field {name!r} is missing" for name in names if name not in row)
    for name in ("prompt_ids", "response_ids", "loss_mask", "weight_versions"):
        yield from _element_problems(row, name, int, "integer")
    for name in ("rollout_logprobs", "old_logprobs", "ref_logprobs", "advantages"):
        yield from _element_problems(row, name, (int, float), "number")
    if not row["prompt_ids"]:
        yield "prompt_ids is empty"
    for name in ("prompt_ids", "response_ids"):
        for token in row[name]:
            if token < 0 or (vocab_size is not None and token >= vocab_size):
                limit = "" if vocab_size is None else f" and below the model's vocabulary, {vocab_size}"
                yield f"{name} holds {token}; a token id must be at least 0{limit}"
    if any(value not in (0, 1) for value in row["loss_mask"]):
        yield "loss_mask holds another value than 0 and 1"
    lengths = {name: len(row[name]) for name in PER_TOKEN}
    if len(set(lengths.values())) > 1:
        shown = ", ".join(f"{name} {length}" for name, length in lengths.items())
        yield f"its lists differ in length, and each has one value a response token: {shown}"
    for name in ("old_logprobs", "ref_logprobs", "advantages"):
        if len(row[name]) not in (0, len(row["response_ids"])):
            yield f"{name} has {len(row[name])} values for {len(row['response_ids'])} response tokens"
    kinds = dict(prompt=str, response=str, source=str, error=str, finish_reason=str, group=int)
    kinds |= dict(index=int, metadata=dict, notes=dict)
    kinds |= dict(reward=(int, float, type(None)), answer=(str, type(None)))
    for name, kind in kinds.items():
        if not isinstance(row[name], kind) or isinstance(row[name], bool):
            yield f"{name} is a {type(row[name]).__name__}"


def _element_problems(row: dict, name: str, kind: type | tuple, word: str) -> Iterator[str]:
    """What is wrong with a list of a dump's line; it must hold values of one kind."""
    if not isinstance(row[name], list):
        yield f"{name} is a {type(row[name]).__name__}; it must be a list"
        return
    for at, value in enumerate(row[name]):
        if not isinstance(value, kind) or isinstance(value, bool) or not math.isfinite(value):
            shown = "null" if value is None else repr(value)
            yield f"{name} holds {shown} at place {at}, which is no {word}"


# --- the tokenizer ----------------------------------------------------------------------------------------------------------------------------


TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


@all_problems
def check_tokenizer_files(folder: Path) -> Iterator[str]:
    """Yield which files of a model folder cannot be read: what is no file would be waited for."""
    found = Problems()
    for file in sorted([*folder.glob("*"), *folder.glob("additional_chat_templates/*")]):
        is_special = file.exists() and not file.is_file() and not file.is_dir()
        if is_special or file.name in TOKENIZER_FILES:
            found.of(check_file, file)
    yield from found.found


def generation_eos(folder: str | Path) -> list:
    """The tokens that end a response by generation_config.json, as they stand there; [] without that file."""
    path = Path(folder) / "generation_config.json"
    read = read_json(path) if os.path.lexists(path) else {}
    if not isinstance(read, dict):
        raise BadInput(f"{path} is no JSON object: copy it again, or remove it")
    eos = read.get("eos_token_id")
    return eos if isinstance(eos, list) else [] if eos is None else [eos]


def load_tokenizer(model_folder: str) -> PreTrainedTokenizerBase:
    check_tokenizer_files(Path(model_folder))
    try:
        return AutoTokenizer.from_pretrained(model_folder, local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise many kinds, and all are about these files
        for file in Path(model_folder).glob("*.json"):
            read_json(file)  # names the one that is no JSON
        raise BadInput(f"--model {model_folder}: no tokenizer loads ({error}); copy tokenizer.json and tokenizer_config.json there") from error


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


def encode(
    prompt: Any,
    tokenizer: PreTrainedTokenizerBase,
    settings: DataSettings,
    *,
    where: str,
    tools: list[dict] | None = None,
) -> tuple[str, list[int]]:
    """Return a prompt as text and as tokens. Raises BadInput.

    A chat template writes its own special tokens; to plain text the tokenizer adds its own.
    """
    if isinstance(prompt, str) and settings.chat:
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, list):
        own = dict(system_prompt=settings.system_prompt, template_kwargs=settings.chat_template_kwargs)
        text = chat_text(prompt, tokenizer, where=where, tools=tools, **own)
        return text, prompt_tokens(text, tokenizer, where=where, is_chat=True)
    if not isinstance(prompt, str):
        raise BadInput(f"{where}: the prompt is a {type(prompt).__name__}; it must be text or a list of chat messages")
    given = {
        "--system-prompt": settings.system_prompt,
        "--chat-template-kwargs": settings.chat_template_kwargs,
        'the row\'s "tools"': tools,
    }
    for name in [name for name, value in given.items() if value]:
        raise BadInput(f"{name} needs chat messages, and the prompt of {where} is text: add --chat, or leave {name} out")
    return prompt, prompt_tokens(prompt, tokenizer, where=where, is_chat=False)


def prompt_tokens(text: str, tokenizer: PreTrainedTokenizerBase, *, where: str, is_chat: bool) -> list[int]:
    """Return the tokens of a prompt's text; of plain text with what the tokenizer puts before it.

    What a tokenizer appends (the end token, [SEP]) would end the prompt, so it is left out. A start
    token that the text has already is not put before it again.
    """
    try:
        bare = tokenizer(text, add_special_tokens=False).input_ids
        whole = bare if is_chat else tokenizer(text).input_ids
    except Exception as error:  # tokenizers raise many kinds, and all are about this text
        raise BadInput(f"{where}: the tokenizer cannot read the prompt ({error}): change its text") from error
    check_known(text, bare, tokenizer, where=where)
    places = range(len(whole) - len(bare) + 1)
    before = next((n for n in places if whole[n : n + len(bare)] == bare), None)
    if before is None:  # the text has other tokens beside special ones; only an end token is told apart
        appended = whole[-1:] == [tokenizer.eos_token_id] and not text.endswith(tokenizer.eos_token)
        return whole[:-1] if appended else whole
    return bare if bare[:before] == whole[:before] else whole[:before] + bare


def check_known(text: str, ids: list[int], tokenizer: PreTrainedTokenizerBase, *, where: str) -> None:
    """Refuse a text of which the tokenizer does not know a part. Raises BadInput naming that part.

    Such a part becomes the unknown token (or a pad token), or has no token at all. Tokenizers also
    change blanks, case and accents; so a character counts as lost only if it is a letter, number,
    sign or symbol, the decoded tokens lack it, and no token covers its place.
    """
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    names = {tokenizer.unk_token, tokenizer.pad_token, getattr(model, "unk_token", None)} - {None}
    fillers = {tokenizer.convert_tokens_to_ids(name): name for name in names}
    decoded = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    lost = {c for c in set(text) - set(decoded) if _is_visible(c)}
    if not lost and fillers.keys().isdisjoint(ids):
        return
    unknown = None
    if tokenizer.is_fast:
        spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
        broken = "\ufffd" in decoded and "\ufffd" not in text  # bytes of a character are missing
        covered = set() if broken else {at for start, end in spans for at in range(start, end)}
        unknown = next((c for at, c in enumerate(text) if c in lost and at not in covered), None)
        for token, (start, end) in zip(ids, spans):
            own = (fillers.get(token, "").strip(), tokenizer.decode([token], clean_up_tokenization_spaces=False).strip())
            if token in fillers and text[start:end].strip() not in own:
                unknown = text[start:end]
                break
    else:  # it does not say which part of the text a token is
        unknown = next((name for token, name in fillers.items() if ids.count(token) > text.count(name)), None)
    if unknown is not None:
        raise BadInput(
            f"{where}: the model's tokenizer does not know {unknown!r}, so the model would not see it: "
            "change the prompt (or --system-prompt), or use a model that knows it"
        )


def _is_visible(character: str) -> bool:
    kind = unicodedata.category(character)
    return kind[0] in "LNPS" and (character.isascii() or kind not in ("Lm", "Sk"))  # no accents
