"""Decides whether an answer equals a label. __init__.py lists the rules."""

import logging
import re
from fractions import Fraction
from functools import lru_cache

from data.math_rules.notation import (
    FUNCTIONS,
    NUMBER,
    PLAIN_TEXT,
    is_words,
    normalized,
    without_commands,
)


_TIMES_POWER_OF_TEN = re.compile(
    r"\s*(?:\\times|\\cdot|\*|×|x)\s*10\s*\^\s*(?:\{\s*([-+]?\d+)\s*\}|([-+]?\d+))"
)
_POWER_OF_TEN = re.compile(r"^([-+]?)10\s*\^\s*(?:\{\s*([-+]?\d+)\s*\}|(\d+))$")
_FRACTION = re.compile(r"\\[dtc]?frac\s*\{\s*([-+]?[\d.,]+)\s*\}\s*\{\s*([-+]?[\d.,]+)\s*\}")


_MODULUS = re.compile(r"\s*\(?\\pmod\s*(?:\{[^{}]*\}|\d+)\)?$|\s*\(\s*\\?mod\s+\d+\s*\)$")
_OR = re.compile(r",|\\text\s*\{\s*(?:or|and)\s*\}|\b(?:or|and)\b|;")
_AND = re.compile(r",?\s+and\s+|,")
_NAMES = {
    rf"\{name}"
    for name in "text angle theta alpha beta gamma triangle lambda mu sigma phi omega".split()
}
_WORD_NAME = re.compile(r"[A-Za-z]{2}[A-Za-z\s]*=\s*")  # "Area = 5"
_WORD = re.compile(rf"(?<![\\a-zA-Z])(?!(?:{FUNCTIONS}|sqrt)\b)[A-Za-z]{{4,}}")
_FIGURE = re.compile(  # \angle ABC: its letters are not a product
    r"\\(?:angle|triangle|overline|overrightarrow|widehat|odot|square)\s*\{?\s*[A-Z]{2,}"
)
_CHOICE = re.compile(r"\(?([A-J])[).:]\s*\S")  # "(B) 12"
_TIME = re.compile(r"(\d{1,2}(?::\d\d)?)\s*(?:\\text\s*\{\s*)?([ap])\.?m\.?\s*\}?\.?", re.I)
_BASE = re.compile(r"([0-9A-Fa-f]+)_\{?(\d+)\}?")  # 204_5


def is_text(label: str) -> bool:
    """Return whether a label has words, so that it is compared as text."""
    return bool(_WORD.search(without_commands(_WORD_NAME.sub("", label))))


def _without_blanks(text: str) -> str:
    """Return a text without its blanks, except those between digits."""
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)


def _words_key(text: str) -> str:
    """Return a text in the form in which words are compared."""
    text = re.sub(r"\s+", "", PLAIN_TEXT.sub(r"\1", text))
    return text if len(text) == 1 else text.casefold()


def number_of(text: str) -> tuple[Fraction, bool, bool] | None:
    """Return (value, has a percent sign, is a decimal) of a normalized text; None for no number."""
    text = _TIMES_POWER_OF_TEN.sub(r"e\1\2", text.strip())
    text = _POWER_OF_TEN.sub(r"\g<1>1e\2\3", text)
    text = _FRACTION.sub(r" \1/\2", text).replace("- ", "-").strip()
    if re.fullmatch(r"[-+]?\d{1,3}(?:\.\d{3})+,\d+", text):  # 1.234,5
        text = text.replace(".", "").replace(",", ".")
    match = re.fullmatch(
        rf"([-+]?)({NUMBER})(?:[eE]([-+]?\d{{1,3}}))?(?:\s*/\s*([-+]?{NUMBER}))?\s*(%?)", text
    )
    if not match or len(text) > 1000:
        mixed = re.fullmatch(r"([-+]?)(\d{1,300}) (\d{1,300})/(\d{1,300})", text)
        if not mixed or not int(mixed[4]):
            return None
        value = int(mixed[2]) + Fraction(int(mixed[3]), int(mixed[4]))
        return (-value if mixed[1] == "-" else value), False, False
    sign, top, exponent, bottom, percent = match.groups()
    value = Fraction(top.replace(",", "")) * Fraction(10) ** int(exponent or 0)
    if bottom:
        below = Fraction(bottom.replace(",", ""))
        if not below:
            return None
        value /= below
    is_decimal = "." in text or bool(exponent and int(exponent) < 0)
    return (-value if sign == "-" else value), bool(percent), is_decimal


def _same_number(answer: tuple, label: tuple) -> bool:
    """Return whether two results of number_of() are equal, within a tolerance for decimals."""
    (a, a_percent, a_decimal), (b, b_percent, b_decimal) = answer, label
    pairs = [(a, b), (a / 100 if a_percent else a, b / 100 if b_percent else b)]
    if a_percent == b_percent or not (a_percent or b_percent):
        pairs = pairs[:1]
    if not (a_decimal or b_decimal):
        return any(x == y for x, y in pairs)
    for x, y in pairs:
        distance = abs(x - y)
        if x == y or (distance < Fraction(1, 10**6) and distance <= abs(y) / 10**5):
            return True
    return False


