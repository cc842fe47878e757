"""Held-out prompts -> answers -> rewards -> metrics: mean reward, pass@k, majority@N."""

import asyncio
import math
from collections import Counter, defaultdict
from dataclasses import replace

from common.errors import EngineDied
from common.held_out import held_out_sets
from data.sample import Sample
import reward
import rollout

ROOM_EVERY_S = 0.01  # so often an evaluation looks whether training's requests leave room


class Evaluation:
    """Answers the held-out prompts and judges the answers; each set as its flags say.

    The synchronous loop calls evaluate(). The asynchronous loop calls start(), and finish() before
    the engine gets other weights. In between the engine answers where requests of training leave
    room. So all tokens of an evaluation are of one weight version, and training goes on meanwhile.
    """

    def __init__(self, run, engine, judge: reward.Judge, answer: rollout.Answer = rollout.answer):
        """run: harness.start.Run. engine and judge: of this rank."""
        self.run, self.engine, self.answer = run, engine, answer
        self.step, self.samples, self.task = None, [], None
        self.how = {}  # {name of a set: (settings, judge)}
        settings = run.settings
        for of_set in held_out_sets(settings.rollout):
            limits = dict(
                temperature=of_set.temperature, max_response_tokens=of_set.max_response_tokens
            )
            of_judge = judge
            if of_set.reward:
                function = reward.find_reward(of_set.reward)
                of_judge = reward.Judge(
                    function, settings.reward.judges, settings.reward.judge_timeout_s
                )
            self.how[of_set.name] = replace(settings.rollout, **limits), of_judge

    def evaluate(self, step: int) -> dict:
        """Evaluate the weights of a step, print and return the metrics; see eval_metrics.

        Every rank returns the same; {} if the run has no held-out prompts. Collective.
        """
        self._begin(step)
        if self.samples:
            self.engine.call(self._answer_at_once())
        return self._metrics(rollout.all_gather(self.samples, self.run.group), is_alone=True)

    def start(self, step: int) -> None:
        """Begin to evaluate the weights of a step, which the engine has, in the background."""
        self._begin(step)
        if self.samples:
            self.engine.call(self._start())

    def finish(self) -> None:
        """Wait for the evaluation that was started, if one was, and log it. Collective.

        It gets a row of metrics of its own, with the step whose weights were evaluated. Step 0 has
        one even without held-out prompts, as in the synchronous loop.
        """
        if self.step is None:
            return
        if self.samples:
            self._wait()
        samples = rollout.all_gather(self.samples, self.run.group)
        metrics = self._metrics(samples, is_alone=False)
        if metrics or not self.step:
            self.run.record.write_row({"step": self.step, **metrics})
        self.step = None

    def _begin(self, step: int) -> None:
        self.step = step
        n = self.run.settings.rollout.eval_samples_per_prompt
        prompts = rollout.engine_share(self.run.data.held_out, self.run)
        self.samples = [sample for prompt in prompts for sample in rollout.new_group(prompt, n)]

    def _wait(self) -> None:
        """Wait until this rank's answers are judged; ask again if the engine has been replaced.

        If the engine dies now, its missing answers are errors: the trainers may have newer weights
        already, and nobody can send it those that are evaluated.
        """
        try:
            if self.task.get_loop() is not self.engine.loop:
                self.start(self.step)
            self.engine.call(self._end())
        except EngineDied as error:
            run = self.run.settings.run
            if run.eval_only or not self.run.settings.in_flight.engine_restarts:
                raise
            for sample in self.samples:
                if sample.reward is None and not sample.error:
                    sample.error = str(error)

    def _metrics(self, samples: list[Sample], *, is_alone: bool) -> dict:
        samples.sort(key=lambda sample: sample.group)
        others = {v for sample in samples for v in sample.weight_versions} - {self.step}
        if others:
            raise RuntimeError(f"the evaluation of step {self.step} has tokens of {sorted(others)}")
        metrics = eval_metrics(samples)
        return self.run.record.log_eval(self.step, samples, metrics, is_alone=is_alone)

    # --- on the engine's event loop

    async def _answer_at_once(self) -> None:
        sets = defaultdict(list)
        for sample in self.samples:
            sets[sample.source].append(sample)
        await asyncio.gather(*map(self._answer, sets.values()))

    async def _start(self) -> None:
        self.task = asyncio.ensure_future(self._answer_where_room_is())

    async def _end(self) -> None:
        await self.task

    async def _answer_where_room_is(self) -> None:
        """Answer prompt after prompt, as many at a time as training's requests leave room for.

        One is always under way: an evaluation ends though training never pauses.
        """
        room, under_way = self.run.training_requests, set()
        for group in reward.by_group(self.samples):
            while under_way and self.engine.requests + len(group) > room:
                done, under_way = await asyncio.wait(
                    under_way, timeout=ROOM_EVERY_S, return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    task.result()  # raises what went wrong
            under_way.add(asyncio.ensure_future(self._answer(group)))
            await asyncio.sleep(0)  # it asks the engine now
        await asyncio.gather(*under_way)

    async def _answer(self, samples: list[Sample]) -> None:
        """Answer samples of one set and judge the answers."""
        settings, judge = self.how[samples[0].source]
        await self.answer(self.engine, samples, self.run.data, settings, cache="held-out")
        rollout.check_aborts(samples)
        await asyncio.wrap_future(judge.submit(samples))


def eval_metrics(samples: list[Sample]) -> dict[str, float]:
    """Return held_out, the mean reward. With N > 1 answers to a prompt also pass@k and majority@N.

    k is 1, 2, 4, ... and N. An answer is right if its reward is 1 or more. Answers that the reward
    function failed on count in held_out_errors only: held_out is the mean of the others, and pass@k
    that of the prompts with at least k others. A metric is missing where nothing is left of it.
    With several held-out sets KEY/SET is that of a set, and KEY the mean of the sets.
    """
    sets = defaultdict(list)
    for group in reward.by_group(samples):
        sets[group[0].source].append(group)
    of_set = {name: _set_metrics(groups) for name, groups in sets.items()}
    keys = dict.fromkeys(key for row in of_set.values() for key in row)
    rows = {key: [row[key] for row in of_set.values() if key in row] for key in keys}
    metrics = {key: sum(values) / len(values) for key, values in rows.items()}
    if errors := sum(sample.reward is None for sample in samples):
        metrics["held_out_errors"] = errors
    if len(of_set) > 1:
        metrics |= {f"{key}/{name}": x for name, row in of_set.items() for key, x in row.items()}
    return metrics


def _set_metrics(groups: list[list[Sample]]) -> dict[str, float]:
    """Return the metrics of one held-out set, from the answers to each of its prompts."""
    n = max(map(len, groups))
    scored = [[sample for sample in group if sample.reward is not None] for group in groups]
    rewards = [sample.reward for group in scored for sample in group]
    metrics = {"held_out": sum(rewards) / len(rewards)} if rewards else {}
    if n == 1:
        return metrics
    is_right = [[sample.reward >= 1 for sample in group] for group in scored]
    for k in sorted({n, *(2**i for i in range(n.bit_length()))}):
        if of_k := [pass_at_k(len(right), sum(right), k) for right in is_right if len(right) >= k]:
            metrics[f"pass@{k}"] = sum(of_k) / len(of_k)
    answers = [[s.response.strip() if s.answer is None else s.answer for s in g] for g in scored]
    if votes := [majority_is_right(*group) for group in zip(answers, is_right) if group[1]]:
        metrics[f"majority@{n}"] = sum(votes) / len(votes)
    return metrics


def pass_at_k(n: int, right: int, k: int) -> float:
    """Return the chance that one of k answers is right, from n answers of which `right` are.

    1 - C(n - right, k) / C(n, k), an estimate without bias; Chen et al. 2021, arXiv 2107.03374,
    equation 1.
    """
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def majority_is_right(answers: list[str], is_right: list[bool]) -> bool:
    """Tell whether the most frequent answer is right; of equally frequent ones, the first given.

    An empty answer has no vote. Right answers count as one answer however they are written: the
    reward function found them equal to the label. Wrong ones differ by what the reward function
    took for the answer (math, reasoning_gym), else by the whole response.
    """
    votes = Counter(
        "right" if right else ("wrong", answer)
        for answer, right in zip(answers, is_right)
        if answer or right
    )
    return bool(votes) and votes.most_common(1)[0][0] == "right"
