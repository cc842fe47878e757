"""Hugging Face folders in and out: a Megatron model filled from safetensors files, and its weights written as such files again.

Reading needs no communication: every rank reads its own slices. Writing gathers as the hand-off to the engine does, bucket by bucket, and the first rank
writes; no rank ever holds the whole model.
"""

import json
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hf_config import generation_eos
from hf_names import fp8_config, hf_shapes, parameters_of, rule_of, split_stacked, stack_parts
from problems import BadInput, Problems, all_problems
from weight_sync import Layout, Weights, fp8_weights, quantize_named, trainer_buckets


class HFWeights:
    """The tensors of a folder of safetensors files, read slice by slice."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        files = sorted(self.folder.glob("*.safetensors"))
        if not files:
            raise BadInput(f"{folder} has no *.safetensors file: weights in other formats are not read; save the model with safetensors")
        self.file_of = {}
        for file in files:
            try:
                opened = safe_open(file, "pt")
            except SafetensorError as error:
                raise BadInput(f"{file} is not a complete safetensors file ({error}): copy it again") from error
            self.file_of.update((name, opened) for name in opened.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.file_of[name].get_slice(name).get_shape())

    def slice(self, name: str, dim: int | None, start: int, stop: int) -> torch.Tensor:
        view = self.file_of[name].get_slice(name)
        return view[:] if dim is None else view[start:stop] if dim == 0 else view[:, start:stop]


def check_shapes(weights: HFWeights, config: dict) -> None:
    """Raise BadInput listing the tensors that are missing, or have another shape than config.json implies."""
    shapes = {name: weights.shape(name) for name in weights.file_of}
    wrong = [f"{name} is missing" if name not in shapes else f"{name} has shape {shapes[name]}, config.json implies {shape}"
             for name, shape in hf_shapes(config).items() if shapes.get(name) != shape]  # fmt: skip
    if wrong:
        raise BadInput(f"the weights in {weights.folder} do not fit its config.json: {'; '.join(wrong[:6])}; {len(wrong)} problems in all")


@all_problems
def check_model_folder(folder: str | Path, config: dict | None, tokenizer, *, stop: tuple[str, ...]) -> None:
    """Where the parts of a model folder disagree: weights and config.json; tied embeddings; the tokens that end a response.

    config, tokenizer: None where they could not be read. stop: --stop, which says what ends a response should the files disagree about it.
    """
    if config is None:
        return
    weights, found = HFWeights(folder), Problems()
    found.of(check_shapes, weights, config)
    yield from found.found
    if config["tie_word_embeddings"] and "lm_head.weight" in weights.file_of:  # Qwen3-0.6B has both, equal
        rows = range(0, min(weights.shape("lm_head.weight")[0], config["vocab_size"]), 1009)
        ours, theirs = ([weights.slice(name, 0, row, row + 1) for row in rows] for name in ("lm_head.weight", "model.embed_tokens.weight"))
        if not all(map(torch.equal, ours, theirs)):
            yield f"{folder}: tie_word_embeddings is true, but lm_head.weight is not the embedding and would be lost: set it to false in config.json"
    eos = config.get("eos_token_id")
    ids = [token for token in [*(eos if isinstance(eos, list) else [eos]), *generation_eos(folder)] if token is not None]
    if odd := [token for token in ids if type(token) is not int or not 0 <= token < config["vocab_size"]]:
        yield f"{folder}: eos_token_id {odd[0]!r} in config.json or generation_config.json is no token of the model's {config['vocab_size']}"
    elif tokenizer is not None and ids and tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ids and not stop:
        theirs = ", ".join(f"{token} ({tokenizer.convert_ids_to_tokens(token)!r})" for token in sorted(set(ids)))
        ours = f"{tokenizer.eos_token_id} ({tokenizer.eos_token!r})"
        yield f"{folder}: responses end at token {theirs} by config.json and generation_config.json, at {ours} by the tokenizer: name the right one by --stop"


@torch.no_grad()
def load_hf(model: torch.nn.Module, folder: str | Path, config: dict, *, layout: Layout) -> None:
    """Fill a GPTModel from a Hugging Face folder, each rank reading its own slices. Raises BadInput listing missing and misshapen tensors."""
    weights = HFWeights(folder)
    check_shapes(weights, config)
    for megatron_name, parameter in parameters_of(model):
        rule = rule_of(megatron_name, first_layer=layout.first_layer)
        if megatron_name == "output_layer.weight" and config["tie_word_embeddings"]:
            rule = rule_of("embedding.word_embeddings.weight")
        tp, group = layout.tp(rule), layout.group(rule)
        rank, names = group.rank() % tp, layout.names(rule, config)[group.rank() // tp]
        rows = [part.shape for part in split_stacked(parameter, len(rule.hf), head_dim=config["head_dim"], groups=config["num_key_value_heads"] // tp)]
        parts = []
        for name, shape in zip(names, rows):
            size = 0 if rule.tp_dim is None else shape[rule.tp_dim]
            stop = 0 if rule.tp_dim is None else min((rank + 1) * size, weights.shape(name)[rule.tp_dim])
            part = weights.slice(name, rule.tp_dim, rank * size, stop)
            padding = shape[0] - part.shape[0]  # rows that pad the vocabulary
            parts.append(torch.nn.functional.pad(part, (0, 0, 0, padding)) if padding else part)
        parameter.copy_(stack_parts(parts, groups=config["num_key_value_heads"] // tp))


EXPORTED_FILES = ("generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*")
MAX_FILE_BYTES = 4 * 2**30


def export_hf(weights: Weights, target: Path, *, source: str | Path, dtype: str) -> None:
    """Write the weights as a Hugging Face folder that transformers (bf16) or SGLang (bf16, fp8) loads. Collective; the first rank writes.

    dtype: "bf16", or "fp8" for block-scaled e4m3 with quantization_config in config.json. Config, tokenizer and templates are copied from source.
    The weights of a model being written stand in files named *.part until all are there.
    """
    is_writer = dist.get_rank() == 0
    fp8 = fp8_weights(weights.config, rollout_dtype=dtype, engine_tp=1)
    if is_writer:
        target.mkdir(parents=True, exist_ok=True)
    files, pending, pending_bytes = [], {}, 0

    def flush():
        nonlocal pending, pending_bytes
        path = target / f"{len(files) + 1:05d}.part"
        save_file(pending, path, metadata={"format": "pt"})
        files.append((path, list(pending), pending_bytes))
        pending, pending_bytes = {}, 0

    for name, tensor in (pair for bucket in trainer_buckets(weights, quantize=False) for pair in bucket):
        if not is_writer:
            continue
        tensor = tensor if name.endswith("e_score_correction_bias") else tensor.to(torch.bfloat16)  # the router's choice is made in fp32
        for named, value in quantize_named(name, tensor) if name in fp8 else [(name, tensor)]:
            pending[named] = value.cpu().contiguous()
            pending_bytes += value.nbytes
        if pending_bytes > MAX_FILE_BYTES:
            flush()
    if not is_writer:
        return
    if pending:
        flush()
    index = {"metadata": {"total_size": sum(size for *_, size in files)}, "weight_map": {}}
    for i, (path, names, _) in enumerate(files):
        final = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" if len(files) > 1 else "model.safetensors"
        path.rename(target / final)
        index["weight_map"].update(dict.fromkeys(names, final))
    if len(files) > 1:
        (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    for pattern in EXPORTED_FILES:
        for file in Path(source).glob(pattern):
            shutil.copy(file, target / file.name)
    exported_config = json.loads((Path(source) / "config.json").read_text()) | {"dtype": "bfloat16"}
    if dtype == "fp8":
        exported_config["quantization_config"] = fp8_config(weights.config, engine_tp=1)
    (target / "config.json").write_text(json.dumps(exported_config, indent=2) + "\n")
