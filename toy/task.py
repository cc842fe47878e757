"""The toy task: three-digit addition, the sum written with its digits reversed.

    prompt "046+789="   label "538"      (46 + 789 = 835, lowest digit first)

Writing the lowest digit first lets a small causal model carry as it goes, as a person does on
paper. There are 10**6 problems; a checksum of the text puts one in ten aside for evaluation, so
that training and held-out problems are disjoint whatever the seed.
"""

import random
import zlib
from collections.abc import Iterator

DIGITS = 3
ALPHABET = "0123456789+="


def is_held_out(prompt: str) -> bool:
    """One problem in ten, by the checksum of its text: never trained on, neither in the warm start
    nor by reinforcement.
    """
    return zlib.crc32(prompt.encode()) % 10 == 0


def problems(*, seed: int, held_out: bool) -> Iterator[dict]:
    """Endless rows {"prompt": str, "label": str}, in the form of a line of a prompts file."""
    rng = random.Random(seed)
    while True:
        a, b = rng.randrange(10**DIGITS), rng.randrange(10**DIGITS)
        prompt = f"{a:0{DIGITS}d}+{b:0{DIGITS}d}="
        if is_held_out(prompt) == held_out:
            yield {"prompt": prompt, "label": str(a + b)[::-1]}
