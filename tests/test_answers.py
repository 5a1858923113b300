"""Evaluations that are interrupted: nothing that was finished is done again, and the numbers are the same."""

import json
import threading
from dataclasses import replace

import pytest
from scripted import ScriptedSampler, byte_tokenizer

from r1fast import rewards
from r1fast.config import UserError
from r1fast.rewards.base import Reward
from r1fast.schema import EvaluationConfig, SamplingConfig
from r1fast.stages.answers import Answered, AnswerFile, Judging, Sample, Tally
from r1fast.stages.evaluate import Evaluator
from r1fast.tasks import Task
from r1fast.types import Problem, Prompt

KEY = {"checkpoint": "a", "samples": "4"}


class Sums(Task):
    """Nine sums, the last of which is asked twice."""

    verifier = "exact"

    def __init__(self):
        self.name = "sums"

    def problems(self, split, count=None, seed=0):
        meta = {"language": "en", "category": "small"}
        found = [Problem(f"p{i}", f"{i} + 1", str(i + 1), "sums", {**meta, "category": str(i % 2)}) for i in range(9)]
        return [*found, replace(found[-1], id="twin")][:count]


def half_right(prompt, sample):
    """Right in the first half of the samples; the last one runs into its limit."""
    return None if sample == 3 else f"answer : {prompt.answer if sample < 2 else 'none'}"


def evaluator(sampler):
    return Evaluator(None, byte_tokenizer(), {"sums": Sums()}, 4096, sampler=sampler)


PROTOCOL = EvaluationConfig(
    task="sums", limit=99, samples=4, at_one=2, sampling=SamplingConfig(max_tokens=64, temperature=0.6, top_p=0.95)
)


def numbers(result):
    return {name: value for name, value in result.items() if name != "seconds"}


def uninterrupted():
    result, main, _ = evaluator(ScriptedSampler(half_right)).evaluate(PROTOCOL)
    return numbers(result), main.answered


def test_the_numbers_of_a_scripted_model():
    result, answered = uninterrupted()
    assert result["pass@1"] == 0.5 and result["cons@k"] == 1.0 and result["truncated"] == 0.25
    assert result["pass@k"] == {"2": pytest.approx(1 - 1 / 6), "4": 1.0}
    assert result["greedy"] == 1.0 and result["pass@1_t1"] == 1.0
    assert result["categories"]["0"]["problems"] == 6 and result["categories"]["1"]["pass@1"] == 0.5
    assert result["tokens"] == sum(len(s.text) for a in answered for s in a.samples)


@pytest.mark.parametrize("after", [0, 1, 5, 9, 12, 25])
def test_an_interrupted_evaluation_goes_on_with_the_same_numbers(tmp_path, after):
    path = tmp_path / "answers.jsonl"
    said = []

    def interrupted(prompt, sample):
        if sample == 0:
            said.append(prompt.id)
            if len(said) > after:
                raise KeyboardInterrupt
        return half_right(prompt, sample)

    first = ScriptedSampler(interrupted)
    with pytest.raises(KeyboardInterrupt), AnswerFile(path, KEY) as answers:
        evaluator(first).evaluate(PROTOCOL, answers)
    with path.open("a") as file:  # killed while it wrote
        file.write('{"part": "main", "id": "p8", "sco')
    second = ScriptedSampler(half_right)
    with AnswerFile(path, KEY) as answers:
        result, main, _ = evaluator(second).evaluate(PROTOCOL, answers)
    assert (numbers(result), main.answered) == uninterrupted()
    assert len(first.done) == after and len(first.done) + len(second.asked) == 30  # 10 problems, three parts
    again = ScriptedSampler(half_right)
    with AnswerFile(path, KEY) as answers:
        assert evaluator(again).evaluate(PROTOCOL, answers)[0]["pass@1"] == 0.5
    assert again.asked == []


def test_what_was_drawn_but_not_judged_is_judged_without_drawing(tmp_path):
    path = tmp_path / "answers.jsonl"
    with AnswerFile(path, KEY) as answers:
        evaluator(ScriptedSampler(half_right)).evaluate(PROTOCOL, answers)
    lines = path.read_text().splitlines()
    path.write_text("".join(line + "\n" for line in lines if '"scored": true' not in line))
    sampler = ScriptedSampler(half_right)
    with AnswerFile(path, KEY) as answers:
        assert answers.finished == 0
        result, main, _ = evaluator(sampler).evaluate(PROTOCOL, answers)
    assert sampler.asked == [] and (numbers(result), main.answered) == uninterrupted()


