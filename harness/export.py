"""Write the trained weights as Hugging Face folders, or LoRA's adapters as PEFT's.

All ranks gather the weights bucket by bucket, as in a weight update. The first rank writes them.
"""

import contextlib
import json
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file

from backends.huggingface.folder import INDEX, HFWeights, files_to_export, is_of_mtp
from backends.huggingface.fp8 import fp8_weights
from backends.huggingface.names import Rule, fp8_config
from backends.megatron.lora import adapted_linears
from common.errors import BadInput, ExportError, read_json
from weight_sync import Shard, WeightPath, quantize_named, trainer_buckets

MAX_FILE_BYTES = 4 * 2**30  # a file is closed when it has grown beyond this


def check_export_target(target: Path, source: str | Path) -> None:
    """Raise BadInput if an export would overwrite its source, the model that was trained."""
    if os.path.realpath(target) == os.path.realpath(source):
        raise BadInput(f"the export would overwrite its own model, {source}: choose another folder")


def write_folders(run, weights: WeightPath) -> None:
    """Write the trained weights in each dtype of --export. Collective. run: harness.start.Run."""
    export_all(weights, run.record.exports(), source=run.model)


def export_all(weights: WeightPath, targets: dict[str, Path], *, source: str | Path) -> None:
    """Call export_hf for each {dtype: folder} of targets. Collective.

    A failure of one export does not stop the others. At the end the first rank raises one
    ExportError for all of them.
    """
    failures = []
    for dtype, target in targets.items():
        try:
            if dtype == "lora":
                export_adapters(weights, target, source=source)
            else:
                export_hf(weights, target, source=source, dtype=dtype)
        except ExportError as error:
            failures.append(str(error))
    if failures:
        raise ExportError("; ".join(failures))


def export_hf(weights: WeightPath, target: Path, *, source: str | Path, dtype: str) -> None:
    """Write the weights as a Hugging Face folder. Collective; the first rank writes.

    dtype: "bf16", which transformers and SGLang load, or "fp8", block-scaled e4m3 with a
    quantization_config in config.json, which SGLang loads. Config, tokenizer and templates are
    copied from source; so are layers of multi-token prediction, unchanged, as nothing trains them.

    Weights are written to files named *.part. These replace an older export in target only when all
    of them are complete. config.json is written last: a folder that has one is complete. If another
    file cannot be copied, the rest is written all the same. The first rank raises ExportError at
    the end if anything failed.
    """
    check_export_target(target, source)
    fp8 = fp8_weights(weights.config, rollout_dtype=dtype, engine_tp=1)
    writer = _Writer(Path(target)) if dist.get_rank() == 0 else None
    for bucket in trainer_buckets(weights, quantize=False):  # collective: all ranks go to its end
        if writer is None:
            continue
        for name, tensor in bucket:
            if not name.endswith("e_score_correction_bias"):  # the router chooses in fp32
                tensor = tensor.to(torch.bfloat16)
            pairs = quantize_named(name, tensor) if name in fp8 else [(name, tensor)]
            for written_name, value in pairs:
                writer.add(written_name, value)
    if writer is None:
        return
    untrained = []
    if weights.config.get("num_nextn_predict_layers"):
        held = HFWeights(source)
        untrained = [name for name in held.file_of if is_of_mtp(name, weights.config)]
    for name in untrained:
        writer.add(name, held.slice(name, None, 0, 0))
    config = read_json(Path(source) / "config.json")
    config.pop("torch_dtype", None)  # the older name of dtype
    config.pop("quantization_config", None)  # may be there, as null
    config["dtype"] = "bfloat16"
    if dtype == "fp8":
        config["quantization_config"] = fp8_config(weights.config, engine_tp=1)
        kept = config["quantization_config"]["modules_to_not_convert"]
        kept += sorted({name.rpartition(".")[0] for name in untrained})
    writer.finish(config, Path(source))


# --- LoRA ---------------------------------------------------------------------------------------


class AdapterPath(WeightPath):
    """The same path for the adapters alone, under the names that PEFT gives them."""

    def shards(self, *, quantize: bool):
        """Yield every adapter as a Shard; where Megatron's layers share an A, each gets a copy."""
        config, layout = self.config, self.layout
        for _, module, rule in adapted_linears(self.gpt, layout):
            parts = layout.split(module.lora_B.detach(), rule, config)
            for names, part in zip(zip(*layout.names(rule, config)), parts):
                for letter, tp_dim, local in (("A", 1, module.lora_A.detach()), ("B", 0, part)):
                    # Where each rank has experts of its own, they are gathered like parts.
                    is_part = rule.tp_dim == tp_dim or layout.spreads(rule)
                    dim = tp_dim if is_part else None
                    peft = [f"base_model.model.{name[:-7]}.lora_{letter}.weight" for name in names]
                    yield Shard(peft, local, Rule((), dim, rule.expert))


