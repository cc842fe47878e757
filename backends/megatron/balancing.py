"""What keeps the experts of a mixture equally busy, by --megatron and --freeze-moe-router.

    moe_router_load_balancing_type=aux_loss moe_aux_loss_coeff=0.001
        A second loss for the routers: E sum_i f_i P_i over the E experts, where f_i is the share of
        tokens that expert i would get and P_i its mean score; 1 if all are alike (Switch
        Transformer, arXiv 2101.03961, equation 4). f_i is counted over a micro-batch on the ranks
        that share it, so the gradient depends on how a batch is split.
    moe_router_bias_update_rate=0.001
        After each batch GLM-4.5's correction bias rises by this for an expert with fewer tokens
        than the mean and falls for one with more (arXiv 2408.15664). The engine gets the bias with
        the other weights, and checkpoints hold it.
    --freeze-moe-router
        The routers' weights stay as they are.

Tokens are those of prompts and responses; filler does not count.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core.transformer.moe import router as megatron_router
from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker
from megatron.core.transformer.moe.router import TopKRouter

from common.overrides import parse_overrides

KIND, COEFFICIENT = "moe_router_load_balancing_type", "moe_aux_loss_coeff"
RATE = "moe_router_bias_update_rate"
WHY_NOT = {
    "seq_aux_loss": ": Megatron would take a packed micro-batch for one sequence",
    "global_aux_loss": (
        ": megatron-core 0.16.1 divides counts of several micro-batches by the tokens of one"
    ),
}


def balancing_fields(config: dict) -> set[str]:
    """Return the fields of --megatron that a model has a use for. Only GLM-4.5 has a bias."""
    if not config["num_experts"]:
        return set()
    return {KIND, COEFFICIENT, RATE} if config["model_type"] == "glm4_moe" else {KIND, COEFFICIENT}


def balancing_problems(given: dict, *, is_frozen: bool) -> Iterator[str]:
    """Yield values of --megatron that cannot work, or would do nothing.

    given: as overrides(). is_frozen: --freeze-moe-router.
    """
    kind, coefficient = given.get(KIND, "none"), given.get(COEFFICIENT, 0)
    if kind not in ("none", "aux_loss"):
        yield f"--megatron {KIND}={kind} is none of none, aux_loss{WHY_NOT.get(kind, '')}"
    for name in (COEFFICIENT, RATE):
        value = given.get(name, 0)
        if type(value) not in (int, float) or not 0 <= value < 1e6:
            yield f"--megatron {name}={value} must be a number, and not negative"
            return
    if (kind != "none") != (coefficient > 0):
        yield f"--megatron {KIND}={kind} with {COEFFICIENT}={coefficient}: give both, or neither"
    elif kind != "none" and is_frozen:
        yield f"--megatron {KIND}={kind} trains routers, --freeze-moe-router does not: give one"


def without_balancing(settings):
    """Return TrainSettings without any of this: for a model that is no policy, such as a critic."""
    fields = (KIND, COEFFICIENT, RATE)
    pairs = (pair for pair in settings.megatron if pair.partition("=")[0] not in fields)
    return replace(settings, megatron=tuple(pairs), freeze_moe_router=False)


def freeze_routers(gpt: torch.nn.Module) -> None:
    """Let the routers' weights have no gradient, and no optimizer state."""
    for module in gpt.modules():
        if isinstance(module, TopKRouter):
            module.weight.requires_grad_(False)


def _has_aux_loss(config) -> bool:
    return bool(config.num_moe_experts) and config.moe_router_load_balancing_type != "none"


def counts_tokens(config) -> bool:
    """Tell whether routers count the tokens of each expert. config: TransformerConfig."""
    moves_bias = config.moe_router_enable_expert_bias and config.moe_router_bias_update_rate > 0
    return _has_aux_loss(config) or moves_bias


def padding_of(trainer, batch) -> dict:
    """Return GPTModel's argument that keeps filler out of what is counted; {} for a dense model.

    batch: a MicroBatch.
    """
    if not trainer.gpt.config.num_moe_experts:
        return {}
    is_filler_1T = batch.is_filler_T[None]
    if not trainer.gpt.pre_process and trainer.settings.tp > 1:
        # Megatron splits it over sequence-parallel ranks in the first stage only.
        tp = trainer.layout.tp_group
        is_filler_1T = is_filler_1T.chunk(tp.size(), dim=1)[tp.rank()].contiguous()
    return {"padding_mask": is_filler_1T}


def scale_aux_loss(trainer, batch, aggregate: Callable) -> None:
    """Make the auxiliary loss a mean over tokens, at any layout and aggregation. Collective.

    Megatron sums it over tokens, and divides the sum by what the policy loss is divided by, the
    units of the aggregation. Those may be sequences.

    trainer: a train_step.Trainer. batch: a Batch. aggregate: of losses.AGGREGATIONS.
    """
    config = trainer.gpt.config
    if not _has_aux_loss(config):
        return
    given = parse_overrides(trainer.settings.megatron, flag="--megatron", fields=None)[COEFFICIENT]
    limit = dict(max_response_tokens=trainer.max_response_tokens)
    sums = torch.zeros(2, dtype=torch.float64, device=next(trainer.gpt.parameters()).device)
    for microbatch in batch.microbatches:
        sums[0] += (~microbatch.is_filler_T).sum()
        if trainer.cp_group.rank() == 0:  # its ranks share the samples: they count once
            sums[1] += aggregate(microbatch.sequences, **limit)[1].sum()
    dist.all_reduce(sums, group=trainer.dp_cp_group)
    tokens, units = sums.tolist()
    config.moe_aux_loss_coeff = given * units / tokens


def balance_metrics(trainer, batches: list) -> dict[str, float]:
    """Return {"moe_aux_loss": mean over layers and micro-batches}, without its coefficient.

    batches: those that have had a backward pass since the last call. Collective. (Megatron's
    track_moe_metrics needs NCCL.)
    """
    config, tracker = trainer.gpt.config, get_moe_layer_wise_logging_tracker()
    if not _has_aux_loss(config):
        return {}
    device = next(trainer.gpt.parameters()).device
    nothing = {"values": torch.zeros(1, device=device)}  # of a stage without experts
    total = tracker.pop("load_balancing_loss", nothing)["values"].sum()
    # Ranks that share a micro-batch have a part of its loss each.
    for group in (trainer.layout.pp_group, trainer.layout.tp_group, trainer.dp_cp_group):
        dist.all_reduce(total, group=group)
    filled = sum(bool(bin) for batch in batches for bins in batch.plan for bin in bins)
    return {"moe_aux_loss": float(total) / (sum(config.moe_layer_freq) * filled)}


# --- patches of megatron-core -------------------------------------------------------------------

_stock_count = TopKRouter._apply_expert_bias
_stock_counts = megatron_router.get_tokens_per_expert_and_token_count


def _count_tokens(self, routing_map_TE, padding_mask=None) -> None:
    """Count tokens per expert. megatron-core 0.16.1 cannot mask [T, E] by [T] where it does so."""
    mask_T1 = None if padding_mask is None else padding_mask[:, None]
    _stock_count(self, routing_map_TE, padding_mask=mask_T1)


def _counts(*args, **more) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Let the auxiliary loss of a micro-batch of filler be 0; it would be 0 times infinity."""
    per_expert, local_tokens, tokens = _stock_counts(*args, **more)
    return per_expert, local_tokens, torch.as_tensor(tokens).clamp(min=1)


TopKRouter._apply_expert_bias = _count_tokens
megatron_router.get_tokens_per_expert_and_token_count = _counts
