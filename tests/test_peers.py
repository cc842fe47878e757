"""What bench/peers.py makes of the rows that a run has written.

Why: the sides write their evaluations differently, and a figure of a comparison is quoted for long.
Not covered: the runs themselves; TRL needs an environment of its own.
"""

import sys

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "bench"))

import peers  # noqa: E402


def rows_of(held_out: dict[int, float], *, own_rows: bool) -> list[dict]:
    """Return the rows of 20 steps of 0.25 s; a step behind an evaluation takes longer."""
    rows = [{"step": 0, "held_out": held_out[0]}]
    for step in range(1, 21):
        seconds = 1.0 if step - 1 in held_out or step - 2 in held_out else 0.25
        rows.append({"step": step, "step_s": seconds, "tokens": 40.0})
        if step in held_out and own_rows:
            rows.append({"step": step, "held_out": held_out[step]})
        elif step in held_out:
            rows[-1]["held_out"] = held_out[step]
    return rows


@pytest.mark.parametrize("own_rows", [False, True], ids=["sync", "async"])
def test_a_run_by_hand(own_rows):
    """In the asynchronous loop an evaluation has a row of its own, as it ends later."""
    rows = rows_of({0: 0.4, 10: 0.91, 20: 0.95}, own_rows=own_rows)
    found = peers.summary(rows, peak_gb=1.5, samples=8)
    assert (found["reached"], found["step_s"], found["to_goal_s"]) == (10, 0.25, 2.5)
    assert (found["rate"], found["tokens"], found["accuracy"]) == (32, 5, 0.95)
    assert found["area"] == pytest.approx((0.4 + 0.91 + 0.95) / 3)


def test_a_run_that_does_not_reach_the_goal_took_for_ever():
    rows = rows_of({0: 0.4, 20: 0.89}, own_rows=False)
    assert peers.summary(rows, peak_gb=1.5, samples=8)["to_goal_s"] == float("inf")


def test_means_deviations_and_ratios():
    runs = {"sync": [2.0, 4.0], "async": [6.0, 6.0], "trl": [5.0, 7.0]}
    results = {side: [{"peak": x} for x in values] for side, values in runs.items()}
    assert peers.compared_in(results, "peak") == (
        "nanoslime sync 3 ± 1.41, nanoslime async 6 ± 0, TRL 1.16.0 6 ± 1.41, "
        "sync / TRL 0.50, async / TRL 1.00, n 2"
    )
