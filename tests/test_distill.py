"""examples/distill.py: advantages and the whole gradient against transformers, what is refused,
and runs that learn.

The claim to prove is that a step descends KL(student || teacher) at the visited prefixes. So the
trainer's gradient of every weight is compared with autograd's of that very KL, summed over the
whole vocabulary in FP64 by plain transformers. An advantage with a wrong sign, a token off, at
another temperature or with a term of later tokens would fail. The teacher is of another family or
size throughout; at other layouts the worker teacher.py does the same on two and four ranks. Not
covered: GPUs, long answers.
"""

import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, metrics_of, start_main, torchrun, write_model
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(ROOT / "examples"))
import distill
import distill_async
from distill_settings import DistillSettings, Settings, check_distill_flags, for_the_loop

import reward
import train_step
from advantages import ADVANTAGES, Scores, grpo
from backends.huggingface.config import read_config
from backends.huggingface.names import parameters_of, rule_of, split_stacked
from common import distributed
from common.errors import BadInput
from common.settings import TrainSettings
from data.sample import Sample
from losses import LossSettings

TEMPERATURE, V = 0.7, 97
PROMPTS = [[5, 6], [9, 3, 7, 11]]
RESPONSES, MASKS = [[7, 8, 30], [12], [], [4, 4]], [[1, 0, 1], [1], [], [1, 1]]
LARGER = dict(hidden_size=256, num_hidden_layers=3, num_attention_heads=8, vocab_size=128)


@pytest.fixture(autouse=True)
def table_as_it_was():
    """The example adds its advantage to the table, in a process that ends with the run."""
    known = dict(ADVANTAGES)
    yield
    ADVANTAGES.clear()
    ADVANTAGES.update(known)


# --- by hand ------------------------------------------------------------------------------------


def scores(**changes) -> Scores:
    """Two answers to one prompt, of two tokens and one; the student is sure where k1 is above 0."""
    fields = dict(rewards_N=np.array([1.0, 0.0]), group_N=np.array([4, 4]))
    fields |= dict(lengths_N=np.array([2, 1]), mask_T=np.array([1.0, 0.0, 1.0]))
    return Scores(**fields, penalties_T=np.array([0.5, 9.0, -2.0]), **changes)


def test_the_advantage_is_what_the_teacher_thinks_more_of_a_token():
    assert distill.reverse_kl(scores()).tolist() == [-0.5, 0, 2]


def test_rewards_are_added_without_the_teacher_in_them():
    """With rewards 1 and 0, GRPO gives the two answers 0.707 and -0.707, whatever the KL is."""
    half = 1 / math.sqrt(2)
    found = distill.with_rewards(grpo, 3.0)(scores())
    assert found == pytest.approx([-0.5 + 3 * half, 0, 2 - 3 * half], abs=1e-5)


# --- against transformers -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def teachers(models, tmp_path_factory) -> dict[str, str]:
    """Folders: other families, and a larger model with rows that no token of the student has."""
    larger = write_model(tmp_path_factory.mktemp("larger"), "llama", **LARGER)
    return {"a mixture": models["glm4_moe"], "tied": models["qwen2"], "larger": larger}


def loop_settings() -> tuple[LossSettings, reward.RewardSettings]:
    """What distill.py tells a loop; without an upper bound of the importance weight."""
    ADVANTAGES[distill.NAME] = distill.reverse_kl
    given = Settings(loss=LossSettings(correction_high=1e9), distill=DistillSettings("x"))
    told = for_the_loop(given, distill.NAME)
    return told.loss, told.reward


def student_of(models, teacher: str, *, family="qwen3", **settings) -> train_step.Trainer:
    folder = str(models[family])
    more = dict(temperature=TEMPERATURE, max_response_tokens=8, with_reference=bool(teacher))
    settings = dict(train_dtype="fp32", clip_grad=1e9) | settings | dict(reference=str(teacher))
    settings = TrainSettings(**settings)
    return train_step.build_trainer(folder, settings, read_config(folder), steps=9, seed=1, **more)


