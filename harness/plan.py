"""A run on paper: what every GPU must hold, whether it fits, how long a hand-off takes at given
bandwidths, and the nearest layout that fits.

    python loop_sync.py --plan --model docs/configs/Qwen3-4B --plan-gpus 8 --tp 2        without torchrun, weights or GPU: a folder with config.json is enough

The same arithmetic (memory.py) refuses a real start that its machine has no room for.

Synchronous loop: the trainer's weights, gradients and optimizer state stay where they are while the
engine generates, and the engine's memory is released while the trainer computes. So there are three
peaks: train; hand-off, where the engine's weights are back but not its cache; generate.
Asynchronous loop: trainers and engines have GPUs of their own. A GB is 1e9 bytes. Assumed, not
measured: RUNTIME_BYTES; that experts get equally many tokens; that attention keeps no scores (flash
attention).
"""

import contextlib
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import psutil
import torch

from backends.huggingface.config import check_layout
from backends.sglang.checks import check_environment, server_overrides
from backends.sglang.launch import MEM_FRACTION_STATIC
from common.errors import BadInput, ProblemList, all_problems
from harness.memory import (
    checkpoint_bytes,
    embedding_parameters,
    engine_bytes,
    hand_off_bytes,
    parameters,
    state_bytes,
    trainer_bytes,
)

# On a GPU and process: CUDA context and libraries, NCCL's buffers, what the allocators waste
RUNTIME_BYTES = 3e9
# Of a trainer, or of an engine's scheduler, without a GPU: Python, torch, megatron-core or SGLang
CPU_PROCESS_BYTES = 0.5e9
BUCKETS = (
    9,
    4,
    # Of a hand-off, at a time: on a trainer with an engine, and on a rank that receives
    # (bench/weight_sync.py, and one that the engine loads)
)


# --- does it fit --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """A layout and its load. settings: a loop's."""

    config: dict
    train: object
    """TrainSettings, as the next RolloutSettings."""
    rollout: object
    trainer_ranks: int
    rollout_ranks: int
    colocated: bool
    longest: int
    """Tokens of the longest sample."""
    steps_in_flight: int
    """Steps whose requests the engines hold at a time."""
    reference: bool
    bucket_bytes: int
    static: float
    """SGLang's mem_fraction_static."""
    recompute: bool

    @property
    def gpus(self) -> int:
        return self.trainer_ranks if self.colocated else self.trainer_ranks + self.rollout_ranks

    def flags(self) -> str:
        """What to write on the command line."""
        train, rollout = self.train, self.rollout
        flags = (
            f"--tp {train.tp} --pp {train.pp} --cp {train.cp} --ep {train.ep} --engine-tp"
            f" {rollout.engine_tp} --engine-ep {rollout.engine_ep}"
        )
        flags += "" if self.colocated else f" --rollout-ranks {self.rollout_ranks}"
        flags += f" --sglang mem_fraction_static={self.static:g}"
        return flags + (
            " --megatron recompute_granularity=full recompute_method=uniform recompute_num_layers=1"
            if self.recompute
            else ""
        )


def plan_of(
    settings, config: dict, *, world_size: int, trainer_ranks: int, rollout_ranks: int, longest: int
) -> Plan:
    """The plan of a loop's settings. Raises BadInput for an --sglang that cannot be."""
    static = server_overrides(settings.rollout.sglang, on_gpu=True).get(
        "mem_fraction_static", MEM_FRACTION_STATIC
    )
    return Plan(
        config, settings.train, settings.rollout, trainer_ranks, rollout_ranks, trainer_ranks + rollout_ranks > world_size, longest,
        steps_in_flight=settings.in_flight.max_staleness + 1 if hasattr(settings, "in_flight") else 1,
        reference=settings.loss.kl_coef > 0 and not settings.train.offload_reference, bucket_bytes=settings.sync.bucket_bytes,
        static=static, recompute="recompute_granularity=full" in settings.train.megatron,
    )  # fmt: skip


