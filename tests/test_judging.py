"""Rewards beside exact and math: F1, choices, votes of a group, a service; and held-out sets.

Why: a reward that reads an answer wrongly trains the wrong thing, and nothing fails. The service
here listens on the loopback. Not covered: TLS, and a service behind a proxy.
"""

import asyncio
import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from prompt_helpers import TOY

from backends.huggingface.config import read_config
from common.errors import BadInput
from common.held_out import held_out_sets
from common.settings import RolloutSettings
from data import remote_reward
from data.remote_reward import check_listens, url_problem
from data.prompts import load_data
from data.sample import Sample
from data.text_rewards import (
    accepted_texts,
    choice_label,
    choice_of,
    choice_reward,
    f1_reward,
    label_problems,
    majority_reward,
)
from harness.reward_checks import check_held_out_flags, check_reward_flags
from reward import label_problems as problems_of
from reward import REWARDS, Judge, RewardSettings, compute_rewards, find_reward


def answer(response: str, label=None, **fields) -> Sample:
    fields = {"finish_reason": "stop", "response_ids": [1, 2], "loss_mask": [1, 1]} | fields
    return Sample([1], "a prompt", label, group=fields.pop("group", 0), response=response, **fields)


# --- F1 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("response, label, score", [
    ("The Eiffel Tower!", "eiffel tower", 1.0),
    ("It is the tower", "eiffel tower", 0.4),  # one word of two, one of three: 2 * 1 / (3 + 2)
    ("tower tower", "tower", 2 / 3),  # a word counts as often as both have it
    ("", "tower", 0.0),
    ("the", "tower", 0.0),
    ("thinking of Rome <answer>Paris</answer> done", "Paris", 1.0),
    ("<answer>Rome</answer> no, <answer>Paris</answer>", "Paris", 1.0),
    ("Paris", ["Rome", "Paris"], 1.0),
    ("Zürich", "zürich", 1.0),
    ("42", 42, 1.0),
])  # fmt: skip
def test_f1_counts_shared_words(response, label, score):
    assert f1_reward(answer(response, label)) == pytest.approx(score)


@pytest.mark.parametrize("label", [None, [], ["a", None], "", "the", "?!", {"a": 1}, [["a"]], True])
def test_f1_refuses_a_label_that_no_answer_can_share_a_word_with(label):
    with pytest.raises(ValueError):
        accepted_texts(label)


# --- multiple choice ----------------------------------------------------------------------------


@pytest.mark.parametrize("response, letter", [
    ("B", "B"), (" b ", "B"), ("(B)", "B"), ("B.", "B"), ("B) Paris", "B"), ("**B**", "B"),
    ("The answer is B.", "B"), ("the answer is (b).", "B"), ("Answer: **C**", "C"),
    ("I first thought the answer is A. Answer: D", "D"), (r"so \boxed{C}", "C"),
    (r"$\boxed{\text{C}}$", "C"), ("Final answer:\nB", "B"), ("<answer> c </answer>", "C"),
    ("The best answer choice is `C`", "C"), ("### Answer\n**B**", "B"), ("B\n\nBecause ...", "B"),
    (r"The answer is \(B\).", "B"), (r"\boxed{\textbf{(C)}}", "C"), ("Answer: I think it is B", ""),
    ("A) Paris is wrong.\nB) Rome.\nThe correct option is B.", "B"), ("A) Paris\nB) Rome", ""),
    ("<think>The answer is A.</think>\n\nB", "B"), ("Answer: B or C", ""), (r"\boxed{A, B}", ""),
    ("A man walks in", ""), ("the answer is a number", ""), ("the answer is not known", ""),
    ("", ""), ("Because of B", ""), ("AB", ""), ("e.g. this", ""),
])  # fmt: skip
def test_a_choice_is_read_where_it_is_stated(response, letter):
    assert choice_of(response) == letter


def test_a_choice_is_right_whatever_its_form():
    assert [choice_reward(answer("(b)", label)) for label in ("B", "(B)", "b.")] == [1, 1, 1]
    assert choice_reward(answer("C", "B")) == choice_reward(answer("no idea", "B")) == 0


