"""LoRA at parallel layouts, run under torchrun by test_lora.py.

    torchrun --nproc-per-node N lora.py OUT_FOLDER CASES_FILE

CASES_FILE holds {layout: {"splits": [tp, ep, pp, cp], "folders": {family: model folder},
"checkpoint": folder of the layout whose checkpoints are loaded, or null,
"megatron": [field=value]}} as JSON. Rank 0 writes OUT_FOLDER/report.json,
{layout: {family: [each rank's report]}}, and of each case the folders

    OUT_FOLDER/layout/family/merged         the merged weights in fp32, for transformers
    OUT_FOLDER/layout/family/adapters       for PEFT
    OUT_FOLDER/layout/family/checkpoint
"""

import json
import shutil
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent.parent)]

from groups import report_cases
from backends.huggingface.config import read_config
from backends.huggingface.fp8 import fp8_weights
from backends.huggingface.names import parameters_of
from backends.megatron.state import load_state, save_state
from common import distributed
from common.settings import TrainSettings
from harness import exits, export as hf_export
from layout import errors, one_step, same_bytes
import train_step
import weight_sync

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

STEPS = 3


def build(folder: str, splits: list[int], megatron: list[str]):
    """Return a trainer with adapters at this layout, and its hand-off."""
    config = read_config(folder)
    given = dict(zip(("tp", "ep", "pp", "cp"), splits), megatron=tuple(megatron))
    settings = TrainSettings(**given, train_dtype="fp32", lr=1e-2, lora_rank=4, lora_alpha=8.0)
    trainer = train_step.build_trainer(
        folder, settings, config, steps=2 * STEPS, seed=1, temperature=1.0, max_response_tokens=8,
        with_reference=True,
    )  # fmt: skip
    fp8 = fp8_weights(config, rollout_dtype="fp8", engine_tp=1)
    weights = weight_sync.WeightPath(trainer.gpt, trainer.layout, config, fp8, 200_000)
    return trainer, weights


def write_merged(weights, folder: str, out: Path) -> None:
    """Write what an engine would get, in fp32, as a Hugging Face folder. Collective."""
    named = {}
    for bucket in weight_sync.buckets_of(weights, quantize=False):
        named |= {name: tensor.clone() for name, tensor in bucket}
    if dist.get_rank() == 0:
        shutil.copytree(folder, out)
        save_file(named, out / "model.safetensors", metadata={"format": "pt"})
    dist.barrier()


def hand_off_errors(weights, merged: Path) -> list[str]:
    """Return the names whose bytes are not quantize(the full merged tensor), or missing names."""
    expected = {}
    for name, tensor in load_file(merged / "model.safetensors").items():
        is_fp8 = name in weights.fp8
        expected |= weight_sync.quantize_named(name, tensor) if is_fp8 else [(name, tensor)]
    got = dict(pair for bucket in weight_sync.buckets_of(weights, quantize=True) for pair in bucket)
    return sorted(set(got) ^ set(expected)) + [
        name for name in got.keys() & expected.keys() if not same_bytes(got[name], expected[name])
    ]


def reference_errors(trainer, folder: str) -> float:
    """Return how far the reference is from transformers on the folder, in logits."""
    policy, trainer.ddp = trainer.ddp, trainer.reference
    try:
        return errors(trainer, folder, 1.0)["logits"]
    finally:
        trainer.ddp = policy


def report_of(
    folder: str, splits: list[int], megatron: list[str], out: Path, checkpoint: Path | None
) -> dict:
    """Measure one model at one layout, and return what this rank has found."""
    trainer, weights = build(folder, splits, megatron)
    frozen = {name: weight.clone() for name, weight in parameters_of(trainer.gpt)}
    held = [
        weight.numel() for group in trainer.optimizer.param_groups for weight in group["params"]
    ]
    mine = {"start": errors(trainer, folder, 1.0)["logits"], "optimizer": sum(held)}
    if checkpoint:
        load_state(trainer, checkpoint)
        mine["resumed"] = [one_step(trainer) for _ in range(STEPS)]
        trainer, weights = build(folder, splits, megatron)
    mine["steps"] = [one_step(trainer) for _ in range(STEPS)]
    if dist.get_rank() == 0:
        (out / "checkpoint").mkdir(parents=True)
    dist.barrier()
    save_state(trainer, out / "checkpoint")
    write_merged(weights, folder, out / "merged")
    mine["merged"] = errors(trainer, str(out / "merged"), 1.0)["logits"]
    mine["hand_off"] = hand_off_errors(weights, out / "merged")
    mine["reference"] = reference_errors(trainer, folder)
    now = dict(parameters_of(trainer.gpt))
    mine["changed"] = [
        name for name, tensor in frozen.items() if not torch.equal(now[name], tensor)
    ]
    hf_export.export_all(weights, {"lora": out / "adapters"}, source=folder)
    mine["continued"] = [one_step(trainer) for _ in range(STEPS)]
    return mine


def main() -> None:
    out, cases = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    distributed.init_distributed()

    def measure(layout: str, family: str, case: dict) -> dict:
        checkpoint = case["checkpoint"] and Path(case["checkpoint"]) / family / "checkpoint"
        how = case["folders"][family], case["splits"], case["megatron"]
        return report_of(*how, out / layout / family, checkpoint)

    report_cases(out, cases, measure)


if __name__ == "__main__":
    exits.run_main(main)
