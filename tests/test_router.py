"""Routers of a mixture of experts: each one that is accepted routes as in transformers.

Why: a trainer that chooses other experts than the engine still trains, on samples of another model.
The tests try every GLM-4.5 router of eight experts. An accepted one gives each token the same
experts and weights in Megatron and transformers. A refused one does not. Not covered: SGLang's own
kernels, which test_engine.py compares as whole models.
"""

import types

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
from test_problems import changed_config
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeMoE
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from backends.huggingface.config import megatron_arguments, read_config
from common.errors import BadInput

EXPERTS = 8
ROUTERS = [
    (groups, of_groups, chosen)
    for groups in (1, 2, 4, 8)
    for of_groups in range(1, groups + 1)
    for chosen in range(1, EXPERTS + 1)
]


def scores() -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits [4096 tokens, 8 experts] and a correction bias.

    The bias makes some scores negative.
    """
    random = torch.Generator().manual_seed(0)
    return torch.randn(4096, EXPERTS, generator=random), torch.randn(EXPERTS, generator=random) / 4


def glm_fields(groups: int, of_groups: int, chosen: int) -> dict:
    return dict(
        n_routed_experts=EXPERTS, num_local_experts=EXPERTS, n_group=groups, topk_group=of_groups,
        num_experts_per_tok=chosen, norm_topk_prob=True, routed_scaling_factor=1.7,
    )  # fmt: skip


def by_glm(fields: dict) -> torch.Tensor:
    """Return the weight of each expert for each token as transformers' Glm4MoeMoE computes it."""
    logits, bias = scores()
    layer = types.SimpleNamespace(**fields, top_k=fields["num_experts_per_tok"])
    layer.gate = types.SimpleNamespace(e_score_correction_bias=bias)
    experts, weights = Glm4MoeMoE.route_tokens_to_experts(layer, logits)
    return torch.zeros_like(logits).scatter(1, experts, weights)


def by_megatron(arguments: dict, *, bias: torch.Tensor | None) -> torch.Tensor:
    weights, _ = topk_routing_with_score_function(
        scores()[0],
        arguments["moe_router_topk"],
        num_groups=arguments.get("moe_router_num_groups"),
        group_topk=arguments.get("moe_router_group_topk"),
        scaling_factor=arguments.get("moe_router_topk_scaling_factor"),
        score_function=arguments.get("moe_router_score_function", "softmax"),
        expert_bias=bias,
    )
    return weights


def refused_arguments(groups: int, of_groups: int, chosen: int) -> dict:
    """Return the arguments that the mapping would give without the refusal."""
    return dict(
        moe_router_topk=chosen, moe_router_num_groups=groups, moe_router_group_topk=of_groups,
        moe_router_topk_scaling_factor=1.7, moe_router_score_function="sigmoid",
    )  # fmt: skip


def accepted(folder) -> dict | None:
    try:
        return megatron_arguments(read_config(folder), tp=1)[0]
    except BadInput:
        return None


