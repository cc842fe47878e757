"""plan.py and memory.py: a plan that is wrong sends someone to a cluster for nothing, or keeps them
from one that would do.

What is counted is compared with what is there: parameters with published totals, bytes of weights,
gradients and optimizer with those of real trainers on four ranks, activations with the tensors that
autograd saves, hand-off bytes with a real hand-off. Not covered: RUNTIME_BYTES, bandwidths, and
every GPU: activations there, what NCCL and the allocators take, SGLang's own share.
"""

import json
import contextlib
import math
import re
import shlex
import subprocess
import sys
from types import SimpleNamespace

import loop_async
import loop_sync
import pytest
import torch
import tyro
from conftest import ROOT, start_main, torchrun, write_model

from backends.huggingface.config import read_config
from backends.huggingface.names import hf_shapes, layer_shapes
from backends.megatron.batches import collate
from common.errors import BadInput
from common.settings import TrainSettings
from data.sample import Sample
from harness import memory, plan
import train_step
import weight_sync

CONFIGS = ROOT / "docs" / "configs"
sys.path.append(str(ROOT / "tests" / "workers"))
from held_bytes import CASES


@pytest.mark.parametrize("model, total, used, layers_of_mtp", [
    ("Qwen3-1.7B", 1.7, 1.7, 0),
    ("Qwen3-4B", 4.0, 4.0, 0),
    ("Qwen3-30B-A3B", 30.5, 3.3, 0),
    ("GLM-4.5-Air", 106, 12, 1),
    ("GLM-4.5", 355, 32, 1),
])  # fmt: skip
def test_published_numbers_of_parameters(model, total, used, layers_of_mtp):
    """Those of GLM-4.5 (arXiv 2508.06471, table 1) include the multi-token-prediction layer, which
    is not trained here, not embedding and output layer.
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
    assert [n / 1e9 for n in counted] == [
        pytest.approx(total, rel=0.02),
        pytest.approx(used, rel=0.05),
    ]


def test_a_layer_by_hand(models):
    """Qwen3, 128 wide, 4 heads and 2 key-value heads of 64, 512 in the middle."""
    config = read_config(models["qwen3"])
    shapes = layer_shapes(config, 0)
    assert shapes["self_attn.q_proj.weight"] == (256, 128) and shapes["mlp.down_proj.weight"] == (
        128,
        512,
    )
    whole = 2 * 256 * 128 + 2 * 128 * 128 + 3 * 128 * 512 + 2 * 128 + 2 * 64
    assert memory.layer_parameters(config, sparse=False, tp=1, ep=1) == (0, whole)
    assert memory.layer_parameters(config, sparse=False, tp=2, ep=1) == (
        0,
        (whole + 384) / 2,
    )  # norms are on every rank


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    folder = tmp_path_factory.mktemp("held")
    models = [
        str(write_model(folder / family, family, num_hidden_layers=4))
        for family in ("qwen3", "glm4_moe")
    ]
    torchrun(ROOT / "tests" / "workers" / "held_bytes.py", folder / "out.json", *models, ranks=4)
    return models, json.loads((folder / "out.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", CASES)
def test_trainers_hold_what_the_plan_says(held, case):
    folders, measured = held
    which, settings = CASES[case]
    settings = TrainSettings(**settings)
    split = dict(tp=settings.tp, pp=settings.pp, ep=settings.ep)
    element_bytes = {"bf16": 2, "fp32": 4}[settings.train_dtype]
    load = dict(
        element_bytes=element_bytes, tokens=1, microbatches=1, recompute=False, reference=False
    )
    counted = memory.trainer_bytes(read_config(folders[which]), ranks=4, **split, **load)
    fullest = max(measured[case], key=lambda rank: sum(rank.values()))
    assert fullest == {
        name: pytest.approx(counted[name], rel=0.002) for name in fullest
    }  # DDP pads its buffers


@pytest.mark.parametrize("family", ["qwen3", "llama", "glm4_moe"])
@pytest.mark.parametrize("recompute", [False, True])
def test_activations_are_those_that_autograd_saves(fresh_megatron, models, family, recompute):
    """In FP32, in which this CPU's attention computes: 200 tokens.

    What is left out, and is there, is the query-key-value matrix that a slice keeps alive.
    """
    full = (
        ("recompute_granularity=full", "recompute_method=uniform", "recompute_num_layers=1")
        if recompute
        else ()
    )
    config = read_config(models[family])
    trainer = train_step.build_trainer(
        str(models[family]),
        TrainSettings(train_dtype="fp32", megatron=full),
        config,
        steps=1,
        seed=1,
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
            alive.append(tensor)  # so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        trainer.ddp(batch.tokens_T[None], None, None, packed_seq_params=batch.packed)
    load = dict(element_bytes=4, tokens=200, microbatches=1, recompute=recompute, reference=False)
    counted = memory.trainer_bytes(config, ranks=1, tp=1, pp=1, ep=1, **load)["activations"]
    one_layer = max(memory.activation_bytes(config, sparse=sparse, tokens=200, tp=1, ep=1, element_bytes=4)
                    for sparse, layers in memory.layer_kinds(config).items() if layers)  # fmt: skip
    if (
        recompute
    ):  # the layers' inputs; the one layer that is computed again comes in the backward pass
        assert counted - one_layer == 2 * 200 * 128 * 4 <= sum(saved.values()) < one_layer
    else:
        assert sum(saved.values()) == pytest.approx(counted, rel=0.2) and counted > 1.5 * one_layer


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "glm4_moe"])
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_the_bytes_of_a_hand_off(fresh_megatron, models, family, dtype):
    config = read_config(models[family])
    trainer = train_step.build_trainer(
        str(models[family]), TrainSettings(), config, steps=1, seed=1
    )
    weights = weight_sync.WeightPath(
        trainer.gpt,
        trainer.layout,
        config,
        weight_sync.fp8_weights(config, rollout_dtype=dtype, engine_tp=1),
        10**6,
    )
    sent = sum(
        tensor.nbytes
        for bucket in weight_sync.buckets_of(weights, quantize=True)
        for _, tensor in bucket
    )
    assert sum(memory.hand_off_bytes(config, dtype=dtype).values()) == sent


def test_the_bytes_that_runs_of_the_toy_log():
    """sync_bytes of metrics.jsonl, and the size of a checkpoint's model folder, of a run at this
    layout.
    """
    config = read_config(ROOT / "toy")
    assert [
        sum(memory.hand_off_bytes(config, dtype=dtype).values()) for dtype in ("fp8", "bf16")
    ] == [1199648, 2379008]
    assert memory.checkpoint_bytes(
        memory.parameters(config)[0], train_dtype="bf16"
    ) == pytest.approx(8458045 + 8461199, rel=0.02)


def test_an_fp32_checkpoint_has_four_numbers_a_parameter():
    """The model's weights, main weights, and two moments; in BF16 the first has half the bytes."""
    assert memory.checkpoint_bytes(10, train_dtype="fp32") == 10 * 16
    assert memory.checkpoint_bytes(10, train_dtype="bf16") == 10 * 14


