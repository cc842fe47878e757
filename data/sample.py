"""A Sample is one prompt and its response. read_dump reads the samples that a run has saved."""

import base64
import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from common.errors import BadInput, read_file


DUMP_FIX = "give a folder that --save-rollouts of this version wrote"
AS_LONG_AS_THE_RESPONSE = ("response_ids", "rollout_logprobs", "loss_mask", "weight_versions")


def per_token_field() -> Any:
    """Declare a field of Sample that holds a number per response token, or [] until it is computed.

    per_token_names() lists these fields. The trainer gets each as float32 [T] under its name; see
    MicroBatch in backends/megatron/batches.py.
    """
    return field(default_factory=list, metadata={"per_token": True})


@dataclass
class Sample:
    """One prompt and, once generated, one response. It is plain data: one line of JSON holds it."""

    prompt_ids: list[int]
    prompt: str = ""
    label: Any = None
    group: int = -1
    """Number of the prompt in the run's prompt stream. Samples of one group answer one prompt."""
    index: int = 0
    """Index in the group; (group, index) identifies a sample."""
    response_ids: list[int] = field(default_factory=list)
    response: str = ""
    loss_mask: list[int] = field(default_factory=list)
    """Per response token: 1 if the policy sampled it; 0 if not, as for a tool's output."""
    weight_versions: list[int] = field(default_factory=list)
    """Per response token: version of the weights that sampled it."""
    finish_reason: str = ""
    """stop, length or abort, as SGLang reports it."""
    discarded: str = ""
    """Why the sample is not trained: rollout.DROPPED or REPLACED; "" if it is trained."""
    reward: float | None = None
    rollout_logprobs: Sequence[float] = per_token_field()
    """By the engine, at the sampling temperature."""
    old_logprobs: Sequence[float] = per_token_field()
    """By the trainer, before the first optimizer step on the batch. Empty if there is only one
    step: it starts from these very log-probs."""
    ref_logprobs: Sequence[float] = per_token_field()
    """By the frozen reference model, if there is one."""
    advantages: Sequence[float] = per_token_field()
    routed_experts: bytes = b""
    """Which experts each token of prompt and response took in the engine, but the last tokens that
    nothing was sampled after; see backends/routed_experts.py. Only with --routing-replay."""
    metadata: dict = field(default_factory=dict)
    """The row's object of that name, as it was read. The program never writes to it."""
    source: str = ""
    """Short name of the prompt's source: a file or a generator."""
    answer: str | None = None
    """The part of the response that the reward function judged; None if it does not say."""
    error: str = ""
    """Why the sample has no reward, or why the engine aborted it."""
    notes: dict = field(default_factory=dict)
    """What generators, rollouts and reward functions pass to one another, for instance the problem
    of reasoning-gym or the calls of a tool."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Numbers from a rollout; each step logs their means over its samples."""

    def __post_init__(self):
        if isinstance(self.routed_experts, str):  # as it stands in JSON
            self.routed_experts = base64.b64decode(self.routed_experts, validate=True)

    @property
    def is_part(self) -> bool:
        """Whether the sample is an earlier part of an answer; see split_off."""
        return "part_of" in self.notes

    @classmethod
    def per_token_names(cls) -> tuple[str, ...]:
        """Return the names of the fields that per_token_field() declares."""
        specs = dataclasses.fields(cls)
        return tuple(spec.name for spec in specs if spec.metadata.get("per_token"))

    def to_json(self) -> bytes:
        """Return the sample as one line of JSON, without the line break. Bytes become base64."""
        option = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS
        return orjson.dumps(self, default=_as_base64, option=option)

    @classmethod
    def from_json(cls, line: bytes | str) -> "Sample":
        """Return the sample that to_json wrote."""
        return cls(**orjson.loads(line))


def _as_base64(value: Any) -> str:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    raise TypeError(f"JSON cannot hold a {type(value).__name__}")


def by_group(samples: list[Sample]) -> list[list[Sample]]:
    """Return the samples of each prompt together, in order of first appearance."""
    groups = defaultdict(list)
    for sample in samples:
        groups[sample.group].append(sample)
    return list(groups.values())


def by_answer(samples: list[Sample]) -> list[list[Sample]]:
    """Return the samples of each answer together, in order of first appearance.

    They are one, but for answers that split_off has divided: the sample that was answered, which is
    judged, stands behind its parts. An answer whose own sample is missing is left out.
    """
    whole = {(s.group, s.index): [] for s in samples if not s.is_part}
    for sample in samples:
        if sample.is_part and (key := (sample.group, sample.notes["part_of"])) in whole:
            whole[key].append(sample)
    return [[*whole[s.group, s.index], s] for s in samples if not s.is_part]


