"""How much faster an engine generates on a CPU with batched attention than with SGLang's own.

    python bench/cpu_attention.py [--rounds 2] [--requests 64 256]

SGLang's attention for CPUs loops over the requests; backends/cpu/sglang.py replaces it with a
batched one. Each round starts two engines, one after the other, stock and batched in turn, since
timings on a shared machine are only comparable side by side. Printed are tokens a second of each
and their ratio, for 64 and 256 requests of 32 tokens on the toy model in FP32. The last line is the
largest difference of the log-probs that both give to the tokens of a greedy continuation.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

# The engine's child process imports this file first, and needs these patches before sglang.
from backends.cpu import sglang as cpu_sglang

TOKENS, BEST_OF = 32, 3


def run_scheduler_with_stock_attention(*args, **kwargs) -> None:
    """Run process.run_scheduler with SGLang's two attention functions put back."""
    from backends.sglang import process
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend as Backend

    stock = Backend._run_sdpa_forward_decode, Backend._run_sdpa_forward_extend
    patch = cpu_sglang.patch_sglang

    def patch_all_but_attention():
        patch()
        Backend._run_sdpa_forward_decode, Backend._run_sdpa_forward_extend = stock

    cpu_sglang.patch_sglang = patch_all_but_attention
    process.run_scheduler(*args, **kwargs)


def measure(attention: str, requests: list[int]) -> None:
    """Print tokens a second at each number of requests and log-probs of fixed prompts, as JSON.

    Runs in a process of its own, with one engine. A speed is the best of BEST_OF.
    """
    import cpu_attention
    from backends.huggingface.config import read_config
    from backends.sglang.engine import Engine
    import torch

    if attention == "stock":
        Engine.run_scheduler_process_func = staticmethod(
            cpu_attention.run_scheduler_with_stock_attention
        )
    arguments = dict(
        model_path=str(ROOT / "toy"),
        dtype="float32",
        skip_tokenizer_init=True,
        random_seed=1,
        log_level="error",
        **cpu_sglang.SERVER_ARGS,
    )
    with Engine(read_config(ROOT / "toy"), **arguments) as engine:
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(3, 15, (max(64, *requests), 16), generator=generator).tolist()
        length, speed = {"max_new_tokens": TOKENS, "ignore_eos": True}, {}
        for n in requests:
            seconds = []
            for _ in range(BEST_OF):
                engine.call(engine.tokenizer_manager.flush_cache())
                started = time.perf_counter()
                engine.call(engine.generate(prompts[:n], {"temperature": 1.0, **length}))
                seconds.append(time.perf_counter() - started)
            speed[n] = n * TOKENS / min(seconds)

        greedy = engine.call(engine.generate(prompts[:64], {"temperature": 0.0, **length}))
        tokens = [
            (token, logprob)
            for output in greedy
            for logprob, token, *_ in output["meta_info"]["output_token_logprobs"]
        ]
    print(json.dumps({"attention": attention, "speed": speed, "tokens": tokens}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--requests", type=int, nargs="+", default=[64, 256])
    flags = parser.parse_args()
    results = []
    for attention in ("stock", "batched") * flags.rounds:
        command = [sys.executable, __file__, "worker", attention, *map(str, flags.requests)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results.append(json.loads(done.stdout.splitlines()[-1]))
        speeds = {n: f"{speed:,.0f} tokens/s" for n, speed in results[-1]["speed"].items()}
        print(attention, speeds, flush=True)
    for n in map(str, flags.requests):
        stock, batched = (
            max(result["speed"][n] for result in results if result["attention"] == kind)
            for kind in ("stock", "batched")
        )
        print(f"{n} requests: batched / stock = {batched / stock:.2f}")
    stock, batched = (result["tokens"] for result in results[:2])  # [(token, log-prob), …]
    same = [token for token, _ in stock] == [token for token, _ in batched]
    assert same, "the two attentions chose different tokens"
    difference = max(abs(a - b) for (_, a), (_, b) in zip(stock, batched))
    what = f"{len(stock)} greedy tokens are the same"
    print(f"{what}; largest difference of their log-probs: {difference:.1e}")


if __name__ == "__main__":
    measure(sys.argv[2], [int(n) for n in sys.argv[3:]]) if sys.argv[1:2] == ["worker"] else main()
