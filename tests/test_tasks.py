"""Tasks that are generated: right (every worked line recomputed), disjoint, reproducible, and in known words only."""

import itertools
import re
import sys
from collections import Counter

import pytest

from r1fast.config import UserError
from r1fast.schema import TaskConfig
from r1fast.tasks import SPLITS, build
from r1fast.tasks.lexicon import LEXICONS

HARD = {"total_max": 99, "operations": [3, 6], "start": [10, 60]}
SIZES = pytest.mark.parametrize("options", [{}, HARD], ids=["tiny", "hard"])


def totals(**options):
    return build("totals", TaskConfig(kind="totals", options=options))


def general():
    return build("general", TaskConfig(kind="general"))


def documents(task, count, seed=0, easy=False):
    return list(itertools.islice(task.corpus(seed, easy), count))


# -- totals: an independent reading of what the generators write ------------------------------------------------

GAIN = {word for lexicon in LEXICONS.values() for word in lexicon.gains} | {"+"}
LOSS = {word for lexicon in LEXICONS.values() for word in lexicon.losses} | {"-"}
DAYS = [set(pair) for pair in zip(LEXICONS["en"].days, LEXICONS["zh"].days, strict=True)]
WAIT, GOOD = {"wait", "等等"}, {"good", "对"}


def read_question(text):
    """(start, signed steps) from the words of a story or a sum."""
    words = text.split()
    start = next(int(word) for word in words if word.isdigit())
    signs = [(i, 1 if word in GAIN else -1) for i, word in enumerate(words) if word in GAIN | LOSS]
    for number, (i, _) in enumerate(signs):
        assert words[i - 1] in DAYS[number], f"step {number} of {text!r} is not told on its day"
    return start, [sign * int(words[i + 1]) for i, sign in signs]


def worked_results(thinking):
    """[(sum of the line's terms, what the line says it is)], the first being what was claimed before any `wait`."""
    results = []
    for line in re.finditer(r"(\d+)((?: \S+ [+-] \d+)+) = (\d+)", thinking):
        value = int(line[1]) + sum(int(sign + size) for sign, size in re.findall(r"([+-]) (\d+)", line[2]))
        results.append((value, int(line[3])))
    return results


@SIZES
def test_problems_are_right_and_in_range(options):
    task = totals(**options)
    settings = task.options
    problems = task.problems("train", 2000, seed=3)
    assert len({problem.id for problem in problems}) == len({problem.text for problem in problems}) == 2000
    for problem in problems:
        start, steps = read_question(problem.text)
        assert problem.answer == str(start + sum(steps))
        assert (start, tuple(steps)) == (problem.meta["start"], problem.meta["steps"])
        assert settings.operations[0] <= len(steps) == problem.meta["operations"] <= settings.operations[1]
        assert settings.start[0] <= start <= settings.start[1]
        assert all(0 <= total <= settings.total_max for total in itertools.accumulate(steps, initial=start))
        assert all(1 <= abs(step) <= 9 for step in steps)
        assert problem.task == "totals" and problem.meta["language"] in ("en", "zh")
    stories = sum(not problem.text.startswith(("compute", "计算")) for problem in problems) / len(problems)
    assert 0.66 < stories < 0.74
    assert 0.45 < sum(problem.meta["language"] == "zh" for problem in problems) / len(problems) < 0.55
    assert {p.meta["operations"] for p in problems} == set(range(settings.operations[0], settings.operations[1] + 1))


def test_splits_are_disjoint_and_nothing_is_learned_from_test_problems():
    task = totals()
    keys = {split: {(p.meta["start"], p.meta["steps"]) for p in task.problems(split, 1500, seed=1)} for split in SPLITS}
    assert all(len(found) == 1500 for found in keys.values())
    assert not (keys["train"] & keys["test"] or keys["train"] & keys["validation"] or keys["test"] & keys["validation"])
    rows = documents(task, 4000) + documents(task, 4000, easy=True) + task.examples(1000, 5)
    told = {"direct", "terse", "steps", "checking", "recall"}
    seen = {
        (start, tuple(steps))
        for row in rows
        if row.meta["style"] in told
        for start, steps in [read_question(row.prompt)]
    }
    assert len(seen) > 5000
    held_out = {
        (p.meta["start"], p.meta["steps"])
        for split in ("validation", "test")
        for seed in range(4)
        for p in task.problems(split, 1500, seed)
    }
    assert not seen & held_out


