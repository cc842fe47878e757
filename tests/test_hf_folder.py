"""Model folders: which of their weight files count, and what an export leaves behind.

Why: a stale shard or a half-written export loads without an error and is another model. Here an
export is made of a folder's own tensors, without a trainer. test_engine.py and test_layouts.py
compare exports with the trainer. Not covered: file systems that lose what was written.
"""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import write_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from backends.huggingface.config import read_config
from backends.huggingface.folder import (
    INDEX,
    HFWeights,
    check_model_folder,
    check_shapes,
)
from common.errors import BadInput, ExportError
from harness import export as hf_export
from harness.export import export_all, export_hf


@pytest.fixture
def split(tmp_path, models):
    """Make a model in two shards with an index."""
    folder = tmp_path / "split"
    shutil.copytree(models["qwen3"], folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2])):
        shard = f"model-{i + 1:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    write_index(folder, weight_map)
    return folder


def write_index(folder, weight_map) -> None:
    (folder / INDEX).write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8"
    )


def weight_map_of(folder) -> dict:
    return json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]


def tensors_of(folder) -> dict[str, torch.Tensor]:
    weights = HFWeights(folder)
    return {name: weights.slice(name, None, 0, 0) for name in weights.file_of}


# --- reading ----------------------------------------------------------------------------------


def test_shards_of_an_older_save_beside_the_indexed_ones_do_not_count(split, models):
    right = load_file(models["qwen3"] / "model.safetensors")
    zeros = {name: torch.zeros_like(tensor) for name, tensor in right.items()}
    for stale in ("model.safetensors", "model-00003-of-00003.safetensors", "zzz.safetensors"):
        save_file(zeros, split / stale, metadata={"format": "pt"})
    read = tensors_of(split)
    assert read.keys() == right.keys()
    assert all(torch.equal(read[name], right[name]) for name in right)


def test_a_file_that_the_index_does_not_name_is_not_opened(split):
    (split / "broken.safetensors").write_bytes(b"no weights")
    assert len(HFWeights(split).file_of) == len(weight_map_of(split))


def test_a_tensor_that_the_index_does_not_name_is_not_there(split):
    weight_map = weight_map_of(split)
    del weight_map["model.norm.weight"]
    write_index(split, weight_map)
    assert "model.norm.weight" not in HFWeights(split).file_of
    with pytest.raises(BadInput, match="model.norm.weight is missing"):
        check_shapes(HFWeights(split), read_config(split))


@pytest.mark.parametrize("shard", [
    "../model.safetensors", "/model.safetensors", "..", ".", "", "sub/model.safetensors",
    "sub\\model.safetensors", "a\0b",
])  # fmt: skip
def test_a_shard_name_that_leaves_the_folder_is_refused(split, shard):
    shutil.copy(split / "model-00001-of-00002.safetensors", split.parent / "model.safetensors")
    write_index(split, weight_map_of(split) | {"model.norm.weight": shard})
    with pytest.raises(BadInput, match="plain name of a file") as refused:
        HFWeights(split)
    assert repr(shard) in str(refused.value)
    assert "model.norm.weight" in str(refused.value)


def test_a_missing_shard_is_refused_by_name(split):
    (split / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(BadInput, match="model-00002-of-00002.safetensors.*no such file"):
        HFWeights(split)


def test_a_tensor_that_its_shard_does_not_hold_is_refused_by_name(split):
    weight_map = weight_map_of(split)
    other = next(s for s in weight_map.values() if s != weight_map["model.norm.weight"])
    write_index(split, weight_map | {"model.norm.weight": other})
    with pytest.raises(BadInput, match="holds model.norm.weight, but it does not"):
        HFWeights(split)


@pytest.mark.parametrize("text", [
    "", "no json", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}',
    '{"weight_map": {"a": 1}}', "[" * 100_000, "\xff",
])  # fmt: skip
def test_an_index_that_is_none_is_refused(split, text):
    (split / INDEX).write_bytes(text.encode("latin-1"))
    with pytest.raises(BadInput, match=INDEX):
        HFWeights(split)


def test_an_index_that_is_a_link_to_nowhere_is_refused(split):
    (split / INDEX).unlink()
    (split / INDEX).symlink_to(split / "absent")
    with pytest.raises(BadInput, match=f"{INDEX} is a broken link"):
        HFWeights(split)


def test_without_an_index_a_tensor_in_two_files_is_refused_naming_both(tmp_path, models):
    shutil.copytree(models["qwen3"], tmp_path, dirs_exist_ok=True)
    save_file(
        {"model.norm.weight": torch.zeros(128)},
        tmp_path / "old.safetensors",
        metadata={"format": "pt"},
    )
    both = "old.safetensors and model.safetensors both hold 1 tensors, such as model.norm.weight"
    with pytest.raises(BadInput, match=both):
        HFWeights(tmp_path)


