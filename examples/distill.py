"""On-policy distillation: the student answers, and a teacher says how likely each token was.

    python examples/distill.py --teacher runs/NAME/model-bf16    the toy, on one CPU core or one GPU
    torchrun --nproc-per-node 2 examples/distill.py --teacher FOLDER --tp 2   two ranks
    torchrun --nproc-per-node 2 examples/distill_async.py --teacher FOLDER    asynchronous loop

    student's engine     answers of the student        FP8, as in the loops
    student's trainer    log p_student of their tokens  one forward pass
    teacher              log p_teacher of them          a second Megatron model, frozen, same layout
                                 |
                         A_t = log p_teacher(y_t) - log p_student(y_t)
                                 |
                         the loops' policy gradient, with A_t as the advantage of token t

As in "On-Policy Distillation" (Thinking Machines Lab, 2025) the advantage of a token is the
negative of a sampled reverse KL. Demonstrations show what to do where the teacher goes. Here the
teacher judges where the student goes, after the student's own errors too.

What this is the gradient of: let s_t be the prompt and the tokens before t, and V the vocabulary.
With s_t held fixed the gradient of the reverse KL is

    grad KL(student || teacher)(s_t) = sum over y in V of p_student(y) (-A(y)) grad log p_student(y)

because the remaining term, the sum of grad p_student(y), is 0. So for a token that the student
samples, -A_t grad log p_student(y_t) is an unbiased estimate of it. A step descends the mean of
these KLs over the prefixes that the student visited.

A_t counts its own token only: the discount is 0. That a token also changes the prefixes behind it
has no part in this gradient. MiniLLM (arXiv 2306.08543) includes that part, with more variance. GKD
(arXiv 2306.13649) sums over V instead of sampling. Rewards play no role unless --reward-weight adds
them.

What it gives to the loop, which is unchanged:
    --teacher      is the loop's frozen reference, of any architecture with the model's tokenizer
                   (backends/megatron/model.py: load_reference). Both log-probs are at the rollout's
                   temperature, over the student's vocabulary.
    reverse_kl()   in ADVANTAGES. A loop with --kl-in reward and --kl-estimator k1 hands it
                   log p_student - log p_teacher of each token.
    the record     its metric kl is the mean of that: how far the student still is, in nats a token

log p_student in A_t is by the trainer's weights that the step starts from (old_logprobs). The
engine sampled with FP8 weights, in the asynchronous loop also with older ones. The correction
(--correction, TIS) weights each token for that.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
from distill_settings import Settings, check_distill_flags, for_the_loop
from harness import checks, flags

# A wrong flag is refused here: the imports below take half a minute.
if __name__ == "__main__":
    settings = flags.parse_or_exit(Settings, checks.check_flags, check_distill_flags)

import numpy as np

import loop_sync
from advantages import ADVANTAGES, Scores
from common.errors import BadInput
from data.sample import Sample
from harness import start
from harness.exits import run_main

NAME = "reverse_kl"


def reverse_kl(scores: Scores) -> np.ndarray:
    """Return log p_teacher - log p_student of each counting token, float64 [T]; 0 at the others.

    A loop's penalties are, with this example's settings, the negative of that.
    """
    return -scores.penalties_T * scores.mask_T


def with_rewards(estimator: Callable, weight: float) -> Callable:
    """Return reverse_kl plus weight times an estimator's advantage of the rewards alone."""

    def advantages(scores: Scores) -> np.ndarray:
        of_rewards = replace(scores, penalties_T=np.zeros_like(scores.penalties_T))
        return reverse_kl(scores) + weight * estimator(of_rewards)

    return advantages


def unjudged(sample: Sample) -> float:
    """Return 0, with --unlabelled."""
    return 0.0


def main(settings: Settings, loop=loop_sync, name: str = "distill") -> None:
    """Run a loop with a teacher. loop: loop_sync or loop_async; name: of its checkpoints."""
    advantage, weight = NAME, settings.distill.reward_weight
    ADVANTAGES[NAME] = reverse_kl
    if weight:
        advantage = f"{NAME} + {weight:g} {settings.reward.advantage}"
        ADVANTAGES[advantage] = with_rewards(ADVANTAGES[settings.reward.advantage], weight)
    try:
        told = for_the_loop(settings, advantage)
        judge = unjudged if settings.distill.unlabelled else None
        run = start.prepare(told, name, reward_function=judge)
    except BadInput as error:  # the loops have another name for the teacher
        texts = (text.replace("--reference", "--teacher") for text in error.problems)
        raise BadInput(*texts) from error
    loop.train(run)


if __name__ == "__main__":
    run_main(lambda: main(settings))
