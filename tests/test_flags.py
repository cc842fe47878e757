"""Flags: what the program says of a mistake, and how soon; --help; one rank without torchrun.

Why: a mistake should cost a second, not the start of an engine. A refused flag must end the program
before sglang, transformers or megatron are imported; a clock would measure how busy the machine is.
Rules of single flags are tested in the files of their stages. Not covered: what tyro accepts.
"""

import functools
import os
import re
import subprocess
import sys
from typing import get_args, get_type_hints

import loop_async
import loop_sync
import pytest
from conftest import ROOT, metrics_of, torchrun

sys.path.insert(0, str(ROOT / "examples"))
import tool_use

import advantages
from common.errors import BadInput
from common.settings import RunSettings
from harness import exits, flags
from harness.checks import check_flags
import losses
from losses import LossSettings
import reward
from reward import RewardSettings

HEAVY = r"\|\s+(sglang|transformers|megatron)\b"  # in the output of -X importtime
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
LOOPS = ["loop_sync.py", "loop_async.py", "examples/ppo_critic.py", "examples/tool_use.py"]


def script(name: str, *words: str, options=(), cwd=ROOT, timeout=300, **environment):
    """Run a script of the repository without torchrun, as a user does."""
    kept = {key: value for key, value in os.environ.items() if key not in TORCHRUN}
    command = [sys.executable, *options, str(ROOT / name), *words]
    everything = dict(cwd=cwd, env=kept | environment, capture_output=True, text=True)
    return subprocess.run(command, timeout=timeout, **everything)


# --- when -------------------------------------------------------------------------------------


MISTAKES = {  # of one start of each script
    "loop_sync.py": "--stps 3 --steps 3.5 --prompts absent.jsonl --kl-coef 1 --reference no --tp 2",
    "loop_async.py": "--max-staleness -1",
    "examples/ppo_critic.py": "--lam 2",
    "examples/tool_use.py": "--warm-calls 2",
    "tools/export.py": "--checkpoint nothing",
}


@pytest.fixture(scope="module")
def start_with_mistakes(tmp_path_factory):
    """Give a function that starts a script once. It returns the ended process and its folder."""

    @functools.cache
    def start(name: str):
        folder = tmp_path_factory.mktemp("mistakes")
        words = MISTAKES[name].split()
        return script(name, *words, options=["-X", "importtime"], cwd=folder), folder

    return start


@pytest.mark.parametrize("name, message", [
    ("loop_sync.py", "--stps is no flag of this program; the nearest is --steps"),
    ("loop_sync.py", "--steps 3.5 must be a whole number"),
    ("loop_sync.py", "absent.jsonl does not exist"),
    ("loop_sync.py", "--reference no has no config.json"),
    ("loop_sync.py", "--tp 2 does not divide the 1 ranks: use a --tp that"),
    ("loop_async.py", "--max-staleness -1 must not be negative"),
    ("loop_async.py", "a rank that trains and one that generates: use `torchrun --nproc-per-"),
    ("examples/ppo_critic.py", "--lam 2.0 must lie in [0, 1]"),
    ("examples/tool_use.py", "--warm-calls 2.0 must lie between 0 and 1"),
    ("tools/export.py", "--checkpoint 'nothing' is not a folder"),
])  # fmt: skip
def test_a_mistake_is_said_before_the_heavy_imports(start_with_mistakes, name, message):
    done, folder = start_with_mistakes(name)
    assert done.returncode == 2
    assert message in done.stderr
    assert re.search(HEAVY, done.stderr) is None
    assert list(folder.iterdir()) == []


@pytest.mark.complete
@pytest.mark.parametrize("name", [*LOOPS, "tools/export.py"])
def test_help_needs_no_torchrun_and_no_heavy_import(name):
    done = script(name, "--help", options=["-X", "importtime"])
    assert done.returncode == 0
    assert re.search(HEAVY, done.stderr) is None


def test_help_is_given_where_no_run_could_start():
    done = script("loop_sync.py", "--stps", "3", "-h", WORLD_SIZE="8")
    assert done.returncode == 0
    assert done.stderr == ""
    assert "Most used" in done.stdout


def test_packages_that_are_missing_are_named_after_the_flags_are_read(tmp_path):
    """An import finder hides sglang. Its absence must not hide a mistake in the flags."""
    hide = "import sys\nclass F:\n    def find_spec(self, name, *_):\n"
    hide += "        if name.partition('.')[0] == 'sglang': raise ModuleNotFoundError(name)\n"
    hide += "sys.meta_path.insert(0, F())\n"
    hide += "import importlib.util as u; real = u.find_spec\n"
    hide += "u.find_spec = lambda name, *a: None if name == 'sglang' else real(name, *a)\n"
    (tmp_path / "sitecustomize.py").write_text(hide, encoding="utf-8")
    path = dict(PYTHONPATH=str(tmp_path))
    good = script("loop_sync.py", "--steps", "1", **path)
    assert good.returncode == 2
    assert "is not installed" in good.stderr
    assert "pip install -r requirements" in good.stderr
    assert "--steps 0 must be" in script("loop_sync.py", "--steps", "0", **path).stderr


