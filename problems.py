"""What is wrong with the input of a run: all of it is found before anything is started, and said at once.

A check is a generator that yields one text for each problem and goes on, so that a second mistake does not wait for the first to be mended:

    @all_problems
    def check_lamp(lamp, config):
        if lamp.watts <= 0:
            yield f"--watts {lamp.watts} must be positive"
        if config is not None and lamp.volts != config["volts"]:        # config: None where it could not be read; what needs it is left out
            yield ...

Called, it raises one BadInput with all its texts. A loop's main() gathers those of all checks in Problems.
"""

import functools
import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn


class BadInput(Exception):
    """What the user gave cannot work. Each of its problems names the value, the rule and the fix; they are shown without a traceback, exit code 2."""

    def __init__(self, *problems: str):
        super().__init__(*problems)
        self.problems = problems

    def __str__(self) -> str:
        return self.problems[0] if len(self.problems) == 1 else "\n  ".join([f"{len(self.problems)} problems:", *(f"- {text}" for text in self.problems)])


def all_problems(find: Callable) -> Callable:
    """Decorator of a generator that yields what is wrong, one text a problem, and goes on as far as it can; what follows from a problem it leaves out.

    A call returns what the generator returns, or raises one BadInput with all problems: with those of a BadInput too beyond which nothing can be found.
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


class Problems:
    """All that is wrong with the input of a run, found by one check after the other, and said at once."""

    def __init__(self):
        self.found: list[str] = []

    def of(self, check: Callable, *args, **kwargs):
        """What the check returns; None if it raises BadInput, whose problems are noted."""
        try:
            return check(*args, **kwargs)
        except BadInput as error:
            self.found += [problem for problem in error.problems if problem not in self.found]

    def refuse(self) -> None:
        """Raise BadInput if there are any."""
        if self.found:
            raise BadInput(*self.found)


def end_refused(error: BadInput) -> NoReturn:
    """Print what is wrong with the input, and end the program with exit code 2.

    All ranks usually see the same mistake. Rank 0 says it at once; torchrun then ends the others
    while they wait.
    """
    time.sleep(0 if os.environ.get("RANK", "0") == "0" else 3)
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(2)
