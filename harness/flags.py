"""The command line -> settings: all mistakes are said at once, before anything heavy is imported.

tyro reads the flags. It stops at the first value that it cannot read, so after a failure each flag
is read alone, and what is wrong with each is said here, beside what the checks say of the others.
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

MOST_USED = (
    "model", "prompts", "reward", "steps", "prompts_per_step", "samples_per_prompt",
    "max_response_tokens", "lr", "tp", "name",
)  # fmt: skip
# What torchrun sets. A lone rank has port 0: its store takes a free one, and nobody else needs it.
ALONE = dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
# How other launchers say that they have started several processes.
OTHER_LAUNCHERS = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


@dataclass(frozen=True)
class Flag:
    """A field of the settings, as the command line has it."""

    name: str
    """--samples-per-prompt"""
    type: typing.Any
    default: typing.Any
    text: str
    """What it does."""
    stage: str
    """The heading of its stage in the help."""

    @property
    def words(self) -> list[str]:
        """--name, and for a switch --no-name too."""
        return [self.name, "--no-" + self.name[2:]] if self.type is bool else [self.name]


def parse_or_exit(settings_class: type, *checks: Callable):
    """Return the settings of this program's command line; end it, exit code 2, if they cannot work.

    With --help print all flags instead. Without torchrun the process becomes the only rank.
    checks: called with the settings, each raises BadInput.
    """
    if {"-h", "--help"} & set(sys.argv[1:]):
        if os.environ.get("RANK", "0") == "0":
            print(help_text(flags_of(settings_class), sys.modules["__main__"].__doc__ or ""))
        sys.exit(0)
    try:
        be_the_only_rank()
        return parse_settings(settings_class, *checks)
    except BadInput as error:
        end_refused(error)


def be_the_only_rank() -> None:
    """Set what torchrun would set for one rank, unless it has. Raises BadInput for half of it."""
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
    words, flags = sys.argv[1:], flags_of(settings_class)
    found, unread = ProblemList(), []
    found.texts += _odd_groups(words, flags)
    settings, complaint = _read(settings_class, words)
    if settings is None:
        kept = []
        for group in _groups(words):
            if _read(settings_class, group)[0] is not None:
                kept += group
                continue
            problem, about = _problem(group, flags)
            found.texts.append(problem)
            unread += about.words if about else []
            if about and about.type is bool and group[0] in about.words:
                kept.append(group[0])  # the switch alone is what was meant
        if not found.texts:
            raise BadInput(complaint)
        settings, _ = _read(settings_class, kept)
    if settings is not None:
        settings = process_groups.after_restart(settings)
    by_rules = ProblemList()
    for check in checks if settings is not None else ():
        by_rules.collect(check, settings)
    # A rule about a flag that could not be read has judged its default.
    told = re.compile("|".join(rf"{re.escape(word)}(?![\w-])" for word in unread) or r"(?!)")
    found.texts += [problem for problem in by_rules.texts if not told.search(problem)]
    found.raise_if_any()
    return settings


# --- reading ----------------------------------------------------------------------------------


@functools.cache
def flags_of(settings_class: type) -> list[Flag]:
    """Return all flags of a settings class, whose fields may be the settings of stages."""
    types_of = typing.get_type_hints(settings_class)
    stages = {name: kind for name, kind in types_of.items() if is_dataclass(kind)}
    if not stages:
        return _flags_of_stage(settings_class, None)
    own = settings_class()
    own_stages = [_flags_of_stage(stage, getattr(own, name)) for name, stage in stages.items()]
    return [flag for flags in own_stages for flag in flags]


def _flags_of_stage(stage: type, values) -> list[Flag]:
    """values: an instance, with this program's defaults; None: those of the class."""
    types_of, flags = typing.get_type_hints(stage), []
    annotated = typing.get_type_hints(stage, include_extras=True)
    for base in reversed([base for base in stage.__mro__ if is_dataclass(base)]):
        texts = _texts(base)
        for field in (field for field in fields(base) if field.name in base.__annotations__):
            default = field.default if values is None else getattr(values, field.name)
            text = texts.get(field.name) or _text_of_type(annotated[field.name])
            stage_text = (base.__doc__ or "").strip()
            name = "--" + field.name.replace("_", "-")
            flags.append(Flag(name, types_of[field.name], default, text, stage_text))
    return flags


def _texts(stage: type) -> dict[str, str]:
    """Return the text below each field of a dataclass."""
    body = ast.parse(textwrap.dedent(inspect.getsource(stage))).body[0].body
    return {
        field.target.id: " ".join(below.value.value.split())
        for field, below in zip(body, body[1:])
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr)
    }


def _text_of_type(kind) -> str:
    """Return the text that a type brings, by tyro.conf.arg: one that follows from a table."""
    metadata = getattr(kind, "__metadata__", ())
    return next((about.help for about in metadata if getattr(about, "help", None)), "")


