"""--eval-only: what contradicts it is refused before the start, in every loop.

test_checkpoint.py evaluates a checkpoint and an exported folder in whole runs.
"""

import sys

import loop_async
import loop_sync
import pytest
from common import distributed
from harness.checks import check_run_flags
from conftest import ROOT, start_main

from common.errors import BadInput
from common.settings import RunSettings

sys.path.insert(0, str(ROOT / "examples"))
import ppo_critic
import tool_use

LOOPS = {
    "sync": (loop_sync, [], []),
    "async": (loop_async, [], []),
    "ppo": (ppo_critic, [ppo_critic.check_critic_flags], []),
    "tool": (tool_use, [tool_use.check_tool_flags], ["--warm-steps", "0"]),
}


@pytest.mark.parametrize("changes, flag", [
    ({"load_rollouts": "dumps"}, "--load-rollouts"),
    ({"save_rollouts": True}, "--save-rollouts"),
    ({"debug_rollout_only": True}, "--debug-rollout-only"),
    ({"profile": (1,)}, "--profile"),
    ({"save_every": 5}, "--save-every"),
    ({"export": ("fp8",)}, "--export fp8"),
    ({"export": ("bf16", "fp8")}, "--export bf16 fp8"),
])  # fmt: skip
def test_flags_that_would_do_nothing_are_refused(changes, flag):
    with pytest.raises(BadInput, match=f"--eval-only .*{flag}"):
        check_run_flags(RunSettings(eval_only=True, **changes))


@pytest.mark.parametrize("export", [(), ("bf16",)])
def test_neither_the_default_nor_an_empty_export_is_refused(export):
    check_run_flags(RunSettings(eval_only=True, export=export))


@pytest.fixture
def start(monkeypatch, tmp_path):
    """Call a loop's main() as torchrun would on rank 0 of two, and fail should anything start."""

    def call(loop: str, *flags: str) -> None:
        module, checks, more = LOOPS[loop]
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [module.__name__, "--eval-only", *more, *flags])
        for name, value in dict(RANK=0, WORLD_SIZE=2, LOCAL_RANK=0).items():
            monkeypatch.setenv(name, str(value))
        fail = lambda *_, **__: pytest.fail("a process group was started")  # noqa: E731
        monkeypatch.setattr(distributed, "init_distributed", fail)
        start_main(module, *checks)

    return call


@pytest.mark.parametrize("loop", ["sync", "async", "ppo"])
def test_an_evaluation_without_held_out_prompts_is_refused(start, loop, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "1+1=", "label": "2"}\n', encoding="utf-8")
    with pytest.raises(
        BadInput, match="no held-out prompts to evaluate on: give --eval-prompts FILE"
    ):
        start(loop, "--prompts", "a.jsonl")


def test_a_warm_start_is_training(start):
    with pytest.raises(BadInput, match="--warm-steps 5 trains: use --warm-steps 0"):
        start("tool", "--warm-steps", "5")
