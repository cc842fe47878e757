"""--plan and the check of the machine: what fits, the nearest layout that does, the recipes.

Why: a wrong plan sends someone to a cluster for nothing, or keeps them from one that would do. The
bytes that a plan adds up are compared with real ones in test_memory.py. Not covered: RUNTIME_BYTES,
bandwidths, and what NCCL, the allocators and SGLang take on a GPU.
"""

import re
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest
import tyro

import loop_async
import loop_sync
from backends.huggingface.config import read_config
from common.errors import BadInput
from conftest import ROOT, start_main
from harness import layouts, plan
from harness.flags import parse_settings

CONFIGS = ROOT / "docs" / "configs"


def settings_of(loop, *flags: str):
    return tyro.cli(loop.Settings, args=list(flags), config=(tyro.conf.OmitArgPrefixes,))


def test_peaks_by_hand():
    """State 20, activations and logits 10, engine weights 5, a bucket 1, in GB.

    The longest sample takes 1 in the cache. Half of what is free is the engine's.
    """
    parts = dict(weights=8e9, gradients=6e9, optimizer=4e9, reference=2e9)
    parts |= dict(activations=7e9, logits=3e9)
    trainer = layouts.TrainerSizes(parts, dp=1, microbatch_tokens=1)
    engine = layouts.EngineSizes(
        weights=5e9, token_bytes=1e6, requests=1, sent={}, bucket_bytes=1e9
    )
    rollout, G = SimpleNamespace(engine_tp=1), layouts.RUNTIME_BYTES
    layout = SimpleNamespace(mem_fraction=0.5, longest=1000, rollout=rollout, colocated=True)
    assert layouts.peaks(layout, trainer, engine) == {
        "train": 30e9 + 2 * G,
        "hand-off": 34e9 + 2 * G,
        "generate": 32e9 + 2 * G,
    }
    layout.colocated = False
    assert layouts.peaks(layout, trainer, engine) == {
        "train": 30e9 + G,
        "hand-off": 29e9 + G,
        "generate": 12e9 + G,
        "receive": 8e9 + G,
    }
    # Three more ranks of the engine read from the first one's memory.
    rollout.engine_tp, readers = 4, 3 * layouts.CONTEXT_BYTES
    assert layouts.peaks(layout, trainer, engine) == {
        "train": 30e9 + G,
        "hand-off": 29e9 + G,
        "generate": 12e9 + G + readers,
        "receive": 8e9 + G + readers,
    }


def planned(monkeypatch, capsys, loop, *flags: str) -> str:
    monkeypatch.setattr("sys.argv", ["loop.py", "--plan", *flags])
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    start_main(loop)
    return capsys.readouterr().out


TOO_LARGE = [
    (loop_sync, "Qwen3-4B", 1, 2, ""),
    # 16 GPUs can do it in another layout, so the plan asks for no more.
    (
        loop_sync,
        "Qwen3-30B-A3B",
        16,
        16,
        "--max-response-tokens 8192 --microbatch-tokens 9216",
    ),
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


def test_what_delta_keeps_is_planned(monkeypatch, capsys):
    """Qwen3-4B in FP8, 4.41 GB, over two tensor-parallel ranks."""
    model = ["--model", str(ROOT / "docs" / "configs" / "Qwen3-4B"), "--tp", "2"]
    assert "host memory" not in planned(monkeypatch, capsys, loop_sync, *model)
    shown = planned(monkeypatch, capsys, loop_sync, *model, "--sync", "delta")
    assert "  host memory                       2.21 GB" in shown


def test_and_counted_in_the_memory_of_a_machine_without_a_gpu(monkeypatch):
    peaks, sent = {}, 0
    for sync in ("full", "delta"):
        monkeypatch.setattr("sys.argv", ["loop.py", "--sync", sync])
        settings = parse_settings(loop_sync.Settings)
        ranks = dict(world_size=1, trainer_ranks=1, rollout_ranks=1)
        load = plan.plan_of(settings, read_config(ROOT / "toy"), **ranks, longest=20)
        trainer, engine = layouts.trainer_sizes(load), layouts.engine_sizes(load)
        peaks[sync] = plan._peaks_without_gpu(load, trainer, engine)["train"]
        sent = sum(engine.sent.values())
    assert peaks["delta"] - peaks["full"] == sent > 1e6


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
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == [], done.stderr
    assert "most at a time" in done.stdout
    assert ("error: this layout does not fit" in done.stderr) == (code == 2)


# --- the machine of a real start ----------------------------------------------------------------


def check(monkeypatch, tmp_path, *flags: str, **environment) -> str:
    """Return what check_machine says of the toy on one rank, "" if nothing."""
    monkeypatch.chdir(tmp_path)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    try:
        settings = settings_of(loop_sync, *flags)
        load = dict(world_size=1, trainer_ranks=1, rollout_ranks=1, longest=20)
        plan.check_machine(settings, read_config(ROOT / "toy"), **load)
    except BadInput as error:
        return str(error)
    return ""


def test_memory_of_the_machine_is_shared_by_its_ranks(monkeypatch, tmp_path):
    monkeypatch.setattr(plan.psutil, "virtual_memory", lambda: SimpleNamespace(available=4e9))
    assert check(monkeypatch, tmp_path) == ""
    assert check(monkeypatch, tmp_path, LOCAL_WORLD_SIZE="3") == ""
    text = check(monkeypatch, tmp_path, LOCAL_WORLD_SIZE="4")
    assert re.match(r"a rank needs about 1\.\d\d GB to train; this machine has free", text)
    assert "for each of its 4 ranks 1.00 GB" in text


def test_room_on_the_disk(monkeypatch, tmp_path):
    """The toy's checkpoint takes 16.7 MB, an export 2.4 MB.

    With --keep 2 there are three checkpoints for a moment.
    """
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: SimpleNamespace(free=40e6))
    assert check(monkeypatch, tmp_path) == ""
    assert check(monkeypatch, tmp_path, "--save-every", "1", "--keep", "1") == ""
    assert "will write 0.05 GB: 3 checkpoints" in check(monkeypatch, tmp_path, "--save-every", "1")
    # 80 steps have two checkpoints. Four exports beside them are too much.
    seldom = ["--save-every", "40"]
    assert check(monkeypatch, tmp_path, *seldom) == ""
    assert "exports" in check(monkeypatch, tmp_path, *seldom, "--export", *["bf16"] * 4)


def test_a_run_folder_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "runs").write_text("a file", encoding="utf-8")
    assert f"because of {tmp_path / 'runs'}" in check(monkeypatch, tmp_path, "--name", "x")
    (tmp_path / "runs").unlink()
    assert check(monkeypatch, tmp_path, "--name", "x/y") == ""
    assert not (tmp_path / "runs").exists()


# --- docs/recipes.md ----------------------------------------------------------------------------


def recipes() -> list[tuple[str, str]]:
    """Return (torchrun command, lines of its plan) of each recipe."""
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
    assert [line for line in lines.splitlines() if line not in output.splitlines()] == []
    assert len(lines.splitlines()) > 4
    assert output.endswith("fits\n")


def test_there_are_recipes_from_one_gpu_to_many_nodes():
    assert len(recipes()) >= 6