def _read(settings_class: type, words: list[str]) -> tuple[typing.Any, str]:
    """Return (settings, ""), or (None, what tyro says) where it cannot read the words."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            config = (tyro.conf.OmitArgPrefixes,)
            return tyro.cli(settings_class, args=words, config=config), ""
    except SystemExit as end:
        if end.code == 0:  # --tyro-print-completion
            raise
        return None, said.getvalue()


def _groups(words: list[str]) -> Iterator[list[str]]:
    """Yield each flag with its values; first, what stands before all flags."""
    group = []
    for word in words:
        if word.startswith("-") and not _is_number(word) and group:
            yield group
            group = []
        group.append(word)
    if group:
        yield group


def _split(group: list[str]) -> tuple[str, list[str]]:
    """Return a flag as it was written, and its values, of which the first may follow a =."""
    name, separator, value = group[0].partition("=")
    return name, [value, *group[1:]] if separator else group[1:]


def _odd_groups(words: list[str], flags: list[Flag]) -> Iterator[str]:
    """Yield what tyro reads otherwise than meant.

    Of a list given twice it keeps the last, 1_000 is 1000 to Python, and no run has a size of more
    than 15 digits.
    """
    known, given = {word: flag for flag in flags for word in flag.words}, {}
    for group in _groups(words):
        name, values = _split(group)
        name = name.replace("_", "-")
        if (flag := known.get(name)) is None:
            continue
        numbers = {int, float} & {flag.type, *typing.get_args(flag.type)}
        for value in values if numbers else ():
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


def _problem(group: list[str], flags: list[Flag]) -> tuple[str, Flag | None]:
    """Return what is wrong with a flag and its values, and which flag was meant."""
    name, values = _split(group)
    known = {word: flag for flag in flags for word in flag.words}
    given = name.replace("_", "-")
    if not name.startswith("-"):
        return f"{_shown(group)} belongs to no flag: write --flag value", None
    if given not in known:
        given = "--" + given.lstrip("-")
        nearest = difflib.get_close_matches(given, known, n=1, cutoff=0.0)[0]
        is_near = difflib.SequenceMatcher(None, given, nearest).ratio() > 0.6
        text = f"{_shown([name])} is no flag of this program; the nearest is {nearest}"
        return text, known[nearest] if is_near else None
    flag = known[given]
    if flag.type is bool:
        use = " or ".join(flag.words)
        return f"{name} {_shown(values)}: a switch takes no value: write {use}", flag
    if not values:
        hint = f"; one that begins with - is written {name}=TEXT" if flag.type is str else ""
        return f"{name} needs a value, {_kind(flag.type)}{hint}", flag
    if len(values) > 1 and typing.get_origin(flag.type) is not tuple:
        extra = f"{name} {_shown(values)}: it takes one value, and here are {len(values)}"
        return f"{extra}; quote a text that holds blanks", flag
    each = " each" if len(values) > 1 else ""
    return f"{name} {_shown(values)} must{each} be {_kind(flag.type)}", flag


def _shown(values: list[str]) -> str:
    return " ".join(v if v.isprintable() and v and " " not in v else repr(v) for v in values)


def _kind(kind) -> str:
    """Return in words what a flag of a type takes."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return f"one of {', '.join(arguments)}"
    if typing.get_origin(kind) is tuple:
        return _kind(arguments[0])
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return f"{_kind(arguments[0])}, or None"
    return {int: "a whole number", float: "a number", str: "a text"}[kind]


# --- help -------------------------------------------------------------------------------------


def help_text(flags: list[Flag], about: str) -> str:
    """Return what --help prints: the most used flags, then the others by stage."""
    script, width = Path(sys.argv[0]).name, min(shutil.get_terminal_size().columns, 100)
    used = [flag for name in MOST_USED for flag in flags if flag.name[2:] == name.replace("_", "-")]
    stages = {"Most used": used} if used else {}
    for flag in flags:
        if flag not in used:
            stages.setdefault(flag.stage, []).append(flag)
    first = textwrap.fill(about.strip().split("\n\n")[0], width)
    lines = [f"usage: {script} [--flag value ...]", "", first] if first else []
    for stage, mine in stages.items():
        lines += ["", stage, *(line for flag in mine for line in _help_of(flag, width))]
    end = "A switch that is on is turned off by --no-NAME. Lists are divided by blanks."
    return "\n".join([*lines, "", end])


def _help_of(flag: Flag, width: int) -> list[str]:
    arguments, default = typing.get_args(flag.type), flag.default
    takes = {int: "N", float: "X", str: "TEXT", bool: ""}.get(flag.type, "")
    if typing.get_origin(flag.type) is typing.Literal:
        takes = "{" + ",".join(arguments) + "}"
    elif typing.get_origin(flag.type) is tuple:
        takes = {int: "[N ...]", str: "[TEXT ...]"}[arguments[0]]
    elif arguments:
        takes = "X"
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
    if flag.type is not bool and default not in (None, "", ()):
        shown = f" (default: {shown})"
    else:
        shown = ""
    indent = " " * 26
    text = textwrap.wrap(
        flag.text + shown, width, initial_indent=indent, subsequent_indent=indent,
        break_on_hyphens=False, break_long_words=False,
    )  # fmt: skip
    head = f"  {flag.name} {takes}".rstrip()
    if len(head) < len(indent) - 1 and text:
        return [head.ljust(len(indent)) + text[0].lstrip(), *text[1:]]
    return [head, *text]