@pytest.mark.parametrize("name, tensor, message", [
    # Of a layer that the model does not have.
    ("model.layers.2.mlp.up_proj.weight", torch.zeros(512, 128),
     "model.layers.2.mlp.up_proj.weight is not of the model"),
    ("model.layers.0.self_attn.q_proj.bias", torch.zeros(256), "q_proj.bias is not of the model"),
    ("model.norm.weight", torch.zeros(128, dtype=torch.int8), "model.norm.weight is I8"),
    ("model.layers.0.mlp.up_proj.weight", torch.zeros(512, 128).to(torch.float8_e4m3fn),
     "up_proj.weight is F8_E4M3"),
])  # fmt: skip
def test_weights_that_would_be_lost_or_misread_are_refused(tmp_path, models, name, tensor, message):
    shutil.copytree(models["qwen3"], tmp_path, dirs_exist_ok=True)
    save_file(
        load_file(tmp_path / "model.safetensors") | {name: tensor},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(BadInput, match=message):
        check_model_folder(tmp_path, read_config(tmp_path), None, stop=())


def test_tables_of_rope_and_layers_of_multi_token_prediction_may_be_left_out(tmp_path):
    model = write_model(tmp_path, "glm4_moe")
    config = json.loads((model / "config.json").read_text(encoding="utf-8")) | {
        "num_nextn_predict_layers": 1
    }
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    more = {
        f"model.layers.{config['num_hidden_layers']}.eh_proj.weight": torch.zeros(1),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(1),
    }
    save_file(
        load_file(model / "model.safetensors") | more,
        model / "model.safetensors",
        metadata={"format": "pt"},
    )
    check_shapes(HFWeights(model), read_config(model))


@pytest.mark.parametrize("name", ["hf_quant_config.json", "quant_model_description.json"])
def test_a_file_by_which_the_engine_would_quantize_is_refused(tmp_path, models, name):
    shutil.copytree(models["qwen3"], tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_text("{}", encoding="utf-8")
    with pytest.raises(BadInput, match=f"has {name}"):
        check_model_folder(tmp_path, read_config(tmp_path), None, stop=())


def test_a_file_that_no_export_could_copy_is_refused_before_the_start(tmp_path, models):
    shutil.copytree(models["qwen3"], tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer.model").symlink_to(tmp_path / "absent")
    with pytest.raises(BadInput, match="tokenizer.model cannot be read"):
        check_model_folder(tmp_path, read_config(tmp_path), None, stop=())


# --- writing ----------------------------------------------------------------------------------


@pytest.fixture
def export(monkeypatch, tmp_path, models):
    """Give a function that exports a model folder's own weights.

    Its attribute `source` is a copy of the model that a test may change.
    """
    source = tmp_path / "source"
    shutil.copytree(models["qwen3"], source)
    weights = SimpleNamespace(config=read_config(source))

    untrained = set()

    def buckets(*_, **__):
        held = load_file(source / "model.safetensors")
        return ([pair] for pair in held.items() if pair[0] not in untrained)

    monkeypatch.setattr(hf_export.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(hf_export, "trainer_buckets", buckets)

    def call(target, *, max_file_bytes=2**30, dtype="bf16"):
        monkeypatch.setattr(hf_export, "MAX_FILE_BYTES", max_file_bytes)
        export_hf(weights, target, source=source, dtype=dtype)

    call.source, call.weights, call.buckets_without = source, weights, untrained.update
    return call


def assert_whole(folder, source) -> None:
    right = load_file(source / "model.safetensors")
    read = tensors_of(folder)
    assert read.keys() == right.keys()
    assert all(torch.equal(read[name], right[name].bfloat16()) for name in right)
    check_model_folder(folder, read_config(folder), None, stop=())


@pytest.mark.parametrize("before, after", [(50_000, 2**30), (2**30, 50_000), (50_000, 500_000)])
def test_an_export_over_one_that_was_split_otherwise_leaves_nothing_of_it(
    export, tmp_path, before, after
):
    target = tmp_path / "out"
    export(target, max_file_bytes=before)
    (target / "vocab.json").write_text("{}", encoding="utf-8")  # belongs to another tokenizer
    for file in target.glob("*.safetensors"):  # holds other weights
        with safe_open(file, "pt") as opened:
            zeros = {name: torch.zeros_like(opened.get_tensor(name)) for name in opened.keys()}
        save_file(zeros, file, metadata={"format": "pt"})
    (target / "00099.part").write_bytes(b"")
    export(target, max_file_bytes=after)
    assert_whole(target, export.source)
    named = (
        set(weight_map_of(target).values()) if (target / INDEX).exists() else {"model.safetensors"}
    )
    assert {file.name for file in target.glob("*.safetensors")} == named
    assert not list(target.glob("*.part")) and not (target / "vocab.json").exists()


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_layers_of_multi_token_prediction_are_copied_as_they_are(export, tmp_path, dtype):
    """Nothing trains them; speculation needs them. In an FP8 export they stay unquantized."""
    config = json.loads((export.source / "config.json").read_text(encoding="utf-8"))
    layer = f"model.layers.{config['num_hidden_layers']}"
    more = {
        f"{layer}.eh_proj.weight": torch.randn(128, 256),  # in fp32, of a model in BF16
        f"{layer}.mlp.experts.0.up_proj.weight": torch.randn(128, 128).bfloat16(),
    }
    held = load_file(export.source / "model.safetensors") | more
    save_file(held, export.source / "model.safetensors", metadata={"format": "pt"})
    changed = json.dumps(config | {"num_nextn_predict_layers": 1})
    (export.source / "config.json").write_text(changed, encoding="utf-8")
    export.weights.config["num_nextn_predict_layers"] = 1
    export.buckets_without(more)
    export(tmp_path / "out", dtype=dtype)
    written = tensors_of(tmp_path / "out")
    assert held.keys() <= written.keys()
    for name, tensor in more.items():
        assert written[name].dtype == tensor.dtype and torch.equal(written[name], tensor)
    if dtype == "fp8":
        config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
        kept = config["quantization_config"]["modules_to_not_convert"]
        assert {name.removesuffix(".weight") for name in more} <= set(kept)


def test_folders_named_like_tokenizer_files_do_not_end_an_export(export, tmp_path):
    for name in ("chat_templates", "tokenizer", "vocab.d"):
        (export.source / name).mkdir()
        (export.source / name / "file").write_text("x", encoding="utf-8")
    (export.source / "additional_chat_templates" / "deeper").mkdir(parents=True)
    template = "additional_chat_templates/tool_use.jinja"
    (export.source / template).write_text("{{ é }}", encoding="utf-8")
    out = tmp_path / "out"
    export(out)
    assert_whole(out, export.source)
    assert (out / template).read_text(encoding="utf-8") == "{{ é }}"
    assert [path.name for path in out.iterdir() if path.is_dir()] == ["additional_chat_templates"]
    files = {file.name for file in export.source.glob("tokenizer*") if file.is_file()}
    assert {file.name for file in out.glob("tokenizer*")} == files != set()


def test_a_file_that_cannot_be_copied_is_named_and_the_rest_is_whole(export, tmp_path):
    for name in ("tokenizer.model", "chat_template.jinja"):
        (export.source / name).unlink(missing_ok=True)
        (export.source / name).symlink_to(tmp_path / "absent")
    with pytest.raises(ExportError) as failed:
        export(tmp_path / "out")
    assert "tokenizer.model" in str(failed.value) and "chat_template.jinja" in str(failed.value)
    assert_whole(tmp_path / "out", export.source)
    assert (tmp_path / "out" / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    "given",
    [
        {"torch_dtype": "float32"},
        {"dtype": "float32"},
        {"torch_dtype": "float16", "dtype": "float16"},
        {},
    ],
)
def test_an_export_says_its_dtype_once(export, tmp_path, given):
    config = json.loads((export.source / "config.json").read_text(encoding="utf-8"))
    config.pop("dtype", None)
    (export.source / "config.json").write_text(
        json.dumps(config | given | {"quantization_config": None}), encoding="utf-8"
    )
    export(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert written["dtype"] == "bfloat16"
    assert "torch_dtype" not in written
    assert "quantization_config" not in written


@pytest.mark.parametrize("cut", ["_place_weights", "_copy_files"])
def test_an_export_that_is_cut_short_has_no_config(export, tmp_path, monkeypatch, cut):
    export(tmp_path / "out")
    stock = getattr(hf_export._Writer, cut)

    def killed(*arguments):
        stock(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(hf_export._Writer, cut, killed)
    with pytest.raises(KeyboardInterrupt):
        export(tmp_path / "out")
    with pytest.raises(BadInput, match="no config.json"):
        read_config(tmp_path / "out")


def test_a_failure_to_write_weights_leaves_the_older_export_whole(export, tmp_path, monkeypatch):
    export(tmp_path / "out")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf_export, "save_file", full)
    with pytest.raises(ExportError, match="No space left"):
        export(tmp_path / "out", max_file_bytes=50_000)
    assert_whole(tmp_path / "out", export.source)


def test_a_failure_in_one_export_leaves_the_others_whole(export, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ExportError, match="file/bf16") as failed:
        export_all(
            export.weights,
            {"bf16": tmp_path / "file" / "bf16", "fp8": tmp_path / "fp8"},
            source=export.source,
        )
    assert "fp8/" not in str(failed.value)
    assert read_quantization(tmp_path / "fp8") == "fp8"
    assert len(HFWeights(tmp_path / "fp8").file_of) > len(
        load_file(export.source / "model.safetensors")
    )


def read_quantization(folder) -> str:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"][
        "quant_method"
    ]


def test_an_export_never_overwrites_the_model_it_is_made_from(export, tmp_path):
    (tmp_path / "link").symlink_to(export.source)
    with pytest.raises(BadInput, match="would overwrite"):
        export(tmp_path / "link")
    assert (export.source / "model.safetensors").is_file()