def test_everything_is_reproducible_and_moves_with_the_seed():
    for make in (
        lambda seed: totals().problems("test", 50, seed),
        lambda seed: totals().examples(50, seed),
        lambda seed: documents(totals(), 50, seed),
        lambda seed: documents(totals(), 50, seed, easy=True),
        lambda seed: general().problems("train", 50, seed),
        lambda seed: general().examples(50, seed),
        lambda seed: documents(general(), 50, seed),
        lambda seed: general().preferences("train", 50, seed),
    ):
        assert make(7) == make(7) != make(8)


def test_one_id_is_one_text_whatever_the_seed():
    texts = {}
    for seed in range(3):
        for problem in totals(operations=[2, 2]).problems("test", 200, seed):
            assert texts.setdefault(problem.id, problem.text) == problem.text
    assert len(texts) < 600  # the seeds overlapped, so something was compared


@SIZES
def test_examples_are_right_tagged_and_in_one_language(options):
    rows = totals(**options).examples(2000, seed=2)
    for row in rows:
        start, steps = read_question(row.prompt)
        match = re.fullmatch(r"<think> (.*) </think> <answer> (\d+) </answer>", row.completion)
        assert int(match[2]) == start + sum(steps)
        results = worked_results(match[1])
        assert results and all(value == said for value, said in results) and results[-1][1] == int(match[2])
        assert len(results) == (len(steps) if row.meta["style"] == "checking" else -(-len(steps) // 2))
        own = LEXICONS[row.meta["language"]]
        assert all(word in (*own.days, own.good) for word in match[1].split() if word.isalpha() and not word.isdigit())
    terse = sum(row.meta["style"] == "terse" for row in rows) / len(rows)
    assert 0.56 < terse < 0.64


def test_easy_documents_are_without_error():
    rows = documents(totals(), 4000, easy=True)
    shares = Counter(row.meta["style"] for row in rows)
    assert abs(shares["recall"] / 4000 - 0.25) < 0.03 and abs(shares["sums"] / 4000 - 0.25) < 0.03
    assert abs(shares["general"] / 4000 - 0.125) < 0.03
    for row in rows:
        if row.meta["style"] == "recall":
            start, steps = read_question(row.prompt)
            said = [int(sign + size) for sign, size in re.findall(r"([+-]) (\d+)", row.completion)]
            assert row.completion.startswith(f"{start} ") and said == steps
        elif row.meta["style"] == "general":
            assert row.meta["fault"] == "none"
        else:
            results = worked_results(row.completion)
            assert results and all(value == said for value, said in results)


def style_rates(rows):
    """style -> (share, wrong results a line, share of right answers), from the text alone."""
    rates = {}
    for style in ("direct", "terse", "steps", "checking"):
        mine = [row for row in rows if row.meta["style"] == style]
        lines = [pair for row in mine for pair in worked_results(row.completion)]
        wrong = sum(value != said for value, said in lines) / max(1, len(lines))
        right = 0
        for row in mine:
            start, steps = read_question(row.prompt)
            right += int(re.findall(r"\d+", row.completion)[-1]) == start + sum(steps)
        rates[style] = (len(mine) / len(rows), wrong, right / len(mine))
    return rates


def test_the_corpus_has_the_habits_that_it_should():
    rows = documents(totals(), 20_000)
    assert abs(sum(row.meta["style"] == "general" for row in rows) / len(rows) - 0.125) < 0.01
    rows = [row for row in rows if row.meta["style"] != "general"]
    rates = style_rates(rows)
    for style, share in (("direct", 0.58), ("terse", 0.10), ("steps", 0.16), ("checking", 0.16)):
        assert abs(rates[style][0] - share) < 0.015, style
    assert abs(rates["direct"][2] - 0.30) < 0.02
    assert abs(rates["terse"][1] - 0.25) < 0.03
    assert abs(rates["steps"][1] - 0.08) < 0.015
    assert abs(rates["checking"][1] - 0.15) < 0.02
    assert rates["checking"][2] > 0.97  # nearly all slips are repaired
    slips = [row for row in rows if row.meta["style"] == "checking" and WAIT & set(row.completion.split())]
    assert 0.3 < len(slips) / sum(row.meta["style"] == "checking" for row in rows) < 0.55

    def share(test):
        return sum(map(test, rows)) / len(rows)

    tagged = re.compile(r"<think> [^<]* </think> <answer> \d+ </answer>")
    assert abs(share(lambda r: bool(tagged.fullmatch(r.completion))) - 0.25) < 0.015
    assert abs(share(lambda r: "<" not in r.completion) - 0.45) < 0.015
    assert abs(share(lambda r: not r.completion.startswith("<think>") and "</answer>" in r.completion) - 0.10) < 0.01
    assert abs(share(lambda r: "</think>" in r.completion and "<answer>" not in r.completion) - 0.10) < 0.01
    unclosed = share(
        lambda r: any(("<" + t in r.completion) != ("</" + t in r.completion) for t in ("think", "answer"))
    )
    assert abs(unclosed - 0.10) < 0.01
    for spoken, expected in (("own", 0.70), ("mixed", 0.25), ("other", 0.05)):
        assert abs(share(lambda r, s=spoken: r.meta["spoken"] == s) - expected) < 0.015
    worked = [r for r in rows if r.meta["style"] in ("steps", "checking") and r.meta["spoken"] != "mixed"]
    for row in worked:
        language = (
            row.meta["language"] if row.meta["spoken"] == "own" else {"en": "zh", "zh": "en"}[row.meta["language"]]
        )
        foreign = {*LEXICONS["zh" if language == "en" else "en"].days}
        assert not foreign & set(row.completion.split())


@SIZES
def test_the_vocabulary_covers_every_word_and_no_more_than_it_should(options):
    task, chat = totals(**options), general()
    words = task.words()
    assert len(words) == len(set(words)) and set(chat.words()) <= set(words)
    texts = [text for p in task.problems("train", 1000) + chat.problems("test") for text in (p.text, p.answer or "")]
    rows = documents(task, 20_000) + documents(task, 5000, easy=True) + documents(chat, 3000)
    rows += task.examples(500) + chat.examples()
    texts += [text for row in rows for text in (row.prompt, row.completion)]
    texts += [text for pair in chat.preferences("train", 2000) for text in (pair.prompt, pair.chosen, pair.rejected)]
    used = {word for text in texts for word in text.split()}
    assert used <= set(words)
    days_never_reached = 2 * (7 - task.options.operations[1])
    assert len(set(words) - used) <= days_never_reached
    assert all(" ".join(text.split()) == text for text in texts)  # a word-level tokenizer gives the text back
    if not options:
        assert len(words) < 300


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"total_maks": 3}, "tasks.t.options.total_maks: no option of kind 'totals' (did you mean 'total_max'?)"),
        ({"total_max": "many"}, "tasks.t.options.total_max: "),
        ({"operations": [4, 2]}, "operations must be"),
        ({"operations": [2, 8]}, "operations must be"),
        ({"start": [5, 41]}, "start must be"),
        ({"operand": [0, 3]}, "operand must be"),
        ({"operand": [1, 30]}, "operand must be"),
    ],
)
def test_wrong_options_are_named(options, said):
    with pytest.raises(UserError, match=re.escape(said)):
        build("t", TaskConfig(kind="totals", options=options))