def test_a_block_that_is_begun_has_a_scale_too(tmp_path):
    """SmolLM2's proportions: 192 columns are two blocks, and 192 rows of q stay BF16."""
    sizes = dict(hidden_size=192, num_attention_heads=3, num_key_value_heads=1, head_dim=64)
    config = read_config(write_model(tmp_path, "llama", **sizes))
    fp8 = weight_sync.fp8_weights(config, rollout_dtype="fp8", engine_tp=1)
    sent = 0
    for name, shape in hf_shapes(config).items():
        scales = 4 * math.prod(-(-size // 128) for size in shape)
        sent += math.prod(shape) + scales if name in fp8 else 2 * math.prod(shape)
    assert "model.layers.0.self_attn.o_proj.weight" in fp8
    assert sum(memory.hand_off_bytes(config, dtype="fp8").values()) == sent


def test_a_tied_embedding_is_on_both_ends_of_a_pipeline(models):
    """qwen2, 2 layers at pp 2: the last stage holds a layer, the embedding once more, the norm."""
    config = read_config(models["qwen2"])
    load = dict(element_bytes=2, tokens=10, microbatches=1, recompute=False, reference=False)
    _, layer = memory.layer_parameters(config, sparse=False, tp=1, ep=1)
    one, two = (memory.trainer_bytes(config, ranks=2, tp=1, pp=pp, ep=1, **load) for pp in (1, 2))
    assert one["weights"] == 2 * (2 * layer + 97 * 128 + 128)
    assert two["weights"] == 2 * (layer + 97 * 128 + 128)


@pytest.mark.parametrize("microbatches, held", [(1, 1), (2, 2), (8, 2)])
def test_a_stage_holds_no_more_micro_batches_than_there_are(models, microbatches, held):
    """At pp 2 the first stage starts two before the first comes back, if there are two."""
    config = read_config(models["qwen3"])
    split = dict(ranks=2, tp=1, pp=2, ep=1, microbatches=microbatches)
    load = dict(element_bytes=2, tokens=10_000, recompute=False, reference=False)
    counted = memory.trainer_bytes(config, **split, **load)
    kept = memory.activation_bytes(config, sparse=False, tokens=10_000, tp=1, ep=1, element_bytes=2)
    assert counted["activations"] == held * kept


def test_a_token_of_the_cache_has_the_size_of_the_rollout_dtype():
    """The toy: 4 layers, a key and a value of 2 heads of 64 each."""
    config, sent = read_config(ROOT / "toy"), dict(experts=0, split=0, whole=0)
    for dtype, nbytes in (("fp32", 4), ("bf16", 2), ("fp8", 2)):
        token = memory.engine_bytes(config, sent, dtype=dtype, engine_tp=1)["token"]
        assert token == 4 * 2 * 2 * 64 * nbytes


def test_split_experts_see_the_tokens_of_all_their_ranks(models):
    """At tp 2, 2 experts a token: each keeps its input and output, 128 wide, of both ranks."""
    load = dict(sparse=True, tokens=100, tp=2, element_bytes=2)
    config = read_config(models["qwen3_moe"])
    split, whole = (memory.activation_bytes(config, ep=ep, **load) for ep in (1, 2))
    assert split - whole == 50 * 2 * 2 * (2 * 128)


def test_whole_experts_stay_fp8_where_split_ones_cannot():
    """1,536 rows over 8 ranks are 192, no multiple of 128: the experts of GLM-4.5 stay BF16, unless
    whole ones are spread over the ranks.
    """
    config = read_config(CONFIGS / "GLM-4.5")
    split, spread = (
        memory.hand_off_bytes(config, dtype="fp8", engine_tp=8, engine_ep=ep)["experts"]
        for ep in (1, 8)
    )
    assert split == 2 * 89 * 160 * 3 * 5120 * 1536 and spread == pytest.approx(split / 2, rel=0.001)


def settings_of(loop, *flags: str):
    return tyro.cli(loop.Settings, args=list(flags), config=(tyro.conf.OmitArgPrefixes,))


def test_peaks_by_hand():
    """State 20, activations and logits 10, engine weights 5, a longest sample of 1 in the cache,
    buckets of 1; half of what is free is the engine's.
    """
    sizes = {
        "state": 20e9,
        "activations": 7e9,
        "logits": 3e9,
        "engine": 5e9,
        "token": 1e6,
        "buckets": [9e9, 4e9],
    }
    layout, G = SimpleNamespace(static=0.5, longest=1000), plan.RUNTIME_BYTES
    layout.colocated = True
    assert plan.peaks(layout, sizes) == {
        "train": 30e9 + 2 * G,
        "hand-off": 34e9 + 2 * G,
        "generate": 32e9 + 2 * G,
    }
    layout.colocated = False
    assert plan.peaks(layout, sizes) == {
        "train": 30e9 + G,
        "hand-off": 29e9 + G,
        "generate": 12e9 + G,
        "receive": 8e9 + G,
    }


def planned(monkeypatch, capsys, loop, *flags: str) -> str:
    monkeypatch.setattr("sys.argv", ["loop.py", "--plan", *flags])
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with contextlib.suppress(SystemExit):  # raised once the plan is printed
        start_main(loop)
    return capsys.readouterr().out


TOO_LARGE = [
    (loop_sync, "Qwen3-4B", 1, 2, ""),
    (
        loop_sync,
        "Qwen3-30B-A3B",
        16,
        16,
        "--max-response-tokens 8192 --microbatch-tokens 9216",
    ),  # as many can do it: no more are asked for
    (
        loop_async,
        "GLM-4.5",
        128,
        256,
        (
            "--rollout-ranks 32 --tp 8 --pp 4 --ep 8 --engine-tp 8 --prompts-per-step 128"
            " --microbatch-tokens 9216"
        ),
    ),
]


@pytest.mark.parametrize("loop, model, gpus, enough, flags", TOO_LARGE)
def test_what_does_not_fit_is_refused_and_the_layout_named_instead_fits(
    monkeypatch, capsys, loop, model, gpus, enough, flags
):
    model = ["--model", str(CONFIGS / model)]
    with pytest.raises(
        BadInput, match="does not fit: .* the nearest layout that does: "
    ) as refused:
        planned(monkeypatch, capsys, loop, *model, "--plan-gpus", str(gpus), *flags.split())
    found, instead = re.search(r"that does: (\d+) GPUs with (.*)", str(refused.value)).groups()
    assert int(found) == enough
    rest = re.findall(
        r"(?:--prompts-per-step|--microbatch-tokens|--max-response-tokens) \d+", flags
    )
    assert planned(
        monkeypatch,
        capsys,
        loop,
        *model,
        "--plan-gpus",
        found,
        *" ".join(rest).split(),
        *instead.split(),
    ).endswith("fits\n")


@pytest.mark.parametrize("model, code", [("Qwen3-1.7B", 0), ("GLM-4.5", 2)])
def test_a_plan_is_a_command_without_torchrun(model, code, tmp_path):
    command = [
        sys.executable,
        ROOT / "loop_sync.py",
        "--plan",
        "--plan-gpus",
        "1",
        "--model",
        CONFIGS / model,
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path)
    assert (
        done.returncode == code
        and "Traceback" not in done.stderr
        and list(tmp_path.iterdir()) == []
    ), done.stderr
    assert "most at a time" in done.stdout and (
        "error: this layout does not fit" in done.stderr
    ) == (code == 2)


# --- the machine of a real start ----------------------------------------------------------------


def check(monkeypatch, tmp_path, *flags: str, **environment) -> str:
    """What check_machine says of the toy on one rank; "" if nothing."""
    monkeypatch.chdir(tmp_path)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    try:
        settings, load = (
            settings_of(loop_sync, *flags),
            dict(world_size=1, trainer_ranks=1, rollout_ranks=1, longest=20),
        )
        plan.check_machine(settings, read_config(ROOT / "toy"), **load)
    except BadInput as error:
        return str(error)
    return ""


def test_memory_of_the_machine_is_shared_by_its_ranks(monkeypatch, tmp_path):
    monkeypatch.setattr(plan.psutil, "virtual_memory", lambda: SimpleNamespace(available=4e9))
    assert check(monkeypatch, tmp_path) == "" == check(monkeypatch, tmp_path, LOCAL_WORLD_SIZE="3")
    text = check(monkeypatch, tmp_path, LOCAL_WORLD_SIZE="4")
    assert re.match(
        r"a rank needs about 1\.\d\d GB to train; this machine has free for each of its 4 ranks"
        r" 1\.00 GB",
        text,
    )


def test_room_on_the_disk(monkeypatch, tmp_path):
    """The toy's checkpoint takes 16.7 MB: with --keep 2 three are there for a moment; an export
    takes 2.4 MB.
    """
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: SimpleNamespace(free=40e6))
    assert (
        check(monkeypatch, tmp_path)
        == ""
        == check(monkeypatch, tmp_path, "--save-every", "1", "--keep", "1")
    )
    assert "will write 0.05 GB: 3 checkpoints" in check(monkeypatch, tmp_path, "--save-every", "1")
    assert check(monkeypatch, tmp_path, "--save-every", "40") == ""  # 80 steps: two
    assert "exports" in check(
        monkeypatch, tmp_path, "--save-every", "40", "--export", *["bf16"] * 4
    )


def test_a_run_folder_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "runs").write_text("a file", encoding="utf-8")
    assert f"because of {tmp_path / 'runs'}" in check(monkeypatch, tmp_path, "--name", "x")
    (tmp_path / "runs").unlink()
    assert check(monkeypatch, tmp_path, "--name", "x/y") == "" and not (tmp_path / "runs").exists()


