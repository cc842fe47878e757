"""What every run needs and no stage owns: settings from the command line, the run folder, the progress bar, and a clean end.

    runs/NAME/settings.json    every setting as resolved, versions and the command line
    runs/NAME/metrics.jsonl    one object a step; README.md explains each key
    runs/NAME/samples.jsonl    a few generated answers of every evaluation, with their rewards
    runs/NAME/model-bf16/      the trained weights as a Hugging Face folder

Only global rank 0 writes. Lines are flushed as they are written, so that whatever ends a run, the record up to then is there.
"""

import dataclasses
import difflib
import importlib.metadata
import importlib.util
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import tyro
from tqdm import tqdm

# The engines warn at import about what a CPU lacks; they say it in every process. Errors still show.
os.environ.setdefault("PYTHONWARNINGS", "ignore")
warnings.simplefilter("ignore")

REPOSITORY = Path(__file__).resolve().parent
CPU_SGLANG = "0.5.21"  # the version that cpu.py is written for


class BadInput(Exception):
    """Something the user gave cannot work. The message names the value, the rule and the fix; it is shown without a traceback, exit code 2."""


class EngineDied(Exception):
    """A process of the inference engine ended while it was needed."""


@dataclass(frozen=True)
class RunSettings:
    """What to train, for how long, and where the record goes."""

    model: str = str(REPOSITORY / "toy")
    """Hugging Face folder (Qwen3, Qwen2.5 or Llama; safetensors) to train and to generate with."""
    name: str = ""
    """Name of the run folder below runs/; empty: the loop's name and the time."""
    steps: int = 80
    """Training steps: each is one rollout, one optimizer step, one weight hand-off."""
    eval_every: int = 10
    """Evaluate on the held-out prompts every so many steps, and before the first and after the last."""
    seed: int = 1
    """Seeds prompts, sampling and Megatron. Each engine samples with seed + its rank."""
    check_sync: bool = False
    """Read every weight back from the engine after every hand-off; always done after the first and the last."""
    export: tuple[str, ...] = ("bf16",)
    """Write the trained weights as Hugging Face folders at the end: any of bf16, fp8; none with an empty list."""


def check_installation() -> None:
    """End the program, exit code 2, with the right install line if the packages are those of another kind of machine. Called before sglang's import."""
    missing = {name for name in ("sglang", "sgl_kernel", "megatron") if importlib.util.find_spec(name) is None}
    has_gpu = torch.cuda.is_available()
    line = "pip install -r requirements-gpu.txt" if has_gpu else "pip install -r requirements.txt && pip install --no-deps -r requirements-engine.txt"
    if missing & {"sglang", "megatron"}:
        problem = "sglang or megatron-core is not installed"
    elif has_gpu and "sgl_kernel" in missing:
        problem = "this machine has a GPU, but sglang's GPU kernels (sglang-kernel) are not installed"
    elif not has_gpu and importlib.metadata.version("sglang") != CPU_SGLANG:
        problem = f"no GPU is visible, and without one only sglang {CPU_SGLANG} runs; installed is {importlib.metadata.version('sglang')}"
    else:
        return
    print(f"error: {problem}. In a fresh virtual environment: {line}", file=sys.stderr, flush=True)
    sys.exit(2)


def parse_settings(settings_class: type):
    """Settings from the command line; a wrong flag ends the program with the nearest right one named (tyro), exit code 2."""
    if "RANK" not in os.environ:
        script = Path(sys.argv[0]).name
        raise BadInput(f"RANK is not set: a loop runs under torchrun. Use `torchrun {script}` or `torchrun --nproc-per-node 2 {script}`")
    settings = tyro.cli(settings_class, description=sys.modules["__main__"].__doc__, config=(tyro.conf.OmitArgPrefixes,))
    run = settings.run
    if run.steps < 1 or run.eval_every < 1:
        raise BadInput(f"--steps {run.steps} and --eval-every {run.eval_every} must be at least 1")
    if unknown := set(run.export) - {"bf16", "fp8"}:
        raise BadInput(f"--export {' '.join(unknown)} is none of: bf16, fp8")
    if run.name and (Path("runs") / run.name / "metrics.jsonl").exists():
        raise BadInput(f"runs/{run.name} already holds a run: choose another --name or remove that folder")
    return settings


def parse_overrides(pairs: tuple[str, ...], *, flag: str, fields: list[str]) -> dict:
    """("key=value", …) -> {key: value}; values are read as JSON where they are JSON (true, 4, 0.1, null), else as text.

    fields: the names that may be set. An unknown one raises BadInput naming the nearest.
    """
    overrides = {}
    for pair in pairs:
        key, separator, text = pair.partition("=")
        if not separator:
            raise BadInput(f"{flag} {pair!r} is not of the form key=value")
        if key not in fields:
            nearest = difflib.get_close_matches(key, fields, n=1, cutoff=0.0)[0]
            raise BadInput(f"{flag} {key} is not a field that can be set there; the nearest is {nearest}")
        try:
            overrides[key] = json.loads(text)
        except json.JSONDecodeError:
            overrides[key] = text
    return overrides


