"""loop_sync.py as a user starts it: a whole run on two ranks, wrong input, a dying engine, Ctrl-C.

main() gets bad input in this process: the code path of a real start up to the first process group.
One real start shows the exit code. Not covered: learning to 0.9 (README.md shows a run), several
nodes, GPUs.
"""

import json
import math
import os
import re
import signal
import subprocess
import sys

from common import distributed
import loop_sync
import pytest
import torch
from conftest import ROOT, false_alarms, metrics_of, start_main, torchrun, write_model
from safetensors.torch import load_file, save_file
from test_answer import PLAIN, python

from backends.huggingface.config import read_config
from backends.huggingface.folder import HFWeights
from common import errors
from harness.run_folder import checkpoints_of
from toy.task import problems

QUICK = ["--steps", "2", "--eval-every", "2", "--eval-samples", "16"]
QUICK += ["--prompts-per-step", "4", "--samples-per-prompt", "4"]


# --- runs ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tp2(tmp_path_factory):
    """Two tensor-parallel ranks, FP8 rollouts, judges in processes of their own.

    The gate runs after every step.
    """
    folder = tmp_path_factory.mktemp("tp2")
    flags = ["--tp", "2", "--name", "a", "--check-sync", "--reward", "math"]
    flags += ["--export", "bf16", "fp8"]
    done = torchrun(ROOT / "loop_sync.py", *QUICK, *flags, ranks=2, cwd=folder)
    return done, folder / "runs" / "a"


def test_a_run_ends_with_its_result_and_where_it_is(tp2):
    last = tp2[0].stdout.splitlines()[-1]
    assert "held-out reward" in last
    assert "runs/a" in last


def test_the_metrics_of_a_run(tp2):
    start, *steps = metrics_of(tp2[1])
    assert start["step"] == 0
    assert 0 <= start["held_out"] <= 1
    assert [row["step"] for row in steps] == [1, 2]
    for row in steps:
        assert row["logprob_shift"] == 0.0
        assert row["ratio"] == 1.0
        assert row["staleness_max"] == 0
        assert row["staleness"] == [row["tokens"]]
        assert 0 < row["mismatch_abs"] < 0.1
        assert 0 <= row["reward"] <= 1
        assert row["grad_norm"] > 0
        assert all(math.isfinite(value) for value in row.values() if not isinstance(value, list))


