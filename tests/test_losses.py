"""Log-probs and entropy from logits, the mismatch metrics, and which loss settings are refused.

Why: every loss starts from these log-probs, and a wrong one trains in silence. They are compared
with a float64 oracle, written one token at a time from the formulas, and with finite differences.
Vocabulary-parallel results are compared with unsplit ones over two real processes. The parts of a
policy loss are in tests/oracle, the whole is in test_whole_loss.py. Not covered: CUDA.
"""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from backends.megatron.logprobs import logprobs_and_entropy, mismatch
from common.errors import BadInput
from harness.loss_checks import check_loss_settings
from losses import CORRECTIONS, LossSettings, ratio

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 3, 1024])
def test_logprobs_and_entropy(one_rank, chunk, dtype):
    """BF16 logits are exact numbers too: the function computes in FP32."""
    logits, labels = inputs(dtype)
    got = logprobs_and_entropy(
        logits, labels, temperature=TEMPERATURE, vocab_size=V, group=dist.group.WORLD, chunk=chunk
    )
    for value, expected in zip(got, oracle(logits.float().numpy(), labels.numpy(), V)):
        assert np.abs(value.numpy() - expected).max() < 1e-5


def test_padding_of_the_vocabulary_takes_no_probability(one_rank):
    logits, labels = inputs()
    labels = labels.clamp(max=V - 4)
    got, _ = logprobs_and_entropy(
        logits, labels, temperature=TEMPERATURE, vocab_size=V - 3, group=dist.group.WORLD
    )
    assert np.abs(got.numpy() - oracle(logits.numpy(), labels.numpy(), V - 3)[0]).max() < 1e-5


def test_gradient_is_that_of_finite_differences(one_rank):
    logits, labels = inputs()
    weights = torch.randn(2, T, generator=torch.Generator().manual_seed(1))
    x = logits.clone().requires_grad_()
    logprobs, entropy = logprobs_and_entropy(
        x, labels, temperature=TEMPERATURE, vocab_size=V, group=dist.group.WORLD, chunk=3
    )
    ((logprobs * weights[0]) + (entropy * weights[1])).sum().backward()

    def objective(values: np.ndarray) -> float:
        logprobs, entropies = oracle(values, labels.numpy(), V)
        return float(
            (logprobs * weights[0].double().numpy() + entropies * weights[1].double().numpy()).sum()
        )

    base, step = logits.double().numpy(), 1e-6
    for t, v in [(0, int(labels[0])), (0, 1), (3, 5), (6, 11)]:
        up, down = base.copy(), base.copy()
        up[t, v] += step
        down[t, v] -= step
        assert abs(x.grad[t, v].item() - (objective(up) - objective(down)) / (2 * step)) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_minus_infinity_are_tokens_of_probability_0(one_rank, dtype):
    """Value and gradient equal those of the vocabulary without them. 0 times -inf would be NaN."""
    logits, labels = inputs(dtype)
    excluded = [0, 5, V - 1]
    kept = [v for v in range(V) if v not in excluded]
    labels = torch.tensor(kept)[labels % len(kept)]
    few = logits[:, kept].clone().requires_grad_()
    logits[:, excluded] = -math.inf
    many = logits.clone().requires_grad_()
    group = dict(temperature=TEMPERATURE, group=dist.group.WORLD)
    got = logprobs_and_entropy(many, labels, vocab_size=V, **group)
    expected = logprobs_and_entropy(
        few, torch.tensor([kept.index(v) for v in labels]), vocab_size=len(kept), **group
    )
    for values in (got, expected):
        (values[0].sum() + 0.5 * values[1].sum()).backward()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got, expected))
    assert torch.allclose(many.grad[:, kept], few.grad) and not many.grad[:, excluded].any()


