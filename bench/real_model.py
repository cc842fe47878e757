"""A pretrained model's stages beside transformers, on one core each.

    python examples/get_smollm2.py FOLDER
    python bench/real_model.py FOLDER [--rounds 3] [--answers 8] [--tokens 48] [--lora-rank 32]

Both sides have one thread, the same prompts and the same numbers of tokens, and alternate:

    training    pack and update_policy; transformers' forward, backward and AdamW in fp32
    generation  our engine; transformers' generate in fp32. Ragged answers have between a tenth of
                --tokens and all of them; transformers pads the batch to its longest
    hand-off    send_weights, from the trainer to the engine; its share of our step

What gradients and optimizer hold is printed too. With --lora-rank our training is that of adapters,
and transformers' still that of all weights. The tokens are random: what they say costs nothing. The
first round does not count.
"""

import argparse
import os
import random
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
os.environ["OMP_NUM_THREADS"] = "1"

PROMPT = 16  # tokens of a prompt


class Clock:
    """Seconds of each call, by name."""

    def __init__(self):
        self.seconds: dict[str, list[float]] = {}

    def time(self, name: str, function, *arguments, **more):
        began = time.perf_counter()
        result = function(*arguments, **more)
        self.seconds.setdefault(name, []).append(time.perf_counter() - began)
        return result

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name][1:])

    def ratio(self, ours: str, theirs: str) -> str:
        """Return the mean and deviation of the rounds' ratios."""
        ratios = [a / b for a, b in zip(self.seconds[ours][1:], self.seconds[theirs][1:])]
        spread = f" ± {statistics.stdev(ratios):.2f}" if len(ratios) > 1 else ""
        return f"{statistics.mean(ratios):.2f}{spread}"


def transformers_side(folder: str):
    """Return (train, generate) of transformers in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)

    def train(rows: list[list[int]]) -> None:
        ids_BT = torch.tensor(rows)
        model(input_ids=ids_BT, labels=ids_BT).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def generate(prompts: list[list[int]], tokens: int) -> None:
        ids_BT = torch.tensor(prompts)
        how = dict(do_sample=True, top_k=0, top_p=1.0, temperature=1.0, pad_token_id=0)
        how |= dict(min_new_tokens=tokens, max_new_tokens=tokens)
        model.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), **how)

    return train, generate


def held_bytes(trainer) -> int:
    """Return the bytes of gradients, main weights and Adam's moments."""
    total = sum(buffer.grad_data.nbytes for buffer in trainer.ddp.buffers)
    for chained in trainer.optimizer.chained_optimizers:
        for states in chained.optimizer.state.values():
            total += states["exp_avg"].nbytes + states["exp_avg_sq"].nbytes
        for group in chained.optimizer.param_groups:
            total += sum(main.nbytes for main in group["params"])
    return total


