"""A run on paper: what every GPU must hold, whether it fits, how long a weight update takes.

    python loop_sync.py --plan --model docs/configs/Qwen3-4B --plan-gpus 8 --tp 2

needs no torchrun, no weights and no GPU: a folder with config.json is enough. If the layout does
not fit, the nearest one that does is named (layouts.py). Times are estimates at given bandwidths. A
GB is 1e9 bytes.

The same arithmetic refuses a real start that its machine has no room for: check_machine.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from backends.huggingface.config import check_layout, read_config
from backends.sglang.checks import cache_tokens, check_environment, server_overrides
from backends.sglang.gpu import MEM_FRACTION_STATIC, check_gpus
from common import hub
from common.errors import BadInput, ProblemList, all_problems
from common.settings import PlanSettings
from harness.checks import is_async
from harness.layouts import (
    RECOMPUTE,
    RUNTIME_BYTES,
    EngineSizes,
    Plan,
    TrainerSizes,
    engine_sizes,
    nearest,
    peaks,
    trainer_sizes,
)
from harness.memory import checkpoint_bytes, hand_off_bytes, parameters, trained_parameters

# What a process takes without a GPU beside its tensors: Python, torch, and megatron-core in a
# trainer or SGLang in an engine's scheduler.
CPU_PROCESS_BYTES = 0.5e9


def plan_of(
    settings, config: dict, *, world_size: int, trainer_ranks: int, rollout_ranks: int, longest: int
) -> Plan:
    """Return the plan of a loop's settings. Raises BadInput for an --sglang that cannot be.

    longest: tokens of the longest sample.
    """
    overrides = server_overrides(settings.rollout.sglang, on_gpu=True)
    return Plan(
        config=config,
        train=settings.train,
        rollout=settings.rollout,
        trainer_ranks=trainer_ranks,
        rollout_ranks=rollout_ranks,
        colocated=trainer_ranks + rollout_ranks > world_size,
        longest=longest,
        steps_in_flight=settings.in_flight.max_staleness + 1 if is_async(settings) else 1,
        reference=_resident_reference(settings, config),
        bucket_bytes=settings.sync.bucket_bytes,
        keeps_sent=settings.sync.sync == "delta",
        mem_fraction=overrides.get("mem_fraction_static", MEM_FRACTION_STATIC),
        recompute=RECOMPUTE in settings.train.megatron,
    )


def _resident_reference(settings, config: dict) -> dict | None:
    """Return config.json of the reference that stays on the trainers' GPUs; None without one."""
    if settings.loss.kl_coef <= 0 or settings.train.offload_reference:
        return None
    if settings.train.lora_rank and not settings.train.reference:
        return None  # it is the model without its adapters
    return read_config(settings.train.reference) if settings.train.reference else config


# --- how long a weight update takes -------------------------------------------------------------


def hand_off_seconds(
    config: dict,
    sent: dict[str, int],
    *,
    fp8: bool,
    tp: int,
    pp: int,
    ep: int,
    engine_tp: int,
    colocated: bool,
    node_gpus: int,
    memory_bytes_s: float,
    nvlink_bytes_s: float,
    network_bytes_s: float,
) -> dict[str, float]:
    """Return {part of one weight update: seconds} at these bandwidths.

    A gather of B bytes over n ranks takes B (n - 1) / n through the link of one rank: NVLink within
    a node, else the network. There is no latency, no imbalance and no overlap. Tensor-parallel rank
    r of a pipeline stage sends 1 / tp of the stage's bytes to the others.
    sent: what memory.hand_off_bytes returns.
    """

    def gather(nbytes: float, ranks: int) -> float:
        link = nvlink_bytes_s if ranks <= node_gpus else network_bytes_s
        return nbytes * (ranks - 1) / ranks / link

    total = sum(sent.values())
    expert_group = ep if ep > 1 else tp
    others = sent["split"] + sent["whole"]
    from_other_stages = total * (pp - 1) / pp
    # Quantization reads 2 bytes of a BF16 parameter and writes 1.
    quantize = 3 * parameters(config)[0] / (tp * pp) / memory_bytes_s if fp8 else 0
    seconds = {
        "quantize each shard: 3 bytes a parameter through memory": quantize,
        f"gather over tp {tp}, experts over {expert_group}": (
            gather(others / pp, tp) + gather(sent["experts"] / pp, expert_group)
        ),
        f"other stages' parts over the network: 1/{tp} of {pp - 1} stages": (
            from_other_stages / tp / network_bytes_s
        ),
        "gather those parts": gather(from_other_stages, tp),
    }
    if not colocated:
        name = "broadcast from trainer 0 to the engines over the network"
        seconds[name] = total / network_bytes_s
    name = f"{engine_tp} engine ranks read from the first one's memory"
    seconds[name] = gather(total, engine_tp)
    return seconds


