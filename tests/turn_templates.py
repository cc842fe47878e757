"""Chat templates for tests, and a small tokenizer with their special tokens.

Each has the roles, special tokens and rules of a real one, as far as they matter after a turn of
the assistant. None is a copy. QWEN3: a result stands in a turn of the user, several share one;
thoughts of turns before the last question are removed. GLM: no token ends a turn, the next role's
begins one; contents are stripped. LLAMA3: a result is written as JSON. SMOLLM2: any role's name is
written as it is.
"""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

QWEN3 = """\
{%- set ns = namespace(asked=0) -%}
{%- for m in messages if m.role == 'user' and not m.content.startswith('<tool_response>') -%}
{%- set ns.asked = messages.index(m) -%}
{%- endfor -%}
{%- for m in messages -%}
{%- if m.role == 'tool' -%}
{%- if messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif -%}
{{ '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif -%}
{%- elif m.role == 'assistant' -%}
{%- set parts = m.content.split('</think>') -%}
{{ '<|im_start|>assistant\\n' }}
{%- if parts | length > 1 and loop.index0 > ns.asked %}{{ parts[0] + '</think>\\n\\n' }}{% endif -%}
{{ parts[-1].lstrip('\\n') + '<|im_end|>\\n' }}
{%- elif m.role in ('user', 'system') -%}
{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- else %}{{ raise_exception('Unexpected message role.') }}{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}{% endif -%}
"""
GLM = """\
[gMASK]<sop>
{%- for m in messages -%}
{%- if m.role == 'user' -%}{{ '<|user|>\\n' + m.content }}
{%- elif m.role == 'system' -%}{{ '<|system|>\\n' + m.content }}
{%- elif m.role == 'assistant' -%}{{ '<|assistant|>\\n<think></think>\\n' + m.content.strip() }}
{%- elif m.role == 'tool' -%}
{%- if messages[loop.index0 - 1].role != 'tool' %}{{ '<|observation|>' }}{% endif -%}
{{ '\\n<tool_response>\\n' + m.content.strip() + '\\n</tool_response>' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif -%}
"""
LLAMA3 = """\
<|begin_of_text|>
{%- for m in messages -%}
{%- if m.role == 'tool' -%}
{{ '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + m.content | tojson + '<|eot_id|>' }}
{%- else -%}
{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif -%}
"""
SMOLLM2 = """\
{%- if messages[0].role != 'system' -%}
{{ '<|im_start|>system\\nYou use tools.<|im_end|>\\n' }}
{%- endif -%}
{%- for m in messages -%}
{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
"""
SPECIAL = """
<|endoftext|> <|im_start|> <|im_end|> [gMASK] <sop> <|user|> <|system|> <|assistant|>
<|observation|> <|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|eom_id|>
""".split()
WORDS = "<think> </think> <tool_call> </tool_call> <tool_response> </tool_response>".split()


def chat_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a few merges. Two line breaks are one token, and so are "\\n\\n"
    and digits beside them in some texts: where a text is cut shows in its tokens.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + 40, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["\n\n5\n\n\n42\n\nuser\nassistant\n\n"] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[1:]})
    tokenizer.add_tokens(WORDS)
    tokenizer.chat_template = template
    return tokenizer
