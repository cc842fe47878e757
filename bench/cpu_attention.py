"""How much faster an engine generates on a CPU with cpu.py's batched attention than with SGLang's
own loop over requests.

    python bench/cpu_attention.py [--rounds 2] [--requests 64 256]

Starts two engines a round, one after the other, stock and batched in turn (timings on a shared
machine are only comparable side by side), and prints tokens a second of each and their ratio, for
64 and 256 requests of 32 tokens on the toy model in fp32; and the largest difference of the
log-probs that both give to the tokens of a greedy continuation.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
from backends.cpu import (
    sglang as cpu_sglang,
)  # at the top: the engine's child imports this file first, and needs it before sglang

TOKENS, BEST_OF = 32, 3


def run_scheduler_with_stock_attention(*args, **kwargs) -> None:
    """engine.run_scheduler with the two attention functions put back."""
    from backends.sglang import engine
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend as Backend

    stock = Backend._run_sdpa_forward_decode, Backend._run_sdpa_forward_extend
    patch = cpu_sglang.patch_sglang

    def patch_all_but_attention():
        patch()
        Backend._run_sdpa_forward_decode, Backend._run_sdpa_forward_extend = stock

    cpu_sglang.patch_sglang = patch_all_but_attention
    engine.run_scheduler(*args, **kwargs)


def measure(attention: str, requests: list[int]) -> None:
    """In a process of its own: one engine, its tokens a second at each number of requests (best of
    BEST_OF), and log-probs of fixed prompts.
    """
    import cpu_attention
    import rollout
    import torch

    if attention == "stock":
        rollout.Engine.run_scheduler_process_func = staticmethod(
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
    with rollout.Engine(**arguments) as engine:
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(3, 15, (max(64, *requests), 16), generator=generator).tolist()
        speed = {}
        for n in requests:
            seconds = []
            for _ in range(BEST_OF):
                engine.call(engine.tokenizer_manager.flush_cache())
                started = time.perf_counter()
                engine.call(
                    engine.generate(
                        prompts[:n],
                        {"temperature": 1.0, "max_new_tokens": TOKENS, "ignore_eos": True},
                    )
                )
                seconds.append(time.perf_counter() - started)
            speed[n] = n * TOKENS / min(seconds)

        greedy = engine.call(
            engine.generate(
                prompts[:64], {"temperature": 0.0, "max_new_tokens": TOKENS, "ignore_eos": True}
            )
        )
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
        done = subprocess.run(
            [sys.executable, __file__, "worker", attention, *map(str, flags.requests)],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        results.append(json.loads(done.stdout.splitlines()[-1]))
        print(
            attention,
            {n: f"{speed:,.0f} tokens/s" for n, speed in results[-1]["speed"].items()},
            flush=True,
        )
    for n in map(str, flags.requests):
        best = {
            kind: max(r["speed"][n] for r in results if r["attention"] == kind)
            for kind in ("stock", "batched")
        }
        print(f"{n} requests: batched / stock = {best['batched'] / best['stock']:.2f}")
    pairs = list(zip(results[0]["tokens"], results[1]["tokens"]))
    assert all(stock[0] == batched[0] for stock, batched in pairs), (
        "the two attentions chose different tokens"
    )
    print(
        f"{len(pairs)} greedy tokens are the same; largest difference of their log-probs:"
        f" {max(abs(a[1] - b[1]) for a, b in pairs):.1e}"
    )


if __name__ == "__main__":
    measure(sys.argv[2], [int(n) for n in sys.argv[3:]]) if sys.argv[1:2] == ["worker"] else main()