# --- what -------------------------------------------------------------------------------------


def refused(monkeypatch, *words: str, loop=loop_sync, ranks=1) -> tuple[str, ...]:
    monkeypatch.setattr(sys, "argv", ["loop.py", *words])
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    with pytest.raises(BadInput) as error:
        flags.parse_settings(loop.Settings, check_flags)
    return error.value.problems


@pytest.mark.parametrize("words, message", [
    (["--stps", "3"], "--stps is no flag of this program; the nearest is --steps"),
    (["--stps=3"], "--stps is no flag of this program; the nearest is --steps"),
    (["-steps", "3"], "-steps is no flag of this program; the nearest is --steps"),
    (["--prompt_per_step", "3"], "the nearest is --prompts-per-step"),
    (["--no-chat-x"], "the nearest is --no-chat"),
    (["stray"], "stray belongs to no flag: write --flag value"),
    (["--steps", "x"], "--steps x must be a whole number"),
    (["--steps=x"], "--steps x must be a whole number"),
    (["--steps", ""], "--steps '' must be a whole number"),
    (["--lr", "small"], "--lr small must be a number"),
    (["--clip-low", "x"], "--clip-low x must be a number, or None"),
    (["--profile", "3", "x"], "--profile 3 x must each be a whole number"),
    (["--reward", "maths"], "--reward maths must be one of exact, math, reasoning_gym"),
    (["--lr"], "--lr needs a value, a number"),
    (["--name", "-x"], "--name needs a value, a text; one that begins with - is written --name="),
    (["--name", "a", "b"], "--name a b: it takes one value, and here are 2; quote a text that"),
    (["--chat", "yes"], "--chat yes: a switch takes no value: write --chat or --no-chat"),
    (["--no-chat=3"], "--no-chat 3: a switch takes no value"),
    (["--resume", "yes"], "--resume yes: a switch takes no value but auto: write --resume or "
     "--no-resume or --resume auto"),
    (["--resume=True"], "--resume True: a switch takes no value but auto"),
    (["--no-resume", "auto"], "--no-resume auto: a switch takes no value but auto"),
    (["--steps", "1_000"], "--steps 1_000: write at most 15 digits, and no _"),
    (["--lr=1_0.5"], "--lr 1_0.5: write at most 15 digits, and no _"),
    (["--bucket-bytes", "9" * 400], "write at most 15 digits"),
    (["--prompts", "toy:2", "--steps", "3", "--prompts=toy:1"],
     "--prompts is given twice, toy:2 and toy:1"),
])  # fmt: skip
def test_words_that_cannot_be_read(monkeypatch, words, message):
    assert message in refused(monkeypatch, *words)[0]


def test_mistakes_of_form_and_of_rule_are_said_together(monkeypatch):
    words = ["--stps", "3", "--lr", "small", "--reward", "maths", "--temperature", "0"]
    words += ["--seed", "-1"]
    texts = refused(monkeypatch, *words)
    assert [text.partition(" ")[0] for text in texts] == [
        "--stps", "--lr", "--seed", "--temperature", "--reward",
    ]  # fmt: skip


def test_two_bad_values_on_a_command_line_are_both_said(tmp_path):
    done = script("loop_sync.py", "--steps", "x", "--lr", "small", cwd=tmp_path)
    assert "--steps x must be" in done.stderr
    assert "--lr small must be" in done.stderr


@pytest.mark.parametrize("words", [
    ["--max-response-tokens", "many", "--overlong-buffer", "20"],  # above the default, 8
    ["--stepss", "90", "--lr-warmup-steps", "85"],  # above the default of the flag that was meant
    ["--plan", "yes", "--tp", "8"],  # divides the planned ranks; this process is one
])  # fmt: skip
def test_no_rule_judges_the_default_of_a_flag_that_could_not_be_read(monkeypatch, words):
    assert len(refused(monkeypatch, *words)) == 1


def test_rules_about_other_flags_are_said_beside_one_that_could_not_be_read(monkeypatch):
    texts = refused(monkeypatch, "--steps", "x", "--eval-every", "0", "--save-every", "-1")
    assert len(texts) == 3


def test_the_settings_are_those_of_the_command_line(monkeypatch):
    words = ["--steps", "3", "--lr=-0", "--export", "--profile", "1", "2", "--no-resume", "--chat"]
    monkeypatch.setattr(sys, "argv", ["loop.py", *words])
    monkeypatch.setenv("WORLD_SIZE", "1")
    settings = flags.parse_settings(loop_sync.Settings, check_flags)
    assert settings.run == RunSettings(steps=3, export=(), profile=(1, 2))
    assert settings.train.lr == 0 and settings.rollout.chat


