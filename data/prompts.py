"""Prompt data -> Samples without a response: files, generated problems, and mixtures of them.

--prompts and --eval-prompts take

    toy                         the additions of toy/task.py, endless
    FILE.jsonl, FILE.parquet    one prompt per row, see prompt_files.py; training passes over the
                                file again and again, each time in a new order
    reasoning-gym:TASK          the problems of a task, endless; see reasoning_gym_tasks.py
    any of these with :WEIGHT   its share in a mixture, over the sum of the weights; default 1

All of it is checked before anything is started. The order of prompts, and what is drawn from a
mixture, follow from the seed and are the same on every rank.
"""

import hashlib
import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, count, islice

import backends  # noqa: F401  before transformers, see data/tokenizer.py
import orjson
from transformers import PreTrainedTokenizerBase

from common.errors import BadInput, ProblemList, all_problems
from common.held_out import held_out_sets, short_names
from common.settings import GYM, DataSettings, RolloutSettings, is_generated, parse_weights
from data import reasoning_gym_tasks
from data.chat import check_template_kwargs
from data.prompt_files import LabelProblems, read_prompts
from data.sample import Sample
from data.tokenizer import encode, end_tokens, load_tokenizer
from toy.task import problems

# Positions of a model's context that SGLang does not use. A longer response would be cut short.
ENGINE_KEEPS = 2
# Problems of a generated source that are encoded before the start, to learn their lengths.
PROBE = 64


# --- files --------------------------------------------------------------------------------------


def shuffled(samples: list[Sample], *, seed: int) -> Iterator[Sample]:
    """Yield a file's prompts in endless passes, each in a new order that follows from the seed."""
    rng = random.Random(seed)
    while True:
        for i in rng.sample(range(len(samples)), len(samples)):
            yield samples[i]


def open_file(
    path: str,
    name: str,
    tokenizer: PreTrainedTokenizerBase | None,
    settings: DataSettings,
    *,
    seed: int,
    is_eval: bool,
    room: float,
    label_problems: LabelProblems | None,
    marked: set[str],
) -> tuple[Iterator[Sample], int, list]:
    """Return (prompts, the length of the longest prompt, what the checksum covers).

    Training prompts are endless and shuffled. Evaluation prompts come once, in the file's order.
    The checksum covers all rows. The other arguments are those of read_prompts.
    """
    samples = read_prompts(
        path,
        tokenizer,
        settings,
        name=name,
        max_prompt_tokens=room,
        label_problems=label_problems,
        marked=marked,
    )
    stream = iter(samples) if is_eval else shuffled(samples, seed=seed)
    return stream, max(len(sample.prompt_ids) for sample in samples), samples


# --- generated problems -------------------------------------------------------------------------


