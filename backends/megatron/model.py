"""Hugging Face folder -> this rank's part of Megatron's GPTModel, filled, and how the whole is
split over ranks.

Everywhere here, settings are TrainSettings and config is config.json, checked
(hf_config.read_config).
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
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from backends.huggingface.config import layers_in_last_stage, megatron_arguments
from backends.huggingface.folder import load_hf
from backends.megatron.layers import complete_local_spec
from backends.megatron.layout import Layout
from common import process_groups
from common.errors import all_problems
from common.overrides import parse_overrides

# Fields that --megatron may set. Any other could make another model or another loss of it than the
# engine and config.json have, or is set by a flag of its own.
TUNABLE = {
    # memory
    "recompute_granularity", "recompute_method", "recompute_num_layers", "recompute_modules", "distribute_saved_activations",
    "deallocate_pipeline_outputs", "moe_layer_recompute", "optimizer_cpu_offload", "optimizer_offload_fraction",
    # speed
    "attention_backend", "masked_softmax_fusion", "bias_activation_fusion", "bias_dropout_fusion", "apply_rope_fusion", "gradient_accumulation_fusion",
    "persist_layer_norm", "memory_efficient_layer_norm", "deterministic_mode", "tp_comm_overlap", "overlap_p2p_comm", "batch_p2p_comm", "batch_p2p_sync",
    "moe_token_dispatcher_type", "moe_grouped_gemm", "moe_permute_fusion", "moe_shared_expert_overlap", "moe_enable_deepep", "moe_deepep_num_sms",
    # rounding
    "fp32_residual_connection", "attention_softmax_in_fp32", "moe_router_dtype", "use_precision_aware_optimizer", "main_grads_dtype", "main_params_dtype",
    "exp_avg_dtype", "exp_avg_sq_dtype",
    # Adam's constants that have no flag
    "adam_beta1", "adam_eps",
}  # fmt: skip

PLAIN = {bool, int, float, str, type(None)}  # types that a value of --megatron is compared with


def has_transformer_engine() -> bool:
    """Whether Transformer Engine imports.

    A half-installed one raises RuntimeError, which is not hidden: it names its own remedy.
    """
    if not torch.cuda.is_available():
        return False
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError:
        return False
    return True


def overrides(settings, config: dict, config_class: type) -> dict:
    """Return the part of --megatron that are fields of config_class.

    What is not in TUNABLE is no field that can be set.
    """
    own = {
        field.name
        for cls in (TransformerConfig, OptimizerConfig)
        for field in dataclasses.fields(cls)
    }
    free = TUNABLE & own - set(megatron_arguments(config, tp=1)[0])
    given = parse_overrides(settings.megatron, flag="--megatron", fields=sorted(free))
    return {
        name: value for name, value in given.items() if name in config_class.__dataclass_fields__
    }


def expert_tp(settings) -> int:
    """Over how many ranks one expert is split: as the rest of the layer, unless experts are spread
    over ranks.
    """
    return 1 if settings.ep > 1 else settings.tp


def init_parallel(settings, *, seed: int) -> None:
    """Megatron's process groups and random generators, unless they are there. Collective."""
    if not mpu.model_parallel_is_initialized():
        experts = dict(
            expert_model_parallel_size=settings.ep, expert_tensor_parallel_size=expert_tp(settings)
        )
        waits = dict(distributed_timeout_minutes=process_groups.timeout().total_seconds() / 60)
        sizes = dict(context_parallel_size=settings.cp, **experts)
        mpu.initialize_model_parallel(settings.tp, settings.pp, **sizes, **waits)
        process_groups.watch_links()
        model_parallel_cuda_manual_seed(seed)


def generators() -> dict[str, str]:
    """Return this rank's random generators: torch's, and those that Megatron keeps for what
    tensor-parallel ranks must draw alike or differently.
    """
    states = {
        "torch": torch.get_rng_state(),
        **{
            f"megatron/{name}": state for name, state in get_cuda_rng_tracker().get_states().items()
        },
    }
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