def init_distributed() -> None:
    """Join torchrun's default process group: gloo for CPU tensors, NCCL for CUDA tensors where there are any."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        dist.init_process_group("gloo")


class Stopwatch:
    """Seconds between calls of lap()."""

    def __init__(self):
        self.last = time.perf_counter()

    def lap(self) -> float:
        previous, self.last = self.last, time.perf_counter()
        return self.last - previous


class Run:
    """The run folder and the progress bar. Metrics given to log() must be the same on every rank; only rank 0 writes."""

    def __init__(self, settings, loop: str):
        self.is_writer = dist.get_rank() == 0
        names = [settings.run.name or f"{loop}-{time.strftime('%Y%m%d-%H%M%S')}"]
        dist.broadcast_object_list(names)
        self.folder = Path("runs") / names[0]
        self.started = time.time()
        self.accuracy = []
        if not self.is_writer:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.metrics_file = open(self.folder / "metrics.jsonl", "a", buffering=1)
            self.samples_file = open(self.folder / "samples.jsonl", "a", buffering=1)
            versions = {name: importlib.metadata.version(name) for name in ("torch", "megatron-core", "sglang", "transformers")}
            record = {"command": sys.argv, "world_size": dist.get_world_size(), "versions": versions, **dataclasses.asdict(settings)}
            (self.folder / "settings.json").write_text(json.dumps(record, indent=2) + "\n")
        except OSError as error:
            raise BadInput(f"the run folder {self.folder} cannot be written ({error.strerror}): run where you may write, or choose --name") from error
        self.bar = tqdm(total=settings.run.steps, unit="step", dynamic_ncols=True)

    def say(self, text: str) -> None:
        """One line above the progress bar."""
        if self.is_writer:
            self.bar.write(text, file=sys.stderr)

    def log(self, metrics: dict) -> None:
        """One line of metrics.jsonl; the bar shows the reward and where the step's time went."""
        if not self.is_writer:
            return
        self.metrics_file.write(json.dumps({k: round(v, 8) if isinstance(v, float) else v for k, v in metrics.items()}) + "\n")
        if "reward" in metrics:
            stages = "  ".join(f"{stage} {metrics[f'{stage}_s']:.2f} s" for stage in ("rollout", "train", "sync"))
            self.bar.set_postfix_str(f"reward {metrics['reward']:.2f}  {stages}", refresh=False)
            self.bar.update()

    def log_eval(self, step: int, samples: list) -> dict:
        """The held-out accuracy on the console and as a metric, the first answers in samples.jsonl; {} where there are no samples."""
        if not samples:
            return {"step": step}
        scores = [sample.reward or 0.0 for sample in samples]
        self.accuracy.append(sum(scores) / len(scores))
        self.say(f"step {step:4d}  held-out accuracy {self.accuracy[-1]:.3f} on {len(samples)} prompts")
        for sample in samples[:8] if self.is_writer else ():
            row = {"step": step, "prompt": sample.prompt, "response": sample.response, "label": sample.label, "reward": sample.reward}
            self.samples_file.write(json.dumps(row, ensure_ascii=False) + "\n")
        return {"step": step, "held_out": self.accuracy[-1]}

    def finish(self) -> None:
        """The last line: what was learned, and where the record is."""
        if not self.is_writer:
            return
        self.bar.close()
        self.metrics_file.close()
        self.samples_file.close()
        learned = f"held-out accuracy {self.accuracy[0]:.3f} -> {self.accuracy[-1]:.3f}" if self.accuracy else "no held-out prompts to judge by"
        print(f"{learned} in {self.bar.total} steps, {time.time() - self.started:.0f} s; metrics, samples and weights are in {self.folder}", flush=True)


def run_main(main: Callable[[], None]) -> None:
    """Call main and turn how it ends into an exit code: 0 done, 1 failed, 2 bad input, 130 interrupted.

    The engine's children are ended by main's own `with`. Should this process be killed, they notice that their parent is gone and end themselves.
    """
    signal.signal(signal.SIGQUIT, _engine_child_died)
    try:
        main()
        dist.destroy_process_group()
    except BadInput as error:
        # All ranks usually see the same mistake. Rank 0 says it at once; torchrun then ends the others while they wait.
        time.sleep(0 if os.environ.get("RANK", "0") == "0" else 3)
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except EngineDied as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"interrupted: rank {os.environ.get('RANK', '0')} has ended its engine", file=sys.stderr, flush=True)
        sys.exit(130)


def _engine_child_died(signum, frame) -> None:
    """SGLang sends SIGQUIT to this process when one of its children fails or is found dead (its SubprocessWatchdog looks every second)."""
    raise EngineDied(f"rank {os.environ.get('RANK', '0')}: a process of the SGLang engine died; its own error, if it left one, is printed above")