def test_the_settings_and_samples_of_a_run(tp2):
    settings = json.loads((tp2[1] / "settings.json").read_text(encoding="utf-8"))
    assert settings["train"]["tp"] == 2
    assert settings["world_size"] == 2
    assert settings["versions"]["sglang"]
    sample = json.loads((tp2[1] / "samples.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert sample["prompt"] == next(problems(seed=0, held_out=True))["prompt"]


def test_every_metric_is_in_the_glossary(tp2):
    glossary = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert [key for row in metrics_of(tp2[1]) for key in row if f"`{key}`" not in glossary] == []


def test_both_exports_hold_the_trained_weights(tp2):
    bf16 = load_file(tp2[1] / "model-bf16" / "model.safetensors")
    fp8 = load_file(tp2[1] / "model-fp8" / "model.safetensors")
    toy = load_file(ROOT / "toy" / "model.safetensors")
    assert bf16.keys() == toy.keys()
    assert any(not torch.equal(bf16[name], toy[name]) for name in toy)
    assert set(fp8) - set(bf16) == {f"{name}_scale_inv" for name in bf16 if "_proj" in name}


def test_transformers_alone_loads_the_exported_folder(tp2):
    done = python("-c", PLAIN, tp2[1] / "model-bf16", "123+456=", cwd=tp2[1])
    assert re.fullmatch(r"123\+456=\d*\n", done.stdout), done.stderr


@pytest.mark.complete
def test_engines_that_have_room_take_the_prompts_of_a_step(tmp_path):
    """Each prompt is trained once, in the step of its number, and a restart goes on behind them."""
    flags = [*QUICK, "--deal", "room", "--save-rollouts", "--save-every", "2", "--name", "a"]
    torchrun(ROOT / "loop_sync.py", *flags, ranks=2, cwd=tmp_path)
    torchrun(ROOT / "loop_sync.py", *flags, "--steps", "3", "--resume", ranks=2, cwd=tmp_path)
    for step in (1, 2, 3):
        file = tmp_path / "runs" / "a" / "rollouts" / f"step-{step:06d}.jsonl"
        samples = list(map(json.loads, file.read_text(encoding="utf-8").splitlines()))
        trained = sorted((sample["group"], sample["index"]) for sample in samples)
        assert trained == [(g, i) for g in range(4 * step - 4, 4 * step) for i in range(4)]


@pytest.mark.complete
def test_with_learning_rate_zero_nothing_drifts(tmp_path):
    """Twenty hand-offs of unchanged weights move neither policy nor mismatch, in BF16 and FP8."""
    means = {}
    for dtype in ("bf16", "fp8"):
        flags = [*QUICK, "--steps", "20", "--prompts-per-step", "16", "--lr", "0", "--export"]
        flags += ["--rollout-dtype", dtype, "--name", dtype]
        torchrun(ROOT / "loop_sync.py", *flags, ranks=1, cwd=tmp_path)
        rows = metrics_of(tmp_path / "runs" / dtype)[1:]
        assert [row["lr"] for row in rows] == [0] * 20
        mismatches = [row["mismatch_abs"] for row in rows]
        early, late = sum(mismatches[:10]) / 10, sum(mismatches[10:]) / 10
        assert late == pytest.approx(early, rel=0.5)
        means[dtype] = (early + late) / 2
    assert means["bf16"] < means["fp8"]  # what FP8 costs


# --- bad input ----------------------------------------------------------------------------------


@pytest.fixture
def start(monkeypatch, tmp_path):
    """Call main() as torchrun would on one rank, and fail should anything be started."""

    def call(*arguments, ranks=1):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["loop_sync.py", *map(str, arguments)])
        for name, value in dict(RANK=0, WORLD_SIZE=ranks, LOCAL_RANK=0).items():
            monkeypatch.setenv(name, str(value))
        fail = lambda *_, **__: pytest.fail("a process group was started")  # noqa: E731
        monkeypatch.setattr(distributed, "init_distributed", fail)
        start_main(loop_sync)

    return call


@pytest.mark.parametrize("arguments, message", [
    (["--model", "no/such/folder"], "no/such/folder has no config.json"),
    (["--temperature", "0"], "must be above 0"),
    (["--prompts", "absent.jsonl"], "absent.jsonl does not exist"),
    (["--tp", "3"], "--tp 3 does not divide"),
    (["--prompts-per-step", "0"], "--prompts-per-step 0"),
    (["--max-response-tokens", "600"], "context, 512"),
    (["--stop", "nonsense"], "not one token"),
    (["--export", "int4"], "none of: bf16, fp8"),
    (["--steps", "0"], "--steps 0"),
    (["--megatron", "num_layer=3"], "nearest"),
    (["--overlong-buffer", "9"], "--overlong-buffer 9"),
    (["--dynamic-sampling", "-1"], "--dynamic-sampling -1"),
    (["--save-every", "-1"], "--save-every -1"),
    (["--resume"], "needs the --name"),
    (["--resume", "--name", "nothing"], "holds no checkpoint"),
])  # fmt: skip
def test_bad_flags_stop_before_anything_starts(start, arguments, message):
    with pytest.raises(errors.BadInput, match=message):
        start(*arguments)


def test_a_batch_that_does_not_divide(start):
    with pytest.raises(
        errors.BadInput, match="not divisible by the 2 engines: use a multiple of 2"
    ):
        start("--prompts-per-step", "5", ranks=2)


def test_a_used_run_name_is_refused(start, tmp_path):
    (tmp_path / "runs" / "old").mkdir(parents=True)
    (tmp_path / "runs" / "old" / "metrics.jsonl").write_text("{}\n", encoding="utf-8")
    with pytest.raises(errors.BadInput, match="already exists: choose another --name"):
        start("--name", "old")


def test_a_foreign_tokenizer_is_refused(start, tmp_path):
    with pytest.raises(errors.BadInput, match="do not belong together"):
        start("--model", write_model(tmp_path / "tiny", "qwen3", vocab_size=16))


@pytest.mark.parametrize("name, tensor, message", [
    ("model.norm.weight", None, "model.norm.weight is missing"),
    ("lm_head.weight", torch.zeros(8, 128), "has shape (8, 128), config.json implies (97, 128)"),
])  # fmt: skip
def test_weights_that_do_not_fit_the_config(fresh_megatron, tmp_path, name, tensor, message):
    """Found while the trainer loads them, before any engine starts."""
    folder = write_model(tmp_path, "qwen3")
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    if tensor is not None:
        weights[name] = tensor
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(errors.BadInput, match=re.escape(message)):
        loop_sync.train_step.build_trainer(
            str(folder),
            loop_sync.TrainSettings(),
            read_config(folder),
            steps=1,
            seed=1,
            temperature=1.0,
            max_response_tokens=8,
        )


def test_a_truncated_weights_file_is_named(tmp_path):
    folder = write_model(tmp_path, "qwen3")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(errors.BadInput, match="not a complete safetensors file"):
        HFWeights(folder)


def test_bad_input_is_exit_code_2_without_a_traceback(tmp_path):
    flags = ["--temperature", "-1"]
    done = torchrun(ROOT / "loop_sync.py", *flags, ranks=2, cwd=tmp_path, check=False)
    assert "error: --temperature -1.0 must be above 0" in done.stderr
    assert "exitcode  : 2" in done.stderr
    assert "Traceback" not in done.stderr.split("error:")[0]
    assert not (tmp_path / "runs").exists()


@pytest.mark.complete
def test_the_imports_need_no_home_that_can_be_written(tmp_path):
    """torch._dynamo makes its cache when transformers imports it."""
    flags = ["--plan", "--plan-gpus", "1", "--model", str(ROOT / "toy")]
    home = dict(HOME="/proc/nothing", TMPDIR=str(tmp_path))
    command = [sys.executable, str(ROOT / "loop_sync.py"), *flags]
    how = dict(env={**os.environ, **home}, capture_output=True, text=True, cwd=tmp_path)
    done = subprocess.run(command, **how)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / f"nanoslime-home-{os.getuid()}").is_dir()


