"""What is wrong with the input of a run: all of it is found before anything is started, and said at
once.

A check is a generator that yields one text for each problem and goes on, so that a second mistake
does not wait for the first to be mended:

    @all_problems
    def check_lamp(lamp, config):
        if lamp.watts <= 0:
            yield f"--watts {lamp.watts} must be positive"
        if config is not None and lamp.volts != config["volts"]:        # config: None where it could not be read; what needs it is left out
            yield ...

Called, it raises one BadInput with all its texts. A loop's main() gathers those of all checks in
ProblemList.
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

RANK_0_SPEAKS_WITHIN_S = 10.0  # ranks of a busy machine do not start together
SMALL_FILE = 64 * 2**20  # bytes; the largest index of a published model has some ten million
KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe (FIFO)", stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
}  # fmt: skip


class BadInput(Exception):
    """What the user gave cannot work.

    Each of its problems names the value, the rule and the fix; they are shown without a traceback,
    exit code 2.
    """

    def __init__(self, *problems: str):
        super().__init__(*problems)
        self.problems = problems

    def __str__(self) -> str:
        return (
            self.problems[0]
            if len(self.problems) == 1
            else "\n  ".join(
                [f"{len(self.problems)} problems:", *(f"- {text}" for text in self.problems)]
            )
        )


class EngineDied(Exception):
    """A process of the inference engine ended while it was needed."""


class ExportError(Exception):
    """What of an export could not be written. The rest of it is there."""


def engine_died() -> EngineDied:
    """Return what to raise when a process of this rank's engine has ended."""
    rank = os.environ.get("RANK", "0")
    return EngineDied(
        f"rank {rank}: a process of the SGLang engine died; its own error, if it left one, is "
        "printed above"
    )


def all_problems(find: Callable) -> Callable:
    """Decorator of a generator that yields what is wrong, one text a problem, and goes on as far as
    it can; what follows from a problem it leaves out.

    A call returns what the generator returns, or raises one BadInput with all problems: with those
    of a BadInput too beyond which nothing can be found.
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
    """All that is wrong with the input of a run, found by one check after the other, and said at
    once.
    """

    def __init__(self):
        self.texts: list[str] = []

    def collect(self, check: Callable, *args, **kwargs):
        """What the check returns; None if it raises BadInput, whose problems are noted."""
        try:
            return check(*args, **kwargs)
        except BadInput as error:
            self.texts += [problem for problem in error.problems if problem not in self.texts]

    def raise_if_any(self) -> None:
        """Raise BadInput if there are any."""
        if self.texts:
            raise BadInput(*self.texts)


def end_refused(error: BadInput) -> NoReturn:
    """Print what is wrong with the input, and end the program with exit code 2.

    All ranks usually see the same mistake. Rank 0 says it at once; torchrun then ends the others
    while they wait.
    """
    time.sleep(0 if os.environ.get("RANK", "0") == "0" else RANK_0_SPEAKS_WITHIN_S)
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(2)


# --- files --------------------------------------------------------------------------------------


def check_file(path: str | Path) -> None:
    """Raise BadInput unless a path names a regular file that may be read.

    A pipe would be waited for without end, and a device may be read without end.
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
    """Say why no model can be in a folder, "" if one can."""
    config = Path(folder) / "config.json"
    if not os.path.lexists(config):  # unlike Path.exists, it takes any text
        fix = "give a Hugging Face model folder on this machine (hub names are not resolved)"
        return f"{flag} {folder} has no config.json: {fix}"
    try:
        check_file(config)
    except BadInput as error:
        return f"{flag} {folder}: {error}"
    return ""


def file_problem(path: str) -> str:
    """Say why a file of prompts cannot be opened, "" if it can."""
    if os.path.isdir(path):
        return f"prompts file {path} is a folder: name the JSONL or Parquet files in it"
    if not os.path.lexists(path):  # False also for what cannot be a path
        fix = "give a JSONL or Parquet file, or leave the flag out for the toy task"
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
        raise BadInput(
            f"{path} cannot be read ({error.strerror}): mend that, or copy it again"
        ) from error


def read_json(path: str | Path) -> Any:
    """Return what a small JSON file holds. Raises BadInput naming the file."""
    return parse_json(read_file(path), where=path)


def parse_json(text: bytes | str, *, where: str | Path) -> Any:
    """Return the value of a JSON text. Raises BadInput naming where it stands.

    RecursionError: thousands of brackets within one another.
    """
    try:
        return json.loads(text if isinstance(text, str) else text.decode())  # UTF-8, and no BOM
    except (ValueError, RecursionError) as error:  # ValueError: also bytes that are no UTF-8
        raise BadInput(f"{where} is not JSON ({error}): mend it, or copy it again") from error
