"""Rewards that read text: F1 of words, the letter of a multiple choice, the vote of a group.

They judge what stands behind a response's thoughts (</think>): the last <answer> ... </answer>,
else the last \\boxed{...}, else all of it. It becomes the sample's answer.
"""

import re
import string
from collections import Counter
from collections.abc import Callable
from typing import Any

from data import math_judge
from data.sample import Sample

ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
PUNCTUATION = str.maketrans("", "", string.punctuation)
ARTICLES = re.compile(r"\b(a|an|the)\b")
# What may stand before a letter: markup and brackets, as in **B**, (B), `B`, \text{B}, \(B\).
OPENING = r"(?:\\(?:text|textbf|textrm|mathrm|mathbf)\{|\\\(|[\s*_`($\"'\[{])*"
# A letter that stands alone. In lower case it must stand in brackets or end its line: "the answer
# is a number" chooses nothing.
LETTER = r"([A-Z]|(?<=[({])[a-z]|[a-z](?=[\s.*_`)]*(?:$|\n)))(?![A-Za-z0-9'])"
# Where a response says that a letter is its choice. "I" is taken for a word.
CHOICE = re.compile(
    r"(?i:\b(?:answer|option|choice)\b(?:\s+(?:answer|option|choice))?[\s*_\"'`]*"
    r"(?:is|would be|should be|must be|:|=|\n)[\s:*]*(?:option|choice)?)"
    rf"{OPENING}(?!I\s){LETTER}"
)
# A response, or a line of it, that is a letter, perhaps with the text of that option: "(B) Paris".
BARE = re.compile(rf"^{OPENING}([A-Za-z])[*_`\"'}}\])]*(?:[):,\]]|\.(?!\w)|\s*$)", re.MULTILINE)
# More than one letter is no choice: "B or C", "A, B".
ANOTHER = re.compile(r"[\s*_`)\]}$]*(?:,|/|&|or\b|and\b)[\s*_`(\[{$]*[A-Z](?![A-Za-z0-9'])")


def answer_of(response: str) -> str:
    """Return the text of a response that is to be judged, without surrounding blanks."""
    said = response.rpartition("</think>")[2]
    for form in (ANSWER, BOXED):
        if marked := form.findall(said):
            return marked[-1].strip()
    return said.strip()


def label_problems(labels: list, *, reads: Callable[[Any], Any], reward: str) -> list[str]:
    """Return for each label why --reward `reward` cannot judge by it; "" if it can.

    reads: raises ValueError, with the reason, for a label that it cannot read.
    """
    problems = []
    for label in labels:
        problem = 'holds ####: add --label-after "####"' if "####" in str(label) else ""
        try:
            reads(label)
        except ValueError as error:
            problem = problem or f"{error}: --reward {reward} cannot judge by it"
        problems.append(problem)
    return problems


# --- F1 -----------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    """Return a text's words in lower case, without punctuation and English articles.

    This is the normalization of SQuAD's official evaluation, arXiv 1606.05250.
    """
    return ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split()


def f1(answer: str, label: str) -> float:
    """Return 2 P R / (P + R) of the words that answer and label share; 0 if they share none."""
    said, wanted = words(answer), words(label)
    shared = sum((Counter(said) & Counter(wanted)).values())
    return 2 * shared / (len(said) + len(wanted)) if shared else 0.0


def accepted_texts(label: Any) -> list[str]:
    """Return the answers that a label accepts: a text or number, or a list of these.

    Raises ValueError, with the reason, for a label that no answer can equal.
    """
    texts = label if isinstance(label, (list, tuple)) else [label]
    if not texts:
        raise ValueError("is an empty list")
    texts = [math_judge.label_text(text) for text in texts]
    for text in texts:
        if not words(text):
            raise ValueError(f"has no word but articles and punctuation in {text!r}")
    return texts


def f1_reward(sample: Sample) -> float:
    """Return the F1 of the answer's words and the label's; of several labels, the largest."""
    sample.answer = answer_of(sample.response)
    return max(f1(sample.answer, text) for text in accepted_texts(sample.label))


# --- multiple choice ----------------------------------------------------------------------------


def choice_of(response: str) -> str:
    """Return the letter that a response chooses, in upper case; "" if it chooses none or several.

    A marked answer counts; see above. Without one, the last statement that names a letter does:
    "the answer is (B)", "Answer: B", "the correct option is B". Without that, the response must
    have just one line that is a letter, perhaps with its option: "B", "(B) Paris".
    """
    text = answer_of(response)
    stated = list(CHOICE.finditer(text))
    found = stated[-1:] or list(BARE.finditer(text))
    if len(found) != 1 or ANOTHER.match(text, found[0].end(1)):
        return ""
    return found[0][1].upper()


def choice_label(label: Any) -> str:
    """Return a label's letter, in upper case. Raises ValueError for a label that is none.

    A number is refused: some files count options from 0, others from 1.
    """
    text = math_judge.label_text(label)
    letter = re.fullmatch(r"\(?([A-Za-z])[).]?", text)
    if not letter:
        raise ValueError("is no letter such as B")
    return letter[1].upper()


def choice_reward(sample: Sample) -> float:
    """Return 1 if the response chooses the label's letter."""
    sample.answer = choice_of(sample.response)
    return float(sample.answer == choice_label(sample.label))


# --- the vote of a group --------------------------------------------------------------------------


def majority_reward(samples: list[Sample]) -> list[float]:
    """Return 1 for each answer that most answers of its group equal, else 0. It reads no label.

    Test-time reinforcement learning, arXiv 2504.16084, section 2.2. Of equally frequent answers the
    one given first counts. Empty answers and responses that were cut off have no vote, and get 0.
    So do all answers where no two agree.
    """
    for sample in samples:
        sample.answer = answer_of(sample.response) if sample.finish_reason == "stop" else ""
    votes = Counter(sample.answer for sample in samples if sample.answer)
    winner, count = (votes.most_common(1) or [("", 0)])[0]
    return [float(count > 1 and sample.answer == winner) for sample in samples]


majority_reward.of_group = True
f1_reward.reads, choice_reward.reads = accepted_texts, choice_label
