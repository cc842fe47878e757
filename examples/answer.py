"""Answers prompts with a Hugging Face folder, such as one that a run has exported, by transformers.

    python examples/answer.py runs/NAME/model-bf16 "123+456=" "700+008="
    python examples/answer.py FOLDER --chat "How many legs do three spiders have?"

Each answer is the most likely one, token by token, and stands on a line of its own. The prompt's
tokens, and those that end an answer, are the ones that the loops use.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault(
    "OMP_NUM_THREADS", str(len(os.sched_getaffinity(0)))
)  # Backends would use one.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.errors import BadInput


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="config.json, tokenizer, *.safetensors")
    parser.add_argument("prompts", nargs="+", metavar="prompt")
    parser.add_argument("--chat", action="store_true", help="use the model's chat template")
    parser.add_argument("--max-response-tokens", type=int, default=256)
    parser.add_argument("--stop", nargs="+", default=[], help="further tokens that end an answer")
    try:
        for answer in answers(**vars(parser.parse_args())):
            print(answer, flush=True)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def check_folder(folder: Path) -> None:
    """Raise BadInput if transformers would not load the folder in this environment."""
    if not (folder / "config.json").is_file():
        inside = sorted(path.parent for path in folder.glob("model-*/config.json"))
        fix = f"did you mean {inside[0]}?" if inside else "give the folder of a model"
        raise BadInput(f"{folder} has no config.json: {fix}")
    if "quantization_config" in json.loads((folder / "config.json").read_text(encoding="utf-8")):
        rule = "transformers loads that only with packages that requirements.txt does not have"
        fix = "give the same model in BF16, as --export bf16 and tools/export.py write it"
        raise BadInput(f"{folder} is quantized, and {rule}: {fix}")


def answers(
    folder: Path, prompts: list[str], *, chat: bool, max_response_tokens: int, stop: list[str]
) -> Iterator[str]:
    """Yield the answer to each prompt. Raises BadInput before the model is loaded."""
    check_folder(folder)
    if max_response_tokens < 1:
        raise BadInput(f"--max-response-tokens {max_response_tokens} must be at least 1")
    import torch

    import backends  # noqa: F401  before transformers
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from common.settings import DataSettings
    from data.tokenizer import encode, end_tokens, load_tokenizer

    logging.disable_progress_bar()
    tokenizer = load_tokenizer(str(folder))
    end_ids = end_tokens(str(folder), tokenizer, tuple(stop))
    settings = DataSettings(chat=chat)
    ids = [encode(text, tokenizer, settings, where=repr(text[:80]))[1] for text in prompts]
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype="auto")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    context = model.config.max_position_embeddings
    for text, prompt_ids in zip(prompts, ids):
        if len(prompt_ids) >= context:
            rule = f"the model reads {context} with the answer: shorten it"
            raise BadInput(f"{text[:80]!r} has {len(prompt_ids)} tokens, and {rule}")
        prompt_1L = torch.tensor([prompt_ids], device=model.device)
        whole_1L = model.generate(
            prompt_1L,
            attention_mask=torch.ones_like(prompt_1L),
            max_new_tokens=min(max_response_tokens, context - len(prompt_ids)),
            do_sample=False,
            temperature=None,  # A model's own values of these three would draw a warning.
            top_p=None,
            top_k=None,
            eos_token_id=end_ids,
            pad_token_id=end_ids[0],
        )
        response_ids = whole_1L[0, len(prompt_ids) :].tolist()
        response_ids = [token for token in response_ids if token not in end_ids]
        yield tokenizer.decode(response_ids, clean_up_tokenization_spaces=False)


if __name__ == "__main__":
    main()