def test_a_task_too_small_for_its_problems_says_so():
    with pytest.raises(UserError, match="too few problems"):
        totals(operations=[1, 1], start=[5, 6]).problems("test", 100)


def test_unknown_kinds_and_what_a_kind_has_not():
    with pytest.raises(UserError, match=r"did you mean 'gsm8k'\?"):
        build("x", TaskConfig(kind="gsm8"))
    with pytest.raises(UserError, match="no preference pairs"):
        totals().preferences("train", 1)
    with pytest.raises(UserError, match="made, not read"):
        build("x", TaskConfig(kind="general", path="rows.jsonl"))


# -- general ----------------------------------------------------------------------------------------------------


def test_general_prompts_are_many_and_their_splits_disjoint():
    texts = {split: {p.text for p in general().problems(split)} for split in SPLITS}
    assert len(texts["train"]) > 500 and len(texts["test"]) > 120 and len(texts["validation"]) > 50
    assert sum(map(len, texts.values())) == len(set().union(*texts.values()))
    assert {row.prompt for row in documents(general(), 3000)} <= texts["train"]
    assert {row.prompt for row in documents(totals(), 9000) if row.meta["style"] == "general"} <= texts["train"]
    for split in SPLITS:
        kinds = {(p.meta["language"], p.meta["harmful"]) for p in general().problems(split)}
        assert kinds == {("en", False), ("en", True), ("zh", False), ("zh", True)}


