"""Prompts -> samples: start this rank's engine, let it answer, share the answers between ranks.

Dynamic sampling is here too: replace_uninformative.

    prompts   [p0, p1, ...]                 this engine's share of the prompt stream
      -> new_group   n samples of each      a group: answers to one prompt, which GRPO compares
      -> answer      tokens, log-probs      SGLang, in a process beside this one
      -> all_gather  every rank's samples   JSON lines in byte tensors; nothing is pickled

Tokens go into the engine and tokens come out. The text of a response is for reward functions and
readers; it is never tokenized again. An engine starts without weights: weight_sync.py sends the
first ones on the path that all later ones take.
"""

import zlib
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice

import torch.distributed as dist

from backends.sglang.engine import Engine
from backends.sglang.launch import launch_engine
from common.distributed import all_gather_bytes, free_cached_memory
from common.errors import EngineDied
from common.settings import RolloutSettings
from data import deal
from data.prompts import Data
from data.sample import Sample
from reward import Judge, by_group, compute_rewards, is_uninformative

# How samples are answered: `await answer(engine, samples, data, settings, cache=name)`.
Answer = Callable[..., Awaitable[None]]
DROPPED, REPLACED = "dropped", "replaced"  # why a sample is discarded, not trained


# --- the engine ---------------------------------------------------------------------------------


def start_engine(run, settings: RolloutSettings) -> "Engine | NoEngine":
    """Start the engine of this rank's group of --engine-tp ranks, on the group's first rank.

    It has the model's shapes and no weights yet. All other ranks get a NoEngine. Raises BadInput
    if the engine's cache has no room for the longest sample. run: harness.start.Run. Collective.
    """
    if run.is_trainer:
        free_cached_memory(on_all_ranks=True)  # the engine takes a share of what is free
    if run.engine_index is None:
        return NoEngine()
    return launch_engine(run.model, settings, run.config, **run.engine_load)


class NoEngine:
    """Stands where a rank has no engine: it is given no prompts, and ignores weights."""

    holds_weights, timeline, last_phase = False, None, None

    def __enter__(self) -> "NoEngine":
        return self

    def _do_nothing(self, *args, **kwargs) -> None:
        pass

    __exit__ = release_memory = begin_update = load = end_update = settle = _do_nothing


# --- prompts ------------------------------------------------------------------------------------


def engine_share(prompts: Iterable[Sample], run) -> Iterator[Sample]:
    """Yield the prompts that this rank's engine answers: engines take turns.

    run: harness.start.Run.
    """
    if run.engine_index is None:
        return iter(())
    return islice(prompts, run.engine_index, None, run.engines)


class PromptStream:
    """This engine's share of the prompts, and how many of them it has taken.

    With --deal room its share of a step is open: it takes prompts while it answers.
    """

    def __init__(self, run, settings: RolloutSettings):
        """Go to where a resumed run's checkpoint was. run: harness.start.Run."""
        self.has_engine = run.engine_index is not None
        self.shared = deal.shared_prompts(run, settings)
        self.per_step = settings.prompts_per_step // (1 if self.shared else run.engines)
        self.taken = prompts_taken_before(run, settings) if self.has_engine else 0
        self._share = engine_share(run.data.stream, run)
        for _ in islice(self._share, 0 if self.shared else self.taken):
            pass

    def take_step(self) -> "list[Sample] | deal.SharedStep":
        """Return the prompts of this engine's part of a step, for generate."""
        if self.shared:
            self.taken += self.per_step  # by all engines
            return deal.SharedStep(self.shared, end=self.taken)
        return self.take(self.per_step)

    def take(self, n: int) -> list[Sample]:
        """Return the next n prompts; none on a rank without an engine."""
        prompts = list(islice(self._share, n))
        self.taken += len(prompts)
        return prompts

    def state(self) -> dict:
        """Return what a checkpoint must hold of this rank, as JSON."""
        return {"prompts": self.taken} if self.has_engine else {}