@pytest.mark.parametrize("words, expected", [
    ([], False), (["--resume"], True), (["--no-resume"], False), (["--resume", "--no-chat"], True),
    (["--resume", "auto"], "auto"), (["--resume=auto"], "auto"), (["--resume", "auto", "--resume"],
     True),
])  # fmt: skip
def test_resume_is_a_switch_that_may_have_a_value(monkeypatch, words, expected):
    monkeypatch.setattr(sys, "argv", ["loop.py", *words, "--steps", "3"])
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert flags.parse_settings(loop_sync.Settings).run.resume == expected


@pytest.mark.complete
def test_under_torchrun_a_mistake_is_said_once(tmp_path):
    words = ["--steps", "0", "--lr", "small"]
    done = torchrun(ROOT / "loop_sync.py", *words, ranks=2, cwd=tmp_path, check=False)
    assert done.returncode != 0 and "exitcode  : 2" in done.stderr
    assert done.stderr.count("--steps 0 must be") == done.stderr.count("--lr small must") == 1


def choices() -> dict[str, tuple]:
    hints = get_type_hints(RewardSettings) | get_type_hints(LossSettings)
    return {name: get_args(kind) for name, kind in hints.items()}


@pytest.mark.parametrize("flag, table", [
    ("advantage", advantages.ADVANTAGES),
    ("policy_loss", losses.POLICY_LOSSES), ("aggregation", losses.AGGREGATIONS),
    ("correction", losses.CORRECTIONS), ("kl_estimator", losses.KL_ESTIMATORS),
])  # fmt: skip
def test_a_flag_chooses_from_its_table(flag, table):
    assert choices()[flag] == tuple(table)


# --- help -------------------------------------------------------------------------------------


def help_of(monkeypatch, loop) -> str:
    monkeypatch.setattr(sys, "argv", ["loop.py"])
    return flags.help_text(flags.flags_of(loop.Settings), loop.__doc__)


def test_the_help_of_reward_explains_its_table(monkeypatch):
    shown = help_of(monkeypatch, loop_sync)
    assert [name for name in reward.REWARDS if f"{name}:" not in shown] == []


def test_the_most_used_flags_come_first(monkeypatch):
    found = re.findall(r"^  (--\S+)", help_of(monkeypatch, loop_sync), re.MULTILINE)
    assert found[:10] == [
        "--model", "--prompts", "--reward", "--steps", "--prompts-per-step", "--samples-per-prompt",
        "--max-response-tokens", "--lr", "--tp", "--name",
    ]  # fmt: skip


@pytest.mark.parametrize("loop", [loop_sync, loop_async, tool_use])
def test_every_flag_is_in_the_help_once(monkeypatch, loop):
    found = re.findall(r"^  (--\S+)", help_of(monkeypatch, loop), re.MULTILINE)
    assert sorted(found) == sorted(flag.name for flag in flags.flags_of(loop.Settings))
    assert len(found) == len(set(found)) > 50


def test_what_people_look_for_is_found_in_the_help(monkeypatch):
    text = help_of(monkeypatch, loop_sync).lower()
    assert [word for word in ("batch size", "learning rate", "seed") if word not in text] == []


def test_the_help_speaks_in_plain_words(monkeypatch):
    assert "Settings" not in help_of(monkeypatch, loop_async)


def test_every_flag_says_what_it_does():
    assert [flag.name for flag in flags.flags_of(loop_async.Settings) if not flag.text] == []


def test_the_help_shows_the_defaults_of_the_program(monkeypatch):
    shown = " ".join(help_of(monkeypatch, tool_use).split())
    assert "1e-6. (default: 5e-05)" in shown


@pytest.mark.parametrize("words", ["--top-p 0.95", "--top_k=50", "--min-p 0.1", "--top-p 1.0"])
@pytest.mark.parametrize("loop", [loop_sync, loop_async])
def test_sampling_from_a_part_of_the_vocabulary_is_refused_with_the_reason(
    monkeypatch, loop, words
):
    """The trainer's log-probs would be of another distribution than the one sampled from."""
    (problem,) = refused(monkeypatch, *words.split(), loop=loop, ranks=2)
    given = words.replace("_", "-").replace("=", " ")
    assert problem.startswith(f"{given} is not to be had: a token's log-prob must be over")
    assert problem.endswith("leave it out, or lower --temperature")


# --- one rank without torchrun ----------------------------------------------------------------


