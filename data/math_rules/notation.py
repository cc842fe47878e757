r"""Removes from answers and labels the notation that does not change their meaning."""

import re
import unicodedata

_SYMBOLS = {
    **dict.fromkeys("−–—", "-"), **dict.fromkeys("\u00a0\u2009\u202f", " "),
    **dict.fromkeys("“”‘€£¥₹¢\u2061\u200b", ""),
    "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "⁄": "/",
    "±": r"\pm ", "°": r"^\circ ", "’": "'",
    "π": r"\pi ", "θ": r"\theta ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ",
    "≠": r"\ne ", "≈": r"\approx ",
    "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ",
    "。": ".", "，": ",",
    **{chr(c): unicodedata.normalize("NFKC", chr(c)) for c in range(0xFF01, 0xFF5F)},  # full width
}  # fmt: skip
_SYMBOLS |= {
    c: " " + unicodedata.normalize("NFKC", c).replace("⁄", "/") for c in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞⅐⅑⅒"
}
UNICODE = str.maketrans(_SYMBOLS)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d*)?|\.\d+)"
FUNCTIONS = "sin|cos|tan|cot|sec|csc|sinh|cosh|tanh|arcsin|arccos|arctan|log|ln|exp|pi|infty"
_UNITS = (
    "cm|mm|km|dm|m|ft|in|inches|kg|mg|g|lb|lbs|oz|s|h|hr|hrs|min|ms|mL|ml|L|l|mph|USD|EUR|units?"
    "|deg|sq|cu"
)
_JOINED_UNITS = "cm|mm|km/h|km|kg|mg|mL|ml|mph|lbs|hrs"  # no product of letters looks like these
MAGNITUDES = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_MAGNITUDE = "|".join(MAGNITUDES)
PLAIN_TEXT = re.compile(  # commands that change the look of a text but not its meaning
    r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|mbox|operatorname|boldsymbol"
    r"|bm|underline|emph)\s*\{([^{}]*)\}"
)
_LOOKS = (
    r"\\(?:bf|it|rm|large|Large|huge|Huge|small|quad|qquad)(?![a-zA-Z])"
    r"|\\(?:text)?color\s*\{[^{}]*\}"
)
_ANNOUNCED = (
    r"\\text\s*\{[^{}]*(?:\bis|:)\s*\}|(?i:(?:the\s+)?(?:final\s+)?answer(?:\s+is\b|\s*[:=]))"
)
_REWRITES = [(re.compile(pattern), by) for pattern, by in (
    (r"\\langle(?![a-z])", "("),
    (r"\\rangle(?![a-z])", ")"),
    (r"(?:\b(?:US|CA|AU|HK)\\?\$|^\s*(?:USD|EUR|GBP|INR|Rs\.?)\s*)(?=\d)", ""),
    (r"(?<=[\w)}])\*\*\s*(-?\d+)(?!\w)", r"^{\1}"),  # x**2
    (r"(?<=[\w)}])\*\*(?=[\w(-])", "^"),
    (r"(?<=\d),\s*\\!\s*(?=\d{3})", ","),
    (
        r"\\left(?![a-z])|\\right(?![a-z])|\\displaystyle|\\!|\\?\$|\*\*|`|\\+\s*$"
        r"|(?<!\\)\\[\[\]()]",
        "",
    ),
    (r"\\begin\s*\{array\}(?:\s*\{[lcr|\s]*\})?", r"\\begin{matrix}"),
    (r"\\end\s*\{array\}", r"\\end{matrix}"),
    (
        r"[(\[]\s*\\begin\{matrix\}((?s:.)*?)\\end\{matrix\}\s*[)\]]",
        r"\\begin{pmatrix}\1\\end{pmatrix}",
    ),
    (
        r"\|\s*\\begin\{matrix\}((?s:.)*?)\\end\{matrix\}\s*\|",
        r"\\begin{vmatrix}\1\\end{vmatrix}",
    ),
    (r"\\(?:nice|s|x)frac(?![a-z])", r"\\frac"),
    (r"\{\s*(\w+)\s*\\choose\s*(\w+)\s*\}", r"\\binom{\1}{\2}"),
    (r"(?<=[)\]])\s*U\s*(?=[\[(])", r"\\cup "),
    (r"\^\s*\{?\s*\\(?:text|textrm|mathrm)\s*\{\s*o\s*\}\s*\}?", r"^\\circ "),
    (
        rf"(?<=\d)\s*(?:\\(?:text|mathrm|mbox)\s*\{{)?\s*({_MAGNITUDE})s?\b\s*\}}?",
        lambda match: f"e{MAGNITUDES[match[1]]} ",
    ),
    (r"(?<=\d)\s*~\s*(?=\\[dt]?frac)", ""),
    (
        r"(\\(?:sin|cos|tan|cot|sec|csc))\s*\(?\s*(\d+)\s*\^\s*\{?\s*\\circ\s*\}?\s*\)?",
        r"\1(\\frac{\2\\pi}{180})",
    ),
    (r"^\s*\\?\{\s*[a-zA-Z]\s*(?:\\mid|\\vert|\||:)(.*?)\\?\}\s*$", r"\1"),  # {x | x > 1}
    (_LOOKS, " "),
    (rf"^\s*(?:{_ANNOUNCED})", ""),
    (r"^\s*(?:\\approx|\\sim(?![a-z])|~|(?:about|approximately|roughly)\b)", ""),
    (r"\\varnothing|\\\{\s*\\\}|\\O(?![a-zA-Z])", r"\\emptyset "),
    (r"(?<=\d)(?:\\[,;: ]|~|\{,\}|\s|\\thinspace)+(?=\d{3}(?!\d))", ""),  # 14\,916
    (r"(?<=\d)\s*\\[,;: ]\s*", " "),
    (r"(?<![\w.])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\w.])", r"\1\\frac{\2}{\3}"),  # 3 1/2
    (r"√\s*\(([^()]*)\)|√\s*(\w+)|(?<![a-zA-Z\\])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1\2\3}"),
    (rf"(?<![a-zA-Z\\])({FUNCTIONS})(?![a-zA-Z])", r"\\\1 "),
    (r"(?<![a-zA-Z\\])(?:infinity|inf|oo)(?![a-zA-Z])", r"\\infty "),
    (r"\\%|\b[Pp]ercent(?:age)?\b|\bpct\b", "%"),
)]  # fmt: skip
_REPEATING = re.compile(r"(\d*)\.(\d*)(?:\\overline|\\bar|\\dot)\s*(?:\{(\d+)\}|(\d))")