def test_what_could_not_be_judged_is_judged_again(tmp_path, monkeypatch):
    path, exact = tmp_path / "answers.jsonl", rewards.get("exact")

    def out_of_reach(completion, reference):
        if reference in ("3", "4"):
            raise OSError("the judge is out of reach")
        return type(exact).judge(exact, completion, reference)

    with AnswerFile(path, KEY) as answers, monkeypatch.context() as patch:
        patch.setattr(exact, "judge", out_of_reach, raising=False)
        result, _, _ = evaluator(ScriptedSampler(half_right)).evaluate(PROTOCOL, answers)
    assert result["errors"] == 8 and result["pass@1"] == 0.5
    sampler = ScriptedSampler(half_right)
    with AnswerFile(path, KEY) as answers:
        assert answers.finished == 3 * 8
        result, main, _ = evaluator(sampler).evaluate(PROTOCOL, answers)
    assert sampler.asked == [] and (numbers(result), main.answered) == uninterrupted()


def test_equal_prompts_are_drawn_with_their_own_seeds_whatever_is_still_wanted(tmp_path):
    seeds = []

    class Noting(ScriptedSampler):
        def stream(self, prompts, params):
            seeds.extend((prompt.id, params.seed) for prompt in prompts)
            return super().stream(prompts, params)

    evaluator(Noting(half_right)).evaluate(PROTOCOL.model_copy(update={"at_one": 0, "greedy": False}))
    whole = dict(seeds)
    assert whole["twin"] != whole["p8"] == whole["p0"]
    seeds.clear()
    with AnswerFile(tmp_path / "answers.jsonl", KEY) as answers:
        answers.keep("main", "p8", [Sample("answer : 9", 1, "stop")] * 4, scored=False)
        evaluator(Noting(half_right)).evaluate(PROTOCOL.model_copy(update={"at_one": 0, "greedy": False}), answers)
    assert dict(seeds) == {name: seed for name, seed in whole.items() if name != "p8"}


def test_a_file_of_another_evaluation_is_refused(tmp_path):
    path = tmp_path / "answers.jsonl"
    AnswerFile(path, {**KEY, "samples": "2"}).close()  # no answer is in it: nothing is lost
    with AnswerFile(path, KEY) as answers:
        answers.keep("main", "p1", [Sample("answer : 9", 1, "stop")] * 4, scored=False)
    with pytest.raises(UserError, match=r"another samples \(there 4, now 16\)"):
        AnswerFile(path, {**KEY, "samples": "16"})
    assert AnswerFile(path, KEY).drawn("main", "p1")


def test_a_failing_verifier_is_counted_and_is_no_wrong_answer():
    class Fragile(Reward):
        name = "fragile"

        def judge(self, completion, reference):
            if "none" in completion:
                raise ValueError("broken")
            return 1.0

    rewards.base._REWARDS["fragile"] = Fragile()
    try:
        task = Sums()
        task.verifier = "fragile"
        graded = Evaluator(None, byte_tokenizer(), {"sums": task}, 4096, sampler=ScriptedSampler(half_right))
        result, _, _ = graded.evaluate(PROTOCOL)
    finally:
        del rewards.base._REWARDS["fragile"]
    assert result["pass@1"] == 1.0 and result["errors"] == 10  # the third of each four fails


def prompt_of(number):
    return Answered(Prompt(str(number), (1,), "", None, "sums"), [])


def test_judging_goes_on_beside_and_raises_what_it_raised():
    seen = threading.Event()

    def judge(batch):
        seen.set()
        raise UserError("the judge has no key")

    with pytest.raises(UserError, match="no key"), Judging(judge) as judging:
        judging.add(prompt_of(0))
        assert seen.wait(10)
        while True:
            judging.add(prompt_of(1))


def test_judging_waits_for_all_but_not_after_an_interrupt():
    done, gate = [], threading.Event()

    def judge(batch):
        gate.wait(10)
        done.extend(batch)

    gate.set()
    with Judging(judge) as judging:
        for number in range(100):
            judging.add(prompt_of(number))
    assert [a.prompt.id for a in done] == [str(n) for n in range(100)]
    done.clear()
    gate.clear()
    with pytest.raises(KeyboardInterrupt), Judging(judge) as judging:
        for number in range(100):
            judging.add(prompt_of(number))
        gate.set()
        raise KeyboardInterrupt
    assert len(done) < 100


def test_the_file_is_lines_that_anyone_can_read(tmp_path):
    path = tmp_path / "answers.jsonl"
    with AnswerFile(path, KEY) as answers:
        evaluator(ScriptedSampler(half_right)).evaluate(PROTOCOL, answers)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows[0] == {"key": KEY} and len(rows) == 1 + 2 * 30
    assert {row["part"] for row in rows[1:]} == {"main", "at one", "greedy"}
    scored = next(row for row in rows[1:] if row["scored"])
    assert scored["samples"][0]["rewards"]["accuracy"] == 1.0 and scored["samples"][0]["answer"] == "1"


def test_whoever_waits_is_told_how_far_it_is():
    told = []
    answers = AnswerFile(None, {}, Tally(lambda done, **numbers: told.append((done, numbers))))
    evaluator(ScriptedSampler(half_right)).evaluate(PROTOCOL.model_copy(update={"at_one": 0, "greedy": False}), answers)
    assert [done for done, _ in told] == list(range(1, 11))
    assert told[-1][1]["accuracy"] == 0.5 and told[-1][1]["length"] > 3
