"""A stand-in for the package reasoning-gym, with the four names that this project uses.

They behave as in reasoning-gym 0.1.25. create_dataset makes problem i from seed + i.
factory.DATASETS lists the tasks. score_answer may give part of 1. utils.extract_answer returns the
last <answer>.
"""

import random
import re
import sys
from types import ModuleType

import pytest

from data import reasoning_gym_tasks

# --- reasoning-gym ------------------------------------------------------------------------------


class Sums:
    """A task as reasoning-gym has them: problem i of seed s is made from s + i.

    A response that holds the answer among other text gets part of 1.
    """

    def __init__(self, seed: int, size: int):
        self.seed, self.size = seed, size

    def __getitem__(self, i: int) -> dict:
        assert 0 <= i < self.size
        a, b = random.Random(self.seed + i).choices(range(10**6), k=2)
        return {
            "question": f"{a}+{b}=",
            "answer": str(a + b),
            "metadata": {"source_dataset": "chain_sum", "source_index": i, "pair": (a, b)},
        }

    def score_answer(self, answer, entry) -> float:
        # Some tasks compare types that JSON would change, such as tuples.
        assert isinstance(entry["metadata"]["pair"], tuple)
        if answer == entry["answer"]:
            return 1.0
        if answer and entry["answer"] in answer:
            return len(entry["answer"]) / len(answer)
        return 0.0


def extract_answer(completion: str) -> str | None:
    found = re.findall(r"<answer>\s?(.*?)\s?</answer>", completion, re.DOTALL)
    return found[-1].strip() if found else None


@pytest.fixture
def gym(monkeypatch):
    package, factory, utils = (
        ModuleType(name)
        for name in ("reasoning_gym", "reasoning_gym.factory", "reasoning_gym.utils")
    )
    package.factory, package.utils, utils.extract_answer = factory, utils, extract_answer
    factory.DATASETS = {"chain_sum": (Sums, None), "gcd": (Sums, None), "countdown": (Sums, None)}
    package.create_dataset = lambda name, **config: factory.DATASETS[name][0](**config)
    for module in (package, factory, utils):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    yield
    reasoning_gym_tasks._problem.cache_clear()
    reasoning_gym_tasks._dataset.cache_clear()