# --- what --plan prints -------------------------------------------------------------------------


def report(
    settings, config: dict, *, world_size: int, trainer_ranks: int, rollout_ranks: int, longest: int
) -> None:
    """Print the plan. Raises BadInput if it does not fit, naming the nearest layout that does.

    The keyword arguments are those of plan_of.
    """
    plan = plan_of(
        settings,
        config,
        world_size=world_size,
        trainer_ranks=trainer_ranks,
        rollout_ranks=rollout_ranks,
        longest=longest,
    )
    gpu_bytes = settings.plan.plan_gpu_gb * 1e9
    trainer, engine = trainer_sizes(plan), engine_sizes(plan)
    needs = peaks(plan, trainer, engine)

    total, used = (count / 1e9 for count in parameters(config))
    gpus = f"{plan.gpus} GPU{'s' * (plan.gpus > 1)} of {settings.plan.plan_gpu_gb:g} GB"
    name = hub.name_of(settings.run.model)
    print(f"{name}: {total:.2f}e9 parameters, a token uses {used:.2f}e9; {gpus}")
    _print_trainers(plan, trainer)
    _print_engines(plan, trainer, engine, gpu_bytes=gpu_bytes)
    print("most at a time")
    for phase, nbytes in needs.items():
        _print_row(phase, nbytes, "" if nbytes <= gpu_bytes else "does not fit")
    _print_weight_update(plan, engine, settings.plan)
    trained = trained_parameters(config, lora_rank=plan.train.lora_rank)
    checkpoint = checkpoint_bytes(trained, train_dtype=plan.train.train_dtype)
    kept = f"--keep {settings.run.keep} of them, and one while it is written"
    _print_row("checkpoint", checkpoint, kept)
    if max(needs.values()) > gpu_bytes:
        raise _does_not_fit(plan, needs, gpu_bytes=gpu_bytes, machine=settings.plan)
    print("fits")


def _print_row(name: str, nbytes: float, note: str = "") -> None:
    print(f"  {name:<28}{nbytes / 1e9:10.2f} GB   {note}".rstrip())


def _print_trainers(plan: Plan, trainer: TrainerSizes) -> None:
    train = plan.train
    where = "all" if plan.colocated else f"the first {plan.trainer_ranks}"
    sizes = f"tp {train.tp}, pp {train.pp}, cp {train.cp}, ep {train.ep}, dp {trainer.dp}"
    print(f"trainers on {where} GPUs: {sizes}; the pipeline stage that needs most")
    recomputed = ", recomputed layer by layer" if plan.recompute else ""
    notes = {
        "weights": train.train_dtype,
        "gradients": f"fp32, of adapters of rank {train.lora_rank}" if train.lora_rank else "fp32",
        "optimizer": "fp32, split over ranks with the same parameters",
        "reference": "frozen",
        "activations": f"micro-batches of {trainer.microbatch_tokens} tokens{recomputed}",
        "logits": "and their gradient",
    }
    for name, note in notes.items():
        if trainer.parts[name]:
            _print_row(name, trainer.parts[name], note)


def _print_engines(
    plan: Plan, trainer: TrainerSizes, engine: EngineSizes, *, gpu_bytes: float
) -> None:
    rollout = plan.rollout
    where = "all" if plan.colocated else f"the last {plan.rollout_ranks}"
    sizes = f"tp {rollout.engine_tp}, experts over {rollout.engine_ep}"
    fraction = f"mem_fraction_static {plan.mem_fraction:g}"
    print(f"engines on {where} GPUs: {sizes}; {fraction}")
    _print_row("weights", engine.weights, rollout.rollout_dtype)

    # The cache gets what the weights leave of the engine's share of the free memory.
    free = gpu_bytes - RUNTIME_BYTES
    if plan.colocated:
        free -= trainer.state + RUNTIME_BYTES
    cache = max(plan.mem_fraction * free - engine.weights, 0)
    sample = engine.token_bytes * plan.longest
    tokens, samples = cache / engine.token_bytes, cache // sample
    note = f"room for {tokens:,.0f} tokens: {samples:,.0f} samples of {plan.longest} tokens"
    _print_row("keys and values", cache, note)
    note = f"if {engine.requests} samples are that long, all at a time"
    _print_row("keys and values of the step", sample * engine.requests, note)


