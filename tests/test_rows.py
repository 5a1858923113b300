"""Tasks that read rows: each is checked, held-out rows stay out, what is wrong is one sentence with its place."""

import itertools
import json
import re
import sys
import types
from pathlib import Path

import pytest

from r1fast.config import UserError
from r1fast.schema import TaskConfig
from r1fast.tasks import SPLITS, build

DATA = Path(__file__).parents[2] / "shared" / "data"


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def word_problems(count, first=0):
    return [
        {"question": f"How much is {i} and {i}?", "answer": f"{i}+{i} = <<{i}+{i}={2 * i}>>{2 * i}\n#### {2 * i}"}
        for i in range(first, first + count)
    ]


def test_gsm8k_rows_become_problems_examples_and_documents(tmp_path):
    task = build("words", TaskConfig(kind="gsm8k"), write(tmp_path / "rows.jsonl", word_problems(400)))
    split = {name: task.problems(name) for name in SPLITS}
    assert sum(map(len, split.values())) == 400 == len({p.id for part in split.values() for p in part})
    assert len({p.text for part in split.values() for p in part}) == 400
    assert len(split["train"]) > 320 and len(split["validation"]) > 5 and len(split["test"]) > 5
    problem = split["train"][0]
    number = int(re.search(r"\d+", problem.text)[0])
    assert problem.answer == str(2 * number) and problem.meta == {"language": "en"}
    assert task.problems("train", 5, seed=1) == task.problems("train", 9, seed=1)[:5] != task.problems("train", 5, 2)
    trained = {p.text for p in split["train"]}
    row = task.examples(1)[0]
    number = int(re.search(r"\d+", row.prompt)[0])
    double = 2 * number
    assert row.completion == f"<think> {number}+{number} = {double} </think> <answer> {double} </answer>"
    corpus = list(itertools.islice(task.corpus(), 900))
    assert {row.prompt for row in corpus} == trained  # more documents than rows: it goes round
    assert all("<<" not in row.completion and row.completion.rpartition("#### ")[2].isdigit() for row in corpus)


def test_a_test_file_of_its_own_is_the_test_split(tmp_path):
    train, test = write(tmp_path / "a.jsonl", word_problems(100)), write(tmp_path / "b.jsonl", word_problems(7, 1000))
    task = build("words", TaskConfig(kind="gsm8k", path=train, options={"test_path": test}))
    assert len(task.problems("test")) == 7 and all("100" in p.text for p in task.problems("test"))
    assert len(task.problems("train")) + len(task.problems("validation")) == 100


@pytest.mark.parametrize(("count", "sizes"), [(1, (1, 0, 0)), (2, (1, 1, 0)), (3, (1, 1, 1)), (6, None)])
def test_small_files_still_have_held_out_rows(tmp_path, count, sizes):
    task = build("words", TaskConfig(kind="gsm8k"), write(tmp_path / "rows.jsonl", word_problems(count)))
    found = tuple(len(task.problems(split)) for split in SPLITS)
    assert sum(found) == count and (found == sizes if sizes else min(found) >= 1)


def test_equal_questions_stay_in_one_split(tmp_path):
    rows = word_problems(60)
    task = build("words", TaskConfig(kind="gsm8k"), write(tmp_path / "rows.jsonl", rows + rows))
    texts = [{p.text for p in task.problems(split)} for split in SPLITS]
    assert not (texts[0] & texts[1] or texts[0] & texts[2] or texts[1] & texts[2])


def test_math_and_jsonl_fields(tmp_path):
    rows = [{"problem": f"What is ${i}/3$?", "answer": i, "solution": "Divide.", "level": 2} for i in range(5)]
    task = build("m", TaskConfig(kind="math", path=write(tmp_path / "m.jsonl", rows)))
    assert task.verifier == "math" and task.problems("train")[0].meta == {"language": "en", "level": 2}
    assert task.examples(1)[0].completion.startswith("<think> Divide. </think> <answer> ")
    rows = [{"q": f"第 {i} 题", "a": str(i)} for i in range(5)]
    options = {"question": "q", "answer": "a", "verifier": "gsm8k", "language": "zh"}
    task = build("j", TaskConfig(kind="jsonl", path=write(tmp_path / "j.jsonl", rows), options=options))
    assert task.verifier == "gsm8k" and task.problems("train")[0].meta == {"language": "zh"}
    with pytest.raises(UserError, match="no worked solutions"):
        task.examples(1)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"question": "a", "answer": "#### 1"}\n{"question": \n', r"rows.jsonl:2: not JSON"),
        (
            '{"question": "a", "answer": "#### 1"}\n\n{"answer": "#### 1"}',
            r"rows.jsonl:3: the row has no field 'question'",
        ),
        ('{"question": "a", "answer": "it is 1"}', r"rows.jsonl:1: the answer does not end with '#### N'"),
        ('{"question": "", "answer": "#### 1"}', r"rows.jsonl:1: field 'question' is empty"),
        ('{"question": ["a"], "answer": "#### 1"}', r"rows.jsonl:1: field 'question' must be text, not list"),
        ("[1, 2]\n", r"rows.jsonl:1: a row is a JSON object, not list"),
        ("", "holds no rows"),
        ("\n\n", "holds no rows"),
        (b"\xff\xfe\x00", "not UTF-8"),
    ],
)
def test_bad_rows_are_one_sentence_with_their_place(tmp_path, content, said):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=said) as caught:
        build("words", TaskConfig(kind="gsm8k", path=str(path)))
    assert "\n" not in str(caught.value)


def test_missing_files_and_paths(tmp_path):
    with pytest.raises(UserError, match=r"tasks.words.path: no such file: .*absent.jsonl"):
        build("words", TaskConfig(kind="gsm8k", path=str(tmp_path / "absent.jsonl")))
    with pytest.raises(UserError, match="is not a file"):
        build("words", TaskConfig(kind="gsm8k", path=str(tmp_path)))
    with pytest.raises(UserError, match="reads a JSONL file"):
        build("words", TaskConfig(kind="gsm8k"))
    path = write(tmp_path / "rows.jsonl", word_problems(3))
    with pytest.raises(UserError, match=r"did you mean 'math'\?"):
        build("words", TaskConfig(kind="jsonl", path=path, options={"verifier": "mth"}))


def test_names_of_data_sets_go_to_the_datasets_library(monkeypatch):
    asked = []

    def load_dataset(name, config):
        asked.append((name, config))
        if name != "openai/gsm8k":
            raise FileNotFoundError(f"Dataset {name!r} doesn't exist\non the Hub")
        return {"train": word_problems(200), "test": word_problems(9, 500)}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    task = build("words", TaskConfig(kind="gsm8k"), "openai/gsm8k")
    assert asked == [("openai/gsm8k", "main")] and len(task.problems("test")) == 9
    with pytest.raises(UserError, match=r"no file 'openai/none', and no such data set could be loaded: .*exist$"):
        build("words", TaskConfig(kind="gsm8k", path="openai/none"))


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data folder is absent")
def test_the_real_files_read_whole():
    files = {
        "gsm8k_train": ("gsm8k", 7473),
        "gsm8k_test": ("gsm8k", 1319),
        "math500": ("math", 500),
        "aime24": ("math", 30),
    }
    for stem, (kind, rows) in files.items():
        task = build(stem, TaskConfig(kind=kind, path=str(DATA / f"{stem}.jsonl")))
        sizes = [len(task.problems(split)) for split in SPLITS]
        assert sum(sizes) == rows and min(sizes) >= 1
