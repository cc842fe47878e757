"""Our side of bench/peers.py, started by it under torchrun: one rank of a loop, or the probes of
its stages beside the bare stack.

torchrun --nproc-per-node 2 bench/our_side.py sync|async toy|ragged FLAGS OF THE LOOP
torchrun bench/our_side.py bare toy|ragged FLAGS OF THE LOOP              --steps is how often each probe is made
"""

import json
import statistics
import sys
import time
from types import SimpleNamespace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from trl_side import answer_length, parity


def force_lengths() -> None:
    """In a rank of a ragged run: answers of given lengths, and a reward for them."""
    from backends.sglang.engine import Engine
    import reward

    generate = Engine.generate

    async def ragged(self, prompts_ids, sampling, **more):
        lengths = [
            {"max_new_tokens": answer_length(ids, i % 16), "ignore_eos": True}
            for i, ids in enumerate(prompts_ids)
        ]
        return await generate(
            self, prompts_ids, [{**one, **length} for one, length in zip(sampling, lengths)], **more
        )

    Engine.generate = ragged
    reward.REWARDS["exact"] = lambda sample: parity(sample.response_ids)


def worker(what: str, workload: str, arguments: list[str]) -> None:
    """One rank of one run: the loop's own main(), or the probes of the stages."""
    from harness import checks, exits, flags

    if workload == "ragged":
        force_lengths()
    sys.argv = [f"{what}.py", *arguments]
    loop = __import__("loop_sync" if what == "bare" else f"loop_{what}")
    settings = flags.parse_or_exit(loop.Settings, checks.check_flags)
    exits.run_main(lambda: bare_stages(settings) if what == "bare" else loop.main(settings))


def bare_stages(settings) -> None:
    """Alternate between a stage of ours and the same work done by the bare stack; prints medians as
    JSON. The learning rate is 0: weights stay as they are.
    """
    import numpy as np
    from backends.huggingface.config import read_config
    from backends.sglang.launch import launch_engine
    from common import distributed
    import reward
    import rollout
    import train_step
    import weight_sync
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from data.prompts import load_data
    from sglang.srt.managers.io_struct import GenerateReqInput

    config, rounds, n = (
        read_config(settings.run.model),
        settings.run.steps,
        settings.rollout.samples_per_prompt,
    )
    data = load_data(settings.run.model, settings.rollout, config, seed=1)
    everyone = distributed.init_distributed()
    fp8 = weight_sync.fp8_weights(config, rollout_dtype=settings.rollout.rollout_dtype, engine_tp=1)
    trainer = train_step.build_trainer(
        settings.run.model,
        settings.train,
        config,
        steps=rounds,
        seed=1,
        max_response_tokens=settings.rollout.max_response_tokens,
    )
    weights = weight_sync.WeightPath(
        trainer.gpt, trainer.layout, config, fp8, settings.sync.bucket_bytes
    )
    judge = reward.Judge(reward.REWARDS["exact"])
    limits = dict(max_response_tokens=settings.rollout.max_response_tokens)
    run = SimpleNamespace(data=data, engine_index=0, engines=1, resumed_from=None)
    times: dict[str, list[float]] = {}

    def timed(name: str, call):
        started = time.perf_counter()
        result = call()
        times.setdefault(name, []).append(time.perf_counter() - started)
        return result

    def ask(samples: list, key: str, *, logprobs: bool) -> None:
        """The requests of these samples, of the lengths that they came out with, straight to
        SGLang.
        """
        sampling = rollout.sampling_params(data, settings.rollout, samples)
        for one, sample in zip(sampling, samples):
            one |= {"max_new_tokens": len(sample.response_ids), "ignore_eos": True}
        ids = [sample.prompt_ids for sample in samples]
        request = GenerateReqInput(
            input_ids=ids, sampling_params=sampling, return_logprob=logprobs, extra_key=key
        )
        engine.call(anext(engine.tokenizer_manager.generate_request(request, None)))

    def megatron_step(batches: list) -> None:
        def forward_step(iterator, model):
            batch = next(iterator)
            losses_1T = model(
                batch.tokens_T[None],
                None,
                None,
                labels=batch.labels_T[None],
                packed_seq_params=batch.packed,
            )
            return losses_1T, lambda losses_1T: (
                (losses_1T[0] * batch.mask_T).sum(),
                batch.mask_T.sum().int(),
                {},
            )

        trainer.ddp.zero_grad_buffer()
        trainer.optimizer.zero_grad()
        schedule = dict(
            num_microbatches=len(batches),
            seq_length=settings.train.microbatch_tokens,
            micro_batch_size=1,
            forward_only=False,
        )
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(batches),
            model=trainer.ddp,
            **schedule,
        )
        trainer.optimizer.step()

    with launch_engine(settings.run.model, settings.rollout, config, seed=1) as engine:
        weight_sync.send_weights(weights, engine, version=0)
        prompts = rollout.PromptStream(run, settings.rollout)
        for version in range(1, rounds + 1):
            asked = prompts.take(settings.rollout.prompts_per_step)
            samples = timed(
                "rollout", lambda: rollout.generate(engine, asked, data, settings.rollout, n=n)
            )
            timed(
                "bare engine, log-probs",
                lambda: ask(samples, f"{version} log-probs", logprobs=True),
            )
            timed("bare engine", lambda: ask(samples, f"{version} bare", logprobs=False))
            timed(
                "reward",
                lambda: (
                    reward.compute_rewards(samples, judge),
                    rollout.all_gather(samples, everyone),
                ),
            )
            packed = timed("pack", lambda: train_step.pack(trainer, samples))
            timed(
                "score",
                lambda: train_step.add_logprobs(trainer, packed, settings.loss),
            )
            timed(
                "advantages",
                lambda: reward.add_advantages(samples, settings.reward, settings.loss, **limits),
            )
            timed(
                "train",
                lambda: train_step.update_policy(trainer, packed, settings.loss),
            )
            (batch,) = packed
            timed("bare Megatron", lambda: megatron_step(batch.microbatches))
            sync_bytes = timed(
                "hand-off",
                lambda: weight_sync.send_weights(weights, engine, version=version),
            )
            timed("settled", engine.settle)
            source, target = np.ones(sync_bytes, np.uint8), np.zeros(sync_bytes, np.uint8)
            timed("memcpy", lambda: np.copyto(target, source))
    print(
        "\n"
        + json.dumps(
            {name: statistics.median(seconds[1:]) for name, seconds in times.items()}
            | {"bytes": sync_bytes}
        ),
        flush=True,
    )


if __name__ == "__main__":
    worker(sys.argv[1], sys.argv[2], sys.argv[3:])