def _print_weight_update(plan: Plan, engine: EngineSizes, machine: PlanSettings) -> None:
    train, rollout = plan.train, plan.rollout
    seconds = hand_off_seconds(
        plan.config,
        engine.sent,
        fp8=rollout.rollout_dtype == "fp8",
        tp=train.tp,
        pp=train.pp,
        ep=train.ep,
        engine_tp=rollout.engine_tp,
        colocated=plan.colocated,
        node_gpus=machine.plan_node_gpus,
        memory_bytes_s=machine.plan_memory_gb_s * 1e9,
        nvlink_bytes_s=machine.plan_nvlink_gb_s * 1e9,
        network_bytes_s=machine.plan_network_gb_s * 1e9,
    )
    print("hand-off, checkpoint")
    note = f"{sum(seconds.values()):.2f} s at the given bandwidths, without latencies"
    _print_row("handed over", sum(engine.sent.values()), note)
    if plan.keeps_sent:
        note = "of each trainer: its part of the last update, for --sync delta"
        _print_row("host memory", _kept_bytes(plan, engine), note)


def _kept_bytes(plan: Plan, engine: EngineSizes) -> float:
    """Return what a trainer keeps of the last weight update, where its parts are equally large."""
    return sum(engine.sent.values()) / (plan.train.tp * plan.train.pp) if plan.keeps_sent else 0


def _does_not_fit(
    plan: Plan, needs: dict[str, float], *, gpu_bytes: float, machine: PlanSettings
) -> BadInput:
    """Return the error of a plan that does not fit. It names the nearest layout that does."""
    phase = max(needs, key=needs.get)
    what = f"{needs[phase] / 1e9:.1f} GB to {phase}, of {gpu_bytes / 1e9:g} GB"
    other = nearest(plan, gpu_bytes=gpu_bytes, node_gpus=machine.plan_node_gpus)
    if other:
        fix = f"the nearest layout that does: {other.gpus} GPUs with {other.flags()}"
    else:
        divide = f"with engines that divide --prompts-per-step {plan.rollout.prompts_per_step}"
        fix = f"nor does any other on up to 64 times as many, {divide}: raise that"
        if plan.colocated:
            fix += ", or use loop_async.py, where no GPU holds both"
    return BadInput(f"this layout does not fit: {what}; {fix}")


# --- what a real start is refused for -----------------------------------------------------------


@all_problems
def check_machine(
    settings,
    config: dict | None,
    *,
    world_size: int,
    trainer_ranks: int,
    rollout_ranks: int,
    longest: int | None,
) -> None:
    """Refuse a run whose folder cannot be written, or that this machine has no room for.

    Checks what an engine needs of the machine, the disk, and this rank's share of the memory.
    The keyword arguments are those of plan_of. config and longest are None if they could not be
    found out; what needs them is not checked.
    """
    found = ProblemList()
    disk = found.collect(_writable_folder, settings.run.name) or Path.cwd()
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    engines = min(rollout_ranks, local_ranks) // max(settings.rollout.engine_tp, 1)
    found.collect(
        check_environment,
        config,
        bucket_bytes=settings.sync.bucket_bytes,
        element_bytes=4 if settings.rollout.rollout_dtype == "fp32" else 2,
        engines_here=0 if settings.run.load_rollouts else engines,
    )
    others = len(found.texts)
    rank = int(os.environ.get("RANK", 0))
    index = engine_index(settings, rank, ranks=world_size, rollout_ranks=rollout_ranks)
    found.collect(check_gpus, settings.rollout, has_engine=index is not None)
    has_gpu = len(found.texts) == others
    yield from found.texts
    if config is None:
        return
    yield from _disk_problems(settings, config, disk)
    load = dict(
        world_size=world_size,
        trainer_ranks=trainer_ranks,
        rollout_ranks=rollout_ranks,
        longest=longest,
    )
    plan = _plan_if_possible(settings, config, **load)
    if plan is not None and has_gpu:  # else there is no memory to ask for
        yield from _memory_problems(plan, local_ranks=local_ranks)


def engine_index(settings, rank: int, *, ranks: int, rollout_ranks: int) -> int | None:
    """Return which of the engines a rank starts; None if it starts none.

    The last rollout_ranks of all ranks generate; the first of each --engine-tp starts an engine.
    """
    index, place = divmod(rank - (ranks - rollout_ranks), max(settings.rollout.engine_tp, 1))
    return index if index >= 0 and place == 0 and not settings.run.load_rollouts else None


