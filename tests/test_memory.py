"""The bytes that --plan adds up, compared with what is there.

Parameters are compared with published totals. The bytes of weights, gradients and optimizer are
compared with real trainers on four ranks, activations with the tensors that autograd saves, and the
bytes of a weight update with a real one. Why: a wrong count plans a cluster that is too small or
too large. Not covered: GPUs, whose kernels save other activations.
"""

import json
import math
import sys

import pytest
import torch

import train_step
import weight_sync
from backends.huggingface.config import read_config
from backends.huggingface.fp8 import fp8_weights
from backends.huggingface.names import hf_shapes, layer_shapes
from backends.megatron.batches import collate
from common.settings import TrainSettings
from conftest import ROOT, torchrun, write_model
from data.sample import Sample
from harness import memory

sys.path.append(str(ROOT / "tests" / "workers"))
from held_bytes import CASES

CONFIGS = ROOT / "docs" / "configs"


@pytest.mark.parametrize("model, total, used, layers_of_mtp", [
    ("Qwen3-1.7B", 1.7, 1.7, 0),
    ("Qwen3-4B", 4.0, 4.0, 0),
    ("Qwen3-30B-A3B", 30.5, 3.3, 0),
    ("GLM-4.5-Air", 106, 12, 1),
    ("GLM-4.5", 355, 32, 1),
])  # fmt: skip
def test_published_numbers_of_parameters(model, total, used, layers_of_mtp):
    """GLM-4.5's totals (arXiv 2508.06471, table 1) count other layers than ours.

    They include the multi-token-prediction layer, which is not trained here. They leave out the
    embedding and the output layer.
    """
    config = read_config(CONFIGS / model)
    counted = list(memory.parameters(config))
    assert counted[0] == sum(
        math.prod(shape)
        for name, shape in hf_shapes(config).items()
        if not name.endswith("e_score_correction_bias")
    )
    if layers_of_mtp:
        more = [
            sum(memory.layer_parameters(config, sparse=True, tp=1, ep=1, count=count))
            for count in ("held", "used")
        ]
        counted = [
            n + layer - 2 * memory.embedding_parameters(config) for n, layer in zip(counted, more)
        ]
    assert counted[0] / 1e9 == pytest.approx(total, rel=0.02)
    assert counted[1] / 1e9 == pytest.approx(used, rel=0.05)


def test_a_layer_by_hand(models):
    """Qwen3 with hidden size 128, 4 heads and 2 key-value heads of 64, 512 in the middle."""
    config = read_config(models["qwen3"])
    shapes = layer_shapes(config, 0)
    assert shapes["self_attn.q_proj.weight"] == (256, 128)
    assert shapes["mlp.down_proj.weight"] == (128, 512)
    whole = 2 * 256 * 128 + 2 * 128 * 128 + 3 * 128 * 512 + 2 * 128 + 2 * 64
    assert memory.layer_parameters(config, sparse=False, tp=1, ep=1) == (0, whole)
    # Every rank holds the norms whole.
    assert memory.layer_parameters(config, sparse=False, tp=2, ep=1) == (0, (whole + 384) / 2)


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    folder = tmp_path_factory.mktemp("held")
    models = [
        str(write_model(folder / family, family, num_hidden_layers=4))
        for family in ("qwen3", "glm4_moe")
    ]
    torchrun(ROOT / "tests" / "workers" / "held_bytes.py", folder / "out.json", *models, ranks=4)
    return models, json.loads((folder / "out.json").read_text(encoding="utf-8"))


@pytest.mark.complete
@pytest.mark.parametrize("case", CASES)
def test_trainers_hold_what_the_plan_says(held, case):
    folders, measured = held
    which, settings = CASES[case]
    settings = TrainSettings(**settings)
    split = dict(tp=settings.tp, pp=settings.pp, ep=settings.ep)
    element_bytes = {"bf16": 2, "fp32": 4}[settings.train_dtype]
    load = dict(
        element_bytes=element_bytes, tokens=1, microbatches=1, recompute=False, reference=None
    )
    load["lora_rank"] = settings.lora_rank
    counted = memory.trainer_bytes(read_config(folders[which]), ranks=4, **split, **load)
    fullest = max(measured[case], key=lambda rank: sum(rank.values()))
    # DDP pads its buffers, so the figures may differ by 0.2 %.
    assert fullest == {name: pytest.approx(counted[name], rel=0.002) for name in fullest}


