"""The project's exceptions, and how the checks of a run's input work together.

A check is a generator that yields one text for each problem. It goes on after a problem, so that
the user sees all mistakes at once:

    @all_problems
    def check_lamp(lamp, config):
        if lamp.watts <= 0:
            yield f"--watts {lamp.watts} must be positive: give at least 1"
        if config is not None and lamp.volts != config["volts"]:
            yield ...

Each text names the value, the rule and the fix. A value that could not be read is None, as config
may be above: a check skips the rules that need it.

all_problems turns the generator into a function. A call returns what the generator returns, or
raises one BadInput with all its texts. ProblemList gathers the texts of several checks: collect()
calls a check and keeps the texts of its BadInput, and raise_if_any() raises them all as one.
"""

import functools
import json
import os
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from common.processes import forgo_restarts

RANK_0_SPEAKS_WITHIN_S = 10.0  # ranks of a busy machine do not start together
SMALL_FILE = 64 * 2**20  # bytes; the largest index of a published model has about ten million
KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe (FIFO)", stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
}  # fmt: skip


class BadInput(Exception):
    """The user's input cannot work.

    The program prints the problems without a traceback and ends with exit code 2.
    """

    def __init__(self, *problems: str):
        super().__init__(*problems)
        self.problems = problems

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return self.problems[0]
        lines = [f"{len(self.problems)} problems:", *(f"- {text}" for text in self.problems)]
        return "\n  ".join(lines)


class EngineDied(Exception):
    """A process of the inference engine ended while it was needed."""


class ExportError(Exception):
    """A part of an export could not be written. The other parts are there."""


def engine_died() -> EngineDied:
    """Return the exception to raise when a process of this rank's engine has ended."""
    rank = os.environ.get("RANK", "0")
    return EngineDied(
        f"rank {rank}: a process of the SGLang engine died; its own error, if it left one, is "
        "printed above"
    )


def all_problems(find: Callable) -> Callable:
    """Decorate a generator of problems, so that a call raises one BadInput that lists all of them.

    Without a problem the call returns what the generator returns. A generator that cannot go on
    may raise BadInput itself: the texts of that are added to the list.
    """

    @functools.wraps(find)
    def check(*args, **kwargs):
        problems, finding = [], find(*args, **kwargs)
        try:
            while True:
                problems.append(next(finding))
        except StopIteration as end:
            result = end.value
        except BadInput as error:
            problems += error.problems
        if problems:
            raise BadInput(*problems)
        return result

    return check


class ProblemList:
    """The problems that several checks found, to be shown together."""

    def __init__(self):
        self.texts: list[str] = []

    def collect(self, check: Callable, *args, **kwargs):
        """Call a check and return its result. If it raises BadInput, keep its texts, return None.

        A text that is already in the list is not added again.
        """
        try:
            return check(*args, **kwargs)
        except BadInput as error:
            self.texts += [text for text in error.problems if text not in self.texts]

    def raise_if_any(self) -> None:
        """Raise one BadInput with all texts, if there are any."""
        if self.texts:
            raise BadInput(*self.texts)


def end_refused(error: BadInput) -> NoReturn:
    """Print what is wrong with the input, and end the program with exit code 2, for good.

    All ranks usually find the same mistake. The others wait, so that rank 0 prints it alone;
    torchrun then ends them.
    """
    time.sleep(0 if os.environ.get("RANK", "0") == "0" else RANK_0_SPEAKS_WITHIN_S)
    print(f"error: {error}", file=sys.stderr, flush=True)
    forgo_restarts()
    sys.exit(2)


def flag_of(name: str) -> str:
    """Return the flag of a setting."""
    return "--" + name.replace("_", "-")


# --- files --------------------------------------------------------------------------------------


def check_file(path: str | Path) -> None:
    """Raise BadInput unless a path names a regular file that this user may read.

    Reading a pipe can block forever, and a device may never end.
    """
    if os.path.islink(path) and not os.path.exists(path):
        raise BadInput(
            f"{path} is a broken link (to {os.readlink(path)}): put the file itself there"
        )
    try:
        kind = KINDS.get(stat.S_IFMT(os.stat(path).st_mode))
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        why = getattr(error, "strerror", None) or error
        raise BadInput(f"{path} cannot be read ({why}): give a file that is there") from error
    if kind is not None:
        raise BadInput(f"{path} is {kind}, and must be a regular file: put the file itself there")
    if not os.access(path, os.R_OK):
        raise BadInput(f"{path} may not be read by this user: change its permissions")


def model_problem(folder: str | Path, *, flag: str = "--model") -> str:
    """Return why a folder cannot hold a model; "" if it can."""
    config = Path(folder) / "config.json"
    if not os.path.lexists(config):  # unlike Path.exists, it takes any text
        fix = "give a Hugging Face model folder, or a name of the hub, as Qwen/Qwen3-0.6B"
        return f"{flag} {folder} has no config.json: {fix}"
    try:
        check_file(config)
    except BadInput as error:
        return f"{flag} {folder}: {error}"
    return ""


def file_problem(path: str) -> str:
    """Return why a file of prompts cannot be opened; "" if it can."""
    if os.path.isdir(path):
        return f"prompts file {path} is a folder: name the JSONL or Parquet files in it"
    if not os.path.lexists(path):  # False also for text that cannot be a path
        fix = "give a JSONL or Parquet file, or a dataset of the hub as OWNER/NAME:SPLIT@REVISION"
        return f"prompts file {path} does not exist: {fix}"
    try:
        check_file(path)
    except BadInput as error:
        return f"prompts file {error}"
    return ""


def read_file(path: str | Path, *, most: float = SMALL_FILE) -> bytes:
    """Return the bytes of a regular file. Raises BadInput, also for more than `most` bytes."""
    check_file(path)
    try:
        if (size := os.path.getsize(path)) > most:
            raise BadInput(f"{path} has {size} bytes, more than {most}: it is no file of this kind")
        return Path(path).read_bytes()
    except OSError as error:
        fix = "correct that, or copy it again"
        raise BadInput(f"{path} cannot be read ({error.strerror}): {fix}") from error


def read_json(path: str | Path) -> Any:
    """Return the value in a small JSON file. Raises BadInput naming the file."""
    return parse_json(read_file(path), where=path)


def parse_json(text: bytes | str, *, where: str | Path) -> Any:
    """Return the value of a JSON text. Raises BadInput naming `where`, the place of the text."""
    try:
        return json.loads(text if isinstance(text, str) else text.decode())  # UTF-8, and no BOM
    except (ValueError, RecursionError) as error:
        # ValueError: no JSON, or no UTF-8. RecursionError: thousands of nested brackets.
        raise BadInput(f"{where} is not JSON ({error}): correct it, or copy it again") from error
