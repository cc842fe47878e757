"""A new policy loss is one function and one line in losses.py, and its formula in the oracle.

Why: whoever tries an idea should not have to find every place that knows the names of losses. The
test copies the files and inserts the lines. Flag, bounds, refusals and the oracle's tests must
follow. The refusals come from harness/loss_checks.py, unchanged on top of the copy of losses.py.
test_whole_loss.py shows that such a loss trains, test_splits.py that it runs on every layout. Not
covered: forks of an advantage, a correction or a KL estimator.
"""

import importlib.util
import os
import shutil
import subprocess
import sys

import pytest
import tyro
from conftest import ROOT

from common.errors import BadInput

FUNCTION = '''
def tanh(logprobs_T, old_logprobs_T, advantages_T, sequences, *, clip_low, clip_high, dual_clip):
    """-tanh(log r) A, which has no lower bound."""
    log_ratio_T = logprobs_T - old_logprobs_T
    clipped_T = log_ratio_T > clip_high
    loss_T = -log_ratio_T.clamp(max=clip_high).tanh() * advantages_T
    return loss_T, ratio(log_ratio_T), clipped_T


'''
ENTRY = (
    '    "tanh": PolicyLoss(tanh, None, 0.28, only={"dual_clip": (0.0,), "kl_in": ("loss",)}),\n'
)
FORMULA = """
def tanh(logprobs_T, frozen_T, old_T, advantages_T, packed, *, clip_low, clip_high, dual_clip):
    log_ratios = [new - old for new, old in zip(logprobs_T, old_T)]
    loss_T = [-np.tanh(min(x, clip_high)) * a for x, a in zip(log_ratios, advantages_T)]
    ratio_T = np.array([ratio(x) for x in log_ratios])
    return np.array(loss_T), ratio_T, np.array(log_ratios) > clip_high


POLICY_LOSSES["tanh"] = tanh
"""


def write_forked_losses(folder) -> None:
    text = (ROOT / "losses.py").read_text(encoding="utf-8")
    table = "POLICY_LOSSES = {\n"
    before, rest = text.split(table)
    decorated = "@dataclass(frozen=True)\nclass PolicyLoss"
    head, tail = before.rsplit(decorated, 1)
    text = f"{head}{FUNCTION.lstrip()}{decorated}{tail}{table}{ENTRY}{rest}"
    (folder / "losses.py").write_text(text, encoding="utf-8")


def load(name: str, path):
    """Execute a Python file as a new module and return it."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def forked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fork")
    write_forked_losses(folder)
    yield load("forked_losses", folder / "losses.py")
    del sys.modules["forked_losses"]


@pytest.fixture(scope="module")
def check_loss_settings(forked):
    """The shipped check, from a second copy of its file that imports the fork."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "losses", forked)
        module = load("checks_of_fork", ROOT / "harness" / "loss_checks.py")
    assert module.POLICY_LOSSES is forked.POLICY_LOSSES
    yield module.check_loss_settings
    del sys.modules["checks_of_fork"]


def parse(forked, *flags: str):
    return tyro.cli(forked.LossSettings, args=["--policy-loss", "tanh", *flags])


def test_its_name_is_a_flag(forked):
    assert parse(forked).policy_loss == "tanh"


def test_its_bounds_hold_unless_they_are_set(forked):
    own = dict(clip_low=None, clip_high=0.28, dual_clip=0.0)
    assert parse(forked).clips == own
    assert parse(forked, "--clip-high", "0.1").clips == own | dict(clip_high=0.1)


def test_its_bounds_are_in_the_help(forked, capsys):
    with pytest.raises(SystemExit):
        parse(forked, "--help")
    assert "0.28 for tanh" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("flags, message", [
    (["--dual-clip", "3"],
     "--policy-loss tanh and --dual-clip 3.0 do not fit: use --dual-clip 0.0"),
    (["--kl-coef", "0.1", "--kl-in", "reward"], "--kl-in reward do not fit: use --kl-in loss"),
    (["--clip-low", "0.2"], "--clip-low 0.2 has no effect: --policy-loss tanh has no such bound"),
])  # fmt: skip
def test_what_it_does_not_take_is_refused(forked, check_loss_settings, flags, message):
    with pytest.raises(BadInput, match=message):
        check_loss_settings(parse(forked, *flags))


def test_what_it_takes_is_not_refused(forked, check_loss_settings):
    check_loss_settings(parse(forked, "--clip-high", "0.5", "--kl-coef", "0.1"))


def oracle_tests(folder) -> str:
    """Run the oracle's tests of the fork in a folder of its own. Return what pytest prints."""
    write_forked_losses(folder)
    shutil.copy(ROOT / "advantages.py", folder)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "oracle"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
    chosen = ["-k", "tanh or test_every_algorithm_has_an_oracle", "-rA"]
    done = subprocess.run(
        [*command, *chosen], cwd=folder, env=environment, capture_output=True, text=True
    )
    return done.stdout


def test_the_oracles_tests_take_it_from_its_entry(tmp_path):
    shutil.copytree(ROOT / "tests" / "oracle", tmp_path / "oracle")
    with open(tmp_path / "oracle" / "oracle.py", "a", encoding="utf-8") as file:
        file.write(FORMULA)
    printed = oracle_tests(tmp_path)
    passed = [line for line in printed.splitlines() if line.startswith("PASSED") and "tanh" in line]
    tests = {line.split("::")[1].split("[")[0] for line in passed}
    assert "failed" not in printed and "error" not in printed, printed[-3000:]
    assert tests == {
        "test_policy_loss",
        "test_the_batches_reach_every_branch",
        "test_a_whole_loss",
        "test_masked_tokens_have_exactly_no_gradient",
    }


def test_without_an_oracle_it_is_refused(tmp_path):
    shutil.copytree(ROOT / "tests" / "oracle", tmp_path / "oracle")
    printed = oracle_tests(tmp_path)
    refusal = "test_every_algorithm_has_an_oracle[policy losses]"
    assert f"FAILED oracle/test_algorithms.py::{refusal}" in printed