def test_an_index_is_no_label_of_a_choice():
    """Some files count options from 0 and others from 1."""
    problems = label_problems(["B", 2, "Paris", "A#### B"], reads=choice_label, reward="choice")
    assert [bool(problem) for problem in problems] == [False, True, True, True]
    assert "--reward choice" in problems[1] and "--label-after" in problems[3]


# --- groups -------------------------------------------------------------------------------------


def test_the_majority_of_a_group_is_right():
    """Groups are judged apart, and an answer that was cut off has no vote."""
    first = [answer(text, group=1) for text in ("4", r"so \boxed{4}", "5", "")]
    second = [answer("5", group=2), answer("4", group=2, finish_reason="length")]
    cut = answer("5", group=1, finish_reason="length")
    compute_rewards([*first, *second, cut], Judge(majority_reward))
    assert [sample.reward for sample in [*first, *second, cut]] == [1, 1, 0, 0, 0, 0, 0]


def test_without_agreement_nobody_is_right():
    """Else the first answer of each group would be, whatever it is."""
    samples = [answer(text) for text in ("4", "5", "6")]
    compute_rewards(samples, Judge(majority_reward))
    assert [sample.reward for sample in samples] == [0, 0, 0]


def test_a_reward_of_groups_may_be_a_coroutine():
    async def rank(samples):
        await asyncio.sleep(0)
        return [float(len(sample.response)) for sample in samples]

    rank.of_group = True
    samples = [answer("x" * n, group=n % 2) for n in range(4)]
    compute_rewards(samples, Judge(rank))
    assert [sample.reward for sample in samples] == [0, 1, 2, 3]


@pytest.mark.parametrize("returned, rewards", [
    ([1.0], [None, None]), (None, [None, None]), ([1.0, None], [1.0, None]),
    ([1.0, float("nan")], [1.0, None]), ([1.0, "x"], [1.0, None]),
])  # fmt: skip
def test_what_a_reward_of_groups_cannot_judge_is_masked(returned, rewards):
    def broken(samples):
        return returned

    broken.of_group = True
    samples = [answer("a"), answer("b")]
    compute_rewards(samples, Judge(broken))
    assert [sample.reward for sample in samples if sample.loss_mask == [1, 1]] == [
        reward for reward in rewards if reward is not None
    ]
    assert sum(bool(sample.error) for sample in samples) == rewards.count(None)


# --- a service ----------------------------------------------------------------------------------


@pytest.fixture
def service(monkeypatch):
    """Start a service that answers with what `reply(body)` returns: (status, text)."""
    monkeypatch.setattr(remote_reward, "FIRST_PAUSE_S", 0.01)
    servers = []

    def begin(reply) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, text = reply(body)
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                with contextlib.suppress(OSError):  # nobody waits any more
                    self.wfile.write(text.encode())

            def log_message(self, *args):
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/judge"

    yield begin
    for server in servers:
        server.shutdown()
        server.server_close()


def judged(url: str, samples: list[Sample], **limits) -> list[float | None]:
    compute_rewards(samples, Judge(find_reward(url), **limits))
    return [sample.reward for sample in samples]


def test_a_service_gets_the_sample_and_returns_a_number(service):
    url = service(lambda body: (200, json.dumps(body["response"] == body["label"]["is"] and 0.5)))
    right = answer("ü", {"is": "ü"}, metadata={"k": 1})
    assert judged(url, [right]) == [0.5]


def test_every_field_that_is_sent_arrives(service):
    seen = []
    url = service(lambda body: (seen.append(body), (200, '{"score": 1}'))[1])
    assert judged(url, [answer("4", 4, index=3, source="s")]) == [1.0]
    assert set(seen[0]) == set(remote_reward.SENT)
    assert (seen[0]["label"], seen[0]["index"], seen[0]["source"]) == (4, 3, "s")


