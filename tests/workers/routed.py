"""Log-probs and gradients of an engine's samples at parallel layouts.

Run under torchrun by test_routing_replay.py and test_fp8_numerics.py:

    torchrun --nproc-per-node N routed.py OUT_FOLDER CASES_FILE

CASES_FILE holds as JSON, of each case:

    {"folder": model, "samples": dump with the engine's experts and log-probs,
     "splits": [tp, ep, pp, cp], "train": {field of TrainSettings: value},
     "noise": standard deviation of what is added to every router's weights}

Rank 0 writes OUT_FOLDER/CASE.json, {"largest" and "mean": of |log-prob here - engine's|,
"route_mismatch": share}, and OUT_FOLDER/CASE.safetensors, the whole gradient of the loss.
"""

import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent.parent)]

from groups import drop_megatron
from backends.huggingface.config import read_config
from backends.huggingface.fp8 import fp8_weights
from backends.megatron.balancing import balance_metrics
from common import distributed
from common.settings import TrainSettings
from data.sample import read_dump
from harness import exits
from losses import LossSettings
import train_step
import weight_sync

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter
from safetensors.torch import save_file


def build(case: dict) -> tuple[train_step.Trainer, weight_sync.WeightPath]:
    """Return a trainer whose routers are disturbed, alike at every layout, and its weights."""
    tp, ep, pp, cp = case["splits"]
    split = dict(tp=tp, ep=ep, pp=pp, cp=cp, microbatch_tokens=128)
    settings = TrainSettings(**split | case["train"])
    config = read_config(case["folder"])
    trainer = train_step.build_trainer(
        case["folder"], settings, config, steps=4, seed=1, temperature=1.0, max_response_tokens=8,
        fp8=fp8_weights(config, rollout_dtype="fp8", engine_tp=1),
    )  # fmt: skip
    for router in (module for module in trainer.gpt.modules() if isinstance(module, TopKRouter)):
        generator = torch.Generator().manual_seed(router.layer_number)
        noise = torch.randn(router.weight.shape, generator=generator) * case["noise"]
        router.weight.data += noise.to(router.weight.device)
    group = dist.group.WORLD
    weights = weight_sync.WeightPath(
        trainer.gpt, trainer.layout, config, frozenset(), 200_000, broadcast_group=group
    )
    return trainer, weights


def whole_gradient(trainer: train_step.Trainer, weights) -> dict[str, torch.Tensor]:
    """Return the gradient as Hugging Face tensors, which replaces the weights. Collective.

    The hand-off's own gather joins what ranks hold. Before it, data-parallel ranks are asked for
    the parts that Megatron has left with them.
    """
    for buffer in trainer.ddp.buffers + trainer.ddp.expert_parallel_buffers:
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:
            part = bucket.grad_data.chunk(group.size())[group.rank()].clone()
            dist.all_gather(list(bucket.grad_data.chunk(group.size())), part, group=group)
    for parameter in trainer.gpt.parameters():
        parameter.data.copy_(parameter.main_grad)
    buckets = weight_sync.buckets_of(weights, quantize=False)
    return {name: tensor.clone() for bucket in buckets for name, tensor in bucket}


def measure(case: dict) -> tuple[dict, dict]:
    trainer, weights = build(case)
    samples = read_dump(case["samples"])
    for i, sample in enumerate(samples):
        sample.advantages = [(i % 5 - 2) / 2] * len(sample.response_ids)
    batches = train_step.pack(trainer, samples)
    train_step.add_logprobs(trainer, batches)
    differs = [
        abs(float(ours) - engine)
        for sample in samples
        for ours, engine in zip(sample.old_logprobs, sample.rollout_logprobs)
    ]
    train_step.backward(trainer, batches[0], LossSettings())
    report = {"largest": max(differs), "mean": sum(differs) / len(differs)}
    report |= trainer.replay.mismatch() if trainer.replay else {}
    report |= balance_metrics(trainer, batches)
    choices = trainer.replay.choices if trainer.replay else []
    left = [choice for choice in choices if choice.recomputed]
    assert not left, "experts that no recomputation has asked for"
    return report, whole_gradient(trainer, weights)


def main() -> None:
    out, cases = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    distributed.init_distributed()
    for name, case in cases.items():
        drop_megatron()
        report, gradient = measure(case)
        if dist.get_rank() == 0:
            (out / f"{name}.json").write_text(json.dumps(report), encoding="utf-8")
            save_file(gradient, out / f"{name}.safetensors")


if __name__ == "__main__":
    exits.run_main(main)
