"""Which text of a response is its answer. The rules are listed in __init__.py."""

import re

from math_rules.notation import NUMBER, UNICODE, is_prose

MOST_READ = 10_000  # characters at the end of a response, where it has no box

_BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![a-zA-Z])\s*")
_EMPTY_BOX = re.compile(r"\$?\s*\\(?:boxed|fbox|framebox)\s*\{\s*\}\s*\$?")
_MARK = re.compile(
    r"(?i:<answer>)|(?<!#)####(?!#)"
    r"|(?i:\banswers?\b(?:\*\*)?(?:[^.\n:=]{0,60}?\b(?:is|are)\b(?!\s+not\b)|\s*[:=])\s*:?)"
    r"|答案\s*(?:是|为)?\s*:?"
    r"|(?im:^[^\w\n]*(?:final[ \t]+)?answer[^\w\n]*$)"  # a heading
)
_EXPONENT = r"\{?-?\d+\}?"
_ATOM = rf"{NUMBER}(?:[eE][-+]?\d+(?!\w)|\s*(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*{_EXPONENT})?"
_ATOM = rf"(?:{_ATOM}(?:\s*\^\s*{_EXPONENT})?)"
_FRACTION = r"\\[dt]?frac\{[^{}]*\}\{[^{}]*\}"
_VALUE = (
    r"(?:(?<![\w.)}\]])[-+]\s*)?"  # a sign, unless it is an operator
    rf"(?:{_FRACTION}|(?<![\w.^]){_ATOM}(?:{_FRACTION}|\s*/\s*{_ATOM})?)(?:\s*\\?%)?"
)
_OR = r"\s*[,(]?\s*\bor\s+(?:maybe\s+|perhaps\s+|possibly\s+)?"
_VALUES = re.compile(rf"{_VALUE}(?:{_OR}\$?{_VALUE})*")
_FORMULA = re.compile(r"(?s)\$\$(.+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)|(?<!\\)\$([^$\n]+?)(?<!\\)\$")
_NOT_WORDS = r"(?i:not|never|cannot\s+be|(?:is|are|was)n't|rather\s+than|instead\s+of)"
_NOT = re.compile(
    rf"\(\s*(?:and |but )?{_NOT_WORDS}\b[^()\n]*\)"
    rf"|(?:\b(?:and|but)\s+|,\s*)?\b{_NOT_WORDS}\s+(?:equal\s+to\s+|be\s+)?\$?{_VALUE}\$?"
)
_TAIL = re.compile(  # the rest of a sentence that goes on behind the answer
    r"(?s)\s*(?:\(|\b)(?:because|since|which|so|as|when|where|if)\b.*|\s+\([^()]*[a-zA-Z]{3}.*"
)


def answer_of(response: str) -> str:
    """Return the text that counts as the response's answer; "" if there is none."""
    for match in reversed(list(_BOX.finditer(response))):
        content = _box_content(response, match.end())
        if content is None:
            return ""
        if content.strip(" \t\r\n$"):
            return _NOT.sub(" ", content).strip()
    response = _EMPTY_BOX.sub(" ", response[-MOST_READ:].translate(UNICODE).replace("’", "'"))
    response = _NOT.sub(" ", response)
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
    if mark.lower() == "<answer>":
        return _chosen(re.split(r"(?i)</answer>", rest)[0])
    line, _, below = rest.partition("\n")
    if mark == "####":
        return _chosen(line) if not below.strip() or not re.search(r"[A-Za-z]{3}", line) else ""
    sentence = re.split(r"(?<!\d)\.(?=\s|$)|(?<=\d)\.(?=\s|$)|;\s|</", line.lstrip(" ."))[0]
    return _chosen(_TAIL.sub("", sentence))


def _chosen(text: str) -> str:
    """Return the answer in a text that was announced as one: all of it, or a part of its prose."""
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
    """Return what follows the last "=" of the last line, else the last formula or number."""
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
    return re.sub(_OR, ", ", values)