# --- faults -------------------------------------------------------------------------------------


LONG = ["--eval-samples", "16", "--prompts-per-step", "4"]


def test_a_dying_engine_ends_the_run_with_its_error(start_loop):
    started = start_loop("loop_sync.py", *LONG, rows=4)
    before = started.metrics.read_text(encoding="utf-8")
    started.engine().kill()
    assert started.end(60) != 0
    assert "a process of the SGLang engine died" in started.text()
    rows = started.metrics.read_text(encoding="utf-8")
    assert rows.startswith(before)
    steps = [json.loads(line)["step"] for line in rows.splitlines()]
    assert steps == list(range(len(steps)))


@pytest.mark.complete
def test_an_engine_that_is_killed_while_it_starts_is_named_in_one_line(start_loop):
    started = start_loop("loop_sync.py", *LONG, rows=0)
    started.wait_for(lambda: len(started.engines()) == 2, 120)
    started.engines()[1].kill()
    assert started.end(60) != 0
    said = started.text()
    assert "rank 1: a process of the SGLang engine ended by SIGKILL while it started" in said
    assert "rank 0: a process" not in said
    assert "Scheduler" not in said
    assert said.count("Traceback") == 1  # torchrun's own


@pytest.mark.complete
@pytest.mark.parametrize("rank", [0, 1])
def test_killing_a_rank_ends_the_job_and_names_it(start_loop, rank):
    started = start_loop("loop_sync.py", *LONG, rows=3)
    opened = [file.path for process in started.family for file in process.open_files()]
    shared = {path for path in opened if "sglang_loads" in path}
    assert len(shared) == 2
    started.rank(rank).kill()
    assert started.end(60) != 0
    assert not any(map(os.path.exists, shared))
    assert (
        f"rank      : {rank} (local_rank: {rank})\n  exitcode  : -9"
        in started.text().split("Root Cause")[1]
    )


@pytest.mark.complete
def test_killing_torchrun_leaves_a_checkpoint_and_no_rank(start_loop):
    started = start_loop("loop_sync.py", *LONG, rows=3)
    started.process.kill()
    assert started.end(60) == -9  # end() also waits for the ranks and engines
    (saved,) = checkpoints_of(started.metrics.parent)
    assert saved.name == f"step-{metrics_of(started.metrics.parent)[-1]['step']:06d}"


@pytest.mark.complete
def test_ctrl_c_ends_every_process(start_loop):
    started = start_loop("loop_sync.py", *LONG, "--reward", "math", rows=4)
    os.killpg(started.process.pid, signal.SIGINT)
    assert started.end(60) != 0
    assert "interrupted by SIGINT" in started.text()
    assert false_alarms(started.whole_output()) == []
    assert all(metrics_of(started.metrics.parent))