def test_a_position_with_one_possible_token_has_entropy_0(one_rank):
    logits = torch.full((1, V), -math.inf)
    logits[0, 3] = 2.0
    logits.requires_grad_()
    logprobs, entropy = logprobs_and_entropy(
        logits, torch.tensor([3]), temperature=TEMPERATURE, vocab_size=V, group=dist.group.WORLD
    )
    (logprobs + entropy).sum().backward()
    assert logprobs.tolist() == [0] and entropy.tolist() == [0] and not logits.grad.any()


def test_a_label_whose_logit_is_minus_infinity_has_log_prob_minus_infinity(one_rank):
    logits, labels = inputs()
    logits[0, labels[0]] = -math.inf
    logprobs, entropy = logprobs_and_entropy(
        logits, labels, temperature=TEMPERATURE, vocab_size=V, group=dist.group.WORLD
    )
    assert logprobs[0] == -math.inf and logprobs[1:].isfinite().all() and entropy.isfinite().all()


def _vocab_parallel(rank, store_port, results):
    store = dist.TCPStore("127.0.0.1", store_port, 2, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    logits, labels = inputs()
    # Also where a rank that does not hold the label looks for it.
    logits[2, [0, V // 2, V - 2]] = -math.inf
    labels[2] = 1
    mine = logits.chunk(2, dim=1)[rank].clone().requires_grad_()
    # With vocab_size 4 the second rank holds nothing but padding.
    few, _ = logprobs_and_entropy(
        mine.detach(), labels % 4, temperature=TEMPERATURE, vocab_size=4, group=dist.group.WORLD
    )
    logprobs, entropy = logprobs_and_entropy(
        mine, labels, temperature=TEMPERATURE, vocab_size=V - 1, group=dist.group.WORLD, chunk=4
    )
    (logprobs.sum() + 0.5 * entropy.sum()).backward()
    results.put(
        (rank, logprobs.detach().numpy(), entropy.detach().numpy(), mine.grad.numpy(), few.numpy())
    )
    dist.destroy_process_group()


def test_two_vocabulary_shards_equal_one(one_rank):
    # With V - 1 real tokens the second rank also holds a padding column. Its gradient must be 0.
    store = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    results = mp.get_context("spawn").Queue()
    workers = mp.spawn(_vocab_parallel, args=(store.port, results), nprocs=2, join=False)
    got = sorted((results.get(timeout=120) for _ in range(2)), key=lambda item: item[0])
    workers.join()
    logits, labels = inputs()
    logits[2, [0, V // 2, V - 2]] = -math.inf
    labels[2] = 1
    few, _ = logprobs_and_entropy(
        logits, labels % 4, temperature=TEMPERATURE, vocab_size=4, group=dist.group.WORLD
    )
    x = logits.clone().requires_grad_()
    logprobs, entropy = logprobs_and_entropy(
        x, labels, temperature=TEMPERATURE, vocab_size=V - 1, group=dist.group.WORLD
    )
    (logprobs.sum() + 0.5 * entropy.sum()).backward()
    for _, rank_logprobs, rank_entropy, _, rank_few in got:
        assert np.allclose(rank_few, few.numpy(), atol=1e-6)
        assert np.allclose(rank_logprobs, logprobs.detach().numpy(), atol=1e-6)
        assert np.allclose(rank_entropy, entropy.detach().numpy(), atol=1e-6)
    gradient = np.concatenate([item[3] for item in got], axis=1)
    assert np.allclose(gradient, x.grad.numpy(), atol=1e-6) and not gradient[:, V - 1].any()


def test_mismatch_is_zero_only_on_agreement():
    same = mismatch(torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -2.0]))
    assert same["mismatch_abs"].sum() == 0 and same["mismatch_k3"].sum() == 0
    apart = mismatch(torch.tensor([-1.0, -2.5]), torch.tensor([-1.5, -2.0]))
    assert apart["mismatch_abs"].tolist() == [0.5, 0.5] and (apart["mismatch_k3"] > 0).all()


def test_mismatch_k3_by_hand():
    """With d = trainer - rollout it is e^d - 1 - d, which differs for -d."""
    apart = mismatch(torch.tensor([0.0, 0.0]), torch.tensor([-math.log(2), math.log(2)]))
    twice, half = apart["mismatch_k3"].tolist()
    assert twice == pytest.approx(2 - 1 - math.log(2))
    assert half == pytest.approx(0.5 - 1 + math.log(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_ratio_is_bounded_and_has_no_gradient_beyond(dtype):
    x = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], dtype=dtype, requires_grad=True)
    ratio(x).sum().backward()
    assert ratio(x).tolist() == pytest.approx(
        [math.exp(y) for y in (-20, -20, 0, 20, 20)], rel=1e-2
    )
    assert x.grad.tolist() == [0, 0, 1, 0, 0]


INFINITE, UNDEFINED = math.inf, math.nan


@pytest.mark.parametrize("changes, message", [
    (dict(clip_low=1.5), "--clip-low 1.5"),
    (dict(clip_low=UNDEFINED), "--clip-low nan"),
    (dict(clip_high=0.0), "--clip-high 0.0"),
    (dict(clip_high=UNDEFINED), "--clip-high nan"),
    (dict(dual_clip=UNDEFINED), "--dual-clip nan"),
    (dict(policy_loss="gspo"),
     "--policy-loss gspo and --aggregation token .*use --aggregation sequence"),
    (dict(policy_loss="gspo", aggregation="constant"), "--aggregation constant do not fit"),
    (dict(correction="none", correction_low=0.5),
     "--correction-low 0.5 has no effect: --correction none"),
    (dict(correction="none", correction_high=2.0),
     "--correction-high 2.0 has no effect: --correction none"),
    (dict(correction="tis", correction_low=0.5),
     "--correction-low 0.5 has no effect: --correction tis"),
    (dict(correction="decoupled", correction_low=0.5),
     "--correction-low 0.5 has no effect: --correction decoupled"),
    (dict(correction="icepop", correction_low=-0.1), "0 <= low <= 1"),
    (dict(correction="icepop", correction_low=UNDEFINED), "0 <= low <= 1"),
    (dict(correction="sequence_mask", correction_high=0.99), "low <= 1 <= high"),
    (dict(correction_high=UNDEFINED), "--correction-high nan"),
    (dict(correction_high=0.5), "--correction-high 0.5"),
    (dict(kl_coef=UNDEFINED), "--kl-coef nan"),
    (dict(kl_coef=INFINITE), "--kl-coef inf"),
    (dict(entropy_coef=UNDEFINED), "--entropy-coef nan"),
    (dict(kl_estimator="k2"), "--kl-estimator k2 .*no effect without --kl-coef"),
    (dict(kl_in="reward"), "--kl-in reward has no effect without --kl-coef"),
    (dict(dual_clip=0.5), "--dual-clip 0.5 must be above 1"),
    (dict(policy_loss="cispo", dual_clip=3.0),
     "--policy-loss cispo and --dual-clip 3.0 do not fit: use --dual-clip 0.0, or --policy-loss "
     "ppo or gspo"),
    (dict(policy_loss="gmpo"), "--policy-loss gmpo and --aggregation token do not fit"),
    (dict(policy_loss="gmpo", aggregation="sequence", dual_clip=3.0), "--dual-clip 3.0 do not fit"),
    (dict(policy_loss="sapo", dual_clip=3.0), "--policy-loss sapo and --dual-clip 3.0 do not fit"),
    (dict(policy_loss="sapo", clip_low=0.2),
     "--clip-low 0.2 has no effect: --policy-loss sapo has no such bound"),
    (dict(policy_loss="sapo", clip_high=0.2),
     "--clip-high 0.2 has no effect: --policy-loss sapo has no such bound"),
    (dict(tau_pos=1.0), "--tau-pos 1.0 has no effect: --policy-loss ppo has no such bound"),
    (dict(tau_neg=1.0), "--tau-neg 1.0 has no effect: --policy-loss ppo has no such bound"),
    *[(dict(policy_loss="sapo", **{name: value}), f"--{name.replace('_', '-')} {value} .*must be p")
      for name in ("tau_neg",) for value in (0.0, -1.0, UNDEFINED, INFINITE)],
    (dict(policy_loss="sapo", tau_pos=0.0), "--tau-pos 0.0 and --tau-neg 1.05 must be positive"),
    (dict(policy_loss="sapo", tau_pos=UNDEFINED), "--tau-pos nan and"),
    (dict(old_logprobs="rollout"),
     "--old-logprobs rollout and --correction tis do not fit: .* use --correction none"),
    (dict(old_logprobs="rollout", correction="sequence_tis"), "--correction sequence_tis do not"),
    (dict(correction="icepop", correction_low=2.0), "low <= 1 <= high"),
    (dict(kl_coef=-1.0), "--kl-coef -1.0"),
    (dict(kl_coef=0.1, kl_estimator="k1"),
     "--kl-estimator k1 and --kl-in loss do not fit: use --kl-in reward, or --kl-estimator k2"),
])  # fmt: skip
def test_settings_that_cannot_work(changes, message):
    with pytest.raises(BadInput, match=message):
        check_loss_settings(LossSettings(**changes))


def test_each_policy_loss_has_bounds_of_its_own():
    def clips(low, high, **more):
        return dict(clip_low=low, clip_high=high, dual_clip=0.0) | more

    assert LossSettings().clips == clips(0.2, 0.28)
    assert LossSettings(dual_clip=3.0).clips == clips(0.2, 0.28, dual_clip=3.0)
    assert LossSettings(policy_loss="gspo").clips == clips(3e-4, 4e-4)
    assert LossSettings(policy_loss="cispo", clip_high=1.5).clips == clips(1.0, 1.5)
    assert LossSettings(policy_loss="gmpo").clips == clips(0.4, 0.4)
    assert LossSettings(clip_low=0.1).clips == clips(0.1, 0.28)
    sapo = LossSettings(policy_loss="sapo", tau_neg=2.0)
    assert sapo.clips == clips(None, None, tau_pos=1.0, tau_neg=2.0)


@pytest.mark.parametrize("correction, bounds", [
    ("none", (None, None)), ("tis", (None, 2.0)), ("icepop", (0.5, 5.0)),
    ("sequence_tis", (None, 2.0)), ("decoupled", (None, 5.0)), ("sequence_mask", (0.9, 1.1)),
])  # fmt: skip
def test_each_correction_has_bounds_of_its_own(correction, bounds):
    settings = LossSettings(correction=correction)
    check_loss_settings(settings)
    assert settings.correction_bounds == dict(zip(("low", "high"), bounds))
    assert correction in CORRECTIONS


def test_a_bound_that_is_set_holds():
    settings = LossSettings(correction="sequence_mask", correction_high=1.002)
    check_loss_settings(settings)
    assert settings.correction_bounds == dict(low=0.9, high=1.002)
    icepop = LossSettings(correction="icepop", correction_low=0.0)
    assert icepop.correction_bounds == dict(low=0.0, high=5.0)


@pytest.mark.parametrize("changes", [
    dict(policy_loss="gspo", aggregation="sequence", dual_clip=3.0),
    dict(correction="icepop", correction_low=0.0, correction_high=INFINITE),
    dict(correction="sequence_mask", correction_low=1.0, correction_high=1.0),
    dict(kl_coef=0.1, kl_estimator="k1", kl_in="reward"),
    dict(kl_coef=0.1, kl_in="reward", old_logprobs="rollout", correction="none"),
    dict(policy_loss="gmpo", aggregation="sequence", clip_low=1.0, clip_high=INFINITE),
    dict(policy_loss="sapo", aggregation="sequence", tau_pos=1e-3),
    dict(clip_high=INFINITE),
])  # fmt: skip
def test_settings_that_work(changes):
    check_loss_settings(LossSettings(**changes))
