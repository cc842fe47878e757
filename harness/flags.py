"""Read the command line into settings, and report all mistakes together before heavy imports.

tyro reads the flags. It stops at the first value that it cannot read. After such a failure this
file reads each flag alone, reports every one that cannot be read, and lets the checks judge the
others.
"""

import ast
import contextlib
import difflib
import functools
import inspect
import io
import os
import re
import shutil
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path

import tyro

from common import process_groups
from common.errors import BadInput, ProblemList, end_refused

# Settings that --help lists first.
MOST_USED = (
    "model",
    "prompts",
    "reward",
    "steps",
    "prompts_per_step",
    "samples_per_prompt",
    "max_response_tokens",
    "lr",
    "tp",
    "name",
)
# Flags of other programs that would sample from a part of the vocabulary.
NARROWER = ("--top-p", "--top-k", "--min-p")
NOT_NARROWER = (
    "is not to be had: a token's log-prob must be over the tokens that it was sampled among, and"
    " the trainer computes it over the whole vocabulary: leave it out, or lower --temperature"
)
# The variables that torchrun sets, with their values for a lone rank. Port 0 lets its store take
# any free port; no other process has to know it.
ALONE = dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
# Variables in which other launchers tell how many processes they have started.
OTHER_LAUNCHERS = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


@dataclass(frozen=True)
class Flag:
    """One field of the settings, as it appears on the command line."""

    name: str
    """For instance --samples-per-prompt."""
    type: typing.Any
    default: typing.Any
    text: str
    """Its help: what the flag does."""
    stage: str
    """The heading of its stage in the help."""

    @property
    def words(self) -> list[str]:
        """Return how it may be written: --name, and for a switch also --no-name."""
        return [self.name, "--no-" + self.name[2:]] if self.is_switch else [self.name]

    @property
    def is_switch(self) -> bool:
        """Return whether it needs no value; --resume may have one."""
        return bool in (self.type, *typing.get_args(self.type))

    @property
    def values(self) -> list[str]:
        """Return the values that a switch may have."""
        kinds = typing.get_args(self.type)
        return [value for kind in kinds for value in typing.get_args(kind)]


def parse_or_exit(settings_class: type, *checks: Callable):
    """Return the settings of this program's command line. End it, exit code 2, if they cannot work.

    With --help print all flags and end. Without torchrun this process becomes the only rank.
    checks: functions of the settings that raise BadInput.
    """
    if {"-h", "--help"} & set(sys.argv[1:]):
        if os.environ.get("RANK", "0") == "0":
            print(help_text(flags_of(settings_class), sys.modules["__main__"].__doc__ or ""))
        sys.exit(0)
    try:
        be_the_only_rank()
        settings = parse_settings(settings_class, *checks)
    except BadInput as error:
        end_refused(error)
    if getattr(settings, "train", settings).tp > 1:  # tools/export.py has no stages
        # Megatron overlaps communication by the order of launches. CUDA reads it at its first call,
        # so before torch is imported.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    return settings


