"""What the path of the weights costs: gather BF16, quantize, one message per tensor, as the usual
design does, against this project's path.

    python bench/weight_sync.py               three model sizes at tensor parallelism 1, 2 and 4; about ten minutes
    python bench/weight_sync.py estimate      on paper, GLM-4.5 355B on 64 GPUs: bytes from the formulas, seconds from stated bandwidths

Each measurement is one run of tp trainers and one rank that receives, over gloo, and alternates
between the two paths. The usual path all-gathers each BF16 parameter, quantizes on the first
trainer, and sends tensor by tensor. Neither has an engine at its end. Printed for each: bytes that
the tensor-parallel ranks gather and that are sent, seconds (median), growth of the resident
memory's peak on the first trainer and on the receiver; and the floor: the seconds that one copy of
the delivered bytes takes in memory. The vocabulary is small, so that embeddings, which stay BF16,
have no larger share of the weights than they have in large models.
"""

import ctypes
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

SIZES = {  # hidden, layers, intermediate
    "21M": (512, 6, 1536),
    "102M": (1024, 8, 3072),
    "361M": (2048, 8, 5632),
}
BUCKET_BYTES = 8 * 2**20
ROUNDS = 5


# --- measured -----------------------------------------------------------------------------------


def usual(weights) -> Iterator[list]:
    """The usual path, in this project's terms: whole parameters gathered in BF16, quantized by rank
    0 alone, a bucket for every tensor.
    """
    import torch
    import torch.distributed as dist
    from backends.huggingface.names import parameters_of, rule_of, split_stacked
    from weight_sync import quantize_named

    group, config = weights.trainer.layout.tp_group, weights.config
    for name, parameter in parameters_of(weights.trainer.gpt):
        rule, shards = rule_of(name), [parameter.detach()]
        if rule.tp_dim is not None and group.size() > 1:
            shards = [torch.empty_like(parameter) for _ in range(group.size())]
            dist.all_gather(shards, parameter.detach(), group=group)
        groups = config["num_key_value_heads"] // group.size()
        parts = zip(
            *(
                split_stacked(shard, len(rule.hf), head_dim=config["head_dim"], groups=groups)
                for shard in shards
            )
        )
        for hf_name, slices in zip(rule.hf, parts):
            tensor = torch.cat(slices, dim=rule.tp_dim or 0)
            pairs = (
                quantize_named(hf_name, tensor)
                if hf_name in weights.fp8 and group.rank() == 0
                else [(hf_name, tensor)]
            )
            pairs += (
                [pairs[0]] if hf_name in weights.fp8 and group.rank() > 0 else []
            )  # as many messages on every trainer; only rank 0's are sent
            yield from ([pair] for pair in pairs)