def transformer_config(settings, config: dict) -> TransformerConfig:
    """Return what Megatron is told of the model: by config.json, by the layout, and by --megatron.

    It checks itself, and raises many kinds of errors.
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
        # Before DDP is built: it decides there whether gradients are averaged or summed
        calculate_per_token_loss=True,
        variable_seq_lengths=True,
        # variable_seq_lengths asks for it, even of a dense model
        moe_token_dispatcher_type="alltoall",
        attention_softmax_in_fp32=True,
        masked_softmax_fusion=use_te,
        bias_activation_fusion=use_te,
        bias_dropout_fusion=use_te,
        apply_rope_fusion=use_te,
        gradient_accumulation_fusion=False,
        moe_grouped_gemm=use_te,
        persist_layer_norm=use_te,
    )
    return TransformerConfig(
        **{**model_arguments, **common, **overrides(settings, config, TransformerConfig)}
    )


@all_problems
def check_overrides(settings, config: dict) -> None:
    """What Megatron would not take of --megatron, before anything is started.

    The layout must be a good one: its rules are checked elsewhere.
    """
    wrong = []
    for config_class in (TransformerConfig, OptimizerConfig):
        defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
        hints = get_type_hints(config_class)
        for name, value in overrides(settings, config, config_class).items():
            kinds = set(get_args(hints[name]) or [hints[name]])
            kinds |= {int} if float in kinds else set()
            if kinds <= PLAIN and type(value) not in kinds and value != defaults[name]:
                kind = " or ".join(
                    sorted(kind.__name__.replace("NoneType", "null") for kind in kinds)
                )
                found = f"--megatron {name}={value!r} is of the wrong type"
                wrong.append(f"{found}: the field is {kind}, {defaults[name]!r} unless set")
            elif isinstance(value, float) and not math.isfinite(value):
                wrong.append(f"--megatron {name}={value!r} must be finite")
    yield from wrong
    if wrong:
        return
    try:
        transformer_config(settings, config)
        OptimizerConfig(**overrides(settings, config, OptimizerConfig))
    except (TypeError, ValueError, AssertionError, NotImplementedError) as error:
        yield f"--megatron {' '.join(settings.megatron)}: megatron-core refuses it: {error}"


def build_gpt(settings, config: dict) -> tuple[GPTModel, Layout]:
    """This rank's part of the model, not yet filled, and how the whole is split.

    Megatron's process groups must be there.
    """
    use_te = has_transformer_engine()
    transformer, (_, gpt_arguments) = (
        transformer_config(settings, config),
        megatron_arguments(config, tp=settings.tp),
    )
    spec = get_gpt_decoder_block_spec(
        transformer, use_transformer_engine=use_te, normalization="RMSNorm"
    )
    if not use_te:
        spec = complete_local_spec(spec, qk_layernorm=transformer.qk_layernorm)
    gpt = GPTModel(
        transformer,
        spec,
        pre_process=mpu.is_pipeline_first_stage(),
        post_process=mpu.is_pipeline_last_stage(),
        **gpt_arguments,
    )
    layout = Layout(
        mpu.get_tensor_model_parallel_group(),
        mpu.get_expert_tensor_and_model_parallel_group(),
        settings.ep,
        mpu.get_pipeline_model_parallel_group(),
        get_transformer_layer_offset(transformer),
    )
    return gpt, layout


def load_model(folder: str, settings, config: dict) -> tuple[GPTModel, Layout, torch.nn.Module]:
    """A model with a folder's weights on this rank's device, how it is split, and the model as
    Megatron's schedules call it.
    """
    gpt, layout = build_gpt(settings, config)
    if torch.cuda.is_available():
        gpt.cuda(torch.cuda.current_device())
    wrapped = Float16Module(gpt.config, gpt) if settings.train_dtype == "bf16" else gpt
    for name, buffer in gpt.named_buffers():
        if name.endswith(
            "router.expert_bias"
            # Float16Module makes it BF16; the router adds it to its scores in FP32, and a rounded one
            # chooses others
        ):
            buffer.data = buffer.float()
    load_hf(gpt, folder, config, layout=layout)  # before an optimizer copies FP32 main weights
    return gpt, layout, wrapped
