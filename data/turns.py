"""What a chat template writes between two turns of the assistant, around a result: as token ids.

    the policy sampled   ... </tool_call> <|im_end|>
    appended behind it   \\n <|im_start|>user\\n<tool_response>\\n RESULT \\n</tool_response> ...
                         ... <|im_end|>\\n<|im_start|>assistant\\n

A conversation is one list of ids that grows. What the policy sampled stays in it as it was sampled,
though templates rewrite earlier turns: Qwen3's removes their thoughts and their outer blanks. So a
template is asked only for what follows a turn: the rendered conversation from the end of the turn
on. These tokens equal those of the conversation tokenized as a whole, for they begin with a special
token, before which every tokenizer divides the text.
"""

import re
from dataclasses import dataclass

import backends  # noqa: F401  before transformers, see data/tokenizer.py
from transformers import PreTrainedTokenizerBase

from common.errors import BadInput
from common.overrides import parse_overrides
from data.chat import chat_text

# Texts that stand in no template; a template that alters one is refused.
ASKED, SAID, RESULT = "Xquestion7", "Xturn7", "Xresult7"
NO_ROLE = "xnobody7"


@dataclass(frozen=True)
class Turns:
    """How a tokenizer's chat template goes on after a turn of the assistant; made by find_turns."""

    tokenizer: PreTrainedTokenizerBase
    role: str
    """Of the message that holds a result: tool or user."""
    options: dict
    """Values for variables of the template."""
    before: str
    """What the template writes between the turn's text and the result."""
    after: str
    """What it writes behind the result; the begin of the next turn is its end."""

    def result_ids(self, result: str, *, sampled: int) -> list[int]:
        """Return the ids to append after a turn whose last sampled token is `sampled`.

        They are the end of the turn, the result, and the begin of the next turn. The end token is
        left out where the policy has sampled it. Another end, such as </tool_call> or Llama 3.1's
        <|eom_id|>, stays, and the template's follows it. An added token that a result spells does
        not become that token: a tool's output must not end a turn or begin one. Raises ValueError
        for a result around which the template writes something else than around others.
        """
        messages = _messages(self.role, result)
        text = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False, **self.options
        )
        text = text[text.index(SAID) + len(SAID) :]
        end = len(text) - len(self.after)
        has_both = text.startswith(self.before) and text.endswith(self.after)
        if end < len(self.before) or not has_both:
            raise ValueError(f"the chat template writes something else around {result[:80]!r}")
        inner = text[len(self.before) : end]
        if pieces := self._without_added_tokens(inner):
            middle = [number for piece in pieces for number in self._ids(piece)]
            ids = self._ids(self.before) + middle + self._ids(self.after)
        else:
            ids = self._ids(text)
        return ids[1:] if ids[0] == sampled else ids

    def _without_added_tokens(self, text: str) -> list[str]:
        """Return a text cut inside every added token that it spells; [] if it spells none.

        Added tokens are all that a tokenizer finds before it divides a text: <|im_start|>, also
        <tool_call>, whether it calls them special or not.
        """
        spelled = {token.content for token in self.tokenizer.added_tokens_decoder.values()}
        spelled = [re.escape(token) for token in spelled if len(token) > 1]
        found = re.finditer("|".join(sorted(spelled, key=len, reverse=True)), text)
        cuts = [match.start() + 1 for match in found] if spelled else []
        if not cuts:
            return []
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
        return [part for piece in pieces for part in self._without_added_tokens(piece) or [piece]]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids


def find_turns(
    tokenizer: PreTrainedTokenizerBase, template_kwargs: tuple[str, ...] = (), role: str = "tool"
) -> Turns:
    """Find what the chat template writes around a result, by rendering marked messages.

    template_kwargs: as --chat-template-kwargs. Raises BadInput where this is not one certain text:
    the template refuses, leaves out or alters a message, does not know the role, or ends a turn
    with no special token.
    """
    options = parse_overrides(template_kwargs, flag="--chat-template-kwargs", fields=None)
    where = f"a conversation with a result in role {role!r}"

    def render(role: str, result: str = RESULT) -> str:
        messages = _messages(role, result)
        return chat_text(messages, tokenizer, where=where, template_kwargs=template_kwargs)

    text = render(role)
    for marker, what in ((SAID, "the assistant's turn"), (RESULT, "the result")):
        if text.count(marker) != 1:
            found = f"{text.count(marker)} times instead of once"
            raise BadInput(
                f"{where}: the tokenizer's chat template writes {what} {found}: use a template that"
                " writes each message once and as it is"
            )
    _, _, suffix = text.partition(SAID)
    before, found, after = suffix.partition(RESULT)
    if not found:
        raise BadInput(
            f"{where}: the tokenizer's chat template writes the result before the turn that asked"
            " for it: use a template that keeps the order of messages"
        )
    if role != "user" and _writes_any_role(render, role, suffix):
        raise BadInput(
            f"{where}: the tokenizer's chat template does not know this role, and would write any"
            " name: give results in the role user"
        )
    closed = tokenizer.apply_chat_template(
        _messages(role, RESULT), add_generation_prompt=False, tokenize=False, **options
    )
    if closed == text:
        raise BadInput(
            f"{where}: the tokenizer's chat template writes no begin of the assistant's turn:"
            " use a template that reads add_generation_prompt"
        )
    turns = Turns(tokenizer, role, options, before, after)
    ids, whole = turns._ids(suffix), turns._ids(text)
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    if not ids or ids[0] not in special or whole[-len(ids) :] != ids:
        raise BadInput(
            f"{where}: the tokenizer's chat template ends a turn with {suffix[:20]!r}, which begins"
            " with no special token, so where the turn's tokens end is uncertain: use a template"
            " that ends turns with one"
        )
    return turns


def _messages(role: str, result: str) -> list[dict]:
    contents = {"user": ASKED, "assistant": SAID}
    messages = [{"role": name, "content": text} for name, text in contents.items()]
    return [*messages, {"role": role, "content": result}]


def _writes_any_role(render, role: str, suffix: str) -> bool:
    """Return whether a name that no template knows is written in the role's place."""
    try:
        return render(NO_ROLE).partition(SAID)[2] == suffix.replace(role, NO_ROLE)
    except BadInput:  # refused or left out, as it should be
        return False
