"""Make the toy checkpoint in this folder: a Qwen3 of 1.2 million parameters that adds badly.

    python toy/make_toy.py          about nine minutes on one core

1. Warm start: supervised learning on correct sums, with a learning rate that falls to zero. The
   held-out accuracy ends near 0.97.
2. Doubt: some more steps in which most answers have one wrong digit. The policy still knows the
   right answer, but at temperature 1 it samples it only 20 to 50 % of the time.

So reinforcement learning starts from a policy that is undecided, not ignorant. Most groups hold
right and wrong answers, and the first step already has a gradient.
"""

import random
import sys
import time
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))

import backends  # noqa: F401  before transformers, see data/tokenizer.py
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from toy.task import ALPHABET, DIGITS, problems

SEED, BATCH, WARM_STEPS, DOUBT_STEPS, WRONG = 0, 128, 1200, 120, 0.6
PAD, BOS, EOS, VOCAB = 0, 1, 2, 32

# Block FP8 and tensor parallelism need multiples of 128 rows: q has 4 x 64, k and v have 2 x 64,
# gate and up have 512.
CONFIG = Qwen3Config(
    vocab_size=VOCAB, hidden_size=128, intermediate_size=512, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=512,
    tie_word_embeddings=False, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD,
)  # fmt: skip


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per character, which puts <s> before every prompt."""
    words = ["<pad>", "<s>", "</s>", *ALPHABET]
    words += [f"<unused{i}>" for i in range(len(words), VOCAB)]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=512,
    )


def train(model, tokenizer, rows, *, steps: int, lr_at, wrong: float, rng: random.Random) -> None:
    """Train on answers of which the share `wrong` has one digit replaced at random.

    rows: endless problems. lr_at: step -> learning rate.
    """
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.05)
    started = time.time()
    for step in range(steps):
        length = 2 * DIGITS + 3 + DIGITS + 2  # <s> a + b = | sum </s>
        input_ids_NL = torch.full((BATCH, length), PAD)
        labels_NL = torch.full_like(input_ids_NL, -100)
        for i, row in enumerate(islice(rows, BATCH)):
            answer = list(row["label"])
            if rng.random() < wrong:
                answer[rng.randrange(len(answer))] = rng.choice("0123456789")
            prompt_ids = tokenizer(row["prompt"]).input_ids
            answer_ids = tokenizer("".join(answer), add_special_tokens=False).input_ids + [EOS]
            start, end = len(prompt_ids), len(prompt_ids) + len(answer_ids)
            input_ids_NL[i, :end] = torch.tensor(prompt_ids + answer_ids)
            labels_NL[i, start:end] = torch.tensor(answer_ids)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step)
        loss = model(input_ids_NL, labels=labels_NL).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 200 == 0 or step + 1 == steps:
            print(
                f"step {step + 1} loss {loss:.3f} held-out {accuracy(model, tokenizer):.3f}"
                f" {time.time() - started:.0f} s",
                flush=True,
            )


@torch.no_grad()
def accuracy(model, tokenizer, n: int = 512) -> float:
    """Return the exact-match accuracy on n held-out problems, sampled at temperature 1."""
    rows = list(islice(problems(seed=SEED, held_out=True), n))
    input_ids_NL = torch.tensor([tokenizer(row["prompt"]).input_ids for row in rows])
    output_ids_NL = model.generate(
        input_ids_NL,
        attention_mask=torch.ones_like(input_ids_NL),
        do_sample=True,
        temperature=1.0,
        top_k=0,  # sample from the whole vocabulary
        max_new_tokens=DIGITS + 2,
    )
    texts = tokenizer.batch_decode(output_ids_NL[:, input_ids_NL.shape[1] :])
    answers = [text.partition("</s>") for text in texts]
    right = sum(
        end != "" and answer == row["label"] for (answer, end, _), row in zip(answers, rows)
    )
    return right / n


def main() -> None:
    """Train the toy in its two phases and write model and tokenizer into this folder."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    model, tokenizer = Qwen3ForCausalLM(CONFIG).float(), make_tokenizer()
    rows = problems(seed=SEED, held_out=False)

    def warm_lr(step: int) -> float:
        return 1.5e-3 * min(1, (step + 1) / 50) * (1 - step / WARM_STEPS)

    train(model, tokenizer, rows, steps=WARM_STEPS, lr_at=warm_lr, wrong=0.0, rng=rng)
    train(model, tokenizer, rows, steps=DOUBT_STEPS, lr_at=lambda s: 5e-4, wrong=WRONG, rng=rng)
    model.to(torch.bfloat16).save_pretrained(FOLDER)
    tokenizer.save_pretrained(FOLDER)
    share = accuracy(model, tokenizer, 2048)
    print(f"held-out accuracy at temperature 1, in bfloat16: {share:.3f}", flush=True)


if __name__ == "__main__":
    main()