def be_the_only_rank() -> None:
    """Set the variables that torchrun would set for one rank, unless it has set them.

    Raises BadInput if only some of them are set, or if another launcher started several processes.
    """
    script = Path(sys.argv[0]).name
    command = f"`torchrun --nproc-per-node N {script}` for N ranks, `python {script}` for one"
    if "RANK" in os.environ:
        if missing := [name for name in ALONE if name not in os.environ]:
            yours = f"RANK is set, but {', '.join(missing)} is not"
            raise BadInput(f"{yours}: torchrun sets them all: use {command}, with RANK unset")
        rank, size, local = (os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        if not all(map(str.isdecimal, (rank, size, local))) or not int(rank) < int(size):
            yours = f"RANK {rank!r} of WORLD_SIZE {size!r}, LOCAL_RANK {local!r} is no rank"
            raise BadInput(f"{yours}: use {command}, with RANK unset")
        return
    for name in OTHER_LAUNCHERS:
        if os.environ.get(name, "1") != "1":
            why = f"{name} is {os.environ[name]}, but RANK is not set"
            raise BadInput(f"{why}, and so many runs of one rank would start: use {command}")
    os.environ.update(ALONE)


def parse_settings(settings_class: type, *checks: Callable):
    """Return the settings that sys.argv gives. Raises BadInput with all that is wrong with them."""
    flags = flags_of(settings_class)
    found, unread = ProblemList(), []
    found.texts += _misleading_groups(sys.argv[1:], flags)
    words = _spelled_out(sys.argv[1:], flags)
    settings, complaint = _read(settings_class, words)
    if settings is None:
        readable = []
        for group in _groups(words):
            if _read(settings_class, group)[0] is not None:
                readable += group
                continue
            problem, flag = _explain(group, flags)
            found.texts.append(problem)
            if flag is not None:
                unread += flag.words
                if flag.is_switch and group[0] in flag.words:
                    # The switch was meant, without its value.
                    readable += _spelled_out(group[:1], flags)
        if not found.texts:
            raise BadInput(complaint)
        settings, _ = _read(settings_class, readable)
    if settings is not None:
        settings = process_groups.after_restart(settings)
        found.texts += _judge(settings, checks, unread)
    found.raise_if_any()
    return settings


def _judge(settings, checks: tuple[Callable, ...], unread: list[str]) -> list[str]:
    """Return what the checks report, but for texts about flags that could not be read.

    Such a flag has its default here, which the user did not choose.
    """
    found = ProblemList()
    for check in checks:
        found.collect(check, settings)
    if not unread:
        return found.texts
    about_unread = re.compile("|".join(rf"{re.escape(word)}(?![\w-])" for word in unread))
    return [problem for problem in found.texts if not about_unread.search(problem)]


# --- reading ------------------------------------------------------------------------------------


@functools.cache
def flags_of(settings_class: type) -> list[Flag]:
    """Return all flags of a settings class. Its fields may be the settings of stages."""
    types_of = typing.get_type_hints(settings_class)
    stages = {name: kind for name, kind in types_of.items() if is_dataclass(kind)}
    if not stages:
        return _flags_of_stage(settings_class, None)
    defaults, flags = settings_class(), []
    for name, stage in stages.items():
        flags += _flags_of_stage(stage, getattr(defaults, name))
    return flags


def _flags_of_stage(stage: type, values) -> list[Flag]:
    """Return the flags of one stage, those of its base classes first.

    values: an instance with this program's defaults; None: the defaults of the class hold.
    """
    types_of, flags = typing.get_type_hints(stage), []
    annotated = typing.get_type_hints(stage, include_extras=True)
    for base in reversed(stage.__mro__):
        if not is_dataclass(base):
            continue
        texts, heading = _texts(base), (base.__doc__ or "").strip()
        for field in fields(base):
            if field.name not in base.__annotations__:
                continue  # inherited
            default = field.default if values is None else getattr(values, field.name)
            text = texts.get(field.name) or _text_of_type(annotated[field.name])
            name = "--" + field.name.replace("_", "-")
            flags.append(Flag(name, types_of[field.name], default, text, heading))
    return flags


def _texts(stage: type) -> dict[str, str]:
    """Return {field: the text below it} of a dataclass."""
    body = ast.parse(textwrap.dedent(inspect.getsource(stage))).body[0].body
    return {
        field.target.id: " ".join(below.value.value.split())
        for field, below in zip(body, body[1:])
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr)
    }


def _text_of_type(kind) -> str:
    """Return the help that a type has by tyro.conf.arg, as the types made from tables do."""
    metadata = getattr(kind, "__metadata__", ())
    return next((about.help for about in metadata if getattr(about, "help", None)), "")


def _read(settings_class: type, words: list[str]) -> tuple[typing.Any, str]:
    """Return (settings, ""), or (None, tyro's message) if it cannot read the words."""
    message, config = io.StringIO(), (tyro.conf.OmitArgPrefixes,)
    try:
        with contextlib.redirect_stderr(message):
            return tyro.cli(settings_class, args=words, config=config), ""
    except SystemExit as end:
        if end.code == 0:  # --tyro-print-completion
            raise
        return None, message.getvalue()


def _spelled_out(words: list[str], flags: list[Flag]) -> list[str]:
    """Return the words as tyro reads them: a switch that may have a value must have one."""
    spelled, known = [], {word: flag for flag in flags if flag.is_switch for word in flag.words}
    for group in _groups(words):
        name, values = _split(group)
        flag = known.get(name.replace("_", "-"))
        if flag and flag.values and not values:
            group = [flag.name, str(name.replace("_", "-") == flag.name)]
        spelled += group
    return spelled


def _groups(words: list[str]) -> Iterator[list[str]]:
    """Yield each flag with its values. Words before the first flag are a group too."""
    group = []
    for word in words:
        is_flag = word.startswith("-") and not _is_number(word)
        if is_flag and group:
            yield group
            group = []
        group.append(word)
    if group:
        yield group


def _split(group: list[str]) -> tuple[str, list[str]]:
    """Return (the flag as it was written, its values). The first value may follow a =."""
    name, separator, value = group[0].partition("=")
    return name, [value, *group[1:]] if separator else group[1:]


