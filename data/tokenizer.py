"""Loads a model's tokenizer, encodes prompts with it, and finds the tokens that end a response."""

import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import backends  # noqa: F401  before transformers: without a GPU it provides what this imports
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from backends.huggingface.config import generation_eos
from common.errors import BadInput, ProblemList, all_problems, check_file, read_json
from common.settings import DataSettings
from data.chat import chat_text

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


@all_problems
def check_tokenizer_files(folder: Path) -> Iterator[str]:
    """Refuse tokenizer files that cannot be read. Reading a pipe, for instance, would never end."""
    found = ProblemList()
    for file in sorted([*folder.glob("*"), *folder.glob("additional_chat_templates/*")]):
        is_special = file.exists() and not file.is_file() and not file.is_dir()
        if is_special or file.name in TOKENIZER_FILES:
            found.collect(check_file, file)
    yield from found.texts


def load_tokenizer(model_folder: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder. Raises BadInput."""
    check_tokenizer_files(Path(model_folder))
    try:
        return AutoTokenizer.from_pretrained(model_folder, local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise many kinds, all about the files
        for file in Path(model_folder).glob("*.json"):
            read_json(file)  # its error names a file that is not JSON
        fix = "copy tokenizer.json and tokenizer_config.json there"
        raise BadInput(f"--model {model_folder}: no tokenizer loads ({error}); {fix}") from error


def token_table(model_folder: str) -> dict[int, str]:
    """Return {id: token} as tokenizer.json of a folder has them. Raises BadInput.

    A loaded tokenizer may have more: transformers adds special tokens of its own to some families.
    """
    file = Path(model_folder) / "tokenizer.json"
    check_file(file)
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises a plain Exception
        raise BadInput(f"{file} is no tokenizer ({error}): copy it again") from error
    return {number: token for token, number in tokenizer.get_vocab().items()}


@all_problems
def end_tokens(
    model_folder: str, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...]
) -> list[int]:
    """Return the token ids that end a response.

    They come from generation_config.json, the tokenizer and --stop. Raises BadInput.
    """
    # check_model_folder in backends/huggingface/folder.py refuses ids that are not integers.
    ids = {token for token in generation_eos(model_folder) if type(token) is int}
    ids.add(tokenizer.eos_token_id)
    for text in stop:
        token = tokenizer.convert_tokens_to_ids(text)
        if token is None or token == tokenizer.unk_token_id:
            fix = f"give a token such as {tokenizer.eos_token!r}"
            yield f"--stop {text!r} is not one token of this tokenizer: {fix}"
        ids.add(token)
    ids.discard(None)
    if not ids:
        where = "in generation_config.json or its tokenizer"
        yield f"{model_folder} names no end-of-sequence token {where}: give one with --stop"
    return sorted(ids)


def encode(
    prompt: Any,
    tokenizer: PreTrainedTokenizerBase,
    settings: DataSettings,
    *,
    where: str,
    tools: list[dict] | None = None,
) -> tuple[str, list[int]]:
    """Return a prompt as (text, token ids). Raises BadInput naming `where`.

    A chat template writes the special tokens into the text. To plain text the tokenizer adds them.
    """
    if isinstance(prompt, str) and settings.chat:
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, list):
        text = chat_text(
            prompt,
            tokenizer,
            where=where,
            tools=tools,
            system_prompt=settings.system_prompt,
            template_kwargs=settings.chat_template_kwargs,
        )
        return text, prompt_tokens(text, tokenizer, where=where, is_chat=True)
    if not isinstance(prompt, str):
        rule = "it must be text or a list of chat messages"
        raise BadInput(f"{where}: the prompt is a {type(prompt).__name__}; {rule}")
    given = {
        "--system-prompt": settings.system_prompt,
        "--chat-template-kwargs": settings.chat_template_kwargs,
        'the row\'s "tools"': tools,
    }
    for name in [name for name, value in given.items() if value]:
        raise BadInput(
            f"{name} needs chat messages, and the prompt of {where} is text: add --chat, or leave"
            f" {name} out"
        )
    return prompt, prompt_tokens(prompt, tokenizer, where=where, is_chat=False)


def prompt_tokens(
    text: str, tokenizer: PreTrainedTokenizerBase, *, where: str, is_chat: bool
) -> list[int]:
    """Return the token ids of a prompt's text. Raises BadInput.

    Plain text gets the special tokens that the tokenizer puts before it, unless it begins with them
    already. Tokens that the tokenizer appends (an end token, [SEP]) would end the prompt, so they
    are left out.
    """
    try:
        bare = tokenizer(text, add_special_tokens=False).input_ids
        whole = bare if is_chat else tokenizer(text).input_ids
    except Exception as error:  # tokenizers raise many kinds, all about this text
        text = f"the tokenizer cannot read the prompt ({error}): change its text"
        raise BadInput(f"{where}: {text}") from error
    check_known(text, bare, tokenizer, where=where)
    places = range(len(whole) - len(bare) + 1)
    before = next((n for n in places if whole[n : n + len(bare)] == bare), None)
    if before is None:
        # Beside special tokens the text is tokenized differently. Only an end token can be removed.
        appended = whole[-1:] == [tokenizer.eos_token_id] and not text.endswith(tokenizer.eos_token)
        return whole[:-1] if appended else whole
    return bare if bare[:before] == whole[:before] else whole[:before] + bare


def check_known(
    text: str, ids: list[int], tokenizer: PreTrainedTokenizerBase, *, where: str
) -> None:
    """Raise BadInput, naming the part, if the tokenizer does not know a part of a text.

    Such a part becomes the unknown token or a pad token, or gets no token at all. But tokenizers
    also change blanks, case and accents. A character counts as lost only if it is a letter, number,
    sign or symbol. In addition the decoded tokens must lack it, and no token may cover its place.
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
        options = dict(add_special_tokens=False, return_offsets_mapping=True)
        spans = tokenizer(text, **options).offset_mapping
        broken = "\ufffd" in decoded and "\ufffd" not in text  # bytes of a character are missing
        covered = set() if broken else {at for start, end in spans for at in range(start, end)}
        unknown = next((c for at, c in enumerate(text) if c in lost and at not in covered), None)
        for token, (start, end) in zip(ids, spans):
            spelled = tokenizer.decode([token], clean_up_tokenization_spaces=False).strip()
            own = (fillers.get(token, "").strip(), spelled)  # the text may name the token itself
            if token in fillers and text[start:end].strip() not in own:
                unknown = text[start:end]
                break
    else:  # a slow tokenizer does not tell which part of the text a token stands for
        unknown = next(
            (name for token, name in fillers.items() if ids.count(token) > text.count(name)), None
        )
    if unknown is not None:
        raise BadInput(
            f"{where}: the model's tokenizer does not know {unknown!r}, so the model would not see"
            " it: change the prompt (or --system-prompt), or use a model that knows it"
        )


def _is_visible(character: str) -> bool:
    """Return whether a character is a letter, number, sign or symbol, and not an accent alone."""
    kind = unicodedata.category(character)
    return kind[0] in "LNPS" and (character.isascii() or kind not in ("Lm", "Sk"))
