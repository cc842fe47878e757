"""LoRA: adapters that learn beside frozen weights at every layout, merged on the way to the engine.

What must hold, and why it matters:
- logits of the model with adapters equal transformers' on the merged weights: what is trained is
  what the engine samples from, and what is exported;
- bytes handed over equal quantize(full merged tensor): the engine need not know of adapters;
- losses and gradient norms do not depend on the layout, not even of steps after a resume at another
  one: the gradient of an adapter that every rank holds whole is summed where it must be;
- nothing but adapters is trained, optimized, or in a checkpoint: that is what LoRA is for.

fp32, on models with 97 tokens. Not covered: Transformer Engine's layers; engines, which see nothing
of it but other weights.
"""

import json
import shutil
import sys

import loop_sync
import pytest
import torch
import transformers
from conftest import ROOT, SMALL_RUN, metrics_of, start_main, torchrun, write_more
from safetensors.torch import load_file

from backends.huggingface.config import read_config
from common.errors import BadInput
from harness import memory
from harness.lora_checks import check_lora_flags
from harness.model_checks import check_lora
from loop_sync import Settings
from common.settings import RunSettings, TrainSettings
from tools import export

FAMILIES = ("qwen3", "qwen2", "qwen3_moe", "glm4_moe")
MIXTURES = ("qwen3_moe", "glm4_moe")
RECOMPUTE = ("recompute_granularity=full", "recompute_method=uniform", "recompute_num_layers=1")
LAYOUTS = {  # ranks, [tp, ep, pp, cp], the layout whose checkpoint is loaded
    "one rank": (1, [1, 1, 1, 1], None),
    "recomputed": (1, [1, 1, 1, 1], None),
    "dp 2": (2, [1, 1, 1, 1], "one rank"),
    "tp 2": (2, [2, 1, 1, 1], "one rank"),
    "ep 2": (2, [1, 2, 1, 1], None),  # expert optimizer state needs the same --ep
    "tp 2 ep 2": (2, [2, 2, 1, 1], "ep 2"),
    "pp 2": (2, [1, 1, 2, 1], "one rank"),
    "cp 2": (2, [1, 1, 1, 2], "one rank"),
    "tp 2 pp 2": (4, [2, 1, 2, 1], "tp 2"),
    "dp 4 ep 2": (4, [1, 2, 1, 1], "ep 2"),  # each expert is on two ranks
    "pp 2 ep 2": (4, [1, 2, 2, 1], "ep 2"),
}
CASES = [
    (layout, family)
    for layout, (_, (_, ep, _, _), _) in LAYOUTS.items()
    for family in (MIXTURES if ep > 1 else FAMILIES)
]
QUICK = [("one rank", "qwen3"), ("one rank", "qwen3_moe"), ("tp 2", "qwen3"), ("tp 2", "qwen3_moe")]


