"""Every command in README.md and docs/, as a reader would paste it.

What fits this machine runs for real, made short by a few flags behind it. What needs files of the
reader's own gets some; docs/pretrained.md, with smollm2, is in test_pretrained.py. Commands for
several machines are planned instead (test_plan.py compares the recipes' plans with their printed
figures). The install lines are what .ci/run runs. Commands of
bench/ run with fewer steps, rounds and seeds: what they measure then says nothing. Not run: TRL's
side of bench/peers.py, which installs 3 GB.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys

from common import distributed
import loop_async
import loop_sync
import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT, metrics_of, start_main, torchrun

from tools import plot
from test_prompts import gym  # noqa: F401  the stand-in for reasoning-gym
from test_readme import TEXT


def commands_of(page: str) -> list[str]:
    """The commands of a page's ```bash blocks, each on one line."""
    blocks = "".join(re.findall(r"```bash\n(.*?)```", page, re.DOTALL))
    lines = blocks.replace("\\\n", " ").splitlines()
    return [" ".join(line.partition("  #")[0].split()) for line in lines]


LINES = list(dict.fromkeys(line for page in TEXT.values() for line in commands_of(page)))
INLINE = {
    " ".join(command.split())
    for page in TEXT.values()
    for command in re.findall(r"`((?:torchrun|python) [^`]*)`", page)
}
SHORT = [
    "--steps",
    "1",
    "--eval-samples",
    "2",
    "--prompts-per-step",
    "4",
    "--samples-per-prompt",
    "2",
    "--export",
]
HERE = [
    line
    for line in LINES
    if line.startswith("torchrun")
    and not re.search("FOLDER|FILE|nnodes|nproc-per-node 8|smollm2", line)
]
ELSEWHERE = [
    line
    for line in LINES
    if line.startswith("torchrun") and line not in HERE and "smollm2" not in line
]
LESSON = "torchrun loop_sync.py --steps 1 --save-rollouts --name lesson"
EXPORT = "python tools/export.py --checkpoint runs/NAME --dtype bf16 fp8"
ANSWER = 'python examples/answer.py runs/NAME/model-bf16 "123+456="'
CURVE = "python tools/plot.py runs/one-rank --out docs/curve.png"
TESTED_ELSEWHERE = {
    "python -m pytest",  # .ci/run
    "python -m pytest --complete",  # .ci/run
    "python tests/gpu/make_dump.py",  # it would write what the tests of GPUs compare with
    "python loop_sync.py",  # test_flags.py
    "python loop_sync.py --help",  # test_flags.py
    "torchrun loop_sync.py",  # of the install line: .ci/run, and all that HERE runs
    "torchrun loop_sync.py --model toy/glm",  # test_glm_toy.py
    "torchrun --nproc-per-node N",  # HERE
    "torchrun --nproc-per-node 2 examples/tool_use_async.py",  # test_tool_use.py
    "torchrun loop_sync.py --name teacher",  # test_distill.py, as the two that follow
    "torchrun examples/distill.py --teacher runs/teacher/model-bf16",
    "torchrun --nproc-per-node 2 examples/distill_async.py --teacher FOLDER",
    "torchrun --max-restarts N",  # test_process_groups.py, and test_comes_back.py:
    "torchrun --max-restarts 3 loop_sync.py --name x --save-every 10 --resume auto",
}


def test_nothing_is_left_out():
    kinds = (
        "python3 -m venv .venv",
        "torchrun",
        "python tools/plot.py",
        "python loop_sync.py --plan",
        "python examples/",  # test_pretrained.py
    )
    kinds += ("python3.12 -m venv .venv", "CPATH=", "python -m pytest tests/gpu", "GPU_STAND_IN=1")
    assert [line for line in LINES if not line.startswith(kinds)] == []
    assert len(HERE) >= 7
    assert len(ELSEWHERE) >= 7


def test_no_command_within_a_sentence_is_left_out():
    inline = {command for command in INLINE if not command.startswith("python bench/")}
    assert inline == {LESSON, EXPORT, ANSWER, CURVE, *TESTED_ELSEWHERE}