def gradient_of(trainer, samples: list[Sample]) -> dict[str, torch.Tensor]:
    """Return the gradient that a loop's step computes, by Hugging Face name."""
    loss, rewards = loop_settings()
    (batch,) = train_step.pack(trainer, samples)
    train_step.add_logprobs(trainer, [batch], loss)
    reward.add_advantages(samples, rewards, loss, 8)
    train_step.backward(trainer, batch, loss)
    found, config = {}, trainer.config
    groups = config["num_key_value_heads"]
    for name, parameter in parameters_of(trainer.gpt):
        (names,) = trainer.layout.names(rule_of(name), config)
        gradient = parameter.main_grad.view(parameter.shape)
        split = dict(head_dim=config["head_dim"], groups=groups)
        parts = split_stacked(gradient, len(names), **split)
        found |= {name: part.double().clone() for name, part in zip(names, parts)}
    return found


def assert_equal(found: dict[str, torch.Tensor], model) -> None:
    wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert wanted.keys() <= found.keys()
    largest = max(gradient.abs().max() for gradient in wanted.values())
    for name, gradient in found.items():
        expected = wanted.get(name, torch.zeros(()))
        assert (gradient - expected).abs().max() < 1e-5 * largest, name


def plain(folder) -> torch.nn.Module:
    """Return transformers' model in FP64. Its grouped products of experts know no FP64."""
    how = dict(dtype=torch.float64, experts_implementation="eager")
    return AutoModelForCausalLM.from_pretrained(folder, **how).eval()


def logprobs_LV(model, ids: list[int]) -> torch.Tensor:
    """Return log-probs behind each token, over the student's vocabulary, at the temperature."""
    return (model(torch.tensor([ids])).logits[0, :, :V] / TEMPERATURE).log_softmax(-1)


def ragged(**changes) -> list[Sample]:
    """Four answers, one of them empty, with a tool's token in the first."""
    return [
        Sample(
            PROMPTS[i % 2],
            response_ids=ids,
            loss_mask=mask,
            rollout_logprobs=[-1.0] * len(ids),
            reward=0.0,
            group=i % 2,
            index=i // 2,
            **changes,
        )
        for i, (ids, mask) in enumerate(zip(RESPONSES, MASKS))
    ]


@pytest.mark.parametrize("name", ["a mixture", "tied", "larger"])
def test_the_expected_step_is_the_gradient_of_the_reverse_kl(
    fresh_megatron, models, teachers, name
):
    """Every token of the vocabulary is an answer of one token, sampled uniformly.

    The importance weight of such a token is V p_student, so the mean over them is the expectation
    under the student. No answer is left out: nothing is estimated.
    """
    samples = [
        Sample(
            prompt,
            response_ids=[token],
            loss_mask=[1],
            rollout_logprobs=[-math.log(V)],
            reward=0.0,
            group=group,
            index=token,
        )
        for group, prompt in enumerate(PROMPTS)
        for token in range(V)
    ]
    found = gradient_of(student_of(models, teachers[name]), samples)
    student, teacher = plain(models["qwen3"]), plain(teachers[name])
    kls = []
    for group, prompt in enumerate(PROMPTS):
        mine_V = logprobs_LV(student, prompt)[-1]
        with torch.no_grad():
            theirs_V = logprobs_LV(teacher, prompt)[-1]
        kls.append((mine_V.exp() * (mine_V - theirs_V)).sum())
        # The mean advantage of a position is the negative of its KL.
        advantages_V = np.concatenate([s.advantages for s in samples if s.group == group])
        mean = (mine_V.exp().detach().numpy() * advantages_V).sum()
        assert -mean == pytest.approx(float(kls[-1]), rel=1e-5)
        assert kls[-1] > 0.1
    torch.stack(kls).mean().backward()
    assert_equal(found, student)


