"""How Megatron splits a model over ranks."""

from dataclasses import dataclass

import torch.distributed as dist

from backends.huggingface.names import Rule


@dataclass(frozen=True)
class Layout:
    """The groups of ranks that weights are split over."""

    tp_group: dist.ProcessGroup
    expert_group: dist.ProcessGroup
    """Ranks that hold one layer's experts: expert-parallel ranks times the tensor-parallel ranks of
    an expert, of which the latter count faster.
    """
    ep: int
    pp_group: dist.ProcessGroup
    first_layer: int
    """Number, in the whole model, of the first layer of this pipeline stage."""

    def group(self, rule: Rule) -> dist.ProcessGroup:
        return self.tp_group if rule.expert is None else self.expert_group

    def tp(self, rule: Rule) -> int:
        """Over how many ranks tensor parallelism splits what the rule is about."""
        return self.tp_group.size() if rule.expert is None else self.expert_group.size() // self.ep

    def names(self, rule: Rule, config: dict) -> list[list[str]]:
        """The rule's Hugging Face names, once; for an expert's parameter, once for each
        expert-parallel rank, as each holds other experts.
        """
        if rule.expert is None:
            return [list(rule.hf)]
        here = config["num_experts"] // self.ep
        return [rule.names(rank * here + rule.expert) for rank in range(self.ep)]
