"""The record of a run: its folder, its metrics and timeline, and the progress bar.

    runs/NAME/settings.json    every setting as resolved, versions and the command line
    runs/NAME/metrics.jsonl    one object a step; docs/metrics.md explains each key
    runs/NAME/samples.jsonl    a few answers of training steps and evaluations, with their rewards
    runs/NAME/trace.json       what every rank did when, for ui.perfetto.dev (Chrome's trace format)
    runs/NAME/rollouts/        --save-rollouts: every sample of every step, for --load-rollouts
    runs/NAME/profile/         --profile: PyTorch's profile of chosen steps
    runs/NAME/lock             who writes here now: a second run of this name is refused
    runs/NAME/checkpoints/     what --resume goes on from; see harness/checkpoint.py
    runs/NAME/model-bf16/      the trained weights as a Hugging Face folder

Only global rank 0 writes, profiles excepted. Each line is flushed when it is written: whatever ends
a run, the record up to then is there.
"""

import collections
import dataclasses
import importlib.metadata
import json
import os
import signal
import sys
import time
import uuid
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist
from tqdm import tqdm

from common.distributed import all_gather_bytes, broadcast_bytes
from common.errors import read_json
from common.heap import trim_heap
from common.timeline import Clock, Span, mark_evaluation, waiting_share
from data.sample import Sample, read_dump
from harness import exits
from harness.metrics import batch_metrics, describe_evaluation
from harness.run_folder import (
    FILES,
    check_shared,
    open_run_folder,
    rollouts_file,
    unwritable,
)

ROWS = ("trainer", "engine", "judge")  # of each rank's part of the timeline
SHOWN_ANSWERS = 8  # of each source, in samples.jsonl, a step
SHOWN_SHARE = 0.1  # of a step: the bar shows a reward stage that takes this much of it
STAGES = ("rollout", "wait", "reward", "train", "sync")
PACKAGES = ("torch", "megatron-core", "sglang", "transformers")
NOTHING_TO_LEARN = (
    "step {step}: the rewards of each prompt's answers are all equal (mean {reward:.3f}), so"
    " nothing was learned. Compare answers and labels in samples.jsonl; look at --reward,"
    " --label-key, --label-after, and --max-response-tokens ({truncated:.0%} of the answers were"
    " cut off)"
)


