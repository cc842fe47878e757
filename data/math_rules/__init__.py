r"""Judges mathematical answers: which part of a response counts, and whether it equals the label.

Which part counts (answers.py). The first rule that applies decides. Empty places are skipped.
  1. The last \boxed{...} or \fbox{...}. Boxes that only "and", "or" or a comma joins are a list:
     \boxed{1} and \boxed{2} is 1, 2. If the last box is never closed, the response was cut off
     inside it, and there is no answer.
  2. The last of these: <answer>...</answer>; a line "#### ..." that is the last line or holds no
     words; "answer is ..." or "answer: ..." up to the end of its sentence. If such a text is prose,
     the value after its last "is" counts, else the text after its last "=", else its first number.
  3. A response that is only an answer. Else the text after the last "=" of its last line, else its
     last formula ($...$, \(...\), \[...\]) or number, whichever ends later.
  "not 46" is no answer. "34 or 35", "34 and 35", "34 to 35" and "34, maybe 35" are the list of
  both, which equals neither. (1, 2), 3:30 and 1/2 are one value. Without a box only the last
  MOST_READ characters are read.

When it is right (equality.py). notation.py first removes blanks, $, bold, \text, a final full stop
and thousands separators, and replaces Unicode forms.
  Numbers   Integers and fractions are compared exactly. Where one is a decimal, they may differ by
            1e-6, but by no more than 1e-5 of the label: 0.333333 equals 1/3. 3.5 million is
            3500000, 1.000,5 is 1000.5, and 3,14 equals the label 3.14. Digits of every script
            count.
  Percent   28% equals 28 and 0.28. Without the sign 28 and 0.28 differ.
  Units     Units after a number, and currency signs, are not compared: 12 cm and 12cm equal 12.
            If both name it, am is not pm.
  Words     Letters alone are text and never a product: CAB is not ABC, ba is not ab. Case counts
            for single letters but not for words. (B), B. and \text{B} are B; so is "(B) 12" if the
            label is a letter. Lists have no order. A label of words and numbers is text, too. With
            an operator (a \cdot b), letters are algebra.
  Equations x = 42 gives 42. A side without letters must equal the label: 43 = 42 is wrong.
  Bases     204_5 equals 204 and 204_5, not 204_7.
  Others    math-verify parses both as LaTeX and compares them with SymPy. Decimals may then differ
            by 1e-6. An interval may be written as an inequality: x \in (1, 2) equals 1 < x < 2.
An answer of more than MOST_CHARACTERS is wrong.

Not recognized, and so wrong: 0.(3) and 0.333... for 1/3, e^{i\pi} for -1, 12m (a product) for 12,
10,00,000 and 1_000_000, and numbers with letters before them.

Parsing and comparison can take forever, so data/math_judge.py runs them in processes with a time
limit. This package imports neither torch nor an engine, so these processes start fast and stay
small.
"""

import re

from data.math_rules.answers import answer_of
from data.math_rules.equality import is_text, number_of, parsed, same, time_of, value_of_chain
from data.math_rules.notation import is_words, normalized

MOST_CHARACTERS = 2000  # of an answer
MOST_WORDS = 6  # in a label that is text


def is_judgeable(label: str) -> bool:
    """Return whether a label is a number, a short text, or an expression math-verify parses."""
    text = normalized(label)
    if number_of(text) or time_of(label) or re.fullmatch(r"[0-9A-Fa-f]+_\{?\d+\}?", text):
        return True
    if is_text(text) or all(is_words(normalized(part)) for part in text.split(",")):
        return len(text.split()) <= MOST_WORDS
    return bool(text) and parsed(text) is not None


def judged(response: str, label: str) -> tuple[bool, str]:
    """Return (whether the response's answer equals the label, that answer or "").

    Raises ValueError for a label that is not mathematics. Nothing is evaluated as code.
    """
    if not is_judgeable(label):
        raise ValueError(
            f"the label {label[:200]!r} is not a mathematical expression, a number or a short text"
        )
    answer = answer_of(response)
    if not answer or len(answer) > MOST_CHARACTERS:
        return False, answer[:MOST_CHARACTERS]
    value = value_of_chain(normalized(answer), normalized(label))
    return bool(value) and same(value, label), answer