def reset_peak() -> None:
    """Give freed memory back to the system, and let the peak of the resident set start from there
    (Linux: proc(5), clear_refs).
    """
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def peak_bytes() -> int:
    """Largest resident set since it was last reset."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def worker(size: str, tp: int, bucket_bytes: int, rounds: int) -> None:
    """One rank of tp trainers and a receiver; rank 0 prints the measurements as JSON."""
    import numpy as np
    from common import distributed
    import torch.distributed as dist
    from backends.megatron import model as megatron_model
    from common.settings import TrainSettings
    import weight_sync
    from megatron.core import parallel_state as mpu
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    hidden, layers, intermediate = SIZES[size]
    heads = dict(num_attention_heads=hidden // 128, num_key_value_heads=4, head_dim=128)
    shape = dict(
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=intermediate,
        vocab_size=1024,
        max_position_embeddings=1024,
    )
    config = dict(
        model_type="qwen3",
        tie_word_embeddings=True,
        num_experts=0,
        rms_norm_eps=1e-6,
        **heads,
        **shape,
    )
    everyone = distributed.init_distributed(rollout_ranks=1)
    trainer, receives = None, everyone.rank() == tp
    if not receives:
        mpu.initialize_model_parallel(tp)
        model_parallel_cuda_manual_seed(1)
        gpt, layout = megatron_model.build_gpt(TrainSettings(tp=tp), config)
        trainer = type("Trainer", (), {"gpt": gpt, "layout": layout})
    fp8 = weight_sync.fp8_weights(config, rollout_dtype="fp8", engine_tp=1)
    weights = weight_sync.WeightPath(
        trainer.gpt, trainer.layout, config, fp8, bucket_bytes, broadcast_group=everyone
    )
    gathered, stock = [0], dist.all_gather

    def counted(tensors, tensor, group=None):
        gathered[0] += sum(t.nbytes for t in tensors) - tensor.nbytes
        return stock(tensors, tensor, group=group)

    dist.all_gather = counted
    paths = {
        "usual": lambda: weight_sync.broadcast_buckets(
            None if receives else usual(weights), everyone
        ),
        "ours": lambda: weight_sync.buckets_of(weights, quantize=True),
    }
    runs = {path: {"seconds": [], "peak": []} for path in paths}
    for i in range(rounds + 1):  # the first warms up
        for path, buckets in paths.items():
            gathered[0] = sent = messages = 0
            dist.barrier(everyone)
            reset_peak()
            before, started = peak_bytes(), time.perf_counter()
            for bucket in buckets():
                sent += sum(tensor.nbytes for _, tensor in bucket)
                messages += 1
                del bucket
            dist.barrier(everyone)
            if i:
                runs[path]["seconds"].append(time.perf_counter() - started)
                runs[path]["peak"].append(peak_bytes() - before)
            runs[path] |= {"gathered": gathered[0], "sent": sent, "messages": messages}
    floor = []
    source, target = (
        np.ones(runs["ours"]["sent"], np.uint8),
        np.zeros(runs["ours"]["sent"], np.uint8),
    )
    for _ in range(rounds):
        started = time.perf_counter()
        np.copyto(target, source)
        floor.append(time.perf_counter() - started)
    mine = {
        path: {**run, "seconds": statistics.median(run["seconds"]), "peak": max(run["peak"])}
        for path, run in runs.items()
    }
    ranks = [
        json.loads(line)
        for line in distributed.all_gather_bytes(json.dumps(mine).encode(), everyone)
    ]
    if everyone.rank() == 0:
        receiver_peaks = {path: ranks[tp][path]["peak"] for path in paths}
        sent = {path: ranks[tp][path]["sent"] for path in paths}
        report = {
            path: {**mine[path], "sent": sent[path], "receiver_peak": receiver_peaks[path]}
            for path in paths
        }
        print("\n" + json.dumps(report | {"floor": min(floor)}), flush=True)
    dist.barrier(everyone)


def measure(size: str, tp: int, *, bucket_bytes: int = BUCKET_BYTES, rounds: int = ROUNDS) -> dict:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(tp + 1),
    ]
    command += [__file__, "worker", size, str(tp), str(bucket_bytes), str(rounds)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{size} at tp {tp} ended with {done.returncode}:\n{done.stderr[-5000:]}")
    return json.loads(
        next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{"))
    )


def main() -> None:
    print(f"buckets of {BUCKET_BYTES / 2**20:.0f} MiB, median of {ROUNDS} alternating rounds")
    for size in SIZES:
        for tp in (1, 2, 4):
            report = measure(size, tp)
            for path in ("usual", "ours"):
                row = report[path]
                moved = (
                    f"gathers {row['gathered'] / 1e6:6.1f} MB, sends {row['sent'] / 1e6:6.1f} MB in"
                    f" {row['messages']:3} messages"
                )
                peaks = (
                    f"peak memory +{row['peak'] / 2**20:4.0f} MiB on trainer 0,"
                    f" +{row['receiver_peak'] / 2**20:4.0f} MiB on the receiver"
                )
                print(f"{size:>5} tp {tp}  {path:5}  {row['seconds']:6.3f} s   {moved}   {peaks}")
            usual, ours = report["usual"], report["ours"]
            gathered = (
                f"bytes gathered {ours['gathered'] / usual['gathered']:.3f}, " if tp > 1 else ""
            )
            ratio = f"ours / usual: {gathered}seconds {ours['seconds'] / usual['seconds']:.2f}"
            print(
                f"{size:>5} tp {tp}  {ratio};  memcpy of what is sent {report['floor']:.3f} s",
                flush=True,
            )


# --- on paper -----------------------------------------------------------------------------------


def estimate() -> None:
    """Seconds of one hand-off in the synchronous loop, from plan.py's bytes and stated bandwidths.

    No latency, no imbalance, nothing overlapped.
    """
    from backends.huggingface.config import read_config
    from harness import memory, plan

    config, tp, pp, engine_tp, gpus = (
        read_config(ROOT / "docs" / "configs" / "GLM-4.5"),
        8,
        4,
        8,
        64,
    )
    bandwidths = dict(
        memory_bytes_s=2.0e12, nvlink_bytes_s=300e9, network_bytes_s=40e9
    )  # HBM3, NVLink 4, one 400 Gb/s adapter: 60 to 80 % of their ratings
    parameters = f"{memory.parameters(config)[0] / 1e9:.0f}e9 parameters"
    print(
        f"GLM-4.5, {parameters}, {gpus} GPUs: trainers tp {tp} (experts over the same {tp}), pp"
        f" {pp}; engines tp {engine_tp}"
    )
    print(
        "assumed: "
        + ", ".join(
            f"{name.split('_')[0]} {value / 1e9:,.0f} GB/s" for name, value in bandwidths.items()
        )
        + ", per GPU and direction"
    )
    totals = {}
    for dtype in ("bf16", "fp8"):
        sent = memory.hand_off_bytes(config, dtype=dtype, engine_tp=engine_tp, engine_ep=engine_tp)
        split = dict(tp=tp, pp=pp, ep=tp, engine_tp=engine_tp, colocated=True, node_gpus=8)
        steps = plan.hand_off_seconds(config, sent, fp8=dtype == "fp8", **split, **bandwidths)
        totals[dtype] = sum(steps.values())
        for step, seconds in [*steps.items(), ("in all", totals[dtype])]:
            if seconds:
                print(f"  {dtype:4}  {seconds:6.2f} s  {step}")
    print(
        "slime 0.1.0 publishes 48 s BF16 and 100 s with FP8 quantization for this model. Those were"
        " measured and these were not: comparable is only that"
    )
    print(
        f"FP8, quantized before it moves, should take {totals['fp8'] / totals['bf16']:.2f} of"
        " BF16's time, and not twice as long."
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(sys.argv[2], *map(int, sys.argv[3:6]))
    elif sys.argv[1:] == ["estimate"]:
        estimate()
    else:
        main()
        estimate()
