"""Shared by all tests: --complete, import paths, small models, and how a run is started.

A run costs 10 to 20 seconds of imports before its first step. So the tests of one file share an
engine (module-scoped fixtures), and a worker script in tests/workers/ measures many cases in one
start of its ranks.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import psutil
import pytest
import torch

import backends.megatron  # noqa: F401  before transformers, and before Megatron
import transformers

from common import process_groups

# Every Python file of the project.
SOURCES = [
    path
    for path in sorted(ROOT.rglob("*.py"))
    if not {".venv", "runs"} & set(path.relative_to(ROOT).parts)
]
SMALL = dict(  # 97 tokens: tensor parallelism must pad the vocabulary
    vocab_size=97, hidden_size=128, intermediate_size=512, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
)  # fmt: skip
FAMILIES = {
    "qwen3": (transformers.Qwen3Config, dict(head_dim=64, tie_word_embeddings=False)),
    "qwen2": (transformers.Qwen2Config, dict(tie_word_embeddings=True)),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig,
        dict(
            head_dim=64,
            tie_word_embeddings=False,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=256,
            norm_topk_prob=True,
        ),
    ),
    "glm4_moe": (
        transformers.Glm4MoeConfig,
        dict(
            head_dim=64,
            tie_word_embeddings=False,
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=256,
            n_shared_experts=1,
            first_k_dense_replace=1,
            routed_scaling_factor=1.7,
            norm_topk_prob=True,
            n_group=1,
            topk_group=1,
            use_qk_norm=True,
            attention_bias=True,
        ),
    ),
    "llama": (
        transformers.LlamaConfig,
        dict(
            tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
        ),
    ),
}


def write_model(folder: Path, family: str, *, dtype=torch.float32, **changes) -> Path:
    """A random model of a family as a Hugging Face folder, with the toy's tokenizer.

    Norms and biases are random too, so that a lost one shows.
    """
    config_class, fields = FAMILIES[family]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config_class(**{**SMALL, **fields, **changes})
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.05)
    model.to(dtype).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(ROOT / "toy").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, Path]:
    """One small fp32 model of each family."""
    return {family: write_model(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


# --- quick and complete -------------------------------------------------------------------------


# Minutes each. They come first, so that no process is left alone with one of them at the end.
LONGEST = [
    "test_readme_commands.py",
    "test_checkpoint.py",
    "test_loop_async.py",
    "test_fuzz.py",
    "test_lora.py",
    "test_pretrained.py",
    "test_layouts.py",
    "test_loop_sync.py",
    "test_process_groups.py",
    "test_checkpoint_signals.py",
    "test_nodes.py",
    "test_engine_families.py",
    "test_engine.py",
]


def pytest_addoption(parser):
    parser.addoption(
        "--complete",
        action="store_true",
        help="run the tests marked complete too; of all files, two at a time",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Let pytest-xdist run two files at a time when every test of the project is run.

    A test spends much of its time waiting: for imports, for a process to end. Two at a time keep
    two cores busy.
    """
    whole = config.args_source == pytest.Config.ArgsSource.TESTPATHS
    is_worker = "PYTEST_XDIST_WORKER" in os.environ
    chosen = config.getoption("numprocesses", None) is not None or config.option.collectonly
    if config.getoption("--complete") and whole and not (is_worker or chosen):
        config.option.numprocesses, config.option.dist = 2, "loadfile"
        config.option.loadscopereorder = False  # the order is that of LONGEST


def pytest_report_header(config):
    if config.getoption("--complete"):
        return "every test"
    return "the quick tests; all of them: python -m pytest --complete"


def pytest_collection_modifyitems(config, items):
    """Deselect what is marked complete; in a complete run begin with the longest files."""
    if config.getoption("--complete"):
        first = {name: place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: first.get(item.path.name, len(first)))
        return
    is_long = [item.get_closest_marker("complete") is not None for item in items]
    config.hook.pytest_deselected(items=[item for item, long in zip(items, is_long) if long])
    items[:] = [item for item, long in zip(items, is_long) if not long]


