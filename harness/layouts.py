"""What a layout needs of every GPU, and the nearest layout that fits.

memory.py counts the parts; peaks() says which of them are in memory at the same time:

    synchronous loop    Trainer and engine share a GPU. The trainer's weights, gradients and
                        optimizer state stay where they are. The engine's memory is released while
                        the trainer computes. So there are three peaks: train; hand-off (the weight
                        update), with the engine's weights but not its cache; generate.
    asynchronous loop   Trainers and engines have GPUs of their own. The fourth peak is receive: a
                        weight update on an engine's GPU.

Assumed and not measured: RUNTIME_BYTES and CONTEXT_BYTES; that all experts get equally many tokens;
that attention stores no scores (flash attention).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from backends.huggingface.config import check_layout, expert_ranks
from common.errors import BadInput
from common.settings import RolloutSettings, TrainSettings
from harness.memory import (
    embedding_parameters,
    engine_bytes,
    hand_off_bytes,
    state_bytes,
    trainer_bytes,
)

# What a process takes on a GPU beside its tensors: CUDA context and libraries, NCCL's buffers, and
# what the allocators waste.
RUNTIME_BYTES = 3e9
# Of each further rank of an engine, on the first rank's GPU: it reads buckets there, by CUDA IPC.
CONTEXT_BYTES = 0.5e9
# Buckets' worth of memory at the peak of a weight update: on a trainer, and on a rank that only
# receives. bench/weight_sync.py measures it; the bucket that the engine is loading is added.
TRAINER_BUCKETS, RECEIVER_BUCKETS = 9, 4
RECOMPUTE = "recompute_granularity=full"  # the word of --megatron that turns recomputation on
MEM_FRACTIONS = 0.6, 0.7, 0.8, 0.9  # that the search tries beside the given one
MOST_DOUBLINGS = 6  # of the number of GPUs


@dataclass(frozen=True)
class Plan:
    """A layout, and the load that it must carry."""

    config: dict
    train: TrainSettings
    rollout: RolloutSettings
    trainer_ranks: int
    rollout_ranks: int
    colocated: bool
    """Whether trainers and engines share their GPUs, as in the synchronous loop."""
    longest: int
    """Tokens of the longest sample, prompt and response."""
    steps_in_flight: int
    """Training steps whose requests an engine holds at the same time."""
    reference: dict | None
    """config.json of a frozen model that stays on the trainers' GPUs; None: there is none."""
    bucket_bytes: int
    mem_fraction: float
    """SGLang's mem_fraction_static: of the memory that is free when an engine starts, the share of
    weights and cache."""
    keeps_sent: bool
    """Whether a trainer keeps, in host memory, what it sent last (--sync delta)."""
    recompute: bool
    """Whether the trainer recomputes all activations of a layer in the backward pass."""

    @property
    def gpus(self) -> int:
        return self.trainer_ranks if self.colocated else self.trainer_ranks + self.rollout_ranks

    def flags(self) -> str:
        """Return the command line of this layout."""
        train, rollout = self.train, self.rollout
        flags = [f"--tp {train.tp} --pp {train.pp} --cp {train.cp} --ep {train.ep}"]
        flags += [f"--engine-tp {rollout.engine_tp} --engine-ep {rollout.engine_ep}"]
        if not self.colocated:
            flags += [f"--rollout-ranks {self.rollout_ranks}"]
        flags += [f"--sglang mem_fraction_static={self.mem_fraction:g}"]
        if self.recompute:
            flags += [f"--megatron {RECOMPUTE} recompute_method=uniform recompute_num_layers=1"]
        return " ".join(flags)


# --- what it needs ------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainerSizes:
    """One rank that trains."""

    parts: dict[str, float]
    """Bytes, as memory.trainer_bytes returns them."""
    dp: int
    """Data-parallel size."""
    microbatch_tokens: int
    """Tokens of a micro-batch on this rank."""

    @property
    def state(self) -> float:
        """Bytes that are held all the time."""
        return state_bytes(self.parts)

    @property
    def computing(self) -> float:
        """Bytes that are held during a training step only."""
        return self.parts["activations"] + self.parts["logits"]


@dataclass(frozen=True)
class EngineSizes:
    """One rank of an engine, and the weight updates that it receives."""

    weights: float
    """Bytes."""
    token_bytes: float
    """Bytes of one token's keys and values."""
    requests: int
    """Requests that the whole engine holds at the same time."""
    sent: dict[str, int]
    """Bytes of one weight update, as memory.hand_off_bytes returns them."""
    bucket_bytes: int
    """Bytes of the largest bucket."""