@pytest.mark.complete
@pytest.mark.parametrize("line", HERE)
def test_what_fits_this_machine_runs(line, tmp_path):
    words, ranks = shlex.split(line)[1:], 1
    if words[0] == "--nproc-per-node":
        _, ranks, *words = words
    more = ["--warm-steps", "1", "--max-response-tokens", "32"] if "tool_use" in line else []
    more += ["--critic-warmup-steps", "0"] if "ppo_critic" in line else []
    torchrun(ROOT / words[0], *words[1:], *SHORT, *more, ranks=ranks, cwd=tmp_path)
    (folder,) = (tmp_path / "runs").iterdir()
    assert metrics_of(folder)[-1]["step"] == 1


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """A folder with what the placeholders stand for: a model with room and a chat template, prompts
    of the named kinds, and a stand-in for reasoning-gym.
    """
    monkeypatch.chdir(tmp_path)
    names = {word for line in ELSEWHERE for word in re.findall(r"--model (\S+)", line)}
    for name in names:
        shutil.copytree(ROOT / "toy", tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        config = json.loads((tmp_path / name / "config.json").read_text(encoding="utf-8"))
        (tmp_path / name / "config.json").write_text(
            json.dumps(config | {"max_position_embeddings": 32768}), encoding="utf-8"
        )
        tokenizer = json.loads(
            (tmp_path / name / "tokenizer_config.json").read_text(encoding="utf-8")
        )
        tokenizer["chat_template"] = (
            "{% for message in messages %}{{ message['content'] }}{% endfor %}"
        )
        (tmp_path / name / "tokenizer_config.json").write_text(
            json.dumps(tokenizer), encoding="utf-8"
        )
    (tmp_path / "FILE.jsonl").write_text(
        json.dumps({"prompt": "1+1=", "label": "2"}) + "\n", encoding="utf-8"
    )
    (tmp_path / "gsm8k").mkdir()
    for part in ("train", "test"):
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist([{"question": "1+1=", "answer": "one and one\n#### 2"}]),
            f"gsm8k/{part}.parquet",
        )
    row = {"prompt": [{"role": "user", "content": "1+2="}], "reward_model": {"ground_truth": "3"}}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), "dapo-math-17k.parquet")
    return tmp_path


class Started(Exception):
    """The run would have begun."""


@pytest.mark.parametrize("line", [line for line in ELSEWHERE if "nproc" not in line])
def test_what_needs_files_of_the_readers_own_gets_as_far_as_the_start(
    line, reader, monkeypatch, request
):
    def started(*args, **kwargs):
        raise Started

    monkeypatch.setattr(distributed, "init_distributed", started)
    for name, value in dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, LOCAL_WORLD_SIZE=1).items():
        monkeypatch.setenv(name, str(value))
    if "reasoning-gym" in line:
        request.getfixturevalue("gym")
    words = shlex.split(line)
    monkeypatch.setattr("sys.argv", words[1:])
    with pytest.raises(Started):
        start_main({"loop_sync.py": loop_sync, "loop_async.py": loop_async}[words[1]])


def python(line: str, *, cwd) -> subprocess.CompletedProcess:
    """Run a page's python command with this interpreter and this repository's script."""
    script, *words = shlex.split(line)[1:]
    command = [sys.executable, ROOT / script, *words]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.complete
@pytest.mark.parametrize(
    "line", [line for line in ELSEWHERE if "nnodes" in line and "FOLDER" in line]
)
def test_what_needs_several_nodes_can_be_planned(line):
    """With as many GPUs, and Qwen3-4B in place of the reader's own model."""
    nodes, ranks = (
        int(re.search(rf"--{name} (\d+)", line)[1]) for name in ("nnodes", "nproc-per-node")
    )
    flags = re.search(r"loop_a?sync\.py.*", line)[0].replace("--model FOLDER", "--model Qwen3-4B")
    plan = f"python {flags} --plan --plan-gpus {nodes * ranks}"
    assert python(plan, cwd=ROOT / "docs" / "configs").stdout.rstrip().endswith("fits")


@pytest.mark.complete
def test_the_lesson_its_export_and_an_answer(tmp_path):
    """The README's worked step as it stands, but that a checkpoint is written too."""
    script, *words = shlex.split(LESSON)[1:]
    torchrun(ROOT / script, *words, "--save-every", "1", ranks=1, cwd=tmp_path)
    dump = (tmp_path / "runs/lesson/rollouts/step-000001.jsonl").read_text(encoding="utf-8")
    samples = [json.loads(line) for line in dump.splitlines()]
    assert len(samples) == 256
    assert samples[0]["prompt"] == "137+582="
    assert samples[0]["label"] == "917"
    assert samples[0]["prompt_ids"] == [1, 4, 6, 10, 13, 8, 11, 5, 14]

    python(EXPORT.replace("NAME", "lesson"), cwd=tmp_path)
    answer = python(ANSWER.replace("NAME", "lesson"), cwd=tmp_path).stdout
    assert re.fullmatch(r"\d+\n", answer)


