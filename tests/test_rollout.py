"""Rollout settings that cannot work, and machines on which no engine could start.

Why: an engine needs a minute to start on a GPU, and a setting that it takes for another one changes
the samples in silence. No test here starts an engine. Prompts are in test_prompts.py, generation in
test_engine.py. Not covered: settings that need a GPU.
"""

import os
import resource
import shutil
import socket
import tempfile
from multiprocessing.connection import Listener
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from backends.huggingface.config import read_config
from backends.sglang import checks as engine_checks, launch
from backends.sglang.checks import check_environment, server_overrides
from common.errors import BadInput
from common.settings import RolloutSettings
from data.sample import Sample
from harness.checks import check_rollout_flags
from harness.model_checks import check_rollout_settings
from rollout import sampling_params

TOY = ROOT / "toy"


@pytest.mark.parametrize("changes, message", [
    (dict(temperature=0.0), "--temperature 0.0 must be above 0"),
    (dict(temperature=-1.0), "--temperature -1.0 must be above 0"),
    (dict(temperature=1e-7), "--temperature 1e-07 must lie between 0.01 and 100"),
    (dict(temperature=0.0099), "--temperature 0.0099 must lie between"),
    (dict(temperature=float("inf")), "--temperature inf must lie between"),
    (dict(temperature=float("nan")), "--temperature nan must lie between"),
    (dict(temperature=101.0), "--temperature 101.0 must lie between"),
    (dict(prompts_per_step=3), "not divisible by the 2 engines"),
    (dict(engine_tp=3), "--engine-tp 3 does not divide the 2 ranks"),
    (dict(engine_tp=2, engine_ep=4), "--engine-ep 4 must divide --engine-tp 2"),
    (dict(samples_per_prompt=1), "at least 2"),
    (dict(max_response_tokens=0), "--max-response-tokens 0 must be at least 1"),
    (dict(eval_samples=0), "--eval-samples 0"),
    (dict(eval_samples=10**20),
     "--eval-samples 100000000000000000000 must lie between 1 and 100,000"),
    (dict(eval_samples_per_prompt=0), "--eval-samples-per-prompt 0"),
    (dict(sglang=("log_level",)), "--sglang 'log_level' is not of the form key=value"),
])  # fmt: skip
def test_flags_that_cannot_work(changes, message):
    with pytest.raises(BadInput, match=message):
        check_rollout_flags(RolloutSettings(**changes), ranks=2)


@pytest.mark.parametrize("changes, message", [
    (dict(max_response_tokens=256), "context, 256"),
    (dict(sglang=("mem_fraction_sttic=0.5",)), "nearest is mem_fraction_static"),
    (dict(engine_tp=3), "num_attention_heads 4 is not divisible by --engine-tp 3"),
    (dict(engine_tp=2, engine_ep=2), "--engine-ep 2 must divide the model's 0 experts"),
])  # fmt: skip
def test_settings_that_the_model_does_not_allow(models, changes, message):
    with pytest.raises(BadInput, match=message):
        check_rollout_settings(RolloutSettings(**changes), read_config(models["qwen3"]))


@pytest.mark.parametrize("temperature", [0.01, 0.6, 1, 100.0])
def test_temperatures_that_hold_are_not_refused(temperature):
    check_rollout_flags(RolloutSettings(temperature=temperature), ranks=2)


# --- --sglang ---------------------------------------------------------------------------------


@pytest.mark.parametrize("pair, decided_by", [
    ("dtype=half", "--rollout-dtype"),
    ("json_model_override_args={}", "config.json and --rollout-dtype"),
    ("context_length=12", "max_position_embeddings"),
    ('preferred_sampling_params={"top_k": 1}', "--temperature"),
    ("sampling_defaults=model", "--temperature"),
    ("random_seed=3", "--seed"),
    ("weight_version=x", "the weight update"),
    ("tokenizer_path=x", "--model"),
    ("nnodes=2", "torchrun"),
    ("attention_backend=flashinfer", "backends/cpu"),
    ("kv_cache_dtype=fp8_e5m2", "backends/cpu"),
    ("enable_deterministic_inference=true", "backends/cpu"),
])  # fmt: skip
def test_what_something_else_decides_is_refused_by_its_name(pair, decided_by):
    with pytest.raises(
        BadInput, match=f"--sglang {pair.partition('=')[0]} is decided by .*{decided_by}"
    ):
        server_overrides((pair,), on_gpu=False)


