"""The loss as train_step puts it together against oracle.whole_loss: value, gradient, metrics.

Each formula has an oracle of its own (tests/oracle). Here is what they cannot see: a sign, a
coefficient, a weight on the wrong term, old log-probs in place of current ones. The path is the
shipped one: reward.add_advantages, and train_step.backward under Megatron's schedule, DDP and
normaliser. Its model is a table with a row of logits for each token id. All ids of the batch
differ, so each position's logits are parameters, and one step takes milliseconds. The batch is
ragged: tool tokens masked within a response, an empty response, one that does not count at all. A
real model under the same oracle is at the end. Not covered: more than one rank, which is in
test_splits.py.
"""

import itertools
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, seed_megatron

sys.path.insert(0, str(ROOT / "tests" / "oracle"))
import oracle

from backends.huggingface.config import read_config
from backends.megatron import model as megatron_model
import losses
from losses import KL_ESTIMATORS, POLICY_LOSSES, LossSettings, PolicyLoss
import reward
import train_step
from megatron.core.enums import ModelType
from backends.megatron.batches import pack_batch
from common.settings import TrainSettings
from data.sample import Sample
from reward import RewardSettings

V, TEMPERATURE, MAX_RESPONSE = 32, 0.7, 8
LIMITS = dict(temperature=TEMPERATURE, max_response_tokens=MAX_RESPONSE)
SEED = 55  # of the noise; test_the_batch_reaches_every_branch says what it must reach
MASKS = [[1, 1, 1], [1, 0, 0, 1, 1], [], [0, 0], [1, 1, 1, 1], [1]]
PROMPTS = [2, 1, 2, 1, 2, 1]  # tokens
REWARDS, GROUPS = [1.0, 0.0, 0.25, 0.5, 1.0, -0.5], [0, 0, 0, 1, 1, 1]

POLICIES = {  # with bounds that the ratios of the batch are on both sides of
    "ppo": dict(policy_loss="ppo", clip_low=0.2, clip_high=0.28),
    "ppo, dual clip": dict(policy_loss="ppo", clip_low=0.2, clip_high=0.28, dual_clip=1.5),
    "gspo": dict(policy_loss="gspo", clip_low=0.1, clip_high=0.15, dual_clip=1.3),
    "cispo": dict(policy_loss="cispo", clip_low=0.2, clip_high=0.28),
    "gmpo": dict(policy_loss="gmpo", clip_low=0.1, clip_high=0.15),
    "sapo": dict(policy_loss="sapo", tau_pos=2.0, tau_neg=3.0),
}
CORRECTIONS = {
    "none": {},
    "tis": dict(correction_high=1.3),
    "sequence_tis": dict(correction_high=1.3),
    "icepop": dict(correction_low=0.6, correction_high=1.6),
    "decoupled": dict(correction_high=1.3),
    "sequence_mask": dict(correction_low=0.8, correction_high=1.25),
}
FORKED = {
    name: dict(policy_loss=name)
    for name in POLICY_LOSSES
    if name not in [policy["policy_loss"] for policy in POLICIES.values()]
}  # what the tables have beyond these
FORKED_CORRECTIONS = {name: {} for name in losses.CORRECTIONS if name not in CORRECTIONS}
KLS = {"off": {}}
KLS |= {
    f"{name} in the loss": dict(kl_in="loss", kl_estimator=name)
    for name, estimator in KL_ESTIMATORS.items()
    if "loss" in estimator.only.get("kl_in", ("loss",))
}
KLS |= {f"{name} in the reward": dict(kl_in="reward", kl_estimator=name) for name in KL_ESTIMATORS}


def algorithms(policy: str, correction: str, *, scored: bool = True) -> list[LossSettings]:
    """Every combination with this policy loss and correction.

    Samples without old log-probs have no KL in the reward: it is made of them.
    """
    chosen = {**(POLICIES | FORKED)[policy], "correction": correction}
    chosen |= (CORRECTIONS | FORKED_CORRECTIONS)[correction]
    only = POLICY_LOSSES[chosen["policy_loss"]].only
    chosen |= {
        name: values[0] for name, values in only.items() if name not in ("aggregation", *chosen)
    }
    aggregations = only.get("aggregation", losses.AGGREGATIONS)
    kls = [kl for kl in KLS.values() if scored or kl.get("kl_in") != "reward"]
    return [
        LossSettings(
            **chosen,
            **kl,
            kl_coef=0.3 if kl else 0.0,
            entropy_coef=entropy_coef,
            aggregation=aggregation,
        )
        for kl, entropy_coef, aggregation in itertools.product(kls, (0.0, 0.2), aggregations)
    ]


