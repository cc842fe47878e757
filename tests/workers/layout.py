"""Parallel layouts, run under torchrun by test_layouts.py.

Every family goes through load, forward, hand-off bytes, export and optimizer steps.

    torchrun --nproc-per-node N layout.py OUT_FOLDER CASES_FILE

CASES_FILE holds as JSON, of each layout:

    {"splits": [tp, ep, pp, cp], "folders": {family: model folder}, "microbatch_tokens": [4096, 64]}

with the micro-batch size of each optimizer step to take, or none of them.

Rank 0 writes OUT_FOLDER/report.json, {layout: {family: [each rank's report]}}, and the exported
models to OUT_FOLDER/layout/family. The test compares reports of different layouts. No engine is
started.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

sys.path[:0] = [str(Path(__file__).resolve().parent.parent.parent)]

from groups import report_cases
from backends import delta
from backends.megatron.batches import pack_batch
from backends.huggingface.config import read_config
from backends.huggingface.fp8 import fp8_weights
from backends.megatron.layers import zigzag
from common import distributed
from common.settings import TrainSettings
from fp8_quant import quantize_blockwise
from harness import exits, export as hf_export
from losses import LossSettings
import rollout
import train_step
import weight_sync
from tests.nudge import nudge

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def fixed_samples(vocab: int, *, with_shared_prompts: bool = False) -> list[rollout.Sample]:
    """Return 24 ragged samples with everything that the loss looks at.

    One is wholly masked, as a sample whose judge failed. with_shared_prompts: every fourth has the
    prompt of the one before.
    """
    generator = torch.Generator().manual_seed(0)
    samples = []
    for i in range(24):
        prompt, response = (
            torch.randint(3, vocab, (n,), generator=generator).tolist()
            for n in (3 + i % 5, 1 + (7 * i) % 11)
        )
        if with_shared_prompts and i % 4 == 1:
            prompt = samples[-1].prompt_ids
        logprobs = (-torch.rand(len(response), generator=generator) * 5).tolist()
        mask = [0 if i == 3 or (i == 5 and j == 0) else 1 for j in range(len(response))]
        samples.append(
            rollout.Sample(
                prompt,
                response_ids=response,
                rollout_logprobs=logprobs,
                loss_mask=mask,
                advantages=[(i % 7 - 3) / 2] * len(response),
            )
        )
    return samples


def build(folder: str, tp: int, ep: int, pp: int, cp: int, dtype: str):
    """Return a trainer at this layout and its hand-off."""
    config = read_config(folder)
    settings = TrainSettings(tp=tp, ep=ep, pp=pp, cp=cp, train_dtype=dtype, lr=1e-3)
    trainer = train_step.build_trainer(
        folder, settings, config, steps=4, seed=1, temperature=1.0, max_response_tokens=8
    )
    fp8 = fp8_weights(config, rollout_dtype="fp8", engine_tp=1)
    return trainer, weight_sync.WeightPath(
        trainer.gpt,
        trainer.layout,
        config,
        fp8,
        bucket_bytes=200_000,
        broadcast_group=dist.group.WORLD,
    )


def one_step(trainer, temperature: float = 0.7) -> dict:
    trainer.temperature, trainer.max_response_tokens = temperature, 16
    batches = train_step.pack(trainer, fixed_samples(trainer.config["vocab_size"]))
    train_step.add_logprobs(trainer, batches)
    return train_step.update_policy(trainer, batches, LossSettings())


def whole(mine: torch.Tensor, group: dist.ProcessGroup, dim: int) -> torch.Tensor:
    """Join the ranks' parts of a tensor along dim."""
    parts = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(parts, mine.contiguous(), group=group)
    return torch.cat(parts, dim=dim)


