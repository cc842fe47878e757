"""Start an SGLang engine with a model's shapes: which ServerArgs it gets, and why."""

import json
import math
import signal

import torch
import torch.distributed as dist

from backends.huggingface.names import fp8_config
from backends.sglang import gpu
from backends.sglang.checks import cache_tokens, server_overrides
from backends.sglang.engine import BUCKETS, Engine
from common.errors import BadInput
from common.process_groups import held_port
from common.settings import RolloutSettings

LOADERS = ["load_bucket", "compare_loader"]  # called by name, in the engine's process
DTYPES = {"fp8": "bfloat16", "bf16": "bfloat16", "fp32": "float32"}


def launch_engine(
    model_folder: str,
    settings: RolloutSettings,
    config: dict,
    *,
    seed: int,
    longest: int | None = None,
    colocated: bool = False,
    keeps_weights: bool = False,
    requests: int | None = None,
    reports_experts: bool = False,
) -> Engine:
    """Start an engine with shapes and quantization of the model, but no weights yet.

    longest: prompt and response tokens of the longest possible sample. Raises BadInput if the
    engine found no memory for so many. requests: how many samples the engine is asked for at a
    time, at most. Without the two its cache is as large as it can be. reports_experts: whether
    answers tell which experts each token took. The others: see gpu.server_args.
    """
    arguments = dict(
        model_path=model_folder,
        dtype=DTYPES[settings.rollout_dtype],
        load_format="dummy",
        tp_size=settings.engine_tp,
        ep_size=settings.engine_ep,
        skip_tokenizer_init=True,
        custom_weight_loader=[f"{BUCKETS}.{name}" for name in LOADERS],
        custom_sigquit_handler=signal.getsignal(signal.SIGQUIT),
        random_seed=seed + dist.get_rank(),
        log_level="error",
        enable_return_routed_experts=reports_experts,
    )
    if torch.cuda.is_available():
        arguments |= gpu.server_args(settings, colocated=colocated, keeps_weights=keeps_weights)
    else:
        from backends.cpu.sglang import SERVER_ARGS  # here: on a cluster the folder may be gone

        arguments.update(SERVER_ARGS)
    if requests and longest:
        # SGLang takes its cache's places in turn: in time it touches all, however few are needed.
        # On a GPU it would map half of the memory after each step.
        most = arguments.get("max_total_tokens", math.inf)
        arguments["max_total_tokens"] = min(cache_tokens(requests, longest), most)
    if settings.rollout_dtype == "fp8":
        split = dict(engine_tp=settings.engine_tp, engine_ep=settings.engine_ep)
        overrides = {"quantization_config": fp8_config(config, **split)}
        arguments["json_model_override_args"] = json.dumps(overrides)
    arguments |= server_overrides(settings.sglang, on_gpu=torch.cuda.is_available())
    with held_port() as port:  # SGLang would let go of its port while the child starts
        engine = Engine(config, settings.answer_timeout_s, nccl_port=port, **arguments)
    # SGLang's TpModelWorker takes off 5 for a prompt; of these the last position stays free.
    room = engine.tokenizer_manager.max_req_input_len + 4
    if longest is not None and longest > room:
        engine.shutdown()
        fix = "raise --sglang mem_fraction_static, or lower --max-response-tokens"
        raise BadInput(
            f"the longest sample has {longest} tokens, but the engine has memory for {room}, and"
            f" would cut the answer: {fix}"
        )
    return engine
