"""What tokenizer and chat template make of a prompt: nothing added twice, nothing lost in silence.

Why: a character without a token, or a message that the template leaves out, gives the model another
task than the file states. The tokenizers here are small ones of the kinds in use: byte level,
byte fallback, unigram, WordPiece. Not covered: the tokenizers of published models.
"""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from common.errors import BadInput
from common.settings import DataSettings
from data.chat import check_template_kwargs
from data.prompts import (
    generated,
    toy_prompts,
)
from data.tokenizer import encode, load_tokenizer
from prompt_helpers import CHAT, TOY, read, write, write_parquet

pytest_plugins = ["prompt_helpers"]  # the fixture tokenizer


# --- what the tokenizer makes of a text ---------------------------------------------------------


@pytest.mark.parametrize("template, text, ids", [
    ("<s> $A </s>", "1+2=", [1, 4, 13, 5, 14]),  # an end token would end the prompt
    ("$A </s>", "1+2=", [4, 13, 5, 14]),
    ("$A </s>", "1+2=</s>", [4, 13, 5, 14, 2]),  # one that the text writes stays
    ("<s> $A", "<s>1+2=", [1, 4, 13, 5, 14]),  # one start token is enough
    ("<s> $A </s>", "<s>1+2=</s>", [1, 4, 13, 5, 14, 2]),
    ("<s> <unused15> $A <unused16>", "1+2=", [1, 15, 4, 13, 5, 14]),  # as [CLS] and [SEP]
    ("<s> <unused15> $A", "<s><unused15>1+2=", [1, 15, 4, 13, 5, 14]),
    ("$A", "1+2=", [4, 13, 5, 14]),
])  # fmt: skip
def test_a_prompt_begins_once_and_does_not_end(tokenizer, template, text, ids):
    tokens = [
        (token, tokenizer.convert_tokens_to_ids(token))
        for token in ("<s>", "</s>", "<unused15>", "<unused16>")
    ]
    tokenizer.add_special_tokens({"extra_special_tokens": ["<unused15>"]})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=tokens
    )
    assert encode(text, tokenizer, DataSettings(), where="row")[1] == ids


