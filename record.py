"""The record of a run: its folder, its metrics and timeline, and the progress bar.

    runs/NAME/settings.json    every setting as resolved, versions and the command line
    runs/NAME/metrics.jsonl    one object a step; README.md explains each key
    runs/NAME/samples.jsonl    a few answers of training steps and evaluations, with their rewards
    runs/NAME/trace.json       what every rank did when, in Chrome's trace format: open it at ui.perfetto.dev
    runs/NAME/rollouts/        with --save-rollouts: every sample of every step, what --load-rollouts reads
    runs/NAME/profile/         with --profile: PyTorch's profile of chosen steps
    runs/NAME/checkpoints/     what --resume goes on from; see checkpoint.py
    runs/NAME/model-bf16/      the trained weights as a Hugging Face folder

Only global rank 0 writes, profiles excepted. Lines are flushed as they are written, so that whatever ends a run, the record up to then is there.
"""

import collections
import dataclasses
import importlib.metadata
import json
import os
import sys
import threading
import time
import uuid
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import run
from problems import BadInput, read_json
from run import all_gather_bytes, broadcast_bytes

ROWS = ("trainer", "engine", "judge")  # of each rank's part of the timeline
SHOWN_ANSWERS = 8  # of each source, in samples.jsonl, a step
SHOWN_SHARE = 0.1  # of a step: the bar shows a reward stage that takes this much of it
STAGES = ("rollout", "wait", "reward", "train", "sync")
NOTHING_TO_LEARN = (
    "step {step}: the rewards of each prompt's answers are all equal (mean {reward:.3f}), so nothing was learned. Compare answers and labels in samples.jsonl; "
    "look at --reward, --label-key, --label-after, and --max-response-tokens ({truncated:.0%} of the answers were cut off)"
)


class Stopwatch:
    """Seconds between calls of lap(), which are also kept as spans of the timeline: (stage, from, to), in seconds since the epoch."""

    def __init__(self):
        self.started = self.last = time.time()
        self.spans: list[tuple[str, float, float]] = []

    def lap(self, stage: str) -> float:
        previous, self.last = self.last, time.time()
        self.spans.append((stage, previous, self.last))
        return self.last - previous


class Row:
    """What a part of this rank does when, as spans of the timeline; any thread may mark a change."""

    def __init__(self):
        self._lock, self._spans, self._activity, self._since = threading.Lock(), [], "wait", time.time()

    def mark(self, activity: str) -> None:
        """From now on it does this."""
        if activity != self._activity:
            with self._lock:
                self._close()
                self._activity = activity

    def take(self) -> list[tuple[str, float, float]]:
        """(activity, from, to), in seconds since the epoch, since the last call and up to now."""
        with self._lock:
            self._close()
            spans, self._spans = self._spans, []
        return spans

    def _close(self) -> None:
        now = time.time()
        short_wait = self._activity == "wait" and now - self._since < 1e-4  # hundreds of answers, judged in microseconds each, are one span
        if self._spans and (short_wait or self._spans[-1][0] == self._activity):
            activity, start, _ = self._spans.pop()
            self._spans.append((activity, start, now))
        else:
            self._spans.append((self._activity, self._since, now))
        self._since = now


def renamed(
    spans: list[tuple[str, float, float]], start: float, end: float
) -> list[tuple[str, float, float]]:
    """Call "evaluation" what is generated and judged from start to end; cut spans that cross."""
    parts = []
    for activity, begin, stop in spans:
        cuts = [begin, *(cut for cut in (start, end) if begin < cut < stop), stop]
        for left, right in zip(cuts, cuts[1:]):
            inside = start <= left and right <= end and activity in ("rollout", "reward")
            parts.append(("evaluation" if inside else activity, left, right))
    return parts


FILES = {"metrics": "metrics.jsonl", "samples": "samples.jsonl", "trace": "trace.json"}


def has_whole_rows(folder: Path, *, size: int) -> bool:
    """Tell whether the first `size` bytes of metrics.jsonl are whole rows, as a run wrote them."""
    if size == 0:
        return True
    rows = (folder / FILES["metrics"]).read_bytes()[:size]
    try:
        return rows.endswith(b"\n") and all(type(json.loads(row)) is dict for row in rows.split(b"\n")[:-1])
    except (ValueError, RecursionError):
        return False


