"""What the ranks of real trainers hold, in bytes, at several layouts of four ranks; run by
test_memory.py.

    torchrun --nproc-per-node 4 held_bytes.py OUT DENSE_FOLDER MOE_FOLDER

Writes to OUT, as JSON: for each case of CASES, for each rank, the bytes of parameters, of DDP's
gradient buffers, and of FP32 main weights with Adam's moments.
"""

import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent.parent)]

import torch

# First of what imports Megatron: without a GPU Megatron is patched there.
from groups import drop_megatron

from backends.huggingface.config import read_config
from common import distributed
from common.settings import TrainSettings
from harness import exits
import train_step

CASES = {  # name: (folder, settings)
    "dense dp 4": (0, dict()),
    "dense tp 2, dp 2": (0, dict(tp=2)),
    "dense tp 2, pp 2": (0, dict(tp=2, pp=2)),
    "dense cp 2, dp 2": (0, dict(cp=2)),
    "dense fp32, dp 4": (0, dict(train_dtype="fp32")),
    "experts ep 2, dp 4": (1, dict(ep=2)),
    "experts tp 2, dp 2": (1, dict(tp=2)),
    "experts tp 2, ep 4": (1, dict(tp=2, ep=4)),
    "experts ep 2, pp 2, dp 2": (1, dict(ep=2, pp=2)),
    "dense LoRA, tp 2, dp 2": (0, dict(tp=2, lora_rank=32)),
    "experts LoRA, ep 2, pp 2, dp 2": (1, dict(ep=2, pp=2, lora_rank=32)),
}


def held(trainer) -> dict[str, int]:
    buffers = [*trainer.ddp.buffers, *trainer.ddp.expert_parallel_buffers]
    weights = {parameter.data_ptr() for parameter in trainer.gpt.parameters()}
    optimizer = 0
    for chained in trainer.optimizer.chained_optimizers:
        for group in chained.optimizer.param_groups:
            for main in group["params"]:
                own = main.untyped_storage().data_ptr() not in {
                    buffer.param_data.untyped_storage().data_ptr() for buffer in buffers
                }
                optimizer += (main.nbytes if own else 0) + sum(
                    chained.optimizer.state[main][name].nbytes for name in ("exp_avg", "exp_avg_sq")
                )
    assert len(weights) == len(list(trainer.gpt.parameters()))
    return {
        "weights": sum(parameter.nbytes for parameter in trainer.gpt.parameters()),
        "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
        "optimizer": optimizer,
    }


def main() -> None:
    out, *folders = sys.argv[1:]
    everyone, found = distributed.init_distributed(), {}
    for name, (folder, settings) in CASES.items():
        drop_megatron()
        config = read_config(folders[folder])
        trainer = train_step.build_trainer(
            folders[folder],
            TrainSettings(**settings),
            config,
            steps=1,
            seed=1,
            temperature=1.0,
            max_response_tokens=8,
        )
        mine = held(trainer)
        found[name] = [
            json.loads(row)
            for row in distributed.all_gather_bytes(json.dumps(mine).encode(), everyone)
        ]
        del trainer
    if torch.distributed.get_rank() == 0:
        Path(out).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    # Destroys the process groups. With gloo's threads still there, the interpreter sometimes
    # aborts at its end.
    exits.run_main(main)