def generated(
    rows: Iterator[dict], tokenizer: PreTrainedTokenizerBase, settings: DataSettings, *, name: str
) -> Iterator[Sample]:
    """Yield endless problems as samples without a response.

    rows: each has "prompt", "label" and perhaps "notes". Raises BadInput if one of the first PROBE
    rows cannot be encoded; a later one is skipped.
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
    """Yield endless problems of the toy task as samples without a response."""
    return generated(problems(seed=seed, held_out=held_out), tokenizer, settings, name="toy")


def drop_long_prompts(
    stream: Iterator[Sample], *, name: str, max_prompt_tokens: int
) -> tuple[Iterator[Sample], int]:
    """Return (a generated stream, the length of its longest prompt in tokens).

    The first PROBE prompts set that length; later prompts that are longer are skipped. Raises
    BadInput if it exceeds max_prompt_tokens.
    """
    first = list(islice(stream, PROBE))
    longest = max(len(sample.prompt_ids) for sample in first)
    if longest > max_prompt_tokens:
        rule = (
            f"at most {max_prompt_tokens} fit (the model's context less --max-response-tokens, "
            f"and {ENGINE_KEEPS} positions that SGLang keeps)"
        )
        raise BadInput(f"a prompt of {name} has {longest} tokens; {rule}: lower that flag")
    kept = (sample for sample in chain(first, stream) if len(sample.prompt_ids) <= longest)
    return kept, longest


def open_generated(
    given: str,
    name: str,
    tokenizer: PreTrainedTokenizerBase | None,
    settings: DataSettings,
    *,
    seed: int,
    is_eval: bool,
    room: float,
    label_problems: LabelProblems | None,
) -> tuple[Iterator[Sample], int, list]:
    """Return (endless problems, the length of the longest prompt, what the checksum covers).

    The checksum covers the source's name and the first PROBE problems. room: the largest number of
    prompt tokens. Held-out problems do not depend on the seed. Raises BadInput if the reward can
    judge none of the first PROBE labels.
    """
    if tokenizer is None:
        return iter(()), 0, []
    if given == "toy":
        stream = toy_prompts(tokenizer, settings, seed=0 if is_eval else seed, held_out=is_eval)
    else:
        task = given.removeprefix(GYM)
        rows = reasoning_gym_tasks.problems(task, seed="held-out" if is_eval else seed)
        stream = generated(rows, tokenizer, settings, name=name)
    stream, length = drop_long_prompts(stream, name=name, max_prompt_tokens=room)
    first = list(islice(stream, PROBE))
    problems = label_problems([sample.label for sample in first]) if label_problems else [""]
    if all(problems) and not first[0].notes:  # a problem with notes has a scorer of its own
        raise BadInput(f"{name}: the label {first[0].label!r} {problems[0]}")
    return chain(first, stream), length, [given, *first]


# --- the data of a run --------------------------------------------------------------------------


@dataclass
class Data:
    """The tokenizer and the prompts of a run."""

    tokenizer: PreTrainedTokenizerBase
    stream: Iterator[Sample]
    """Training prompts, endless."""
    held_out: list[Sample]
    """Evaluation prompts of all sets, one set after the other; may be empty."""
    end_ids: list[int]
    """Tokens that end a response."""
    longest: int
    """Prompt and response tokens of the longest sample that may be trained."""
    seed: int
    longest_held_out: int = 0
    """Those of the longest sample of an evaluation."""
    digest: dict[str, str] = field(default_factory=dict)
    """Checksum of each source of --prompts, by its place there: "1", "2", …. It does not depend on
    where a file is."""
    prompts_of_a_pass: int | None = None
    """Training prompts of the one file; None if --prompts is a mixture, or endless."""


@all_problems
def load_data(
    model_folder: str,
    settings: RolloutSettings,
    config: dict | None,
    *,
    seed: int,
    label_problems: Callable[[str], LabelProblems | None] = lambda reward: None,
) -> Data:
    """Load and check the tokenizer and all prompts. Raises BadInput with all problems.

    config: the model's; None if it could not be read, which still lets the files' form be checked.
    label_problems: returns for a reward's name a function that returns for each label of a file "",
    or a phrase such as "is null, and --reward math needs text or a number". The name "" is the
    training's reward.
    """
    found = ProblemList()
    tokenizer = None if config is None else found.collect(load_tokenizer, model_folder)
    if tokenizer is not None:
        found.collect(check_template_kwargs, tokenizer, settings.chat_template_kwargs)
        if found.texts:  # leave them out below, or every row would report them again
            settings = replace(settings, chat_template_kwargs=())
        yield from _vocabulary_problems(model_folder, tokenizer, config)
    context = math.inf if config is None else config["max_position_embeddings"]
    marked = set()  # files with a label that holds --label-after

    def open_source(
        given: str, name: str, response_tokens: int, reward: str, *, is_eval: bool
    ) -> tuple[Iterator[Sample], int, list]:
        source = (given, name, tokenizer, settings)
        options = dict(seed=seed, is_eval=is_eval, room=context - ENGINE_KEEPS - response_tokens)
        options |= dict(label_problems=label_problems(reward))
        if is_generated(given):
            return open_generated(*source, **options)
        return open_file(*source, **options, marked=marked)

    nothing = (iter(()), 0, [])  # in place of a source that cannot be read
    streams, held_out, lengths, held_out_lengths, digest = [], [], [], [0], {}
    sources = parse_weights(settings.prompts)
    for given, name in short_names(list(sources)).items():
        how = dict(response_tokens=settings.max_response_tokens, reward="", is_eval=False)
        stream, length, read = found.collect(open_source, given, name, **how) or nothing
        streams.append(stream)
        lengths.append(length + settings.max_response_tokens)
        digest[str(len(streams))] = checksum(sources[given], read)
    is_file = len(sources) == 1 and not any(map(is_generated, sources))
    for of_set in held_out_sets(settings):
        how = dict(response_tokens=of_set.max_response_tokens, reward=of_set.reward, is_eval=True)
        opened = found.collect(open_source, of_set.source, of_set.name, **how) or nothing
        stream, length, _ = opened
        held_out += islice(stream, settings.eval_samples)
        held_out_lengths.append(length + of_set.max_response_tokens)
    if settings.label_after and not marked and not found.texts:
        yield (
            f"--label-after {settings.label_after!r}: no label of any file holds it, so nothing "
            "would be cut: correct it or leave it out"
        )
    held_out = [replace(sample, group=group) for group, sample in enumerate(held_out)]
    end_ids = None
    if tokenizer is not None:
        end_ids = found.collect(end_tokens, model_folder, tokenizer, settings.stop)
    yield from found.texts
    return Data(
        tokenizer,
        mixture(streams, list(sources.values()), seed=seed),
        held_out,
        end_ids,
        longest=max(lengths),
        longest_held_out=max(held_out_lengths),
        seed=seed,
        digest=digest,
        prompts_of_a_pass=len(read) if is_file else None,
    )


def _vocabulary_problems(
    model_folder: str, tokenizer: PreTrainedTokenizerBase, config: dict
) -> Iterator[str]:
    """Yield a problem if the tokenizer has tokens that the model does not know."""
    size = max(tokenizer.get_vocab().values(), default=-1) + 1  # ids may have gaps
    if size > config["vocab_size"]:
        yield (
            f"{model_folder}: the tokenizer has {size} tokens, the model {config['vocab_size']}; "
            "they do not belong together: copy the model's own tokenizer there"
        )


def checksum(weight: float, read: Iterable[str | Sample]) -> str:
    """Return a short checksum of a source: its weight, and what was read except its location."""
    digest = hashlib.blake2b(repr(weight).encode(), digest_size=8)
    for part in read:
        if isinstance(part, Sample):
            part = [part.prompt_ids, part.prompt, part.label, part.metadata]
        digest.update(orjson.dumps(part) + b"\n")
    return digest.hexdigest()


def mixture(
    streams: list[Iterator[Sample]], weights: list[float], *, seed: int
) -> Iterator[Sample]:
    """Yield prompts drawn from all streams with these weights, numbered as groups in that order."""
    rng = random.Random(f"mixture {seed}")
    for group in count():
        yield replace(next(rng.choices(streams, weights)[0]), group=group)
