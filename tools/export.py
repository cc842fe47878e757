"""Export a checkpoint as Hugging Face folders: BF16 or block FP8, or LoRA's adapters for PEFT.

The newest checkpoint of a run in BF16; a certain checkpoint in both formats; a model that one rank
cannot hold:

    python tools/export.py --checkpoint runs/NAME
    python tools/export.py --checkpoint runs/NAME/checkpoints/step-000040 --dtype bf16 fp8
    torchrun --nproc-per-node 8 tools/export.py --checkpoint runs/NAME --tp 8

The layout need not be the run's: every layout reads what any other has written. Only the weights
are read, not the optimizer state.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.errors import BadInput, all_problems
from common.settings import TrainSettings
from harness import flags

BUCKET_BYTES = 2**28
CHECKPOINT_FIX = "give runs/NAME of a run that has written one, or a folder in its checkpoints/"


@dataclass(frozen=True)
class ExportSettings:
    """The export: from a checkpoint to Hugging Face folders"""

    checkpoint: str = ""
    """Folder of a checkpoint, or of a run for its newest checkpoint."""
    dtype: tuple[str, ...] = ("bf16",)
    """Formats to write: any of bf16, fp8, and lora, the adapters of a run with --lora-rank."""
    out: str = ""
    """The folders are named OUT-bf16 and so on; empty: runs/NAME/step-000040-bf16 and so on."""
    model: str = ""
    """Hugging Face folder to copy config and tokenizer from, and with LoRA the model that the
    adapters belong to; empty: the run's --model."""
    tp: int = 1
    """Tensor-parallel size of this command."""
    pp: int = 1
    """Pipeline-parallel size of this command."""
    ep: int = 1
    """Expert-parallel size of this command."""


@all_problems
def check_export_flags(settings: ExportSettings) -> None:
    """Refuse what cannot work, whatever the checkpoint holds."""
    if not settings.dtype or set(settings.dtype) - {"bf16", "fp8", "lora"}:
        yield f"--dtype {' '.join(settings.dtype)!r} must be any of bf16, fp8, lora"
    if not os.path.isdir(settings.checkpoint):
        yield f"--checkpoint {settings.checkpoint!r} is not a folder: {CHECKPOINT_FIX}"


# The imports below take half a minute, so the flags are checked before them.
if __name__ == "__main__":
    settings = flags.parse_or_exit(ExportSettings, check_export_flags)

import torch.distributed as dist

from backends.huggingface.config import read_config
from backends.megatron import model as megatron_model
from backends.megatron.lora import add_adapters
from backends.megatron.state import load_weights
from common import distributed, hub
from harness import checkpoint, exits, export as hf_export, model_checks
from harness.run_folder import checkpoints_of
from weight_sync import WeightPath


@all_problems
def check_adapters(
    settings: ExportSettings, train: TrainSettings, config: dict, saved, model: str
) -> None:
    """Refuse adapters that are not there, that PEFT cannot load, or of another model.

    train: as the checkpoint saved was trained. config: config.json of the folder model, checked.
    """
    if not train.lora_rank:
        if "lora" in settings.dtype:
            yield "--dtype lora: the run trained all weights, and has no adapters: give bf16"
        return
    if "lora" in settings.dtype and (problem := model_checks.peft_problem(config)):
        yield f"--dtype lora: {problem}"
    read = saved.state["read"].get("--model")
    if checkpoint.folder_digest(Path(model)) != read:
        found = f"--model {model} is not the model that {saved.folder} was trained from"
        yield f"{found}: a checkpoint of adapters needs its weights: give that folder"


def main(settings: ExportSettings) -> None:
    """Check the checkpoint and --out, then load the weights and write the folders. Collective."""
    folder = Path(settings.checkpoint)
    newest = next(reversed(checkpoints_of(folder)), folder)
    if not (newest / "files.json").is_file():
        raise BadInput(f"--checkpoint {folder} holds no checkpoint: {CHECKPOINT_FIX}")
    saved = checkpoint.open_checkpoint(newest)
    model = settings.model or saved.state["settings"]["run"]["model"]
    model = hub.model_folder(model, flag="--model", weights=True)
    config = read_config(model)
    names = {name for _, name in checkpoint.WEIGHTS_MUST_AGREE}
    trained = saved.state["settings"]["train"].items()
    trained = {name: value for name, value in trained if name in names}
    train = TrainSettings(**trained, tp=settings.tp, pp=settings.pp, ep=settings.ep)
    check_adapters(settings, train, config, saved, model)
    model_checks.check_train_settings(
        train, config, world_size=int(os.environ["WORLD_SIZE"]), longest=None
    )
    out = Path(settings.out or saved.folder.parent.parent / saved.folder.name)
    parent = next(path for path in out.absolute().parents if os.path.exists(path))
    is_writable = os.path.isdir(parent) and os.access(parent, os.W_OK | os.X_OK)
    if out.name in ("", "..") or not is_writable:
        rule = "must be the name of folders that can be made"
        raise BadInput(f"--out {out} {rule}; {parent} is where they would be: choose another name")
    dtypes = dict.fromkeys(settings.dtype)
    targets = {dtype: out.with_name(f"{out.name}-{dtype}") for dtype in dtypes}
    for target in targets.values():
        hf_export.check_export_target(target, model)

    distributed.init_distributed()
    megatron_model.init_parallel(train, seed=1)
    gpt, layout, _ = megatron_model.load_model(model, train, config)
    if train.lora_rank:
        add_adapters(gpt, train, config, layout, seed=1)  # filled by what follows
    load_weights(gpt, config, layout, saved.folder / "model")
    weights = WeightPath(gpt, layout, config, frozenset(), BUCKET_BYTES)
    hf_export.export_all(weights, targets, source=model)
    if dist.get_rank() == 0:
        for dtype, target in targets.items():
            print(f"step {saved.step} in {dtype}: {target}", flush=True)


if __name__ == "__main__":
    exits.run_main(lambda: main(settings))
