"""Problems of reasoning-gym and its scorers: --prompts reasoning-gym:TASK, --reward reasoning_gym.

The package is optional; an error names its install line.

A task makes a problem from a seed and an index. A sample carries these three and not the problem:
whoever judges it makes the problem again, so it stays what it was through JSON and checkpoints.
(Two tasks score an answer 0.05 whose problem has gone through JSON, where tuples become lists.)

What is judged is what stands in the last <answer> tags of a response, or else all of it;
--system-prompt is the place to ask for them. Scorers may give a part of 1: most give len(answer) /
len(response) to a response that only holds the answer somewhere.
"""

import zlib
from collections.abc import Iterator
from functools import lru_cache
from itertools import count

from common.errors import BadInput

INSTALL = "pip install reasoning-gym==0.1.25"
# Problems of one seed: their own seeds are consecutive, so another chunk's seed must not be near
CHUNK = 500

_EVALUATES = "its scorer runs the model's answer as Python (eval, or SymPy's parse_expr)"
_UNSTABLE = "its problems differ from one process to the next, so that no run could be repeated"
REFUSED = {
    **dict.fromkeys(
        (
            "binary_matrix",
            "countdown",
            "intermediate_integration",
            "n_queens",
            "polynomial_multiplication",
        ),
        _EVALUATES,
    ),
    **dict.fromkeys(
        ("puzzle24", "simple_integration", "spiral_matrix", "string_insertion"), _EVALUATES
    ),
    **dict.fromkeys(("isomorphic_strings", "knight_swap", "ransom_note", "word_ladder"), _UNSTABLE),
    "composite": "it needs a configuration: name the tasks themselves",
}


def problems(task: str, *, seed: int | str) -> Iterator[dict]:
    """Endless rows {"prompt": str, "label": str, "notes": {"reasoning_gym": [task, seed, index]}}.

    Raises BadInput for a task that cannot be used.
    """
    try:
        import reasoning_gym
    except ImportError as error:
        raise BadInput(
            f"reasoning-gym:{task} needs the package reasoning-gym ({error}): {INSTALL}"
        ) from error
    known = reasoning_gym.factory.DATASETS
    if task not in known:
        raise BadInput(
            f"reasoning-gym:{task} is no task of reasoning-gym; it has"
            f" {', '.join(sorted(set(known) - set(REFUSED)))}"
        )
    if task in REFUSED:
        raise BadInput(f"reasoning-gym:{task} is refused: {REFUSED[task]}; choose another task")
    return (_row(task, seed, index) for index in count())


def score(response: str, task: str, seed: int | str, index: int) -> tuple[float, str]:
    """(the reward, the answer that was judged), by the task's own scorer.

    Raises ValueError for a refused task, wherever its name comes from.
    """
    if task in REFUSED:
        raise ValueError(f"reasoning-gym:{task} is refused: {REFUSED[task]}")
    from reasoning_gym.utils import extract_answer

    answer = extract_answer(response)
    answer = response.strip() if answer is None else answer
    return (
        float(
            _dataset(task, seed, index // CHUNK).score_answer(
                answer=answer, entry=_problem(task, seed, index)
            )
        ),
        answer,
    )


def _row(task: str, seed: int | str, index: int) -> dict:
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
    import reasoning_gym

    return reasoning_gym.create_dataset(
        task, seed=zlib.crc32(f"{task} {seed} {chunk}".encode()) // 2, size=CHUNK
    )
