"""What a weight update costs: this project's path against the usual one.

    python bench/weight_sync.py
        three model sizes at tensor parallelism 1, 2 and 4; about ten minutes
    python bench/weight_sync.py estimate
        GLM-4.5 355B on 64 GPUs on paper: bytes from formulas, seconds from stated bandwidths

The usual path all-gathers each BF16 parameter, quantizes on the first trainer, and sends tensor by
tensor. Ours quantizes before it gathers, and sends buckets. The third path sends what changed: one
weight in a thousand. Each measurement is one run of tp trainers and one rank that receives, over
gloo. It alternates between the paths. No path has an engine at its end.

Printed for each path are the bytes that the tensor-parallel ranks gather, the bytes sent, and the
median seconds. Printed too is how far the peak of resident memory grows on the first trainer and on
the receiver.
The floor is the seconds that one copy of the sent bytes takes in memory. The vocabulary is small:
embeddings stay BF16, and should have no larger share of the weights than in large models.
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
    """Yield the buckets of the usual path, in this project's terms.

    It gathers whole parameters in BF16, rank 0 alone quantizes, and every tensor is a bucket.
    """
    import torch
    import torch.distributed as dist
    from backends.huggingface.names import parameters_of, rule_of, split_stacked
    from weight_sync import quantize_named

    group, config = weights.layout.tp_group, weights.config
    for name, parameter in parameters_of(weights.gpt):
        rule, shards = rule_of(name), [parameter.detach()]
        if rule.tp_dim is not None and group.size() > 1:
            shards = [torch.empty_like(parameter) for _ in range(group.size())]
            dist.all_gather(shards, parameter.detach(), group=group)
        groups = config["num_key_value_heads"] // group.size()
        heads = dict(head_dim=config["head_dim"], groups=groups)
        parts = zip(*(split_stacked(shard, len(rule.hf), **heads) for shard in shards))
        for hf_name, slices in zip(rule.hf, parts):
            pairs = [(hf_name, torch.cat(slices, dim=rule.tp_dim or 0))]
            if hf_name in weights.fp8 and group.rank() == 0:
                pairs = quantize_named(*pairs[0])
            elif hf_name in weights.fp8:
                pairs *= 2  # as many messages as rank 0 has; only rank 0's are sent
            yield from ([pair] for pair in pairs)


def reset_peak() -> None:
    """Give freed memory back to the system, and start the peak of the resident set from there.

    Source: proc(5), clear_refs.
    """
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def peak_bytes() -> int:
    """Return the largest resident set since the last reset_peak."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def config_of(size: str) -> dict:
    hidden, layers, intermediate = SIZES[size]
    heads = dict(num_attention_heads=hidden // 128, num_key_value_heads=4, head_dim=128)
    shape = dict(
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=intermediate,
        vocab_size=1024,
        max_position_embeddings=1024,
    )
    config = dict(model_type="qwen3", tie_word_embeddings=True, num_experts=0, rms_norm_eps=1e-6)
    return config | heads | shape


def build_path(size: str, tp: int, bucket_bytes: int, everyone):
    """Return this rank's weight_sync.WeightPath. The last rank receives and has no trainer."""
    from backends.huggingface.fp8 import fp8_weights
    from backends.megatron import model as megatron_model
    from common.settings import TrainSettings
    import weight_sync
    from megatron.core import parallel_state as mpu
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    config, gpt, layout = config_of(size), None, None
    if everyone.rank() < tp:
        mpu.initialize_model_parallel(tp)
        model_parallel_cuda_manual_seed(1)
        gpt, layout = megatron_model.build_gpt(TrainSettings(tp=tp), config)
    fp8 = fp8_weights(config, rollout_dtype="fp8", engine_tp=1)
    return weight_sync.WeightPath(gpt, layout, config, fp8, bucket_bytes, broadcast_group=everyone)


def copy_seconds(nbytes: int, rounds: int) -> float:
    """Return the shortest time in which so many bytes are copied in memory."""
    import numpy as np

    source, target, seconds = np.ones(nbytes, np.uint8), np.zeros(nbytes, np.uint8), []
    for _ in range(rounds):
        started = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def worker(size: str, tp: int, bucket_bytes: int, rounds: int) -> None:
    """Run one rank of tp trainers and a receiver. Rank 0 prints the measurements as JSON."""
    from backends.delta import Sent
    from common import distributed
    import torch
    import torch.distributed as dist
    import weight_sync

    everyone = distributed.init_distributed(rollout_ranks=1)
    weights = build_path(size, tp, bucket_bytes, everyone)
    gathered, stock = [0], dist.all_gather

    def counted(tensors, tensor, group=None):
        gathered[0] += sum(t.nbytes for t in tensors) - tensor.nbytes
        return stock(tensors, tensor, group=group)

    dist.all_gather = counted

    def changed_buckets():
        with torch.no_grad():
            for parameter in weights.gpt.parameters() if weights.gpt else ():
                parameter.view(-1)[::1000] *= 0.8  # no block's scale grows
        sent.begin()
        yield from weight_sync.buckets_of(weights, quantize=True, sent=sent)
        sent.version = 0

    def usual_buckets():
        mine = None if weights.gpt is None else usual(weights)
        return weight_sync.broadcast_buckets(mine, everyone)

    paths = {
        "usual": usual_buckets,
        "ours": lambda: weight_sync.buckets_of(weights, quantize=True),
        "changes": changed_buckets,
    }
    sent, runs = Sent(), {path: {"seconds": [], "peak": []} for path in paths}
    for i in range(rounds + 1):  # the first round warms up, and sends everything
        for path, buckets in paths.items():
            gathered[0] = nbytes = messages = 0
            dist.barrier(everyone)
            reset_peak()
            before, started = peak_bytes(), time.perf_counter()
            for bucket in buckets():
                nbytes += sum(tensor.nbytes for _, tensor in bucket)
                messages += 1
                del bucket
            dist.barrier(everyone)
            growth = peak_bytes() - before
            if i:
                runs[path]["seconds"].append(time.perf_counter() - started)
                runs[path]["peak"].append(growth)
            else:
                runs[path]["first_peak"] = growth
            runs[path] |= {"gathered": gathered[0], "sent": nbytes, "messages": messages}
    runs["changes"]["kept"] = sum(tensor.nbytes for tensor in sent.kept.values())
    floor = copy_seconds(runs["ours"]["sent"], rounds)
    mine = {
        path: {**run, "seconds": statistics.median(run["seconds"]), "peak": max(run["peak"])}
        for path, run in runs.items()
    }
    lines = distributed.all_gather_bytes(json.dumps(mine).encode(), everyone)
    if everyone.rank() == 0:
        received = json.loads(lines[tp])  # what the receiver measured
        report = {
            path: {**mine[path], "sent": run["sent"], "receiver_peak": run["peak"]}
            for path, run in received.items()
        }
        print("\n" + json.dumps(report | {"floor": floor}), flush=True)
    dist.barrier(everyone)


def measure(size: str, tp: int, *, bucket_bytes: int = BUCKET_BYTES, rounds: int = ROUNDS) -> dict:
    """Run one size at one tensor parallelism. Return the report of the two paths."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(tp + 1), __file__]
    command += ["worker", size, str(tp), str(bucket_bytes), str(rounds)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{size} at tp {tp} ended with {done.returncode}:\n{done.stderr[-5000:]}")
    printed = reversed(done.stdout.splitlines())
    return json.loads(next(line for line in printed if line.startswith("{")))


def main() -> None:
    print(f"buckets of {BUCKET_BYTES / 2**20:.0f} MiB, median of {ROUNDS} alternating rounds")
    for size in SIZES:
        for tp in (1, 2, 4):
            report = measure(size, tp)
            for path in ("usual", "ours", "changes"):
                print(f"{size:>5} tp {tp}  {path:7}  {line_of(report[path])}")
            usual, ours = report["usual"], report["ours"]
            ratio = f"seconds {ours['seconds'] / usual['seconds']:.2f}"
            if tp > 1:
                ratio = f"bytes gathered {ours['gathered'] / usual['gathered']:.3f}, {ratio}"
            floor = f"memcpy of what is sent {report['floor']:.3f} s"
            changes = report["changes"]
            print(
                f"{size:>5} tp {tp}  to send changes, trainer 0 keeps"
                f" {changes['kept'] / 1e6:.1f} MB; the first time its peak grows by"
                f" {changes['first_peak'] / 2**20:.0f} MiB"
            )
            print(f"{size:>5} tp {tp}  ours / usual: {ratio};  {floor}", flush=True)


def line_of(row: dict) -> str:
    sent = f"sends {row['sent'] / 1e6:6.1f} MB in {row['messages']:3} messages"
    moved = f"gathers {row['gathered'] / 1e6:6.1f} MB, {sent}"
    peaks = f"peak memory +{row['peak'] / 2**20:4.0f} MiB on trainer 0,"
    peaks += f" +{row['receiver_peak'] / 2**20:4.0f} MiB on the receiver"
    return f"{row['seconds']:6.3f} s   {moved}   {peaks}"


# --- on paper -----------------------------------------------------------------------------------


def estimate() -> None:
    """Print seconds of one weight update in the synchronous loop, from bytes and bandwidths.

    The bytes are those of harness/memory.py. There is no latency, imbalance or overlap.
    """
    from backends.huggingface.config import read_config
    from harness import memory, plan

    config = read_config(ROOT / "docs" / "configs" / "GLM-4.5")
    tp, pp, engine_tp, gpus = 8, 4, 8, 64
    # HBM3, NVLink 4 and one 400 Gb/s adapter, at 60 to 80 % of their ratings.
    bandwidths = dict(memory_bytes_s=2.0e12, nvlink_bytes_s=300e9, network_bytes_s=40e9)
    parameters = f"{memory.parameters(config)[0] / 1e9:.0f}e9 parameters"
    trainers = f"trainers tp {tp} (experts over the same {tp}), pp {pp}"
    print(f"GLM-4.5, {parameters}, {gpus} GPUs: {trainers}; engines tp {engine_tp}")
    speeds = [f"{name.split('_')[0]} {b / 1e9:,.0f} GB/s" for name, b in bandwidths.items()]
    print(f"assumed: {', '.join(speeds)}, per GPU and direction")
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
    share = f"{totals['fp8'] / totals['bf16']:.2f} of BF16's time"
    print(f"FP8, quantized before it moves, should take {share}, and not twice as long.")


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(sys.argv[2], *map(int, sys.argv[3:6]))
    elif sys.argv[1:] == ["estimate"]:
        estimate()
    else:
        main()
        estimate()
