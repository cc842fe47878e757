"""Checks before an engine starts: of its settings, and of what it needs from the machine.

SGLang reports what a machine lacks only after half a minute. Some settings it never reports: it
samples from something else in silence.
"""

import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from math import prod
from typing import get_args, get_type_hints

import msgspec
import torch

from backends.huggingface.names import hf_shapes
from backends.sglang.engine import SERVER_FIELDS, ServerArgs
from common.errors import ProblemList, all_problems
from common.overrides import parse_overrides

# --- settings ---------------------------------------------------------------------------------

# ServerArgs fields of speed, memory, kernels and messages. No other may be set: it could change
# what is sampled, or what its log-probs are.
TUNABLE = frozenset(
    """
    mem_fraction_static max_running_requests max_total_tokens max_prefill_tokens
    chunked_prefill_size prefill_max_requests prefill_decode_interval page_size schedule_policy
    schedule_conservativeness retraction_policy num_continuous_decode_steps scheduler_recv_interval
    enable_mixed_chunk disable_chunked_prefix_cache radix_eviction_policy
    disable_radix_cache attention_backend prefill_attention_backend decode_attention_backend
    sampling_backend fp8_gemm_runner_backend bf16_gemm_backend moe_runner_backend moe_a2a_backend
    deepep_mode disable_shared_experts_fusion kv_cache_dtype enable_fp32_lm_head
    triton_attention_reduce_in_fp32 triton_attention_num_kv_splits triton_attention_split_tile_size
    disable_flashinfer_autotune disable_cuda_graph disable_cuda_graph_padding cuda_graph_max_bs
    cuda_graph_bs cuda_graph_max_bs_decode cuda_graph_max_bs_prefill cuda_graph_bs_decode
    cuda_graph_bs_prefill cuda_graph_backend_decode cuda_graph_backend_prefill
    disable_decode_cuda_graph disable_prefill_cuda_graph enable_torch_compile torch_compile_max_bs
    enable_two_batch_overlap enable_single_batch_overlap disable_custom_all_reduce enable_nccl_nvls
    enable_symm_mem enable_torch_symm_mem enable_mscclpp pre_warm_nccl enable_p2p_check
    enable_deterministic_inference dist_timeout watchdog_timeout soft_watchdog_timeout sleep_on_idle
    numa_node gc_threshold log_level log_requests log_requests_level show_time_cost
    decode_log_interval gc_warning_threshold_secs crash_dump_folder
    """.split()
)
# Of the cache of keys and values. It holds every request at its longest, and as much again for
# cached prefixes.
CACHE_OF_REQUESTS, LEAST_CACHE = 2, 8192
# Fields that something else decides. The error for such a field says what.
_SAMPLING, _UPDATE = "--temperature and --max-response-tokens", "the weight update"
DECIDED_BY = {
    "model_path": "--model",
    "tokenizer_path": "--model",
    "dtype": "--rollout-dtype",
    "quantization": "--rollout-dtype",
    "tp_size": "--engine-tp",
    "ep_size": "--engine-ep",
    "random_seed": "--seed",
    "base_gpu_id": "torchrun",
    "device": "the machine",
    "nnodes": "torchrun",
    "node_rank": "torchrun",
    "context_length": "max_position_embeddings in the model's config.json",
    "json_model_override_args": "the model's config.json and --rollout-dtype",
    "preferred_sampling_params": _SAMPLING,
    "sampling_defaults": _SAMPLING,
    "load_format": _UPDATE,
    "custom_weight_loader": _UPDATE,
    "weight_version": _UPDATE,
    "enable_memory_saver": "the loop and the kind of machine",
    "disable_overlap_schedule": "the loop: no update may meet a forward pass that still runs",
    "skip_tokenizer_init": "--model, whose tokenizer runs outside the engine",
    "chat_template": "the model's tokenizer, outside the engine",
    "custom_sigquit_handler": "this program",
}
# Without a GPU: backends/cpu is written for one value of each.
CPU_KERNELS = frozenset(
    """
    attention_backend prefill_attention_backend decode_attention_backend sampling_backend
    kv_cache_dtype fp8_gemm_runner_backend bf16_gemm_backend moe_runner_backend moe_a2a_backend
    disable_cuda_graph enable_torch_compile enable_deterministic_inference
    """.split()
)
# Choices beside those that ServerArgs names.
CHOICES = {"log_level": ("debug", "info", "warning", "error", "critical")}
ZERO_IS_RIGHT = ("log_requests_level", "numa_node", "gc_threshold", "torch_compile_max_bs")