def fast(model, normalizer, pre_tokenizer, decoder, **special) -> PreTrainedTokenizerFast:
    backend = Tokenizer(model)
    backend.normalizer, backend.pre_tokenizer, backend.decoder = normalizer, pre_tokenizer, decoder
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def byte_level() -> PreTrainedTokenizerFast:
    """Build one as GPT-2 and Qwen: every byte is a token; <|end|> is end, padding and unknown."""
    vocab = {
        byte: i for i, byte in enumerate(["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    parts = (
        normalizers.NFC(),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    return fast(
        models.BPE(vocab, []), *parts, eos_token="<|end|>", unk_token="<|end|>", pad_token="<|end|>"
    )


def byte_fallback() -> PreTrainedTokenizerFast:
    """Build one as Llama 2: blanks become ▁; a character without a token becomes its bytes."""
    vocab = {
        token: i
        for i, token in enumerate(
            ["<unk>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *"▁abcdefgh"]
        )
    }
    model = models.BPE(vocab, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    blanks = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return fast(model, blanks, None, decoder, eos_token="</s>", unk_token="<unk>", pad_token="</s>")


def unigram(*more: str) -> PreTrainedTokenizerFast:
    """Build one as T5 and XLM-R: NFKC, blanks as ▁, and one unknown token."""
    model = models.Unigram(
        [
            ("<unk>", 0.0),
            ("</s>", 0.0),
            *((c, -2.0) for c in ("▁", *"abcdefgh0123456789+=", *more)),
        ],
        unk_id=0,
        byte_fallback=False,
    )
    parts = (
        normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]),
        pre_tokenizers.Metaspace(),
        decoders.Metaspace(),
    )
    return fast(model, *parts, eos_token="</s>", unk_token="<unk>")


def word_piece() -> PreTrainedTokenizerFast:
    """Build one as BERT: lower case, no accents."""
    vocab = {
        token: i for i, token in enumerate(["[UNK]", "[CLS]", "[SEP]", "cafe", "##s", "1", "+"])
    }
    parts = (normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer(), decoders.WordPiece())
    return fast(
        models.WordPiece(vocab, unk_token="[UNK]"), *parts, unk_token="[UNK]", sep_token="[SEP]"
    )


def dropping() -> PreTrainedTokenizerFast:
    """Build one that knows a, b and ^ and drops everything else."""
    vocab = {"</s>": 0, "a": 1, "b": 2, "^": 3}
    return fast(
        models.BPE(vocab, []), None, pre_tokenizers.Whitespace(), decoders.Fuse(), eos_token="</s>"
    )


ODD_TEXT = (
    "  Zażółć\n\n“x” 你好 😀👩\u200d👧 e\u0301 ﬁ ½ ² \u00a0\x00 \ufffd ´ `^ ǅ ẞ العربية\r\n\tend "
)


@pytest.mark.parametrize("make, text", [
    (byte_level, ODD_TEXT), (byte_level, "a<|end|>b"), (byte_fallback, ODD_TEXT),
    (byte_fallback, "a <unk> b</s>"), (unigram, "  ＡＢ ② １\u3000h"),
    (word_piece, "Café\u200b CAFÉS\x07 1"), (dropping, "a b^\n"),
])  # fmt: skip
def test_a_good_prompt_is_never_refused(make, text):
    assert encode(text, make(), DataSettings(), where="row")[0] == text


@pytest.mark.parametrize("make, text, piece", [
    (unigram, "ab 你 c", "你"), (unigram, "1*2", r"\*"), (word_piece, "cafe xyz", "xyz"),
    (dropping, "a c b", "c"), (dropping, "a<b", "<"),
    (lambda: load_tokenizer(TOY), "1*2=", r"\*"), (lambda: load_tokenizer(TOY), "1+2=\n", r"\\n"),
    (lambda: load_tokenizer(TOY), "１+2=", "１"),
])  # fmt: skip
def test_what_the_tokenizer_does_not_know_is_named(make, text, piece):
    with pytest.raises(BadInput, match=f"row: the model's tokenizer does not know '{piece}'"):
        encode(text, make(), DataSettings(), where="row")


def test_characters_of_which_a_byte_is_missing_are_named():
    tokenizer = byte_level()
    # UTF-8 writes é in two bytes. The second one is this tokenizer's ©.
    vocab = {token: i for i, token in enumerate(t for t in tokenizer.get_vocab() if t != "©")}
    tokenizer = fast(
        models.BPE(vocab, []),
        None,
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    with pytest.raises(BadInput, match="does not know 'é'"):
        encode("café", tokenizer, DataSettings(), where="row")


def test_unknown_characters_of_chat_and_generated_prompts(tokenizer, tmp_path):
    tokenizer.chat_template = CHAT
    with pytest.raises(BadInput, match="p.jsonl line 1: the model's tokenizer does not know 'x'"):
        read(write(tmp_path / "p.jsonl", {"prompt": "1x2", "label": 1}), tokenizer, chat=True)
    settings = DataSettings(chat=True, system_prompt="be good")
    with pytest.raises(BadInput, match="toy: the model's tokenizer does not know 'b'"):
        next(toy_prompts(tokenizer, settings, seed=1, held_out=False))
    # After the first problems a generated one with an unknown character is passed over: it must not
    # end a run.
    known = ({"prompt": "1=" if i != 70 else "x", "label": i} for i in range(73))
    samples = list(generated(known, tokenizer, DataSettings(), name="g"))
    assert [sample.label for sample in samples][-3:] == [69, 71, 72]
    tokenizer.chat_template = "é" + CHAT
    with pytest.raises(BadInput, match="does not know 'é'"):
        read(write(tmp_path / "p.jsonl", {"prompt": "12", "label": 1}), tokenizer, chat=True)


# --- tools, chat_template_kwargs, and what a template leaves out --------------------------------


TOOLS = [{"type": "function", "function": {"name": "13", "parameters": {"n": None}}}]
# Writes a tool as name+parameters=, a message as content+calls=, and `deep` as 9 or 8.
CALLS = (
    "{% if tools %}{% for t in tools %}"
    "{{ t.function.name }}+{{ t.function.parameters | length }}="
    "{% endfor %}{% endif %}"
    "{% for m in messages if m.role != 'developer' %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}+{{ c.name }}{% endfor %}="
    "{% endfor %}"
    "{% if deep is defined and deep is true %}9{% elif deep is defined %}8{% endif %}"
)
USER = {"role": "user", "content": "1+2"}


def chat_row(
    tokenizer, folder, prompt, *, template=CALLS, tools=None, file=write, **settings
) -> str:
    """Return the text of the prompt that a file of one row gives."""
    tokenizer.chat_template = template
    row = {"prompt": prompt, "label": 1, **({"tools": tools} if tools is not None else {})}
    path = folder / ("p.jsonl" if file is write else "p.parquet")
    (sample,) = read(file(path, row), tokenizer, **settings)
    return sample.prompt


def test_tools_reach_the_template(tokenizer, tmp_path):
    assert chat_row(tokenizer, tmp_path, [USER], tools=TOOLS) == "13+1=1+2="
    assert chat_row(tokenizer, tmp_path, "1+2", tools=TOOLS, chat=True) == "13+1=1+2="
    for tools in (json.dumps(TOOLS), [json.dumps(tool) for tool in TOOLS]):
        text = chat_row(tokenizer, tmp_path, [USER], tools=tools, file=write_parquet)
        assert text == "13+1=1+2="
    for tools in ([], "null"):
        assert chat_row(tokenizer, tmp_path, [USER], tools=tools) == "1+2="


def test_fields_that_parquet_adds_are_no_fields(tokenizer, tmp_path):
    """In Parquet all objects of a column have the same fields.

    A field that only another object has is null in this one, and is left out again.
    """
    function = {"name": "7", "parameters": {"m": {"type": "string"}}}
    two = [*TOOLS, {"type": "function", "function": function}]
    assert chat_row(tokenizer, tmp_path, [USER], tools=two, file=write_parquet) == "13+0=7+1=1+2="


@pytest.mark.parametrize("prompt, settings, message", [
    ("1+2", dict(tools=TOOLS),
     """the row's "tools" needs chat messages, and the prompt of .* is text: add --chat"""),
    ([USER], dict(tools=TOOLS, template=CHAT),
     """chat template leaves out the row's "tools": remove it"""),
    ([USER], dict(tools="no json"), '"tools" cannot be read'),
    ([USER], dict(tools={"a": 1}), "\"tools\" is {'a': 1}; it must be a list of objects"),
    ([USER], dict(tools=["3"]), '"tools" is .*; it must be a list of objects'),
    ([USER], dict(tools=7), '"tools" is 7; it must be a list of objects'),
    ([{"role": "developer", "content": "2"}, USER], {},
     "leaves out message 1, of role 'developer'"),
    ([{**USER, "name": "7"}], {}, """leaves out the messages' field "name": remove it"""),
    ([USER, {"role": "assistant", "content": None, "tool_calls": [{"name": "5"}]}, USER],
     dict(template=CHAT), 'leaves out the messages\' field "tool_calls"'),
    ([{"role": "user", "content": [{"type": "text", "text": "1"}]}], {},
     'text "content" \\(join the parts of a list\\)'),
    ([{"role": "user", "content": None}], {}, 'needs a "role" and a text "content"'),
    ([{"role": ["user"], "content": "1"}], {}, 'needs a "role"'),
    (["1"], {}, 'needs a "role"'),
    ([USER, {"role": "assistant", "content": "3"}], {},
     "the last message is the assistant's, but a prompt ends before the answer"),
])  # fmt: skip
def test_what_a_template_would_leave_out_is_refused(tokenizer, tmp_path, prompt, settings, message):
    with pytest.raises(BadInput, match=message):
        chat_row(tokenizer, tmp_path, prompt, **settings)


def test_calls_and_results_reach_the_template(tokenizer, tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "5"}], "name": None}
    # A template may leave out which call a result answers.
    result = {"role": "tool", "content": "8", "tool_call_id": "x", "name": "5"}
    for file in (write, write_parquet):
        assert chat_row(tokenizer, tmp_path, [USER, call, result], file=file) == "1+2=+5=8="


def test_values_for_the_chat_template(tokenizer, tmp_path):
    values = {(): "1+2=", ("deep=true",): "1+2=9", ("deep=false",): "1+2=8"}
    for given, text in values.items():
        assert chat_row(tokenizer, tmp_path, [USER], chat_template_kwargs=given) == text
    rule = "--chat-template-kwargs needs chat messages, and the prompt of .* is text: add --chat"
    with pytest.raises(BadInput, match=rule):
        chat_row(tokenizer, tmp_path, "1+2", chat_template_kwargs=("deep=true",))


@pytest.mark.parametrize("template, given, message", [
    (CALLS, ["dep=true"], "dep is not a name that the chat template reads; it reads deep"),
    (CALLS, ["m=1"], "m is not a name that the chat template reads"),
    (CALLS, ["tools=[]"], "tools is set by the program itself"),
    (CALLS, ["messages=[]"], "messages is set by the program itself"),
    (CALLS, ["tokenize=true"], "tokenize is set by the program itself"),
    (CALLS + "{{ bos_token }}", ["bos_token=1"], "bos_token is set by the program itself"),
    (CALLS, ["deep=False"], "deep=False would be text: write deep=false"),
    (CALLS, ["deep=true", "deep=false"], "deep is given twice"),
    (CALLS, ["deep"], "'deep' is not of the form key=value"),
    (None, ["deep=true"], "needs a chat template, and the tokenizer has none"),
    ("{% if %}", ["deep=true"], "the tokenizer's chat template cannot be read"),
])  # fmt: skip
def test_values_that_would_do_nothing(tokenizer, template, given, message):
    tokenizer.chat_template = template
    with pytest.raises(BadInput, match=message):
        check_template_kwargs(tokenizer, tuple(given))


def test_names_that_a_template_reads(tokenizer):
    """A name with a default counts. So does one beside the tag that transformers adds to Jinja."""
    defaults = (
        "{% set think = think | default(true) %}"
        "{% if not day is defined %}{% set day = 1 %}{% endif %}"
    )
    tokenizer.chat_template = "{% generation %}1{% endgeneration %}" + defaults
    check_template_kwargs(tokenizer, ("think=false", "day=2"))
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ style }}"}
    check_template_kwargs(tokenizer, ("style=1",))
