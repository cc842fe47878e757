"""torchrun worker of test_gpu_engine.py: an engine of two ranks, each on a GPU of its own.

SGLang gives every rank but the first a copy of the report, on its own GPU. Rank 0 prints the report
as the caller sees it.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
import torch
import torch.distributed as dist

from backends.sglang.buckets import compare_loader
from common import distributed
from harness import exits


class Model(torch.nn.Module):
    def __init__(self, value: float):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((4,), value), requires_grad=False)

    def load_weights(self, named):
        for _, tensor in named:
            self.weight.data.copy_(tensor)


def main() -> None:
    distributed.init_distributed()  # NCCL for tensors on GPUs, gloo for others
    rank, has_gpus = dist.get_rank(), torch.cuda.device_count() > 1
    device = torch.device("cuda", rank) if has_gpus else torch.device("cpu")
    of_the_caller = torch.full((2, 1, 3), -1, dtype=torch.int64, device=device)
    report = of_the_caller if rank == 0 else of_the_caller.clone()
    # Rank 1 holds another weight than it should.
    named = [("weight", torch.ones(4, device=device)), ("report", report)]
    compare_loader(Model(1.0 + rank).to(device), named)
    if rank == 0:
        print(json.dumps(of_the_caller.tolist()))


if __name__ == "__main__":
    exits.run_main(main)
