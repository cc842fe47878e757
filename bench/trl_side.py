"""TRL's side of bench/peers.py: GRPOTrainer on the toy, with the settings.json of our run.

    torchrun --nproc-per-node 2 bench/trl_side.py '{"settings": …, "workload": "toy", "dtype":
    "bf16", "microbatches": 1}' OUT.jsonl
    python bench/trl_side.py '{…, "samples": "samples.json"}' OUT.safetensors

It runs in TRL's own virtual environment. Our side imports answer_length and parity from here, which
both sides of the ragged workload share.

TRL gets our value of each setting that it has. It does otherwise:

    weights       one copy in FP32, with bf16: autocast to BF16; ours are FP8 in the engine and BF16
                  with FP32 main weights in the trainer
    advantages    divide by the standard deviation plus 1e-4 instead of 1e-6
    old log-probs those of the training pass, so there is no scoring pass and no correction
    batches       padded; transformers' generate goes on until its last answer has ended
"""

import json
import math
import os
import sys
import time
import zlib
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LONGEST = 256


def answer_length(prompt_ids: list[int], index: int) -> int:
    """Return the tokens of a ragged answer: exponential, cut at LONGEST, with mean 64.

    One in fifty is cut. The index-th answer to a prompt has the same length on every side.
    """
    u = (zlib.crc32(bytes([*prompt_ids, index])) + 1) / 2**32
    return min(LONGEST, math.ceil(-65 * math.log(u)))


def parity(response_ids: list[int]) -> float:
    """Return the reward of a ragged answer.

    No such answer is right. Any rule that gives different rewards will do.
    """
    return float(sum(response_ids) % 2)


def configuration(work: dict, folder: Path):
    """Return TRL's GRPOConfig for our settings."""
    from trl import GRPOConfig

    settings, ranks = work["settings"], int(os.environ.get("WORLD_SIZE", "1"))
    run, rollout, train, loss = (settings[part] for part in ("run", "rollout", "train", "loss"))
    group = rollout["samples_per_prompt"]
    samples = rollout["prompts_per_step"] * group
    return GRPOConfig(
        output_dir=str(folder / "trl"),
        max_steps=run["steps"],
        seed=run["seed"],
        shuffle_dataset=False,
        num_generations=group,
        per_device_train_batch_size=samples // ranks // work["microbatches"],
        gradient_accumulation_steps=work["microbatches"],
        max_completion_length=rollout["max_response_tokens"],
        temperature=rollout["temperature"],
        num_iterations=train["minibatches"],
        beta=loss["kl_coef"],
        epsilon=loss["clip_low"],
        epsilon_high=loss["clip_high"],
        loss_type={"token": "dapo", "sequence": "grpo", "constant": "dr_grpo"}[loss["aggregation"]],
        learning_rate=train["lr"],
        lr_scheduler_type=train["lr_schedule"],
        warmup_steps=train["lr_warmup_steps"],
        adam_beta1=0.9,
        adam_beta2=train["adam_beta2"],
        adam_epsilon=1e-8,
        weight_decay=train["weight_decay"],
        max_grad_norm=train["clip_grad"],
        bf16=work["dtype"] == "bf16",
        gradient_checkpointing=False,
        use_cpu=True,
        ddp_backend="gloo" if ranks > 1 else None,
        ddp_find_unused_parameters=False,
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        model_init_kwargs={"dtype": "float32"},
    )


def write_gradient(work: dict, out: Path) -> None:
    """Write the gradient of TRL's loss of given samples, by the parameters' names.

    work["samples"]: a JSON file with a list of {prompt_ids, response_ids, advantage}.
    """
    import torch
    from datasets import Dataset
    from safetensors.torch import save_file
    from torch.nn.utils.rnn import pad_sequence
    from trl import GRPOTrainer

    samples = json.loads(Path(work["samples"]).read_text(encoding="utf-8"))
    nothing = Dataset.from_list([{"prompt": "1+1="}])
    arguments = configuration(work, out.parent)
    trainer = GRPOTrainer(
        work["settings"]["run"]["model"], lambda **_: [], arguments, train_dataset=nothing
    )

    def padded(rows: list[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
        how = dict(batch_first=True, padding_side=side)
        ids = pad_sequence([torch.tensor(row) for row in rows], padding_value=0, **how)
        return ids, pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], **how)

    prompt_ids, prompt_mask = padded([sample["prompt_ids"] for sample in samples], "left")
    ids, mask = padded([sample["response_ids"] for sample in samples], "right")
    inputs = dict(prompt_ids=prompt_ids, prompt_mask=prompt_mask, num_items_in_batch=mask.sum())
    inputs |= dict(completion_ids=ids, completion_mask=mask)
    inputs |= dict(advantages=torch.tensor([sample["advantage"] for sample in samples]))
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    with trainer.compute_loss_context_manager():  # autocast, with bf16
        trainer._compute_loss(trainer.model, inputs).backward()
    save_file({name: p.grad.contiguous() for name, p in trainer.model.named_parameters()}, out)


