"""A Hugging Face folder as this rank's part of Megatron's GPTModel, and how the whole is split.

Everywhere here, settings are TrainSettings, and config is config.json, checked by read_config of
backends/huggingface/config.py.
"""

import base64
import dataclasses
import math
from typing import get_args, get_type_hints

import torch
from megatron.core import parallel_state as mpu
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.optimizer import OptimizerConfig
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from backends.huggingface.config import (
    expert_ranks,
    is_same_architecture,
    layers_in_last_stage,
    megatron_arguments,
    read_config,
)
from backends.huggingface.folder import HFWeights, check_shapes
from backends.huggingface.names import parameters_of, rule_of, split_stacked, stack_parts
from backends.megatron.balancing import (
    balancing_fields,
    balancing_problems,
    freeze_routers,
    without_balancing,
)
from backends.megatron.fp8_numerics import round_as_engine, te_arguments
from backends.megatron.layers import PackedRotary, complete_local_spec
from backends.megatron.layout import Layout
from backends.megatron.lora import WithoutAdapters
from common import process_groups
from common.errors import all_problems
from common.overrides import parse_overrides

# megatron-core 0.16.1 tests this name, which it defines only where Transformer Engine is installed.
moe_utils.te_general_gemm = getattr(moe_utils, "te_general_gemm", None)

# --- --megatron ---------------------------------------------------------------------------------

MEMORY_FIELDS = """
    recompute_granularity recompute_method recompute_num_layers recompute_modules
    distribute_saved_activations deallocate_pipeline_outputs moe_layer_recompute
    """
SPEED_FIELDS = """
    attention_backend masked_softmax_fusion bias_activation_fusion bias_dropout_fusion
    apply_rope_fusion gradient_accumulation_fusion persist_layer_norm memory_efficient_layer_norm
    deterministic_mode tp_comm_overlap overlap_p2p_comm batch_p2p_comm batch_p2p_sync
    moe_token_dispatcher_type moe_grouped_gemm moe_permute_fusion moe_shared_expert_overlap
    moe_enable_deepep moe_deepep_num_sms
    """
# Not fp32_residual_connection: megatron-core 0.16.1 casts the residual back wherever it is added
# (fusions/fused_bias_dropout.py), and the flag changes nothing.
ROUNDING_FIELDS = """
    attention_softmax_in_fp32 moe_router_dtype
    use_precision_aware_optimizer main_grads_dtype main_params_dtype exp_avg_dtype exp_avg_sq_dtype
    """
ADAM_FIELDS = "adam_beta1 adam_eps"  # those without a flag of their own
# Fields that --megatron may set. Any other has a flag of its own, or could make another model or
# loss of it than the engine and config.json have.
TUNABLE = {
    name
    for names in (MEMORY_FIELDS, SPEED_FIELDS, ROUNDING_FIELDS, ADAM_FIELDS)
    for name in names.split()
}

PLAIN = {bool, int, float, str, type(None)}  # types that a value of --megatron is compared with


def overrides(settings, config: dict, config_class: type) -> dict:
    """Return the fields of config_class that --megatron sets. Raises BadInput for any other name.

    config_class: TransformerConfig or OptimizerConfig.
    """
    existing = {
        field.name
        for cls in (TransformerConfig, OptimizerConfig)
        for field in dataclasses.fields(cls)
    }
    free = TUNABLE & existing - set(megatron_arguments(config, tp=1)[0]) | balancing_fields(config)
    given = parse_overrides(settings.megatron, flag="--megatron", fields=sorted(free))
    own = config_class.__dataclass_fields__
    return {name: value for name, value in given.items() if name in own}