class Record:
    """The run folder and the progress bar. group: all ranks of the run; its rank 0, a trainer, is the one that writes. trains: whether this rank does.

    resumed: the checkpoint.Checkpoint that the run goes on from: what was written after it is cut off.

    `with engine, record:` ends W&B's service before the engine, whose end kills every child process of this one, and with the service what it has not sent.
    """

    def __init__(self, settings, loop: str, group: dist.ProcessGroup, trains: bool = True, resumed=None):
        self.group, self.loop, self.trains, self.is_writer = group, loop, trains, group.rank() == 0
        folder = b""
        if self.is_writer:
            folder = bytes(Path("runs") / settings.run.name if resumed else self._create_folder(settings.run.name))
        self.folder = Path(broadcast_bytes(folder, group).decode())
        self.name = str(self.folder.relative_to("runs"))
        self.started, self.settings, self.profiler, self.boards, self.end_wandb = time.time(), settings.run, None, [], None
        self.held_out, self.rewards = [], []  # of each evaluation; of each step
        self.resumed, self.first_step = resumed is not None, resumed.step + 1 if resumed else 1
        dropped = 0  # rows that stand behind the checkpoint
        self.spans_end, self.evaluated = time.time(), (0.0, 0.0)
        """Up to when the timeline is; from when to when the last evaluation was."""
        self.stopping = False
        """Whether a rank has been told to stop: the same on all ranks, from the end of a step on."""
        if not self.is_writer:
            return
        try:
            self.files = {name: open(self.folder / file, "a" if resumed else "w", buffering=1, encoding="utf-8") for name, file in FILES.items()}
            if resumed:
                self.started -= resumed.state["record"]["elapsed_s"]
                dropped = (self.folder / FILES["metrics"]).read_bytes()[resumed.state["record"]["metrics"] :].count(b"\n")
                for name, file in self.files.items():
                    file.truncate(resumed.state["record"][name])
                rows = map(json.loads, (self.folder / FILES["metrics"]).read_text(encoding="utf-8").splitlines())
                for row in rows:
                    self._remember(row)
            else:
                names = [{"name": "process_name", "ph": "M", "pid": rank, "args": {"name": f"rank {rank}"}} for rank in range(group.size())]
                names += [{"name": "thread_name", "ph": "M", "pid": n["pid"], "tid": i, "args": {"name": row}} for n in names for i, row in enumerate(ROWS)]
                self.files["trace"].write("[" + ",\n".join(map(json.dumps, names)))
            if settings.run.save_rollouts:
                (self.folder / "rollouts").mkdir(exist_ok=True)
            versions = {name: importlib.metadata.version(name) for name in ("torch", "megatron-core", "sglang", "transformers")}
            record = {"command": sys.argv, "world_size": group.size(), "versions": versions, **dataclasses.asdict(settings)}
            if settings.run.wandb:
                record["wandb_id"] = self._wandb_id()
            (self.folder / "settings.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise BadInput(f"the run folder {self.folder} cannot be written ({error.strerror}): run where you may write, or choose --name") from error
        if settings.run.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            board = SummaryWriter(self.folder / "tensorboard", purge_step=resumed.step + 1 if resumed else None)
            self.boards.append(lambda metrics: [board.add_scalar(key, value, metrics["step"]) for key, value in metrics.items()] and board.flush())
        if settings.run.wandb:
            import wandb

            about = dict(name=self.name, id=record["wandb_id"], resume="allow", dir=self.folder, config=record)
            wandb_run = wandb.init(project=settings.run.wandb, **about)
            self.boards.append(lambda metrics: wandb_run.log(metrics, step=metrics["step"]))
            self.end_wandb = wandb.teardown
        self.bar = tqdm(total=settings.run.steps, initial=resumed.step if resumed else 0, unit="step", dynamic_ncols=True)
        if resumed:
            rest = f"; the {dropped} rows of metrics.jsonl that followed it are dropped, and written again" if dropped else ""
            self.say(f"going on from {resumed.folder}{rest}")

    def _create_folder(self, name: str) -> Path:
        try:
            return run.new_run_folder(name, self.loop)
        except OSError as error:
            raise BadInput(f"a folder below runs/ cannot be created ({error.strerror}): run where you may write, or choose --name") from error

    def _wandb_id(self) -> str:
        """Return W&B's key of this run: that of before --resume, else a new one. A name may come again, in another folder; W&B would go on with that run."""
        before = self.folder / "settings.json"
        known = read_json(before).get("wandb_id") if before.exists() else None
        return known or f"{self.name.replace('/', '-')}-{uuid.uuid4().hex[:8]}"

    def _remember(self, metrics: dict) -> None:
        """Keep what the last line tells of a row of metrics."""
        if "held_out" in metrics:
            self.held_out.append(metrics["held_out"])
        if "reward" in metrics:
            self.rewards.append(metrics["reward"])

    def __enter__(self) -> "Record":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if self.end_wandb:
            self.end_wandb(exit_code=0 if kind is None else 1)

    def positions(self) -> dict[str, float]:
        """Where the files of the record stand, for a checkpoint."""
        return {"elapsed_s": time.time() - self.started, **{name: os.fstat(file.fileno()).st_size for name, file in self.files.items()}}

    def checkpoint_due(self, step: int) -> bool:
        """Say whether a checkpoint is to be written now: every --save-every steps, when told to stop, and at the end of a run that has others.

        Without the last one, --resume would go back behind steps that are done.
        """
        every = self.settings.save_every
        is_last = step == self.settings.steps and (every > 0 or self.resumed)
        return self.stopping or is_last or (every > 0 and step % every == 0)

    def exports(self) -> dict[str, Path]:
        """Return {dtype: folder} of --export, of whose weights this rank holds a part: nothing on ranks that do not train."""
        return {dtype: self.folder / f"model-{dtype}" for dtype in self.settings.export if self.trains}

    def say(self, text: str) -> None:
        """One line above the progress bar."""
        if self.is_writer:
            self.bar.write(text, file=sys.stderr)

    def profile(self, step: int) -> None:
        """At the end of a step: with --profile, write this rank's profile of it, and begin that of the next."""
        if self.is_writer and step == self.first_step - 1:
            self.bar.unpause()  # the bar's clock runs from the first step on, not from the start
        if self.profiler:
            self.profiler.stop()
            (self.folder / "profile").mkdir(exist_ok=True)
            self.profiler.export_chrome_trace(str(self.folder / "profile" / f"step-{step}-rank-{self.group.rank()}.json"))
        self.profiler = torch.profiler.profile() if step + 1 in self.settings.profile else None
        if self.profiler:
            self.profiler.start()

    def log(self, metrics: dict) -> None:
        """One line of metrics.jsonl; the bar shows the reward and where the step's time went."""
        self.profile(metrics["step"])
        if not self.is_writer:
            return
        for board in self.boards:
            board({key: value for key, value in metrics.items() if isinstance(value, (int, float))})
        self.files["metrics"].write(json.dumps({k: round(v, 8) if isinstance(v, float) else v for k, v in metrics.items()}) + "\n")
        self._remember(metrics)
        if metrics["step"] == self.first_step and metrics.get("zero_std_groups") == 1 and "reward" in metrics:
            self.say(NOTHING_TO_LEARN.format(**metrics))
        if "reward" in metrics or "reward_errors" in metrics:  # a step, and no evaluation
            reward = f"reward {metrics['reward']:.2f}" if "reward" in metrics else "no reward"
            least_s = SHOWN_SHARE * metrics.get("step_s", 0)
            seconds = {stage: metrics[f"{stage}_s"] for stage in STAGES if f"{stage}_s" in metrics}
            shown = [stage for stage, s in seconds.items() if stage != "reward" or s >= least_s]
            stages = "  ".join(f"{stage} {seconds[stage]:.2f} s" for stage in shown)
            self.bar.set_postfix_str(f"{reward}  {stages}", refresh=False)
            self.bar.update()

    def trace(self, watch: Stopwatch, engine, judge) -> dict[str, float]:
        """Add every rank's step to trace.json; returns the step's seconds and the shares of it that trainers and engines wait. Collective: the step's end.

        watch: of the step. engine: None on ranks without one. A trainer waits while it neither trains nor hands over weights, for the last rank at the
        step's end too; an engine waits while it generates nothing. Clocks of several machines are taken as they are.
        """
        rows = {"trainer": watch.spans, "stop": run.told_to_stop.is_set()} if self.trains else {"stop": run.told_to_stop.is_set()}
        of_engine = {"engine": engine.row.take(), "judge": judge.row.take()} if engine else {}
        rows |= {row: renamed(spans, *self.evaluated) for row, spans in of_engine.items()}
        self.spans_end = time.time()
        ranks = [json.loads(row) for row in all_gather_bytes(json.dumps(rows).encode(), self.group)]
        self.stopping = any([rank.pop("stop") for rank in ranks])
        if not self.is_writer:
            return {}
        for rank, rows in enumerate(ranks):
            for row, spans in rows.items():
                for stage, start, end in spans:
                    times = {"ts": round((start - self.started) * 1e6), "dur": round((end - start) * 1e6)}  # microseconds
                    self.files["trace"].write(",\n" + json.dumps({"name": stage, "ph": "X", **times, "pid": rank, "tid": ROWS.index(row)}))

        def waiting(row: str, busy: tuple[str, ...]) -> float:
            rows = [rank[row] for rank in ranks if row in rank]
            busy_s = sum(max(min(end, ended) - max(start, watch.started), 0) for spans in rows for stage, start, end in spans if stage in busy)
            return 1 - busy_s / len(rows) / step_s if rows else 1.0

        ended = time.time()
        step_s = ended - watch.started
        return {"step_s": step_s, "trainer_wait": waiting("trainer", ("train", "sync")), "engine_wait": waiting("engine", ("rollout",))}

    def log_eval(self, step: int, samples: list, metrics: dict) -> dict:
        """An evaluation's metrics on the console and as metrics of the step, the first answers from each held-out set in samples.jsonl."""
        if not samples:
            return {"step": step}
        self.evaluated = (self.spans_end, time.time())
        prompts, n = len({sample.group for sample in samples}), 1 + max(sample.index for sample in samples)
        shown = [key for key in metrics if key.startswith("held_out/") or n > 1 and key in (f"pass@{n}", f"majority@{n}")]
        more = "".join(f"  {key.removeprefix('held_out/')} {metrics[key]:.3f}" for key in shown)
        if errors := metrics.get("held_out_errors"):
            error = next(sample.error for sample in samples if sample.reward is None)
            more += f"  {errors} of {len(samples)} answers could not be judged, the first: {error[:200]}"
        if "held_out" in metrics:
            self.say(f"step {step:4d}  held-out reward {metrics['held_out']:.3f} on {prompts} prompts{more}")
        else:
            self.say(f"step {step:4d}  no held-out reward{more}")
        self._write_samples(step, samples, split="held-out")
        return {"step": step, **metrics}

    def log_samples(self, step: int, samples: list) -> None:
        """Write a few of a training step's answers: of steps 1 and --steps, and every --eval-every.

        They are the first answers to several prompts of each source.
        """
        if step in (1, self.settings.steps) or step % self.settings.eval_every == 0:
            ordered = sorted(samples, key=lambda sample: (sample.index, sample.group))
            self._write_samples(step, ordered, split="train")

    def _write_samples(self, step: int, samples: list, *, split: str) -> None:
        written = collections.Counter()
        for sample in samples if self.is_writer else ():
            written[sample.source] += 1
            if written[sample.source] <= SHOWN_ANSWERS:
                row = {"step": step, "split": split, "prompt": sample.prompt, "response": sample.response}
                row |= {"label": sample.label, "reward": sample.reward, "source": sample.source}
                row |= {"error": sample.error} if sample.error else {}
                self.files["samples"].write(json.dumps(row, ensure_ascii=False) + "\n")

    def finish(self) -> None:
        """The last line: what was learned, and where the record is; or how to go on."""
        if not self.is_writer:
            return
        self.bar.close()
        if self.stopping:
            print(f"stopped after step {self.bar.n}, as asked by SIGTERM: go on with --name {self.name} --resume", flush=True)
            return
        self.files["trace"].write("]\n")
        name, values = "held-out reward", self.held_out
        if not values:
            name, values = "no held-out prompts; reward of the training steps", self.rewards
        learned = f"{name} {values[0]:.3f} -> {values[-1]:.3f}" if values else "no reward"
        when = f"in {self.bar.total} steps, {time.time() - self.started:.0f} s"
        print(f"{learned} {when}; {self._written()} in {self.folder}", flush=True)

    def _written(self) -> str:
        """Name what a reader finds in the run folder: "metrics, samples and weights are"."""
        names = ["metrics"]
        if self.positions()["samples"]:
            names.append("samples")
        if any((folder / "config.json").exists() for folder in self.exports().values()):
            names.append("weights")
        *others, last = names
        return f"{', '.join(others)} and {last} are" if others else "metrics are"
