r"""The mathematical reward: which answers are right, and that a hard answer delays no other one.

Why: a wrong verdict teaches the wrong thing, and SymPy can be sent to compute without end. The
pairs of response and label are in math_pairs_places.py (where an answer stands),
math_pairs_notation.py and math_pairs_expressions.py. Not covered: how long SymPy takes for what
people write.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

import math_pairs_expressions
import math_pairs_notation
import math_pairs_places
from conftest import ROOT
from data import math_judge, math_rules
from data.math_judge import TooHard, call_in_worker, judged_in_worker
from data.sample import Sample
from reward import Judge, compute_rewards, label_problems, math_reward

CASES = [
    pytest.param(*pair, id=f"{kind}: {pair[0]} | {pair[1]}")
    for module in (math_pairs_places, math_pairs_notation, math_pairs_expressions)
    for kind, pairs in module.PAIRS.items()
    for pair in pairs
]
HARD = r"\boxed{9^{9^{9}}}"  # SymPy would compute all of its 369,693,100 digits


def answer(response: str, label: object) -> Sample:
    return Sample(
        [1], label=label, response=response, response_ids=[5], loss_mask=[1], finish_reason="stop"
    )


@pytest.fixture
def short_limit(monkeypatch):
    monkeypatch.setattr(math_judge, "LIMIT_S", 0.3)


@pytest.mark.parametrize("response, label, is_right", CASES)
def test_pairs(response, label, is_right):
    assert math_rules.judged(response, label)[0] is bool(is_right)


@pytest.mark.parametrize(
    "label", [r"\frac{1}{", "3x +", "[1, 2", "It is 5, I think, since 2 and 3 make that", "", "."]
)
def test_a_label_that_is_no_mathematics_is_an_error(label):
    with pytest.raises(ValueError, match="is not a mathematical expression"):
        math_rules.judged(r"\boxed{12}", label)


def test_an_absurdly_long_answer_is_wrong_without_being_parsed():
    assert math_rules.judged(rf"\boxed{{{'1+' * 50_000}1}}", "50001") == (False, ("1+" * 1000))


def test_a_response_without_a_box_is_read_at_its_end_only():
    assert math_rules.judged("the answer is 7" + " bla" * 10_000 + " 12", "12")[0]


# --- the reward function ------------------------------------------------------------------------


def test_the_reward_says_what_it_took_for_the_answer():
    responses = [r"\boxed{3}, no: \boxed{0.50}", "half of 4 is 2", "I have no idea at all"]
    responses += [r"\boxed{"]
    samples = [answer(response, "1/2") for response in responses]
    assert [math_reward(sample) for sample in samples] == [1, 0, 0, 0]
    assert [sample.answer for sample in samples] == ["0.50", "2", "", ""]


@pytest.mark.parametrize("response, label, expected", [
    (r"\boxed{0.00001}", 1e-05, 1),
    (r"\boxed{1e-5}", 1e-05, 1),
    (r"\boxed{42}", 42, 1),
    (r"\boxed{42}", 42.0, 1),
    (r"\boxed{42}", "42\n", 1),
    (r"\boxed{1000000000000000000000000}", 1e24, 1),
])  # fmt: skip
def test_a_label_may_be_a_number_of_json(response, label, expected):
    assert math_reward(answer(response, label)) == expected


@pytest.mark.parametrize("label, problem", [
    (None, "is null, and --reward math needs text or a number"),
    (float("nan"), "is NaN"),
    (["42"], "is a list"),
    ({"a": 1}, "is a dict"),
    ([], "is a list"),
    ({}, "is a dict"),
    ("<p>The answer follows from what was said before: 5</p>",
     "is not a number, an expression or a short text"),
    ("First add 2 and 3.\nThen the total is known to be five.",
     "is not a number, an expression or a short text"),
    (True, "is a bool"),
    ("", "is blank"),
    ("It is 5, I think, since 2 and 3 make that", "is not a number, an expression or a short text"),
    ("\n", "is blank"),
    ("2 + 3 = 5\n#### 5", 'holds ####: add --label-after "####"'),
    (r"\frac{1}{", "is not a number, an expression or a short text"),
])  # fmt: skip
def test_labels_that_cannot_be_judged_against_are_found_before_the_start(label, problem):
    good = [42, 1e-05, 10**40, -0.0, "42", "-3.5", "1,234", r"\frac{1}{2}", "x^2 + 1", "50%"]
    good += ["Evelyn", "(1, 2)", r"x \in [0, 7)", "A, C", "Area = 5", "5 apples, 3 pears"]
    good += ["nan", "None", "3:30 p.m.", r"\{x | x > 1\}"]
    good += [r"\begin{pmatrix} 1 & 0 & 0 \\ 0 & 1 & 0 \\ 0 & 0 & 1 \end{pmatrix}"]
    problems = label_problems("math")([*good, label])
    assert problems[:-1] == [""] * len(good)
    assert problems[-1].startswith(problem)


def test_exact_takes_any_text_as_a_label():
    problems = label_problems("exact")(["3x +", 42, None, "a\n#### 5"])
    assert [bool(problem) for problem in problems] == [False, False, True, True]
    assert "--reward exact needs" in problems[2]


def test_a_label_that_takes_for_ever_to_parse_is_found_before_the_start(short_limit, monkeypatch):
    def never_ending(function, label):
        return call_in_worker(function, "while True: pass")

    monkeypatch.setattr(math_rules, "is_judgeable", exec)
    monkeypatch.setattr(math_judge, "call_in_worker", never_ending)
    problems = label_problems("math")(["x + 1", "7"])
    assert problems == ["takes longer than 0.3 s to parse", ""]


# --- the workers --------------------------------------------------------------------------------


def test_hard_answers_are_wrong_and_delay_the_right_ones_behind_them_by_their_limit_only(
    short_limit,
):
    samples = [answer(response, "5") for response in (HARD, r"\boxed{5}") for _ in range(16)]
    compute_rewards(samples, Judge(math_reward, 32, timeout_s=30))
    assert [sample.reward for sample in samples] == [0.0] * 16 + [1.0] * 16
    assert ["too_hard" in sample.notes for sample in samples] == [True] * 16 + [False] * 16
    assert samples[0].answer == "9^{9^{9}}"
    assert not any(sample.error for sample in samples)


def test_a_computation_in_python_is_ended_and_its_worker_kept(short_limit):
    before = call_in_worker(os.getpid)
    with pytest.raises(TooHard):
        call_in_worker(exec, "while True: pass")
    assert call_in_worker(os.getpid) == before


def test_a_computation_in_c_is_killed_and_its_worker_replaced(short_limit):
    before = call_in_worker(os.getpid)
    with pytest.raises(TooHard):
        call_in_worker(sum, range(10**12))  # one call into C, which handles no signal
    assert call_in_worker(os.getpid) != before
    assert not psutil.pid_exists(before)
    assert judged_in_worker(r"so \boxed{42}", "42") == (True, "42", False)


def test_the_limit_is_that_of_one_answer_and_not_of_all(short_limit):
    worker = call_in_worker(os.getpid)
    for _ in range(30):
        call_in_worker(eval, "sum(i for i in range(3 * 10**6))")
    assert call_in_worker(os.getpid) == worker


def test_an_answer_that_needs_too_much_memory_is_too_hard():
    with pytest.raises(TooHard):
        call_in_worker(bytes, 2 * math_judge.MOST_BYTES)


def test_the_limit_counts_work_and_not_time(short_limit):
    call_in_worker(time.sleep, 1)


def test_an_answer_whose_worker_was_killed_is_judged_by_another():
    worker = call_in_worker(os.getpid)
    threading.Timer(0.3, os.kill, (worker, signal.SIGKILL)).start()
    assert call_in_worker(eval, "__import__('time').sleep(1) or 'judged'") == "judged"
    assert call_in_worker(os.getpid) != worker


def test_a_worker_that_was_killed_while_it_waited_costs_no_answer():
    worker = psutil.Process(call_in_worker(os.getpid))
    worker.kill()
    psutil.wait_procs([worker], timeout=10)
    assert judged_in_worker(r"\boxed{42}", "42") == (True, "42", False)


def test_there_are_workers_for_the_processors_that_this_process_may_use():
    code = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n"
    code += "from data import math_judge; print(math_judge.WORKERS)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert found.stdout == "1\n", found.stderr
    assert math_judge.WORKERS == max(1, len(os.sched_getaffinity(0)) // 4)


@pytest.fixture(scope="module")
def workers_of_ranks() -> dict[str, int]:
    """Return {ranks of a machine with 32 processors: workers of each rank}."""
    code = """
