"""Refuse flags that do not go with --lora-rank, or that do nothing.

model_checks.check_lora has the rules that need config.json.
"""

import math

from common.errors import all_problems
from common.settings import TrainSettings


@all_problems
def check_lora_flags(settings) -> None:
    """Refuse flags of adapters that cannot work, whatever the model is. settings: a loop's."""
    train, rank = settings.train, settings.train.lora_rank
    if rank < 0:
        yield f"--lora-rank {rank} must not be negative; 0 trains all weights"
    if not 0 < train.lora_alpha < math.inf:
        yield f"--lora-alpha {train.lora_alpha} must be positive and finite"
    if rank == 0:
        if train.lora_alpha != TrainSettings().lora_alpha:
            given = f"--lora-alpha {train.lora_alpha:g}"
            yield f"{given} has no effect without --lora-rank: give both, or neither"
        if "lora" in settings.run.export:
            yield "--export lora writes adapters, and there are none: give --lora-rank"
        return
    if train.train_numerics == "fp8":
        why = "rounds a weight as the engine does, whose weight has the adapters' product in it"
        yield f"--train-numerics fp8 {why}: leave it out with --lora-rank"
    if train.freeze_moe_router:
        yield "--freeze-moe-router has no effect with --lora-rank: routers stay as they are"
    if train.offload_reference and not train.reference:
        why = "the reference is the model without its adapters, and takes no memory"
        yield f"--offload-reference has no effect with --lora-rank: {why}: leave it out"