@pytest.mark.parametrize("family", ["qwen3", "llama", "glm4_moe"])
@pytest.mark.parametrize("recompute", [False, True])
def test_activations_are_those_that_autograd_saves(fresh_megatron, models, family, recompute):
    """200 tokens in FP32, in which this CPU's attention computes.

    The count leaves out one tensor: the query-key-value matrix that a slice keeps alive.
    """
    full = ("recompute_granularity=full", "recompute_method=uniform", "recompute_num_layers=1")
    config = read_config(models[family])
    trainer = train_step.build_trainer(
        str(models[family]),
        TrainSettings(train_dtype="fp32", megatron=full if recompute else ()),
        config,
        steps=1,
        seed=1,
        temperature=1.0,
        max_response_tokens=8,
    )
    sample = Sample(
        [5] * 100,
        response_ids=[7] * 100,
        rollout_logprobs=[-1.0] * 100,
        loss_mask=[1] * 100,
        advantages=[1.0] * 100,
    )
    batch = collate([sample], [0], device=torch.device("cpu"))
    weights = {
        buffer.param_data.untyped_storage().data_ptr()
        for buffer in [*trainer.ddp.buffers, *trainer.ddp.expert_parallel_buffers]
    }
    saved, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # no other tensor may take its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        trainer.ddp(batch.tokens_T[None], None, None, packed_seq_params=batch.packed)
    load = dict(element_bytes=4, tokens=200, microbatches=1, recompute=recompute, reference=None)
    counted = memory.trainer_bytes(config, ranks=1, tp=1, pp=1, ep=1, **load)["activations"]
    of_layer = dict(tokens=200, tp=1, ep=1, element_bytes=4)
    kinds = [sparse for sparse, layers in memory.layer_kinds(config).items() if layers]
    one_layer = max(memory.activation_bytes(config, sparse=kind, **of_layer) for kind in kinds)
    if recompute:
        # Saved are the layers' inputs. The backward pass computes one layer again at a time.
        assert counted - one_layer == 2 * 200 * 128 * 4 <= sum(saved.values()) < one_layer
    else:
        assert sum(saved.values()) == pytest.approx(counted, rel=0.2)
        assert counted > 1.5 * one_layer


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "glm4_moe"])
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_the_bytes_of_a_hand_off(fresh_megatron, models, family, dtype):
    config = read_config(models[family])
    trainer = train_step.build_trainer(
        str(models[family]),
        TrainSettings(),
        config,
        steps=1,
        seed=1,
        temperature=1.0,
        max_response_tokens=8,
    )
    fp8 = fp8_weights(config, rollout_dtype=dtype, engine_tp=1)
    weights = weight_sync.WeightPath(trainer.gpt, trainer.layout, config, fp8, 10**6)
    sent = sum(
        tensor.nbytes
        for bucket in weight_sync.buckets_of(weights, quantize=True)
        for _, tensor in bucket
    )
    assert sum(memory.hand_off_bytes(config, dtype=dtype).values()) == sent


def test_the_bytes_that_runs_of_the_toy_log():
    """The figures are sync_bytes of metrics.jsonl and the bytes of a checkpoint's model folder."""
    config = read_config(ROOT / "toy")
    assert sum(memory.hand_off_bytes(config, dtype="fp8").values()) == 1199648
    assert sum(memory.hand_off_bytes(config, dtype="bf16").values()) == 2379008
    counted = memory.checkpoint_bytes(memory.parameters(config)[0], train_dtype="bf16")
    assert counted == pytest.approx(8458045 + 8461199, rel=0.02)