@pytest.mark.parametrize("text", ["", "nonsense", "true", "null", "[1]", '{"reward": "1"}', "NaN",
                                  '{"other": 1}', " " * 70_000 + "1"])  # fmt: skip
def test_an_answer_without_a_number_is_a_failure(service, text):
    sample = answer("4")
    assert judged(service(lambda body: (200, text)), [sample]) == [None]
    assert "RefusedByService" in sample.error and sample.loss_mask == [0, 0]


def test_an_overloaded_service_is_asked_again(service):
    replies = iter([(503, ""), (429, ""), (200, '{"reward": 1}')])
    assert judged(service(lambda body: next(replies)), [answer("4")]) == [1.0]


def test_a_service_that_refuses_is_not_asked_again(service):
    asked = []
    url = service(lambda body: (asked.append(body), (400, ""))[1])
    assert judged(url, [answer("4")]) == [None]
    assert len(asked) == 1


def test_a_redirect_is_not_followed(service):
    assert judged(service(lambda body: (302, "")), [answer("4")]) == [None]


def test_a_service_that_is_gone_is_tried_to_the_end(service, monkeypatch):
    url = service(lambda body: (200, "1"))
    gone = url.replace(url.split(":")[2].split("/")[0], "9")  # nobody listens on the discard port
    sample = answer("4")
    monkeypatch.setattr(remote_reward, "FIRST_PAUSE_S", 0.001)
    assert judged(gone, [sample]) == [None]
    assert "ClientConnectorError" in sample.error


def test_what_a_service_takes_too_long_for_is_given_up(service):
    """Else each such request would stay open, and --judges would not limit them."""
    released = threading.Event()
    url = service(lambda body: (released.wait(30), (200, "1"))[1])
    judge = Judge(find_reward(url), 2, timeout_s=0.5)
    samples = [answer("4") for _ in range(2)]
    compute_rewards(samples, judge)
    assert [sample.reward for sample in samples] == [None, None]

    async def others() -> list:
        await asyncio.sleep(0.1)
        return [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]

    assert asyncio.run_coroutine_threadsafe(others(), judge._loop).result() == []
    released.set()


def test_an_error_shows_nothing_of_the_address(service):
    url = service(lambda body: (500, "")) + "?token=secret"
    sample = answer("4")
    judged(url, [sample])
    assert "status 500" in sample.error and "secret" not in sample.error


def test_no_more_requests_are_open_than_judges_allow(service):
    lock, both = threading.Lock(), threading.Barrier(2, timeout=30)
    open_now, most = 0, 0

    def reply(body):
        nonlocal open_now, most
        with lock:
            open_now += 1
            most = max(most, open_now)
        both.wait()  # two are open at a time
        with lock:
            open_now -= 1
        return 200, "1"

    assert judged(service(reply), [answer("4") for _ in range(6)], judges=2) == [1.0] * 6
    assert most == 2


def test_a_service_that_does_not_listen_is_refused_before_the_start():
    with pytest.raises(BadInput, match="--reward http://127.0.0.1:9/.*start the service first"):
        check_listens("http://127.0.0.1:9/judge", flag="--reward")


def test_a_password_in_an_address_is_refused():
    with pytest.raises(BadInput, match="--reward holds a password"):
        check_reward_flags(RewardSettings(reward="http://me:secret@host/"), RolloutSettings())


@pytest.mark.parametrize(
    "url", ["http://", "http://:80/x", "http://host:port/", "https://h:99999/"]
)
def test_an_address_that_is_none_is_refused(url):
    assert "is no address" in url_problem(url)
    with pytest.raises(BadInput, match="--reward http"):
        check_reward_flags(RewardSettings(reward=url), RolloutSettings())


# --- held-out sets ------------------------------------------------------------------------------


TWO = dict(eval_prompts=("a/gsm.jsonl", "b/quiz.jsonl"), temperature=0.7)