def _writable_folder(name: str) -> Path:
    """Return the existing folder in which the run's folder will be made. Raises BadInput."""
    folder = Path("runs") / name
    existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if os.path.isdir(existing) and os.access(existing, os.W_OK | os.X_OK):
        return existing
    why = f"because of {existing.resolve()}"
    fix = "run where you may write, or choose --name"
    raise BadInput(f"the run folder {folder} cannot be written, {why}: {fix}")


def _disk_problems(settings, config: dict, disk: Path) -> Iterator[str]:
    """Yield that the run will write more than the disk has free. disk: a folder on it."""
    run = settings.run
    if run.eval_only:
        return
    checkpoints = 0
    if run.save_every or run.resume:
        # A resumed run always writes one after its last step.
        every = run.save_every or run.steps
        written = -(-run.steps // every) if every > 0 else 0
        checkpoints = min(run.keep + 1, written)
    trained = trained_parameters(config, lora_rank=settings.train.lora_rank)
    one = checkpoint_bytes(trained, train_dtype=settings.train.train_dtype)
    exports = [dtype for dtype in run.export if dtype in ("bf16", "fp8")]
    export_bytes = sum(sum(hand_off_bytes(config, dtype=dtype).values()) for dtype in exports)
    if "lora" in run.export:
        export_bytes += trained * (2 if settings.train.train_dtype == "bf16" else 4)
    needed, free = checkpoints * one + export_bytes, shutil.disk_usage(disk).free
    if needed > free:
        kept = f"{checkpoints} checkpoints (--keep and the one being written)"
        what = f"{needed / 1e9:.2f} GB: {kept} and {len(run.export)} exports"
        has = f"{disk.resolve()} has {free / 1e9:.2f} GB free"
        yield f"the run will write {what}; {has}: lower --keep, or run on another disk"


def _plan_if_possible(settings, config: dict, **load) -> Plan | None:
    """Return the plan; None for settings that cannot work, which other checks refuse.

    load: the keyword arguments of plan_of.
    """
    train, rollout = settings.train, settings.rollout
    counts = (
        train.minibatches,
        train.microbatch_tokens,
        rollout.prompts_per_step,
        rollout.samples_per_prompt,
        rollout.engine_tp,
        rollout.engine_ep,
        load["trainer_ranks"],
        load["rollout_ranks"],
    )
    if load["longest"] is None or min(counts) < 1:
        return None
    sizes = dict(tp=train.tp, pp=train.pp, cp=train.cp, ep=train.ep)
    try:
        check_layout(config, world_size=load["trainer_ranks"], **sizes)
        return plan_of(settings, config, **load)
    except BadInput:
        return None


def _memory_problems(plan: Plan, *, local_ranks: int) -> Iterator[str]:
    """Yield that a rank needs more memory than this machine has free for it."""
    trainer, engine = trainer_sizes(plan), engine_sizes(plan)
    if torch.cuda.is_available():
        needs = peaks(plan, trainer, engine)
        free_bytes, _ = torch.cuda.mem_get_info(int(os.environ["LOCAL_RANK"]))
        where = "this rank's GPU has free"
    else:
        needs = _peaks_without_gpu(plan, trainer, engine)
        free_bytes = psutil.virtual_memory().available / local_ranks
        where = f"this machine has free for each of its {local_ranks} ranks"
    phase = max(needs, key=needs.get)
    if needs[phase] > free_bytes:
        need = f"a rank needs about {needs[phase] / 1e9:.2f} GB to {phase}"
        has = f"{where} {free_bytes / 1e9:.2f} GB"
        yield f"{need}; {has}: --plan shows what takes it, and a layout that fits"


def _peaks_without_gpu(plan: Plan, trainer: TrainerSizes, engine: EngineSizes) -> dict[str, float]:
    """Return {phase: bytes} as peaks() does. Without a GPU an engine never releases its memory."""
    from backends.cpu.sglang import SERVER_ARGS

    trainer_bytes = CPU_PROCESS_BYTES + trainer.state + trainer.computing
    trainer_bytes += _kept_bytes(plan, engine)
    cached = min(cache_tokens(engine.requests, plan.longest), SERVER_ARGS["max_total_tokens"])
    engine_bytes = CPU_PROCESS_BYTES + engine.weights + engine.token_bytes * cached
    if plan.colocated:
        return {"train": trainer_bytes + engine_bytes}
    return {"train": trainer_bytes, "generate": engine_bytes}