@pytest.mark.parametrize("name", ["a mixture", "larger"])
def test_advantages_and_gradient_of_sampled_answers(fresh_megatron, models, teachers, name):
    """Token by token, on a ragged batch. The importance weight is p_student / e^-1."""
    samples = ragged()
    found = gradient_of(student_of(models, teachers[name]), samples)
    student, teacher, terms = plain(models["qwen3"]), plain(teachers[name]), []
    for sample in samples:
        ids, start = sample.prompt_ids + sample.response_ids, len(sample.prompt_ids) - 1
        mine_LV = logprobs_LV(student, ids)
        with torch.no_grad():
            theirs_LV = logprobs_LV(teacher, ids)
        for at, (token, counts) in enumerate(zip(sample.response_ids, sample.loss_mask)):
            mine, theirs = (x_LV[start + at, token] for x_LV in (mine_LV, theirs_LV))
            advantage = float(theirs - mine) * counts
            assert sample.advantages[at] == pytest.approx(advantage, abs=1e-4)
            terms.append(-advantage * float((mine + 1).exp()) * mine)
    (torch.stack(terms).sum() / sum(map(sum, MASKS))).backward()
    assert_equal(found, student)


def test_a_student_that_is_its_teacher_has_nothing_to_learn(fresh_megatron, models):
    samples = ragged()
    found = gradient_of(student_of(models, models["qwen3"]), samples)
    assert max(np.abs(sample.advantages).max(initial=0) for sample in samples) < 1e-5
    assert max(gradient.abs().max() for gradient in found.values()) < 1e-5


def test_a_second_model_disturbs_nothing(fresh_megatron, models):
    """With the same advantages the student's step is the same to the bit, teacher or none.

    Student and teacher are mixtures of experts of two families. The student's auxiliary loss and
    its replay of the engine's experts are global state of Megatron's; the teacher may touch
    neither.
    """
    settings = dict(family="qwen3_moe", routing_replay="compare", lr=1e-3)
    balance = ("moe_router_load_balancing_type=aux_loss", "moe_aux_loss_coeff=0.1")
    found = []
    for teacher in ("", models["glm4_moe"]):
        trainer = student_of(models, teacher, megatron=balance, **settings)
        samples = ragged()
        for sample in samples:
            layers, experts = 2, 2
            known = len(sample.prompt_ids) + len(sample.response_ids) - 1
            numbers = np.arange(known * layers * experts, dtype=np.uint8) % 4
            sample.routed_experts = numbers.tobytes()
        batches = train_step.pack(trainer, samples)
        if teacher:
            train_step.add_logprobs(trainer, batches, loop_settings()[0])
        for sample in samples:
            sample.advantages, sample.old_logprobs = [1.0] * len(sample.response_ids), []
        metrics = train_step.update_policy(trainer, batches, LossSettings())
        found.append((metrics, [p.detach().clone() for p in trainer.gpt.parameters()]))
    (metrics, alone), (same_metrics, beside) = found
    assert metrics == same_metrics and metrics["moe_aux_loss"] > 0 and "route_mismatch" in metrics
    assert all(map(torch.equal, alone, beside))


CASES = {  # ranks: {name: (splits tp, ep, pp, cp; student; teacher)}
    2: {
        "tp 2": ((2, 1, 1, 1), "qwen3", "larger"),
        "tp 2 ep 2, dense teacher": ((2, 2, 1, 1), "qwen3_moe", "larger"),
        "ep 2": ((1, 2, 1, 1), "qwen3_moe", "a mixture"),
        "pp 2": ((1, 1, 2, 1), "qwen3", "larger"),
        "pp 2, a mixture": ((1, 1, 2, 1), "qwen3", "a mixture"),
        "cp 2": ((1, 1, 1, 2), "qwen3", "a mixture"),
    },
    4: {"tp 2 pp 2": ((2, 1, 2, 1), "glm4_moe", "larger")},
}