def split_off(samples: list[Sample], sample: Sample) -> None:
    """Split off what a sample holds: append it to samples as a part of it, to be trained as well.

    For a rollout in which the prompt of a later turn is not all that was said before: a context
    that was shortened, or turns that do not see one another. The sample then begins anew, with
    the prompt that the rollout gives it. A part has an index of its own, and notes["part_of"], the
    index of its sample. It gets the reward that the sample gets. Both count as one answer in the
    statistics of the group; see reward.add_advantages.
    """
    index = 1 + max(other.index for other in samples if other.group == sample.group)
    part = dataclasses.replace(sample, index=index, metrics={})
    part.notes = {**sample.notes, "part_of": sample.index}
    samples.append(part)
    for spec in dataclasses.fields(Sample):
        if spec.name in AS_LONG_AS_THE_RESPONSE or spec.name in Sample.per_token_names():
            setattr(sample, spec.name, [])
    sample.response, sample.finish_reason, sample.routed_experts = "", "", b""


def read_dump(path: str | Path, *, vocab_size: int | None = None) -> list[Sample]:
    """Read the samples of a step as --save-rollouts writes them.

    vocab_size: of the model to be trained; None: token ids may have any size. Raises BadInput
    naming file, line and field.
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
            rule = "every line of a dump holds one sample"
            raise BadInput(f"{path} line {number} is not JSON ({error}): {rule}") from error
        if problem := next(_dump_problems(row, vocab_size), ""):
            raise BadInput(f"{path} line {number}: {problem}; {DUMP_FIX}")
        samples.append(Sample(**row))
    if not samples:
        raise BadInput(f"{path} holds no samples; {DUMP_FIX}")
    return samples


def _dump_problems(row: Any, vocab_size: int | None) -> Iterator[str]:
    """Yield why a line of a dump is not a sample that can be trained on."""
    if not isinstance(row, dict):
        yield "it is not an object, as a sample must be"
        return
    names = [spec.name for spec in dataclasses.fields(Sample)]
    yield from (f"{name!r} is not a field of a sample" for name in row if name not in names)
    yield from (f"the field {name!r} is missing" for name in names if name not in row)
    for name in ("prompt_ids", "response_ids", "loss_mask", "weight_versions"):
        yield from _element_problems(row, name, int, "an integer")
    for name in Sample.per_token_names():
        yield from _element_problems(row, name, (int, float), "a number")
    if not row["prompt_ids"]:
        yield "prompt_ids is empty"
    for name in ("prompt_ids", "response_ids"):
        for token in row[name]:
            if token < 0 or (vocab_size is not None and token >= vocab_size):
                rule = "a token id must be at least 0"
                if vocab_size is not None:
                    rule += f" and below the model's vocabulary, {vocab_size}"
                yield f"{name} holds {token}; {rule}"
    if row["discarded"] not in ("", "dropped", "replaced"):
        yield f"discarded is {row['discarded']!r}, and must be '', 'dropped' or 'replaced'"
    if any(value not in (0, 1) for value in row["loss_mask"]):
        yield "loss_mask holds a value other than 0 and 1"
    lengths = {name: len(row[name]) for name in AS_LONG_AS_THE_RESPONSE}
    if len(set(lengths.values())) > 1:
        shown = ", ".join(f"{name} {length}" for name, length in lengths.items())
        yield f"its lists differ in length; each must have one value per response token: {shown}"
    tokens = len(row["response_ids"])
    for name in Sample.per_token_names():
        if name not in lengths and len(row[name]) not in (0, tokens):
            yield f"{name} has {len(row[name])} values for {tokens} response tokens"
    kinds = dict(prompt=str, response=str, source=str, error=str, finish_reason=str)
    kinds |= dict(group=int, index=int, discarded=str, metadata=dict, notes=dict, metrics=dict)
    kinds |= dict(reward=(int, float, type(None)), answer=(str, type(None)))
    kinds |= dict(routed_experts=str)
    for name, kind in kinds.items():
        if not isinstance(row[name], kind) or isinstance(row[name], bool):
            yield f"{name} is a {type(row[name]).__name__}"
    try:
        base64.b64decode(row["routed_experts"], validate=True)
    except (TypeError, ValueError):  # binascii.Error is a ValueError
        yield "routed_experts is not base64"
    for name, value in row["metrics"].items():
        if not isinstance(value, (int, float)):
            yield f"metrics holds {value!r} for {name}, which is not a number"


def _element_problems(row: dict, name: str, kind: type | tuple, word: str) -> Iterator[str]:
    """Yield what is wrong with a field that must be a list of values of one kind."""
    if not isinstance(row[name], list):
        yield f"{name} is a {type(row[name]).__name__}; it must be a list"
        return
    for at, value in enumerate(row[name]):
        if not isinstance(value, kind) or isinstance(value, bool) or not math.isfinite(value):
            shown = "null" if value is None else repr(value)
            yield f"{name} holds {shown} at place {at}, which is not {word}"
