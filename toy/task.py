"""The toy task: three-digit addition, the sum written with its digits reversed.

    prompt "046+789="   label "538"      (46 + 789 = 835, lowest digit first)

With the lowest digit first, a small causal model can carry digit by digit, as a person does on
paper. There are 10**6 problems. A checksum of the text reserves one in ten for evaluation, so that
training and held-out problems are disjoint for every seed.
"""

import random
import zlib
from collections.abc import Iterator

DIGITS = 3
ALPHABET = "0123456789+="


def is_held_out(prompt: str) -> bool:
    """Return whether a problem is reserved for evaluation, as one in ten is.

    Neither the warm start nor reinforcement learning trains on it.
    """
    return zlib.crc32(prompt.encode()) % 10 == 0


def problems(*, seed: int, held_out: bool) -> Iterator[dict]:
    """Yield endless rows {"prompt": str, "label": str}, as a line of a prompts file holds."""
    rng = random.Random(seed)
    while True:
        a, b = rng.randrange(10**DIGITS), rng.randrange(10**DIGITS)
        prompt = f"{a:0{DIGITS}d}+{b:0{DIGITS}d}="
        if is_held_out(prompt) == held_out:
            yield {"prompt": prompt, "label": str(a + b)[::-1]}
