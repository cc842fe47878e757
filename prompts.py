"""Prompt data -> Samples without a response: files, generated problems, mixtures of them. All of it is checked before anything is started.

    toy                            the toy's additions, endless                                                     what --prompts and --eval-prompts take
    FILE.jsonl, FILE.parquet       a prompt a row; endless passes over the file, each in a new order
    reasoning-gym:TASK             the problems of a task of that package, endless; see reasoning_gym_tasks.py
    any of these with :WEIGHT      in a mixture: how often it is drawn, over the sum of the weights; 1 unless given

A row holds a prompt (text, or a list of chat messages), a label (null if the reward uses none), and optionally an object "metadata". The order of prompts and
what is drawn from a mixture follow from the seed, the same on every rank. rollout.py must be imported first: it prepares transformers' import.
"""

import json
import math
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import orjson
from transformers import PreTrainedTokenizerBase

import reasoning_gym_tasks
from problems import BadInput, Problems, all_problems
from sample import DataSettings, Sample, encode, end_tokens, load_tokenizer
from toy.task import problems

GYM = "reasoning-gym:"
MOST_EVAL_SAMPLES = 100_000  # generated held-out prompts never end
ENGINE_KEEPS = 2  # positions of a model's context that SGLang does not use: it would cut such an answer short
SHOWN_ROWS = 5  # of a file's bad rows; a wrong file has thousands
PROBE = 64  # so many problems of a generated source are looked at before the start, for their lengths


# --- files ------------------------------------------------------------------------------------------------------------------------------------


@all_problems
def read_prompts(path: str, tokenizer: PreTrainedTokenizerBase | None, settings: DataSettings, *, name: str, max_prompt_tokens: float) -> list[Sample]:
    """All rows of a file as samples without a response. Raises BadInput naming the first rows that cannot be used.

    tokenizer: None where it could not be read; what needs it is then not looked at.
    """
    samples, bad = [], []
    for where, row in read_rows(path):
        try:
            samples.append(sample_of(row, tokenizer, settings, where=where, name=name, max_prompt_tokens=max_prompt_tokens))
        except BadInput as error:
            bad += error.problems
    yield from bad[:SHOWN_ROWS]
    if len(bad) > SHOWN_ROWS:
        yield f"{path}: {len(bad) - SHOWN_ROWS} more rows cannot be used"
    if not samples and not bad:
        yield f"{path} holds no prompts"
    if settings.label_after and not bad:
        cut_labels(samples, settings.label_after, path=path)
    return samples


def sample_of(row: dict | str, tokenizer: PreTrainedTokenizerBase | None, settings: DataSettings, *, where: str, name: str, max_prompt_tokens: float) -> Sample:
    """A row of a file, or its line, as a sample without a response. Raises BadInput."""
    row = _parsed(row, where=where) if isinstance(row, str) else row
    prompt = value_at(row, settings.prompt_key, where=where, flag="--prompt-key")
    label = value_at(row, settings.label_key, where=where, flag="--label-key")
    metadata = row.get("metadata")
    if not prompt:
        raise BadInput(f"{where} has no prompt: it needs a non-empty one, text or a list of chat messages")
    if not isinstance(metadata, dict | None):
        raise BadInput(f'{where}: "metadata" is a {type(metadata).__name__}; if given, it must be an object')
    try:
        orjson.dumps([prompt, label, metadata])
    except TypeError as error:
        raise BadInput(f"{where}: prompt, label and metadata must fit in a line of JSON ({error}): convert the field to text") from error
    text, ids = ("", [0]) if tokenizer is None else encode(prompt, tokenizer, settings, where=where)
    if not ids or len(ids) > max_prompt_tokens:
        raise BadInput(
            f"{where}: the prompt has {len(ids)} tokens; it must have 1 to {max_prompt_tokens} "
            "(the model's context less --max-response-tokens, and 2 positions that SGLang keeps): shorten it or lower that flag"
        )
    return Sample(ids, text, label, metadata=metadata or {}, source=name)


def read_rows(path: str) -> Iterator[tuple[str, dict | str]]:
    """(file and row as an error names them, the row or its line) of a Parquet or JSONL file, one after the other. Raises BadInput."""
    if not os.path.isfile(path):  # False also for what cannot be a path, at which Path.is_file() raises
        raise BadInput(f"prompts file {path} does not exist: give a JSONL or Parquet file, or leave the flag out for the toy task")
    if path.endswith(".parquet"):
        yield from _parquet_rows(path)
        return
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path} line {number}", line
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"prompts file {path} cannot be read as UTF-8 text: {error}; a Parquet file's name must end in .parquet") from error