def main(work: dict, out: Path) -> None:
    import torch
    from transformers import LogitsProcessor, LogitsProcessorList, TrainerCallback
    from trl import GRPOTrainer
    from datasets import Dataset

    sys.path.insert(0, str(ROOT))
    from toy.task import problems

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    settings = work["settings"]
    run, rollout = settings["run"], settings["rollout"]
    ragged, ranks = work["workload"] == "ragged", int(os.environ.get("WORLD_SIZE", "1"))
    group = rollout["samples_per_prompt"]
    arguments, rewards = configuration(work, out.parent), []

    def exact_match(prompts, completions, completion_ids, label, **more) -> list[float]:
        """Reward as reward.exact_match: 1 if the answer is the label and ended by itself."""
        return [
            float(ids[-1] == end and text.strip() == right)
            for ids, text, right in zip(completion_ids, completions, label)
        ]

    def reward(completion_ids, **more) -> list[float]:
        if ragged:
            scores = [parity(ids) for ids in completion_ids]
        else:
            scores = exact_match(completion_ids=completion_ids, **more)
        rewards.append((sum(scores), sum(map(len, completion_ids)), len(scores)))
        return scores

    class Lengths(LogitsProcessor):
        """Make every answer end at its own length, neither before nor after."""

        def __init__(self, prompts_NL):
            self.start = prompts_NL.shape[1]
            self.lengths_N = torch.tensor(
                [answer_length(ids, i % group) for i, ids in enumerate(prompts_NL.tolist())]
            )

        def __call__(self, ids_NL, logits_NV):
            last_N = ids_NL.shape[1] - self.start + 1 >= self.lengths_N
            logits_NV[:, end] = -math.inf
            logits_NV[last_N] = -math.inf
            logits_NV[last_N, end] = 0
            return logits_NV

    class Clock(TrainerCallback):
        """Write a row for each step, as our loops do.

        step_s counts from the end of the step before, without evaluation.
        """

        def on_train_begin(self, *args, **more):
            self.log({"step": 0, **evaluate()})

        def on_step_end(self, args, state, control, **more):
            step_s = time.perf_counter() - self.last
            sums = torch.tensor([*map(sum, zip(*rewards))], dtype=torch.float64)
            score, tokens, count = trainer.accelerator.reduce(sums).tolist()
            rewards.clear()
            row = {
                "step": state.global_step,
                "step_s": step_s,
                "reward": score / count,
                "tokens": tokens,
                "samples": count,
            }
            due = state.global_step % run["eval_every"] == 0 or state.global_step == run["steps"]
            self.log(row | (evaluate() if due else {}))

        def log(self, row: dict) -> None:
            if trainer.is_world_process_zero():
                with open(out, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            self.last = time.perf_counter()

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        """Answer every held-out prompt once, sampled as in training; as harness/evaluate.py.

        Each rank answers its share.
        """
        rows = list(islice(problems(seed=0, held_out=True), rollout["eval_samples"]))
        rows = rows[trainer.accelerator.process_index :: ranks]
        ids_NL = torch.tensor([tokenizer(row["prompt"]).input_ids for row in rows])
        trainer.model.eval()
        lengths = dict(
            max_new_tokens=rollout["max_response_tokens"],
            eos_token_id=end,
            pad_token_id=tokenizer.pad_token_id,
        )
        sampling = dict(do_sample=True, temperature=rollout["temperature"], top_k=0, top_p=1.0)
        prompts = dict(input_ids=ids_NL, attention_mask=torch.ones_like(ids_NL))
        ids_NM = stock_generate(**prompts, **sampling, **lengths)[:, ids_NL.shape[1] :]
        trainer.model.train()
        ids_NM = [ids[: ids.index(end) + 1] if end in ids else ids for ids in ids_NM.tolist()]
        texts = tokenizer.batch_decode(ids_NM, skip_special_tokens=True)
        scores = exact_match(None, texts, ids_NM, [row["label"] for row in rows])
        sums = torch.tensor([sum(scores), len(scores)], dtype=torch.float64)
        total, count = trainer.accelerator.reduce(sums).tolist()
        return {"held_out": total / count}

    prompts = run["steps"] * rollout["prompts_per_step"]
    rows = list(islice(problems(seed=run["seed"], held_out=False), prompts))
    more = dict(train_dataset=Dataset.from_list(rows), callbacks=[Clock()])
    trainer = GRPOTrainer(run["model"], reward, arguments, **more)
    tokenizer, model = trainer.processing_class, trainer.model
    end, stock_generate = tokenizer.eos_token_id, model.generate
    if ragged:

        def generate(input_ids, **more):
            lengths = LogitsProcessorList([Lengths(input_ids)])
            return stock_generate(input_ids, logits_processor=lengths, **more)

        model.generate = generate
    trainer.train()
    if ranks > 1:
        # Otherwise gloo's threads may still run when the interpreter ends, and abort it.
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    work, out = json.loads(sys.argv[1]), Path(sys.argv[2])
    (write_gradient if "samples" in work else main)(work, out)