def prompts_taken_before(run, settings: RolloutSettings) -> int:
    """Return how many prompts this engine had taken when the checkpoint was written.

    If the number of engines has changed, return an upper bound, so that no prompt is used twice.
    """
    states = run.resumed_from.ranks if run.resumed_from else []
    taken = [state["prompts"] for state in states if state.get("prompts") is not None] or [0]
    if settings.deal == "room":
        return max(taken)
    if len(taken) == run.engines:
        return taken[run.engine_index]
    return -(-max(taken) * len(taken) // run.engines)


# --- answers ------------------------------------------------------------------------------------


def new_group(prompt: Sample, n: int) -> list[Sample]:
    """Return n samples of one prompt, still without responses. They share no dictionary."""
    names = ("metadata", "notes", "metrics")
    return [
        replace(prompt, index=index, **{name: dict(getattr(prompt, name)) for name in names})
        for index in range(n)
    ]


# EDIT HERE: rollout. A tool or several turns are another function of these arguments; it is given
# to generate() and to the asynchronous queue alike. examples/tool_use.py is one.
async def answer(
    engine: Engine, samples: list[Sample], data: Data, settings: RolloutSettings, *, cache: str = ""
) -> None:
    """Write a response into each sample: one turn, all samples at a time.

    Sets response_ids, response, rollout_logprobs, loss_mask, weight_versions and finish_reason, to
    new lists: the samples of a group share the empty ones. Requests have the names of request_ids,
    by which the asynchronous loop stops them; two of one sample need different indices. A sample
    that was stopped has what was generated until then, and finish_reason abort. A sample may be
    split: data.sample.split_off appends what it holds to samples, as one more to train.
    cache: calls of one name share cached prefixes.
    """
    prompts_ids = [sample.prompt_ids for sample in samples]
    sampling = sampling_params(data, settings, samples)
    how = dict(request_ids=request_ids(samples, cache), cache=cache, keep=False)  # no turn follows
    outputs = await engine.generate(prompts_ids, sampling, **how)
    write_outputs(samples, outputs, data)


def generate(
    engine: "Engine | NoEngine",
    prompts: list[Sample] | deal.SharedStep,
    data: Data,
    settings: RolloutSettings,
    *,
    n: int | None = None,
    answer: Answer = answer,
    cache: str = "",
) -> list[Sample]:
    """Return n answered samples of each prompt, in order; n: --samples-per-prompt unless given.

    Raises EngineDied if the engine gave up on one of them.
    """
    n = settings.samples_per_prompt if n is None else n

    async def ask(prompts: list[Sample]) -> list[Sample]:
        samples = [sample for prompt in prompts for sample in new_group(prompt, n)]
        await answer(engine, samples, data, settings, cache=cache)
        check_aborts(samples)
        return samples

    if isinstance(prompts, deal.SharedStep):
        return engine.call(prompts.answer(ask))
    return engine.call(ask(prompts)) if prompts else []


def sampling_params(data: Data, settings: RolloutSettings, samples: list[Sample]) -> list[dict]:
    """Return how SGLang samples each response. Its seed comes from --seed, group, index and prompt.

    So a resumed run samples what it would have sampled undisturbed. On a CPU backends/cpu makes
    the sampler keep to the seed. On a GPU SGLang does so only with --sglang
    enable_deterministic_inference=true.
    """
    common = {
        "temperature": settings.temperature,
        "max_new_tokens": settings.max_response_tokens,
        "stop_token_ids": data.end_ids,
    }
    names = [f"{data.seed} {s.group} {s.index} {s.prompt}" for s in samples]
    return [{**common, "sampling_seed": zlib.crc32(name.encode()) // 2} for name in names]


def request_ids(samples: list[Sample], cache: str = "") -> list[str]:
    """Return the names by which the engine can be told to stop these samples' requests.

    An evaluation has numbers of its own, and runs beside groups in flight: cache tells them apart.
    """
    return [f"{cache}group-{sample.group}-{sample.index}" for sample in samples]


def write_outputs(samples: list[Sample], outputs: list[dict], data: Data) -> None:
    """Write the engine's outputs into the samples that they answer.

    The token that ended a response stays in response_ids; the text does not show it.
    """
    for sample, output in zip(samples, outputs):
        meta = output["meta_info"]
        sample.finish_reason = meta["finish_reason"]["type"]
        sample.response_ids = output["output_ids"]
        sample.rollout_logprobs = [logprob for logprob, *_ in meta["output_token_logprobs"]]
        sample.loss_mask = [1] * len(sample.response_ids)
        sample.weight_versions = output["weight_versions"]
        sample.routed_experts = output["routed_experts"]
        said = list(sample.response_ids)
        if sample.finish_reason == "stop" and said and said[-1] in data.end_ids:
            said.pop()
        sample.response = data.tokenizer.decode(
            said, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        if sample.finish_reason == "abort":
            sample.error = str(meta["finish_reason"].get("message"))


def check_aborts(samples: list[Sample]) -> None:
    """Raise EngineDied if the engine gave up on one of these."""
    for sample in samples:
        if sample.finish_reason == "abort":
            name = f"sample {sample.index} of group {sample.group}"
            raise EngineDied(f"the engine aborted {name}: {sample.error}")


def replace_uninformative(
    samples: list[Sample],
    engine: "Engine | NoEngine",
    prompts: PromptStream,
    judge: Judge,
    data: Data,
    settings,
    *,
    answer: Answer = answer,
) -> list[Sample]:
    """Replace groups whose rewards are all equal by answers to new prompts.

    It does so --dynamic-sampling times at most; 0: never. Replaced samples are marked as discarded.
    Groups that are uninformative after the last round are trained as they are, with advantage 0.
    Dynamic sampling of DAPO, arXiv 2503.14476, section 3.2. settings: a loop's.
    """
    replaced = []
    for _ in range(settings.reward.dynamic_sampling):
        groups = by_group(samples)
        uninformative = [group for group in groups if is_uninformative(group)]
        if not uninformative:
            break
        fresh_prompts = prompts.take(len(uninformative))
        fresh = generate(engine, fresh_prompts, data, settings.rollout, answer=answer)
        compute_rewards(fresh, judge)
        for group in uninformative:
            replaced += discarded(group, REPLACED)
        kept = [sample for group in groups if not is_uninformative(group) for sample in group]
        samples = kept + fresh
    return samples + replaced


# --- between ranks ------------------------------------------------------------------------------


def all_gather(samples: list[Sample], group: dist.ProcessGroup) -> list[Sample]:
    """Return every rank's samples, in rank order, on every rank of the group. Collective (gloo)."""
    mine = b"\n".join(sample.to_json() for sample in samples)
    rows = [row for rank in all_gather_bytes(mine, group) for row in rank.split(b"\n")]
    return [Sample.from_json(row) for row in rows if row]


def discarded(samples: list[Sample], reason: str) -> list[Sample]:
    """Return what is kept of samples that are not trained: enough to count them by reason."""
    answers = [s for s in samples if not s.is_part]
    return [Sample(s.prompt_ids, group=s.group, index=s.index, discarded=reason) for s in answers]


def split_discarded(samples: list[Sample]) -> tuple[list[Sample], dict[str, int]]:
    """Return the samples to train, and how many others were discarded for each reason."""
    kept = [sample for sample in samples if not sample.discarded]
    reasons = [sample.discarded for sample in samples]
    return kept, {reason: reasons.count(reason) for reason in (DROPPED, REPLACED)}
