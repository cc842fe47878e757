"""Reads prompts from JSONL and Parquet files: one prompt per row, every row checked.

    {"prompt": text or [chat messages], "label": anything, "metadata": {...}, "tools": [...]}

The label is null if the reward function needs none. metadata and tools are optional. --prompt-key
and --label-key name other fields. If they name several, a row's first value that is neither null
nor NaN counts, so that files with different field names can be mixed.
"""

import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import backends  # noqa: F401  before transformers, see data/tokenizer.py
import orjson
from transformers import PreTrainedTokenizerBase

from common import hub
from common.errors import BadInput, all_problems, file_problem
from common.settings import DataSettings
from data.chat import EndlessTemplate
from data.sample import Sample
from data.tokenizer import encode

SHOWN_ROWS = 5  # bad rows that an error lists; a wrong file has thousands
SHOWN_CHARACTERS = 60  # of a bad value
# Returns for each label "", or why it cannot be judged.
LabelProblems = Callable[[list[Any]], list[str]]
# {the first bytes of a file: what is wrong with it}
OTHER_FORMATS = {
    b"PAR1": "is a Parquet file: its name must end in .parquet",
    b"\x1f\x8b": "is compressed by gzip: unpack it first",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd: unpack it first",
    b"PK\x03\x04": "is a ZIP archive: unpack it first",
}


@all_problems
def read_prompts(
    path: str,
    tokenizer: PreTrainedTokenizerBase | None,
    settings: DataSettings,
    *,
    name: str,
    max_prompt_tokens: float,
    label_problems: LabelProblems | None = None,
    marked: set[str] | None = None,
) -> list[Sample]:
    """Read all rows of a file as samples without a response.

    tokenizer: None if it could not be read; rules that need it are then skipped. name: the source
    of the samples. marked: receives the path if a label of the file holds --label-after. Raises
    BadInput naming the first rows that cannot be used.
    """
    rows, bad = [], []
    options = dict(name=name, max_prompt_tokens=max_prompt_tokens)
    for where, row in read_rows(path):
        try:
            rows.append((where, sample_of(row, tokenizer, settings, where=where, **options)))
        except BadInput as error:
            bad += error.problems
            if isinstance(error, EndlessTemplate):  # every other row would take as long
                break
    if marked is not None and any(_holds(sample.label, settings.label_after) for _, sample in rows):
        marked.add(path)
    bad = bad or cut_labels(rows, settings.label_after) or _unfit_labels(rows, label_problems)
    yield from bad[:SHOWN_ROWS]
    if len(bad) > SHOWN_ROWS:
        yield f"{path}: {len(bad) - SHOWN_ROWS} more rows cannot be used"
    if not rows and not bad:
        yield f"{path} holds no prompts"
    return [sample for _, sample in rows]