@pytest.fixture(scope="module")
def reports(models, tmp_path_factory, request):
    """{layout: ({family: [each rank's report]}, folder)}. One start for each number of ranks."""
    chosen = CASES if request.config.getoption("--complete") else QUICK
    found = {}
    for ranks in (1, 2, 4):
        out, cases = tmp_path_factory.mktemp("lora"), {}
        for layout, (own_ranks, splits, checkpoint) in LAYOUTS.items():
            folders = {name: str(models[name]) for case, name in chosen if case == layout}
            if own_ranks != ranks or not folders:
                continue
            if checkpoint:
                checkpoint = str(found.get(checkpoint, (0, out / checkpoint))[1])
            megatron = RECOMPUTE if layout == "recomputed" else ()
            cases[layout] = dict(
                splits=splits, folders=folders, checkpoint=checkpoint, megatron=megatron
            )
        if cases:
            (out / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
            torchrun("tests/workers/lora.py", out, out / "cases.json", ranks=ranks, timeout=1200)
            measured = json.loads((out / "report.json").read_text(encoding="utf-8"))
            found |= {layout: (report, out / layout) for layout, report in measured.items()}
    return found


each_case = pytest.mark.parametrize(
    "layout, family",
    [pytest.param(*case, marks=() if case in QUICK else pytest.mark.complete) for case in CASES],
)


def close_to(rows: list[dict]) -> list[dict]:
    return [
        {name: pytest.approx(row[name], rel=2e-4, abs=1e-5) for name in ("loss", "grad_norm")}
        for row in rows
    ]


def losses(rows: list[dict]) -> list[dict]:
    return [{name: row[name] for name in ("loss", "grad_norm")} for row in rows]


@each_case
class TestEachLayout:
    def test_it_starts_as_the_model_that_it_was_given(self, reports, layout, family):
        errors = [rank["start"] for rank in reports[layout][0][family]]
        assert 0 < max(errors) < 1e-5

    def test_logits_with_adapters_equal_those_of_merged_weights(self, reports, layout, family):
        errors = [rank["merged"] for rank in reports[layout][0][family]]
        assert 0 < max(errors) < 1e-5

    def test_the_adapters_have_learned_something(self, reports, models, layout, family):
        merged = load_file(reports[layout][1] / family / "merged" / "model.safetensors")
        source = load_file(models[family] / "model.safetensors")
        adapted = {name for name in source if name.endswith("_proj.weight")}
        changed = {name for name in source if not torch.equal(source[name], merged[name])}
        assert changed == adapted

    def test_bytes_equal_quantized_merged_tensors(self, reports, layout, family):
        assert [rank["hand_off"] for rank in reports[layout][0][family]] == [[]] * ranks_of(layout)

    def test_all_other_weights_stay(self, reports, layout, family):
        assert [rank["changed"] for rank in reports[layout][0][family]] == [[]] * ranks_of(layout)

    def test_the_reference_is_the_model_without_adapters(self, reports, layout, family):
        errors = [rank["reference"] for rank in reports[layout][0][family]]
        assert 0 < max(errors) < 1e-5

    def test_steps_are_those_of_one_rank(self, reports, layout, family):
        expected = close_to(reports["one rank"][0][family][0]["steps"])
        for rank in reports[layout][0][family]:
            assert losses(rank["steps"]) == expected

    def test_a_run_resumed_from_another_layout_goes_on_alike(self, reports, layout, family):
        rank = reports[layout][0][family][0]
        if LAYOUTS[layout][2]:
            expected = close_to(reports["one rank"][0][family][0]["continued"])
            assert losses(rank["resumed"]) == expected
        else:
            assert "resumed" not in rank


def ranks_of(layout: str) -> int:
    return LAYOUTS[layout][0]


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_the_optimizer_holds_the_adapters_alone(reports, models, family):
    counted = memory.trained_parameters(read_config(models[family]), lora_rank=4)
    assert reports["one rank"][0][family][0]["optimizer"] == counted
    assert counted < memory.parameters(read_config(models[family]))[0] / 10


@pytest.mark.parametrize("layout", ["one rank", "tp 2"])
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_peft_loads_the_exported_adapters(reports, models, layout, family):
    """Also of experts, which transformers keeps in one tensor."""
    from peft import PeftModel

    folder, ids = reports[layout][1] / family, torch.arange(3, 40)[None]
    load = transformers.AutoModelForCausalLM.from_pretrained
    with torch.no_grad():
        merged = load(folder / "merged", dtype=torch.float32)(ids).logits
        base = load(models[family], dtype=torch.float32)
        plain = base(ids).logits
        adapted = PeftModel.from_pretrained(base, str(folder / "adapters"))(ids).logits
    assert (plain - merged).abs().max() > 0.1
    assert (adapted - merged).abs().max() < 1e-5


# --- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize("train, exports, message", [
    (dict(lora_rank=-1), (), "--lora-rank -1 must not be negative"),
    (dict(lora_rank=4, lora_alpha=0.0), (), "--lora-alpha 0.0 must be positive"),
    (dict(lora_rank=4, lora_alpha=float("nan")), (), "--lora-alpha nan must be positive"),
    (dict(lora_alpha=16.0), (), "--lora-alpha 16 has no effect without --lora-rank"),
    ({}, ("bf16", "lora"), "--export lora writes adapters, and there are none"),
    (dict(lora_rank=4, train_numerics="fp8"), (), "leave it out with --lora-rank"),
    (dict(lora_rank=4, freeze_moe_router=True), (), "--freeze-moe-router has no effect"),
    (dict(lora_rank=4, offload_reference=True), (), "--offload-reference has no effect"),
])  # fmt: skip
def test_flags_that_do_not_go_together_are_refused(train, exports, message):
    settings = Settings(run=RunSettings(export=exports), train=TrainSettings(**train))
    with pytest.raises(BadInput, match=message):
        check_lora_flags(settings)