def _fraction_of_repeating(match: re.Match) -> str:
    r"""Return a repeating decimal as a fraction: 0.\overline{3} is \frac{3}{9}."""
    whole, fixed, cycle = match[1] or "0", match[2], match[3] or match[4]
    bottom = 10 ** len(fixed) * (10 ** len(cycle) - 1)
    return rf"\frac{{{int(whole + fixed + cycle) - int(whole + fixed)}}}{{{bottom}}}"


def normalized(text: str) -> str:
    """Return an answer or label in normal form, as _REWRITES and the steps below define it."""
    text = text.translate(UNICODE)
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda m: f"^{{{m[0].translate(_SUPERSCRIPTS)}}}", text)
    text = re.sub(r"\d", lambda match: str(int(match[0])), text)  # digits of every script
    text = _REPEATING.sub(_fraction_of_repeating, text)
    for pattern, by in _REWRITES:
        text = pattern.sub(by, text)
    while True:
        before, text = text, text.strip(" \t\r\n\"'*").rstrip(".,;:?").strip()
        if match := PLAIN_TEXT.fullmatch(text):
            text = match[1]
        elif match := re.fullmatch(
            rf"\(([-+]?{NUMBER})\)|\[([-+]?{NUMBER})\]|\(?([A-Za-z])\)|\{{([^{{}}]*)\}}", text
        ):
            text = next(part for part in match.groups() if part is not None)
        elif match := re.fullmatch(r"(?:[Oo]ption|[Cc]hoice)\s+(\(?[A-J]\)?)", text):
            text = match[1]
        if text == before:
            return _without_unit(text)


_FONT = r"\\(?:text|textrm|textbf|textnormal|mathrm|mbox)"


def _without_unit(text: str) -> str:
    r"""Remove the unit after a number: \text{cm}^2, cm, a word. Algebra such as 3c stays."""
    power = r"(?:\s*\^\s*(?:\d|\{-?\d\}))?"
    name = rf"{_FONT}\s*\{{(?!\s*(?:and|or)\b)[^{{}}]*\}}{power}"
    name = rf"(?:{name}|\\frac\s*\{{{name}\}}\s*\{{{name}\}})"
    text = re.sub(rf"(?<=.)\s*{name}(?:\s*/?\s*{name})*\s*\.?$", "", text)
    text = re.sub(r"\s*(?:\^\s*\{?\s*\\circ\s*\}?|\\degree)\s*[CF]?$", "", text)
    unit = rf"(?:(?:{_UNITS})(?![a-zA-Z])\.?|(?!(?:and|or|mod|sqrt)\b)[A-Za-z]{{3,}})"
    more = rf"(?:(?:\s*/\s*|\s+(?:per\s+|of\s+)?){unit}{power})*"
    text = re.sub(rf"(?<=[\d.}}])\s+{unit}{power}{more}$", "", text) or text
    return re.sub(rf"^([-+]?{NUMBER})(?:{_JOINED_UNITS}){power}$", r"\1", text)


_ENVIRONMENT = re.compile(r"\\(?:begin|end)\s*\{[a-zA-Z]+\*?\}")


def without_commands(text: str) -> str:
    """Return a text without LaTeX's own words: names of environments such as pmatrix, and fonts."""
    return PLAIN_TEXT.sub("", _ENVIRONMENT.sub("", text))


def is_words(text: str) -> bool:
    """Return whether a normalized text is letters, a code such as H2O, or a text with words."""
    if re.fullmatch(r"[^\W\d_][^\W\d_\s]*(?:\s+[^\W\d_]+)*|(?=\w*[A-Za-z]\d)[A-Za-z0-9]{2,}", text):
        return True
    if not re.fullmatch(r"[^\W\d_](?:[^\W_]|[\s'’!?.;:&/()-])*", text):
        return False
    has_word = re.search(r"(?<!\\)[^\W\d_]{4,}", text)
    has_formula = re.search(r"sqrt|\d\s*[-/]|\\", text)
    return bool(has_word) and not has_formula


_PROSE = re.compile(
    rf"(?<![\\a-zA-Z])(?:(?!(?:{FUNCTIONS}|sqrt|and|or|mod)\b)[A-Za-z]{{3,}}"
    r"|(?i:is|it|so|we|to|of|at|by|he|an|as|on|be|no)\b)"
    r"|(?:and|or)$"
)


def is_prose(text: str) -> bool:
    """Return whether a text is more than an answer.

    Prose has words, and is neither a number with a unit nor a short name.
    """
    text = normalized(text)
    if not _PROSE.search(without_commands(text)):
        return False
    has_digits = bool(re.search(r"\d", text))
    return has_digits or not is_words(text) or len(text.split()) > 3