def measure(
    folder: str, *, rounds: int, answers: int, tokens: int, rollout_dtype: str, lora_rank: int
) -> None:
    """Print the medians of both sides, and their ratios."""
    from common.process_groups import held_port

    with held_port() as port:
        alone = dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        os.environ.update(alone, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        import backends.megatron  # noqa: F401  before Megatron
        from common import distributed

        distributed.init_distributed()
    from backends.huggingface.config import read_config
    from backends.huggingface.fp8 import fp8_weights
    from backends.sglang.launch import launch_engine
    from common.settings import RolloutSettings, TrainSettings
    from data.sample import Sample
    from losses import LossSettings
    import reward
    import torch
    import train_step
    import weight_sync

    torch.set_num_threads(1)
    config, loss = read_config(folder), LossSettings()
    settings = RolloutSettings(max_response_tokens=tokens, rollout_dtype=rollout_dtype)
    fp8 = fp8_weights(config, rollout_dtype=rollout_dtype, engine_tp=1)
    how = dict(temperature=1.0, max_response_tokens=tokens, steps=rounds + 1, seed=1, fp8=fp8)
    train_settings = TrainSettings(lr=0.0, lora_rank=lora_rank)
    trainer = train_step.build_trainer(folder, train_settings, config, **how)
    weights = weight_sync.WeightPath(trainer.gpt, trainer.layout, config, fp8, 2**28)
    train, generate = transformers_side(folder)
    rng, clock = random.Random(1), Clock()
    lengths = [rng.randint(max(tokens // 10, 1), tokens) for _ in range(answers - 1)] + [tokens]

    def draw(count: int) -> list[int]:
        return [rng.randrange(10, config["vocab_size"]) for _ in range(count)]

    def ours_trains(rows: list[list[int]]) -> None:
        samples = [
            Sample(
                row[:PROMPT], group=0, index=i, response_ids=row[PROMPT:], reward=float(i % 2),
                rollout_logprobs=[-1.0] * tokens, loss_mask=[1] * tokens,
                weight_versions=[0] * tokens, finish_reason="length",
            )
            for i, row in enumerate(rows)
        ]  # fmt: skip
        batches = train_step.pack(trainer, samples)
        train_step.add_logprobs(trainer, batches, loss)
        reward.add_advantages(samples, reward.RewardSettings(), loss, tokens)
        train_step.update_policy(trainer, batches, loss)

    with launch_engine(folder, settings, config, seed=1, longest=PROMPT + tokens) as engine:

        def ours_generates(prompts: list[list[int]], lengths: list[int]) -> None:
            sampling = [
                {"temperature": 1.0, "max_new_tokens": length, "ignore_eos": True}
                for length in lengths
            ]
            engine.call(engine.generate(prompts, sampling))

        for version in range(rounds + 1):
            prompts, rows = ([draw(n) for _ in lengths] for n in (PROMPT, PROMPT + tokens))
            clock.time("hand-off", weight_sync.send_weights, weights, engine, version=version)
            clock.time("equal, ours", ours_generates, prompts, [tokens] * answers)
            clock.time("equal, transformers", generate, prompts, tokens)
            prompts = [draw(PROMPT) for _ in lengths]
            clock.time("ragged, ours", ours_generates, prompts, lengths)
            clock.time("ragged, transformers", generate, prompts, max(lengths))
            clock.time("training, ours", ours_trains, rows)
            clock.time("training, transformers", train, rows)
    name = f"{Path(folder).name}, {answers} answers of {tokens} tokens"
    print(f"{name}; ragged {statistics.mean(lengths):.0f} on average; engine {rollout_dtype}")
    for stage in ("training", "equal", "ragged"):
        ours, theirs = f"{stage}, ours", f"{stage}, transformers"
        what = stage if stage == "training" else f"generation, {stage} lengths"
        both = f"{clock.median(ours):.2f} s, transformers {clock.median(theirs):.2f} s"
        print(f"{what}: {both}; ours / transformers {clock.ratio(ours, theirs)} (n {rounds})")
    parts = [clock.median(stage) for stage in ("training, ours", "ragged, ours", "hand-off")]
    print(f"hand-off: {parts[2]:.2f} s, {parts[2] / sum(parts):.1%} of the three")
    trained = f"LoRA of rank {lora_rank}" if lora_rank else "all weights"
    print(f"gradients and optimizer: {held_bytes(trainer) / 1e6:.0f} MB ({trained})")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--answers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--lora-rank", type=int, default=0)
    parser.add_argument("--rollout-dtype", choices=("fp8", "bf16", "fp32"), default="bf16")
    flags = parser.parse_args()
    if min(flags.rounds, flags.answers, flags.tokens) < 1 or flags.answers < 2:
        parser.error("--rounds and --tokens must be at least 1, and --answers 2")
    sizes = dict(rounds=flags.rounds, answers=flags.answers, tokens=flags.tokens)
    sizes["lora_rank"] = flags.lora_rank
    measure(str(Path(flags.folder).resolve()), **sizes, rollout_dtype=flags.rollout_dtype)


if __name__ == "__main__":
    main()
