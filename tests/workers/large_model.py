"""Which Hugging Face tensors the ranks of a large layout deliver, found without weights and without
the ranks; run by test_large_models.py.

    python large_model.py CASES_FILE

CASES_FILE holds as JSON, of each model, [its folder, tp, ep, pp]. Every pipeline stage is built on
the meta device, with process groups that are stand-ins. Prints {model: {name: shape}} as JSON;
fails on a name delivered twice.
"""

import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent.parent)]

import torch
import torch.distributed as dist

# First of what imports Megatron: without a GPU Megatron is patched there.
from backends.megatron import model as megatron_model
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch.testing._internal.distributed.fake_pg import FakeStore

from backends.huggingface.config import read_config
from backends.huggingface.names import VOCABULARY
from common.settings import TrainSettings
from harness import model_checks
import weight_sync


def build_as(rank: int, world_size: int, settings: TrainSettings, config: dict):
    """build_gpt as that rank of a larger world would call it."""
    if dist.is_initialized():
        mpu.destroy_model_parallel()
        dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    experts = dict(
        expert_model_parallel_size=settings.ep,
        expert_tensor_parallel_size=megatron_model.expert_tp(settings),
    )
    mpu.initialize_model_parallel(
        settings.tp, settings.pp, **experts, create_gloo_process_groups=False
    )
    model_parallel_cuda_manual_seed(1)
    return megatron_model.build_gpt(settings, config)


def delivered_by(folder: str, tp: int, ep: int, pp: int) -> dict[str, list[int]]:
    """Return the shape of every tensor that the ranks deliver, by its name."""
    config, world_size = read_config(folder), max(tp, ep) * pp
    settings = TrainSettings(tp=tp, pp=pp, ep=ep)
    model_checks.check_train_settings(settings, config, world_size=world_size, longest=8192)
    delivered = {}
    for stage in range(pp):
        gpt, layout = build_as(stage * world_size // pp, world_size, settings, config)
        assert (
            sum(parameter.nbytes for parameter in gpt.parameters() if not parameter.is_meta) < 2**30
        )  # Megatron allocates routers on the CPU
        weights = weight_sync.WeightPath(gpt, layout, config, frozenset(), bucket_bytes=1)
        for shard in weight_sync.shards_in_model_order(weights, quantize=False):
            shape = list(shard.local.shape)
            if shard.rule.tp_dim is not None:
                shape[shard.rule.tp_dim] *= layout.tp(shard.rule)
            if shard.names[0] in VOCABULARY:
                shape[0] = min(shape[0], config["vocab_size"])
            for name in shard.names:
                assert name not in delivered, name
                delivered[name] = shape
    return delivered


def main() -> None:
    torch.cuda.current_device = lambda: torch.device("meta")  # where Megatron puts its parameters
    cases = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print(json.dumps({model: delivered_by(*case) for model, case in cases.items()}))


if __name__ == "__main__":
    main()