def test_an_fp32_checkpoint_has_four_numbers_a_parameter():
    """They are weights, main weights and two moments. In BF16 the first takes half the bytes."""
    assert memory.checkpoint_bytes(10, train_dtype="fp32") == 10 * 16
    assert memory.checkpoint_bytes(10, train_dtype="bf16") == 10 * 14


def test_a_block_that_is_begun_has_a_scale_too(tmp_path):
    """SmolLM2's proportions: 192 columns are two blocks, and the 192 rows of q stay BF16."""
    sizes = dict(hidden_size=192, num_attention_heads=3, num_key_value_heads=1, head_dim=64)
    config = read_config(write_model(tmp_path, "llama", **sizes))
    fp8 = fp8_weights(config, rollout_dtype="fp8", engine_tp=1)
    sent = 0
    for name, shape in hf_shapes(config).items():
        scales = 4 * math.prod(-(-size // 128) for size in shape)
        sent += math.prod(shape) + scales if name in fp8 else 2 * math.prod(shape)
    assert "model.layers.0.self_attn.o_proj.weight" in fp8
    assert sum(memory.hand_off_bytes(config, dtype="fp8").values()) == sent


def test_a_tied_embedding_is_on_both_ends_of_a_pipeline(models):
    """qwen2, 2 layers at pp 2: the last stage holds a layer, the norm and the embedding again."""
    config = read_config(models["qwen2"])
    load = dict(element_bytes=2, tokens=10, microbatches=1, recompute=False, reference=None)
    _, layer = memory.layer_parameters(config, sparse=False, tp=1, ep=1)
    one, two = (memory.trainer_bytes(config, ranks=2, tp=1, pp=pp, ep=1, **load) for pp in (1, 2))
    assert one["weights"] == 2 * (2 * layer + 97 * 128 + 128)
    assert two["weights"] == 2 * (layer + 97 * 128 + 128)


@pytest.mark.parametrize("microbatches, held", [(1, 1), (2, 2), (8, 2)])
def test_a_stage_holds_no_more_micro_batches_than_there_are(models, microbatches, held):
    """At pp 2 the first stage starts two micro-batches before the first comes back."""
    config = read_config(models["qwen3"])
    split = dict(ranks=2, tp=1, pp=2, ep=1, microbatches=microbatches)
    load = dict(element_bytes=2, tokens=10_000, recompute=False, reference=None)
    counted = memory.trainer_bytes(config, **split, **load)
    kept = memory.activation_bytes(config, sparse=False, tokens=10_000, tp=1, ep=1, element_bytes=2)
    assert counted["activations"] == held * kept


def test_a_token_of_the_cache_has_the_size_of_the_rollout_dtype():
    """The toy has 4 layers, each with a key and a value of 2 heads of 64."""
    config, sent = read_config(ROOT / "toy"), dict(experts=0, split=0, whole=0)
    for dtype, nbytes in (("fp32", 4), ("bf16", 2), ("fp8", 2)):
        token = memory.engine_bytes(config, sent, dtype=dtype, engine_tp=1)["token"]
        assert token == 4 * 2 * 2 * 64 * nbytes


def test_split_experts_see_the_tokens_of_all_their_ranks(models):
    """At tp 2 with 2 experts a token, each expert keeps input and output of both ranks' tokens."""
    load = dict(sparse=True, tokens=100, tp=2, element_bytes=2)
    config = read_config(models["qwen3_moe"])
    split, whole = (memory.activation_bytes(config, ep=ep, **load) for ep in (1, 2))
    assert split - whole == 50 * 2 * 2 * (2 * 128)


def test_whole_experts_stay_fp8_where_split_ones_cannot():
    """GLM-4.5's experts have 1,536 rows: 192 on each of 8 ranks, no multiple of 128.

    So they stay BF16, unless whole experts are spread over the ranks.
    """
    config = read_config(CONFIGS / "GLM-4.5")
    split, spread = (
        memory.hand_off_bytes(config, dtype="fp8", engine_tp=8, engine_ep=ep)["experts"]
        for ep in (1, 8)
    )
    assert split == 2 * 89 * 160 * 3 * 5120 * 1536
    assert spread == pytest.approx(split / 2, rel=0.001)