@pytest.mark.parametrize("family, train, exports, message", [
    ("qwen3", dict(lora_rank=200), (), "adapters of .* parameters beside .* weights: use"),
    ("qwen3_moe", dict(megatron=("moe_grouped_gemm=true",)), (), "gemm=True does not go"),
    ("qwen3_moe", dict(megatron=("moe_aux_loss_coeff=0.1",)), (), "routers stay"),
    ("glm4_moe", {}, ("lora",), "loads the experts' alone, and says nothing: use"),
])  # fmt: skip
def test_what_a_model_does_not_allow_is_refused(models, family, train, exports, message):
    train = TrainSettings(**{"lora_rank": 4, **train})
    settings = Settings(run=RunSettings(export=exports), train=train)
    with pytest.raises(BadInput, match=message):
        check_lora(settings, read_config(models[family]))


def test_flags_are_checked_where_a_run_starts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "1")
    for words, message in (
        (["--lora-rank", "-1"], "--lora-rank -1 must not be negative"),
        (["--lora-rank", "4", "--eval-only"], "--lora-rank 4 has no effect with --eval-only"),
        (["--lora-rank", "900", "--plan"], "--lora-rank 900 makes adapters of"),
    ):
        monkeypatch.setattr(sys, "argv", ["loop_sync.py", *words])
        with pytest.raises(BadInput, match=message):
            start_main(loop_sync)


# --- whole runs -----------------------------------------------------------------------------------

LORA = ["--lora-rank", "8", "--lr", "2e-3"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of four steps with two checkpoints, that exports adapters and merged weights."""
    folder = tmp_path_factory.mktemp("run")
    write_more(folder)
    flags = ["--steps", "4", "--save-every", "2", "--name", "run", "--export", "bf16", "lora"]
    torchrun(ROOT / "loop_sync.py", *SMALL_RUN, *LORA, *flags, ranks=1, cwd=folder)
    return folder / "runs" / "run"


@pytest.mark.complete
def test_a_checkpoint_holds_less_than_a_quarter_of_the_models(run):
    whole = memory.checkpoint_bytes(
        memory.parameters(read_config(ROOT / "toy"))[0], train_dtype="bf16"
    )
    (folder,) = (run / "checkpoints").glob("step-000004/model")
    assert sum(file.stat().st_size for file in folder.iterdir()) < whole / 4


@pytest.mark.complete
@pytest.mark.parametrize("dtype, file", [
    ("bf16", "model.safetensors"), ("lora", "adapter_model.safetensors"),
])  # fmt: skip
def test_a_checkpoint_is_exported_as_the_run_did(run, tmp_path, dtype, file):
    flags = ["--checkpoint", run, "--out", tmp_path / "out", "--dtype", dtype, "--tp", "2"]
    torchrun(ROOT / "tools" / "export.py", *flags, ranks=2, cwd=run.parent.parent)
    ours, theirs = (
        load_file(tmp_path / f"out-{dtype}" / file),
        load_file(run / f"model-{dtype}" / file),
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.complete
def test_a_checkpoint_of_adapters_needs_its_own_model(run, models, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(BadInput, match="is not the model that .* was trained from"):
        export.main(export.ExportSettings(checkpoint=str(run), model=str(models["qwen3"])))


@pytest.mark.complete
def test_a_run_with_adapters_goes_on_and_is_evaluated_as_it_was(run, tmp_path):
    """Two of its four steps are made again, from the checkpoint, with changes alone sent."""
    shutil.copytree(run.parent.parent, tmp_path / "again")
    folder = tmp_path / "again"
    shutil.rmtree(folder / "runs" / "run" / "checkpoints" / "step-000004")
    flags = [*SMALL_RUN, *LORA, "--steps", "4", "--name", "run", "--resume"]
    more = ["--sync", "delta", "--check-sync"]
    torchrun(ROOT / "loop_sync.py", *flags, *more, ranks=1, cwd=folder)
    before, after = (metrics_of(run), metrics_of(folder / "runs" / "run"))
    measured = [[row.get(name) for row in rows] for rows in (before, after)
                for name in ("loss", "reward", "held_out")]  # fmt: skip
    assert measured[:3] == measured[3:]
    done = torchrun(ROOT / "loop_sync.py", *flags, "--eval-only", ranks=1, cwd=folder)
    assert f"{before[-1]['held_out']:.3f}" in done.stdout


@pytest.mark.complete
def test_the_asynchronous_loop_learns_by_adapters_too(tmp_path):
    """Every byte of the engine's weights is compared after each update; 25 steps learn much."""
    flags = [*LORA, "--steps", "25", "--check-sync", "--name", "run", "--export"]
    torchrun(ROOT / "loop_async.py", *flags, ranks=2, cwd=tmp_path)
    held_out = [
        row["held_out"] for row in metrics_of(tmp_path / "runs" / "run") if "held_out" in row
    ]
    assert held_out[0] < 0.45 and held_out[-1] > 0.75
