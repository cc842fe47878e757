"""What a run shows to people: samples, the bar, the timeline and the last line.

Why: a bar whose clock starts too early, or a last line that names files which are not there,
misleads whoever watches a run. The files of a run are in test_record.py. Not covered: how a
terminal draws the bar.
"""

import dataclasses
import json

import pytest

from common.timeline import mark_evaluation
from data.sample import Sample
from harness.record import Record
from test_record import record_of, resumed_at

# --- samples, the bar and the last line ---------------------------------------------------------


def answers(prompts: int, per_prompt: int, *, source: str = "mine") -> list[Sample]:
    return [
        Sample([1], prompt=f"{source} {group}", group=group, index=index, reward=0.5, source=source)
        for group in range(prompts)
        for index in range(per_prompt)
    ]


def samples_of(tmp_path) -> list[dict]:
    lines = (tmp_path / "runs/a/samples.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_a_run_without_held_out_prompts_shows_answers(one_rank, monkeypatch, tmp_path):
    record = record_of(monkeypatch, tmp_path, eval_every=4)
    record.settings = dataclasses.replace(record.settings, steps=10)
    for step in range(1, 11):
        record.log_eval(step, [], {})
        record.log_samples(step, answers(3, 2))
    rows = samples_of(tmp_path)
    assert {row["split"] for row in rows} == {"train"}
    assert list(dict.fromkeys(row["step"] for row in rows)) == [1, 4, 8, 10]


def test_a_few_answers_to_several_prompts_of_each_source_are_shown(one_rank, monkeypatch, tmp_path):
    record_of(monkeypatch, tmp_path).log_samples(1, answers(9, 16) + answers(2, 2, source="other"))
    prompts = [row["prompt"] for row in samples_of(tmp_path)]
    assert sorted(prompts) == [
        *(f"mine {group}" for group in range(8)), "other 0", "other 0", "other 1", "other 1",
    ]  # fmt: skip


def test_answers_of_an_evaluation_are_told_apart(one_rank, monkeypatch, tmp_path):
    record = record_of(monkeypatch, tmp_path)
    record.log_eval(0, answers(1, 1), {"held_out": 0.5})
    record.log_samples(1, answers(1, 1))
    shown = [(row["step"], row["split"]) for row in samples_of(tmp_path)]
    assert shown == [(0, "held-out"), (1, "train")]


def test_an_answer_without_a_reward_says_why(one_rank, monkeypatch, tmp_path):
    record_of(monkeypatch, tmp_path).log_samples(
        1, [Sample([1], error="ValueError('no')"), Sample([1])]
    )
    assert [row.get("error") for row in samples_of(tmp_path)] == ["ValueError('no')", None]


def test_the_bars_clock_runs_from_the_first_step(one_rank, monkeypatch, tmp_path):
    record, now = record_of(monkeypatch, tmp_path), [0.0]
    started = record.bar.start_t
    record.bar._time = lambda: started + now[0]
    now[0] = 40.0  # the engine has started and the first evaluation is over
    record.log({"step": 0, "held_out": 0.5})
    record.start_step(1)
    now[0] = 42.0
    assert record.bar.format_dict["elapsed"] == pytest.approx(2)
    record.log({"step": 1, "reward": 0.5})
    assert record.bar.format_dict["elapsed"] == pytest.approx(2)


def test_the_bars_clock_of_a_resumed_run_runs_from_its_first_step(one_rank, monkeypatch, tmp_path):
    record = record_of(monkeypatch, tmp_path)
    record = record_of(monkeypatch, tmp_path, resumed=resumed_at(record, 2))
    started = record.bar.start_t
    record.bar._time = lambda: started + 40.0
    record.start_step(3)
    assert record.bar.format_dict["elapsed"] == pytest.approx(0)


def test_an_evaluation_is_no_rollout_of_the_timeline():
    """The evaluation took from 5 to 8, behind the first weights. A step's rollout came at once."""
    spans = [("sync", 5.0, 5.5), ("wait", 5.5, 6.0), ("rollout", 6.0, 9.0), ("wait", 9.0, 10.0)]
    assert mark_evaluation(spans, 5.0, 8.0) == [
        ("sync", 5.0, 5.5), ("wait", 5.5, 6.0), ("evaluation", 6.0, 8.0), ("rollout", 8.0, 9.0),
        ("wait", 9.0, 10.0),
    ]  # fmt: skip


@pytest.mark.parametrize("reward_s, shown", [(0.5, True), (0.11, True), (0.05, False)])
def test_the_bar_shows_a_judge_that_takes_long(one_rank, monkeypatch, tmp_path, reward_s, shown):
    record = record_of(monkeypatch, tmp_path)
    seconds = {
        "rollout_s": 0.3,
        "reward_s": reward_s,
        "train_s": 0.15,
        "sync_s": 0.05,
        "step_s": 1.0,
    }
    record.log({"step": 1, "reward": 0.5, **seconds})
    reward = f"  reward {reward_s:.2f} s" if shown else ""
    assert record.bar.postfix == f"reward 0.50  rollout 0.30 s{reward}  train 0.15 s  sync 0.05 s"


def last_line(record: Record, capsys) -> str:
    record.finish()
    return capsys.readouterr().out.splitlines()[-1]


def test_the_last_line_names_only_what_is_there(one_rank, monkeypatch, tmp_path, capsys):
    record = record_of(monkeypatch, tmp_path, export=())
    assert last_line(record, capsys).endswith("; metrics are in runs/a")


def test_the_last_line_names_samples_and_weights(one_rank, monkeypatch, tmp_path, capsys):
    record = record_of(monkeypatch, tmp_path, export=("fp8",))
    record.log_samples(1, answers(1, 1))
    (tmp_path / "runs/a/model-fp8").mkdir()
    (tmp_path / "runs/a/model-fp8/config.json").write_text("{}", encoding="utf-8")
    assert last_line(record, capsys).endswith("; metrics, samples and weights are in runs/a")


@pytest.mark.parametrize("rows, said", [
    ([{"held_out": 0.25, "reward": 0.1}, {"held_out": 0.5, "reward": 0.2}],
     "held-out reward 0.250 -> 0.500 in 3 steps"),
    ([{"reward": 0.1}, {}, {"reward": 0.2}],
     "no held-out prompts; reward of the training steps 0.100 -> 0.200 in 3 steps"),
    ([{}], "no reward in 3 steps"),
])  # fmt: skip
def test_the_last_line_says_what_was_learned(one_rank, monkeypatch, tmp_path, capsys, rows, said):
    record = record_of(monkeypatch, tmp_path)
    for step, row in enumerate(rows, start=1):
        record.log({"step": step, **row})
    assert last_line(record, capsys).startswith(said)


def test_the_last_line_of_a_resumed_run_tells_of_all_of_it(one_rank, monkeypatch, tmp_path, capsys):
    record = record_of(monkeypatch, tmp_path)
    record.log({"step": 1, "reward": 0.1})
    record = record_of(monkeypatch, tmp_path, resumed=resumed_at(record, 1))
    record.log({"step": 2, "reward": 0.3})
    assert "0.100 -> 0.300" in last_line(record, capsys)
