"""Which text of a response is its answer. The rules are listed in __init__.py."""

import re

from math_rules.notation import NUMBER, UNICODE, is_prose

MOST_READ = 10_000  # characters at the end of a response, where it has no box

_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
_MARK = re.compile(
    r"<answer>|(?<!#)####(?!#)|(?i:\banswers?\b(?:\*\*)?(?:[^.\n:=]{0,60}?\b(?:is|are)\b(?!\s+not\b)|\s*[:=])(?:\s*:)?)"
    r"|(?im:^[^\w\n]*(?:final[ \t]+)?answer[^\w\n]*$)"
)
_POWER = rf"(?:\s*\^\s*\{{?-?{NUMBER}\}}?)?"
_ATOM = rf"(?:{NUMBER}(?:[eE][-+]?\d+(?!\w)|\s*(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*\{{?-?\d+\}}?)?{_POWER})"
_VALUE = rf"(?:(?<![\w.)}}\]])[-+]\s*)?(?:\\[dt]?frac\{{[^{{}}]*\}}\{{[^{{}}]*\}}|(?<![\w.^]){_ATOM}(?:\\frac\{{\d+\}}\{{\d+\}}|\s*/\s*{_ATOM})?)(?:\s*\\?%)?"
_VALUES = re.compile(rf"{_VALUE}(?:\s*,?\s+or\s+\$?{_VALUE})*")
_FORMULA = re.compile(r"(?s)\$\$(.+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)|(?<!\\)\$([^$\n]+?)(?<!\\)\$")
_NOT = re.compile(
    rf"\(\s*(?:and |but )?(?i:not|rather than|instead of)\b[^()\n]*\)"
    rf"|(?:\b(?:and|but)\s+|,\s*)?\b(?i:not|rather than|instead of)\s+\$?{_VALUE}\$?"
)
_TAIL = re.compile(
    r"\s*(?:\(|\b)(?:because|since|which|so|as|when|where|if)\b.*|\s+\([^()]*[a-zA-Z]{3}.*",
    re.DOTALL,
)


def answer_of(response: str) -> str:
    """Return the text that counts as the response's answer, by the rules above; "" if there is none."""
    for match in reversed(list(_BOX.finditer(response))):
        content = _box_content(response, match.end())
        if content is None:
            return ""
        if content.strip(" \t\r\n$"):
            return content.strip()
    response = _NOT.sub(" ", response[-MOST_READ:].translate(UNICODE))
    for match in reversed(list(_MARK.finditer(response))):
        if answer := _behind_mark(match[0], response[match.end() :]):
            return answer
    whole = response.strip()
    if "\n" not in whole and len(whole) <= 200 and not is_prose(whole):
        return whole
    return _last_value(response)


def _box_content(response: str, start: int) -> str | None:
    """Return what the box holds whose argument begins at start; None if it is not closed."""
    if response[start : start + 1] != "{":
        return re.match(r"[^\s$]*", response[start:])[0]
    depth = 0
    for match in re.finditer(r"\\.|[{}]", response[start:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return response[start + 1 : start + match.start()]
    return None


def _behind_mark(mark: str, rest: str) -> str:
    rest = rest.lstrip(" \t\r\n*:")
    if mark == "<answer>":
        return _chosen(rest.partition("</answer>")[0])
    line, _, below = rest.partition("\n")
    if mark == "####":
        return _chosen(line) if not below.strip() or not re.search(r"[A-Za-z]{3}", line) else ""
    sentence = re.split(r"(?<!\d)\.(?=\s|$)|(?<=\d)\.(?=\s|$)|;\s|</", line.lstrip(" ."))[0]
    return _chosen(_TAIL.sub("", sentence))


def _chosen(text: str) -> str:
    """Return the answer in a text that was announced as one: all of it, or the part of its prose that is one."""
    text = text.strip()
    formulas = [match for match in _FORMULA.finditer(text) if not is_prose(_inside(match))]
    if formulas and not re.search(
        r"[^\s.,;:*]", _FORMULA.sub("", text).replace(" and ", "").replace(" or ", "")
    ):
        return ", ".join(map(_inside, formulas))
    if not is_prose(text):
        return text
    if formulas:
        return _inside(formulas[0])
    right = text.rpartition("=")[2].strip(" >")
    if right != text and not is_prose(right):
        return right
    first = _VALUES.search(right)
    return _joined(first[0]) if first else ""


def _last_value(text: str) -> str:
    """Return the formula or number that ends last in a text, or what stands behind the last "=" of its last line."""
    found = [
        (match.end(), _inside(match))
        for match in _FORMULA.finditer(text)
        if not is_prose(_inside(match))
    ]
    found += [
        (match.end(), _joined(match[0]))
        for match in _VALUES.finditer(_FORMULA.sub(lambda m: _blank(m), text))
    ]
    line = text.rstrip().rpartition("\n")[2]
    right = line.rpartition("=")[2].strip(" .*>")
    if "=" in line and right and "$" not in right and not is_prose(right):
        return right
    return max(found)[1] if found else ""


def _blank(match: re.Match) -> str:
    return match[0] if is_prose(_inside(match)) else " " * len(match[0])


def _inside(match: re.Match) -> str:
    return next(part for part in match.groups() if part is not None).strip()


def _joined(values: str) -> str:
    values = re.sub(r"(?<![\d,])(\d+),(\d{1,2})(?![\d,])", r"\1.\2", values)  # a decimal comma
    return re.sub(r"\s*,?\s+or\s+", ", ", values)
