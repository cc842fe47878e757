"""The held-out sets of a run: their names, and how each is answered and judged."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common import hub
from common.errors import ProblemList, all_problems
from common.settings import GYM, RolloutSettings, is_generated, parse_weights


@dataclass(frozen=True)
class HeldOutSet:
    """A set of --eval-prompts. The metrics, and the flags below, know it by its name."""

    source: str
    name: str
    temperature: float
    max_response_tokens: int
    reward: str
    """A name of reward.REWARDS; "": the training's reward."""


@all_problems
def held_out_sets(settings: RolloutSettings) -> list[HeldOutSet]:
    """Return the held-out sets. Raises BadInput for flags that fit none of them.

    --eval-temperature, --eval-max-response-tokens and --eval-reward each take a value for all sets
    and NAME=VALUE for one; the latter wins. Without them a set is answered and judged as in
    training.
    """
    found, sources = ProblemList(), list(settings.eval_prompts)
    if not sources:  # the held-out problems of what is generated
        sources = list(filter(is_generated, parse_weights(settings.prompts)))
    names = short_names(sources)

    def of_sets(flag: str, default, read: Callable) -> dict:
        given = getattr(settings, flag[2:].replace("-", "_"))
        return found.collect(_of_sets, given, list(names.values()), flag, default, read) or {}

    temperatures = of_sets("--eval-temperature", settings.temperature, float)
    lengths = of_sets("--eval-max-response-tokens", settings.max_response_tokens, int)
    rewards = of_sets("--eval-reward", "", str)
    yield from found.texts
    if found.texts:
        return []
    return [
        HeldOutSet(source, name, temperatures[name], lengths[name], rewards[name])
        for source, name in names.items()
    ]


@all_problems
def _of_sets(
    given: tuple[str, ...], names: list[str], flag: str, default, read: Callable
) -> dict[str, object]:
    """Return {name: its value}. read: makes a value of a text, or raises ValueError."""
    for_all, for_one = [], {}
    for text in given:
        name = next((name for name in names if text.startswith(f"{name}=")), "")
        value = text[len(name) + 1 :] if name else text
        if not name and "=" in text and "://" not in text.partition("=")[0]:
            has = ", ".join(names) or "none"
            yield f"{flag} {text}: no held-out set has that name; the run's are: {has}"
            continue
        try:
            number = read(value)
        except ValueError:
            yield f"{flag} {text}: {value!r} is not a number"
            continue
        if not name:
            for_all.append(number)
        elif name in for_one:
            yield f"{flag} {text}: {name} has a value already: give one"
        else:
            for_one[name] = number
    if len(for_all) > 1:
        yield f"{flag} {' '.join(given)}: there are {len(for_all)} values for all sets: give one"
    if for_all and not names:
        yield f"{flag} {' '.join(given)}: the run has no held-out set: give --eval-prompts"
    common = for_all[0] if for_all else default
    return {name: for_one.get(name, common) for name in names}


def short_names(sources: list[str]) -> dict[str, str]:
    """Return {source: short name}, such that the names tell the sources apart.

    For example: {"toy": "toy", "a/gsm8k/train.parquet": "gsm8k/train", "a/math/train.parquet":
    "math/train"}. Bytes of a path that are not UTF-8 are escaped, because a sample's source must
    fit in JSON.
    """
    printable, parts = {}, {}
    for source in sources:
        printable[source] = os.fsencode(source).decode("utf-8", "backslashreplace")
        path = Path(printable[source].replace(GYM, "reasoning-gym/"))
        parts[source] = (*path.parent.parts, path.stem)
        if hub.is_dataset(source):
            parts[source] = hub.short_name(source)
    for n in range(1, max(map(len, parts.values()), default=0) + 1):
        short = {source: "/".join(parts[source][-n:]) for source in sources}
        if len(set(short.values())) == len(sources):
            return short
    return printable