@pytest.mark.complete
def test_a_run_on_one_rank_needs_no_torchrun(tmp_path):
    quick = ["--steps", "1", "--eval-samples", "4", "--prompts-per-step", "4", "--export"]
    done = script("loop_sync.py", *quick, "--name", "x", cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert metrics_of(tmp_path / "runs" / "x")[-1]["step"] == 1


@pytest.mark.complete
def test_bad_data_on_one_rank_is_not_buried(tmp_path):
    """The stages find it after their imports. Without torchrun the message is the last line."""
    (tmp_path / "p.jsonl").write_text("no json\n", encoding="utf-8")
    done = script("loop_sync.py", "--prompts", "p.jsonl", cwd=tmp_path)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: p.jsonl line 1 is not JSON")


@pytest.mark.parametrize("environment, message", [
    (dict(WORLD_SIZE="8"), "WORLD_SIZE is 8, but RANK is not set"),
    (dict(SLURM_STEP_NUM_TASKS="2"), "SLURM_STEP_NUM_TASKS is 2, but RANK is not set"),
    (dict(RANK="0", WORLD_SIZE="1"), "LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not: torchrun sets"),
])  # fmt: skip
def test_half_of_a_launcher_is_no_rank_of_its_own(monkeypatch, environment, message):
    monkeypatch.setattr(os, "environ", environment)
    with pytest.raises(BadInput, match=message):
        flags.be_the_only_rank()


def test_what_torchrun_has_set_stays(monkeypatch):
    environment = dict(RANK="3", WORLD_SIZE="4", LOCAL_RANK="1", MASTER_ADDR="a", MASTER_PORT="5")
    monkeypatch.setattr(os, "environ", dict(environment))
    flags.be_the_only_rank()
    assert os.environ == environment


@pytest.mark.parametrize("launched", [True, False])
def test_only_under_torchrun_a_rank_ends_with_its_parent(monkeypatch, launched):
    """Without torchrun the parent is a shell, which may end before its run (nohup)."""
    bound = []
    monkeypatch.setattr(exits.signal, "signal", lambda *_: None)
    monkeypatch.setattr(exits, "signal_when_parent_ends", bound.append)
    monkeypatch.setattr(exits.dist, "is_torchelastic_launched", lambda: launched)
    monkeypatch.setattr(exits.dist, "is_initialized", lambda: False)
    exits.run_main(lambda: None)
    assert len(bound) == launched


@pytest.mark.parametrize("words, flag", [
    (["--plan-gpus", "16"], "--plan-gpus has no effect without --plan"),
    (["--eval-only", "--kl-coef", "0.1"], "--kl-coef 0.1 has no effect with --eval-only"),
    (["--eval-only", "--dynamic-sampling", "3"], "--dynamic-sampling 3 has no effect with"),
    (["--debug-rollout-only", "--minibatches", "2"], "--minibatches 2 has no effect with --debug"),
    (["--load-rollouts", "dumps", "--check-sync"], "--check-sync True has no effect with --load"),
    (["--eval-only", "--routing-replay", "rollout"], "--routing-replay rollout has no effect with"),
    (["--debug-rollout-only", "--train-numerics", "fp8"], "--train-numerics fp8 has no effect"),
    (["--eval-only", "--freeze-moe-router"], "--freeze-moe-router True has no effect with"),
    (["--eval-only", "--max-epochs", "2"], "--max-epochs 2 has no effect with --eval-only"),
    (["--load-rollouts", "dumps", "--max-epochs", "2"], "--max-epochs 2 has no effect with --load"),
    (["--eval-only", "--sync", "delta"], "--sync delta has no effect with --eval-only"),
    (["--load-rollouts", "dumps", "--sync", "delta"], "--sync delta has no effect with --load"),
    (["--load-rollouts", "dumps", "--sglang", "page_size=1"], "--sglang page_size=1 has no effect"),
])  # fmt: skip
def test_a_flag_that_would_do_nothing_in_such_a_run_is_refused(monkeypatch, words, flag):
    assert any(flag in problem for problem in refused(monkeypatch, *words))


def test_an_empty_list_may_be_given_before_a_full_one(monkeypatch):
    """Scripts do so when they add flags to a common line."""
    monkeypatch.setattr(sys, "argv", ["loop.py", "--export", "--steps", "2", "--export", "fp8"])
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert flags.parse_settings(loop_sync.Settings, check_flags).run.export == ("fp8",)


@pytest.mark.parametrize(
    "rank, size", [("0", ""), ("0", "1.0"), ("5", "2"), ("-1", "2"), ("0", "0")]
)
def test_what_is_no_rank_is_refused(monkeypatch, rank, size):
    where = dict(LOCAL_RANK="0", MASTER_ADDR="a", MASTER_PORT="1")
    for name, value in dict(RANK=rank, WORLD_SIZE=size, **where).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BadInput, match="is no rank: use `torchrun"):
        flags.be_the_only_rank()