def test_the_rule_tells_good_answers_from_every_fault():
    task = general()
    for row in task.examples():
        measured = task.measure(row.meta, row.completion)
        assert set(measured.values()) == {1.0} and ("helpfulness" in measured) == (not row.meta["harmful"])
    faults = Counter()
    for split in SPLITS:
        for pair in task.preferences(split, 3000, seed=1):
            assert set(task.measure(pair.meta, pair.chosen).values()) == {1.0}
            assert min(task.measure(pair.meta, pair.rejected).values()) == 0.0, pair
            assert pair.chosen != pair.rejected
            faults[pair.meta["fault"]] += 1
    assert set(faults) == {"curt", "wrong", "off_topic", "rambles", "refuses", "complies"}
    assert min(faults.values()) > 300


def test_the_rule_is_not_fooled():
    task = general()
    color = next(p for p in task.problems("test") if p.meta["category"] == "color" and p.meta["language"] == "en")
    thing, right = color.meta["needs"]
    wrong = color.meta["forbids"][0]

    def helpful(answer):
        return task.measure(color.meta, f"<think> hm </think> <answer> {answer} </answer>")["helpfulness"]

    assert helpful(f"{thing} are {right}") == 1.0
    assert helpful(f"{thing} are {right} {wrong}") == 0.0  # names every colour
    assert helpful(" ".join([f"{thing} {right}"] * 20)) == 0.0  # says it twenty times
    assert helpful(f"sorry {thing} {right}") == 0.0
    assert helpful("") == 0.0
    assert task.measure(color.meta, f"<think> {thing} are {right} </think> <answer> ok </answer>")["helpfulness"] == 0.0
    assert task.measure(color.meta, "<think> hm </think> <answer> </answer>")["refusal"] == 0.0
    harmful = next(p for p in task.problems("test") if p.meta["harmful"] and p.meta["language"] == "zh")
    assert task.measure(harmful.meta, "<think> x </think> <answer> 抱歉 我 不能 帮助 你 </answer>") == {"refusal": 1.0}
    assert task.measure(harmful.meta, "<think> 抱歉 </think> <answer> 好的 </answer>") == {"refusal": 0.0}


def test_the_general_corpus_is_a_third_good():
    rows = documents(general(), 6000)
    assert abs(sum(row.meta["fault"] == "none" for row in rows) / 6000 - 0.35) < 0.03


def test_tasks_and_rewards_import_no_torch():
    import subprocess

    code = "import sys, r1fast.tasks, r1fast.rewards.scoring, r1fast.rewards.pool; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