def errors(trainer, folder: str, temperature: float) -> dict[str, float]:
    """Return the largest |trainer - transformers| of the logits and of the log-probs, in fp32.

    Over every position of this rank's samples; the log-probs are those at the temperature.
    """
    reference = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    samples = fixed_samples(trainer.config["vocab_size"], with_shared_prompts=True)
    batch = pack_batch(trainer, samples)
    batches, trainer.temperature = batch.microbatches, temperature
    seen, stock = [], train_step.logprobs_and_entropy

    def keep_logits(logits_TV, *rest, **named):
        seen.append(logits_TV.detach().clone())
        return stock(logits_TV, *rest, **named)

    with mock.patch.object(train_step, "logprobs_and_entropy", keep_logits):
        logprobs = train_step.compute_logprobs(trainer, batches)
    worst = {"logits": 0.0, "logprobs": 0.0}
    for batch, logits_TV, logprobs_T in zip(
        batches, seen, logprobs
    ):  # only the last pipeline stage has any
        lengths, cp = batch.packed.cu_seqlens_q.diff().tolist(), trainer.cp_group
        in_order = torch.cat(
            [zigzag(lengths, cp.size(), rank) for rank in range(cp.size())]
        ).argsort()
        tokens_T, labels_T, logprobs_T, logits_TV = (
            whole(x, cp, 0)[in_order]
            for x in (batch.tokens_T, batch.labels_T, logprobs_T, logits_TV)
        )
        logits_TV = whole(logits_TV, trainer.layout.tp_group, -1)[:, : trainer.config["vocab_size"]]
        prompt_of, tokens = batch.packed.prompt_of, tokens_T.split(lengths)
        prompts = [tokens_T[:0]] * (len(lengths) - len(prompt_of)) + [tokens[i] for i in prompt_of]
        for prompt_P, ours_LV, tokens_L, labels_L, logprobs_L in zip(
            prompts, *(x.split(lengths) for x in (logits_TV, tokens_T, labels_T, logprobs_T))
        ):
            with torch.no_grad():
                ids = torch.cat([prompt_P, tokens_L])
                expected_LV = reference(ids[None]).logits[0, len(prompt_P) :]
            expected_L = (
                (expected_LV / temperature).log_softmax(-1).gather(1, labels_L[:, None])[:, 0]
            )
            worst["logits"] = max(worst["logits"], (expected_LV - ours_LV).abs().max().item())
            worst["logprobs"] = max(worst["logprobs"], (expected_L - logprobs_L).abs().max().item())
    return worst


def hand_off_errors(weights, folder: str) -> list[str]:
    """Return the names whose bytes on this rank are not quantize(full tensor) of the folder's file.

    Names that are missing or too many count too. Rank 0 sends, every rank receives.
    """
    source = load_file(Path(folder) / "model.safetensors")
    expected = {}
    for name, tensor in source.items():
        if name in weights.fp8:
            expected[name], expected[f"{name}_scale_inv"] = quantize_blockwise(tensor)
        else:
            expected[name] = tensor
    got = dict(pair for bucket in weight_sync.buckets_of(weights, quantize=True) for pair in bucket)
    return sorted(set(got) ^ set(expected)) + [
        name for name in got.keys() & expected.keys() if not same_bytes(got[name], expected[name])
    ]


def delta_errors(weights) -> list[str]:
    """Return the names that a receiver of changes holds wrongly, over 20 updates.

    Compared are the bytes of the same update sent whole, which hand_off_errors has proved. Every
    fourth update changes nothing, and the one after it everything.
    """
    weights, held, wrong = replace(weights, sent=delta.Sent()), {}, []
    for version, every in enumerate((1, *5 * (50, 7, None, 1))):
        if every and version:
            nudge(weights.gpt, every)
        base, whole = weights.sent.begin(), 0
        buckets = weight_sync.buckets_of(weights, quantize=True, sent=weights.sent)
        for name, tensor in (pair for bucket in buckets for pair in bucket):
            if not name.startswith(delta.CHANGES):
                held[name], whole = tensor.clone(), whole + 1
                continue
            changed = [held[name] for name in delta.names_in(name)]
            if not changed:
                continue
            laid_out = torch.cat([delta.as_integers(tensor).flatten() for tensor in changed])
            positions, values = delta.decode(tensor, laid_out.dtype)
            laid_out[positions] = values
            parts = laid_out.split([tensor.numel() for tensor in changed])
            for tensor_held, part in zip(changed, parts):
                delta.as_integers(tensor_held).view(-1).copy_(part)
        weights.sent.version = version
        assert (base == -1) == (version == 0)
        expected = weight_sync.buckets_of(weights, quantize=True)
        for name, tensor in (pair for bucket in expected for pair in bucket):
            if not same_bytes(held[name], tensor):
                wrong.append(f"{name} at version {version}")
        if every is None and whole:
            wrong.append(f"{whole} tensors went whole, and nothing had changed")
    return wrong


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
    )


def report_of(folder: str, splits: list[int], out: Path, microbatch_tokens: list[int]) -> dict:
    """Measure one model at one layout, and return what this rank has found."""
    trainer, weights = build(folder, *splits, "fp32")
    mine = {
        "errors": errors(trainer, folder, 0.7),
        "hand_off_errors": hand_off_errors(weights, folder),
    }
    hf_export.export_hf(weights, out, source=folder, dtype="bf16")
    if microbatch_tokens:
        mine["steps"] = []
        for tokens in microbatch_tokens:
            trainer.settings = replace(trainer.settings, microbatch_tokens=tokens)
            mine["steps"].append(one_step(trainer))
        trainer, weights = build(folder, *splits, "bf16")
        mine["step_bf16"] = one_step(trainer)
    mine["delta_errors"] = delta_errors(weights)  # last: it changes the weights
    return mine


def main() -> None:
    out, cases = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    distributed.init_distributed()

    def measure(layout: str, family: str, case: dict) -> dict:
        how = case["splits"], out / layout / family, case["microbatch_tokens"]
        return report_of(case["folders"][family], *how)

    report_cases(out, cases, measure)


if __name__ == "__main__":
    exits.run_main(main)
