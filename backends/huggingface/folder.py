"""A Hugging Face model folder: its tensors, read slice by slice, and whether its parts agree.

Reading needs no communication: every rank reads its own slices.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from backends.huggingface.config import generation_eos
from backends.huggingface.names import hf_shapes
from common.errors import BadInput, ProblemList, all_problems, check_file, read_json

INDEX = "model.safetensors.index.json"
READ_DTYPES = ("F64", "F32", "F16", "BF16")  # safetensors' names; the model rounds what it copies
SHOWN = 6  # of many problems of one kind
# An export copies these as they are. transformers keeps further chat templates in the folder.
EXPORTED_FILES = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates/*",
)
# SGLang's ModelConfig looks for these beside config.json.
QUANTIZED_BY = ("hf_quant_config.json", "quant_model_description.json")

# --- tensors ------------------------------------------------------------------------------------


class HFWeights:
    """The tensors of a folder of safetensors files, read slice by slice.

    Where there is a model.safetensors.index.json, its weight_map alone says which file holds a
    tensor. Without it each tensor must stand in one *.safetensors file.

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
        """Return rows (dim 0) or columns (dim 1) of a tensor; with dim None all of it."""
        view = self.file_of[name].get_slice(name)
        if dim is None:
            return view[:]
        return view[start:stop] if dim == 0 else view[:, start:stop]


def _open(file: Path):
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
        opened = _open(file)
        names = list(opened.keys())
        twice = [name for name in names if name in file_of]
        if twice:
            which = f"{file.name} and {path_of[twice[0]].name} both hold {len(twice)} tensors"
            fix = f"remove the older file, or add the {INDEX} that says which one counts"
            yield f"{folder}: {which}, such as {twice[0]}: {fix}"
        file_of |= dict.fromkeys(names, opened)
        path_of |= dict.fromkeys(names, file)
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
        names = [name for name, file in weight_map.items() if file == shard]
        more = f" and {len(names) - 1} more tensors" if len(names) > 1 else ""
        about = f"{path} names {shard!r} for {names[0]}{more}"
        if shard in ("", ".", "..") or set(shard) & set("/\\\0"):
            yield f"{about}: a shard must be the plain name of a file in this folder"
        elif not os.path.lexists(folder / shard):
            yield f"{about}, but there is no such file: copy it, or the whole folder, again"
        else:
            opened = _open(folder / shard)
            if absent := sorted(set(names) - set(opened.keys())):
                count = f"{len(absent)} such tensors: copy index and shards of one save"
                yield f"{path} says that {shard} holds {absent[0]}, but it does not; {count}"
            file_of |= dict.fromkeys(names, opened)
    return file_of


def check_shapes(weights: HFWeights, config: dict) -> None:
    """Raise BadInput listing tensors that do not fit config.json.

    Such a tensor is missing, has another shape or an unreadable dtype, or is not of this model.
    """
    expected = hf_shapes(config)
    shapes = {name: weights.shape(name) for name in weights.file_of}
    wrong = []
    for name, shape in expected.items():
        if name not in shapes:
            wrong.append(f"{name} is missing")
        elif shapes[name] != shape:
            wrong.append(f"{name} has shape {shapes[name]}, config.json implies {shape}")
    for name in shapes:
        if name not in expected and not _may_be_left_out(name, config):
            fault = "is not of the model that config.json describes, and would be lost"
            wrong.append(f"{name} {fault}")
    if wrong:
        raise BadInput(
            f"the weights in {weights.folder} do not fit its config.json:"
            f" {'; '.join(wrong[:SHOWN])}; {len(wrong)} problems in all"
        )
    dtypes = {name: weights.dtype(name) for name in expected}
    quantized = [f"{name} is {dtype}" for name, dtype in dtypes.items() if dtype not in READ_DTYPES]
    if quantized:
        fix = f"only {', '.join(READ_DTYPES)} are read: use the unquantized model"
        some = f"{'; '.join(quantized[:SHOWN])}; {len(quantized)} in all"
        raise BadInput(f"{weights.folder} holds quantized weights: {some}; {fix}")


def _may_be_left_out(name: str, config: dict) -> bool:
    """Tell whether a tensor is a tied head, a table of rope, or of multi-token prediction."""
    if name == "lm_head.weight" and config["tie_word_embeddings"]:
        return True
    if name.endswith("rotary_emb.inv_freq"):
        return True
    return is_of_mtp(name, config)


def is_of_mtp(name: str, config: dict) -> bool:
    """Tell whether a tensor is of a layer of multi-token prediction, after the model's own."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    beyond = int(layer[1]) - config["num_hidden_layers"] if layer else -1
    return 0 <= beyond < (config.get("num_nextn_predict_layers") or 0)


# --- the whole folder ---------------------------------------------------------------------------


@all_problems
def check_model_folder(
    folder: str | Path, config: dict | None, tokenizer, *, stop: tuple[str, ...]
) -> None:
    """Refuse a folder whose parts disagree: weights, config.json, tokenizer, end tokens.

    config, tokenizer: None where they could not be read. stop: --stop, which decides what ends a
    response where the files disagree.
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
        return  # slices of tensors that do not fit cannot be compared
    # Qwen3-0.6B has tied embeddings and stores the head too, equal to the embedding.
    if config["tie_word_embeddings"] and "lm_head.weight" in weights.file_of:
        if not _head_is_embedding(weights, config):
            yield (
                f"{folder}: tie_word_embeddings is true, but lm_head.weight is not the embedding"
                " and would be lost: set it to false in config.json"
            )
    yield from _end_token_problems(folder, config, tokenizer, stop)


def _head_is_embedding(weights: HFWeights, config: dict) -> bool:
    """Compare every 1009th row of the output layer with the embedding's."""
    rows = range(0, min(weights.shape("lm_head.weight")[0], config["vocab_size"]), 1009)
    for row in rows:
        head = weights.slice("lm_head.weight", 0, row, row + 1)
        embedding = weights.slice("model.embed_tokens.weight", 0, row, row + 1)
        if not torch.equal(head, embedding):
            return False
    return True


def _end_token_problems(
    folder: str | Path, config: dict, tokenizer, stop: tuple[str, ...]
) -> Iterator[str]:
    """Yield where the files of a folder disagree about the tokens that end a response."""
    config_eos = config.get("eos_token_id")
    config_eos = config_eos if isinstance(config_eos, list) else [config_eos]
    ids = [token for token in [*config_eos, *generation_eos(folder)] if token is not None]
    size = config["vocab_size"]
    unknown = [token for token in ids if type(token) is not int or not 0 <= token < size]
    if unknown:
        yield (
            f"{folder}: eos_token_id {unknown[0]!r} in config.json or generation_config.json is no"
            f" token of the model's {size}"
        )
        return
    if tokenizer is None or tokenizer.eos_token_id is None or not ids or stop:
        return  # nothing to compare, or --stop decides
    if tokenizer.eos_token_id not in ids:
        names = [
            f"{token} ({tokenizer.convert_ids_to_tokens(token)!r})" for token in sorted({*ids})
        ]
        yield (
            f"{folder}: responses end at token {', '.join(names)} by config.json and"
            f" generation_config.json, at {tokenizer.eos_token_id} ({tokenizer.eos_token!r}) by the"
            " tokenizer: name the right one by --stop"
        )


def files_to_export(folder: str | Path) -> list[Path]:
    """Return what an export copies from a model folder: files and broken links, no folders."""
    files = [file for pattern in EXPORTED_FILES for file in Path(folder).glob(pattern)]
    return sorted(file for file in files if not file.is_dir())