def cache_tokens(requests: int, longest: int) -> int:
    """Return for how many tokens an engine keeps keys and values.

    requests: how many it is asked for at a time, at most. longest: tokens of the longest sample.
    """
    return max(CACHE_OF_REQUESTS * requests * longest, LEAST_CACHE)


@all_problems
def server_overrides(pairs: tuple[str, ...], *, on_gpu: bool) -> dict:
    """Return --sglang as a dict.

    Raises BadInput for what something else decides, and for what could change samples in silence.

    on_gpu: whether the engine will have a GPU. Without one, backends/cpu replaces its kernels.
    """
    decided = dict(DECIDED_BY)
    if not on_gpu:
        by = "backends/cpu, which replaces the engine's kernels without a GPU"
        decided |= dict.fromkeys(CPU_KERNELS, by)
    allowed = [name for name in SERVER_FIELDS if name in TUNABLE and name not in decided]
    found, rest = ProblemList(), []
    for pair in pairs:
        name, has_value, _ = pair.partition("=")
        if has_value and name in decided:
            yield f"--sglang {name} is decided by {decided[name]}: leave it out"
        elif has_value and name in SERVER_FIELDS and name not in allowed:
            yield (
                f"--sglang {name} cannot be set: only fields of speed, memory, kernels and messages"
                " can, as the others may change samples in silence"
            )
        else:
            rest.append(pair)
    overrides = found.collect(parse_overrides, tuple(rest), flag="--sglang", fields=allowed)
    yield from found.texts
    for name, value in (overrides or {}).items():
        yield from _value_problems(name, value)
    return overrides


def _field_types() -> dict:
    # 0.5.21's ServerArgs is a struct of msgspec, 0.5.14's a dataclass.
    if hasattr(ServerArgs, "__struct_fields__"):
        return {field.name: field.type for field in msgspec.structs.fields(ServerArgs)}
    return get_type_hints(ServerArgs, include_extras=True)


FIELD_TYPES = _field_types()


def _value_problems(name: str, value) -> Iterator[str]:
    """Yield what is wrong with the value of a ServerArgs field: its type, its choice, its size."""
    given = f"--sglang {name}={value}"
    try:
        msgspec.convert(value, FIELD_TYPES[name])
    except msgspec.ValidationError as error:
        yield f"{given}: {str(error).lower()}"
        return
    if value is not None and (choices := _choices(name)) and value not in choices:
        yield f"{given} must be one of {', '.join(map(str, choices))}"
        return
    if name == "mem_fraction_static" and (value is None or not 0 < value < 1):
        yield f"{given} must be a number between 0 and 1"
        return
    if name == "chunked_prefill_size" and value == -1:  # not in chunks
        return
    numbers = value if isinstance(value, list) else [value]
    numbers = [number for number in numbers if type(number) in (int, float)]
    is_integer = bool(numbers) and type(numbers[0]) is int
    least, rule = (1, "at least 1") if is_integer else (1e-9, "above 0")
    if name in ZERO_IS_RIGHT:
        least, rule = 0, "at least 0"
    if not all(least <= number < 1e12 for number in numbers):
        yield f"{given} must be {rule}, and finite"


def _choices(name: str) -> tuple | list | None:
    """Return what a ServerArgs field may be, None if that is not a choice."""
    if name in CHOICES:
        return CHOICES[name]
    for annotation in get_args(FIELD_TYPES[name])[1:]:
        if isinstance(choices := getattr(annotation, "choices", None), list):
            return choices
    return None


# --- the machine ------------------------------------------------------------------------------

# Environment variables by which SGLang changes every request without a word.
ENGINE_VARIABLES = {
    "SGLANG_RETURN_ORIGINAL_LOGPROB": "reports log-probs of temperature 1",
    "SGLANG_MAX_NEW_TOKENS_LIMIT": "cuts answers short",
}
SHARED_MEMORY = "/dev/shm"
SOCKET_PATH_BYTES = 107  # of sockaddr_un.sun_path, without the zero at its end
# The longest name that is made below the temporary folder: the socket by which multiprocessing
# passes a tensor's memory to another process (multiprocessing.util.get_temp_dir,
# connection.arbitrary_address). The names of SGLang's zmq sockets are shorter.
SOCKET_NAME_BYTES = len("/pymp-xxxxxxxx/listener-xxxxxxxx")
BUCKETS_SHARED = 2  # at a time: the engine loads one, and has not given back the one before
FILES_OF_A_RANK = 256  # an allowance for all open files and sockets but those of a bucket