@pytest.mark.complete
@pytest.mark.parametrize("ranks", CASES)
def test_the_teacher_says_the_same_at_every_layout(models, teachers, tmp_path, ranks):
    """In pipeline parallelism the teacher's hidden size and layers per stage are its own."""
    cases = {
        name: dict(splits=splits, student=str(models[student]), teacher=str(teachers[teacher]))
        for name, (splits, student, teacher) in CASES[ranks].items()
    }
    (tmp_path / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    torchrun("tests/workers/teacher.py", tmp_path, tmp_path / "cases.json", ranks=ranks)
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    for name, case in cases.items():
        for folder, field in (("student", "old_logprobs"), ("teacher", "ref_logprobs")):
            model = plain(case[folder])
            for sample in report[name]:
                ids, start = (
                    sample["prompt_ids"] + sample["response_ids"],
                    len(sample["prompt_ids"]),
                )
                with torch.no_grad():
                    expected_LV = logprobs_LV(model, ids)
                for at, token in enumerate(sample["response_ids"]):
                    expected = float(expected_LV[start + at - 1, token])
                    assert sample[field][at] == pytest.approx(expected, abs=1e-4), (name, field)


# --- what is refused ----------------------------------------------------------------------------


class Started(Exception):
    """Raised where the run would have begun."""


@pytest.fixture
def start(monkeypatch, tmp_path):
    """Return a function that starts a script with flags, up to its first process group."""

    def started(*args, **kwargs):
        raise Started

    def call(script, *flags, ranks=1):
        for name, value in dict(RANK=0, WORLD_SIZE=ranks, LOCAL_RANK=0).items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, flags)])
        start_main(script, check_distill_flags)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(distributed, "init_distributed", started)
    return call


GLM = ROOT / "toy" / "glm"


@pytest.mark.parametrize("flags, message", [
    ([], "--teacher is not given: name a Hugging Face folder"),
    (["--teacher", ""], "--teacher is not given"),
    (["--teacher", "no-folder"], "--teacher no-folder has no config.json"),
    (["--teacher", "ä\n"], "--teacher ä\n has no config.json"),
    (["--teacher", ROOT / "README.md"], "--teacher .*README.md has no config.json"),
    (["--teacher", GLM, "--eval-only"], "leave --teacher and --offload-teacher out"),
    (["--teacher", GLM, "--debug-rollout-only"], "leave --teacher and --offload-teacher out"),
    (["--teacher", GLM, "--kl-coef", "0.1"], "--kl-coef 0.1: the teacher takes the place of"),
    (["--teacher", GLM, "--old-logprobs", "rollout", "--correction", "none"], "leave it out"),
    (["--teacher", GLM, "--reward-weight", "-1"], "--reward-weight -1.0 must be finite"),
    (["--teacher", GLM, "--reward-weight", "nan"], "--reward-weight nan must be finite"),
    (["--teacher", GLM, "--reward-weight", "inf"], "--reward-weight inf must be finite"),
    (["--teacher", GLM, "--advantage", "rloo"], "no effect without --reward-weight"),
    (["--teacher", GLM, "--overlong-buffer", "2"], "no effect without --reward-weight"),
    (["--teacher", GLM, "--dynamic-sampling", "1"], "the teacher teaches on these too"),
    (["--teacher", GLM, "--unlabelled"], "evaluates nothing, and toy has held-out prompts"),
    (["--teacher", GLM, "--unlabelled", "--prompts", "a.jsonl", "--eval-prompts", "b.jsonl"],
     "evaluates nothing, and b.jsonl has held-out prompts"),
    (["--teacher", GLM, "--unlabelled", "--reward-weight", "1"], "needs rewards, and --unlabelled"),
    (["--teacher", GLM, "--unlabelled", "--reward", "math"], "no effect with --unlabelled"),
    (["--teacher", ROOT / "docs" / "configs" / "Qwen3-4B"],
     r"Qwen3-4B has no \*.safetensors file"),
])  # fmt: skip
def test_bad_flags_stop_before_anything_starts(start, flags, message):
    with pytest.raises(BadInput, match=message):
        start(distill, *flags)


@pytest.mark.parametrize("script, ranks", [(distill, 1), (distill_async, 2)])
@pytest.mark.parametrize("flags", [
    ["--teacher", GLM], ["--teacher", GLM, "--reward-weight", "0.5", "--advantage", "rloo"],
    ["--teacher", GLM, "--offload-teacher", "--minibatches", "2"], ["--eval-only"],
])  # fmt: skip
def test_flags_that_hold(start, script, ranks, flags):
    with pytest.raises(Started):
        start(script, *flags, ranks=ranks)