class Table(torch.nn.Module):
    """Logits are rows of a table, chosen by the token id; and what Megatron's schedule asks for."""

    def __init__(self, config):
        super().__init__()
        logits = 1.5 * torch.randn(V, V, generator=torch.Generator().manual_seed(0))
        self.config, self.weight = config, torch.nn.Parameter(logits)
        self.model_type = ModelType.encoder_or_decoder

    def set_input_tensor(self, tensor):
        pass

    def forward(self, tokens_1T, position_ids, attention_mask, packed_seq_params):
        return self.weight[tokens_1T]


class Batch:
    """Samples whose log-probs are apart by known noise, and the same for the oracle, by token."""

    def __init__(self, logits: torch.Tensor, *, scored: bool, far: float = 0.0):
        """logits: a row for each token id. far: the size of each difference; its sign is random."""
        self.rewards = (
            REWARDS if not far else [*REWARDS[:3], 1.0, 1.0, 1.0]
        )  # the second group's advantage: 0
        rng, ids = np.random.default_rng(SEED), itertools.count(1)
        self.samples, self.logits, self.places = [], logits.detach().double().numpy(), []
        for i, (prompt, mask) in enumerate(zip(PROMPTS, MASKS)):
            tokens = [next(ids) for _ in range(prompt + len(mask))]
            fields = dict(
                response_ids=tokens[prompt:],
                loss_mask=mask,
                reward=self.rewards[i],
                group=GROUPS[i],
                index=i,
            )
            self.samples.append(Sample(tokens[:prompt], **fields))
            self.places += [
                (token - 1, token) for token in tokens[prompt:]
            ]  # the position before predicts it
        self.mask_T = np.array([x for mask in MASKS for x in mask])
        owner_T = np.repeat(np.arange(len(MASKS)), [len(mask) for mask in MASKS])
        self.packed = oracle.Packed(owner_T, self.mask_T, samples=len(MASKS))
        logp = [oracle.log_softmax(row, TEMPERATURE) for row in self.logits]
        self.logprobs_T = np.array([logp[at][label] for at, label in self.places])
        self.entropy_T = np.array([-(np.exp(logp[at]) * logp[at]).sum() for at, _ in self.places])

        def near(x_T):
            noise_T = rng.normal(0, 0.3, len(MASKS))[owner_T] + rng.normal(0, 0.4, len(x_T))
            noise_T += far * rng.choice([-1, 1], len(x_T))
            return (x_T + noise_T).astype(np.float32).astype(np.float64)

        self.old_T = near(self.logprobs_T) if scored else self.logprobs_T
        self.ref_T, self.rollout_T = near(self.logprobs_T), near(self.old_T)
        self.rollout_T[self.mask_T == 0] = np.nan  # nobody sampled it
        self.give("rollout_logprobs", self.rollout_T)
        self.give("ref_logprobs", self.ref_T)
        if scored:
            self.give("old_logprobs", self.old_T)

    def give(self, field: str, values_T: np.ndarray) -> None:
        ends = np.cumsum([len(mask) for mask in MASKS])
        for sample, mine in zip(self.samples, np.split(values_T, ends[:-1])):
            setattr(sample, field, mine)

    def known(self, settings: LossSettings, advantage: str) -> oracle.Known:
        """Return what the oracle knows; a KL in the reward lowers its advantages by token."""
        from_engine = settings.old_logprobs == "rollout"
        old_T = self.rollout_T if from_engine else self.old_T
        lengths_N = np.array([len(mask) for mask in MASKS])
        penalties_T = np.zeros(len(self.mask_T))
        if settings.kl_coef and settings.kl_in == "reward":
            kl = oracle.KL_ESTIMATORS[settings.kl_estimator]
            rows = zip(old_T, self.ref_T, self.mask_T)
            kl_T = [kl(old, ref, old) if mask else 0.0 for old, ref, mask in rows]
            penalties_T = settings.kl_coef * np.array(kl_T)
        outcomes = oracle.Outcomes(
            np.array(self.rewards), np.array(GROUPS), lengths_N, self.mask_T, penalties_T
        )
        advantages_T = oracle.ADVANTAGES[advantage](outcomes)
        known_T = (self.logprobs_T, old_T, self.rollout_T, self.ref_T, advantages_T)
        measured_T = self.logprobs_T if from_engine else old_T
        return oracle.Known(*known_T, self.packed, measured_T)

    def gradient(self, known: oracle.Known, algorithm: oracle.Algorithm) -> np.ndarray:
        """Of the whole loss at every logit: finite differences, then through the softmax."""
        x, T = np.concatenate([self.logprobs_T, self.entropy_T]), len(self.logprobs_T)
        d = oracle.jacobian(lambda x: oracle.whole_loss(x[:T], x[T:], known, algorithm), x)[0]
        gradient = np.zeros_like(self.logits)
        for t, (at, label) in enumerate(self.places):
            gradient[at] = oracle.through_softmax(
                self.logits[at], label, d[t], d[T + t], TEMPERATURE
            )
        return gradient


