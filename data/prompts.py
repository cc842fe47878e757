"""Prompt data -> Samples without a response: files, generated problems, mixtures of them.

All of it is checked before anything is started.

    toy                            the toy's additions, endless                                                     what --prompts and --eval-prompts take
    FILE.jsonl, FILE.parquet       a prompt a row; endless passes over the file, each in a new order
    reasoning-gym:TASK             the problems of a task of that package, endless; see reasoning_gym_tasks.py
    any of these with :WEIGHT      in a mixture: how often it is drawn, over the sum of the weights; 1 unless given

The order of prompts and what is drawn from a mixture follow from the seed, the same on every rank.
prompt_files.py says what a row holds. rollout.py must be imported first: it prepares transformers'
import.
"""

import hashlib
import math
import os
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, count, islice
from pathlib import Path

import orjson
from transformers import PreTrainedTokenizerBase

from common.errors import BadInput, ProblemList, all_problems
from common.settings import GYM, DataSettings, RunSettings, is_generated, parse_weights
from data import reasoning_gym_tasks
from data.chat import check_template_kwargs
from data.prompt_files import LabelProblems, read_prompts
from data.sample import Sample
from data.tokenizer import encode, end_tokens, load_tokenizer
from toy.task import problems

ENGINE_KEEPS = (
    2  # positions of a model's context that SGLang does not use: it would cut such an answer short
)
PROBE = (
    64  # so many problems of a generated source are looked at before the start, for their lengths
)


# --- sources ------------------------------------------------------------------------------------


def shuffled(samples: list[Sample], *, seed: int) -> Iterator[Sample]:
    """Endless passes over a file's prompts, each in a new seeded order, the same on every rank."""
    rng = random.Random(seed)
    while True:
        for i in rng.sample(range(len(samples)), len(samples)):
            yield samples[i]


# --- generated problems -------------------------------------------------------------------------


def generated(
    rows: Iterator[dict], tokenizer: PreTrainedTokenizerBase, settings: DataSettings, *, name: str
) -> Iterator[Sample]:
    """Endless problems, rows with a prompt, a label and perhaps notes, as samples without a
    response.

    Raises BadInput if one of the first PROBE cannot be a prompt; a later one is passed over.
    """
    for group, row in enumerate(rows):
        try:
            text, ids = encode(row["prompt"], tokenizer, settings, where=name)
        except BadInput:
            if group < PROBE:
                raise
            continue
        yield Sample(ids, text, row["label"], group, source=name, notes=row.get("notes", {}))


def toy_prompts(
    tokenizer: PreTrainedTokenizerBase, settings: DataSettings, *, seed: int, held_out: bool
) -> Iterator[Sample]:
    """Endless problems of the toy task."""
    return generated(problems(seed=seed, held_out=held_out), tokenizer, settings, name="toy")


def drop_long_prompts(
    stream: Iterator[Sample], *, name: str, max_prompt_tokens: int
) -> tuple[Iterator[Sample], int]:
    """A generated stream, and the length of its longest prompt: of the first PROBE that is; later
    prompts that are longer are passed over.
    """
    first = list(islice(stream, PROBE))
    longest = max(len(sample.prompt_ids) for sample in first)
    if longest > max_prompt_tokens:
        room = (
            f"{max_prompt_tokens}, the model's context less --max-response-tokens, and 2 positions"
            " that SGLang keeps"
        )
        raise BadInput(
            f"a prompt of {name} has {longest} tokens, more than {room}: lower that flag"
        )
    return (sample for sample in chain(first, stream) if len(sample.prompt_ids) <= longest), longest


def open_generated(
    given: str,
    name: str,
    tokenizer: PreTrainedTokenizerBase | None,
    settings: DataSettings,
    *,
    seed: int,
    is_eval: bool,
    room: float,
) -> tuple[Iterator[Sample], int, list]:
    """Return endless problems, the length of the longest prompt, and what the checksum is of: the
    first.
    """
    if tokenizer is None:
        return iter(()), 0, []
    if given == "toy":
        stream = toy_prompts(tokenizer, settings, seed=0 if is_eval else seed, held_out=is_eval)
    else:
        rows = reasoning_gym_tasks.problems(
            given.removeprefix(GYM), seed="held-out" if is_eval else seed
        )
        stream = generated(rows, tokenizer, settings, name=name)
    stream, length = drop_long_prompts(stream, name=name, max_prompt_tokens=room)
    first = list(islice(stream, PROBE))
    return chain(first, stream), length, [given, *first]


# --- what a run generates from ------------------------------------------------------------------


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
    digest: dict[str, str] = field(default_factory=dict)
    """Checksum of what was read from each source of --prompts, by its place there: "1", "2", …;
    wherever the file is.
    """


@all_problems
def check_held_out(settings: RunSettings, held_out: list | None) -> None:
    """Refuse --eval-only without held-out prompts. held_out: None where they could not be loaded."""
    if settings.eval_only and held_out == []:
        fix = "give --eval-prompts FILE, or raise --eval-samples"
        yield f"--eval-only has no held-out prompts to evaluate on: {fix}"


