"""Hugging Face folders in and out: a Megatron model filled from safetensors files, and its weights
written as such files again.

Reading needs no communication: every rank reads its own slices. Writing gathers as the hand-off to
the engine does, bucket by bucket, and the first rank writes; no rank ever holds the whole model.
"""

import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from backends.huggingface.config import generation_eos
from backends.huggingface.names import hf_shapes, parameters_of, rule_of, split_stacked, stack_parts
from backends.megatron.layout import Layout
from common.errors import BadInput, ProblemList, all_problems, check_file, read_json

INDEX = "model.safetensors.index.json"
READ_DTYPES = ("F64", "F32", "F16", "BF16")  # safetensors' names; the model rounds what it copies
SHOWN = 6  # of many problems of one kind


class HFWeights:
    """The tensors of a folder of safetensors files, read slice by slice.

    Where there is model.safetensors.index.json, its weight_map says which file holds a tensor.
    Nothing else counts then. Without it each tensor must stand in one *.safetensors file.
    NaN and infinite weights are not looked for: that would read every byte on every rank.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        has_index = os.path.lexists(self.folder / INDEX)
        self.file_of = (_indexed_tensors if has_index else _tensors_of_all_files)(self.folder)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.file_of[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Return the dtype by its safetensors name, such as BF16 or F8_E4M3."""
        return self.file_of[name].get_slice(name).get_dtype()

    def slice(self, name: str, dim: int | None, start: int, stop: int) -> torch.Tensor:
        view = self.file_of[name].get_slice(name)
        return view[:] if dim is None else view[start:stop] if dim == 0 else view[:, start:stop]


def _opened(file: Path):
    check_file(file)
    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        raise BadInput(
            f"{file} is not a complete safetensors file ({error}): copy it again"
        ) from error


@all_problems
def _tensors_of_all_files(folder: Path) -> dict:
    """Return {tensor: its opened file} of a folder without an index."""
    files, file_of, path_of = sorted(folder.glob("*.safetensors")), {}, {}
    if not files:
        raise BadInput(
            f"{folder} has no *.safetensors file: weights in other formats are not read; save the"
            " model with safetensors"
        )
    for file in files:
        opened = _opened(file)
        twice = [name for name in opened.keys() if name in file_of]
        if twice:
            which = f"{file.name} and {path_of[twice[0]].name} both hold {len(twice)} tensors"
            fix = f"remove the older file, or add the {INDEX} that says which one counts"
            yield f"{folder}: {which}, such as {twice[0]}: {fix}"
        file_of.update((name, opened) for name in opened.keys())
        path_of.update((name, file) for name in opened.keys())
    return file_of


@all_problems
def _indexed_tensors(folder: Path) -> dict:
    """Return {tensor: its opened file} as the folder's index says."""
    path = folder / INDEX
    index = read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    is_map = isinstance(weight_map, dict) and len(weight_map) > 0
    if not is_map or not all(isinstance(name, str) for name in weight_map.values()):
        raise BadInput(f"{path} has no weight_map from tensor names to file names: copy it again")
    file_of = {}
    for shard in sorted(set(weight_map.values())):
        names = [name for name, where in weight_map.items() if where == shard]
        more = f" and {len(names) - 1} more tensors" * (len(names) > 1)
        about = f"{path} names {shard!r} for {names[0]}{more}"
        if shard in ("", ".", "..") or set(shard) & set("/\\\0"):
            yield f"{about}: a shard must be the plain name of a file in this folder"
        elif not os.path.lexists(folder / shard):
            yield f"{about}, but there is no such file: copy it, or the whole folder, again"
        else:
            opened = _opened(folder / shard)
            if absent := sorted(set(names) - set(opened.keys())):
                count = f"{len(absent)} such tensors: copy index and shards of one save"
                yield f"{path} says that {shard} holds {absent[0]}, but it does not; {count}"
            file_of.update(dict.fromkeys(names, opened))
    return file_of


def check_shapes(weights: HFWeights, config: dict) -> None:
    """Raise BadInput listing what of the tensors does not fit config.json.

    That is what is missing or too many, has another shape, or is of numbers that are not read.
    """
    implied = hf_shapes(config)
    shapes = {name: weights.shape(name) for name in weights.file_of}
    wrong = [f"{name} is missing" if name not in shapes else f"{name} has shape {shapes[name]}, config.json implies {shape}"
             for name, shape in implied.items() if shapes.get(name) != shape]  # fmt: skip
    wrong += [f"{name} is not of the model that config.json describes, and would be lost" for name in shapes
              if name not in implied and not _may_be_left_out(name, config)]  # fmt: skip
    if wrong:
        raise BadInput(
            f"the weights in {weights.folder} do not fit its config.json:"
            f" {'; '.join(wrong[:SHOWN])}; {len(wrong)} problems in all"
        )
    odd = [
        f"{name} is {dtype}"
        for name in implied
        if (dtype := weights.dtype(name)) not in READ_DTYPES
    ]
    if odd:
        fix = f"only {', '.join(READ_DTYPES)} are read: use the unquantized model"
        some = f"{'; '.join(odd[:SHOWN])}; {len(odd)} in all"
        raise BadInput(f"{weights.folder} holds quantized weights: {some}; {fix}")