# --- runs ---------------------------------------------------------------------------------------

LOOKS_LIKE_AN_ERROR = re.compile(
    "traceback|error|exception|warning|leaked|destroyed|never awaited|terminate"
    " called|dumped|segmentation|crashed|fatal|killed",
    re.IGNORECASE,
)
# What torchrun, the launcher, says of a signal that it has passed on: lines of its log, and a
# traceback.
TORCHRUN_S_OWN = re.compile(
    r"^[WE]\d{4} .*torch/distributed/elastic/.*$|^Traceback \(most recent call last\):\n(?: "
    r" .*\n)+\S+\.SignalException: .*$",
    re.MULTILINE,
)


def false_alarms(output: str) -> list[str]:
    """Return the lines of a run that look like an error.

    A run that ends as it was asked to has none.
    """
    lines = TORCHRUN_S_OWN.sub("", output.replace("\r", "\n")).splitlines()
    return [line for line in lines if LOOKS_LIKE_AN_ERROR.search(line)]


def torchrun(
    *arguments, ranks: int, timeout: int = 600, cwd: Path = ROOT, check: bool = True
) -> subprocess.CompletedProcess:
    """Run a script under torchrun with this interpreter; standalone picks a free port.

    Output is captured as text. A shipped script that ends well must not have printed what looks
    like an error.
    """
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
        *map(str, arguments),
    ]
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert not check or done.returncode == 0, (
        f"{' '.join(command)} ended with"
        f" {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    )
    script = next(ROOT / word for word in arguments if str(word).endswith(".py"))
    if done.returncode == 0 and "tests" not in script.relative_to(ROOT).parts:
        assert false_alarms(done.stdout + done.stderr) == []
    return done


def start_main(loop, *checks) -> None:
    """Call the main() of a loop as its script does, with sys.argv.

    checks: those of its flags that are not a loop's own.
    """
    from harness.checks import check_flags
    from harness.flags import parse_settings

    try:
        with mock.patch("harness.start.fork_spares"):  # copies of pytest
            loop.main(parse_settings(loop.Settings, check_flags, *checks))
    except SystemExit as end:
        if end.code:  # --plan ends with exit code 0
            raise


def metrics_of(folder: Path) -> list[dict]:
    return [
        json.loads(line)
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]


class Started:
    """A long run, on two ranks unless told, in a process group of its own as a terminal gives it.

    It is waited for until rows lines of metrics are there. rows=0: only until all ranks have begun
    to start.
    """

    def __init__(self, folder: Path, script: str, *flags: str, rows: int, ranks: int = 2):
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(ranks),
            str(ROOT / script),
        ]
        command += ["--steps", "5000", "--name", "long", *flags]
        self.output = open(folder / "output", "w+", encoding="utf-8")
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.metrics = folder / "runs" / "long" / "metrics.jsonl"
        self.family = []
        self.wait_for(
            lambda: (
                self.metrics.exists()
                and len(self.metrics.read_text(encoding="utf-8").splitlines()) >= rows
            ),
            240,
        )
        self.family = psutil.Process(self.process.pid).children(recursive=True)

    def wait_for(self, condition, seconds):
        end = time.time() + seconds
        while not condition():
            assert time.time() < end and self.process.poll() is None, self.text()
            time.sleep(0.2)

    def rank(self, rank: int) -> psutil.Process:
        return next(
            p
            for p in psutil.Process(self.process.pid).children()
            if p.environ().get("RANK") == str(rank)
        )

    def engine(self) -> psutil.Process:
        """The scheduler process of one rank, by the title it gives itself."""
        return next(
            process
            for process in self.family
            if process.cmdline()[0].startswith("sglang::scheduler")
        )

    def engines(self) -> list[psutil.Process]:
        """Engines, also those that still start, in the order of their ranks."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        started = [p for p in family if "sglang::scheduler" in " ".join(p.cmdline())]
        self.family = list({*self.family, *family})
        return sorted(started, key=lambda process: process.parent().environ()["RANK"])

    def end(self, seconds: float) -> int:
        """Exit code; fails if the run or any process of it is still there after so many seconds."""
        code = self.process.wait(seconds)
        _, alive = psutil.wait_procs(
            self.family, timeout=30
        )  # a child that was just importing notices after its imports
        assert not alive, [process.cmdline() for process in alive]
        return code

    def text(self) -> str:
        return self.whole_output()[-5000:]

    def whole_output(self) -> str:
        self.output.seek(0)
        return self.output.read()


@pytest.fixture
def held_port():
    """Keep a port of 127.0.0.1 for the processes of one test."""
    with process_groups.held_port() as port:
        yield port


@pytest.fixture
def start_loop(tmp_path):
    """Start a loop that would run for hours; whatever is left of it at the end is killed."""
    runs = []

    def start(script: str, *flags: str, **how: int) -> Started:
        runs.append(Started(tmp_path, script, *flags, **how))
        return runs[-1]

    yield start
    for process in (process for run in runs for process in [*run.family, run.process]):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


# --- a run to go on from ------------------------------------------------------------------------

# What every run of test_checkpoint*.py has. Half of its prompts come from a file.
SMALL_RUN = ["--eval-every", "3", "--eval-samples", "32", "--eval-samples-per-prompt", "2"]
SMALL_RUN += ["--prompts-per-step", "4", "--samples-per-prompt", "8", "--lr-schedule", "cosine"]
SMALL_RUN += ["--prompts", "toy:3", "more.jsonl", "--export"]


def write_more(folder: Path) -> None:
    rows = [{"prompt": f"{i:03d}+111=", "label": str(i + 111)[::-1]} for i in range(7)]
    (folder / "more.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")


@pytest.fixture
def more(tmp_path):
    write_more(tmp_path)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """Nine steps on one rank: runs/run with checkpoints of 3, 6 and 9, and every sample.

    The weights are exported at the end.
    """
    folder = tmp_path_factory.mktemp("undisturbed")
    write_more(folder)
    flags = ["--export", "bf16", "fp8", "--steps", "9", "--save-every", "3", "--keep", "3"]
    flags += ["--save-rollouts", "--name", "run"]
    torchrun(ROOT / "loop_sync.py", *SMALL_RUN, *flags, ranks=1, cwd=folder)
    return folder / "runs" / "run"


@pytest.fixture
def stopped(undisturbed, tmp_path):
    """Return the undisturbed run as a kill in the middle of its last checkpoint leaves it."""
    run = tmp_path / "runs" / "run"
    shutil.copytree(undisturbed, run)
    (run / "checkpoints" / "step-000009").rename(run / "checkpoints" / "step-000009.part")
    return run


@pytest.fixture
def pretend(monkeypatch):
    """Return a function that makes torch.cuda answer as a machine with GPUs would."""

    def pretend(*, capability=(9, 0), gpus=1, rank=0, ranks=1):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "A GPU")
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))

    return pretend


# --- Megatron in the test process ---------------------------------------------------------------


@pytest.fixture(scope="session")
def one_rank():
    """A default process group of one rank in the test process itself, as torchrun would make it."""
    os.environ.update(
        RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0"
    )
    store = torch.distributed.TCPStore("127.0.0.1", 0, 1, is_master=True)
    os.environ["MASTER_PORT"] = str(store.port)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def fresh_megatron(one_rank):
    """Give Megatron's generators, and its sums of auxiliary losses, the state of a first trainer.

    All trainers of one rank share the groups of the first. Each gloo group has a thread that wakes
    a hundred times a second until the process ends: groups of their own would slow down all tests
    that follow.
    """
    seed_megatron()


def seed_megatron() -> None:
    from megatron.core import parallel_state as mpu
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

    get_moe_layer_wise_logging_tracker().clear()

    if mpu.model_parallel_is_initialized():
        model_parallel_cuda_manual_seed(1)