def sample_of(
    row: dict | str,
    tokenizer: PreTrainedTokenizerBase | None,
    settings: DataSettings,
    *,
    where: str,
    name: str,
    max_prompt_tokens: float,
) -> Sample:
    """Return a row, or a line of JSONL, as a sample without a response. Raises BadInput."""
    is_line = isinstance(row, str)
    row = _parsed(row, where=where) if is_line else row
    prompt = value_at(row, settings.prompt_key, where=where, flag="--prompt-key")
    label = value_at(row, settings.label_key, where=where, flag="--label-key")
    metadata, tools = row.get("metadata"), row.get("tools")
    if not is_line:
        # In Parquet all objects of a column have the same fields; missing ones are null.
        prompt, tools = _without_nulls(prompt), _without_nulls(tools)
    tools = _tools(tools, where=where)
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        rule = "it needs a non-empty one, text or a list of chat messages"
        raise BadInput(f"{where} has no prompt: {rule}")
    if isinstance(prompt, str) and _is_text_of_messages(prompt):
        fix = "give the list itself, not its text"
        raise BadInput(f"{where}: the prompt is JSON text of chat messages: {fix}")
    if not isinstance(metadata, dict | None):
        kind = type(metadata).__name__
        raise BadInput(f'{where}: "metadata" is a {kind}; if given, it must be an object')
    values = [prompt, label, metadata, tools]
    try:
        json.dumps(values, allow_nan=False)  # refuses NaN, which orjson would write as null
        # Every rank gets the values through JSON, where tuples become lists. Do that here, too.
        prompt, label, metadata, tools = orjson.loads(orjson.dumps(values))
    except (TypeError, ValueError, RecursionError) as error:
        raise BadInput(
            f"{where}: prompt, label and metadata must fit in a line of JSON ({error}): convert "
            "the field to text"
        ) from error
    text, ids = "", [0]  # without a tokenizer: a stand-in of one token
    if tokenizer is not None:
        text, ids = encode(prompt, tokenizer, settings, where=where, tools=tools)
    if not ids or len(ids) > max_prompt_tokens:
        raise BadInput(
            f"{where}: the prompt has {len(ids)} tokens; it must have 1 to {max_prompt_tokens} "
            "(the model's context less --max-response-tokens, and 2 positions that SGLang keeps): "
            "shorten it or lower that flag"
        )
    return Sample(ids, text, label, metadata=metadata or {}, source=name)


def _is_text_of_messages(prompt: str) -> bool:
    """Return whether a text is a list of chat messages, written as JSON."""
    if not prompt.lstrip().startswith("["):
        return False
    try:
        value = json.loads(prompt)
    except (ValueError, RecursionError):
        return False
    return bool(value) and all(isinstance(message, dict) and "role" in message for message in value)


def _tools(given: Any, *, where: str) -> list[dict] | None:
    """Return a row's tools as a list of objects, or None if there are none.

    They may be given as a list, as JSON text of the list, or as a list of JSON texts.
    """
    rule = "it must be a list of objects, or JSON text of one"
    try:
        given = json.loads(given) if isinstance(given, str) else given
        tools = given if isinstance(given, list) else []
        tools = [json.loads(tool) if isinstance(tool, str) else tool for tool in tools]
    except (ValueError, RecursionError) as error:
        raise BadInput(f'{where}: "tools" cannot be read as JSON ({error}): {rule}') from error
    if not isinstance(given, list | None) or not all(isinstance(tool, dict) for tool in tools):
        raise BadInput(f'{where}: "tools" is {_shown(given)}; {rule}')
    return tools or None


def _without_nulls(value: Any) -> Any:
    """Return a value without the fields of its objects, at any depth, that are null."""
    if isinstance(value, dict):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def read_rows(path: str) -> Iterator[tuple[str, dict | str]]:
    """Yield (file and row as errors name them, the row or its line). Raises BadInput.

    path: of a file, or a dataset's name on the hub.
    """
    if hub.is_dataset(path):
        for file in hub.dataset_files(path):
            yield from read_rows(file)
        return
    if problem := file_problem(path):
        raise BadInput(problem)
    if path.endswith(".parquet"):
        yield from _parquet_rows(path)
        return
    try:
        _check_format(path)
        with open(path, encoding="utf-8-sig") as file:  # skips a byte order mark
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path} line {number}", line
    except (OSError, UnicodeDecodeError) as error:
        fix = "give JSONL in UTF-8, or Parquet"
        raise BadInput(
            f"prompts file {path} cannot be read as UTF-8 text: {error}; {fix}"
        ) from error


def _check_format(path: str) -> None:
    """Refuse a file of another format by name, rather than with an error about its first row."""
    with open(path, "rb") as file:
        head = file.read(4096)
    for start, what in OTHER_FORMATS.items():
        if head.startswith(start):
            raise BadInput(f"prompts file {path} {what}")
    if path.endswith((".csv", ".tsv")):
        raise BadInput(f"prompts file {path} is a table of text: convert it to JSONL or Parquet")
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        fix = "write one object per line, for instance by jq -c '.[]'"
        raise BadInput(f"prompts file {path} is one JSON array: {fix}")


