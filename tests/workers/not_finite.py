"""A batch of which one sample spoils the loss, on two data-parallel ranks, run under torchrun by
test_splits.py: each rank prints what it raises.

torchrun --nproc-per-node 2 not_finite.py MODEL_FOLDER
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent.parent)]

from backends.huggingface.config import read_config
from common import distributed
from common.settings import TrainSettings
from data.sample import Sample
from harness import exits
from losses import LossSettings
import train_step

import torch.distributed as dist


def main() -> None:
    distributed.init_distributed()
    folder = sys.argv[1]
    trainer = train_step.build_trainer(
        folder,
        TrainSettings(train_dtype="fp32"),
        read_config(folder),
        steps=4,
        seed=1,
        temperature=1.0,
        max_response_tokens=8,
    )
    answer = dict(
        response_ids=[7, 8],
        rollout_logprobs=[-1.0, -1.0],
        loss_mask=[1, 1],
        advantages=[1.0, 1.0],
        group=5,
    )
    samples = [Sample([5, 6], index=i, **answer) for i in range(4)]
    samples[2].rollout_logprobs = [-1.0, float("nan")]
    batches = train_step.pack(trainer, samples)
    train_step.add_logprobs(trainer, batches)
    try:
        train_step.update_policy(trainer, batches, LossSettings())
    except RuntimeError as error:
        sys.stdout.write(
            f"rank {dist.get_rank()} raises: {error}\n"
        )  # in one piece: print would write the end of the line apart, after the other rank's


if __name__ == "__main__":
    exits.run_main(main)