def trainer_sizes(plan: Plan) -> dict[str, float]:
    """Bytes on a trainer, and the counts that they come from."""
    train = plan.train
    dp = plan.trainer_ranks // (train.tp * train.pp * train.cp)
    tokens = -(
        -plan.rollout.prompts_per_step
        * plan.rollout.samples_per_prompt
        * plan.longest
        // (dp * train.cp * train.minibatches)
    )  # of an optimizer step
    microbatch = max(min(tokens, train.microbatch_tokens), 1)
    trainer = trainer_bytes(
        plan.config, ranks=plan.trainer_ranks, tp=train.tp, pp=train.pp, ep=train.ep, element_bytes=2 if train.train_dtype == "bf16" else 4,
        tokens=microbatch, microbatches=-(-tokens // microbatch), recompute=plan.recompute, reference=plan.reference,
    )  # fmt: skip
    return {**trainer, "state": state_bytes(trainer), "dp": dp, "tokens": microbatch}


def engine_sizes(plan: Plan) -> dict[str, float]:
    """Bytes on an engine's rank, of a hand-off and of its buckets, and how many requests an engine
    holds.
    """
    rollout = plan.rollout
    sent = hand_off_bytes(
        plan.config,
        dtype=rollout.rollout_dtype,
        engine_tp=rollout.engine_tp,
        engine_ep=rollout.engine_ep,
    )
    bucket = plan.bucket_bytes + 2 * embedding_parameters(plan.config)
    return {
        **engine_bytes(plan.config, sent, dtype=rollout.rollout_dtype, engine_tp=rollout.engine_tp), "sent": sent, "buckets": [n * bucket for n in BUCKETS],
        "requests": rollout.prompts_per_step * rollout.samples_per_prompt * rollout.engine_tp * plan.steps_in_flight // plan.rollout_ranks,
    }  # fmt: skip


def peaks(plan: Plan, sizes: dict) -> dict[str, float]:
    """What must be no more than a GPU has, in each phase. sizes: trainer_sizes and engine_sizes
    together.

    SGLang takes its share of what is free when it starts and leaves the rest to what it computes
    with. One sample of the longest kind must find room in its cache; others wait for their turn.
    """
    computing = sizes["activations"] + sizes["logits"]
    static = (sizes["engine"] + sizes["token"] * plan.longest) / plan.static
    resident = sizes["state"] + RUNTIME_BYTES * (2 if plan.colocated else 1)
    if plan.colocated:
        return {
            "train": resident + computing,
            "hand-off": resident + sizes["engine"] + sizes["buckets"][0],
            "generate": resident + static,
        }
    receive = RUNTIME_BYTES + sizes["buckets"][1] / (1 - plan.static)
    return {
        "train": resident + computing,
        "hand-off": resident + sizes["buckets"][0],
        "generate": RUNTIME_BYTES + static,
        "receive": receive,
    }


def engine_layouts(plan: Plan, gpus: int, *, node_gpus: int) -> Iterator[Plan]:
    """The plan on so many GPUs, with each division into trainers and engines and each kind of
    engine that can be.
    """
    config, quarters = (
        plan.config,
        {gpus * plan.rollout_ranks // plan.gpus, *(gpus * i // 4 for i in (1, 2, 3))},
    )
    for rollout_ranks, engine_tp in product(
        [gpus] if plan.colocated else sorted(quarters - {0, gpus}), powers_of_two(node_gpus)
    ):
        divides = [
            config["num_attention_heads"] % engine_tp,
            config["num_key_value_heads"] % engine_tp,
            rollout_ranks % engine_tp,
        ]
        if not any(divides) and plan.rollout.prompts_per_step % (rollout_ranks // engine_tp) == 0:
            for engine_ep in {
                1,
                (
                    engine_tp
                    if config["num_experts"] and config["num_experts"] % engine_tp == 0
                    else 1
                ),
            }:
                rollout = replace(plan.rollout, engine_tp=engine_tp, engine_ep=engine_ep)
                yield replace(
                    plan,
                    rollout=rollout,
                    rollout_ranks=rollout_ranks,
                    trainer_ranks=gpus if plan.colocated else gpus - rollout_ranks,
                )


def trainer_layouts(plan: Plan, *, node_gpus: int) -> Iterator[Plan]:
    """The plan with each layout that its trainers can have, with and without full recomputation."""
    powers, eps = (
        powers_of_two(plan.trainer_ranks),
        powers_of_two(plan.trainer_ranks if plan.config["num_experts"] else 1),
    )
    for tp, pp, ep, recompute in product(
        powers_of_two(min(node_gpus, plan.trainer_ranks)), powers, eps, {plan.recompute, True}
    ):
        with contextlib.suppress(BadInput):
            check_layout(
                plan.config, world_size=plan.trainer_ranks, tp=tp, pp=pp, cp=plan.train.cp, ep=ep
            )
            yield replace(plan, train=replace(plan.train, tp=tp, pp=pp, ep=ep), recompute=recompute)


def powers_of_two(largest: int) -> list[int]:
    return [2**i for i in range(largest.bit_length())]


def distance(a: Plan, b: Plan) -> float:
    """How much one must change to come from one plan to the other: doublings of sizes, and 1 for
    each other kind of change.
    """
    pairs = [
        (
            x.train.tp,
            x.train.pp,
            x.train.ep,
            x.rollout.engine_tp,
            x.rollout.engine_ep,
            x.rollout_ranks / x.gpus,
        )
        for x in (a, b)
    ]
    return (
        sum(abs(math.log2(x / y)) for x, y in zip(*pairs))
        + (a.recompute != b.recompute)
        + (a.static != b.static) * (0.5 + abs(a.static - b.static))
    )


def nearest(plan: Plan, *, gpu_bytes: float, node_gpus: int) -> Plan | None:
    """The layout that fits and differs least: on as many GPUs, else on two, four ... 64 times as
    many; None if there is none.
    """
    for gpus in (plan.gpus * 2**i for i in range(7)):
        fitting, trainers = [], {}
        for engine in engine_layouts(plan, gpus, node_gpus=node_gpus):
            if engine.trainer_ranks not in trainers:
                trainers[engine.trainer_ranks] = [
                    (train, trainer_sizes(train))
                    for train in trainer_layouts(engine, node_gpus=node_gpus)
                ]
            sizes = engine_sizes(engine)
            for (train, more), static in product(
                trainers[engine.trainer_ranks], dict.fromkeys((plan.static, 0.6, 0.7, 0.8, 0.9))
            ):
                candidate = replace(
                    engine, train=train.train, recompute=train.recompute, static=static
                )
                if max(peaks(candidate, sizes | more).values()) <= gpu_bytes:
                    fitting.append(candidate)
        if fitting:
            return min(fitting, key=lambda candidate: distance(candidate, plan))
    return None


def hand_off_seconds(
    config: dict, sent: dict[str, int], *, fp8: bool, tp: int, pp: int, ep: int, engine_tp: int, colocated: bool, node_gpus: int,
    memory_bytes_s: float, nvlink_bytes_s: float, network_bytes_s: float,
) -> dict[str, float]:  # fmt: skip
    """What one hand-off does, in seconds, at these bandwidths: no latency, no imbalance, nothing
    overlapped. sent: hand_off_bytes.
    """
    expert_group = ep if ep > 1 else tp
    links = {
        n: nvlink_bytes_s if n <= node_gpus else network_bytes_s
        for n in (tp, expert_group, engine_tp)
    }
    total, others = sum(sent.values()), sent["split"] + sent["whole"]
    gather = (
        others / pp * (tp - 1) / tp / links[tp]
        + sent["experts"] / pp * (expert_group - 1) / expert_group / links[expert_group]
    )
    seconds = {
        "quantize each shard: 3 bytes a parameter through memory": (
            3 * parameters(config)[0] / (tp * pp) / memory_bytes_s if fp8 else 0
        ),
        f"gather over tp {tp}, experts over {expert_group}": gather,
        f"other stages' parts over the network: 1/{tp} of {pp - 1} stages": (
            total * (pp - 1) / pp / tp / network_bytes_s
        ),
        "gather those parts": total * (pp - 1) / pp * (tp - 1) / tp / links[tp],
    }
    if not colocated:
        seconds["broadcast from trainer 0 to the engines over the network"] = (
            total / network_bytes_s
        )
    seconds[f"{engine_tp} engine ranks read from the first one's memory"] = (
        total * (engine_tp - 1) / engine_tp / links[engine_tp]
    )
    return seconds


# --- said, and checked --------------------------------------------------------------------------


def report(settings, config: dict, **load) -> None:
    """Print the plan.

    Raises BadInput naming the nearest layout that fits if it does not. load: as plan_of takes it.
    """
    machine, plan = settings.plan, plan_of(settings, config, **load)
    gpu_bytes, train, rollout = machine.plan_gpu_gb * 1e9, plan.train, plan.rollout
    sizes, (total, used) = trainer_sizes(plan) | engine_sizes(plan), parameters(config)
    need = peaks(plan, sizes)

    def row(name: str, nbytes: float, note: str = "") -> None:
        print(f"  {name:<28}{nbytes / 1e9:10.2f} GB   {note}".rstrip())

    where = "all" if plan.colocated else f"the first {plan.trainer_ranks}"
    gpus = f"{plan.gpus} GPU{'s' * (plan.gpus > 1)} of {machine.plan_gpu_gb:g} GB"
    print(
        f"{Path(settings.run.model).name}: {total / 1e9:.2f}e9 parameters, a token uses"
        f" {used / 1e9:.2f}e9; {gpus}"
    )
    print(
        f"trainers on {where} GPUs: tp {train.tp}, pp {train.pp}, cp {train.cp}, ep {train.ep}, dp"
        f" {sizes['dp']}; the pipeline stage that needs most"
    )
    for name, note in {
        "weights": train.train_dtype, "gradients": "fp32", "optimizer": "fp32, split over ranks with the same parameters", "reference": "frozen",
        "activations": f"micro-batches of {sizes['tokens']} tokens" + (", recomputed layer by layer" if plan.recompute else ""), "logits": "and their gradient",
    }.items():  # fmt: skip
        if sizes[name]:
            row(name, sizes[name], note)
    where = "all" if plan.colocated else f"the last {plan.rollout_ranks}"
    print(
        f"engines on {where} GPUs: tp {rollout.engine_tp}, experts over {rollout.engine_ep};"
        f" mem_fraction_static {plan.static:g}"
    )
    row("weights", sizes["engine"], rollout.rollout_dtype)
    free = gpu_bytes - RUNTIME_BYTES - (sizes["state"] + RUNTIME_BYTES if plan.colocated else 0)
    room = max(plan.static * free - sizes["engine"], 0)
    row(
        "keys and values",
        room,
        f"{room / sizes['token']:,.0f} tokens: {room // (sizes['token'] * plan.longest):,.0f}"
        f" samples of {plan.longest} tokens",
    )
    row(
        "keys and values of the step",
        sizes["token"] * plan.longest * sizes["requests"],
        f"if {sizes['requests']} samples are that long, all at a time",
    )
    print("most at a time")
    for phase, nbytes in need.items():
        row(phase, nbytes, "" if nbytes <= gpu_bytes else "does not fit")
    sent = sum(sizes["sent"].values())
    seconds = hand_off_seconds(
        config, sizes["sent"], fp8=rollout.rollout_dtype == "fp8", tp=train.tp, pp=train.pp, ep=train.ep, engine_tp=rollout.engine_tp,
        colocated=plan.colocated, node_gpus=machine.plan_node_gpus, memory_bytes_s=machine.plan_memory_gb_s * 1e9,
        nvlink_bytes_s=machine.plan_nvlink_gb_s * 1e9, network_bytes_s=machine.plan_network_gb_s * 1e9,
    )  # fmt: skip
    print("hand-off, checkpoint")
    row(
        "handed over",
        sent,
        f"{sum(seconds.values()):.2f} s at the given bandwidths, without latencies",
    )
    row(
        "checkpoint",
        checkpoint_bytes(total, train_dtype=train.train_dtype),
        f"--keep {settings.run.keep} of them, and one while it is written",
    )
    if max(need.values()) > gpu_bytes:
        other = nearest(plan, gpu_bytes=gpu_bytes, node_gpus=machine.plan_node_gpus)
        none = (
            "nor does any other on up to 64 times as many, with engines that divide"
            f" --prompts-per-step {rollout.prompts_per_step}: raise that"
        )
        none += ", or use loop_async.py, where no GPU holds both" if plan.colocated else ""
        fits = (
            f"the nearest layout that does: {other.gpus} GPUs with {other.flags()}"
            if other
            else none
        )
        phase = max(need, key=need.get)
        raise BadInput(
            f"this layout does not fit: {need[phase] / 1e9:.1f} GB to {phase}, of"
            f" {gpu_bytes / 1e9:g} GB; {fits}"
        )
    print("fits")


@all_problems
def check_machine(settings, config: dict | None, **load) -> None:
    """Whether the run folder can be written, the disk has room, and this rank's share of the
    machine's memory is enough. load: as plan_of takes it.
    """
    folder = Path("runs") / settings.run.name
    existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not os.path.isdir(existing) or not os.access(existing, os.W_OK | os.X_OK):
        yield (
            f"the run folder {folder} cannot be written, because of {existing.resolve()}: run where"
            " you may write, or choose --name"
        )
        existing = Path.cwd()
    engines = (
        0
        if settings.run.load_rollouts
        else min(load["rollout_ranks"], int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        // max(settings.rollout.engine_tp, 1)
    )
    found, element_bytes = ProblemList(), 4 if settings.rollout.rollout_dtype == "fp32" else 2
    found.collect(
        check_environment,
        config,
        bucket_bytes=settings.sync.bucket_bytes,
        element_bytes=element_bytes,
        engines_here=engines,
    )
    yield from found.texts
    if config is None:
        return
    total, _ = parameters(config)
    every = (
        settings.run.save_every or settings.run.steps
    )  # a resumed run writes one after its last step
    checkpoints = (
        min(settings.run.keep + 1, -(-settings.run.steps // every))
        if every > 0 and (settings.run.save_every or settings.run.resume)
        else 0
    )
    exports = sum(
        sum(hand_off_bytes(config, dtype=dtype).values())
        for dtype in settings.run.export
        if dtype in ("bf16", "fp8")
    )
    needed = checkpoints * checkpoint_bytes(total, train_dtype=settings.train.train_dtype) + exports
    needed = 0 if settings.run.eval_only else needed
    free = shutil.disk_usage(existing).free
    if needed > free:
        what = (
            f"{checkpoints} checkpoints (--keep and the one being written) and"
            f" {len(settings.run.export)} exports"
        )
        yield (
            f"the run will write {needed / 1e9:.2f} GB: {what}; {existing.resolve()} has"
            f" {free / 1e9:.2f} GB free: lower --keep, or run on another disk"
        )
    train, rollout = settings.train, settings.rollout
    counts = (
        train.minibatches,
        train.microbatch_tokens,
        rollout.prompts_per_step,
        rollout.samples_per_prompt,
        rollout.engine_tp,
        rollout.engine_ep,
    )
    if load["longest"] is None or min(*counts, load["trainer_ranks"], load["rollout_ranks"]) < 1:
        return  # other checks say so
    with contextlib.suppress(BadInput):
        check_layout(
            config,
            world_size=load["trainer_ranks"],
            tp=train.tp,
            pp=train.pp,
            cp=train.cp,
            ep=train.ep,
        )
        yield from _memory_problems(plan_of(settings, config, **load))


def _memory_problems(plan: Plan) -> Iterator[str]:
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    sizes = trainer_sizes(plan) | engine_sizes(plan)
    if torch.cuda.is_available():
        needs = peaks(plan, sizes)
        has, where = (
            torch.cuda.mem_get_info(int(os.environ["LOCAL_RANK"]))[0],
            "this rank's GPU has free",
        )
    else:
        from backends.cpu.sglang import SERVER_ARGS

        trainer = CPU_PROCESS_BYTES + sizes["state"] + sizes["activations"] + sizes["logits"]
        engine = (
            CPU_PROCESS_BYTES
            + sizes["engine"]
            + sizes["token"]
            * min(plan.longest * sizes["requests"], SERVER_ARGS["max_total_tokens"])
        )
        needs = (
            {"train": trainer + engine}
            if plan.colocated
            else {"train": trainer, "generate": engine}
        )
        has, where = (
            psutil.virtual_memory().available / local_ranks,
            f"this machine has free for each of its {local_ranks} ranks",
        )
    phase = max(needs, key=needs.get)
    if needs[phase] > has:
        yield (
            f"a rank needs about {needs[phase] / 1e9:.2f} GB to {phase}; {where} {has / 1e9:.2f}"
            " GB: --plan shows what takes it, and a layout that fits"
        )