@all_problems
def check_overrides(settings, config: dict) -> None:
    """Refuse what Megatron would not take of --megatron, before anything is started.

    The layout must be a good one: its rules are checked elsewhere.
    """
    wrong = []
    for config_class in (TransformerConfig, OptimizerConfig):
        given = overrides(settings, config, config_class)
        defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
        hints = get_type_hints(config_class)
        for name, value in given.items():
            types = set(get_args(hints[name]) or [hints[name]])
            types |= {int} if float in types else set()
            is_wrong = type(value) not in types and value != defaults[name]
            if types <= PLAIN and is_wrong:
                names = sorted(cls.__name__.replace("NoneType", "null") for cls in types)
                found = f"--megatron {name}={value!r} is of the wrong type"
                rule = f"the field is {' or '.join(names)}, {defaults[name]!r} unless set"
                wrong.append(f"{found}: {rule}")
            elif isinstance(value, float) and not math.isfinite(value):
                wrong.append(f"--megatron {name}={value!r} must be finite")
    given = overrides(settings, config, TransformerConfig)
    wrong += balancing_problems(given, is_frozen=settings.freeze_moe_router)
    yield from wrong
    if wrong:
        return
    try:
        transformer_config(settings, config)
        OptimizerConfig(**overrides(settings, config, OptimizerConfig))
    except (TypeError, ValueError, AssertionError, NotImplementedError) as error:
        yield f"--megatron {' '.join(settings.megatron)}: megatron-core refuses it: {error}"


# --- process groups and random generators -------------------------------------------------------


def expert_tp(settings) -> int:
    """Return over how many ranks one expert is split.

    With --ep whole experts are spread over ranks and none is split; else as the rest of the layer.
    """
    return 1 if settings.ep > 1 else settings.tp


def init_parallel(settings, *, seed: int) -> None:
    """Create Megatron's process groups and random generators, unless they exist. Collective."""
    if mpu.model_parallel_is_initialized():
        return
    mpu.initialize_model_parallel(
        settings.tp,
        settings.pp,
        context_parallel_size=settings.cp,
        expert_model_parallel_size=settings.ep,
        expert_tensor_parallel_size=expert_tp(settings),
        distributed_timeout_minutes=process_groups.timeout().total_seconds() / 60,
    )
    process_groups.watch_links()
    model_parallel_cuda_manual_seed(seed)


def generators() -> dict[str, str]:
    """Return the states of this rank's random generators, as base64: torch's and Megatron's.

    Megatron keeps its own for what tensor-parallel ranks must draw alike or differently.
    """
    states = {"torch": torch.get_rng_state()}
    for name, state in get_cuda_rng_tracker().get_states().items():
        states[f"megatron/{name}"] = state
    return {
        name: base64.b64encode(state.cpu().numpy().tobytes()).decode()
        for name, state in states.items()
    }


def set_generators(states: dict[str, str]) -> None:
    """Set this rank's random generators to what generators() returned."""
    tensors = {
        name: torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
        for name, text in states.items()
    }
    torch.set_rng_state(tensors.pop("torch"))
    get_cuda_rng_tracker().set_states(
        {name.removeprefix("megatron/"): state for name, state in tensors.items()}
    )


# --- the model ----------------------------------------------------------------------------------


def has_transformer_engine() -> bool:
    """Tell whether Transformer Engine imports.

    A half-installed one raises RuntimeError. That is not caught: it names its own remedy.
    """
    if not torch.cuda.is_available():
        return False
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError:
        return False
    return True