def test_prompts_without_labels_are_taken(start, tmp_path):
    row = {"prompt": "123+456=", "label": None}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    flags = ["--teacher", GLM, "--prompts", "a.jsonl"]
    with pytest.raises(BadInput, match="is null"):
        start(distill, *flags)
    with pytest.raises(Started):
        start(distill, *flags, "--unlabelled")


# --- runs ---------------------------------------------------------------------------------------

SHORT = ["--eval-samples", "16", "--prompts-per-step", "4", "--samples-per-prompt", "4"]
SHORT += ["--name", "a", "--export", "--teacher"]


@pytest.mark.complete
def test_a_run_goes_on_where_it_was(tmp_path):
    """Two ranks, tensor parallel, a mixture as teacher; rewards are added.

    The second half of a run that is resumed is that of an undisturbed run. The teacher is in no
    checkpoint, and another teacher is refused.
    """
    more = ["--steps", "4", "--eval-every", "4", "--tp", "2", "--reward-weight", "0.5"]
    flags, script = [*SHORT, GLM, *more], ROOT / "examples" / "distill.py"
    torchrun(script, *flags, "--save-every", "2", ranks=2, cwd=tmp_path)
    rows = metrics_of(tmp_path / "runs" / "a")
    shutil.rmtree(tmp_path / "runs" / "a" / "checkpoints" / "step-000004")
    torchrun(script, *flags, "--resume", ranks=2, cwd=tmp_path)
    again = metrics_of(tmp_path / "runs" / "a")
    assert [row["step"] for row in again] == [0, 1, 2, 3, 4]
    for row, same in zip(rows[1:], again[1:]):
        assert row["kl"] == same["kl"] != 0 and row["grad_norm"] == same["grad_norm"] > 0
    settings = json.loads((tmp_path / "runs" / "a" / "settings.json").read_text(encoding="utf-8"))
    assert settings["reward"]["advantage"] == "reverse_kl + 0.5 grpo"
    other = [*SHORT, ROOT / "toy", "--steps", "6", *more[2:], "--resume"]
    done = torchrun(script, *other, ranks=2, cwd=tmp_path, check=False)
    assert done.returncode != 0 and "what --teacher names is not what it was" in done.stderr


@pytest.mark.complete
def test_a_run_of_the_asynchronous_loop(tmp_path):
    flags = [*SHORT, GLM, "--steps", "3", "--eval-every", "3"]
    torchrun(ROOT / "examples" / "distill_async.py", *flags, ranks=2, cwd=tmp_path)
    rows = metrics_of(tmp_path / "runs" / "a")
    for row in [row for row in rows if "loss" in row]:  # the others are evaluations
        assert all(math.isfinite(row[name]) for name in ("kl", "loss", "grad_norm"))
        assert row["kl"] != 0 and row["grad_norm"] > 0


@pytest.mark.complete
def test_a_student_climbs_towards_its_teacher(tmp_path):
    """A teacher is trained for 30 steps; the student then learns from it alone for 20."""
    flags = ["--eval-samples", "256", "--eval-every", "100"]
    teacher = ["--steps", "30", "--name", "teacher"]
    torchrun(ROOT / "loop_sync.py", *teacher, *flags, ranks=1, cwd=tmp_path)
    student = ["--steps", "20", "--name", "student", "--lr", "4e-4", "--export"]
    student += ["--teacher", "runs/teacher/model-bf16"]
    torchrun(ROOT / "examples" / "distill.py", *student, *flags, ranks=1, cwd=tmp_path)
    goal = metrics_of(tmp_path / "runs" / "teacher")[-1]["held_out"]
    start, *steps = metrics_of(tmp_path / "runs" / "student")
    assert start["held_out"] < 0.45 and goal > 0.75
    assert steps[-1]["held_out"] > 0.65
    assert steps[-1]["kl"] < steps[0]["kl"] / 2
