"""Training state -> disk -> training state: a run that was stopped goes on as if it had not been.

    runs/NAME/checkpoints/step-000040/
        model/          weights, FP32 main weights, Adam state and schedule, by megatron-core's
                        dist_checkpointing: any layout of ranks can read them. With LoRA those of
                        the adapters
        state.json      the step, where the record's files stood, and of every rank: random
                        generators, prompts taken, groups in flight
        files.json      size and CRC-32 of every file

A checkpoint is written as step-000040.part and renamed when it is whole. Only then older ones are
removed. So a full disk, a kill or a lost machine leaves the one before intact. On several nodes
runs/ must be a file system that all of them see; harness/run_folder.py looks. A checkpoint is whole
only if every file is there that .metadata names.

A checkpoint from elsewhere runs no code. Random generators are base64 in JSON. torch reads the
tensors with weights_only. One file of dist_checkpointing is unpickled otherwise: .metadata. An
unpickler that knows only the classes of such a file reads it here first.

Everything that the next step depends on is restored. The engine is not saved: its weights come with
the first weight update, and each request has a seed of its own (rollout.sampling_params). Groups in
flight, in the asynchronous loop, are saved with their answers if they are finished. The others are
asked again, in their old place.
"""

import dataclasses
import json
import os
import pickle
import shutil
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from backends.megatron.model import generators, set_generators
from backends.megatron.state import load_state, save_state
from common import process_groups
from common.distributed import all_gather_bytes
from common.errors import BadInput, EngineDied, read_file, read_json
from data.remote_reward import is_url
from harness.checks import is_async
from harness.run_folder import FILES, checkpoints_of, has_whole_rows, remove_parts, step_of

# With other values weights would be rounded, or have no place.
WEIGHTS_MUST_AGREE = tuple(("train", name) for name in ("train_dtype", "lora_rank", "lora_alpha"))
# With other values other prompts would follow, or samples of one run would have rewards of two
# kinds. All other settings may change.
MUST_AGREE = WEIGHTS_MUST_AGREE + (
    ("run", "seed"),
    ("rollout", "samples_per_prompt"),
    ("rollout", "deal"),
    ("reward", "reward"),
    ("train", "freeze_moe_router"),  # frozen weights have no optimizer state
)
# With other values the groups in flight would have no place, be too old, or be sampled otherwise.
ASYNC_MUST_AGREE = (
    ("in_flight", "rollout_ranks"),
    ("in_flight", "max_staleness"),
    ("rollout", "engine_tp"),
    ("rollout", "temperature"),
    ("rollout", "max_response_tokens"),
    ("rollout", "stop"),
    ("train", "routing_replay"),
    ("tools", "max_turns"),  # of examples/tool_use_async.py; the loops have none
)
# Where the prompts of a step follow from its number: with --max-epochs, and with --deal room.
NUMBERED_MUST_AGREE = (("rollout", "prompts_per_step"),)
READ_FILES = ("*.safetensors", "*.json", "tokenizer*", "chat_template*", "vocab.*", "merges.txt")
STATE = "state.json"
_RANKS = Annotated[list[dict], msgspec.Meta(min_length=1)]
_FIELDS = dict(step=int, loop=str, settings=dict[str, dict], read=dict, record=dict[str, float])
_State = msgspec.defstruct("_State", [*_FIELDS.items(), ("ranks", _RANKS)])  # of state.json


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint, as found on disk."""

    folder: Path
    step: int
    state: dict

    @property
    def ranks(self) -> list[dict]:
        """What each rank gave to save."""
        return self.state["ranks"]


# --- finding ------------------------------------------------------------------------------------


def describe_damage(folder: Path, *, share: int = 0, of: int = 1) -> str:
    """Say what is wrong with a checkpoint's files; "" if nothing is.

    Every file's size is compared. Of each of-th file, from the share-th on, the contents are too.
    """
    try:
        written = read_file(folder / "files.json")
        files = msgspec.json.decode(written, type=dict[str, tuple[int, int]])
        if STATE not in files:
            return f"files.json does not list {STATE}"
    except (BadInput, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return f"files.json cannot be read ({error})"
    for i, (name, (size, crc)) in enumerate(files.items()):
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, and was written with {size}"
        if i % of == share and _crc(path) != crc:
            return f"{name} has other contents than were written"
    try:
        return missing_part(folder)
    except Exception as error:  # an unpickler may raise anything, and all of it is about this file
        return f"not safe to read: model/.metadata: {error}"


def missing_part(folder: Path) -> str:
    """Name the first file that model/.metadata lists and that is not there; "" if all are.

    Each rank writes files of its own. On a file system of its own, no other rank finds them.
    """
    with open(folder / "model" / ".metadata", "rb") as file:
        places = _MetadataUnpickler(file).load().storage_data.values()
    names = sorted({f"model/{place.relative_path}" for place in places})
    return next((f"{name} is missing" for name in names if not (folder / name).is_file()), "")


class _MetadataUnpickler(pickle.Unpickler):
    """Reads .metadata, and refuses to import what is not part of one."""

    allowed = {
        "torch.distributed.checkpoint.metadata": (
            "Metadata MetadataIndex StorageMeta TensorStorageMetadata BytesStorageMetadata"
            " ChunkStorageMetadata TensorProperties _MEM_FORMAT_ENCODING"
        ),
        "torch.distributed.checkpoint.planner": "SavePlan WriteItem WriteItemType TensorWriteData",
        "torch.distributed.checkpoint.filesystem": "_StorageInfo",
        "torch.serialization": "_get_layout",
        "torch": "Size bfloat16 float16 float32 float64 int32 int64 uint8 bool",
    }

    def find_class(self, module: str, name: str):
        if name not in self.allowed.get(module, "").split():
            raise pickle.UnpicklingError(
                f"it names {module}.{name}, which is no part of a checkpoint"
            )
        return super().find_class(module, name)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Return a checkpoint that is whole and safe to read. Raises BadInput.

    The ranks share the reading: each compares the contents of some of the files.
    """
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if wrong := describe_damage(folder, share=rank, of=ranks):
        older = ", which there is none"
        for other in reversed(checkpoints_of(folder.parent.parent)):
            if step_of(other) < step_of(folder) and not describe_damage(other):
                older = f"; {other.name} before it is whole"
                break
        raise BadInput(
            f"the checkpoint {folder} is damaged: {wrong}. Remove that folder to resume from the"
            f" one before{older}"
        )
    state = _state_of(folder)
    return Checkpoint(folder, state["step"], state)


