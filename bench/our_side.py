"""Our side of bench/peers.py: one rank of a loop, its stages beside the bare stack, or a gradient.

    torchrun --nproc-per-node 2 bench/our_side.py sync|async toy|ragged FLAGS OF THE LOOP
    torchrun bench/our_side.py bare toy|ragged FLAGS OF THE LOOP
    torchrun bench/our_side.py gradients toy FLAGS OF THE LOOP

bench/peers.py starts it under torchrun. With `bare`, --steps is how often each stage is timed. With
`gradients` it samples a step's batch, and writes samples.json and a file for each of our gradients
into the current folder.
"""

import json
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from trl_side import answer_length, parity


def force_lengths() -> None:
    """Make the engine of this rank give answers of the ragged lengths, and reward them."""
    from backends.sglang.engine import Engine
    import reward

    generate = Engine.generate

    async def ragged(self, prompts_ids, sampling, **more):
        lengths = [
            {"max_new_tokens": answer_length(ids, i % 16), "ignore_eos": True}
            for i, ids in enumerate(prompts_ids)
        ]
        sampling = [{**one, **length} for one, length in zip(sampling, lengths)]
        return await generate(self, prompts_ids, sampling, **more)

    Engine.generate = ragged
    reward.REWARDS["exact"] = lambda sample: parity(sample.response_ids)


def worker(what: str, workload: str, arguments: list[str]) -> None:
    """Run one rank: the loop's own main(), or the stages beside the bare stack."""
    from harness import checks, exits, flags

    if workload == "ragged":
        force_lengths()
    sys.argv = [f"{what}.py", *arguments]
    own = {"bare": bare_stages, "gradients": write_gradients}
    loop = __import__("loop_sync" if what in own else f"loop_{what}")
    settings = flags.parse_or_exit(loop.Settings, checks.check_flags)
    exits.run_main(lambda: own.get(what, loop.main)(settings))


def ask_sglang(engine, data, settings, samples: list, key: str, *, logprobs: bool) -> None:
    """Send these samples' requests straight to SGLang, for answers of the same lengths."""
    import rollout
    from sglang.srt.managers.io_struct import GenerateReqInput

    sampling = rollout.sampling_params(data, settings.rollout, samples)
    for one, sample in zip(sampling, samples):
        one |= {"max_new_tokens": len(sample.response_ids), "ignore_eos": True}
    ids = [sample.prompt_ids for sample in samples]
    request = GenerateReqInput(
        input_ids=ids, sampling_params=sampling, return_logprob=logprobs, extra_key=key
    )
    engine.call(anext(engine.tokenizer_manager.generate_request(request, None)))


