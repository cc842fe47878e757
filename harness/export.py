"""Trained weights -> Hugging Face folders.

Writing gathers as the hand-off does, bucket by bucket; the first rank writes.
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

from backends.huggingface.folder import INDEX, files_to_export
from backends.huggingface.names import fp8_config
from common.errors import BadInput, ExportError, read_json
from weight_sync import WeightPath, fp8_weights, quantize_named, trainer_buckets


MAX_FILE_BYTES = 4 * 2**30


def check_export_target(target: Path, source: str | Path) -> None:
    """Raise BadInput if an export would overwrite the model that it is made from."""
    if os.path.realpath(target) == os.path.realpath(source):
        raise BadInput(f"the export would overwrite its own model, {source}: choose another folder")


def write_folders(run, weights: WeightPath) -> None:
    """Write the trained weights in each dtype of --export. Collective. run: harness.Run."""
    export_all(weights, run.record.exports(), source=run.model)


def export_all(weights: WeightPath, targets: dict[str, Path], *, source: str | Path) -> None:
    """Call export_hf for each {dtype: folder}. Collective.

    A failure in one leaves the others whole; raises one ExportError at the end, on the first rank.
    """
    failures = []
    for dtype, target in targets.items():
        try:
            export_hf(weights, target, source=source, dtype=dtype)
        except ExportError as error:
            failures.append(str(error))
    if failures:
        raise ExportError("; ".join(failures))


def export_hf(weights: WeightPath, target: Path, *, source: str | Path, dtype: str) -> None:
    """Write the weights as a Hugging Face folder that transformers (bf16) or SGLang (bf16, fp8)
    loads. Collective; the first rank writes.

    dtype: "bf16", or "fp8" for block-scaled e4m3 with quantization_config in config.json. Config,
    tokenizer and templates are copied from source. The weights stand in files named *.part until
    all are there. Until then an older export in target stays whole. config.json comes last and
    marks a whole one. A file that cannot be copied does not keep the others from being written.
    Raises ExportError at the end, on the first rank.
    """
    check_export_target(target, source)
    fp8 = fp8_weights(weights.config, rollout_dtype=dtype, engine_tp=1)
    writer = _Writer(Path(target)) if dist.get_rank() == 0 else None
    for name, tensor in (
        pair for bucket in trainer_buckets(weights, quantize=False) for pair in bucket
    ):
        if writer is None:
            continue  # the walk is collective: every rank goes to its end
        tensor = (
            tensor if name.endswith("e_score_correction_bias") else tensor.to(torch.bfloat16)
        )  # the router's choice is made in fp32
        for named, value in quantize_named(name, tensor) if name in fp8 else [(name, tensor)]:
            writer.add(named, value)
    if writer is None:
        return
    config = read_json(Path(source) / "config.json")
    for field in ("torch_dtype", "quantization_config"):  # an older name of dtype; may be null
        config.pop(field, None)
    config["dtype"] = "bfloat16"
    if dtype == "fp8":
        config["quantization_config"] = fp8_config(weights.config, engine_tp=1)
    writer.finish(config, Path(source))


class _Writer:
    """The folder of one export.

    After a failure to write it takes no more weights, so that the other ranks' walk can end.
    finish() raises the failure.
    """

    def __init__(self, target: Path):
        self.target, self.files, self.failure = target, [], None
        self.pending, self.pending_bytes = {}, 0
        with self._failing():
            target.mkdir(parents=True, exist_ok=True)
            for part in target.glob("*.part"):  # of an export that was killed
                part.unlink()

    @contextlib.contextmanager
    def _failing(self):
        try:
            yield
        except (OSError, SafetensorError) as error:
            self.failure = ExportError(f"the export {self.target} could not be written: {error}")

    def add(self, name: str, tensor: torch.Tensor) -> None:
        if self.failure is None:
            self.pending[name] = tensor.cpu().contiguous()
            self.pending_bytes += tensor.nbytes
            if self.pending_bytes > MAX_FILE_BYTES:
                self._flush()

    def _flush(self) -> None:
        path = self.target / f"{len(self.files) + 1:05d}.part"
        with self._failing():
            save_file(self.pending, path, metadata={"format": "pt"})
        self.files.append((path, list(self.pending), self.pending_bytes))
        self.pending, self.pending_bytes = {}, 0

    def finish(self, config: dict, source: Path) -> None:
        """Put the new files in place of an older export's. Raises ExportError."""
        if self.pending:
            self._flush()
        if self.failure is None:
            with self._failing():
                self._place_weights()
        if self.failure is not None:
            raise self.failure
        uncopied = self._copy_files(source)
        with self._failing():
            _write_json(self.target / "config.json", config)
        if self.failure is not None:
            raise self.failure
        if uncopied:
            rest = f"of {source} could not be copied: {'; '.join(uncopied)}"
            raise ExportError(f"the export {self.target} has its weights, but {rest}")

    def _place_weights(self) -> None:
        """Remove what an older export left, its config.json first; name the new files."""
        stale = [self.target / "config.json", self.target / INDEX]
        stale += [*self.target.glob("model*.safetensors"), *files_to_export(self.target)]
        for path in stale:
            path.unlink(missing_ok=True)
        index = {"metadata": {"total_size": sum(size for *_, size in self.files)}, "weight_map": {}}
        for i, (path, names, _) in enumerate(self.files):
            final = (
                f"model-{i + 1:05d}-of-{len(self.files):05d}.safetensors"
                if len(self.files) > 1
                else "model.safetensors"
            )
            path.rename(self.target / final)
            index["weight_map"].update(dict.fromkeys(names, final))
        if len(self.files) > 1:
            _write_json(self.target / INDEX, index)

    def _copy_files(self, source: Path) -> list[str]:
        """Copy what belongs to every export; return what could not be copied, and why."""
        uncopied = []
        for file in files_to_export(source):
            copy = self.target / file.relative_to(source)
            try:
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)  # without permissions: the next export overwrites it
            except OSError as error:
                uncopied.append(f"{file.relative_to(source)} ({error})")
        return uncopied


def _write_json(path: Path, content: dict) -> None:
    """Write a file that is there whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    part.rename(path)
