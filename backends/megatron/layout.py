"""How Megatron splits a model over ranks."""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from backends.huggingface.names import Rule, split_stacked


@dataclass(frozen=True)
class Layout:
    """The groups of ranks that weights are split over."""

    tp_group: dist.ProcessGroup
    expert_group: dist.ProcessGroup
    """Ranks that hold one layer's experts: expert-parallel ranks times an expert's tensor-parallel
    ranks. The latter count faster."""
    ep: int
    """Number of expert-parallel ranks."""
    pp_group: dist.ProcessGroup
    first_layer: int
    """Number, in the whole model, of the first layer of this pipeline stage."""

    def group(self, rule: Rule) -> dist.ProcessGroup:
        """Return the ranks that together hold the rule's tensors."""
        return self.tp_group if rule.expert is None else self.expert_group

    def tp(self, rule: Rule) -> int:
        """Return over how many ranks tensor parallelism splits each of the rule's tensors."""
        return self.tp_group.size() if rule.expert is None else self.expert_group.size() // self.ep

    def place(self, rule: Rule) -> tuple[int, int]:
        """Return this rank's number among the expert- and among the tensor-parallel ranks."""
        return divmod(self.group(rule).rank(), self.tp(rule))

    def spreads(self, rule: Rule) -> bool:
        """Tell whether the rule's tensors are an expert's that no other of the ranks holds."""
        return rule.expert is not None and self.ep > 1

    def split(self, stacked: torch.Tensor, rule: Rule, config: dict) -> list[torch.Tensor]:
        """Split this rank's shard of a stacked tensor into its slices of the rule's tensors."""
        groups = config["num_key_value_heads"] // self.tp(rule)
        return split_stacked(stacked, len(rule.hf), head_dim=config["head_dim"], groups=groups)

    def names(self, rule: Rule, config: dict) -> list[list[str]]:
        """Return the rule's Hugging Face names for each expert-parallel rank; once if not experts'.

        Each expert-parallel rank holds other experts at the same place.
        """
        if rule.expert is None:
            return [list(rule.hf)]
        experts_per_rank = config["num_experts"] // self.ep
        return [rule.names(rank * experts_per_rank + rule.expert) for rank in range(self.ep)]