def export_adapters(weights: WeightPath, target: Path, *, source: str | Path) -> None:
    """Write LoRA's adapters as a folder that PEFT loads beside the model source. Collective.

    The first rank writes, and raises ExportError.
    """
    check_export_target(target, source)
    named = {}
    for bucket in trainer_buckets(AdapterPath(**vars(weights)), quantize=False):
        if dist.get_rank() == 0:
            # Copies: what Megatron stacks shares an A, and a file may not.
            named |= {name: tensor.cpu().clone() for name, tensor in bucket}
    if dist.get_rank() != 0:
        return
    rank = next(iter(named.values())).shape[0]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(source),
        "r": rank,
        "lora_alpha": weights.gpt.adapters.scale * rank,
        "target_modules": sorted({name.split(".")[-3] for name in named}),
        "bias": "none",
        "inference_mode": True,
    }
    try:
        target.mkdir(parents=True, exist_ok=True)
        part = target / "adapters.part"
        save_file(named, part, metadata={"format": "pt"})
        (target / "adapter_config.json").unlink(missing_ok=True)  # of an older export
        part.rename(target / "adapter_model.safetensors")
        _write_json(target / "adapter_config.json", config)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"the export {target} could not be written: {error}") from error


# --- the files ----------------------------------------------------------------------------------


class _Writer:
    """The folder of one export.

    After a failure it takes no more weights, so that the collective gathering can go on to its end.
    finish() raises the failure.
    """

    def __init__(self, target: Path):
        self.target = target
        self.files = []  # (path, names of its tensors, their bytes) of each file that is written
        self.pending, self.pending_bytes = {}, 0  # tensors of the next file
        self.failure: ExportError | None = None
        with self._note_failure():
            target.mkdir(parents=True, exist_ok=True)
            for part in target.glob("*.part"):  # left by an export that was killed
                part.unlink()

    @contextlib.contextmanager
    def _note_failure(self):
        """Keep an error of writing in self.failure instead of raising it."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            self.failure = ExportError(f"the export {self.target} could not be written: {error}")

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Add a tensor to the next file; write the file when it is full."""
        if self.failure is None:
            self.pending[name] = tensor.cpu().contiguous()
            self.pending_bytes += tensor.nbytes
            if self.pending_bytes > MAX_FILE_BYTES:
                self._flush()

    def _flush(self) -> None:
        """Write the pending tensors to a file named *.part."""
        path = self.target / f"{len(self.files) + 1:05d}.part"
        with self._note_failure():
            save_file(self.pending, path, metadata={"format": "pt"})
        self.files.append((path, list(self.pending), self.pending_bytes))
        self.pending, self.pending_bytes = {}, 0

    def finish(self, config: dict, source: Path) -> None:
        """Replace an older export by the new files. Raises ExportError."""
        if self.pending:
            self._flush()
        if self.failure is None:
            with self._note_failure():
                self._place_weights()
        if self.failure is not None:
            raise self.failure
        uncopied = self._copy_files(source)
        with self._note_failure():
            _write_json(self.target / "config.json", config)
        if self.failure is not None:
            raise self.failure
        if uncopied:
            rest = f"of {source} could not be copied: {'; '.join(uncopied)}"
            raise ExportError(f"the export {self.target} has its weights, but {rest}")

    def _place_weights(self) -> None:
        """Remove an older export, its config.json first, and give the new files their names."""
        stale = [self.target / "config.json", self.target / INDEX]
        stale += [*self.target.glob("model*.safetensors"), *files_to_export(self.target)]
        for path in stale:
            path.unlink(missing_ok=True)
        if len(self.files) == 1:
            path, _, _ = self.files[0]
            path.rename(self.target / "model.safetensors")
            return
        weight_map, total = {}, len(self.files)
        for i, (path, names, _) in enumerate(self.files, start=1):
            final = f"model-{i:05d}-of-{total:05d}.safetensors"
            path.rename(self.target / final)
            weight_map |= dict.fromkeys(names, final)
        total_bytes = sum(nbytes for _, _, nbytes in self.files)
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        _write_json(self.target / INDEX, index)

    def _copy_files(self, source: Path) -> list[str]:
        """Copy the files that belong to every export. Return those that could not be, and why."""
        uncopied = []
        for file in files_to_export(source):
            copy = self.target / file.relative_to(source)
            try:
                copy.parent.mkdir(exist_ok=True)
                # Without permissions: the next export must be able to overwrite a read-only file.
                shutil.copyfile(file, copy)
            except OSError as error:
                uncopied.append(f"{file.relative_to(source)} ({error})")
        return uncopied


def _write_json(path: Path, content: dict) -> None:
    """Write a JSON file so that it exists complete or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    part.rename(path)
