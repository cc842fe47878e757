"""losses.py against an independent float64 NumPy oracle and finite differences.

The oracle is written from the formulas in the docstrings, one token at a time. Vocabulary-parallel results are compared with unsplit ones over two real
processes. Not covered: CUDA.
"""

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from losses import logprobs_and_entropy, mismatch, ppo_loss

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


def oracle_ppo(logprob, old, rollout, advantage, clip_low, clip_high, tis_cap):
    ratio = np.exp(logprob - old)
    ppo = max(-ratio * advantage, -min(max(ratio, 1 - clip_low), 1 + clip_high) * advantage)
    return (min(np.exp(old - rollout), tis_cap) if tis_cap else 1.0) * ppo


@pytest.mark.parametrize("tis_cap", [0.0, 2.0])
def test_ppo_loss(tis_cap):
    rng = np.random.default_rng(0)
    old = rng.uniform(-3, 0, 64)
    logprobs, rollout, advantages = old + rng.normal(0, 0.4, 64), old + rng.normal(0, 0.8, 64), rng.normal(0, 1, 64)
    arguments = dict(clip_low=0.2, clip_high=0.28, tis_cap=tis_cap)
    tensors = [torch.tensor(x, dtype=torch.float32) for x in (logprobs, old, rollout, advantages)]
    tensors[0].requires_grad_()
    loss_T, statistics = ppo_loss(*tensors, **arguments)
    expected = [oracle_ppo(*values, *arguments.values()) for values in zip(logprobs, old, rollout, advantages)]
    assert np.abs(loss_T.detach().numpy() - expected).max() < 1e-5
    loss_T.sum().backward()
    for i in range(64):  # the weight is a constant: finite differences with it fixed
        high, low = (oracle_ppo(logprobs[i] + h, old[i], rollout[i], advantages[i], *arguments.values()) for h in (1e-6, -1e-6))
        assert abs(tensors[0].grad[i].item() - (high - low) / 2e-6) < 1e-3
    clipped = [(a > 0 and new - o > np.log(1.28)) or (a < 0 and new - o < np.log(0.8)) for new, o, a in zip(logprobs, old, advantages)]
    assert statistics["clipfrac"].tolist() == [float(x) for x in clipped]


def test_by_hand():
    # ratio 2 with a positive advantage is clipped to 1.28; engine log-prob a factor e^1 below the trainer's: weight min(e, 2) = 2.
    loss_T, statistics = ppo_loss(
        torch.tensor([np.log(2.0)]), torch.tensor([0.0]), torch.tensor([-1.0]), torch.tensor([3.0]), clip_low=0.2, clip_high=0.28, tis_cap=2.0
    )
    assert loss_T.item() == pytest.approx(-2 * 1.28 * 3) and statistics["tis_clipfrac"].item() == 1.0


def test_mismatch_is_zero_only_on_agreement():
    same = mismatch(torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -2.0]))
    assert same["mismatch_abs"].sum() == 0 and same["mismatch_k3"].sum() == 0
    apart = mismatch(torch.tensor([-1.0, -2.5]), torch.tensor([-1.5, -2.0]))
    assert apart["mismatch_abs"].tolist() == [0.5, 0.5] and (apart["mismatch_k3"] > 0).all()