def trainer_sizes(plan: Plan) -> TrainerSizes:
    """Return the sizes of the fullest rank that trains, if all samples have the longest length."""
    train, rollout = plan.train, plan.rollout
    dp = plan.trainer_ranks // (train.tp * train.pp * train.cp)
    step_tokens = rollout.prompts_per_step * rollout.samples_per_prompt * plan.longest
    update_tokens = -(-step_tokens // (dp * train.cp * train.minibatches))  # of an optimizer step
    microbatch_tokens = max(min(update_tokens, train.microbatch_tokens), 1)
    parts = trainer_bytes(
        plan.config,
        ranks=plan.trainer_ranks,
        tp=train.tp,
        pp=train.pp,
        ep=train.ep,
        element_bytes=2 if train.train_dtype == "bf16" else 4,
        tokens=microbatch_tokens,
        microbatches=-(-update_tokens // microbatch_tokens),
        recompute=plan.recompute,
        reference=plan.reference,
        lora_rank=train.lora_rank,
    )
    return TrainerSizes(parts, dp=dp, microbatch_tokens=microbatch_tokens)


def engine_sizes(plan: Plan) -> EngineSizes:
    """Return the sizes of a rank of an engine. A bucket may be longer by one embedding."""
    rollout, dtype = plan.rollout, plan.rollout.rollout_dtype
    tp, ep = rollout.engine_tp, rollout.engine_ep
    sent = hand_off_bytes(plan.config, dtype=dtype, engine_tp=tp, engine_ep=ep)
    held = engine_bytes(plan.config, sent, dtype=dtype, engine_tp=tp)
    step_requests = rollout.prompts_per_step * rollout.samples_per_prompt
    return EngineSizes(
        weights=held["engine"],
        token_bytes=held["token"],
        requests=step_requests * tp * plan.steps_in_flight // plan.rollout_ranks,
        sent=sent,
        bucket_bytes=plan.bucket_bytes + 2 * embedding_parameters(plan.config),
    )


def peaks(plan: Plan, trainer: TrainerSizes, engine: EngineSizes) -> dict[str, float]:
    """Return {phase: bytes that a GPU must have}.

    SGLang takes mem_fraction of what is free when it starts, and computes in the rest. Its cache
    must have room for one sample of the longest kind; other samples wait for their turn.
    """
    # Weights and cache are mem_fraction of what the engine takes.
    generating = (engine.weights + engine.token_bytes * plan.longest) / plan.mem_fraction
    processes = 2 if plan.colocated else 1
    readers = CONTEXT_BYTES * (plan.rollout.engine_tp - 1)
    resident = trainer.state + RUNTIME_BYTES * processes + readers * plan.colocated
    sending = TRAINER_BUCKETS * engine.bucket_bytes
    if plan.colocated:
        return {
            "train": resident + trainer.computing,
            "hand-off": resident + engine.weights + sending,
            "generate": resident + generating,
        }
    # Received buckets must fit beside weights and cache, into 1 - mem_fraction.
    receiving = RECEIVER_BUCKETS * engine.bucket_bytes / (1 - plan.mem_fraction)
    return {
        "train": resident + trainer.computing,
        "hand-off": resident + sending,
        "generate": RUNTIME_BYTES + readers + generating,
        "receive": RUNTIME_BYTES + readers + receiving,
    }


# --- the nearest layout that fits ---------------------------------------------------------------


def nearest(plan: Plan, *, gpu_bytes: float, node_gpus: int) -> Plan | None:
    """Return the layout that fits and differs least from the given one; None if there is none.

    It has as many GPUs as the given one, or else two, four ... 64 times as many.
    """
    for doublings in range(MOST_DOUBLINGS + 1):
        gpus = plan.gpus * 2**doublings
        fitting = list(_fitting(plan, gpus, gpu_bytes=gpu_bytes, node_gpus=node_gpus))
        if fitting:
            return min(fitting, key=lambda candidate: distance(candidate, plan))
    return None


def _fitting(plan: Plan, gpus: int, *, gpu_bytes: float, node_gpus: int) -> Iterator[Plan]:
    """Yield the layouts on so many GPUs that fit."""
    fractions = dict.fromkeys((plan.mem_fraction, *MEM_FRACTIONS))
    trainers = {}  # {ranks that train: [(layout, its sizes), ...]}: few, and slow to count
    for engine in _engine_layouts(plan, gpus, node_gpus=node_gpus):
        if engine.trainer_ranks not in trainers:
            trainers[engine.trainer_ranks] = [
                (trainer, trainer_sizes(trainer))
                for trainer in _trainer_layouts(engine, node_gpus=node_gpus)
            ]
        sizes = engine_sizes(engine)
        for trainer, its_sizes in trainers[engine.trainer_ranks]:
            both = replace(engine, train=trainer.train, recompute=trainer.recompute)
            for fraction in fractions:
                candidate = replace(both, mem_fraction=fraction)
                if max(peaks(candidate, its_sizes, sizes).values()) <= gpu_bytes:
                    yield candidate


def _engine_layouts(plan: Plan, gpus: int, *, node_gpus: int) -> Iterator[Plan]:
    """Yield the plan on so many GPUs with each possible share of rollout ranks and kind of engine.

    The share stays as it is, or becomes one, two or three quarters. An engine stays in one node.
    """
    if plan.colocated:
        shares = [gpus]
    else:
        shares = {gpus * plan.rollout_ranks // plan.gpus, *(gpus * i // 4 for i in (1, 2, 3))}
        shares = sorted(shares - {0, gpus})
    for rollout_ranks, engine_tp in product(shares, _powers_of_two(node_gpus)):
        if not _engine_divides(plan, rollout_ranks=rollout_ranks, engine_tp=engine_tp):
            continue
        experts = plan.config["num_experts"]
        whole_experts = experts and experts % engine_tp == 0
        for engine_ep in {1, engine_tp} if whole_experts else {1}:
            yield replace(
                plan,
                rollout=replace(plan.rollout, engine_tp=engine_tp, engine_ep=engine_ep),
                rollout_ranks=rollout_ranks,
                trainer_ranks=gpus if plan.colocated else gpus - rollout_ranks,
            )


def _engine_divides(plan: Plan, *, rollout_ranks: int, engine_tp: int) -> bool:
    """Tell whether engines of this size divide the model's heads, the ranks and the prompts."""
    if rollout_ranks % engine_tp:
        return False
    heads = plan.config["num_attention_heads"], plan.config["num_key_value_heads"]
    if any(number % engine_tp for number in heads):
        return False
    return plan.rollout.prompts_per_step % (rollout_ranks // engine_tp) == 0


def _trainer_layouts(plan: Plan, *, node_gpus: int) -> Iterator[Plan]:
    """Yield the plan with each layout of its trainers, with and without full recomputation.

    Tensor parallelism stays in one node.
    """
    ranks = plan.trainer_ranks
    tps = _powers_of_two(min(node_gpus, ranks))
    pps = _powers_of_two(ranks)
    eps = _powers_of_two(ranks if plan.config["num_experts"] else 1)
    for tp, pp, ep, recompute in product(tps, pps, eps, {plan.recompute, True}):
        sizes = dict(tp=tp, pp=pp, ep=ep)
        try:
            check_layout(plan.config, world_size=ranks, cp=plan.train.cp, **sizes)
            if plan.reference:
                split = sizes | dict(ep=expert_ranks(plan.reference, ep))
                check_layout(plan.reference, world_size=ranks, cp=plan.train.cp, **split)
        except BadInput:
            continue  # a model or the number of ranks does not allow it
        yield replace(plan, train=replace(plan.train, **sizes), recompute=recompute)


def _powers_of_two(largest: int) -> list[int]:
    """Return 1, 2, 4 ... up to the largest that is not above `largest`."""
    return [2**i for i in range(largest.bit_length())]


def distance(a: Plan, b: Plan) -> float:
    """Return how much one plan must be changed to become the other.

    A doubling of a parallel size or of the engines' share of the GPUs counts 1. Recomputation
    counts 1. A change of mem_fraction counts 0.5 and the difference.
    """
    changes = sum(abs(math.log2(x / y)) for x, y in zip(_sizes(a), _sizes(b)))
    changes += a.recompute != b.recompute
    if a.mem_fraction != b.mem_fraction:
        changes += 0.5 + abs(a.mem_fraction - b.mem_fraction)
    return changes


def _sizes(plan: Plan) -> tuple[float, ...]:
    train, rollout = plan.train, plan.rollout
    share = plan.rollout_ranks / plan.gpus
    return train.tp, train.pp, train.ep, rollout.engine_tp, rollout.engine_ep, share