class Record:
    """The run folder and the progress bar.

    group: all ranks of the run; its rank 0, a trainer, writes. trains: whether this rank does.
    resumed: the checkpoint.Checkpoint that the run goes on from. What was written after it is cut
    off.

    On exit W&B ends first: the end of the engine kills every child process of this rank, and with
    W&B's service the data that it has not sent.
    """

    def __init__(
        self, settings, loop: str, group: dist.ProcessGroup, trains: bool = True, resumed=None
    ):
        self.group, self.loop, self.trains, self.is_writer = group, loop, trains, group.rank() == 0
        self.evaluated_model = str(resumed.folder if resumed else settings.run.model)
        name = settings.run.name
        if settings.run.eval_only and resumed:  # a record of its own; the run's stays as it is
            resumed, name, self.loop = None, "", f"{name}-eval"
        folder = b""
        if self.is_writer:
            is_auto = settings.run.resume == "auto"
            step = resumed.step if resumed else None
            mine, self.lock, self.about_files = open_run_folder(
                name, self.loop, resumed_step=step, is_auto=is_auto
            )
            folder = bytes(mine)
        self.folder = Path(broadcast_bytes(folder, group).decode())
        check_shared(self.folder, group, is_new=not resumed)
        self.name = str(self.folder.relative_to("runs"))
        self.settings, self.started = settings.run, time.time()
        loss = getattr(settings, "loss", None)
        self.learns_without_rewards = bool(loss and loss.kl_coef and loss.kl_in == "reward")
        self.resumed, self.first_step = resumed is not None, resumed.step + 1 if resumed else 1
        self.held_out: list[float] = []  # of each evaluation
        self.rewards: list[float] = []  # of each step
        self.profiler, self.boards, self.end_wandb = None, [], None
        self.spans_end = time.time()
        """Up to when the timeline is written."""
        self.evaluated = (0.0, 0.0)
        """From when to when the last evaluation was."""
        self.stopping, self.stop_signals = False, ""
        """Whether a rank was told to stop while steps are left, and how: the same on all ranks."""
        self.files: dict[str, TextIO] = {}
        if self.is_writer:
            self._open(settings, resumed)

    def _open(self, settings, resumed) -> None:
        """Open files, boards and the progress bar."""
        dropped = 0  # rows that stand behind the checkpoint
        try:
            for name, file in FILES.items():
                self.files[name] = open(self.folder / file, "a", buffering=1, encoding="utf-8")
            if resumed:
                dropped = self._cut_off(resumed)
            else:
                self._name_rows()
            if self.settings.save_rollouts:
                (self.folder / "rollouts").mkdir(exist_ok=True)
            about = self._about(settings)
            text = json.dumps(about, indent=2) + "\n"
            (self.folder / "settings.json").write_text(text, encoding="utf-8")
        except OSError as error:
            raise unwritable(self.folder, error) from error
        if self.settings.tensorboard:
            self._start_tensorboard()
        if self.settings.wandb:
            self._start_wandb(about)
        self.bar = tqdm(
            total=self.settings.steps,
            initial=self.first_step - 1,
            unit="step",
            dynamic_ncols=True,
            disable=self.settings.eval_only,  # a bar of no steps says nothing
        )
        if self.about_files:
            self.say(self.about_files)
        if resumed:
            rest = (
                f"; the {dropped} rows of metrics.jsonl that followed it are dropped, and written"
            )
            self.say(f"going on from {resumed.folder}{f'{rest} again' if dropped else ''}")

    def _cut_off(self, resumed) -> int:
        """Remove what was written after the checkpoint; return how many rows of metrics."""
        at = resumed.state["record"]
        self.started -= at["elapsed_s"]
        metrics = self.folder / FILES["metrics"]
        dropped = metrics.read_bytes()[at["metrics"] :].count(b"\n")
        for name, file in self.files.items():
            file.truncate(at[name])
        for row in metrics.read_text(encoding="utf-8").splitlines():
            self._remember(json.loads(row))
        return dropped

    def _name_rows(self) -> None:
        """Begin trace.json: name each rank, and the rows of its part of the timeline."""

        def named(what: str, name: str, **where) -> str:
            return json.dumps({"name": what, "ph": "M", **where, "args": {"name": name}})

        ranks = range(self.group.size())
        names = [named("process_name", f"rank {rank}", pid=rank) for rank in ranks]
        for rank in ranks:
            names += [named("thread_name", row, pid=rank, tid=i) for i, row in enumerate(ROWS)]
        self.files["trace"].write("[" + ",\n".join(names))

    def _about(self, settings) -> dict:
        """Return what settings.json holds."""
        versions = {name: importlib.metadata.version(name) for name in PACKAGES}
        about = {"command": sys.argv, "world_size": self.group.size(), "versions": versions}
        about |= dataclasses.asdict(settings)
        return about | ({"wandb_id": self._wandb_id()} if self.settings.wandb else {})

    def _start_tensorboard(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge_step = self.first_step if self.resumed else None
        board = SummaryWriter(self.folder / "tensorboard", purge_step=purge_step)

        def add(metrics: dict) -> None:
            for key, value in metrics.items():
                board.add_scalar(key, value, metrics["step"])
            board.flush()

        self.boards.append(add)

    def _start_wandb(self, about: dict) -> None:
        import wandb

        wandb_run = wandb.init(
            project=self.settings.wandb,
            name=self.name,
            id=about["wandb_id"],
            resume="allow",
            dir=self.folder,
            config=about,
        )
        self.boards.append(lambda metrics: wandb_run.log(metrics, step=metrics["step"]))
        self.end_wandb = wandb.teardown

    def _wandb_id(self) -> str:
        """Return W&B's key of this run: that of before --resume, else a new one.

        A name may come again, in another folder; W&B would go on with that run.
        """
        before = self.folder / "settings.json"
        known = read_json(before).get("wandb_id") if before.exists() else None
        return known or f"{self.name.replace('/', '-')}-{uuid.uuid4().hex[:8]}"

    def __enter__(self) -> "Record":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if self.end_wandb:
            self.end_wandb(exit_code=0 if kind is None else 1)

    # --- a step -----------------------------------------------------------------------------------

    def start_step(self, step: int) -> Clock:
        """Start the clock of a step, and with --profile this rank's profile of it."""
        exits.is_training.set()  # from now on a signal to stop waits for a step's end
        if self.is_writer and step == self.first_step:
            self.bar.unpause()  # the bar's clock runs from the first step on, not from the start
        if step in self.settings.profile:
            self.profiler = torch.profiler.profile()
            self.profiler.start()
        return Clock()

    def end_step(
        self, step: int, clock: Clock, samples: list[Sample], engine, judge
    ) -> dict[str, float]:
        """Write the step's timeline and a few of its answers. Collective: the step's end.

        Returns what the samples amount to, see batch_metrics. Then come the seconds of the step and
        of its stages, and which shares of it trainers and engines waited. A trainer waits while it
        neither trains nor sends weights, for the last rank too. An engine waits while it generates
        nothing. Clocks of several machines are taken as they are.
        """
        self.log_samples(step, samples)
        rows = {"trainer": clock.spans} if self.trains else {}
        if engine.timeline:
            of_engine = {"engine": engine.timeline, "judge": judge.timeline}
            for row, timeline in of_engine.items():
                rows[row] = mark_evaluation(timeline.pop_spans(), *self.evaluated)
        self.spans_end = time.time()
        trim_heap(step)
        ranks = [json.loads(row) for row in all_gather_bytes(json.dumps(rows).encode(), self.group)]
        if not self.is_writer:
            return {}
        for rank, spans_of in enumerate(ranks):
            for row, spans in spans_of.items():
                self._write_spans(spans, rank, row)
        end = time.time()
        of_step = (clock.started, end)
        trainers, engines = ([rank[row] for rank in ranks if row in rank] for row in ROWS[:2])
        return {
            **batch_metrics(samples, version=step - 1),
            "step_s": end - clock.started,
            "trainer_wait": waiting_share(trainers, ("train", "sync"), *of_step),
            "engine_wait": waiting_share(engines, ("rollout",), *of_step),
            **clock.seconds(),
            **getattr(engine, "pop_restarts", dict)(),  # a comeback.LastingEngine has it
        }

    def log(self, metrics: dict) -> None:
        """Write a line of metrics.jsonl; the bar shows the reward and where the step's time went.

        Collective: afterwards all ranks know whether one of them has been told to stop.
        """
        step = metrics["step"]
        self._end_profile(step)
        exits.is_training.set()
        told = b"".join(all_gather_bytes(bytes(exits.told_to_stop[:1]), self.group))
        self.stopping = bool(told) and step < self.settings.steps
        self.stop_signals = " and ".join(sorted({signal.Signals(number).name for number in told}))
        if not self.is_writer:
            return
        self.write_row(metrics)
        is_first = step == self.first_step and not self.learns_without_rewards
        if is_first and metrics.get("zero_std_groups") == 1 and "reward" in metrics:
            self.say(NOTHING_TO_LEARN.format(**metrics))
        if "reward" in metrics or "reward_errors" in metrics:  # a step, and no evaluation
            self._show(metrics)

    def write_row(self, metrics: dict) -> None:
        """Write a line of metrics.jsonl, and the boards' part of it."""
        if not self.is_writer:
            return
        numbers = {key: x for key, x in metrics.items() if isinstance(x, (int, float))}
        for add in self.boards:
            add(numbers)
        rounded = {key: round(x, 8) if isinstance(x, float) else x for key, x in metrics.items()}
        self.files["metrics"].write(json.dumps(rounded) + "\n")
        self._remember(metrics)

    def checkpoint_due(self, step: int) -> bool:
        """Tell whether a checkpoint is to be written now.

        That is every --save-every steps, when a rank was told to stop, and at the end of a run that
        has others: without the last one, --resume would go back behind steps that are done.
        """
        every = self.settings.save_every
        is_last = step == self.settings.steps and (every > 0 or self.resumed)
        return bool(self.stop_signals) or is_last or (every > 0 and step % every == 0)

    def save_or_load(self, step: int, samples: list[Sample]) -> list[Sample]:
        """Return the step's samples, of all ranks.

        --save-rollouts writes them. --load-rollouts reads those of another run in their place.
        """
        if self.settings.load_rollouts:
            return read_dump(rollouts_file(self.settings.load_rollouts, step))
        if self.settings.save_rollouts and self.is_writer:
            lines = b"".join(sample.to_json() + b"\n" for sample in samples)
            rollouts_file(self.folder / "rollouts", step).write_bytes(lines)
        return samples

    # --- the end ----------------------------------------------------------------------------------

    def exports(self) -> dict[str, Path]:
        """Return {dtype: folder} of --export; nothing on ranks that hold no trained weights."""
        dtypes = self.settings.export if self.trains else ()
        return {dtype: self.folder / f"model-{dtype}" for dtype in dtypes}

    def finish(self) -> None:
        """Print the last line: what was learned, and where the record is; or how to go on."""
        if not self.is_writer:
            return
        self.bar.close()
        if self.stopping:
            stopped = f"stopped after step {self.bar.n}, as asked by {self.stop_signals}"
            print(f"{stopped}: go on with --name {self.name} --resume", flush=True)
            return
        self.files["trace"].write("]\n")
        name, values = "held-out reward", self.held_out
        if not values:
            name, values = "no held-out prompts; reward of the training steps", self.rewards
        learned = f"{name} {values[0]:.3f} -> {values[-1]:.3f}" if values else "no reward"
        when = f"in {self.bar.total} steps, {time.time() - self.started:.0f} s"
        print(f"{learned} {when}; {self._written()} in {self.folder}", flush=True)

    def finish_evaluation(self) -> None:
        """Print the last line of --eval-only: what was evaluated, and its mean reward."""
        if not self.is_writer:
            return
        self.bar.close()
        self.files["trace"].write("]\n")
        result = f"{self.held_out[-1]:.3f}" if self.held_out else "none, no answer could be judged"
        files = f"metrics and samples are in {self.folder}"
        print(f"held-out reward of {self.evaluated_model}: {result}; {files}", flush=True)

    def positions(self) -> dict[str, float]:
        """Return where the files of the record stand, for a checkpoint.

        They are on the disk then: should the machine be lost, the checkpoint still fits to them.
        """
        for file in self.files.values():
            os.fsync(file.fileno())
        sizes = {name: os.fstat(file.fileno()).st_size for name, file in self.files.items()}
        return {"elapsed_s": time.time() - self.started, **sizes}

    # --- what a reader sees -----------------------------------------------------------------------

    def say(self, text: str) -> None:
        """Print one line above the progress bar."""
        if self.is_writer:
            self.bar.write(text, file=sys.stderr)

    def log_eval(
        self, step: int, samples: list[Sample], metrics: dict, *, is_alone: bool = True
    ) -> dict:
        """Print an evaluation's metrics and write its first answers; return the metrics.

        samples.jsonl gets the first answers to prompts of each held-out set. is_alone: engines did
        nothing else meanwhile; the timeline then shows this time as an evaluation.
        """
        if not samples:
            return {}
        if is_alone:
            self.evaluated = (self.spans_end, time.time())
        self.say(f"step {step:4d}  {describe_evaluation(samples, metrics)}")
        self._append_samples(step, samples, split="held-out")
        return metrics

    def log_samples(self, step: int, samples: list[Sample]) -> None:
        """Write a few answers of steps 1 and --steps, and of every --eval-every.

        They are the first answers to several prompts of each source.
        """
        if step in (1, self.settings.steps) or step % self.settings.eval_every == 0:
            ordered = sorted(samples, key=lambda sample: (sample.index, sample.group))
            self._append_samples(step, ordered, split="train")

    def _append_samples(self, step: int, samples: list[Sample], *, split: str) -> None:
        written = collections.Counter()
        for sample in samples if self.is_writer else ():
            written[sample.source] += 1
            if written[sample.source] > SHOWN_ANSWERS:
                continue
            row = {"step": step, "split": split}
            for name in ("prompt", "response", "label", "reward", "source"):
                row[name] = getattr(sample, name)
            row |= {"error": sample.error} if sample.error else {}
            self.files["samples"].write(json.dumps(row, ensure_ascii=False) + "\n")

    def _remember(self, metrics: dict) -> None:
        """Keep what the last line tells of a row of metrics."""
        if "held_out" in metrics:
            self.held_out.append(metrics["held_out"])
        if "reward" in metrics:
            self.rewards.append(metrics["reward"])

    def _show(self, metrics: dict) -> None:
        """Move the progress bar on by a step."""
        reward = f"reward {metrics['reward']:.2f}" if "reward" in metrics else "no reward"
        least_s = SHOWN_SHARE * metrics.get("step_s", 0)
        seconds = {stage: metrics[f"{stage}_s"] for stage in STAGES if f"{stage}_s" in metrics}
        shown = [stage for stage, s in seconds.items() if stage != "reward" or s >= least_s]
        stages = "  ".join(f"{stage} {seconds[stage]:.2f} s" for stage in shown)
        self.bar.set_postfix_str(f"{reward}  {stages}", refresh=False)
        self.bar.update()

    def _write_spans(self, spans: list[Span], rank: int, row: str) -> None:
        for activity, start, end in spans:
            at, length = round((start - self.started) * 1e6), round((end - start) * 1e6)
            event = {"name": activity, "ph": "X", "ts": at, "dur": length}  # in microseconds
            event |= {"pid": rank, "tid": ROWS.index(row)}
            self.files["trace"].write(",\n" + json.dumps(event))

    def _end_profile(self, step: int) -> None:
        if self.profiler:
            self.profiler.stop()
            (self.folder / "profile").mkdir(exist_ok=True)
            file = self.folder / "profile" / f"step-{step}-rank-{self.group.rank()}.json"
            self.profiler.export_chrome_trace(str(file))
            self.profiler = None

    def _written(self) -> str:
        """Name what a reader finds in the run folder: "metrics, samples and weights are"."""
        names = ["metrics"]
        if self.positions()["samples"]:
            names.append("samples")
        whole = ("config.json", "adapter_config.json")
        if any((folder / name).exists() for folder in self.exports().values() for name in whole):
            names.append("weights")
        *others, last = names
        return f"{', '.join(others)} and {last} are" if others else "metrics are"
