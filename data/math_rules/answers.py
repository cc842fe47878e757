"""Finds the part of a response that is its answer. __init__.py lists the rules."""

import re

from data.math_rules.notation import NUMBER, UNICODE, is_prose

MOST_READ = 10_000  # characters at the end of a response, where it has no box

_BOX = re.compile(r"\\(?:boxed|Boxed|fbox|framebox)(?![a-zA-Z])\s*")
_BOTH = re.compile(  # joins two boxes into one answer
    r"(?:\\[,;: )\]]|\\q?quad|[\s$])*(?:,|;|\\text\s*\{\s*(?:and|or|,)\s*\}|\b(?:and|or)\b)+"
    r"(?:\\[,;: (\[]|\\q?quad|[\s$]|\b(?:and|or)\b|\\text\s*\{\s*(?:and|or)\s*\})*"
)
_EMPTY_BOX = re.compile(r"\$?\s*\\(?:boxed|Boxed|fbox|framebox)\s*\{\s*\}\s*\$?")
_MARK = re.compile(
    r"(?i:<answer>)|(?<!#)####(?!#)"
    r"|(?i:\b(?:answers?|(?:correct|right)\s+(?:option|choice))\b(?:\*\*)?"
    r"(?:[^.\n:=]{0,60}?\b(?:is|are)\b(?!\s+not\b)|\s*[:=]|\s+-\s)\s*:?)"
    r"|答案\s*(?:是|为)?\s*:?"
    r"|(?im:^[^\w\n]*(?:final[ \t]+)?answer[^\w\n]*$)"  # a heading
)
_EXPONENT = r"\{?-?\d+\}?"
_ATOM = rf"{NUMBER}(?:[eE][-+]?\d+(?!\w)|\s*(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*{_EXPONENT})?"
_ATOM = rf"(?:{_ATOM}(?:\s*\^\s*{_EXPONENT})?)"
_DECIMAL_COMMA = r"(?:\d{1,3}(?:\.\d{3})+,\d+|\d+,(?!\d{3}(?!\d))\d+)(?![\d,]|\.\d)"
_ATOM = rf"(?:\d+(?::\d+)+|{_DECIMAL_COMMA}|{_ATOM})"  # 3:30, 2,74
_FRACTION = r"\\[dt]?frac\{[^{}]*\}\{[^{}]*\}"
_VALUE = (
    r"(?:(?<![\w.)}\]])[-+]\s*)?"  # a sign, unless it is an operator
    rf"(?:{_FRACTION}|(?<![\w.^,]){_ATOM}(?:{_FRACTION}|(?:\s+\d+)?\s*/\s*{_ATOM})?)(?:\s*\\?%)?"
)
_TUPLE = rf"(?<!\w)[(\[]\s*{_VALUE}(?:\s*[,;]\s*{_VALUE})+\s*[)\]]"
_NAME = r"(?:\b[a-zA-Z]\s*(?:=|is|equals)\s*)"
_OR = (  # joins two values into one answer, which neither is alone
    r"\s*[,(]?\s*(?:\b(?:or|and|nor|to|maybe|perhaps|possibly|probably)\s+)+"
)
_VALUES = re.compile(
    rf"{_TUPLE}|{_VALUE}(?:\s*,\s*{_VALUE}(?=[\s\d,.]*{_OR}))*(?:{_OR}{_NAME}?\$?{_VALUE})*"
)
_FORMULA = re.compile(r"(?s)\$\$(.+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)|(?<!\\)\$([^$\n]+?)(?<!\\)\$")
_NOT_WORDS = (
    r"(?i:not|never|neither|nor|(?:cannot|can't|couldn't|won't|unlikely\s+to)\s+be"
    r"|(?:is|are|was)n't|rather\s+than|instead\s+of|anything\s+but|other\s+than|different\s+from)"
)
_CALCULATION = re.compile(r"<<[^<>\n]{0,300}>>")  # GSM8K's notes for a calculator
_NOT = re.compile(
    rf"\(\s*(?:and |but )?{_NOT_WORDS}\b[^()\n]*\)"
    rf"|(?:\b(?:and|but)\s+|,\s*)?\b{_NOT_WORDS}\s+(?:equal\s+to\s+|be\s+)?\$?{_VALUE}\$?"
)
_TAIL = re.compile(  # the rest of a sentence after the answer
    r"(?s)\s*(?:\(|\b)(?:because|since|which|so|as|when|where|if)\b.*|\s+\([^()]*[a-zA-Z]{3}.*"
)


_IS = re.compile(
    r"\b(?:is|are|equals)\s*:?\s*(?:equal\s+to\s+|exactly\s+|about\s+|approximately\s+)?"
    rf"(?=\$?\\?[(\[]?\$?{_VALUE})"
)
_CHOSEN_LETTER = re.compile(r"\(?([A-J])\)?\s*(?:[.:;-]|,\s+(?!and\b|or\b)(?=[a-z]{2,}))\s")
_BETWEEN = re.compile(rf"\s*,?{_OR}|\s*,\s*")


