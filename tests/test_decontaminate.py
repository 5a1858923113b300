"""Training rows that hold what is to be tested are found, whatever their fields and layout, and no others."""

import json
import random
from pathlib import Path

import pytest

from r1fast.decontaminate import main
from r1fast.tasks.ngrams import Hit, Index, words

DATA = Path(__file__).parents[2] / "shared" / "data"
QUESTION = "A tram leaves the old depot at nine, carrying 12 people; how many are aboard after the third stop?"
CHINESE = "小明的火车早上九点从北京出发，请问什么时候到达上海？"


def written(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (QUESTION, True),
        (QUESTION.upper().replace(",", " --\n"), True),
        ("He said: the old depot at nine, carrying 12 people. How many cats?", True),
        ("the old depot at nine, carrying 12 people -- how many", True),  # exactly ten words
        ("the old depot at nine, carrying 12 people", False),  # eight
        ("the old depot at nine, carrying 13 people; how many are aboard", False),  # another number
        ("Worked: first 9 board, then 3 leave, then 6 board, so 12+9-3+6 = 24.", True),  # a reference solution
        ("", False),
    ],
)
def test_ten_words_in_common(text, found):
    index = Index()
    index.add("b", "p1", [QUESTION, "first 9 board, then 3 leave, then 6 board, so 12+9-3+6 = 24"])
    hit = index.find(["something else", text])
    assert (hit is not None) == found
    assert hit is None or (hit.benchmark, hit.problem, len(hit.words.split())) == ("b", "p1", 10)


def test_short_questions_count_as_a_whole_and_chinese_by_its_characters():
    index = Index()
    index.add("b", "short", ["Find 7 times 9.", "short solution"])
    index.add("b", "zh", [CHINESE])
    assert index.find(["find 7 TIMES 9"]) == Hit("b", "short", "find 7 times 9")
    assert index.find(["Please find 7 times 9 for me"]) is None and index.find(["short solution"]) is None
    assert words("第3题 ok") == ["第", "3", "题", "ok"]
    assert index.find(["他说：" + CHINESE[:13]]).problem == "zh" and index.find([CHINESE[:9]]) is None


@pytest.fixture
def files(tmp_path):
    train = [
        {"prompt": "What is love?", "completion": "A word."},
        {"messages": [{"role": "user", "content": "Well: " + QUESTION}], "n": 1},
        {"text": "nothing of that"},
    ]
    return written(tmp_path / "train.jsonl", train), written(
        tmp_path / "test.jsonl", [{"problem": QUESTION, "answer": "24", "subject": "Trams", "level": 1}]
    )


def test_the_command_reports_and_changes_nothing(files, tmp_path, capsys):
    assert main([files[0], "--against", files[1]]) == 0
    told = capsys.readouterr().out
    assert "1 of 3 rows share 10 words" in told and "math500" in told and "a tram leaves the old depot" in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["test.jsonl", "train.jsonl"]


def test_the_command_drops_or_marks(files, tmp_path, capsys):
    train = [json.loads(line) for line in Path(files[0]).read_text().splitlines()]
    clean, marked = tmp_path / "clean.jsonl", tmp_path / "marked.jsonl"
    assert main([files[0], "--against", f"math500={files[1]}", "--out", str(clean)]) == 0
    assert [json.loads(line) for line in clean.read_text().splitlines()] == [train[0], train[2]]
    assert main([files[0], "--against", files[1], "--out", str(marked), "--mark"]) == 0
    rows = [json.loads(line) for line in marked.read_text().splitlines()]
    assert [row.get("contaminated", {}).get("problem") for row in rows] == [None, "math500-00001", None]
    assert main([str(marked), "--against", files[1], "--ngram", "40"]) == 0  # what marks is no training text
    assert "0 of 3 rows share 40 words" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["gone.jsonl", "--against", "TEST"], "gone.jsonl: no such file"),
        (["TRAIN"], "--against"),
        (["TRAIN", "--against", "math50"], "math50"),
        (["TRAIN", "--against", "TEST", "--mark"], "--mark needs --out"),
        (["TRAIN", "--against", "TEST", "--ngram", "0"], "--ngram is 0"),
        (["TRAIN", "--against", "TEST", "--out", "gone/x.jsonl"], "--out gone/x.jsonl"),
    ],
)
def test_bad_input_is_one_sentence(files, tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(tmp_path)
    names = {"TRAIN": files[0], "TEST": files[1]}
    assert main([names.get(argument, argument) for argument in arguments]) == 2
    told = capsys.readouterr().err
    assert says in told and told.count("\n") == 1


def test_real_data_its_own_copies_are_found_and_the_rest_is_clean(tmp_path, capsys):
    train, test = DATA / "gsm8k_train.jsonl", DATA / "math500.jsonl"
    if not train.is_file():
        pytest.skip(f"there is no {train}")
    rows = [json.loads(line) for line in train.read_text().splitlines()[:1000]]
    copies = [json.loads(line) for line in test.read_text().splitlines()[::10]]
    planted = [{"prompt": f"Try this. {row['problem'].upper()}", "completion": "?"} for row in copies]
    mixed = [*rows, *planted]
    random.Random(0).shuffle(mixed)
    out = tmp_path / "clean.jsonl"
    assert main([written(tmp_path / "mixed.jsonl", mixed), "--against", str(test), "--out", str(out)]) == 0
    kept = [json.loads(line) for line in out.read_text().splitlines()]
    missed = [row for row in kept if "prompt" in row]
    assert all(len(words(row["prompt"])) < 12 for row in missed) and len(missed) <= 5  # short ones, in other words
    assert len(kept) - len(missed) >= 995