def step_megatron(trainer, settings, microbatches: list) -> None:
    """Run Megatron's forward, backward and optimizer on these micro-batches, without our loss."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def forward_step(iterator, model):
        batch = next(iterator)
        inputs = dict(labels=batch.labels_T[None], packed_seq_params=batch.packed)
        losses_1T = model(batch.tokens_T[None], None, None, **inputs)

        def loss(losses_1T):
            return (losses_1T[0] * batch.mask_T).sum(), batch.mask_T.sum().int(), {}

        return losses_1T, loss

    trainer.ddp.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(microbatches),
        model=trainer.ddp,
        num_microbatches=len(microbatches),
        seq_length=settings.train.microbatch_tokens,
        micro_batch_size=1,
        forward_only=False,
    )
    trainer.optimizer.step()


def bare_stages(settings) -> None:
    """Alternate between a stage of ours and the same work by the bare stack. Print medians as JSON.

    The learning rate is 0, so the weights stay as they are.
    """
    import numpy as np
    from backends.huggingface.config import read_config
    from backends.huggingface.fp8 import fp8_weights
    from backends.sglang.launch import launch_engine
    from common import distributed
    import reward
    import rollout
    import train_step
    import weight_sync
    from data.prompts import load_data

    config, rounds = read_config(settings.run.model), settings.run.steps
    n = settings.rollout.samples_per_prompt
    data = load_data(settings.run.model, settings.rollout, config, seed=1)
    everyone = distributed.init_distributed()
    fp8 = fp8_weights(config, rollout_dtype=settings.rollout.rollout_dtype, engine_tp=1)
    limits = dict(max_response_tokens=settings.rollout.max_response_tokens)
    asked = dict(steps=rounds, seed=1, temperature=settings.rollout.temperature, **limits)
    trainer = train_step.build_trainer(settings.run.model, settings.train, config, fp8=fp8, **asked)
    weights = weight_sync.WeightPath(
        trainer.gpt, trainer.layout, config, fp8, settings.sync.bucket_bytes
    )
    judge = reward.Judge(reward.REWARDS["exact"])
    run = SimpleNamespace(data=data, engine_index=0, engines=1, resumed_from=None)
    times: dict[str, list[float]] = {}

    def timed(name: str, function, *arguments, **more):
        started = time.perf_counter()
        result = function(*arguments, **more)
        times.setdefault(name, []).append(time.perf_counter() - started)
        return result

    def judge_and_exchange(samples: list) -> None:
        reward.compute_rewards(samples, judge)
        rollout.all_gather(samples, everyone)

    with launch_engine(settings.run.model, settings.rollout, config, seed=1) as engine:
        weight_sync.send_weights(weights, engine, version=0)
        prompts, bare = rollout.PromptStream(run, settings.rollout), (engine, data, settings)
        for version in range(1, rounds + 1):
            asked = prompts.take(settings.rollout.prompts_per_step)
            samples = timed("rollout", rollout.generate, engine, asked, data, settings.rollout, n=n)
            key = f"{version} log-probs"
            timed("bare engine, log-probs", ask_sglang, *bare, samples, key, logprobs=True)
            timed("bare engine", ask_sglang, *bare, samples, f"{version} bare", logprobs=False)
            timed("reward", judge_and_exchange, samples)
            batches = timed("pack", train_step.pack, trainer, samples)
            timed("score", train_step.add_logprobs, trainer, batches, settings.loss)
            rewarded = (samples, settings.reward, settings.loss)
            timed("advantages", reward.add_advantages, *rewarded, **limits)
            timed("train", train_step.update_policy, trainer, batches, settings.loss)
            (batch,) = batches
            timed("bare Megatron", step_megatron, trainer, settings, batch.microbatches)
            about = dict(version=version)
            sent = timed("hand-off", weight_sync.send_weights, weights, engine, **about)
            sync_bytes = sent["sync_bytes"]
            timed("settled", engine.settle)
            source, target = np.ones(sync_bytes, np.uint8), np.zeros(sync_bytes, np.uint8)
            timed("memcpy", np.copyto, target, source)
    medians = {name: statistics.median(seconds[1:]) for name, seconds in times.items()}
    print("\n" + json.dumps(medians | {"bytes": sync_bytes}), flush=True)


# --- gradients ----------------------------------------------------------------------------------


def hf_gradient(trainer) -> dict:
    """Return the gradient of each weight by its Hugging Face name, of a trainer on one rank."""
    from backends.huggingface.names import parameters_of, rule_of, split_stacked

    gradient, config = {}, trainer.config
    for name, parameter in parameters_of(trainer.gpt):
        rule = rule_of(name, first_layer=0)
        how = dict(head_dim=config["head_dim"], groups=config["num_key_value_heads"])
        parts = split_stacked(parameter.main_grad, len(rule.hf), **how)
        names = trainer.layout.names(rule, config)[0]
        gradient |= {name: part.clone().contiguous() for name, part in zip(names, parts)}
    return gradient


def write_gradients(settings) -> None:
    """Sample a batch with the engine, and write samples.json and the gradients of this batch.

    bf16: as the loop computes it. fp32: weights and activations in FP32. fp32-uncorrected: without
    the correction by the engine's log-probs, which TRL has not.
    """
    from dataclasses import replace

    from backends.huggingface.config import read_config
    from backends.sglang.launch import launch_engine
    from common import distributed
    import reward
    import rollout
    import train_step
    import weight_sync
    from data.prompts import load_data
    from safetensors.torch import save_file

    config = read_config(settings.run.model)
    data = load_data(settings.run.model, settings.rollout, config, seed=settings.run.seed)
    distributed.init_distributed()
    longest = settings.rollout.max_response_tokens
    asked = dict(steps=1, seed=1, temperature=settings.rollout.temperature)
    asked |= dict(max_response_tokens=longest)
    trainers = {
        dtype: train_step.build_trainer(
            settings.run.model, replace(settings.train, train_dtype=dtype), config, **asked
        )
        for dtype in ("bf16", "fp32")
    }
    bf16 = trainers["bf16"]
    weights = weight_sync.WeightPath(
        bf16.gpt, bf16.layout, config, frozenset(), settings.sync.bucket_bytes
    )
    run = SimpleNamespace(data=data, engine_index=0, engines=1, resumed_from=None)
    with launch_engine(settings.run.model, settings.rollout, config, seed=1) as engine:
        weight_sync.send_weights(weights, engine, version=0)
        prompts = rollout.PromptStream(run, settings.rollout).take_step()
        samples = rollout.generate(engine, prompts, data, settings.rollout)
    reward.compute_rewards(samples, reward.Judge(reward.REWARDS["exact"]))
    reward.add_advantages(samples, settings.reward, settings.loss, longest)
    rows = [
        dict(prompt_ids=s.prompt_ids, response_ids=s.response_ids, advantage=float(s.advantages[0]))
        for s in samples
    ]
    Path("samples.json").write_text(json.dumps(rows), encoding="utf-8")
    uncorrected = replace(settings.loss, correction="none")
    for name, dtype, loss in (
        ("bf16", "bf16", settings.loss),
        ("fp32", "fp32", settings.loss),
        ("fp32-uncorrected", "fp32", uncorrected),
    ):
        trainer = trainers[dtype]
        (batch,) = train_step.pack(trainer, samples)
        train_step.backward(trainer, batch, loss)
        save_file(hf_gradient(trainer), f"{name}.safetensors")


if __name__ == "__main__":
    worker(sys.argv[1], sys.argv[2], sys.argv[3:])
