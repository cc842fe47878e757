"""Routing replay: the trainer's routers take the experts that the engine took.

The engine computes with other rounding than the trainer. Where two experts score about alike, the
two choose differently, and the token's log-prob jumps: the largest mismatches of a mixture of
experts come from there. With --routing-replay rollout a token keeps the engine's experts, in
forward, backward and recomputation. Their weights are the trainer's own gate values, gradient
included. Rollout routing replay, R3: arXiv 2510.11370, section 3.

    sample.routed_experts -> micro-batch [T, L, K] -> router: own top-k, replaced where K is known

megatron-core 0.16.1 asks RouterReplay (moe/router_replay.py) in each router. Its replay needs the
experts of every token; filler, and a response's last token, have none. So ReplayedTopK takes its
place. The frozen reference and a critic have no replay: they are other models.

Shape letters: T tokens of a micro-batch on this rank, L layers with experts of this pipeline stage,
K experts per token, X experts.
"""

import contextlib
from collections import deque

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.transformer.moe.router import TopKRouter

from backends.routed_experts import sparse_layers, unpack


class ReplayedTopK:
    """Chooses a router's experts; stands where megatron-core has its RouterReplay."""

    def __init__(self, *, replays: bool):
        """replays: whether the engine's experts are taken, or only compared with the own ones."""
        self.replays = replays
        self.experts_TK: torch.Tensor | None = None  # of the micro-batch in its forward pass
        self.recomputed: deque[torch.Tensor] = deque()  # of those that will be computed once more
        self.counts: torch.Tensor | None = None  # in a forward pass that a backward pass follows

    def get_replay_topk(
        self, scores_TX, topk, num_groups=None, group_topk=None, default_compute_topk=None
    ):
        """Return (scores, numbers) of each token's experts, [T, K]; called by the router."""
        own_TK, own_index_TK = default_compute_topk(scores_TX, topk, num_groups, group_topk)
        experts_TK = self.experts_TK
        if self.counts is not None:
            self._count(own_index_TK, experts_TK)
            if not torch.is_grad_enabled():  # the backward pass will compute this layer again
                self.recomputed.append(experts_TK)
        elif experts_TK is None and self.recomputed:
            # The backward pass takes micro-batches in the order of their forward passes.
            experts_TK = self.recomputed.popleft()
        if experts_TK is None or not self.replays:
            return own_TK, own_index_TK
        index_TK = torch.where(experts_TK < 0, own_index_TK, experts_TK.long())
        return scores_TX.gather(1, index_TK), index_TK

    def _count(self, own_index_TK: torch.Tensor, experts_TK: torch.Tensor) -> None:
        """Count tokens with another set of experts here than in the engine, and all of them."""
        is_known_T = experts_TK[:, 0] >= 0
        differs_T = (own_index_TK.sort().values != experts_TK.sort().values).any(-1)
        differing, known = self.counts
        differing += (differs_T & is_known_T).sum()
        known += is_known_T.sum()


class RoutingReplay:
    """The replay of one rank's routers."""

    def __init__(self, gpt: torch.nn.Module, config: dict, layout, *, mode: str):
        """Give every router of the model its ReplayedTopK.

        mode: compare or rollout, as --routing-replay. layout: a backends.megatron.layout.Layout.
        """
        self.config, self.layout = config, layout
        routers = [module for module in gpt.modules() if isinstance(module, TopKRouter)]
        sparse = sparse_layers(config)
        self.columns = [sparse.index(router.layer_number - 1) for router in routers]
        self.choices = [ReplayedTopK(replays=mode == "rollout") for _ in routers]
        for router, choice in zip(routers, self.choices):
            router.router_replay = choice
        device = next(gpt.parameters()).device
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)  # differing, known

    def experts_of(self, samples: list, lengths: list[int]) -> np.ndarray:
        """Return the engine's experts for packed samples, int16 [T, L, K]; -1 where it has none.

        lengths: packed length of each sample, and of filler. Raises ValueError; see unpack.
        """
        shape = sum(lengths), len(self.columns), self.config["num_experts_per_tok"]
        experts_TLK, begin = np.full(shape, -1, np.int16), 0
        for sample, length in zip(samples, lengths):
            known = unpack(sample, self.config)
            experts_TLK[begin : begin + len(known)] = known[:, self.columns]
            begin += length
        return experts_TLK

    def mismatch(self) -> dict[str, float]:
        """Return {"route_mismatch": share} of the training passes since the last call. Collective.

        It is the share of tokens times layers for which the router's own choice is another set of
        experts than the engine's. With replay, each layer chooses behind replayed ones.
        """
        across = mpu.get_data_parallel_group(with_context_parallel=True)
        for group in (across, self.layout.tp_group, self.layout.pp_group):
            dist.all_reduce(self.counts, group=group)
        differing, known = self.counts.tolist()
        self.counts.zero_()
        return {"route_mismatch": differing / known} if known else {}


def build_replay(gpt: torch.nn.Module, settings, config: dict, layout) -> RoutingReplay | None:
    """Return the replay that --routing-replay asks for. settings: TrainSettings."""
    if settings.routing_replay == "none":
        return None
    return RoutingReplay(gpt, config, layout, mode=settings.routing_replay)


@contextlib.contextmanager
def routed_as_the_engine(replay: RoutingReplay | None, batch, *, is_training: bool):
    """Let the routers see the engine's experts during a micro-batch's forward pass.

    is_training: a backward pass follows; such passes are counted. batch: a MicroBatch.
    """
    if replay is None:
        yield
        return
    rank, size = replay.layout.tp_group.rank(), replay.layout.tp_group.size()
    # Under sequence parallelism a router sees this rank's part of the tokens.
    experts_TLK = batch.experts_TLK.chunk(size)[rank].to(replay.counts.device)
    for layer, choice in enumerate(replay.choices):
        choice.experts_TK = experts_TLK[:, layer]
        choice.counts = replay.counts if is_training else None
    try:
        yield
    finally:
        for choice in replay.choices:
            choice.experts_TK = choice.counts = None