def algorithm_of(settings: LossSettings) -> oracle.Algorithm:
    """The same choice in the oracle's words."""
    return oracle.Algorithm(
        policy_loss=settings.policy_loss,
        clips=settings.clips,
        correction=settings.correction,
        bounds=settings.correction_bounds,
        aggregation=settings.aggregation,
        kl=settings.kl_estimator if settings.kl_coef and settings.kl_in == "loss" else None,
        kl_coef=settings.kl_coef,
        entropy_coef=settings.entropy_coef,
        max_response_tokens=MAX_RESPONSE,
    )


def advantage_of(settings: LossSettings) -> str:
    """One that gives each token its own where the KL is in the reward."""
    return "reinforce++" if settings.kl_in == "reward" else "dr_grpo"


@pytest.fixture(scope="module")
def table(one_rank, models):
    """A trainer whose model is a Table; the batch is two micro-batches."""
    seed_megatron()
    settings = TrainSettings(train_dtype="fp32", microbatch_tokens=14, clip_grad=1e9)
    config = {**read_config(models["llama"]), "vocab_size": V}
    megatron_model.init_parallel(settings, seed=1)
    gpt, layout = megatron_model.build_gpt(settings, config)
    model = Table(gpt.config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_step, "load_model", lambda *_, **__: (model, layout, model))
        return train_step.build_trainer("", settings, config, steps=9, seed=1, **LIMITS)


def shipped(trainer, batch: Batch, settings: LossSettings) -> tuple[dict[str, float], np.ndarray]:
    """(sums, gradient at the table) by the shipped path."""
    chosen = RewardSettings(advantage=advantage_of(settings))
    reward.add_advantages(batch.samples, chosen, settings, max_response_tokens=MAX_RESPONSE)
    sums = train_step.backward(trainer, pack_batch(trainer, batch.samples), settings)
    return sums, trainer.gpt.weight.main_grad.double().numpy().reshape(V, V)


