"""The record of a run: its folder, its metrics and timeline, and the progress bar.

    runs/NAME/settings.json    every setting as resolved, versions and the command line
    runs/NAME/metrics.jsonl    one object a step; README.md explains each key
    runs/NAME/samples.jsonl    a few answers of training steps and evaluations, with their rewards
    runs/NAME/trace.json       what every rank did when, in Chrome's trace format: open it at ui.perfetto.dev
    runs/NAME/rollouts/        with --save-rollouts: every sample of every step, what --load-rollouts reads
    runs/NAME/profile/         with --profile: PyTorch's profile of chosen steps
    runs/NAME/lock             who writes here now: a second run of this name is refused
    runs/NAME/checkpoints/     what --resume goes on from; see checkpoint.py
    runs/NAME/model-bf16/      the trained weights as a Hugging Face folder

Only global rank 0 writes, profiles excepted. Lines are flushed as they are written, so that
whatever ends a run, the record up to then is there.
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

from common import process_groups
from common.distributed import all_gather_bytes, broadcast_bytes
from common.errors import read_json
from common.timeline import Stopwatch, renamed
from harness import exits
from harness.run_folder import (
    FILES,
    check_shared,
    lock_run_folder,
    new_run_folder,
    remove_parts,
    unwritable,
)

ROWS = ("trainer", "engine", "judge")  # of each rank's part of the timeline
SHOWN_ANSWERS = 8  # of each source, in samples.jsonl, a step
SHOWN_SHARE = 0.1  # of a step: the bar shows a reward stage that takes this much of it
STAGES = ("rollout", "wait", "reward", "train", "sync")
NOTHING_TO_LEARN = (
    "step {step}: the rewards of each prompt's answers are all equal (mean {reward:.3f}), so"
    " nothing was learned. Compare answers and labels in samples.jsonl; look at --reward,"
    " --label-key, --label-after, and --max-response-tokens ({truncated:.0%} of the answers were"
    " cut off)"
)


class Record:
    """The run folder and the progress bar. group: all ranks of the run; its rank 0, a trainer, is
    the one that writes. trains: whether this rank does.

    resumed: the checkpoint.Checkpoint that the run goes on from: what was written after it is cut
    off.

    On exit W&B's service ends first, when it has sent what it holds.
    """

    def __init__(
        self, settings, loop: str, group: dist.ProcessGroup, trains: bool = True, resumed=None
    ):
        self.group, self.loop, self.trains, self.is_writer = group, loop, trains, group.rank() == 0
        folder, self.evaluated_model = b"", str(resumed.folder if resumed else settings.run.model)
        name = settings.run.name
        if (
            settings.run.eval_only and resumed
        ):  # A record of its own: that of the run stays as it is.
            resumed, name, self.loop = None, "", f"{name}-eval"
        if self.is_writer:
            mine = Path("runs") / name if resumed else new_run_folder(name, self.loop)
            process_groups.remember_run(str(mine.relative_to("runs")))
            self.lock = lock_run_folder(mine)
            remove_parts(mine)
            folder = bytes(mine)
        self.folder = Path(broadcast_bytes(folder, group).decode())
        check_shared(self.folder, group, is_new=not resumed)
        self.name = str(self.folder.relative_to("runs"))
        self.started, self.settings, self.profiler, self.boards, self.end_wandb = (
            time.time(),
            settings.run,
            None,
            [],
            None,
        )
        self.held_out, self.rewards = [], []  # of each evaluation; of each step
        self.resumed, self.first_step = resumed is not None, resumed.step + 1 if resumed else 1
        dropped = 0  # rows that stand behind the checkpoint
        self.spans_end, self.evaluated = time.time(), (0.0, 0.0)
        """Up to when the timeline is; from when to when the last evaluation was."""
        self.stopping, self.stop_signals = False, ""
        """Whether a rank was told to stop while steps are left, and how: the same on all ranks."""
        self.files: dict[str, TextIO] = {}
        if not self.is_writer:
            return
        try:
            for name, file in FILES.items():
                self.files[name] = open(self.folder / file, "a", buffering=1, encoding="utf-8")
            if resumed:
                self.started -= resumed.state["record"]["elapsed_s"]
                dropped = (
                    (self.folder / FILES["metrics"])
                    .read_bytes()[resumed.state["record"]["metrics"] :]
                    .count(b"\n")
                )
                for name, file in self.files.items():
                    file.truncate(resumed.state["record"][name])
                rows = map(
                    json.loads,
                    (self.folder / FILES["metrics"]).read_text(encoding="utf-8").splitlines(),
                )
                for row in rows:
                    self._remember(row)
            else:
                names = [
                    {
                        "name": "process_name",
                        "ph": "M",
                        "pid": rank,
                        "args": {"name": f"rank {rank}"},
                    }
                    for rank in range(group.size())
                ]
                names += [
                    {
                        "name": "thread_name",
                        "ph": "M",
                        "pid": n["pid"],
                        "tid": i,
                        "args": {"name": row},
                    }
                    for n in names
                    for i, row in enumerate(ROWS)
                ]
                self.files["trace"].write("[" + ",\n".join(map(json.dumps, names)))
            if settings.run.save_rollouts:
                (self.folder / "rollouts").mkdir(exist_ok=True)
            versions = {
                name: importlib.metadata.version(name)
                for name in ("torch", "megatron-core", "sglang", "transformers")
            }
            record = {
                "command": sys.argv,
                "world_size": group.size(),
                "versions": versions,
                **dataclasses.asdict(settings),
            }
            if settings.run.wandb:
                record["wandb_id"] = self._wandb_id()
            (self.folder / "settings.json").write_text(
                json.dumps(record, indent=2) + "\n", encoding="utf-8"
            )
        except OSError as error:
            raise unwritable(self.folder, error) from error
        if settings.run.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            board = SummaryWriter(
                self.folder / "tensorboard", purge_step=resumed.step + 1 if resumed else None
            )
            self.boards.append(
                lambda metrics: (
                    [
                        board.add_scalar(key, value, metrics["step"])
                        for key, value in metrics.items()
                    ]
                    and board.flush()
                )
            )
        if settings.run.wandb:
            import wandb

            about = dict(
                name=self.name,
                id=record["wandb_id"],
                resume="allow",
                dir=self.folder,
                config=record,
            )
            wandb_run = wandb.init(project=settings.run.wandb, **about)
            self.boards.append(lambda metrics: wandb_run.log(metrics, step=metrics["step"]))
            self.end_wandb = wandb.teardown
        off = settings.run.eval_only  # A bar of no steps says nothing.
        self.bar = tqdm(
            total=settings.run.steps,
            initial=resumed.step if resumed else 0,
            unit="step",
            dynamic_ncols=True,
            disable=off,
        )
        if resumed:
            rest = (
                f"; the {dropped} rows of metrics.jsonl that followed it are dropped, and written"
                " again"
                if dropped
                else ""
            )
            self.say(f"going on from {resumed.folder}{rest}")

    def _wandb_id(self) -> str:
        """Return W&B's key of this run: that of before --resume, else a new one.

        A name may come again, in another folder; W&B would go on with that run.
        """
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
        return {
            "elapsed_s": time.time() - self.started,
            **{name: os.fstat(file.fileno()).st_size for name, file in self.files.items()},
        }

    def checkpoint_due(self, step: int) -> bool:
        """Say whether a checkpoint is to be written now: every --save-every steps, when told to
        stop, and at the end of a run that has others.

        Without the last one, --resume would go back behind steps that are done.
        """
        every = self.settings.save_every
        is_last = step == self.settings.steps and (every > 0 or self.resumed)
        return bool(self.stop_signals) or is_last or (every > 0 and step % every == 0)

    def exports(self) -> dict[str, Path]:
        """Return {dtype: folder} of --export, of whose weights this rank holds a part: nothing on
        ranks that do not train.
        """
        return {
            dtype: self.folder / f"model-{dtype}" for dtype in self.settings.export if self.trains
        }

    def say(self, text: str) -> None:
        """One line above the progress bar."""
        if self.is_writer:
            self.bar.write(text, file=sys.stderr)

    def profile(self, step: int) -> None:
        """At the end of a step: with --profile, write this rank's profile of it, and begin that of
        the next.
        """
        exits.is_training.set()  # from now on a signal to stop waits for a step's end
        if self.is_writer and step == self.first_step - 1:
            self.bar.unpause()  # the bar's clock runs from the first step on, not from the start
        if self.profiler:
            self.profiler.stop()
            (self.folder / "profile").mkdir(exist_ok=True)
            self.profiler.export_chrome_trace(
                str(self.folder / "profile" / f"step-{step}-rank-{self.group.rank()}.json")
            )
        self.profiler = torch.profiler.profile() if step + 1 in self.settings.profile else None
        if self.profiler:
            self.profiler.start()

    def log(self, metrics: dict) -> None:
        """One line of metrics.jsonl; the bar shows the reward and where the step's time went.

        Collective: whether a rank has been told to stop, all of them know afterwards.
        """
        self.profile(metrics["step"])
        told = b"".join(all_gather_bytes(bytes(exits.told_to_stop[:1]), self.group))
        self.stopping = bool(told) and metrics["step"] < self.settings.steps
        self.stop_signals = " and ".join(sorted({signal.Signals(number).name for number in told}))
        if not self.is_writer:
            return
        for board in self.boards:
            board({key: value for key, value in metrics.items() if isinstance(value, (int, float))})
        self.files["metrics"].write(
            json.dumps({k: round(v, 8) if isinstance(v, float) else v for k, v in metrics.items()})
            + "\n"
        )
        self._remember(metrics)
        if (
            metrics["step"] == self.first_step
            and metrics.get("zero_std_groups") == 1
            and "reward" in metrics
        ):
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
        """Add every rank's step to trace.json; returns the step's seconds and the shares of it that
        trainers and engines wait. Collective: the step's end.

        watch: of the step. engine: None on ranks without one. A trainer waits while it neither
        trains nor hands over weights, for the last rank at the step's end too; an engine waits
        while it generates nothing. Clocks of several machines are taken as they are.
        """
        rows = {"trainer": watch.spans} if self.trains else {}
        of_engine = (
            {"engine": engine.timeline.pop_spans(), "judge": judge.timeline.pop_spans()}
            if engine
            else {}
        )
        rows |= {row: renamed(spans, *self.evaluated) for row, spans in of_engine.items()}
        self.spans_end = time.time()
        ranks = [json.loads(row) for row in all_gather_bytes(json.dumps(rows).encode(), self.group)]
        if not self.is_writer:
            return {}
        for rank, rows in enumerate(ranks):
            for row, spans in rows.items():
                for stage, start, end in spans:
                    times = {
                        "ts": round((start - self.started) * 1e6),
                        "dur": round((end - start) * 1e6),
                    }  # microseconds
                    self.files["trace"].write(
                        ",\n"
                        + json.dumps(
                            {"name": stage, "ph": "X", **times, "pid": rank, "tid": ROWS.index(row)}
                        )
                    )

        def waiting(row: str, busy: tuple[str, ...]) -> float:
            rows = [rank[row] for rank in ranks if row in rank]
            busy_s = sum(
                max(min(end, ended) - max(start, watch.started), 0)
                for spans in rows
                for stage, start, end in spans
                if stage in busy
            )
            return 1 - busy_s / len(rows) / step_s if rows else 1.0

        ended = time.time()
        step_s = ended - watch.started
        return {
            "step_s": step_s,
            "trainer_wait": waiting("trainer", ("train", "sync")),
            "engine_wait": waiting("engine", ("rollout",)),
        }

    def finish_evaluation(self) -> None:
        """Print the last line of a run with --eval-only: what was evaluated, and its mean reward."""
        if not self.is_writer:
            return
        self.bar.close()
        self.files["trace"].write("]\n")
        result = f"{self.held_out[-1]:.3f}" if self.held_out else "none, no answer could be judged"
        files = f"metrics and samples are in {self.folder}"
        print(f"held-out reward of {self.evaluated_model}: {result}; {files}", flush=True)

    def log_eval(self, step: int, samples: list, metrics: dict) -> dict:
        """An evaluation's metrics on the console and as metrics of the step, the first answers from
        each held-out set in samples.jsonl.
        """
        if not samples:
            return {"step": step}
        self.evaluated = (self.spans_end, time.time())
        prompts, n = (
            len({sample.group for sample in samples}),
            1 + max(sample.index for sample in samples),
        )
        shown = [
            key
            for key in metrics
            if key.startswith("held_out/") or n > 1 and key in (f"pass@{n}", f"majority@{n}")
        ]
        more = "".join(f"  {key.removeprefix('held_out/')} {metrics[key]:.3f}" for key in shown)
        if errors := metrics.get("held_out_errors"):
            error = next(sample.error for sample in samples if sample.reward is None)
            more += (
                f"  {errors} of {len(samples)} answers could not be judged, the first:"
                f" {error[:200]}"
            )
        if "held_out" in metrics:
            self.say(
                f"step {step:4d}  held-out reward {metrics['held_out']:.3f} on {prompts}"
                f" prompts{more}"
            )
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
                row = {
                    "step": step,
                    "split": split,
                    "prompt": sample.prompt,
                    "response": sample.response,
                }
                row |= {"label": sample.label, "reward": sample.reward, "source": sample.source}
                row |= {"error": sample.error} if sample.error else {}
                self.files["samples"].write(json.dumps(row, ensure_ascii=False) + "\n")

    def finish(self) -> None:
        """The last line: what was learned, and where the record is; or how to go on."""
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

    def _written(self) -> str:
        """Name what a reader finds in the run folder: "metrics, samples and weights are"."""
        names = ["metrics"]
        if self.positions()["samples"]:
            names.append("samples")
        if any((folder / "config.json").exists() for folder in self.exports().values()):
            names.append("weights")
        *others, last = names
        return f"{', '.join(others)} and {last} are" if others else "metrics are"