def _may_be_left_out(name: str, config: dict) -> bool:
    """Whether a stored tensor is a tied head, a table of rope, or of multi-token prediction."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    after = int(layer[1]) - config["num_hidden_layers"] if layer else -1
    is_tied_head = name == "lm_head.weight" and config["tie_word_embeddings"]
    return (
        is_tied_head
        or name.endswith("rotary_emb.inv_freq")
        or 0 <= after < (config.get("num_nextn_predict_layers") or 0)
    )


@all_problems
def check_model_folder(
    folder: str | Path, config: dict | None, tokenizer, *, stop: tuple[str, ...]
) -> None:
    """Where the parts of a model folder disagree: weights and config.json; tied embeddings; the
    tokens that end a response.

    config, tokenizer: None where they could not be read. stop: --stop, which says what ends a
    response should the files disagree about it.
    """
    if config is None:
        return
    for name in QUANTIZED_BY:
        if os.path.lexists(Path(folder) / name):
            fix = "remove the file, or use the unquantized model"
            yield f"{folder} has {name}: the engine would quantize its own way by it; {fix}"
    for file in files_to_export(folder):
        if not os.path.isfile(file) or not os.access(file, os.R_OK):
            yield f"{file} cannot be read, and exports need a copy: copy it again, or remove it"
    weights, found = HFWeights(folder), ProblemList()
    found.collect(check_shapes, weights, config)
    yield from found.texts
    if found.texts:
        return  # slices of what is not there, or has another shape, cannot be compared
    if (
        config["tie_word_embeddings"] and "lm_head.weight" in weights.file_of
    ):  # Qwen3-0.6B has both, equal
        rows = range(0, min(weights.shape("lm_head.weight")[0], config["vocab_size"]), 1009)
        ours, theirs = (
            [weights.slice(name, 0, row, row + 1) for row in rows]
            for name in ("lm_head.weight", "model.embed_tokens.weight")
        )
        if not all(map(torch.equal, ours, theirs)):
            yield (
                f"{folder}: tie_word_embeddings is true, but lm_head.weight is not the embedding"
                " and would be lost: set it to false in config.json"
            )
    eos = config.get("eos_token_id")
    ids = [
        token
        for token in [*(eos if isinstance(eos, list) else [eos]), *generation_eos(folder)]
        if token is not None
    ]
    if odd := [
        token for token in ids if type(token) is not int or not 0 <= token < config["vocab_size"]
    ]:
        yield (
            f"{folder}: eos_token_id {odd[0]!r} in config.json or generation_config.json is no"
            f" token of the model's {config['vocab_size']}"
        )
    elif (
        tokenizer is not None
        and ids
        and tokenizer.eos_token_id is not None
        and tokenizer.eos_token_id not in ids
        and not stop
    ):
        theirs = ", ".join(
            f"{token} ({tokenizer.convert_ids_to_tokens(token)!r})" for token in sorted(set(ids))
        )
        ours = f"{tokenizer.eos_token_id} ({tokenizer.eos_token!r})"
        yield (
            f"{folder}: responses end at token {theirs} by config.json and generation_config.json,"
            f" at {ours} by the tokenizer: name the right one by --stop"
        )


@torch.no_grad()
def load_hf(model: torch.nn.Module, folder: str | Path, config: dict, *, layout: Layout) -> None:
    """Fill a GPTModel from a Hugging Face folder, each rank reading its own slices.

    Raises BadInput listing missing and misshapen tensors.
    """
    weights = HFWeights(folder)
    check_shapes(weights, config)
    for megatron_name, parameter in parameters_of(model):
        rule = rule_of(megatron_name, first_layer=layout.first_layer)
        if megatron_name == "output_layer.weight" and config["tie_word_embeddings"]:
            rule = rule_of("embedding.word_embeddings.weight")
        tp, group = layout.tp(rule), layout.group(rule)
        rank, names = group.rank() % tp, layout.names(rule, config)[group.rank() // tp]
        rows = [
            part.shape
            for part in split_stacked(
                parameter,
                len(rule.hf),
                head_dim=config["head_dim"],
                groups=config["num_key_value_heads"] // tp,
            )
        ]
        parts = []
        for name, shape in zip(names, rows):
            size = 0 if rule.tp_dim is None else shape[rule.tp_dim]
            stop = (
                0
                if rule.tp_dim is None
                else min((rank + 1) * size, weights.shape(name)[rule.tp_dim])
            )
            part = weights.slice(name, rule.tp_dim, rank * size, stop)
            padding = shape[0] - part.shape[0]  # rows that pad the vocabulary
            parts.append(torch.nn.functional.pad(part, (0, 0, 0, padding)) if padding else part)
        parameter.copy_(stack_parts(parts, groups=config["num_key_value_heads"] // tp))


# Copied as they are, with the folder in which transformers keeps further chat templates.
EXPORTED_FILES = (
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
    "vocab.*", "merges.txt", "chat_template*", "additional_chat_templates/*",
)  # fmt: skip
# SGLang's ModelConfig looks for these beside config.json.
QUANTIZED_BY = ("hf_quant_config.json", "quant_model_description.json")


def files_to_export(folder: str | Path) -> list[Path]:
    """Return what an export copies from a model folder: files and broken links, no folders."""
    return sorted(
        file
        for pattern in EXPORTED_FILES
        for file in Path(folder).glob(pattern)
        if not file.is_dir()
    )
