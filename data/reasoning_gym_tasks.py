"""The problems and scorers of reasoning-gym: --prompts reasoning-gym:TASK, --reward reasoning_gym.

The package is optional; an error gives its install line.

A task makes a problem from a seed and an index. A sample carries task, seed and index instead of
the problem, and the judge makes the problem again. So JSON and checkpoints cannot change it: two
tasks score a right answer 0.05 if their problem has gone through JSON, where tuples become lists.

The scorer judges the text in the last <answer> tags of a response, or all of it if there are none.
Use --system-prompt to ask for the tags. Scorers may give a part of 1: most give len(answer) /
len(response) to a response that holds the answer among other text.
"""

import zlib
from collections.abc import Iterator
from functools import lru_cache
from itertools import count

from common.errors import BadInput

INSTALL = "pip install reasoning-gym==0.1.25"
# Problems in one of the package's datasets. Problem i of a dataset with seed s is made from s + i.
# So each dataset gets a seed that is far from all others.
CHUNK = 500

_EVALUATES = "its scorer runs the model's answer as Python (eval, or SymPy's parse_expr)"
_UNSTABLE = "its problems differ from one process to the next, so no run could be repeated"
REFUSED = {
    "binary_matrix": _EVALUATES,
    "countdown": _EVALUATES,
    "intermediate_integration": _EVALUATES,
    "n_queens": _EVALUATES,
    "polynomial_multiplication": _EVALUATES,
    "puzzle24": _EVALUATES,
    "simple_integration": _EVALUATES,
    "spiral_matrix": _EVALUATES,
    "string_insertion": _EVALUATES,
    "isomorphic_strings": _UNSTABLE,
    "knight_swap": _UNSTABLE,
    "ransom_note": _UNSTABLE,
    "word_ladder": _UNSTABLE,
    "composite": "it needs a configuration: name the tasks themselves",
}


def problems(task: str, *, seed: int | str) -> Iterator[dict]:
    """Return endless rows: {"prompt": str, "label": str, "notes": {"reasoning_gym": [...]}}.

    The note is [task, seed, index], the arguments of score. Raises BadInput for a task that cannot
    be used.
    """
    try:
        import reasoning_gym
    except ImportError as error:
        raise BadInput(
            f"reasoning-gym:{task} needs the package reasoning-gym ({error}): {INSTALL}"
        ) from error
    known = reasoning_gym.factory.DATASETS
    if task not in known:
        choice = ", ".join(sorted(set(known) - set(REFUSED)))
        raise BadInput(f"reasoning-gym:{task} is not a task of reasoning-gym; it has {choice}")
    if task in REFUSED:
        raise BadInput(f"reasoning-gym:{task} is refused: {REFUSED[task]}; choose another task")
    return (_row(task, seed, index) for index in count())


def score(response: str, task: str, seed: int | str, index: int) -> tuple[float, str]:
    """Return (the reward by the task's own scorer, the answer that it judged).

    Raises ValueError for a refused task, even if its name comes from a file.
    """
    if task in REFUSED:
        raise ValueError(f"reasoning-gym:{task} is refused: {REFUSED[task]}")
    from reasoning_gym.utils import extract_answer

    answer = extract_answer(response)
    answer = response.strip() if answer is None else answer
    dataset = _dataset(task, seed, index // CHUNK)
    reward = dataset.score_answer(answer=answer, entry=_problem(task, seed, index))
    return float(reward), answer


def _row(task: str, seed: int | str, index: int) -> dict:
    """Return a problem as a row of prompts."""
    problem = _problem(task, seed, index)
    return {
        "prompt": problem["question"],
        "label": problem["answer"],
        "notes": {"reasoning_gym": [task, seed, index]},
    }


@lru_cache(4096)
def _problem(task: str, seed: int | str, index: int) -> dict:
    return _dataset(task, seed, index // CHUNK)[index % CHUNK]


@lru_cache(64)
def _dataset(task: str, seed: int | str, chunk: int):
    """Return the package's dataset of the problems chunk * CHUNK to (chunk + 1) * CHUNK - 1."""
    import reasoning_gym

    seed_of_chunk = zlib.crc32(f"{task} {seed} {chunk}".encode()) // 2
    return reasoning_gym.create_dataset(task, seed=seed_of_chunk, size=CHUNK)