def answer_of(response: str) -> str:
    """Return the part of a response that counts as its answer; "" if there is none."""
    boxed = _boxed(response)
    if boxed is not None:
        return _NOT.sub(" ", boxed).strip()
    response = _EMPTY_BOX.sub(" ", response[-MOST_READ:].translate(UNICODE).replace("’", "'"))
    response = _CALCULATION.sub("", response)
    response = _NOT.sub(" ", response)
    for match in reversed(list(_MARK.finditer(response))):
        if answer := _behind_mark(match[0], response[match.end() :]):
            return answer
    whole = response.strip(" \t\r\n#")
    if "\n" not in whole and len(whole) <= 200 and not is_prose(whole):
        return whole
    return _last_value(response)


def _boxed(response: str) -> str | None:
    """Return the content of the last box, "" if it is not closed, None if there is no box.

    Boxes that only "and", "or" or a comma joins are one answer, the list of their contents.
    """
    found, start_of_next = [], None
    for match in reversed(list(_BOX.finditer(response))):
        content = _box_content(response, match.end())
        if content is None and not found:
            return ""
        if content is None or not content.strip(" \t\r\n$"):
            continue
        if not found:
            found, start_of_next = [content.strip()], match.start()
            continue
        end = match.end() + len(content) + 2 * (response[match.end() : match.end() + 1] == "{")
        if end > start_of_next or not _BOTH.fullmatch(response[end:start_of_next]):
            break
        if content.strip() not in found:
            found.insert(0, content.strip())
        start_of_next = match.start()
    return ", ".join(found) if found else None


def _box_content(response: str, start: int) -> str | None:
    """Return the content of the box whose argument begins at start; None if it is not closed."""
    if response[start : start + 1] != "{":
        return re.match(r"[^\s$]*", response[start:])[0]
    depth = 0
    for match in re.finditer(r"\\.|[{}]", response[start:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return response[start + 1 : start + match.start()]
    return None


def _behind_mark(mark: str, rest: str) -> str:
    """Return the answer that a mark such as "answer is" announces; "" if the place is empty."""
    rest = rest.lstrip(" \t\r\n*:")
    if mark.lower() == "<answer>":
        return _chosen(re.split(r"(?i)</answer>", rest)[0])
    line, _, below = rest.partition("\n")
    if line.strip() in ("$$", r"\[") and (formula := _FORMULA.match(rest)):
        return _inside(formula)
    if mark == "####":
        return _chosen(line) if not below.strip() or not re.search(r"[A-Za-z]{3}", line) else ""
    sentence = re.split(r"\.(?=\s|$)|;\s+(?=[a-zA-Z]{2})|</|<\|", line.lstrip(" ."))[0]
    return _chosen(_TAIL.sub("", sentence))


def _chosen(text: str) -> str:
    """Return the answer in a text that was announced as one: all of it, or a part of its prose."""
    text = text.strip()
    formulas = [match for match in _FORMULA.finditer(text) if not is_prose(_inside(match))]
    others = _FORMULA.sub("", text).replace(" and ", "").replace(" or ", "")
    if formulas and not re.search(r"[^\s.,;:*]", others):
        return ", ".join(map(_inside, formulas))
    if not is_prose(text):
        return text
    if match := _CHOSEN_LETTER.match(text):
        return match[1]
    if verbs := list(_IS.finditer(text)):  # "the largest $n$ is 34"
        return _chosen(text[verbs[-1].end() :])
    if formulas:
        return _joined_formulas(text, formulas[0])
    right = text.rpartition("=")[2].strip(" >")
    if right != text and not is_prose(right):
        return right
    first = _VALUES.search(right)
    return _joined(first[0]) if first else ""


def _last_value(text: str) -> str:
    """Return the text after the last "=" of the last line, else the last formula or number."""
    formulas = [match for match in _FORMULA.finditer(text) if not is_prose(_inside(match))]
    values = list(_VALUES.finditer(_FORMULA.sub(_blank, text)))
    line = text.rstrip().rpartition("\n")[2]
    right = line.rpartition("=")[2].strip(" .*>")
    if "=" in line and right and "$" not in right and not is_prose(right):
        several = values and "=" in values[-1][0]
        return _joined(values[-1][0]) if several else right
    if formulas and (not values or formulas[-1].end() > values[-1].end()):
        return _joined_formulas(text, *formulas[-2:])
    return _joined(values[-1][0]) if values else ""


def _joined_formulas(text: str, *formulas: re.Match) -> str:
    """Return the last formula, and with it the one before if "or" or "and" joins them."""
    *before, last = formulas
    if before and _BETWEEN.fullmatch(text[before[0].end() : last.start()]):
        names = {re.split(r"=", _inside(match))[0].strip() for match in formulas}
        if len(names) == 1 or not any("=" in _inside(match) for match in formulas):
            return f"{_inside(before[0])}, {_inside(last)}"
    return _inside(last)


def _blank(match: re.Match) -> str:
    """Return blanks of a formula's length, so that positions stay; prose is returned as it is."""
    return match[0] if is_prose(_inside(match)) else " " * len(match[0])


def _inside(match: re.Match) -> str:
    """Return the text between the delimiters of a _FORMULA."""
    return next(part for part in match.groups() if part is not None).strip()


def _joined(values: str) -> str:
    """Return the values of a text as a list."""
    return re.sub(rf"{_OR}(?:{_NAME}(?=[^=]*$))?", ", ", values)