@pytest.mark.complete
def test_the_plan_needs_no_torchrun():
    (line,) = [line for line in LINES if line.startswith("python loop_sync.py --plan")]
    assert python(line, cwd=ROOT).stdout.rstrip().endswith("fits")


@pytest.mark.complete
def test_one_picture_of_two_runs(tmp_path):
    for name in ("A", "B"):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        row = {
            "step": 1,
            "reward": 0.5,
            "held_out": 0.5,
            "mismatch_abs": 0.1,
            "mismatch_k3": 0.01,
            "rollout_s": 1.0,
            "train_s": 1.0,
            "sync_s": 0.1,
        }
        row |= {
            "staleness": [3, 1],
            "staleness_max": 1,
            "response_tokens": 4.0,
            "truncated": 0.0,
            "step_s": 2.0,
        }
        (folder / "metrics.jsonl").write_text(
            json.dumps({"step": 0, "held_out": 0.4}) + "\n" + json.dumps(row) + "\n",
            encoding="utf-8",
        )
        names = [
            {"name": "thread_name", "ph": "M", "pid": 0, "tid": 0, "args": {"name": "trainer"}}
        ]
        events = [
            *names,
            {"name": "train", "ph": "X", "ts": 0, "dur": 1_000_000, "pid": 0, "tid": 0},
        ]
        (folder / "trace.json").write_text(
            "[" + ",\n".join(map(json.dumps, events)) + ("]" if name == "A" else ""),
            encoding="utf-8",
        )  # B has not ended
    assert (
        plot.spans(tmp_path / "runs/A")
        == plot.spans(tmp_path / "runs/B")
        == [("rank 0 trainer", "train", 0.0, 1.0)]
    )
    (line,) = [line for line in LINES if line.startswith("python tools/plot.py")]
    (tmp_path / "docs").mkdir()
    for command, picture in {
        line: "plot.png",
        CURVE.replace("one-rank", "A"): CURVE.split()[-1],
    }.items():
        python(command, cwd=tmp_path)
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


BENCHMARKS = {  # the command in docs/: what makes it short
    "bench/algorithms.py table": "RLOO --steps 1 --seeds 1",
    "bench/changes.py": f"--model {ROOT / 'toy'} --steps 4",
    "bench/changes.py estimate": "",
    "bench/cpu_attention.py": "--requests 16 --rounds 1",
    "bench/deal.py async": "--rounds 1 --steps 4",
    "bench/deal.py sync": "--rounds 1 --steps 4",
    "bench/density.py": "--steps 2 --lr 1e-6 --out density.png",
    "bench/density.py lag": "--steps 2 --out density.png",
    "bench/mismatch.py cost": "--steps 3",
    "bench/mismatch.py runs --model toy --steps 20": "--steps 1 --seeds 1",
    "bench/mismatch.py runs --out docs/mismatch.png": "--steps 1 --seeds 1",
    "bench/long_run.py sync": (
        "--steps 10 --prompts-per-step 4 --samples-per-prompt 8 --eval-samples 2"
    ),
    "bench/no_bf16.py": "--rounds 1 --steps 3",
    "bench/overlap.py": "compute --steps 4 --rounds 1",
    "bench/overlap.py accuracy": "--steps 1 --rounds 1",
    "bench/peers.py": "bare-toy --rounds 1",
    "bench/real_model.py FOLDER": "--rounds 1 --answers 2 --tokens 8",
    "bench/soak.py sync --kills 20 --steps 40": "--kills 1 --steps 4",
    "bench/soak.py async --kills 20 --steps 60": "--kills 1 --steps 5",
    "bench/tools.py accuracy": "--steps 1 --seeds 1 --warm-steps 2",
    "bench/tools.py speed": "--steps 4 --rounds 1 --warm-steps 2",
    "bench/weight_sync.py": "estimate",  # a measurement is made in test_weight_sync.py
}


@pytest.mark.complete
@pytest.mark.parametrize("command", BENCHMARKS)
def test_benchmarks_run(command, tmp_path):
    (tmp_path / "docs").mkdir()
    script, *words = command.replace("FOLDER", str(ROOT / "toy")).split()
    done = subprocess.run(
        [sys.executable, ROOT / script, *words, *BENCHMARKS[command].split()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    noise = "long_run" in script and done.stderr.startswith(
        "grown: "
    )  # so few steps may seem to grow longer
    assert (done.returncode == 0 or noise) and any(
        character.isdigit() for character in done.stdout
    ), done.stdout + done.stderr[-5000:]


def test_no_benchmark_is_left_out():
    assert {
        command.partition(" ")[2] for command in INLINE if command.split()[1].startswith("bench/")
    } == set(BENCHMARKS)