def _parsed(line: str, *, where: str) -> dict:
    """Return the object in a line of JSONL. Raises BadInput."""
    rule = "every line must be one object"
    try:
        row = json.loads(line, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at column {error.colno}"
        raise BadInput(f"{where} is not JSON ({reason}): {rule}") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where} is not JSON ({error}): {rule}") from error
    if not isinstance(row, dict):
        raise BadInput(f"{where} is not an object: {rule}, with a prompt and a label")
    return row


def _object(pairs: list[tuple[str, Any]]) -> dict:
    """Return the object of these (name, value) pairs. Raises ValueError if a name is repeated."""
    value = dict(pairs)
    if len(value) < len(pairs):
        twice = next(name for at, (name, _) in enumerate(pairs) if name in dict(pairs[:at]))
        raise ValueError(f"the field {twice!r} is given twice")
    return value


def _parquet_rows(path: str) -> Iterator[tuple[str, dict]]:
    """Yield (file and row as errors name them, the row). Raises BadInput."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", row
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        # The last two: values that Python cannot represent, such as dates after the year 9999.
        raise BadInput(
            f"prompts file {path} cannot be read as Parquet after row {number}: {error}"
        ) from error


def value_at(row: dict, keys: tuple[str, ...], *, where: str, flag: str) -> Any:
    """Return the row's value at the first of these keys where it is neither null nor NaN.

    "reward_model.ground_truth" is row["reward_model"]["ground_truth"]. Returns None if the value is
    null at every key that the row has. Raises BadInput if the row has none of the keys.
    """
    has_one = False
    for key in keys:
        value, found = row, True
        for part in [key] if key in row else key.split("."):
            found = found and isinstance(value, dict) and part in value
            value = value[part] if found else None
        has_one = has_one or found
        if value is not None and not (isinstance(value, float) and math.isnan(value)):
            return value
    if has_one:
        return None
    null = " (null if the reward needs none)" if flag == "--label-key" else ""
    raise BadInput(
        f"{where} has no {' or '.join(keys)}{null}; its fields are {', '.join(row)}: name the "
        f"right one with {flag}, nested ones with dots"
    )


def cut_labels(rows: list[tuple[str, Sample]], after: str) -> list[str]:
    """Cut each label, in place, to the text after the last `after` in it.

    Nothing is done if no label of the file holds `after`. If some hold it, returns a problem for
    each row whose label does not hold it or ends with it; with a problem no label is changed.
    """
    if not any(_holds(sample.label, after) for _, sample in rows):
        return []
    labels, problems = [], []
    for where, sample in rows:
        has_mark = _holds(sample.label, after)
        labels.append(sample.label.rpartition(after)[2].strip() if has_mark else "")
        if not has_mark:
            problems.append(
                f"{where}: the label {_shown(sample.label)} does not hold --label-after {after!r}, "
                "as other labels of the file do: correct or remove the row"
            )
        elif not labels[-1]:
            problems.append(
                f"{where}: nothing follows --label-after {after!r} in the label "
                f"{_shown(sample.label)}: correct or remove the row"
            )
    if not problems:
        for (_, sample), label in zip(rows, labels):
            sample.label = label
    return problems


def _holds(label: Any, after: str) -> bool:
    return bool(after) and isinstance(label, str) and after in label


def _unfit_labels(
    rows: list[tuple[str, Sample]], label_problems: LabelProblems | None
) -> list[str]:
    """Return a problem for each row whose label cannot be judged."""
    if label_problems is None:
        return []
    phrases = label_problems([sample.label for _, sample in rows])
    return [
        f"{where}: the label {_shown(sample.label)} {phrase}"
        for (where, sample), phrase in zip(rows, phrases, strict=True)
        if phrase
    ]


def _shown(value: Any) -> str:
    """Return a value as an error shows it, cut to SHOWN_CHARACTERS."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"
