"""Chat messages -> the text of a prompt, by the tokenizer's chat template.

A chat template is a program by the model's makers. It silently leaves out what it does not know,
such as the role developer, tools, or the field name. Here everything that a row or a flag gives to
the template must change the prompt's text, or it is refused. The only exception is the id that
links a tool's result to its call.
"""

import contextlib
import inspect
import re
import resource
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import backends  # noqa: F401  before transformers, see data/tokenizer.py
import jinja2
import jinja2.meta
from transformers import PreTrainedTokenizerBase

from common.errors import BadInput, all_problems
from common.overrides import parse_overrides

TEMPLATE_S = 2  # seconds for one row; a usual template needs a thousandth of that
TEMPLATE_BYTES = 2**29  # extra memory for one row
MOST_CHARACTERS = 8_000_000  # of one prompt; a context of a million tokens has about half as many
SHORT = 20  # characters; a longer text does not stand in the prompt by accident


@all_problems
def check_template_kwargs(
    tokenizer: PreTrainedTokenizerBase, template_kwargs: tuple[str, ...]
) -> None:
    """Refuse --chat-template-kwargs that would do nothing, or not what they say."""
    flag, templates = "--chat-template-kwargs", tokenizer.chat_template
    given = parse_overrides(template_kwargs, flag=flag, fields=None)
    if not given:
        return
    if not templates:
        yield f"{flag} needs a chat template, and the tokenizer has none: leave {flag} out"
        return
    sources = templates.values() if isinstance(templates, dict) else [templates]
    read = set().union(*(_names_read(source) for source in sources))
    taken = {"messages", *inspect.signature(tokenizer.apply_chat_template).parameters}
    taken |= set(tokenizer.special_tokens_map)
    names = sorted(read - taken - {"raise_exception", "strftime_now", "range", "namespace"})
    choice = f"it reads {', '.join(names)}" if names else "it reads none that can be set"
    for key, value in given.items():
        if key in taken:
            yield f"{flag} {key} is set by the program itself: leave it out"
        elif key not in read:
            yield f"{flag} {key} is not a name that the chat template reads; {choice}"
        elif isinstance(value, str) and value.lower() in ("true", "false", "null", "none"):
            right = value.lower().replace("none", "null")
            yield f"{flag} {key}={value} would be text: write {key}={right}"


def _names_read(template: str) -> set[str]:
    """Return the names that a chat template reads from its caller."""
    # Jinja does not know the tag "generation", which transformers adds.
    template = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)
    try:
        parsed = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    except (jinja2.TemplateError, RecursionError) as error:
        raise BadInput(
            f"the tokenizer's chat template cannot be read ({error}): correct it"
        ) from error
    return jinja2.meta.find_undeclared_variables(parsed)


def chat_text(
    messages: list,
    tokenizer: PreTrainedTokenizerBase,
    *,
    where: str,
    tools: list[dict] | None = None,
    system_prompt: str = "",
    template_kwargs: tuple[str, ...] = (),
) -> str:
    """Return chat messages, and the start of the answer, as the chat template writes them.

    where: names the row in errors. Raises BadInput for messages that the template refuses, and for
    any part of them that it leaves out.
    """
    if tokenizer.chat_template is None:
        fix = "give the prompt as text, without --chat"
        raise BadInput(
            f"{where}: chat messages need a chat template, and the tokenizer has none: {fix}"
        )
    messages = [_message(message, where=where) for message in messages]
    _check_last(messages[-1], where=where)
    if system_prompt:
        if messages[0]["role"] == "system":
            fix = "leave --system-prompt out, or remove that message"
            raise BadInput(f"{where} has a system message of its own: {fix}")
        messages = [{"role": "system", "content": system_prompt}, *messages]
    options = parse_overrides(template_kwargs, flag="--chat-template-kwargs", fields=None)

    def render(messages: list[dict], tools: list[dict] | None) -> str:
        with bounded(where):
            text = tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=True, tokenize=False, **options
            )
        if len(text) > MOST_CHARACTERS:
            size = f"writes {len(text)} characters, more than {MOST_CHARACTERS}"
            raise EndlessTemplate(f"{where}: the tokenizer's chat template {size}: correct it")
        return text

    try:
        text = render(messages, tools)
    except EndlessTemplate:
        raise
    except Exception as error:  # a template is a program, and may raise anything
        raise BadInput(
            f"{where}: the tokenizer's chat template refuses these messages ({error}): change "
            "their roles or order"
        ) from error
    for part, messages_without, tools_without in _parts(messages, tools, text):
        try:
            is_left_out = render(messages_without, tools_without) == text
        except EndlessTemplate:
            raise
        except Exception:  # the template fails without that part, so it reads it
            is_left_out = False
        if is_left_out:
            raise BadInput(
                f"{where}: the tokenizer's chat template leaves out {part}: remove it, or use a "
                "template that writes it"
            )
    return text


