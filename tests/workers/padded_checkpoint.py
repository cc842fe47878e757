"""A checkpoint written at one tensor-parallel size and read at another; run by test_layouts.py.

    torchrun --nproc-per-node 2 padded_checkpoint.py OUT_FOLDER CASES_FILE

CASES_FILE holds as JSON, of each case, [model folder, tp, other tp]. Rank 0 writes
OUT_FOLDER/report.json, {case: report}: the names of the tensors that came back with other bytes,
the rows of the embedding, and the loss and gradient norm of the next two optimizer steps, by the
trainer that wrote the checkpoint and by the one that read it. No engine is started.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path[:0] = [str(Path(__file__).resolve().parent.parent.parent)]

import layout
from groups import drop_megatron
from common import distributed
from harness import checkpoint, exits
import weight_sync
from loop_sync import Settings

import torch.distributed as dist


def build(folder: str, tp: int):
    drop_megatron()
    return layout.build(folder, tp, 1, 1, 1, "fp32")


def tensors_of(weights) -> dict:
    """Full tensors by name."""
    buckets = weight_sync.trainer_buckets(weights, quantize=False)
    return {name: tensor.clone() for bucket in buckets for name, tensor in bucket}


def next_steps(trainer) -> list[float]:
    """Loss and gradient norm of two optimizer steps; the second shows Adam's state."""
    steps = [layout.one_step(trainer) for _ in range(2)]
    return [step[metric] for step in steps for metric in ("loss", "grad_norm")]


def report_of(folder: str, tp: int, other_tp: int, out: Path) -> dict:
    """Write a checkpoint at tp, read it at other_tp, and return what differs."""
    trainer, weights = build(folder, tp)
    layout.one_step(trainer)
    is_writer, everyone = dist.get_rank() == 0, dist.group.WORLD
    record = SimpleNamespace(
        folder=out, is_writer=is_writer, group=everyone, loop="sync", positions=dict
    )
    run = SimpleNamespace(record=record, settings=Settings(), inputs={})
    checkpoint.save(run, trainer, step=1, rank_state={})
    written, expected = tensors_of(weights), next_steps(trainer)

    trainer, weights = build(folder, other_tp)
    checkpoint.restore(checkpoint.open_checkpoint(out / "checkpoints" / "step-000001"), trainer)
    read, got = tensors_of(weights), next_steps(trainer)
    differ = [name for name in written if not layout.same_bytes(written[name], read[name])]
    rows = len(read["model.embed_tokens.weight"])
    return {"differ": differ, "rows": rows, "expected": expected, "got": got}


def main() -> None:
    out, cases = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    distributed.init_distributed()
    report = {name: report_of(*case, out / name) for name, case in cases.items()}
    if dist.get_rank() == 0:
        (out / "report.json").write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    exits.run_main(main)