import importlib, json, os
os.sched_getaffinity = lambda _: range(32)
from data import math_judge
workers = {}
for ranks in ("1", "2", "64"):
    os.environ["LOCAL_WORLD_SIZE"] = ranks
    workers[ranks] = importlib.reload(math_judge).WORKERS
print(json.dumps(workers))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("ranks, workers", [("1", 8), ("2", 4), ("64", 1)])
def test_the_ranks_of_a_machine_share_its_processors(workers_of_ranks, ranks, workers):
    assert workers_of_ranks[ranks] == workers


def test_no_worker_outlives_its_parent():
    code = "import os; from data import math_judge\n"
    code += "print(math_judge.call_in_worker(os.getpid), flush=True)\n"
    code += "os.kill(os.getpid(), 9)"
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    pid = int(found.stdout)
    for _ in range(200):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.1)
    raise AssertionError(f"process {pid} is alive")


def test_an_answer_whose_worker_sleeps_is_judged_by_another(monkeypatch):
    worker = call_in_worker(os.getpid)
    monkeypatch.setattr(math_judge, "STUCK_S", 1)
    os.kill(worker, signal.SIGSTOP)
    assert call_in_worker(abs, -5) == 5
    assert call_in_worker(os.getpid) != worker


def test_what_a_worker_raises_arrives_short():
    with pytest.raises(ValueError) as caught:
        judged_in_worker("5", "3x + " * 20_000 + "=")
    assert len(str(caught.value)) < 1500