def _state_of(folder: Path) -> dict:
    """Return state.json. Raises BadInput where another version wrote it, or for another step."""
    try:
        text = (folder / STATE).read_bytes()
        msgspec.json.decode(text, type=_State)
        state = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        found = f"{folder / STATE} is not as this version writes it ({error})"
        raise BadInput(f"{found}: resume it with the version that wrote it") from error
    if state["step"] != step_of(folder):
        fix = f"give the folder its name back, step-{state['step']:06d}, or remove it"
        raise BadInput(f"{folder} holds step {state['step']}, not the step of its name: {fix}")
    return state


def what_was_read(settings, data) -> dict[str, str]:
    """Return checksums of what the run reads, by the flag that names it.

    They must be the same when the run goes on, wherever the files then are. Of weights only parts
    are read, see folder_digest. data: prompts.Data.
    """
    folders = {"--model": settings.run.model}
    if settings.loss.kl_coef:
        folders["--reference"] = settings.train.reference or settings.run.model
    digests = {flag: folder_digest(Path(folder)) for flag, folder in folders.items()}
    return {"--prompts": data.digest, **digests}


def folder_digest(folder: Path) -> str:
    """Return a checksum of a model folder.

    It covers configuration and tokenizer, and of each weights file the size, the head and up to 64
    parts of 64 KiB.
    """
    crc = 0
    if not os.path.isdir(folder):  # another check names it
        return f"{crc:08x}"
    files = {path for pattern in READ_FILES for path in folder.glob(pattern) if path.is_file()}
    for path in sorted(files):
        crc = zlib.crc32(path.name.encode(), crc)
        if path.suffix != ".safetensors":
            crc = _crc(path, crc)
            continue
        size = path.stat().st_size
        crc = zlib.crc32(str(size).encode(), crc)
        with open(path, "rb") as file:
            for start in range(0, size, max(2**16, size // 64)):
                file.seek(start)
                crc = zlib.crc32(file.read(2**16), crc)
    return f"{crc:08x}"


def newest_whole(run_folder: Path) -> Checkpoint | None:
    """Return the newest checkpoint that is whole; None where there is none at all. Collective.

    All ranks get the same, though each reads a share of the files, and may see a new folder late.
    Raises BadInput if all are damaged: a run that starts afresh would be long in coming that far.
    """
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    names = json.dumps([folder.name for folder in checkpoints_of(run_folder)])
    names, damage = json.loads(process_groups.exchange("checkpoints", names)[0]), ""
    for name in reversed(names):
        folder = run_folder / "checkpoints" / name
        damages = process_groups.exchange(name, describe_damage(folder, share=rank, of=ranks))
        if not any(damages):
            state = _state_of(folder)
            return Checkpoint(folder, state["step"], state)
        found = f"{name}: {next(filter(None, damages))}"
        damage = damage or found
        if rank == 0:
            print(f"a damaged checkpoint is passed over, {found}", file=sys.stderr, flush=True)
    if damage:
        fix = "bring one back, or choose another --name to start afresh"
        raise BadInput(f"no checkpoint of {run_folder} is whole, the newest {damage}: {fix}")
    return None


def find_latest_checkpoint(settings, loop: str, read: dict[str, str]) -> Checkpoint | None:
    """Return the newest checkpoint of the run --name, checked. read: what_was_read.

    Raises BadInput where there is none, where it is damaged, where it is of another run than
    settings and files describe, or where no step is left. With --resume auto a damaged one is
    passed over, and None stands for none; all ranks must call this then.
    """
    run_folder = Path("runs") / settings.run.name
    if is_auto := settings.run.resume == "auto":
        newest = newest_whole(run_folder)
        if newest is None:
            return None
    elif not (folders := checkpoints_of(run_folder)):
        raise BadInput(
            f"{run_folder} holds no checkpoint to resume from: run with --save-every N first, or"
            " leave --resume out and choose another --name"
        )
    about = run_folder / "settings.json"  # it is written anew
    if os.path.lexists(about) and not isinstance(read_json(about), dict):
        raise BadInput(f"{about} is no object: remove it")
    if not is_auto:
        newest = open_checkpoint(folders[-1])
    if newest.state["loop"] != loop:
        fix = "resume it with the script that wrote it"
        raise BadInput(f"{newest.folder} is of the {newest.state['loop']} loop: {fix}")
    problems = _evaluation_problems if settings.run.eval_only else _resume_problems
    for problem in problems(newest, settings, read):
        raise BadInput(problem)
    return newest


def _evaluation_problems(newest: Checkpoint, settings, read: dict[str, str]) -> Iterator[str]:
    """Yield what keeps --eval-only from reading the weights of a checkpoint, and no more of it."""
    yield from _other_settings(newest, settings, WEIGHTS_MUST_AGREE)
    yield from _other_files(newest, {flag: x for flag, x in read.items() if flag == "--model"})
    yield from _other_experts(newest, settings)


def _resume_problems(newest: Checkpoint, settings, read: dict[str, str]) -> Iterator[str]:
    """Yield what keeps a run from going on where the checkpoint was."""
    state, folder, run_folder = newest.state, newest.folder, Path("runs") / settings.run.name
    agree = MUST_AGREE + ASYNC_MUST_AGREE * is_async(settings)
    is_numbered = settings.rollout.deal == "room"
    agree += NUMBERED_MUST_AGREE * (is_numbered or settings.run.max_epochs > 0)
    yield from _other_settings(newest, settings, agree)
    if state["settings"].get("run", {}).get("load_rollouts") and not settings.run.load_rollouts:
        about = f"{folder} was written with --load-rollouts, and says nothing of prompts in flight"
        yield f"{about}: go on with --load-rollouts, or start a new run"
    yield from _other_files(newest, read)
    steps = settings.run.steps
    only_ends = process_groups.goes_on() or settings.run.resume == "auto"  # what is left: exports
    if steps < newest.step or (steps == newest.step and not only_ends):
        given, fix = f"--steps {steps} counts all steps of the run", "use a larger --steps"
        if epochs := settings.run.max_epochs:
            given = f"--max-epochs {epochs} and --steps end the run after step {steps}"
            fix = "use larger ones"
        yield f"{given}, and {folder} is of step {newest.step}: nothing is left to do; {fix}"
    for name, size in state["record"].items():
        if name not in FILES:
            continue
        file = run_folder / FILES[name]
        if not file.is_file() or file.stat().st_size < size:
            yield (
                f"{file} is shorter than it was when {folder} was written, {size} bytes: bring it"
                " back, or start a new run under another --name"
            )
    if not has_whole_rows(run_folder, size=state["record"].get("metrics", 0)):
        metrics = run_folder / FILES["metrics"]
        about = f"{metrics} no longer begins with the rows that {folder} followed"
        yield f"{about}: bring them back, or start a new run under another --name"
    if any("in_flight" in rank and "discarded" not in rank for rank in state["ranks"]):
        about = f"{folder} has groups in flight as an older version wrote them"
        yield f"{about}: resume it with that version, or start a new run"
    yield from _other_experts(newest, settings)


def _other_settings(newest: Checkpoint, settings, agree: tuple) -> Iterator[str]:
    """Yield the settings that must agree, (stage, name) each, and do not."""
    both = (json.loads(json.dumps(dataclasses.asdict(x))) for x in (settings, type(settings)()))
    asked, defaults = both  # with lists for tuples, as in the file
    for stage, name in agree:
        now = asked.get(stage, {}).get(name)
        default = defaults.get(stage, {}).get(name)  # of what an older version did not ask
        then = newest.state["settings"].get(stage, {}).get(name, default)
        if name == "reward" and is_url(str(then)) and is_url(str(now)):
            continue  # a service may have another address now
        if then != now:
            about = f"--{name.replace('_', '-')} was {then!r} when {newest.folder} was written"
            yield f"{about}, and is {now!r}: it must stay the same"


def _other_files(newest: Checkpoint, read: dict[str, str]) -> Iterator[str]:
    """Yield what the run read then and reads otherwise now."""
    for flag, now in read.items():
        if newest.state["read"].get(flag, now) != now:
            same = "the same folder"
            if flag == "--prompts":
                same = "the same rows, with the same keys and chat settings"
            yield (
                f"what {flag} names is not what it was when {newest.folder} was written: give"
                f" {same}, or start a new run under another --name"
            )


def _other_experts(newest: Checkpoint, settings) -> Iterator[str]:
    """Yield a layout of experts that cannot read the optimizer state of another."""
    then, now = newest.state["settings"]["train"]["ep"], settings.train.ep
    if then != now:
        yield (
            f"{newest.folder} was written with --ep {then}: optimizer state of experts can only be"
            f" read with the same, not with --ep {now}"
        )


# --- writing ------------------------------------------------------------------------------------


def save(run, trainer, *, step: int, rank_state: dict) -> None:
    """Write a checkpoint of the step that has just ended, and remove all but the newest --keep.

    Collective over all ranks. run: harness.start.Run. trainer: None on ranks that do not train.
    rank_state: what this rank must be given again, as JSON. Raises RuntimeError when it cannot be
    written, the disk being full; the checkpoints before stay.
    """
    record, settings = run.record, run.settings
    final = record.folder / "checkpoints" / f"step-{step:06d}"
    part = final.with_suffix(".part")
    try:
        if record.is_writer:
            remove_parts(record.folder)
            (part / "model").mkdir(parents=True)
        all_gather_bytes(b"", record.group)  # the folder is there
        if trainer is not None:
            save_state(trainer, part / "model")
            rank_state = {**rank_state, "generators": generators()}
        states = all_gather_bytes(json.dumps(rank_state).encode(), record.group)
        if record.is_writer:
            if lost := trainer is not None and missing_part(part):
                elsewhere = "a rank wrote it elsewhere, and runs/ must be the same for all"
                raise FileNotFoundError(f"{lost}; {elsewhere}")
            state = {"step": step, "loop": record.loop, "settings": dataclasses.asdict(settings)}
            state |= {"read": run.inputs, "record": record.positions()}
            state |= {"ranks": [json.loads(of_rank) for of_rank in states]}
            _finish(part, final, state)
            for old in checkpoints_of(record.folder)[: -settings.run.keep]:
                shutil.rmtree(old)
    except EngineDied:  # by a signal, wherever this rank was
        raise
    except (Exception, CheckpointException) as error:  # whatever disk or writers raise
        before = checkpoints_of(record.folder)
        rest = f"{before[-1].name} is whole" if before else "there is none before it"
        reason = error
        if isinstance(error, CheckpointException):
            reason = next(iter(error.failures.values()))[0]
        raise RuntimeError(
            f"the checkpoint of step {step} could not be written ({reason}); {rest}. Is the disk"
            " full?"
        ) from error
    all_gather_bytes(b"", record.group)  # no rank goes on, and perhaps ends, before it is whole


def _finish(part: Path, final: Path, state: dict) -> None:
    """Write the files that list the others, and give the checkpoint its name."""
    (part / STATE).write_text(json.dumps(state) + "\n", encoding="utf-8")
    files = sorted(path for path in part.rglob("*") if path.is_file())
    listed = {str(path.relative_to(part)): (path.stat().st_size, _crc(path)) for path in files}
    (part / "files.json").write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")
    # A machine that is lost now must not leave the name without the contents. The writers of
    # model/ have seen to their own files.
    for path in (part / STATE, part / "files.json", part):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    shutil.rmtree(final, ignore_errors=True)
    part.rename(final)


def restore(checkpoint: Checkpoint | None, trainer) -> None:
    """Fill the trainer and set this rank's random generators. Collective over the trainers.

    Does nothing on other ranks, or without a checkpoint.
    """
    if checkpoint is None or trainer is None:
        return
    load_state(trainer, checkpoint.folder / "model")
    trainers = [state["generators"] for state in checkpoint.ranks if "generators" in state]
    rank = dist.get_rank()
    set_generators(trainers[rank if rank < len(trainers) else 0])


def _crc(path: Path, crc: int = 0) -> int:
    with open(path, "rb") as file:
        while block := file.read(2**24):
            crc = zlib.crc32(block, crc)
    return crc