@pytest.mark.parametrize("name", [
    "allow_auto_truncate", "speculative_algorithm", "speculative_num_steps", "enable_lora",
    "lora_paths", "enable_custom_logit_processor", "forward_hooks",
    "dist_init_addr", "pp_size", "dp_size", "enable_dp_attention", "model_impl",
    "trust_remote_code", "is_embedding", "revision", "quantization_param_path",
    "cpu_offload_gb", "disaggregation_mode", "dllm_algorithm", "rl_on_policy_target",
    "tokenizer_mode", "stream_interval", "enable_eplb", "max_queued_requests",
    "ep_num_redundant_experts", "debug_tensor_dump_input_file", "enable_tf32_matmul",
    "reasoning_parser", "host", "port", "enable_hierarchical_cache",
])  # fmt: skip
def test_what_could_change_samples_in_silence_is_refused(name):
    with pytest.raises(BadInput, match=f"--sglang {name} cannot be set"):
        server_overrides((f"{name}=1",), on_gpu=True)


@pytest.mark.parametrize("pair", [
    "max_total_tokens=many", "max_total_tokens=5.5", "max_total_tokens=true", "max_total_tokens=-5",
    "max_total_tokens=0", "mem_fraction_static=2",
    "mem_fraction_static=0", "mem_fraction_static=null", "mem_fraction_static=NaN",
    "mem_fraction_static=half", "log_level=7", "log_level=loud",
    "schedule_policy=best", "disable_radix_cache=1", "disable_radix_cache=True",
    "chunked_prefill_size=-2", "watchdog_timeout=Infinity", "numa_node=0",
    "cuda_graph_bs_decode=[1, -2]",
])  # fmt: skip
def test_a_value_of_another_type_or_size_is_refused(pair):
    with pytest.raises(BadInput) as refused:
        server_overrides((pair,), on_gpu=True)
    assert len(refused.value.problems) == 1
    assert str(refused.value).startswith(f"--sglang {pair.partition('=')[0]}=")


def test_good_values_are_taken_as_they_are():
    values = {
        "mem_fraction_static=0.8": 0.8,
        "enable_deterministic_inference=true": True,
        "attention_backend=fa3": "fa3",
        "numa_node=[0]": [0],
        "chunked_prefill_size=-1": -1,
    }
    expected = {pair.partition("=")[0]: value for pair, value in values.items()}
    assert server_overrides(tuple(values), on_gpu=True) == expected


def test_a_field_given_twice_is_refused():
    with pytest.raises(BadInput, match="max_total_tokens is given twice"):
        server_overrides(("max_total_tokens=90000", "max_total_tokens=80000"), on_gpu=False)


def test_all_bad_fields_are_said_at_once():
    with pytest.raises(BadInput) as refused:
        server_overrides(
            ("dtype=half", "lora_paths=x", "log_level", "max_totl_tokens=5"), on_gpu=True
        )
    assert len(refused.value.problems) == 4


# --- limits of the engine ---------------------------------------------------------------------


@pytest.mark.parametrize("fields, longest, is_cut", [
    ((), 65534, False), ((), 65535, True), (("max_total_tokens=100",), 98, False),
    (("max_total_tokens=100",), 99, True),
    (("max_total_tokens=100", "page_size=16"), 64, False),
    (("max_total_tokens=100", "page_size=16"), 65, True),
])  # fmt: skip
def test_a_cache_that_would_cut_the_longest_answer_is_refused(fields, longest, is_cut):
    config = read_config(TOY) | {"max_position_embeddings": 10**6}
    settings = RolloutSettings(max_response_tokens=40, sglang=fields)
    if not is_cut:
        return check_rollout_settings(settings, config, longest=longest, on_gpu=False)
    with pytest.raises(BadInput, match=f"have {longest} tokens, but the engine keeps"):
        check_rollout_settings(settings, config, longest=longest, on_gpu=False)