@pytest.mark.parametrize("groups, of_groups, chosen", ROUTERS)
def test_a_glm_router_is_accepted_exactly_where_it_routes_alike(
    tmp_path, groups, of_groups, chosen
):
    fields = glm_fields(groups, of_groups, chosen)
    arguments = accepted(changed_config(tmp_path, "glm4_moe", **fields))
    impossible = chosen > of_groups * (EXPERTS // groups) or EXPERTS // groups < 2
    if impossible:  # transformers raises, or takes experts of groups that it has not chosen
        assert arguments is None
        return
    if arguments is not None:
        torch.testing.assert_close(by_megatron(arguments, bias=scores()[1]), by_glm(fields))
        return
    try:
        theirs = by_megatron(refused_arguments(groups, of_groups, chosen), bias=scores()[1])
    except RuntimeError:  # a group has fewer experts than are to be chosen from it
        return
    assert not torch.allclose(theirs, by_glm(fields), atol=1e-3)


def test_some_routers_with_groups_are_accepted(tmp_path):
    of_groups = [router for router in ROUTERS if 1 < router[0] and router[1] < router[0]]
    kept = [
        router
        for router in of_groups
        if accepted(changed_config(tmp_path, "glm4_moe", **glm_fields(*router)))
    ]
    assert kept == [(2, 1, 2), (4, 1, 2), (4, 2, 4), (4, 3, 6)]


@pytest.mark.parametrize("chosen", range(1, EXPERTS + 1))
def test_a_qwen_router_that_is_accepted_routes_alike(tmp_path, chosen):
    fields = dict(num_experts=EXPERTS, num_local_experts=EXPERTS, num_experts_per_tok=chosen)
    arguments = accepted(changed_config(tmp_path, "qwen3_moe", **fields))
    if chosen == 1:  # Megatron refuses a softmax over one expert
        assert arguments is None
        return
    logits, _ = scores()
    router = Qwen3MoeTopKRouter(
        types.SimpleNamespace(hidden_size=EXPERTS, norm_topk_prob=True, **fields)
    )
    router.weight.data = torch.eye(EXPERTS)
    _, weights, experts = router(logits)
    expected = torch.zeros_like(logits).scatter(1, experts, weights)
    torch.testing.assert_close(by_megatron(arguments, bias=None), expected)


@pytest.mark.parametrize("family, changes, message", [
    ("glm4_moe", dict(n_group=4, topk_group=2, n_routed_experts=8, num_local_experts=8),
     "num_experts_per_tok // topk_group is 2; here it is 2 // 2 = 1"),
    ("glm4_moe", dict(n_group=4, topk_group=4), "groups of 1 expert"),
    ("glm4_moe", dict(n_group=2, topk_group=1, num_experts_per_tok=4),
     "must be at most 2, the experts"),
    ("glm4_moe", dict(num_experts_per_tok=1), "num_experts_per_tok is 1"),
    ("qwen3_moe", dict(num_experts_per_tok=1), "num_experts_per_tok is 1"),
    ("glm4_moe", dict(norm_topk_prob=False), "norm_topk_prob is False"),
    ("qwen3_moe", dict(norm_topk_prob=False), "norm_topk_prob is False"),
    ("glm4_moe", dict(scoring_func="softmax"), "scoring_func is 'softmax'"),
    ("qwen3_moe", dict(scoring_func="sigmoid"), "scoring_func is 'sigmoid'"),
    ("glm4_moe", dict(topk_method="group_limited_greedy"), "topk_method"),
    ("qwen3_moe", dict(topk_method="noaux_tc"), "'topk_method' is unknown"),
    ("qwen3_moe", dict(routed_scaling_factor=2.5), "'routed_scaling_factor' is unknown"),
    ("qwen3_moe", dict(n_shared_experts=1), "'n_shared_experts' is unknown"),
    ("qwen3_moe", dict(n_group=2, topk_group=1), "'n_group' is unknown"),
    ("qwen3_moe", dict(first_k_dense_replace=1), "'first_k_dense_replace' is unknown"),
    ("qwen3_moe", dict(use_qk_norm=False), "'use_qk_norm' is unknown"),
    ("qwen3_moe", dict(decoder_sparse_step=2), "decoder_sparse_step is 2"),
    ("qwen3_moe", dict(mlp_only_layers=[0]), "mlp_only_layers is .0."),
    ("qwen3_moe", dict(num_experts=4, num_local_experts=8), "keep one of these fields"),
    ("glm4_moe", dict(num_experts=8), "keep one of these fields"),
    ("glm4_moe", dict(n_shared_experts=None), "n_shared_experts"),
    ("glm4_moe", dict(routed_scaling_factor=None), "routed_scaling_factor"),
    ("glm4_moe", dict(norm_topk_prob="false"), "norm_topk_prob"),
    ("glm4_moe", dict(norm_topk_prob=None), "norm_topk_prob"),
    ("qwen3", dict(scoring_func="sigmoid"), "'scoring_func' is unknown"),
])  # fmt: skip
def test_a_router_field_that_would_be_lost_is_refused(tmp_path, family, changes, message):
    with pytest.raises(BadInput, match=message):
        read_config(changed_config(tmp_path, family, **changes))


def test_scoring_functions_that_say_what_is_computed_are_accepted(tmp_path):
    for family, name in (("qwen3_moe", "softmax"), ("glm4_moe", "sigmoid")):
        read_config(changed_config(tmp_path, family, scoring_func=name))


def test_the_number_of_experts_is_the_one_that_the_engine_reads(tmp_path):
    """GLM's own field is n_routed_experts. Without it the engine takes GLM-4.5's 128."""
    folder = changed_config(tmp_path, "glm4_moe", without=["n_routed_experts"], num_experts=4)
    with pytest.raises(BadInput, match="experts"):
        read_config(folder)