class _TooLong(BaseException):
    """Raised by the alarm. Not an Exception: Jinja catches those in constant expressions."""


class EndlessTemplate(BadInput):
    """A chat template takes too long, or too much memory, for one row."""


@contextlib.contextmanager
def bounded(where: str) -> Iterator[None]:
    """Limit a chat template to TEMPLATE_S seconds and TEMPLATE_BYTES of memory beyond today's.

    Only the main thread of a process can set an alarm; in other threads there is no limit. The
    checks before the start run in the main thread. Raises EndlessTemplate.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(signum, frame):
        raise _TooLong

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    most = pages * resource.getpagesize() + TEMPLATE_BYTES
    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, TEMPLATE_S)
    resource.setrlimit(resource.RLIMIT_AS, (most if soft == -1 else min(soft, most), hard))
    try:
        try:
            yield
        finally:  # inside the outer try: a late alarm may be raised here
            signal.setitimer(signal.ITIMER_REAL, 0)
    except (_TooLong, MemoryError) as error:
        bound = f"{TEMPLATE_S} s" if isinstance(error, _TooLong) else f"{TEMPLATE_BYTES} bytes"
        rule = f"needs more than {bound} for one row: correct it, or use another model"
        raise EndlessTemplate(f"{where}: the tokenizer's chat template {rule}") from error
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, signal.SIG_DFL if before is None else before)


def _message(message: Any, *, where: str) -> dict:
    """Return a chat message without its null fields. Raises BadInput if it is no valid message."""
    if isinstance(message, dict):
        message = {name: value for name, value in message.items() if value is not None}
        if message.get("tool_calls"):
            message = {"content": "", **message}
        role, content = message.get("role"), message.get("content")
        if role and isinstance(role, str) and isinstance(content, str):
            return message
    rule = 'every chat message needs a "role" and a text "content" (join the parts of a list)'
    raise BadInput(f"{where}: {rule}")


def _check_last(message: dict, *, where: str) -> None:
    """Raise BadInput if a prompt cannot end with this message."""
    if message["role"] == "assistant":
        raise BadInput(
            f"{where}: the last message is the assistant's, but a prompt ends before the answer: "
            "remove it, or give the prompt as text if the model is to continue it"
        )
    if message["role"] == "user" and not message["content"].strip():
        raise BadInput(f"{where} has no prompt: the last message is blank")


def _parts(messages: list[dict], tools: list[dict] | None, text: str) -> Iterator[tuple]:
    """Yield (a part that a template may leave out, messages and tools that lack or change it)."""
    if tools:
        yield 'the row\'s "tools"', messages, None
    for at, message in enumerate(messages):
        content = message["content"].strip()
        if content and (len(content) < SHORT or content not in text):
            changed = {**message, "content": message["content"] + "0"}
            others = [*messages[:at], changed, *messages[at + 1 :]]
            yield f"message {at + 1}, of role {message['role']!r}", others, tools
    for name in dict.fromkeys(name for message in messages for name in message):
        if name in ("role", "content", "tool_call_id"):
            continue
        users = [message for message in messages if name in message]
        if name == "name" and all(message["role"] == "tool" for message in users):
            continue  # like tool_call_id, it only links a result to its call
        if any(message[name] for message in users):
            others = [{n: v for n, v in message.items() if n != name} for message in messages]
            yield f'the messages\' field "{name}"', others, tools
