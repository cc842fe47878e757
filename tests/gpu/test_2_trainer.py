"""The trainer alone, on samples that a CPU has made: its numbers beside the CPU's.

dump/ holds three steps and cpu.json; make_dump.py wrote them.
"""

import json
from pathlib import Path

import pytest
import torch
from conftest import ROOT, seed_megatron, write_model
from on_gpu import DEVICE, evidence, has_gpu, on_gpu, on_gpu_only

import reward
import train_step
from backends.megatron.batches import pack_batch
from backends.huggingface.config import read_config
from backends.megatron import model, state
from common.settings import TrainSettings
from data.sample import read_dump
from losses import LossSettings

DUMP = Path(__file__).resolve().parent / "dump"
CPU = json.loads((DUMP / "cpu.json").read_text(encoding="utf-8"))
STEPS = range(1, 1 + len(CPU["steps"]))


def has_transformer_engine() -> bool:
    return has_gpu and model.has_transformer_engine()


@pytest.fixture(params=["local spec", "Transformer Engine"])
def spec(request, monkeypatch) -> str:
    if request.param == "Transformer Engine" and not has_transformer_engine():
        pytest.skip("Transformer Engine is not installed")
    use_te = request.param == "Transformer Engine"
    monkeypatch.setattr(model, "has_transformer_engine", lambda: use_te)
    return request.param


def new_trainer(folder=ROOT / "toy", **changes) -> train_step.Trainer:
    seed_megatron()
    settings = TrainSettings(**changes)
    return train_step.build_trainer(
        str(folder),
        settings,
        read_config(str(folder)),
        steps=len(STEPS),
        seed=3,
        temperature=1.0,
        max_response_tokens=8,
    )


def train(trainer, step: int) -> dict[str, float]:
    samples = read_dump(DUMP / f"step-{step:06d}.jsonl", vocab_size=32)
    batches = train_step.pack(trainer, samples)
    train_step.add_logprobs(trainer, batches, LossSettings())
    reward.add_advantages(samples, reward.RewardSettings(), LossSettings(), 8)
    return train_step.update_policy(trainer, batches, LossSettings())


@on_gpu
def test_three_steps_as_on_a_cpu(one_rank, spec):
    """The first step starts from equal weights. Adam's first update has the size of the learning
    rate whatever the gradient's: where rounding turns a tiny gradient's sign, weights part.
    """
    if has_gpu:
        torch.cuda.reset_peak_memory_stats()
    trainer = new_trainer()
    for step, expected in zip(STEPS, CPU["steps"]):
        got = train(trainer, step)
        evidence(
            f"{spec}, step {step}, this device / CPU",
            **{name: f"{got[name]:.5f} / {expected[name]:.5f}" for name in expected},
        )
        loss, mismatch = (2e-3, 0.1) if step == 1 else (2e-2, 0.4)
        assert got["loss"] == pytest.approx(expected["loss"], abs=loss)
        assert got["entropy"] == pytest.approx(expected["entropy"], rel=0.03)
        assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.05)
        assert got["mismatch_abs"] == pytest.approx(expected["mismatch_abs"], rel=mismatch)
    if has_gpu:
        peak, held = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
        evidence(f"{spec}, memory", peak_MB=peak / 1e6, held_MB=held / 1e6)


@on_gpu
def test_a_checkpoint_goes_on_where_it_was(one_rank, spec, tmp_path):
    trainer = new_trainer()
    for step in STEPS[:-1]:
        train(trainer, step)
    state.save_state(trainer, tmp_path)
    undisturbed = train(trainer, STEPS[-1])
    resumed = new_trainer()
    state.load_state(resumed, tmp_path)
    again = train(resumed, STEPS[-1])
    assert again == pytest.approx(undisturbed, rel=1e-3, abs=1e-5)
    same = all(again[name] == undisturbed[name] for name in again)
    evidence(f"{spec}, the step after a resume", digit_for_digit=same, loss=again["loss"])


@on_gpu
def test_experts(one_rank, spec, tmp_path):
    """A random mixture of experts, in both specs: its log-probs, and one step."""
    folder = write_model(tmp_path, "qwen3_moe", dtype=torch.bfloat16)
    trainer = new_trainer(folder)
    metrics = train(trainer, 1)
    evidence(f"{spec}, experts", **{name: metrics[name] for name in ("loss", "grad_norm")})
    assert metrics["grad_norm"] > 0


@on_gpu_only
def test_both_specs_compute_the_same(one_rank, monkeypatch, tmp_path):
    """Log-probs of a random dense model and of one with experts, TE against the local spec."""
    if not has_transformer_engine():
        pytest.skip("Transformer Engine is not installed")
    for family in ("qwen3", "qwen3_moe"):
        folder = write_model(tmp_path / family, family, dtype=torch.bfloat16)
        found = []
        for use_te in (False, True):
            monkeypatch.setattr(model, "has_transformer_engine", lambda use_te=use_te: use_te)
            trainer = new_trainer(folder)
            batch = pack_batch(trainer, read_dump(DUMP / "step-000001.jsonl"))
            rows = train_step.compute_logprobs(trainer, batch.microbatches)
            found.append(torch.cat([row for row in rows]).float().cpu())
        difference = (found[0] - found[1]).abs()
        evidence(
            f"TE against local spec, {family}",
            mean_logprob_difference=float(difference.mean()),
            largest=float(difference.max()),
            device=DEVICE,
        )
        assert difference.mean() < 0.05
