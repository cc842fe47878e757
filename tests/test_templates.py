"""A chat template that does not end, or makes a giant text, is refused at the first row.

Why: a chat template is a program that comes with a model. Every rank runs it on every row, before
the start. Not covered: templates outside the main thread, which have no bound.
"""

import json
import resource
import signal

import pytest
from conftest import ROOT

from common.errors import BadInput
from common.settings import DataSettings
from data import chat
from data.prompt_files import read_prompts
from data.tokenizer import load_tokenizer


@pytest.fixture
def tokenizer(monkeypatch):
    monkeypatch.setattr(chat, "TEMPLATE_S", 0.2)
    return load_tokenizer(str(ROOT / "toy"))


SLOW = {
    "loops in loops":
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a large number": "{{ 3 ** (10 ** 9) % 7 }}",
    "a giant string": "{{ 'a' * 10 ** 11 }}",
    "a long string": "{{ 'a' * 10 ** 8 }}",
    "a string that doubles":
        "{% set n = namespace(x='a') %}"
        "{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
    "a wide number": "{{ '%02000000000d' % 1 }}",
}  # fmt: skip
# Jinja refuses these itself and at once, so the check goes on with other rows.
WRONG = {
    "a range": "{% for i in range(10**12) %}{% endfor %}",
    "brackets": "{{ " + "(" * 100_000 + " }}",
}
ALL = [(text, True) for text in SLOW.values()] + [(text, False) for text in WRONG.values()]


def read(path, tokenizer) -> list:
    return read_prompts(str(path), tokenizer, DataSettings(), name="p", max_prompt_tokens=99)


def write_rows(path, count: int) -> None:
    row = json.dumps({"prompt": [{"role": "user", "content": "1+1="}], "label": "2"})
    path.write_text(f"{row}\n" * count, encoding="utf-8")


@pytest.mark.parametrize("template, is_endless", ALL, ids=[*SLOW, *WRONG])
def test_a_template_that_does_not_end_is_refused_at_the_first_row(
    monkeypatch, tokenizer, tmp_path, template, is_endless
):
    """The check does not try other rows, which would take as long."""
    tokenizer.chat_template = template
    write_rows(tmp_path / "p.jsonl", 3)
    rendered = []

    def message_of(message, *, where):
        rendered.append(where)
        return message

    monkeypatch.setattr(chat, "_message", message_of)
    with pytest.raises(BadInput, match="p.jsonl line 1: the tokenizer's chat template"):
        read(tmp_path / "p.jsonl", tokenizer)
    assert len(rendered) == (1 if is_endless else 3)


@pytest.mark.parametrize("template", ["{{ messages[0].content }}", SLOW["a giant string"]])
def test_the_limits_of_a_template_end_with_it(tokenizer, tmp_path, template):
    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)
    tokenizer.chat_template = template
    write_rows(tmp_path / "p.jsonl", 1)
    try:
        read(tmp_path / "p.jsonl", tokenizer)
    except BadInput:
        pass
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_part_on_which_only_the_comparison_does_not_end_is_refused(tokenizer, tmp_path):
    """The check for left-out messages renders a second text with another message in its place."""
    loop = SLOW["loops in loops"]
    tokenizer.chat_template = (
        "{{ messages[0].content }}{% if messages[0].content != '1+1=' %}" + loop + "{% endif %}"
    )
    write_rows(tmp_path / "p.jsonl", 2)
    rule = "line 1: the tokenizer's chat template needs more than 0.2 s"
    with pytest.raises(BadInput, match=rule):
        read(tmp_path / "p.jsonl", tokenizer)


def test_names_of_a_template_of_many_brackets_are_not_looked_for(tokenizer):
    tokenizer.chat_template = WRONG["brackets"]
    with pytest.raises(BadInput, match="chat template cannot be read"):
        chat.check_template_kwargs(tokenizer, ("a=1",))
