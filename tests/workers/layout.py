"""One parallel layout, run under torchrun by test_layouts.py: every family through load, forward, hand-off bytes, export and one optimizer step.

    torchrun --nproc-per-node N layout.py OUT_FOLDER TP EP PP FAMILY=MODEL_FOLDER …

Rank 0 writes OUT_FOLDER/report.json; the test compares reports of different layouts. No engine is started.
"""

import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent.parent)]

import rollout 
import run
import train_step
import weight_sync
from fp8_quant import quantize_blockwise
from hf_names import read_config
from megatron.core import parallel_state as mpu

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def fixed_samples(vocab: int) -> list[rollout.Sample]:
    """24 ragged samples with everything the loss looks at; one wholly masked, as a sample whose judge failed."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for i in range(24):
        prompt, response = (torch.randint(3, vocab, (n,), generator=generator).tolist() for n in (3 + i % 5, 1 + (7 * i) % 11))
        logprobs = (-torch.rand(len(response), generator=generator) * 5).tolist()
        mask = [0 if i == 3 or (i == 5 and j == 0) else 1 for j in range(len(response))]
        samples.append(rollout.Sample(prompt, response_ids=response, rollout_logprobs=logprobs, loss_mask=mask, advantage=(i % 7 - 3) / 2))
    return samples


def build(folder: str, tp: int, ep: int, pp: int, dtype: str, microbatch_tokens: int):
    if mpu.model_parallel_is_initialized():
        mpu.destroy_model_parallel()
    config = read_config(folder)
    settings = train_step.TrainSettings(tp=tp, ep=ep, pp=pp, train_dtype=dtype, microbatch_tokens=microbatch_tokens, lr=1e-3)
    trainer = train_step.build_trainer(folder, settings, config, steps=4, seed=1)
    fp8 = weight_sync.fp8_weights(config, rollout_dtype="fp8", engine_tp=1)
    return trainer, weight_sync.Weights(trainer, config, fp8, bucket_bytes=200_000)


def logprob_error(trainer, folder: str, temperature: float) -> float:
    """Largest |trainer - transformers| over the response tokens of this rank's samples, in fp32."""
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    worst = 0.0
    batches = train_step.local_microbatches(trainer, fixed_samples(trainer.config["vocab_size"]))
    for batch, logprobs_T in zip(batches, train_step.compute_logprobs(trainer, batches, temperature=temperature)):
        bounds = batch.packed.cu_seqlens_q.tolist()
        for start, end in zip(bounds, bounds[1:]):
            with torch.no_grad():
                logits = reference(batch.tokens_T[None, start:end]).logits[0] / temperature
            expected = logits.log_softmax(-1).gather(1, batch.labels_T[start:end, None])[:, 0]
            worst = max(worst, (expected - logprobs_T[start:end])[:-1].abs().max().item() if end - start > 1 else 0.0)
    return worst


def hand_off_errors(weights, folder: str) -> list[str]:
    """Names whose handed-over bytes are not quantize(full tensor) of the folder's file, plus names that are missing or too many."""
    source = load_file(Path(folder) / "model.safetensors")
    expected = {}
    for name, tensor in source.items():
        if name in weights.fp8:
            expected[name], expected[f"{name}_scale_inv"] = quantize_blockwise(tensor)
        else:
            expected[name] = tensor
    got = dict(pair for bucket in weight_sync.trainer_buckets(weights, quantize=True) for pair in bucket)
    return sorted(set(got) ^ set(expected)) + [name for name in got.keys() & expected.keys() if not same_bytes(got[name], expected[name])]


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def main() -> None:
    out, tp, ep, pp = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    run.init_distributed()
    report = {}
    for family, folder in (pair.split("=") for pair in sys.argv[5:]):
        trainer, weights = build(folder, tp, ep, pp, "fp32", 4096)
        mine = {"logprob_error": logprob_error(trainer, folder, 0.7), "hand_off_errors": hand_off_errors(weights, folder)}
        weight_sync.export_hf(weights, out / family, source=folder, dtype="bf16")
        for microbatch_tokens in (4096, 64):
            trainer, weights = build(folder, tp, ep, pp, "fp32", microbatch_tokens)
            steps = [train_step.train_step(trainer, fixed_samples(trainer.config["vocab_size"]), temperature=0.7) for _ in range(2)]
            mine[f"steps_{microbatch_tokens}"] = steps
        reports = [None] * dist.get_world_size()
        dist.all_gather_object(reports, mine)
        report[family] = reports
    if dist.get_rank() == 0:
        (out / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    run.run_main(main)