def _misleading_groups(words: list[str], flags: list[Flag]) -> Iterator[str]:
    """Yield the flags that tyro would read differently from what is probably meant.

    Of a list that is given twice tyro keeps only the last. Python reads 1_000 as 1000. No run has a
    size of more than 15 digits.
    """
    known, given = {word: flag for flag in flags for word in flag.words}, {}
    for group in _groups(words):
        name, values = _split(group)
        name = name.replace("_", "-")
        if (flag := known.get(name)) is None:
            continue
        if flag.values and name == flag.name and values in (["True"], ["False"]):
            yield _explain(group, flags)[0]
        numbers = {int, float} & {flag.type, *typing.get_args(flag.type)}
        if numbers:
            for value in values:
                if "_" in value or (value.lstrip("+-").isdigit() and len(value) > 15):
                    yield f"{name} {value}: write at most 15 digits, and no _"
        if typing.get_origin(flag.type) is tuple and values:
            if name in given:
                both = f"{_shown(given[name])} and {_shown(values)}"
                yield f"{name} is given twice, {both}: give all values after one {name}"
            given[name] = values


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _explain(group: list[str], flags: list[Flag]) -> tuple[str, Flag | None]:
    """Return (what is wrong with a flag and its values, the flag that was meant or None)."""
    name, values = _split(group)
    known = {word: flag for flag in flags for word in flag.words}
    given = name.replace("_", "-")
    if not name.startswith("-"):
        return f"{_shown(group)} belongs to no flag: write --flag value", None
    if given not in known:
        given = "--" + given.lstrip("-")
        if given in NARROWER and "--temperature" in known:
            return f"{_shown([given, *values])} {NOT_NARROWER}", None
        nearest = difflib.get_close_matches(given, known, n=1, cutoff=0.0)[0]
        is_near = difflib.SequenceMatcher(None, given, nearest).ratio() > 0.6
        text = f"{_shown([name])} is no flag of this program; the nearest is {nearest}"
        return text, known[nearest] if is_near else None
    flag = known[given]
    if flag.is_switch:
        use = " or ".join([*flag.words, *(f"{flag.name} {value}" for value in flag.values)])
        takes = f"no value but {', '.join(flag.values)}" if flag.values else "no value"
        return f"{name} {_shown(values)}: a switch takes {takes}: write {use}", flag
    if not values:
        hint = f"; one that begins with - is written {name}=TEXT" if flag.type is str else ""
        return f"{name} needs a value, {_kind(flag.type)}{hint}", flag
    if len(values) > 1 and typing.get_origin(flag.type) is not tuple:
        extra = f"{name} {_shown(values)}: it takes one value, and here are {len(values)}"
        return f"{extra}; quote a text that holds blanks", flag
    each = " each" if len(values) > 1 else ""
    return f"{name} {_shown(values)} must{each} be {_kind(flag.type)}", flag


def _shown(values: list[str]) -> str:
    """Join words for a message, with quotes around those that a reader could not tell apart."""
    return " ".join(v if v.isprintable() and v and " " not in v else repr(v) for v in values)


def _kind(kind) -> str:
    """Return in words which values a flag of this type takes."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return f"one of {', '.join(arguments)}"
    if typing.get_origin(kind) is tuple:
        return _kind(arguments[0])
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return f"{_kind(arguments[0])}, or None"
    return {int: "a whole number", float: "a number", str: "a text"}[kind]


# --- help ---------------------------------------------------------------------------------------


def help_text(flags: list[Flag], about: str) -> str:
    """Return what --help prints: the most used flags, then the others by stage.

    about: the docstring of the program, of which the first paragraph is printed.
    """
    script, width = Path(sys.argv[0]).name, min(shutil.get_terminal_size().columns, 100)
    by_name = {flag.name[2:].replace("-", "_"): flag for flag in flags}
    used = [by_name[name] for name in MOST_USED if name in by_name]
    stages = {"Most used": used} if used else {}
    for flag in flags:
        if flag not in used:
            stages.setdefault(flag.stage, []).append(flag)
    first = textwrap.fill(about.strip().split("\n\n")[0], width)
    lines = [f"usage: {script} [--flag value ...]", "", first] if first else []
    for stage, its_flags in stages.items():
        lines += ["", stage]
        for flag in its_flags:
            lines += _help_of(flag, width)
    end = "A switch that is on is turned off by --no-NAME. Lists are divided by blanks."
    return "\n".join([*lines, "", end])


def _help_of(flag: Flag, width: int) -> list[str]:
    """Return the lines of one flag in the help."""
    indent = " " * 26
    text = textwrap.wrap(
        flag.text + _default_of(flag),
        width,
        initial_indent=indent,
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=False,
    )
    head = f"  {flag.name} {_placeholder(flag.type)}".rstrip()
    if len(head) < len(indent) - 1 and text:
        return [head.ljust(len(indent)) + text[0].lstrip(), *text[1:]]
    return [head, *text]


def _placeholder(kind) -> str:
    """Return what stands for the value of a flag in the help."""
    arguments = typing.get_args(kind)
    if bool in arguments:  # a switch that may have a value
        return f"[{','.join(typing.get_args(arguments[1]))}]"
    if typing.get_origin(kind) is typing.Literal:
        return "{" + ",".join(arguments) + "}"
    if typing.get_origin(kind) is tuple:
        return {int: "[N ...]", str: "[TEXT ...]"}[arguments[0]]
    if arguments:  # float | None
        return "X"
    return {int: "N", float: "X", str: "TEXT", bool: ""}[kind]


def _default_of(flag: Flag) -> str:
    """Return the default in brackets; "" for a switch and for a flag without one."""
    if flag.is_switch or flag.default in (None, "", ()):
        return ""
    is_list = isinstance(flag.default, tuple)
    return f" (default: {' '.join(map(str, flag.default)) if is_list else flag.default})"
