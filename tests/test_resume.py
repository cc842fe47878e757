"""Resuming: what of a checkpoint or of its run's folder does not fit is refused before the start.

The checkpoint is a small stand-in. test_checkpoint.py resumes real ones.
"""

import dataclasses
import json
import pickle
import shutil

from common import distributed
import loop_async
import loop_sync
import pytest
from conftest import start_main
from torch.distributed.checkpoint.metadata import Metadata

from common import process_groups
from common.errors import BadInput
from common.settings import RolloutSettings, RunSettings, TrainSettings
from harness import checkpoint
from reward import RewardSettings


@pytest.fixture
def write(monkeypatch, tmp_path):
    """Write a checkpoint into runs/old, of step 4 unless told, whose state.json has changes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")

    def write(loop="sync", *, asked=None, without=(), name="step-000004", **changes):
        saved = tmp_path / "runs" / "old" / "checkpoints" / name
        (saved / "model").mkdir(parents=True)
        (saved / "model" / ".metadata").write_bytes(pickle.dumps(Metadata({}, storage_data={})))
        rows = b'{"step": 3}\n{"step": 4}\n'
        (saved.parent.parent / "metrics.jsonl").write_bytes(rows + b'{"step": 5, "cut')
        loops = dict(sync=loop_sync, **{"async": loop_async})
        settings = dataclasses.asdict(asked or loops[loop].Settings())
        state = dict(step=int(name[5:]), loop=loop, settings=settings, read={})
        state |= {"ranks": [{"prompts": 64}]}
        state |= {"record": {"elapsed_s": 1.5, "metrics": len(rows)}, **changes}
        state = {name: value for name, value in state.items() if name not in without}
        (saved / "state.json").write_text(json.dumps(state), encoding="utf-8")
        files = [path for path in saved.rglob("*") if path.is_file()]
        listed = {str(p.relative_to(saved)): (p.stat().st_size, checkpoint._crc(p)) for p in files}
        (saved / "files.json").write_text(json.dumps(listed), encoding="utf-8")
        return saved

    return write


def resume(loop="sync", rollout=None, train=None, **changes):
    settings = dict(sync=loop_sync, **{"async": loop_async})[loop].Settings
    parts = dict(run=RunSettings(name="old", **changes), rollout=rollout or RolloutSettings())
    parts |= dict(train=train or TrainSettings())
    return checkpoint.find_latest_checkpoint(settings(**parts), loop, {})


@pytest.mark.parametrize("loop", ["sync", "async"])
def test_a_whole_checkpoint_is_found(write, loop):
    write(loop)
    assert resume(loop).step == 4


@pytest.mark.parametrize("field", ["step", "loop", "settings", "read", "record", "ranks"])
def test_a_state_without_a_field_is_of_another_version(write, field):
    write(without=[field])
    with pytest.raises(BadInput, match=f"state.json is not as this version writes it .*{field}"):
        resume()


@pytest.mark.parametrize("changes", [
    {"step": "4"}, {"settings": None}, {"settings": {"run": 3}}, {"read": []}, {"ranks": []},
    {"record": {"metrics": "x"}}, {"ranks": [3]},
])  # fmt: skip
def test_a_state_of_other_types_is_of_another_version(write, changes):
    write(**changes)
    with pytest.raises(BadInput, match="state.json is not as this version writes it"):
        resume()


@pytest.mark.parametrize("text", ["[]", "null", "{}", '{"a": 3}', '{"state.json": [1]}', "{"])
def test_a_list_of_files_that_is_none_is_damage(write, text):
    (write() / "files.json").write_text(text, encoding="utf-8")
    with pytest.raises(BadInput, match="step-000004 is damaged: files.json"):
        resume()


def test_a_checkpoint_under_another_step_s_name_is_refused(write):
    """Else the checkpoints of the steps after it would never be the newest."""
    saved = write()
    saved.rename(saved.with_name("step-000009"))
    with pytest.raises(BadInput, match="step-000009 holds step 4, not the step of its name"):
        resume()


@pytest.mark.parametrize("rows", [b'{"step": 33}\n{"step": 44}\n', b"x" * 23 + b"\n", b"3\n" * 12])
def test_metrics_that_were_edited_are_refused(write, rows):
    (write().parent.parent / "metrics.jsonl").write_bytes(rows)
    with pytest.raises(BadInput, match="metrics.jsonl no longer begins with the rows that"):
        resume()


@pytest.mark.parametrize("changes", [{"max_response_tokens": 16}, {"stop": ("1",)}])
def test_finished_groups_in_flight_were_answered_as_the_run_goes_on(write, changes):
    write("async")
    with pytest.raises(BadInput, match="it must stay the same"):
        resume("async", RolloutSettings(**changes))


def test_finished_groups_without_experts_cannot_be_replayed(write):
    write("async")
    with pytest.raises(BadInput, match="--routing-replay.* it must stay the same"):
        resume("async", train=TrainSettings(routing_replay="rollout"))


def test_frozen_routers_stay_frozen(write):
    """They have no optimizer state, which those that train need."""
    write(asked=loop_sync.Settings(train=TrainSettings(freeze_moe_router=True)))
    with pytest.raises(BadInput, match="--freeze-moe-router.* it must stay the same"):
        resume()


def test_the_synchronous_loop_may_go_on_with_longer_answers(write):
    write()
    assert resume(rollout=RolloutSettings(max_response_tokens=16)).step == 4


def test_a_run_that_loaded_its_samples_does_not_know_its_place_among_the_prompts(write):
    write(asked=loop_sync.Settings(run=RunSettings(load_rollouts="dumps")))
    with pytest.raises(BadInput, match="go on with --load-rollouts"):
        resume()
    assert resume(load_rollouts="dumps").step == 4


# --- --resume auto ------------------------------------------------------------------------------


@pytest.fixture
def automatic(write, monkeypatch):
    """Steps 4 and 6 of a run, and a start of one rank; return the two folders."""
    monkeypatch.setattr(process_groups._Start, "store", distributed.dist.HashStore())
    return write(), write(name="step-000006")


def test_the_newest_checkpoint_is_taken(automatic):
    assert resume(resume="auto").step == 6


@pytest.mark.parametrize("lost", ["files.json", "state.json", "model/.metadata"])
def test_a_damaged_checkpoint_is_passed_over(automatic, lost):
    older, newer = automatic
    (newer / lost).unlink()
    assert resume(resume="auto").step == 4
    with pytest.raises(BadInput, match="step-000006 is damaged.*step-000004 before it is whole"):
        resume(resume=True)


def test_one_that_was_not_finished_does_not_count(automatic):
    older, newer = automatic
    newer.rename(newer.with_suffix(".part"))
    assert resume(resume="auto").step == 4


def test_without_any_the_run_starts_afresh(automatic):
    shutil.rmtree(automatic[0].parent)
    assert resume(resume="auto") is None
    assert resume(resume="auto") is None  # nothing was changed


def test_where_all_are_damaged_nothing_starts(automatic):
    """A run that starts afresh would use days to come as far again."""
    for folder in automatic:
        (folder / "state.json").unlink()
    with pytest.raises(BadInput, match="no checkpoint of runs/old is whole, the newest step-000006:"
                       " state.json is missing: bring one back"):  # fmt: skip
        resume(resume="auto")


def test_a_rank_that_finds_damage_in_its_share_moves_all_on(automatic, monkeypatch):
    """Rank 1 of two has compared the contents of other files."""
    monkeypatch.setattr(process_groups._Start, "world_size", 2)
    monkeypatch.setattr(process_groups._Start, "rank", 0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = {"checkpoints/1": "[]", "step-000006/1": "state.json has other", "step-000004/1": ""}
    for key, text in said.items():
        process_groups._Start.store.set(key, text)
    assert resume(resume="auto").step == 4


def test_what_must_stay_the_same_must_do_so_here_too(automatic):
    with pytest.raises(BadInput, match="--seed was 1 when"):
        resume(resume="auto", seed=2)


def test_a_run_that_has_done_its_steps_has_its_exports_left(automatic):
    assert resume(resume="auto", steps=6).step == 6
    with pytest.raises(BadInput, match="nothing is left to do"):
        resume(resume="auto", steps=5)


# --- elsewhere ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "a"])
def test_a_link_to_nowhere_in_the_place_of_runs_is_refused(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to("nowhere")
    for key, value in dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0).items():
        monkeypatch.setenv(key, str(value))
    monkeypatch.setattr(distributed, "init_distributed", lambda *_, **__: pytest.fail("started"))
    monkeypatch.setattr("sys.argv", ["loop_sync.py", *(["--name", name] if name else [])])
    with pytest.raises(BadInput, match="cannot be written, because of"):
        start_main(loop_sync)


def async_settings(prompts=16, reward="exact", deal="fixed"):
    return loop_async.Settings(
        run=RunSettings(name="old"),
        rollout=RolloutSettings(prompts_per_step=prompts, deal=deal),
        reward=RewardSettings(reward=reward),
    )


def resume_as(settings):
    return checkpoint.find_latest_checkpoint(settings, "async", {})


@pytest.mark.parametrize("then, now", [
    (dict(deal="room"), dict(deal="fixed")), (dict(deal="fixed"), dict(deal="room")),
    (dict(deal="room", prompts=16), dict(deal="room", prompts=8)),
])  # fmt: skip
def test_which_engine_takes_which_prompt_stays_the_same(write, then, now):
    """Else prompts would be trained twice, or never."""
    write("async", asked=async_settings(**then))
    resume_as(async_settings(**then))
    with pytest.raises(BadInput, match="it must stay the same"):
        resume_as(async_settings(**now))


def test_a_service_that_judges_may_have_moved(write):
    write("async", asked=async_settings(reward="http://one:80/judge"))
    assert resume_as(async_settings(reward="http://other:81/judge")).step == 4
    with pytest.raises(BadInput, match="it must stay the same"):
        resume_as(async_settings(reward="math"))