def value_of_chain(answer: str, label: str) -> str:
    r"""Return the value in "x = ... = value", or "" if a side without letters is not the label.

    If the label is itself an equation, the answer is returned unchanged.
    """
    if "=" in label or re.search(r"[<>!:]=", answer):
        return answer
    if r"\pmod" not in label:
        answer = _MODULUS.sub("", answer)
    parts = [re.fullmatch(r"\s*([A-Za-z])\s*=([^=]+)", part) for part in _OR.split(answer)]
    if len(parts) > 1 and all(parts) and len({part[1] for part in parts}) == 1:  # x = 3 or x = 5
        return ", ".join(part[2].strip() for part in parts)
    answer = answer.replace(r"\equiv", "=")
    if _OR.search(answer) or not re.search(r"=|\\approx", answer):
        return answer
    exact, *approximate = re.split(r"\\approx", answer)
    sides = _sides(exact)
    if len(sides) == 1 and _has_letters(exact):  # x \approx 0.3, but not x = 1/3 \approx 0.3
        sides += approximate[:1]
    sides = [side.strip() for side in sides if side.strip()]
    if len(sides) == 2 and re.fullmatch("[A-Za-z]", sides[1]):  # 5 = x
        sides.reverse()
    if not sides or any(not _has_letters(side) and not same(side, label) for side in sides[:-1]):
        return ""
    return sides[-1]


def _sides(text: str) -> list[str]:
    """Return the sides of an equation. An "=" in brackets, as in P(X = 2), separates no sides."""
    sides, depth = [""], 0
    for character in text:
        depth += (character in "({[") - (character in ")}]")
        if character == "=" and depth <= 0:
            sides.append("")
        else:
            sides[-1] += character
    return sides


def _has_letters(text: str) -> bool:
    """Return whether a text has letters. Of LaTeX commands only those in _NAMES count."""
    text = re.sub(r"\\[a-zA-Z]+", lambda match: "x" if match[0] in _NAMES else " ", text)
    return bool(re.search(r"[A-Za-z]", text))


def time_of(text: str) -> tuple[str, str] | None:
    """Return (hour and minutes, "a" or "p") of a time such as 3:30 pm; None for another text."""
    match = _TIME.fullmatch(text.strip())
    return match and (match[1].lstrip("0"), match[2].lower())


def same(answer: str, label: str) -> bool:
    """Return whether an answer equals a label. value_of_chain() has split equations before."""
    times = time_of(answer), time_of(label)
    if all(times):
        return times[0] == times[1]
    answer, label = (
        normalized(time[0] if time else text) for time, text in zip(times, (answer, label))
    )
    if match := _WORD_NAME.match(label):
        answer, label = _WORD_NAME.sub("", answer), label[match.end() :]
    if not answer or not label:
        return False
    numbers = number_of(answer), number_of(label)
    if numbers[1] and numbers[1][2] and re.fullmatch(r"[-+]?\d+,\d{1,2}|[-+]?\d+,\d{4,}", answer):
        numbers = number_of(answer.replace(",", ".")), numbers[1]  # 3,14, where 3.14 is right
    if all(numbers):
        return _same_number(*numbers)
    if _without_blanks(answer) == _without_blanks(label):
        return True
    if re.fullmatch(r"\d{4}-\d\d-\d\d|\d{1,2}/\d{1,2}/\d{4}", label):  # a date is not arithmetic
        return False
    choices = [_CHOICE.match(PLAIN_TEXT.sub(r"\1", text).strip()) for text in (answer, label)]
    if re.fullmatch("[A-J]", label) and choices[0]:
        return choices[0][1] == label
    if re.fullmatch("[A-J]", answer) and choices[1] and label.startswith("("):
        return choices[1][1] == answer
    bases = [_BASE.fullmatch(text) for text in (answer, label)]
    if all(bases):
        return bases[0].groups() == bases[1].groups()
    if any(bases):
        return same(*(base[1] if base else text for base, text in zip(bases, (answer, label))))
    return _same_words_or_expression(answer, label)


def _same_words_or_expression(answer: str, label: str) -> bool:
    """Return whether normalized texts are equal as lists, as words, or by math-verify."""
    lists = [[normalized(part) for part in _AND.split(text)] for text in (answer, label)]
    if all(is_words(part) for parts in lists for part in parts):
        return sorted(map(_words_key, lists[0])) == sorted(map(_words_key, lists[1]))
    if any(map(is_words, (answer, label))) and len(label) > 1 < len(answer):
        products = [
            re.sub(r"\\cdot|\\times|\*|\s", "", PLAIN_TEXT.sub(r"\1", text))
            for text in (answer, label)
        ]
        return products[0] == products[1] and is_words(label)
    if _FIGURE.search(label) and _FIGURE.search(answer):
        return False
    if is_text(label):
        return _words_key(answer) == _words_key(label)
    gold, given = parsed(label), parsed(answer)
    if gold is None or given is None:
        return False
    from math_verify import verify

    gold, given = _as_set(gold), _as_set(given)
    return bool(verify(gold, given, timeout_seconds=None, allow_set_relation_comp=True))


def _as_set(expression):
    """Return the set that inequalities joined by "or" describe; another expression unchanged."""
    from sympy import FiniteSet, Union
    from sympy.core.relational import Relational

    parts = expression.args if isinstance(expression, FiniteSet) else ()
    symbols = set().union(*(part.free_symbols for part in parts))
    if len(symbols) != 1 or not all(isinstance(part, Relational) for part in parts):
        return expression
    return Union(*(part.as_set() for part in parts))


@lru_cache(256)
def parsed(text: str):
    """Return the expression that math-verify reads in a normalized text; None if there is none."""
    from latex2sympy2_extended.math_normalization import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    # math-verify warns that its own time limit is off.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    notation = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all"
    )
    config = LatexExtractionConfig(boxed_match_priority=0, normalization_config=notation)
    found = parse(f"\\boxed{{{text}}}", [config], fallback_mode="no_fallback", parsing_timeout=None)
    return found[0] if found else None