def transformer_config(settings, config: dict) -> TransformerConfig:
    """Return Megatron's config of the model, from config.json, the layout and --megatron.

    TransformerConfig checks itself and raises many kinds of errors.
    """
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[settings.train_dtype]
    use_te = has_transformer_engine()
    model_arguments, _ = megatron_arguments(config, tp=settings.tp)
    common = dict(
        tensor_model_parallel_size=settings.tp,
        pipeline_model_parallel_size=settings.pp,
        context_parallel_size=settings.cp,
        num_layers_in_last_pipeline_stage=layers_in_last_stage(config, settings.pp),
        expert_model_parallel_size=settings.ep,
        expert_tensor_parallel_size=expert_tp(settings),
        sequence_parallel=settings.tp > 1,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        pipeline_dtype=dtype,
        # Must be set before DDP is built, which decides by it whether gradients are averaged or
        # summed.
        calculate_per_token_loss=True,
        variable_seq_lengths=True,
        # variable_seq_lengths demands this dispatcher, even of a dense model.
        moe_token_dispatcher_type="alltoall",
        attention_softmax_in_fp32=True,
        masked_softmax_fusion=use_te,
        bias_activation_fusion=use_te,
        bias_dropout_fusion=use_te,
        apply_rope_fusion=use_te,
        gradient_accumulation_fusion=False,
        moe_grouped_gemm=use_te and not settings.lora_rank,  # adapters need a layer an expert
        persist_layer_norm=use_te,
    )
    if settings.train_numerics == "fp8" and use_te:
        common |= te_arguments(config)
    elif settings.train_numerics == "fp8":
        common["pipeline_dtype"] = torch.float32  # the residual stream, see layers.add_in_fp32
    given = overrides(settings, config, TransformerConfig)
    return TransformerConfig(**{**model_arguments, **common, **given})


def build_gpt(
    settings, config: dict, *, fp8: frozenset[str] | None = None
) -> tuple[GPTModel, Layout]:
    """Return this rank's part of the model, not yet filled, and how the whole is split.

    Megatron's process groups must exist. fp8: Hugging Face names of the weights that the engine
    holds in FP8, for --train-numerics fp8.
    """
    use_te = has_transformer_engine()
    as_engine = settings.train_numerics == "fp8" and not use_te
    if as_engine and fp8 is None:
        raise ValueError("--train-numerics fp8: which weights does the engine hold in FP8?")
    transformer = transformer_config(settings, config)
    _, gpt_arguments = megatron_arguments(config, tp=settings.tp)
    spec = get_gpt_decoder_block_spec(
        transformer, use_transformer_engine=use_te, normalization="RMSNorm"
    )
    if not use_te:
        norms = dict(qk_layernorm=transformer.qk_layernorm)
        spec = complete_local_spec(spec, **norms, as_engine=as_engine)
    gpt = GPTModel(
        transformer,
        spec,
        pre_process=mpu.is_pipeline_first_stage(),
        post_process=mpu.is_pipeline_last_stage(),
        **gpt_arguments,
    )
    if not use_te:
        gpt.rotary_pos_emb = PackedRotary(gpt.rotary_pos_emb)
    if gpt.post_process:
        gpt.output_layer.register_forward_hook(_fold_gradient)
    layout = Layout(
        tp_group=mpu.get_tensor_model_parallel_group(),
        expert_group=mpu.get_expert_tensor_and_model_parallel_group(),
        ep=settings.ep,
        pp_group=mpu.get_pipeline_model_parallel_group(),
        first_layer=get_transformer_layer_offset(transformer),
    )
    if as_engine:
        round_as_engine(gpt, config, layout, fp8)
    return gpt, layout


def _fold_gradient(module: torch.nn.Module, inputs: tuple, output: tuple) -> None:
    """Give the gradient of the logits [T, 1, V] the strides of a tensor that was made so.

    GPTModel transposes the logits, and so their gradient comes back as a transposed tensor. With a
    frozen vocabulary matrix, as under LoRA, torch would multiply it one token at a time, and read
    the whole matrix for each. should_fold in ATen's LinearAlgebra.cpp looks at the stride of a
    dimension of one too; where the matrix needs a gradient it does not look.
    """
    logits, _ = output
    if logits.requires_grad:
        logits.register_hook(lambda grad: grad.reshape(-1, grad.shape[-1]).view(grad.shape))


