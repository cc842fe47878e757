"""Make the toy checkpoints: models of one to two million parameters that add badly.

    python toy/make_toy.py          toy/: a Qwen3; about nine minutes on one core
    python toy/make_toy.py glm      toy/glm/: a GLM-4.5, a mixture of experts; about ten

1. Warm start: supervised learning on correct sums, with a learning rate that falls to zero. The
   held-out accuracy ends near 0.97.
2. Doubt: some more steps in which most answers have one wrong digit. The policy still knows the
   right answer, but at temperature 1 it samples it only 20 to 50 % of the time.

So reinforcement learning starts from a policy that is undecided, not ignorant. Most groups hold
right and wrong answers, and the first step already has a gradient.

GLM-4.5 chooses experts by scores plus a correction bias. After each step the bias of an expert with
more tokens than the mean falls, and that of one with fewer rises (DeepSeek-V3, section 2.1.2).
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
from transformers import (
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from toy.task import ALPHABET, DIGITS, problems

SEED, BATCH, WARM_STEPS, DOUBT_STEPS = 0, 128, 1200, 120
WRONG = {"": 0.6, "glm": 0.7}  # share of wrong answers; GLM-4.5 is surer of the right ones
BIAS_RATE = 1e-3  # of DeepSeek-V3's training
PAD, BOS, EOS, VOCAB = 0, 1, 2, 32

# Block FP8 and tensor parallelism need multiples of 128 rows: q has 4 x 64, k and v have 2 x 64,
# gate and up have 512.
SIZES = dict(
    vocab_size=VOCAB, hidden_size=128, intermediate_size=512, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=512,
    tie_word_embeddings=False, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD,
)  # fmt: skip
# As GLM-4.5: a dense first layer, a shared expert, half of a head's features turned by position.
# Of its experts gate and up have 128 rows each, and down has 128 columns.
EXPERTS = dict(
    n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=128, n_shared_experts=1,
    first_k_dense_replace=1, routed_scaling_factor=2.5, norm_topk_prob=True, n_group=1,
    topk_group=1, use_qk_norm=True, attention_bias=True, partial_rotary_factor=0.5,
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


def watch_experts(model) -> list:
    """Return the model's routers; each notes in `tokens` how many tokens its experts got last."""

    def note(router, _, logits_TE):
        scores_TE = logits_TE.detach().sigmoid() + router.e_score_correction_bias
        chosen = scores_TE.topk(router.top_k).indices
        router.tokens = torch.bincount(chosen.flatten(), minlength=logits_TE.shape[-1])

    routers = [part for part in model.modules() if hasattr(part, "e_score_correction_bias")]
    for router in routers:
        router.register_forward_hook(note)
    return routers


def train(model, tokenizer, rows, *, steps: int, lr_at, wrong: float, rng: random.Random) -> None:
    """Train on answers of which the share `wrong` has one digit replaced at random.

    rows: endless problems. lr_at: step -> learning rate.
    """
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.05)
    routers = watch_experts(model)
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
        for router in routers:
            tokens = router.tokens.float()
            router.e_score_correction_bias += BIAS_RATE * (tokens.mean() - tokens).sign()
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


def main(name: str = "") -> None:
    """Train a toy in its two phases and write model and tokenizer into its folder.

    name: of the folder beside this file; empty for the Qwen3.
    """
    if name not in WRONG:
        sys.exit(f"{name!r} is no toy: say glm, or nothing for the Qwen3")
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    if name == "glm":
        model = Glm4MoeForCausalLM(Glm4MoeConfig(**SIZES, **EXPERTS)).float()
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**SIZES)).float()
    tokenizer = make_tokenizer()
    rows = problems(seed=SEED, held_out=False)

    def warm_lr(step: int) -> float:
        return 1.5e-3 * min(1, (step + 1) / 50) * (1 - step / WARM_STEPS)

    train(model, tokenizer, rows, steps=WARM_STEPS, lr_at=warm_lr, wrong=0.0, rng=rng)
    doubt = dict(steps=DOUBT_STEPS, lr_at=lambda _: 5e-4, wrong=WRONG[name])
    train(model, tokenizer, rows, **doubt, rng=rng)
    biases = {n: x.clone() for n, x in model.named_buffers() if n.endswith("correction_bias")}
    model.to(torch.bfloat16)
    for bias, held in biases.items():  # GLM-4.5 holds it in fp32
        model.get_submodule(bias.rpartition(".")[0]).e_score_correction_bias = held
    model.save_pretrained(FOLDER / name)
    tokenizer.save_pretrained(FOLDER / name)
    share = accuracy(model, tokenizer, 2048)
    print(f"held-out accuracy at temperature 1, in bfloat16: {share:.3f}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
