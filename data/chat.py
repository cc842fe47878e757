"""Chat messages -> the text of a prompt, by the tokenizer's chat template.

A chat template is a program of the model's makers. It leaves out in silence what it does not know,
such as the role developer, tools, or the field name. What a row or a flag gives to the template
either changes the prompt's text or is refused. Only what says which call a result belongs to may be
left out.
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

import jinja2
import jinja2.meta
from transformers import PreTrainedTokenizerBase

from common.errors import BadInput, all_problems
from common.overrides import parse_overrides

TEMPLATE_S = 2  # seconds for one row, of which a usual template needs a thousandth
TEMPLATE_BYTES = 2**29
MOST_CHARACTERS = 8_000_000  # of one prompt; a context of a million tokens has some four
SHORT = 20  # characters; a longer text that stands in the prompt is no accident


@all_problems
def check_template_kwargs(
    tokenizer: PreTrainedTokenizerBase, template_kwargs: tuple[str, ...]
) -> None:
    """Refuse --chat-template-kwargs that would do nothing, or something else than they say."""
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
            yield f"{flag} {key} is no name that the chat template reads; {choice}"
        elif isinstance(value, str) and value.lower() in ("true", "false", "null", "none"):
            right = value.lower().replace("none", "null")
            yield f"{flag} {key}={value} would be text: write {key}={right}"


def _names_read(template: str) -> set[str]:
    """Return the names that a chat template takes from outside."""
    template = re.sub(
        r"\{%-?\s*(end)?generation\s*-?%\}", "", template
    )  # a tag of transformers' own
    try:
        parsed = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    except (jinja2.TemplateError, RecursionError) as error:
        raise BadInput(
            f"the tokenizer's chat template cannot be read ({error}): mend it"
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
    """Render chat messages, and the begin of the answer, by the tokenizer's chat template.

    Raises BadInput for what the template refuses, and for all that it would leave out.
    """
    if tokenizer.chat_template is None:
        raise BadInput(
            f"{where}: chat messages need a chat template, and the tokenizer has none: give the "
            "prompt as text, without --chat"
        )
    messages = [_message(message, where=where) for message in messages]
    last = messages[-1]
    if last["role"] == "assistant":
        raise BadInput(
            f"{where}: the last message is the assistant's, and a prompt ends before the answer: "
            "remove it, or give the prompt as text if the model is to go on with it"
        )
    if last["role"] == "user" and not last["content"].strip():
        raise BadInput(f"{where} has no prompt: the last message is blank")
    if system_prompt:
        if messages[0]["role"] == "system":
            raise BadInput(
                f"{where} has a system message of its own: leave --system-prompt out, or remove "
                "that message"
            )
        messages = [{"role": "system", "content": system_prompt}, *messages]
    options = parse_overrides(template_kwargs, flag="--chat-template-kwargs", fields=None)

    def render(messages: list[dict], tools: list[dict] | None) -> str:
        with bounded(where):
            text = tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=True, tokenize=False, **options
            )
        if len(text) > MOST_CHARACTERS:
            size = f"writes {len(text)} characters, more than {MOST_CHARACTERS}"
            raise EndlessTemplate(f"{where}: the tokenizer's chat template {size}: mend it")
        return text

    try:
        text = render(messages, tools)
    except EndlessTemplate:
        raise
    except (
        Exception
    ) as error:  # a template is a program of the model's makers, and raises what it likes
        raise BadInput(
            f"{where}: the tokenizer's chat template refuses these messages ({error}): change "
            "their roles or order"
        ) from error
    for part, messages_without, tools_without in _parts(messages, tools, text):
        try:
            is_left_out = render(messages_without, tools_without) == text
        except EndlessTemplate:
            raise
        except Exception:  # the template cannot do without that part: it reads it
            is_left_out = False
        if is_left_out:
            raise BadInput(
                f"{where}: the tokenizer's chat template leaves out {part}: remove it, or use a "
                "template that writes it"
            )
    return text


class _TooLong(BaseException):
    """Raised by the alarm. Jinja catches every Exception of a part that it computes beforehand."""


class EndlessTemplate(BadInput):
    """A chat template that takes too long, or too much memory, on one row."""


@contextlib.contextmanager
def bounded(where: str) -> Iterator[None]:
    """Give a chat template TEMPLATE_S seconds and TEMPLATE_BYTES of memory more than there are.

    Only a process's main thread can set an alarm; in another one there is no bound. What is checked
    before the start is rendered in the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(signum, frame):
        raise _TooLong

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    in_use = (
        int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        * resource.getpagesize()
    )
    most = in_use + TEMPLATE_BYTES
    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, TEMPLATE_S)
    resource.setrlimit(resource.RLIMIT_AS, (most if soft == -1 else min(soft, most), hard))
    try:
        try:
            yield
        finally:  # an alarm that is late, after much memory was asked for, is raised in here
            signal.setitimer(signal.ITIMER_REAL, 0)
    except (_TooLong, MemoryError) as error:
        bound = f"{TEMPLATE_S} s" if isinstance(error, _TooLong) else f"{TEMPLATE_BYTES} bytes"
        rule = f"needs more than {bound} for one row: mend it, or use another model"
        raise EndlessTemplate(f"{where}: the tokenizer's chat template {rule}") from error
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, signal.SIG_DFL if before is None else before)


def _message(message: Any, *, where: str) -> dict:
    """Return a chat message whose content is text; fields that are null count as absent."""
    if isinstance(message, dict):
        message = {name: value for name, value in message.items() if value is not None}
        if message.get("tool_calls"):
            message = {"content": "", **message}
        role, content = message.get("role"), message.get("content")
        if role and isinstance(role, str) and isinstance(content, str):
            return message
    raise BadInput(
        f'{where}: every chat message needs a "role" and a text "content" (join the parts of '
        "a list)"
    )


def _parts(messages: list[dict], tools: list[dict] | None, text: str) -> Iterator[tuple]:
    """Yield each part that a template may leave out, with messages and tools that lack it."""
    if tools:
        yield 'the row\'s "tools"', messages, None
    for at, message in enumerate(messages):
        content = message["content"].strip()
        if content and (len(content) < SHORT or content not in text):
            other = {**message, "content": message["content"] + "0"}
            yield (
                f"message {at + 1}, of role {message['role']!r}",
                [*messages[:at], other, *messages[at + 1 :]],
                tools,
            )
    for name in dict.fromkeys(name for message in messages for name in message):
        # These only say which call a result belongs to.
        is_reference = (
            name == "tool_call_id"
            or name == "name"
            and all(m["role"] == "tool" for m in messages if name in m)
        )
        if (
            name not in ("role", "content")
            and not is_reference
            and any(m.get(name) for m in messages)
        ):
            yield (
                f'the messages\' field "{name}"',
                [{n: v for n, v in m.items() if n != name} for m in messages],
                tools,
            )