def assert_metrics(
    got: dict[str, float], batch: Batch, settings: LossSettings, known: oracle.Known
) -> None:
    kl = settings.kl_estimator if settings.kl_coef else None
    expected = oracle.whole_metrics(
        batch.logprobs_T, batch.entropy_T, known, algorithm_of(settings), kl
    )
    assert {name: got[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("scored", [True, False], ids=["old log-probs", "the only update"])
@pytest.mark.parametrize("correction", CORRECTIONS | FORKED_CORRECTIONS)
@pytest.mark.parametrize("policy", POLICIES | FORKED)
def test_value_gradient_and_metrics_are_the_oracles(table, policy, correction, scored):
    assert_the_oracles(table, algorithms(policy, correction, scored=scored), scored=scored)


@pytest.mark.parametrize("scored", [True, False], ids=["with old log-probs", "without"])
@pytest.mark.parametrize("policy", POLICIES | FORKED)
def test_ratios_start_from_the_engines_log_probs(table, policy, scored):
    """With --old-logprobs rollout; the trainer's old ones change nothing. No KL is left out."""
    chosen = algorithms(policy, "none")
    chosen = [replace(settings, old_logprobs="rollout") for settings in chosen]
    assert_the_oracles(table, chosen, scored=scored)


def assert_the_oracles(table, algorithms: list[LossSettings], *, scored: bool) -> None:
    """Assert value, gradient and metrics of each."""
    batch = Batch(table.gpt.weight, scored=scored)
    for settings in algorithms:
        sums, gradient = shipped(table, batch, settings)
        known, algorithm = batch.known(settings, advantage_of(settings)), algorithm_of(settings)
        expected = oracle.whole_loss(batch.logprobs_T, batch.entropy_T, known, algorithm)
        assert sums["loss"] / sums["units"] == pytest.approx(expected, rel=1e-5, abs=1e-6), settings
        wanted = batch.gradient(known, algorithm)
        assert np.abs(gradient - wanted).max() <= 1e-5 * np.abs(wanted).max(), settings
        means = {name: value / sums["tokens"] for name, value in sums.items()}
        assert_metrics(means | {"mismatch_max": sums["mismatch_max"]}, batch, settings, known)


def reinforce(
    logprobs_T, old_logprobs_T, advantages_T, sequences, *, clip_low, clip_high, dual_clip
):
    """-A logprobs: a loss without a ratio, as a fork may write one."""
    one_T = torch.ones_like(logprobs_T)
    return -advantages_T * logprobs_T, one_T, one_T < 0


def test_a_loss_trains_by_its_entry_alone(table, monkeypatch):
    """One entry of the table, one of the oracle: value, gradient and metrics follow."""

    def formula(logprobs_T, frozen_T, old_T, advantages_T, packed, **bounds):
        loss_T = [-advantage * new for advantage, new in zip(advantages_T, logprobs_T)]
        return np.array(loss_T), np.ones(len(loss_T)), np.zeros(len(loss_T), dtype=bool)

    monkeypatch.setitem(POLICY_LOSSES, "reinforce", PolicyLoss(reinforce, None, None))
    monkeypatch.setitem(oracle.POLICY_LOSSES, "reinforce", formula)
    monkeypatch.setitem(FORKED, "reinforce", dict(policy_loss="reinforce"))
    for correction in ("none", "icepop"):
        test_value_gradient_and_metrics_are_the_oracles(table, "reinforce", correction, True)


def test_the_batch_reaches_every_branch(table):
    """Else the tests could agree on the easy half, or finite differences step over a kink."""
    batch, counts = Batch(table.gpt.weight, scored=True), np.concatenate(MASKS) == 1
    for policy, correction in itertools.product(POLICIES, CORRECTIONS):
        settings = algorithms(policy, correction)[0]
        known, algorithm = batch.known(settings, "dr_grpo"), algorithm_of(settings)
        moving = np.abs(batch.gradient(known, algorithm)).sum(1) > 0
        assert moving.any()
        assert not moving[
            [at for (at, _), is_mine in zip(batch.places, counts) if not is_mine]
        ].any()
        arguments = (
            batch.logprobs_T,
            batch.logprobs_T,
            batch.old_T,
            known.advantages_T,
            batch.packed,
        )
        _, ratio_T, clipped_T = oracle.POLICY_LOSSES[algorithm.policy_loss](
            *arguments, **algorithm.clips
        )
        weight_T, cut_T = oracle.CORRECTIONS[correction](
            batch.old_T - batch.rollout_T, batch.packed, **algorithm.bounds
        )
        inside_T = ~clipped_T & counts
        assert inside_T.any()
        places_T, kinks = kinks_of(batch, ratio_T, algorithm)
        assert all((np.abs(places_T[counts] - kink) > 1e-3).all() for kink in kinks)
        if policy != "sapo":  # it has no clip
            assert (clipped_T & counts & (places_T < kinks[0])).any()
            assert (clipped_T & counts & (places_T > kinks[1])).any()
        assert correction == "none" or (cut_T & counts).any() and (~cut_T & counts).any()
        log_weight_T = batch.old_T - batch.rollout_T
        if correction.startswith("sequence_"):  # their mean has the sign of their sum
            log_weight_T = np.array(
                [
                    oracle.mean_log_ratio(log_weight_T, batch.packed, n)
                    for n in batch.packed.sample_T
                ]
            )
        cut_low_T = cut_T & (log_weight_T < 0)
        low = algorithm.bounds["low"] is not None
        assert (cut_low_T & counts).any() == low, "below the bound, for what has one"
        assert correction == "none" or (cut_T & ~cut_low_T & counts).any()
        if dual := algorithm.clips["dual_clip"]:
            assert ((ratio_T > dual) & (known.advantages_T < 0))[counts].any()


def kinks_of(batch: Batch, ratio_T, algorithm: oracle.Algorithm) -> tuple[np.ndarray, list]:
    """Return (a number of each token, where on its scale the loss has no derivative)."""
    low, high, dual = (algorithm.clips[name] for name in ("clip_low", "clip_high", "dual_clip"))
    if algorithm.policy_loss == "sapo":
        return ratio_T, []
    if algorithm.policy_loss == "gmpo":
        return batch.logprobs_T - batch.old_T, [-low, high]
    return ratio_T, [1 - low, 1 + high, dual]


@pytest.mark.parametrize("far", [100, 1e4])
@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("policy", POLICIES)
def test_log_probs_that_are_far_apart_spoil_nothing(table, policy, correction, far):
    """In fp32 exp(89) is infinite. 0 times infinity is NaN: at advantage 0, or inside a clip."""
    batch = Batch(table.gpt.weight, scored=True, far=far)
    for settings in algorithms(policy, correction):
        if settings.entropy_coef or settings.aggregation != "sequence":
            continue  # what is multiplied with what does not depend on them
        sums, gradient = shipped(table, batch, settings)
        known, algorithm = batch.known(settings, advantage_of(settings)), algorithm_of(settings)
        expected = oracle.whole_loss(batch.logprobs_T, batch.entropy_T, known, algorithm)
        assert sums["loss"] / sums["units"] == pytest.approx(expected, rel=1e-4, abs=1e-6), settings
        wanted = batch.gradient(known, algorithm)
        rounding = 1e-9 * abs(
            expected
        )  # of finite differences: a loss of e^20 has few digits left for a slope of 1
        assert np.abs(gradient - wanted).max() <= 1e-4 * np.abs(wanted).max() + rounding, settings
        assert all(np.isfinite(value) for value in sums.values()), settings


def test_a_real_model_descends_the_same_loss(table, models):
    """train_step on a tiny Llama: metrics, and the gradient at its logits. At lr 0 none moves."""
    settings = TrainSettings(train_dtype="fp32", lr=0.0)
    trainer = train_step.build_trainer(
        str(models["llama"]), settings, read_config(models["llama"]), steps=99, seed=1, **LIMITS
    )
    logits, gradients = [], []

    def keep(trainer, batch, logits_TV):
        by_id = torch.zeros(int(batch.tokens_T.max()) + 1, logits_TV.shape[1])
        logits.append(by_id.index_copy(0, batch.tokens_T, logits_TV.detach()))
        if logits_TV.requires_grad:
            logits_TV.register_hook(
                lambda d_TV: gradients.append(by_id.index_copy(0, batch.tokens_T, d_TV))
            )
        return logprobs_of(trainer, batch, logits_TV)

    logprobs_of = train_step.logprobs_of
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_step, "logprobs_of", keep)
        unscored = Batch(torch.zeros(V, V), scored=False).samples
        train_step.compute_logprobs(trainer, pack_batch(trainer, unscored).microbatches)
        for policy, correction in zip([*POLICIES, "ppo"], CORRECTIONS):
            for chosen in algorithms(policy, correction)[::7]:
                batch = Batch(logits[0], scored=True)
                rewards = RewardSettings(advantage=advantage_of(chosen))
                reward.add_advantages(
                    batch.samples, rewards, chosen, max_response_tokens=MAX_RESPONSE
                )
                packed = train_step.pack(trainer, batch.samples)
                metrics = train_step.update_policy(trainer, packed, chosen)
                known, algorithm = batch.known(chosen, advantage_of(chosen)), algorithm_of(chosen)
                expected = oracle.whole_loss(batch.logprobs_T, batch.entropy_T, known, algorithm)
                assert metrics["loss"] == pytest.approx(expected, rel=1e-4, abs=1e-6), chosen
                assert_metrics(metrics, batch, chosen, known)
                units = (
                    batch.mask_T.sum() if chosen.aggregation == "token" else sum(map(any, MASKS))
                )
                wanted, got = (
                    batch.gradient(known, algorithm),
                    gradients[-1].double().numpy() / units,
                )
                assert np.abs(got - wanted).max() <= 1e-4 * np.abs(wanted).max(), chosen