def test_each_held_out_set_has_its_own_settings():
    sets = held_out_sets(
        RolloutSettings(
            **TWO,
            eval_temperature=("0", "quiz=0.5"),
            eval_max_response_tokens=("gsm=99",),
            eval_reward=("quiz=choice",),
        )
    )
    found = [(s.name, s.temperature, s.max_response_tokens, s.reward) for s in sets]
    assert found == [("gsm", 0.0, 99, ""), ("quiz", 0.5, 8, "choice")]


def test_an_address_for_all_sets_may_hold_an_equals_sign():
    sets = held_out_sets(
        RolloutSettings(**TWO, eval_reward=("http://h/j?k=v", "quiz=http://q/?a=b"))
    )
    assert [one.reward for one in sets] == ["http://h/j?k=v", "http://q/?a=b"]


def test_without_flags_a_set_is_answered_as_in_training():
    (toy,) = held_out_sets(RolloutSettings(temperature=0.7, max_response_tokens=5))
    assert (toy.name, toy.temperature, toy.max_response_tokens, toy.reward) == ("toy", 0.7, 5, "")


@pytest.mark.parametrize("changes, message", [
    (dict(eval_temperature=("quizz=0",)), "no held-out set has that name.* gsm, quiz"),
    (dict(eval_temperature=("warm",)), "'warm' is not a number"),
    (dict(eval_temperature=("quiz=",)), "'' is not a number"),
    (dict(eval_temperature=("0", "1")), "2 values for all sets"),
    (dict(eval_temperature=("gsm=0", "gsm=1")), "gsm has a value already"),
    (dict(eval_temperature=("-1",)), "must be 0, which is greedy, or lie"),
    (dict(eval_temperature=("nan",)), "must be 0, which is greedy, or lie"),
    (dict(eval_max_response_tokens=("1.5",)), "'1.5' is not a number"),
    (dict(eval_max_response_tokens=("quiz=0",)), "of quiz must be at least 1"),
    (dict(eval_reward=("quiz=letter",)), "--eval-reward letter must be one of exact"),
    (dict(eval_reward=("http://",)), "is no address"),
    (dict(eval_temperature=("0",), eval_samples_per_prompt=4), "all answers to a prompt are equal"),
    (dict(eval_reward=("majority",)), "compares answers to a prompt, and gsm has one"),
])  # fmt: skip
def test_settings_of_held_out_sets_that_cannot_work_are_refused(changes, message):
    with pytest.raises(BadInput, match=message):
        check_held_out_flags(RewardSettings(), RolloutSettings(**TWO, **changes))


def test_a_reward_of_groups_alone_cannot_evaluate_single_answers():
    with pytest.raises(BadInput, match="use another --eval-reward"):
        check_held_out_flags(RewardSettings(reward="majority"), RolloutSettings())
    check_held_out_flags(RewardSettings(reward="majority"), RolloutSettings(eval_reward=("exact",)))


def test_the_longest_sample_counts_the_evaluation(tmp_path):
    def longest(**settings) -> tuple[int, int]:
        data = load_data(TOY, RolloutSettings(**settings), read_config(TOY), seed=1)
        return data.longest, data.longest_held_out

    asked = longest(eval_max_response_tokens=("20",))
    assert asked == (longest()[0], longest()[1] + 12)  # what is trained is as long as it was


def test_labels_of_a_held_out_set_are_checked_by_its_own_reward(tmp_path):
    file = tmp_path / "quiz.jsonl"
    file.write_text('{"prompt": "1+1=", "label": "Paris"}\n', encoding="utf-8")
    settings = RolloutSettings(eval_prompts=(str(file),), eval_reward=("choice",))
    with pytest.raises(BadInput, match="'Paris' is no letter"):
        load_data(TOY, settings, read_config(TOY), seed=1, label_problems=problems_of)


def test_a_reward_that_fits_no_generated_label_is_refused():
    settings = RolloutSettings()
    with pytest.raises(BadInput, match="toy: the label '[0-9]+' is no letter"):
        load_data(
            TOY,
            settings,
            read_config(TOY),
            seed=1,
            label_problems=lambda reward: problems_of(reward or "choice"),
        )


def test_rewards_of_the_table_are_functions():
    assert all(map(callable, REWARDS.values()))