@all_problems
def check_environment(
    config: dict | None, *, bucket_bytes: int, element_bytes: int, engines_here: int
) -> None:
    """Refuse a machine on which an engine could not work.

    Looks at environment variables, the temporary folder, shared memory and the limit of open files.

    config: None where it could not be read. element_bytes: of an unquantized weight as it is sent,
    2 or 4. engines_here: engines on this machine; 0 for a run that starts none.
    """
    if engines_here < 1:
        return
    for name, effect in ENGINE_VARIABLES.items():
        if os.environ.get(name, "").lower() not in ("", "0", "false"):
            given = f"the environment variable {name}={os.environ[name]}"
            yield f"{given} must not be set: by it SGLang {effect}"
    yield from _temporary_folder_problems()
    if config is None or torch.cuda.is_available() or bucket_bytes < 1:
        yield from _open_files_problems([], 0)
        return  # on a GPU, buckets travel by CUDA IPC
    sizes = sorted(prod(shape) * element_bytes for shape in hf_shapes(config).values())
    bucket = min(bucket_bytes + sizes[-1], sum(sizes))
    yield from _shared_memory_problems(bucket, engines_here)
    yield from _open_files_problems(sizes, bucket)


def _shared_memory_problems(bucket: int, engines_here: int) -> Iterator[str]:
    """Yield if the buckets of a weight update do not fit. bucket: bytes of the largest."""
    if not os.path.isdir(SHARED_MEMORY) or not os.access(SHARED_MEMORY, os.W_OK | os.X_OK):
        fix = "mount a tmpfs there"
        yield f"{SHARED_MEMORY} cannot be written: weights travel through it to the engine; {fix}"
        return
    needed, free = BUCKETS_SHARED * bucket * engines_here, shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        size = f"{bucket / 1e6:,.1f} MB"
        what = f"{BUCKETS_SHARED} buckets of {size} for each of {engines_here} engines"
        fix = "lower --bucket-bytes, or mount it larger (docker run --shm-size)"
        yield (
            f"{SHARED_MEMORY} has {free / 1e6:,.1f} MB free, but a weight update needs"
            f" {needed / 1e6:,.1f} MB: {what}; {fix}"
        )


def _temporary_folder_problems() -> Iterator[str]:
    """Yield what is wrong with the folder of temporary files.

    Where Python cannot write to TMPDIR, it takes another folder without a word.
    """
    name = next((name for name in ("TMPDIR", "TEMP", "TMP") if os.environ.get(name)), None)
    try:
        folder = os.environ[name] if name else tempfile.gettempdir()
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(b"x")
    except (OSError, ValueError) as error:
        given = f"{name} {os.environ[name]!r}" if name else "the folder of temporary files"
        yield f"{given} cannot be written ({error}): set TMPDIR to a folder that can"
        return
    length, most = len(os.fsencode(os.path.abspath(folder))), SOCKET_PATH_BYTES - SOCKET_NAME_BYTES
    if length > most:
        yield (
            f"{name or 'TMPDIR'} {folder} has {length} bytes; sockets below it allow at most"
            f" {most}: set TMPDIR to a shorter path, such as /tmp"
        )


def _open_files_problems(sizes: list[int], bucket: int) -> Iterator[str]:
    """Yield if this process may not open enough files to verify a bucket of the smallest tensors.

    Each tensor takes an open file, and its copy for the engine another. run_main raises the soft
    limit. sizes: bytes of all tensors, sorted. bucket: bytes of the largest bucket.
    """
    tensors = _most_tensors_in_a_bucket(sizes, bucket)
    needed = FILES_OF_A_RANK + 2 * tensors
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < needed:
        helps = tensors > 1 and hard >= FILES_OF_A_RANK + 2
        yield (
            f"a process may open {hard} files, but a rank with its engine needs up to {needed}:"
            f" raise the hard limit (ulimit -Hn){', or lower --bucket-bytes' if helps else ''}"
        )


def _most_tensors_in_a_bucket(sizes: list[int], bucket: int) -> int:
    """Return how many of the smallest tensors it takes to exceed a bucket, or of all tensors."""
    taken = 0
    for n, size in enumerate(sizes, start=1):
        if taken > bucket:
            return n
        taken += size
    return len(sizes)
