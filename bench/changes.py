"""--sync delta against full: what changed, and then everything, as training goes on.

    python bench/changes.py
        the toy, and a model of 102M parameters at tensor parallelism 1, 2 and 4; about ten minutes
    python bench/changes.py --model FOLDER [loop_async.py's flags]
        another model; SmolLM2: --prompts FOLDER/word_problems.jsonl --stop "<|im_end|>" --lr 1e-6
    python bench/changes.py estimate
        GLM-4.5 355B on paper: bytes from formulas, seconds from stated bandwidths and from the
        coding's own speed on this machine

Each measurement is one run of loop_async.py with a real engine. Every step sends its weights by
both ways. Rewards are a rule that differs from answer to answer, so that every step learns. Seconds
are those of rank 0 from the first byte until the engine goes on. Phases:

    quantize, compare, gather     on rank 0; gather waits for the other trainers
    send                          rank 0 gives the buckets to the engine's rank
    apply                         the engine writes; most of it while the next bucket is on its way
    first token                   after the update, one token of one request; without a GPU the
                                  engine then dequantizes what was written
"""

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

PHASES = ("quantize", "compare", "gather", "send", "apply", "first token")
FLAGS = "--prompts-per-step 2 --samples-per-prompt 4 --max-response-tokens 24 --steps 10"
FLAGS += " --eval-samples 2 --eval-every 10 --max-staleness 0 --export --sync delta"
FROM_STEP = 3  # Adam's first steps move more


def worker(arguments: list[str]) -> None:
    """Run one rank of loop_async.py, whose every step sends its weights by both ways.

    Rank 0 prints [{way: {"bytes": …, "seconds": …, phase: seconds}}, one for each step] as JSON.
    """
    import torch.distributed as dist
    import weight_sync
    from backends.sglang.engine import Engine
    from common import distributed
    from dataclasses import replace
    from harness import checks, exits, flags
    import reward

    spent, stock_phase, stock_send = Counter(), weight_sync.phase, weight_sync.send_weights
    stock_update, rows = Engine._update, []

    @contextlib.contextmanager
    def timed_phase(name, tensors):
        started, inner = time.perf_counter(), sum(spent.values())
        with stock_phase(name, tensors):
            yield
        spent[name] += time.perf_counter() - started - (sum(spent.values()) - inner)

    async def timed_update(self, *payload):
        started = time.perf_counter()
        await stock_update(self, *payload)
        spent["apply"] += time.perf_counter() - started

    def hand_off(weights, engine, version) -> dict:
        """Send once. Return what it took, with what the last rank's engine took."""
        group = weights.broadcast_group
        spent.clear()
        dist.barrier(group)
        started = time.perf_counter()
        sent = stock_send(weights, engine, version=version)
        engine.settle()
        dist.barrier(group)
        seconds, mine = time.perf_counter() - started, dict(spent)
        asked = time.perf_counter()
        if engine.holds_weights:
            one = dict(max_new_tokens=1, temperature=1.0)
            engine.call(engine.generate([[5, 6, 7]], [one], request_ids=[f"after {asked}"]))
        mine["first token"] = time.perf_counter() - asked
        theirs = json.loads(distributed.all_gather_bytes(json.dumps(mine).encode(), group)[-1])
        mine |= {name: theirs.get(name, 0.0) for name in ("apply", "first token")}
        return {"seconds": seconds, "bytes": sent["sync_bytes"], **mine}

    def send_both(weights, engine, *, version, verify=False):
        if version == 0:  # the engine's first weights: everything, both ways
            return stock_send(weights, engine, version=version, verify=True)
        if engine.holds_weights:
            engine.call(engine.drain())
        row = {"delta": hand_off(weights, engine, version)}
        if engine.holds_weights:
            engine.engine.version = version - 1  # the same weights once more
        row["full"] = hand_off(replace(weights, sent=None), engine, version)
        rows.append(row)
        if verify:
            weight_sync.verify_engine_weights(weights, engine)
        return {}

    weight_sync.phase, weight_sync.send_weights = timed_phase, send_both
    Engine._update = timed_update
    reward.REWARDS["exact"] = lambda sample: float(sum(sample.response_ids) % 2)
    sys.argv = ["loop_async.py", *arguments]
    import loop_async

    def main():
        loop_async.main(settings)
        if os.environ["RANK"] == "0":
            print("\n" + json.dumps(rows), flush=True)

    settings = flags.parse_or_exit(loop_async.Settings, checks.check_flags)
    exits.run_main(main)


def write_model(folder: Path, size: str) -> Path:
    """Write a model of random weights as a Hugging Face folder, with the toy's tokenizer."""
    import torch

    import backends  # noqa: F401  before transformers
    import transformers
    from bench.weight_sync import config_of

    torch.manual_seed(0)
    config = {name: x for name, x in config_of(size).items() if name != "num_experts"}
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**config), dtype=torch.bfloat16
    )
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "toy" / name, folder)
    return folder


