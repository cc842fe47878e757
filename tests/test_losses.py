"""Log-probs and entropy against an independent float64 NumPy oracle and finite differences. The parts of a policy loss are in tests/oracle.

The oracle is written from the formulas in the docstrings, one token at a time. Vocabulary-parallel results are compared with unsplit ones over two real
processes. Not covered: CUDA.
"""

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from logprobs import logprobs_and_entropy
from losses import LossSettings, check_loss_settings, mismatch
from run import BadInput

T, V, TEMPERATURE = 7, 12, 0.7


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(T, V, generator=generator) * 3).to(dtype)
    return logits, torch.randint(0, V, (T,), generator=generator)


def oracle(logits: np.ndarray, labels: np.ndarray, vocab_size: int):
    logprobs, entropies = [], []
    for row, label in zip(logits.astype(np.float64), labels):
        x = row[:vocab_size] / TEMPERATURE
        p = np.exp(x - x.max()) / np.exp(x - x.max()).sum()
        logprobs.append(np.log(p[label]))
        entropies.append(-(p * np.log(p)).sum())
    return np.array(logprobs), np.array(entropies)


@pytest.mark.parametrize("chunk", [1, 3, 1024])
def test_logprobs_and_entropy(one_rank, chunk):
    logits, labels = inputs()
    got = logprobs_and_entropy(logits, labels, temperature=TEMPERATURE, vocab_size=V, group=dist.group.WORLD, chunk=chunk)
    for value, expected in zip(got, oracle(logits.numpy(), labels.numpy(), V)):
        assert np.abs(value.numpy() - expected).max() < 1e-5


def test_padding_of_the_vocabulary_takes_no_probability(one_rank):
    logits, labels = inputs()
    labels = labels.clamp(max=V - 4)
    got, _ = logprobs_and_entropy(logits, labels, temperature=TEMPERATURE, vocab_size=V - 3, group=dist.group.WORLD)
    assert np.abs(got.numpy() - oracle(logits.numpy(), labels.numpy(), V - 3)[0]).max() < 1e-5


def test_gradient_is_that_of_finite_differences(one_rank):
    logits, labels = inputs()
    weights = torch.randn(2, T, generator=torch.Generator().manual_seed(1))
    x = logits.clone().requires_grad_()
    logprobs, entropy = logprobs_and_entropy(x, labels, temperature=TEMPERATURE, vocab_size=V, group=dist.group.WORLD, chunk=3)
    ((logprobs * weights[0]) + (entropy * weights[1])).sum().backward()

    def objective(values: np.ndarray) -> float:
        logprobs, entropies = oracle(values, labels.numpy(), V)
        return float((logprobs * weights[0].double().numpy() + entropies * weights[1].double().numpy()).sum())

    base, step = logits.double().numpy(), 1e-6
    for t, v in [(0, int(labels[0])), (0, 1), (3, 5), (6, 11)]:
        up, down = base.copy(), base.copy()
        up[t, v] += step
        down[t, v] -= step
        assert abs(x.grad[t, v].item() - (objective(up) - objective(down)) / (2 * step)) < 1e-4


def _vocab_parallel(rank, store_port, results):
    store = dist.TCPStore("127.0.0.1", store_port, 2, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    logits, labels = inputs()
    mine = logits.chunk(2, dim=1)[rank].clone().requires_grad_()
    logprobs, entropy = logprobs_and_entropy(mine, labels, temperature=TEMPERATURE, vocab_size=V - 1, group=dist.group.WORLD, chunk=4)
    (logprobs.sum() + 0.5 * entropy.sum()).backward()
    results.put((rank, logprobs.detach().numpy(), entropy.detach().numpy(), mine.grad.numpy()))
    dist.destroy_process_group()


def test_two_vocabulary_shards_equal_one(one_rank):
    # V - 1 real tokens: the second rank also holds a padding column, whose gradient must be 0.
    store = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    results = mp.get_context("spawn").Queue()
    workers = mp.spawn(_vocab_parallel, args=(store.port, results), nprocs=2, join=False)
    got = sorted((results.get(timeout=120) for _ in range(2)), key=lambda item: item[0])
    workers.join()
    logits, labels = inputs()
    x = logits.clone().requires_grad_()
    logprobs, entropy = logprobs_and_entropy(x, labels, temperature=TEMPERATURE, vocab_size=V - 1, group=dist.group.WORLD)
    (logprobs.sum() + 0.5 * entropy.sum()).backward()
    for _, rank_logprobs, rank_entropy, _ in got:
        assert np.allclose(rank_logprobs, logprobs.detach().numpy(), atol=1e-6) and np.allclose(rank_entropy, entropy.detach().numpy(), atol=1e-6)
    gradient = np.concatenate([item[3] for item in got], axis=1)
    assert np.allclose(gradient, x.grad.numpy(), atol=1e-6) and not gradient[:, V - 1].any()


def test_mismatch_is_zero_only_on_agreement():
    same = mismatch(torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -2.0]))
    assert same["mismatch_abs"].sum() == 0 and same["mismatch_k3"].sum() == 0
    apart = mismatch(torch.tensor([-1.0, -2.5]), torch.tensor([-1.5, -2.0]))
    assert apart["mismatch_abs"].tolist() == [0.5, 0.5] and (apart["mismatch_k3"] > 0).all()


@pytest.mark.parametrize("changes, message", [
    (dict(clip_low=1.5), "--clip-low 1.5"),
    (dict(clip_high=0.0), "--clip-high 0.0"),
    (dict(dual_clip=0.5), "--dual-clip 0.5 must be above 1"),
    (dict(policy_loss="cispo", dual_clip=3.0), "cispo has none"),
    (dict(correction_low=2.0), "low <= 1 <= high"),
    (dict(kl_coef=-1.0), "--kl-coef -1.0"),
    (dict(kl_coef=0.1, kl_estimator="k1"), "no gradient on average"),
])  # fmt: skip
def test_settings_that_cannot_work(changes, message):
    with pytest.raises(BadInput, match=message):
        check_loss_settings(LossSettings(**changes))


def test_each_policy_loss_has_bounds_of_its_own():
    assert LossSettings().clips == (0.2, 0.28) and LossSettings(policy_loss="gspo").clips == (3e-4, 4e-4)
    assert LossSettings(policy_loss="cispo", clip_high=1.5).clips == (1.0, 1.5)