def test_a_cache_smaller_than_an_answer_is_refused_before_prompts_are_known():
    settings = RolloutSettings(max_response_tokens=40, sglang=("max_total_tokens=42",))
    rule = "an answer alone, by --max-response-tokens, can have 41 tokens"
    with pytest.raises(BadInput, match=rule):
        check_rollout_settings(settings, None, on_gpu=False)


def test_a_plan_for_gpus_has_not_the_cpu_engine_s_cache():
    config = read_config(TOY) | {"max_position_embeddings": 10**6}
    check_rollout_settings(
        RolloutSettings(max_response_tokens=100_000), config, longest=200_000, on_gpu=True
    )


def test_a_prompt_that_the_engine_would_refuse_is_refused_before():
    """SGLang takes prompts shorter than the context minus 6, however short the answer is."""
    settings = RolloutSettings(max_response_tokens=2)
    check_rollout_settings(settings, read_config(TOY), longest=512 - 7 + 2)
    with pytest.raises(
        BadInput, match="longest prompt has 506 tokens; the engine takes at most 505"
    ):
        check_rollout_settings(settings, read_config(TOY), longest=512 - 6 + 2)


@pytest.mark.parametrize("requests, longest, cached", [
    (100, 200, 2 * 100 * 200),
    (1, 20, 8192),  # the least
    (256, 200, 65536),  # the most
    (None, None, 65536),  # an engine of a script of one's own
])  # fmt: skip
def test_a_cpu_s_cache_holds_twice_what_is_asked_within_bounds(
    monkeypatch, requests, longest, cached
):
    found = {}
    engine = SimpleNamespace(tokenizer_manager=SimpleNamespace(max_req_input_len=10**6))
    monkeypatch.setattr(launch, "Engine", lambda *_, **given: found.update(given) or engine)
    monkeypatch.setattr(launch.dist, "get_rank", lambda: 0)
    load = dict(seed=1, requests=requests, longest=longest)
    launch.launch_engine(str(TOY), RolloutSettings(), read_config(TOY), **load)
    assert found["max_total_tokens"] == cached


@pytest.mark.parametrize("longest, is_cut", [(None, False), (95, False), (96, True)])
def test_an_engine_that_found_too_little_memory_is_ended(monkeypatch, longest, is_cut):
    ended = []
    engine = SimpleNamespace(
        tokenizer_manager=SimpleNamespace(max_req_input_len=91), shutdown=lambda: ended.append(True)
    )
    monkeypatch.setattr(launch, "Engine", lambda *_, **__: engine)
    monkeypatch.setattr(launch.dist, "get_rank", lambda: 0)

    def start():
        settings, config = RolloutSettings(), read_config(TOY)
        return launch.launch_engine(str(TOY), settings, config, seed=1, longest=longest)

    if not is_cut:
        assert start() is engine and not ended
        return
    with pytest.raises(BadInput, match="has 96 tokens, but the engine has memory for 95"):
        start()
    assert ended


# --- the machine ------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def own_temporary_folder():
    """Make tempfile forget the folder that it has found."""
    yield
    tempfile.tempdir = None


def check(config=True, *, bucket_bytes=2**28, engines=1) -> None:
    check_environment(
        read_config(TOY) if config else None,
        bucket_bytes=bucket_bytes,
        element_bytes=2,
        engines_here=engines,
    )


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="on a GPU, buckets do not travel through shared memory"
)
def test_this_machine_is_not_refused(monkeypatch):
    for name in ("TMPDIR", "TEMP", "TMP", *engine_checks.ENGINE_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    check(engines=2)


@pytest.fixture
def folder_of_length():
    """Give a function that makes a temporary folder whose path has so many bytes."""
    base = tempfile.mkdtemp(dir="/tmp")

    def make(length: int) -> str:
        path = os.path.join(base, "x" * (length - len(base) - 1))
        os.makedirs(path, exist_ok=True)
        return path

    yield make
    shutil.rmtree(base)


@pytest.mark.parametrize("length, fits", [(75, True), (76, False), (95, False), (125, False)])
def test_a_temporary_folder_is_refused_where_multiprocessing_s_socket_does_not_fit(
    monkeypatch, folder_of_length, length, fits
):
    folder = folder_of_length(length)
    monkeypatch.setenv("TMPDIR", folder)
    address = os.path.join(folder, "pymp-xxxxxxxx", "listener-xxxxxxxx")
    os.makedirs(os.path.dirname(address), exist_ok=True)
    if fits:
        check()
        Listener(address, family="AF_UNIX").close()
        return
    with pytest.raises(BadInput, match=f"has {length} bytes; sockets below it allow at most 75"):
        check()
    with pytest.raises(OSError, match="too long"), socket.socket(socket.AF_UNIX) as unbound:
        unbound.bind(address)


def test_a_temporary_folder_that_is_not_there_is_refused_and_not_replaced(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "absent"))
    with pytest.raises(BadInput, match="TMPDIR '.*absent' cannot be written"):
        check(config=False)