def _parsed(line: str, *, where: str) -> dict:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise BadInput(f"{where} is not JSON ({reason}): every line must be one object") from error
    if not isinstance(row, dict):
        raise BadInput(f"{where} is no object: every line must be one, with a prompt and a label")
    return row


def _parquet_rows(path: str) -> Iterator[tuple[str, dict]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise BadInput(f"prompts file {path} cannot be read as Parquet after row {number}: {error}") from error


def value_at(row: dict, keys: tuple[str, ...], *, where: str, flag: str) -> Any:
    """The row's value at the first of these dotted keys that it has: "reward_model.ground_truth" is row["reward_model"]["ground_truth"]. Raises BadInput."""
    for key in keys:
        value, found = row, True
        for part in [key] if key in row else key.split("."):
            found = found and isinstance(value, dict) and part in value
            value = value[part] if found else None
        if found:
            return value
    null = " (null if the reward uses none)" if flag == "--label-key" else ""
    raise BadInput(f"{where} has no {' or '.join(keys)}{null}; its fields are {', '.join(row)}: name the right one with {flag}, nested ones with dots")


def cut_labels(samples: list[Sample], after: str, *, path: str) -> None:
    """Make each label what stands after the last `after` in it, in a file whose labels hold that; raises BadInput if only some of them do."""
    whole = [sample.label for sample in samples if after not in str(sample.label)]
    if len(whole) == len(samples):
        return
    if whole:
        raise BadInput(f"{path}: {len(whole)} of {len(samples)} labels do not hold --label-after {after!r}, the first is {whole[0]!r}: mend or remove them")
    for sample in samples:
        sample.label = str(sample.label).rpartition(after)[2].strip()


def shuffled(samples: list[Sample], *, seed: int) -> Iterator[Sample]:
    """Endless passes over a file's prompts, each in a new seeded order, the same on every rank."""
    rng = random.Random(seed)
    while True:
        for i in rng.sample(range(len(samples)), len(samples)):
            yield samples[i]


# --- generated problems -----------------------------------------------------------------------------------------------------------------------


def generated(rows: Iterator[dict], tokenizer: PreTrainedTokenizerBase, settings: DataSettings, *, name: str) -> Iterator[Sample]:
    """Endless problems, rows with a prompt, a label and perhaps notes, as samples without a response."""
    for group, row in enumerate(rows):
        text, ids = encode(row["prompt"], tokenizer, settings, where=name)
        yield Sample(ids, text, row["label"], group, source=name, notes=row.get("notes", {}))


def toy_prompts(tokenizer: PreTrainedTokenizerBase, settings: DataSettings, *, seed: int, held_out: bool) -> Iterator[Sample]:
    """Endless problems of the toy task."""
    return generated(problems(seed=seed, held_out=held_out), tokenizer, settings, name="toy")


def fitting(stream: Iterator[Sample], *, name: str, max_prompt_tokens: int) -> tuple[Iterator[Sample], int]:
    """A generated stream, and the length of its longest prompt: of the first PROBE that is; later prompts that are longer are passed over."""
    first = list(islice(stream, PROBE))
    longest = max(len(sample.prompt_ids) for sample in first)
    if longest > max_prompt_tokens:
        room = f"{max_prompt_tokens}, the model's context less --max-response-tokens, and 2 positions that SGLang keeps"
        raise BadInput(f"a prompt of {name} has {longest} tokens, more than {room}: lower that flag")
    return (sample for sample in chain(first, stream) if len(sample.prompt_ids) <= longest), longest


# --- what a run generates from ----------------------------------------------------------------------------------------------------------------


@dataclass
class Data:
    """What a run generates from."""

    tokenizer: PreTrainedTokenizerBase
    stream: Iterator[Sample]
    held_out: list[Sample]
    """Evaluation prompts of all sets, one after the other; empty where there are none."""
    end_ids: list[int]
    """Tokens that end a response."""
    longest: int
    """Prompt and response tokens of the longest possible sample."""
    seed: int


@all_problems
def load_data(model_folder: str, settings: DataSettings, config: dict | None, *, seed: int) -> Data:
    """Tokenizer and prompts, all checked. Raises BadInput. config: None where it could not be read; the form of files is checked all the same."""
    found = Problems()
    tokenizer = None if config is None else found.of(load_tokenizer, model_folder)
    if tokenizer is not None and len(tokenizer) > config["vocab_size"]:
        yield f"{model_folder}: the tokenizer has {len(tokenizer)} tokens, the model {config['vocab_size']}: they do not belong together"
    room = math.inf if config is None else config["max_position_embeddings"] - ENGINE_KEEPS - settings.max_response_tokens
    eval_samples = min(max(settings.eval_samples, 0), MOST_EVAL_SAMPLES)
    streams, held_out, longest = [], [], 0

    def opened(given: str, name: str, *, is_eval: bool) -> tuple[Iterator[Sample], int]:
        """Prompts and the length of the longest: endless ones, or for evaluation those of a file in its order."""
        if given != "toy" and not given.startswith(GYM):
            samples = read_prompts(given, tokenizer, settings, name=name, max_prompt_tokens=room)
            return iter(samples) if is_eval else shuffled(samples, seed=seed), max(len(sample.prompt_ids) for sample in samples)
        if tokenizer is None:
            return iter(()), 0
        if given == "toy":
            stream = toy_prompts(tokenizer, settings, seed=0 if is_eval else seed, held_out=is_eval)
        else:
            rows = reasoning_gym_tasks.problems(given.removeprefix(GYM), seed="held-out" if is_eval else seed)
            stream = generated(rows, tokenizer, settings, name=name)
        return fitting(stream, name=name, max_prompt_tokens=room)

    sources = found.of(weighted, settings.prompts) or {}
    for given, name in (found.of(names, list(sources), flag="--prompts") or {}).items():
        stream, length = found.of(opened, given, name, is_eval=False) or (iter(()), 0)
        streams, longest = [*streams, stream], max(longest, length)
    for given in settings.eval_prompts:
        if given.rpartition(":")[0] and given not in (found.of(weighted, (given,), flag="--eval-prompts") or {}):
            yield f"--eval-prompts {given}: a held-out set has no weight, each is evaluated whole: leave the number out"
    own = [given for given in sources if given == "toy" or given.startswith(GYM)]
    for given, name in (found.of(names, list(settings.eval_prompts) or own, flag="--eval-prompts") or {}).items():
        prompts, length = found.of(opened, given, name, is_eval=True) or (iter(()), 0)
        held_out, longest = [*held_out, *islice(prompts, eval_samples)], max(longest, length)
    held_out = [replace(sample, group=group) for group, sample in enumerate(held_out)]
    end_ids = None if tokenizer is None else found.of(end_tokens, model_folder, tokenizer, settings.stop)
    yield from found.found
    return Data(tokenizer, mixture(streams, list(sources.values()), seed=seed), held_out, end_ids, longest + settings.max_response_tokens, seed)


def weighted(prompts: tuple[str, ...], *, flag: str = "--prompts") -> dict[str, float]:
    """("a.jsonl", "b.parquet:0.5") -> {"a.jsonl": 1.0, "b.parquet": 0.5}. Raises BadInput."""
    weights = {}
    for given in prompts:
        source, _, text = given.rpartition(":")
        try:
            source, weight = (source, float(text)) if source else (given, 1.0)
        except ValueError:
            source, weight = given, 1.0
        if not (0 < weight and math.isfinite(weight)):
            raise BadInput(f"{flag} {given}: the weight {text} must be a positive number")
        if source in weights:
            raise BadInput(f"{flag} {source} is given twice: give it once, with the sum of the weights")
        weights[source] = weight
    if not weights:
        raise BadInput(f"{flag} names nothing to learn from: give a file, or leave the flag out for the toy task")
    return weights


def names(sources: list[str], *, flag: str) -> dict[str, str]:
    """{"toy": "toy", "a/gsm8k/train.parquet": "gsm8k/train", "a/math/train.parquet": "math/train"}: short names that tell the sources apart."""
    if len(set(sources)) < len(sources):
        raise BadInput(f"{flag} {' '.join(sources)}: a source is given twice: give each once")
    paths = {source: Path(source.replace(GYM, "reasoning-gym/")) for source in sources}
    parts = {source: (*path.parent.parts, path.stem) for source, path in paths.items()}
    for n in range(1, max(map(len, parts.values()), default=0) + 1):
        short = {source: "/".join(parts[source][-n:]) for source in sources}
        if len(set(short.values())) == len(sources):
            return short
    return {source: source for source in sources}


def mixture(streams: list[Iterator[Sample]], weights: list[float], *, seed: int) -> Iterator[Sample]:
    """Prompts of all streams, each drawn with its weight, numbered in the order in which they are drawn."""
    rng = random.Random(f"mixture {seed}")
    for group in count():
        yield replace(next(rng.choices(streams, weights)[0]), group=group)