def load_model(
    folder: str, settings, config: dict, *, fp8: frozenset[str] | None = None
) -> tuple[GPTModel, Layout, torch.nn.Module]:
    """Return a model with a folder's weights, how it is split, and the model as schedules call it.

    It is on this rank's device. Megatron's process groups must exist. fp8: as for build_gpt.
    """
    gpt, layout = build_gpt(settings, config, fp8=fp8)
    if torch.cuda.is_available():
        gpt.cuda(torch.cuda.current_device())
    wrapped = Float16Module(gpt.config, gpt) if settings.train_dtype == "bf16" else gpt
    for name, buffer in gpt.named_buffers():
        # Float16Module makes them BF16. The router adds its bias to its scores in FP32, and a
        # rounded bias chooses other experts; a rounded count of tokens moves the bias wrongly.
        if ".router." in name:
            buffer.data = buffer.float()
    if settings.freeze_moe_router:
        freeze_routers(gpt)
    # Now: an optimizer that is built later copies FP32 main weights from the filled model.
    load_hf(gpt, folder, config, layout=layout)
    return gpt, layout, wrapped


def reference_settings(settings, config: dict, reference: dict):
    """Return the TrainSettings by which the reference model is built.

    They are the policy's, if the two are of one architecture. A reference of another one has the
    policy's layout and --train-dtype. It is never rounded as the engine rounds, for no engine has
    it. No balance of experts is counted in it. reference: its config.json, checked.
    """
    if is_same_architecture(config, reference):
        return settings
    ep = expert_ranks(reference, settings.ep)
    return dataclasses.replace(without_balancing(settings), ep=ep, train_numerics="plain")


def load_reference(
    model_folder: str,
    settings,
    config: dict,
    *,
    policy: torch.nn.Module | None = None,
    fp8: frozenset[str] | None = None,
) -> torch.nn.Module:
    """Return the frozen reference model as schedules call it: --reference, else the model folder.

    It is on this rank's device, or in CPU memory with --offload-reference. Its architecture may
    be another than the model's, whose checked config.json is config. fp8: as for build_gpt.
    policy: the model that is trained, as schedules call it. With LoRA and without --reference the
    reference is what it was, and takes no memory.
    """
    if settings.lora_rank and not settings.reference and policy is not None:
        return WithoutAdapters(policy)
    folder = settings.reference or model_folder
    own = read_config(folder)
    _, _, module = load_model(folder, reference_settings(settings, config, own), own, fp8=fp8)
    module.requires_grad_(False)
    return module.to("cpu") if settings.offload_reference else module


@torch.no_grad()
def load_hf(model: torch.nn.Module, folder: str, config: dict, *, layout: Layout) -> None:
    """Fill this rank's part of a GPTModel from a Hugging Face folder, reading only its own slices.

    Raises BadInput listing missing and misshapen tensors.
    """
    weights = HFWeights(folder)
    check_shapes(weights, config)
    for megatron_name, parameter in parameters_of(model):
        rule = rule_of(megatron_name, first_layer=layout.first_layer)
        if megatron_name == "output_layer.weight" and config["tie_word_embeddings"]:
            # The last pipeline stage's copy of the first stage's embedding.
            rule = rule_of("embedding.word_embeddings.weight")
        ep_rank, tp_rank = layout.place(rule)
        kv_heads = config["num_key_value_heads"] // layout.tp(rule)
        places = split_stacked(
            parameter, len(rule.hf), head_dim=config["head_dim"], groups=kv_heads
        )
        names = layout.names(rule, config)[ep_rank]
        parts = [
            _read_shard(weights, name, rule.tp_dim, tp_rank, place.shape)
            for name, place in zip(names, places)
        ]
        parameter.copy_(stack_parts(parts, groups=kv_heads))


def _read_shard(
    weights: HFWeights, name: str, tp_dim: int | None, tp_rank: int, shape: torch.Size
) -> torch.Tensor:
    """Read a tensor-parallel rank's slice of a tensor, padded with zero rows to the given shape."""
    if tp_dim is None:
        part = weights.slice(name, None, 0, 0)
    else:
        size = shape[tp_dim]
        stop = min((tp_rank + 1) * size, weights.shape(name)[tp_dim])
        part = weights.slice(name, tp_dim, tp_rank * size, stop)
    padding = shape[0] - part.shape[0]  # rows that pad the vocabulary
    return torch.nn.functional.pad(part, (0, 0, 0, padding)) if padding else part