@all_problems
def load_data(
    model_folder: str,
    settings: DataSettings,
    config: dict | None,
    *,
    seed: int,
    label_problems: LabelProblems | None = None,
) -> Data:
    """Load tokenizer and prompts, all checked. Raises BadInput.

    config: None where it could not be read; the form of files is checked all the same.
    label_problems: for each of a file's labels "", or a phrase such as "is null, and --reward math
    needs one".
    """
    found = ProblemList()
    tokenizer = None if config is None else found.collect(load_tokenizer, model_folder)
    if tokenizer is not None:
        found.collect(check_template_kwargs, tokenizer, settings.chat_template_kwargs)
        if found.texts:  # said once, not for every row
            settings = replace(settings, chat_template_kwargs=())
    tokens = {} if tokenizer is None else tokenizer.get_vocab()  # may have gaps
    size = max(tokens.values(), default=-1) + 1
    if tokenizer is not None and size > config["vocab_size"]:
        yield (
            f"{model_folder}: the tokenizer has {size} tokens, the model {config['vocab_size']}:"
            " they do not belong together"
        )
    room = (
        math.inf
        if config is None
        else config["max_position_embeddings"] - ENGINE_KEEPS - settings.max_response_tokens
    )
    streams, held_out, longest, digest, marked = [], [], 0, {}, set()

    def open_source(given: str, name: str, *, is_eval: bool) -> tuple[Iterator[Sample], int, list]:
        if is_generated(given):
            return open_generated(
                given, name, tokenizer, settings, seed=seed, is_eval=is_eval, room=room
            )
        labels = dict(label_problems=label_problems, marked=marked)
        samples = read_prompts(
            given, tokenizer, settings, name=name, max_prompt_tokens=room, **labels
        )
        stream = iter(samples) if is_eval else shuffled(samples, seed=seed)
        return stream, max(len(sample.prompt_ids) for sample in samples), samples

    sources = parse_weights(settings.prompts)
    for given, name in short_names(list(sources)).items():
        stream, length, read = found.collect(open_source, given, name, is_eval=False) or (
            iter(()),
            0,
            [],
        )
        streams, longest = [*streams, stream], max(longest, length)
        digest[str(len(streams))] = checksum(sources[given], read)
    own = [given for given in sources if is_generated(given)]
    for given, name in short_names(list(settings.eval_prompts) or own).items():
        prompts, length, _ = found.collect(open_source, given, name, is_eval=True) or (
            iter(()),
            0,
            [],
        )
        held_out, longest = (
            [*held_out, *islice(prompts, settings.eval_samples)],
            max(longest, length),
        )
    if settings.label_after and not marked and not found.texts:
        yield (
            f"--label-after {settings.label_after!r}: no label of any file holds it, so nothing"
            " would be cut: mend it or leave it out"
        )
    held_out = [replace(sample, group=group) for group, sample in enumerate(held_out)]
    end_ids = (
        None
        if tokenizer is None
        else found.collect(end_tokens, model_folder, tokenizer, settings.stop)
    )
    yield from found.texts
    stream = mixture(streams, list(sources.values()), seed=seed)
    return Data(
        tokenizer, stream, held_out, end_ids, longest + settings.max_response_tokens, seed, digest
    )


def checksum(weight: float, read: Iterable[str | Sample]) -> str:
    """Return a short checksum of a source: its weight, and all that was read from it but its place."""
    digest = hashlib.blake2b(repr(weight).encode(), digest_size=8)
    for part in read:
        plain = (
            part
            if isinstance(part, str)
            else [part.prompt_ids, part.prompt, part.label, part.metadata]
        )
        digest.update(orjson.dumps(plain) + b"\n")
    return digest.hexdigest()


def short_names(sources: list[str]) -> dict[str, str]:
    """{"toy": "toy", "a/gsm8k/train.parquet": "gsm8k/train", "a/math/train.parquet": "math/train"}:
    short names that tell the sources apart.

    Bytes of a path that are no UTF-8 are written out, as a sample's source must fit in JSON.
    """
    printable = {
        source: os.fsencode(source).decode("utf-8", "backslashreplace") for source in sources
    }
    paths = {
        source: Path(text.replace(GYM, "reasoning-gym/")) for source, text in printable.items()
    }
    parts = {source: (*path.parent.parts, path.stem) for source, path in paths.items()}
    for n in range(1, max(map(len, parts.values()), default=0) + 1):
        short = {source: "/".join(parts[source][-n:]) for source in sources}
        if len(set(short.values())) == len(sources):
            return short
    return printable


def mixture(
    streams: list[Iterator[Sample]], weights: list[float], *, seed: int
) -> Iterator[Sample]:
    """Prompts of all streams, each drawn with its weight, numbered in the order in which they are
    drawn.
    """
    rng = random.Random(f"mixture {seed}")
    for group in count():
        yield replace(next(rng.choices(streams, weights)[0]), group=group)