def test_a_temporary_folder_that_is_a_file_is_refused(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "file"))
    with pytest.raises(BadInput, match="cannot be written"):
        check(config=False)


def with_shared_memory(monkeypatch, free: int) -> None:
    monkeypatch.setattr(engine_checks.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))


def test_shared_memory_must_hold_two_buckets_of_every_engine(monkeypatch):
    """A bucket holds at most --bucket-bytes and the largest tensor.

    The toy's largest is up_proj, 512 x 128 in BF16.
    """
    needed = 2 * (100_000 + 512 * 128 * 2) * 3
    with_shared_memory(monkeypatch, needed)
    check(bucket_bytes=100_000, engines=3)
    with_shared_memory(monkeypatch, needed - 1)
    with pytest.raises(
        BadInput,
        match="/dev/shm has 1.4 MB free, but a weight update needs 1.4 MB: .* 3 engines",
    ):
        check(bucket_bytes=100_000, engines=3)


def test_a_bucket_is_never_more_than_the_model(monkeypatch):
    # The toy has 1.2 million parameters. Two buckets hold all of them twice in BF16.
    with_shared_memory(monkeypatch, 5_000_000)
    check(bucket_bytes=2**40)


def test_absent_shared_memory_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(engine_checks, "SHARED_MEMORY", str(tmp_path / "shm"))
    with pytest.raises(BadInput, match="shm cannot be written"):
        check()


def test_a_limit_of_open_files_below_what_a_bucket_s_tensors_need_is_refused(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (100, 300))
    with pytest.raises(BadInput, match="may open 300 files, .* or lower --bucket-bytes"):
        check()
    monkeypatch.setattr(resource, "getrlimit", lambda _: (100, 128))
    with pytest.raises(BadInput, match=r"may open 128 files, .* hard limit \(ulimit -Hn\)$"):
        check()
    monkeypatch.setattr(resource, "getrlimit", lambda _: (100, 1024))
    check()


@pytest.mark.parametrize(
    "name, effect",
    [
        ("SGLANG_RETURN_ORIGINAL_LOGPROB", "temperature 1"),
        ("SGLANG_MAX_NEW_TOKENS_LIMIT", "cuts answers short"),
    ],
)
def test_a_variable_by_which_the_engine_changes_every_request_is_refused(monkeypatch, name, effect):
    monkeypatch.setenv(name, "1")
    with pytest.raises(BadInput, match=f"{name}=1 must not be set: by it SGLang .*{effect}"):
        check(config=False)


def test_a_run_without_an_engine_needs_none_of_it(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "absent"))
    with_shared_memory(monkeypatch, 0)
    check(engines=0)


def test_each_response_has_a_seed_of_its_own():
    """The seed depends on the run's seed and the response's place, not on what else is sampled."""
    settings = RolloutSettings()

    def seeds(run_seed, samples):
        data = SimpleNamespace(seed=run_seed, end_ids=[2])
        params = sampling_params(data, settings, samples)
        return [request["sampling_seed"] for request in params]

    samples = [
        Sample([1], prompt=prompt, group=group, index=index)
        for prompt in ("a", "b")
        for group in (0, 1)
        for index in (0, 1)
    ]
    first = seeds(1, samples)
    assert len({*first, *seeds(2, samples)}) == 16
    assert [seed for one in reversed(samples) for seed in seeds(1, [one])] == first[::-1]