def measure(what: str, flags: list[str], *, tp: int = 1) -> None:
    """Measure one model, and print both ways and their ratios."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(tp + 1), __file__, "worker"]
        command += [*FLAGS.split(), "--tp", str(tp), *flags]
        quiet = dict(stdin=subprocess.DEVNULL, capture_output=True, text=True)
        done = subprocess.run(command, cwd=folder, **quiet)
    if done.returncode:
        sys.exit(f"{what} at tp {tp} ended with {done.returncode}:\n{done.stderr[-5000:]}")
    printed = reversed(done.stdout.splitlines())
    rows = json.loads(next(line for line in printed if line.startswith("[{")))[FROM_STEP - 1 :]
    middle = {}
    for way in ("full", "delta"):
        keys = ("seconds", "bytes", *PHASES)
        middle[way] = {
            key: statistics.median(row[way].get(key, 0.0) for row in rows) for key in keys
        }
        phases = "  ".join(f"{name} {middle[way][name]:.3f}" for name in PHASES)
        row = f"{middle[way]['seconds']:6.3f} s  {middle[way]['bytes'] / 1e6:8.3f} MB   {phases}"
        print(f"{what:>8} tp {tp}  {way:5}  {row}")
    ratios = [row["delta"]["seconds"] / row["full"]["seconds"] for row in rows]
    ratio = f"seconds {statistics.mean(ratios):.2f} (deviation {statistics.stdev(ratios):.2f},"
    bytes_ratio = middle["delta"]["bytes"] / middle["full"]["bytes"]
    steps = f"steps {FROM_STEP} to {FROM_STEP + len(rows) - 1}"
    print(f"{what:>8} tp {tp}  delta / full: bytes {bytes_ratio:.4f}, {ratio} {steps})", flush=True)


def main(flags: list[str]) -> None:
    if "--model" in flags:
        return measure(Path(flags[flags.index("--model") + 1]).name, flags)
    measure("toy", flags)
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder), "102M")
        for tp in (1, 2, 4):
            measure("102M", ["--model", str(model), "--lr", "1e-6", *flags], tp=tp)


# --- on paper -----------------------------------------------------------------------------------

DENSITY = {"fp8": 0.0002, "bf16": 0.007}  # of SmolLM2 at 1e-6: docs/weights.md


def coding_seconds(n: int = 1_000_000, *, density: float) -> tuple[float, float]:
    """Return the seconds that one thread takes to code and to decode a change."""
    import torch
    from backends.delta import decode, encode

    generator = torch.Generator().manual_seed(0)
    gaps = torch.empty(n).exponential_(density, generator=generator).long() + 1
    positions, values = gaps.cumsum(0), torch.zeros(n, dtype=torch.uint8)
    started = time.perf_counter()
    coded = encode(positions, values)
    between = time.perf_counter()
    decode(coded, torch.uint8)
    return (between - started) / n, (time.perf_counter() - between) / n


def estimate() -> None:
    """Print what one update of GLM-4.5 would send and take, on 64 GPUs, beside everything."""
    from backends.huggingface.config import read_config
    from harness import memory

    config = read_config(ROOT / "docs" / "configs" / "GLM-4.5")
    ranks = 8 * 4  # trainers that hold different shards: tp 8, pp 4
    pcie_bytes_s, network_bytes_s = 50e9, 40e9
    total = memory.hand_off_bytes(config, dtype="fp8", engine_tp=8, engine_ep=8)
    total = sum(total.values())
    parameters, bf16 = memory.parameters(config)[0], 2 * config["vocab_size"]
    bf16 *= config["hidden_size"]  # embeddings; norms and routers are small beside them
    changes = {"fp8": DENSITY["fp8"] * (parameters - bf16), "bf16": DENSITY["bf16"] * bf16}
    n = sum(changes.values())
    sent = 3 * n  # bytes: a gap of two and a code, or a gap of one and a BF16 value
    assumed = f"assumed: {DENSITY['fp8']:.2%} of FP8 codes"
    print(f"GLM-4.5, {parameters / 1e9:.0f}e9 parameters; {assumed}")
    print(f"change and {DENSITY['bf16']:.1%} of the values kept in BF16, as in SmolLM2 at 1e-6")
    print(f"  {total / 1e9:7.2f} GB  everything in FP8")
    print(f"  {sent / 1e9:7.2f} GB  changes, {sent / total:.5f} of it")
    code_s, decode_s = coding_seconds(density=DENSITY["fp8"])
    kept = total / ranks
    rows = {
        "compare: what was sent, from host memory, over PCIe at 50 GB/s": kept / pcie_bytes_s,
        f"code a rank's part of {n / 1e6:.0f} million changes on one CPU core": n / ranks * code_s,
        "other stages' and all engines' part over the network at 40 GB/s": sent / network_bytes_s,
        "decode all of them, on each engine rank's CPU core": n * decode_s,
    }
    for what, seconds in rows.items():
        print(f"  {seconds:7.3f} s   {what}")
    print("The coding's speed was measured here, the rest was not. No GPU codes anything yet.")


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(sys.argv[2:])
    elif sys.argv[1:] == ["estimate"]:
        estimate()
    else:
        main(sys.argv[1:])