# --- docs/recipes.md ----------------------------------------------------------------------------


def recipes() -> list[tuple[str, str]]:
    """(torchrun command, lines of its plan) of each recipe."""
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    return re.findall(r"```bash\n(torchrun.*?)```\n+```\n(.*?)```", page, re.DOTALL)


@pytest.mark.parametrize("command, lines", recipes())
def test_the_recipes_print_what_their_page_says(monkeypatch, capsys, command, lines):
    before, loop, flags = re.match(
        r"(.*?)(loop_a?sync)\.py(.*)", command.replace("\\\n", " "), re.DOTALL
    ).groups()
    nodes, ranks = (
        int((re.search(rf"--{name} (\d+)", before) or [0, 1])[1])
        for name in ("nnodes", "nproc-per-node")
    )
    flags = [
        str(CONFIGS / flag) if (CONFIGS / flag).is_dir() else flag for flag in shlex.split(flags)
    ]
    output = planned(
        monkeypatch,
        capsys,
        {"loop_sync": loop_sync, "loop_async": loop_async}[loop],
        "--plan-gpus",
        str(nodes * ranks),
        *flags,
    )
    assert (
        [line for line in lines.splitlines() if line not in output.splitlines()] == []
        and len(lines.splitlines()) > 4
        and output.endswith("fits\n")
    )


def test_there_are_recipes_from_one_gpu_to_many_nodes():
    assert len(recipes()) >= 6
