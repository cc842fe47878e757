"""A Sample: one prompt and its answer; what settings make of a prompt, and where an answer ends. rollout.py must be imported first."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_config import generation_eos
from problems import BadInput, all_problems


@dataclass
class Sample:
    """One prompt and, once generated, one response. Plain data: one JSON line holds all of it."""

    prompt_ids: list[int]
    prompt: str = ""
    label: Any = None
    group: int = -1
    """The prompt's number in the run's prompt stream: the samples of one group answer the same prompt."""
    index: int = 0
    """Place in its group; (group, index) names a sample."""
    response_ids: list[int] = field(default_factory=list)
    response: str = ""
    rollout_logprobs: list[float] = field(default_factory=list)
    """Per response token, by the engine, at the sampling temperature."""
    loss_mask: list[int] = field(default_factory=list)
    """Per response token: 1 if the policy sampled it, 0 if it came from elsewhere (a tool's output)."""
    weight_versions: list[int] = field(default_factory=list)
    """Per response token: the version of the weights that sampled it."""
    finish_reason: str = ""
    """stop, length or abort; or what became of a sample that is not trained, rollout.DROPPED or REPLACED."""
    reward: float | None = None
    old_logprobs: Sequence[float] = field(default_factory=list)
    """Per response token, by the trainer before it learns from the batch; empty where the batch has one update only, which starts from them."""
    ref_logprobs: Sequence[float] = field(default_factory=list)
    """Per response token, by the frozen reference, where there is one."""
    advantages: Sequence[float] = field(default_factory=list)
    """Per response token."""
    metadata: dict = field(default_factory=dict)
    """The row's own object of that name, as it was read. The program never writes to it: what it has to say goes to the fields below."""
    source: str = ""
    """Short name of what the prompt is from: a file, or a generator."""
    answer: str | None = None
    """What the reward function took for the answer; None where it does not say."""
    error: str = ""
    """Why the sample has no reward, or why the engine aborted it."""
    notes: dict = field(default_factory=dict)
    """What generators, rollouts and reward functions leave for one another: the problem of reasoning-gym, the calls of a tool."""

    def to_json(self) -> bytes:
        return orjson.dumps(self, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS)

    @classmethod
    def from_json(cls, line: bytes | str) -> "Sample":
        return cls(**orjson.loads(line))


@dataclass(frozen=True)
class DataSettings:
    """What is asked, and what ends an answer."""

    prompts: tuple[str, ...] = ("toy",)
    """Any of toy, FILE.jsonl, FILE.parquet, reasoning-gym:TASK, each with an optional :WEIGHT, its share of the prompts drawn."""
    prompt_key: tuple[str, ...] = ("prompt",)
    """The field of a row that holds the prompt: text, or a list of chat messages. Dots lead into nested fields; of several names the first that a row has."""
    label_key: tuple[str, ...] = ("label",)
    """The field that holds the label, given likewise; for instance reward_model.ground_truth."""
    label_after: str = ""
    """In files whose labels hold this text, the label is what stands after its last occurrence; for GSM8K's solutions "####"."""
    chat: bool = False
    """Make a text prompt the user's message in the tokenizer's chat template."""
    system_prompt: str = ""
    """A system message that goes before every prompt's chat messages."""
    eval_prompts: tuple[str, ...] = ()
    """Held-out sets, named as in --prompts. None given: the own held-out problems of toy and reasoning-gym, where --prompts has them."""
    eval_samples: int = 512
    """How many prompts of each held-out set an evaluation answers."""
    eval_samples_per_prompt: int = 1
    """Answers to each held-out prompt; with several, pass@k and majority@N are logged."""
    max_response_tokens: int = 8
    """A response is cut off after so many tokens."""
    stop: tuple[str, ...] = ()
    """Further tokens that end a response, beside the model's own end-of-sequence tokens."""


# --- the tokenizer ----------------------------------------------------------------------------------------------------------------------------


def load_tokenizer(model_folder: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(model_folder, local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise many kinds, and all are about these files
        raise BadInput(f"--model {model_folder}: no tokenizer loads ({error}); copy tokenizer.json and tokenizer_config.json there") from error


@all_problems
def end_tokens(model_folder: str, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...]) -> list[int]:
    """Token ids that end a response: of generation_config.json, of the tokenizer, and of --stop."""
    ids = {token for token in generation_eos(model_folder) if type(token) is int} | {tokenizer.eos_token_id}  # others: see hf_folder.check_model_folder
    for text in stop:
        token = tokenizer.convert_tokens_to_ids(text)
        if token is None or token == tokenizer.unk_token_id:
            yield f"--stop {text!r} is not one token of this tokenizer: give a token such as {tokenizer.eos_token!r}"
        ids.add(token)
    ids.discard(None)
    if not ids:
        yield f"{model_folder} names no end-of-sequence token in generation_config.json or its tokenizer: give one with --stop"
    return sorted(ids)


def encode(prompt: Any, tokenizer: PreTrainedTokenizerBase, settings: DataSettings, *, where: str) -> tuple[str, list[int]]:
    """A prompt as text and as tokens. A chat template writes its own special tokens; to plain text the tokenizer adds its own. Raises BadInput."""
    if isinstance(prompt, str) and settings.chat:
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, str):
        if settings.system_prompt:
            raise BadInput(f"--system-prompt needs chat messages, and the prompt of {where} is text: add --chat, or leave --system-prompt out")
        return prompt, tokenizer(prompt).input_ids
    if not isinstance(prompt, list):
        raise BadInput(f"{where}: the prompt is a {type(prompt).__name__}; it must be text or a list of chat messages")
    if tokenizer.chat_template is None:
        raise BadInput(f"{where}: chat messages need a chat template, and the tokenizer has none: give the prompt as text, without --chat")
    if not all(isinstance(message, dict) and isinstance(message.get("content"), str) and message.get("role") for message in prompt):
        raise BadInput(f'{where}: every chat message needs a "role" and a text "content"')
    if settings.system_prompt:
        if prompt[0]["role"] == "system":
            raise BadInput(f"{where} has a system message of its own: leave --system-prompt out, or remove that message")
        prompt = [{"role": "system", "content": settings.system_prompt}, *prompt]
    try:
        text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a template is a program of the model's makers, and raises what it likes
        raise BadInput(f"{where}: the tokenizer's chat template refuses these messages ({error}): change their roles or order") from error
    return text, tokenizer(text, add_special_tokens=False).input_ids
