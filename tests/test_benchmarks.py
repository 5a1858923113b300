"""The table of benchmarks: every data set's own schema is read, asked, judged and counted as its authors say."""

import csv
import gzip
import json
import shutil
from pathlib import Path

import pytest
from benchmark_rows import BASELINE, RIGHT, ROWS, WRONG, hidden
from micro_run import Silent
from scripted import ScriptedSampler, byte_tokenizer, random_checkpoint
from test_judge import Endpoint

from r1fast import rewards
from r1fast.config import UserError
from r1fast.evaluate import find_task, kind_of_rows, main
from r1fast.recipe import run
from r1fast.rewards import judge
from r1fast.schema import EvaluationConfig, RecipeConfig, RewardsConfig, SamplingConfig
from r1fast.stages.evaluate import Evaluator
from r1fast.tasks.benchmarks import TABLE, recognise
from r1fast.tasks.benchmarks.files import Hub, read_hub

DATA = Path(__file__).parents[2] / "shared" / "data"
JUDGEABLE = [name for name in ROWS if {TABLE[name].verifier, *TABLE[name].beside} <= set(rewards.names())]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("model"))


def written(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def needs(reward):
    if reward not in rewards.names():
        pytest.skip(f"there is no reward {reward} yet")


def task_of(tmp_path, name, *rows, **options):
    if name == "arena_hard":
        options.setdefault("baseline", str(written(tmp_path / "baseline.jsonl", [BASELINE])))
    path = written(tmp_path / f"{name}.jsonl", rows or [ROWS[name]])
    return find_task(name, str(path), [f"{key}={value}" for key, value in options.items()])


def measured(task, say, samples=1):
    sampling = SamplingConfig(max_tokens=64, temperature=0.6, top_p=0.95)
    protocol = EvaluationConfig(task=task.name, limit=2000, samples=samples, greedy=False, sampling=sampling)
    sampler = ScriptedSampler(say)
    return Evaluator(None, byte_tokenizer(), {task.name: task}, 1 << 16, sampler=sampler).evaluate(protocol)[0]


def test_every_benchmark_of_the_table_has_a_row_here():
    assert ROWS.keys() == TABLE.keys() and len(TABLE) == 20


@pytest.mark.parametrize("name", JUDGEABLE)
def test_a_row_of_its_own_schema_is_asked_and_judged(tmp_path, name):
    task = task_of(tmp_path, name)
    (problem,) = task.problems("test")
    assert task.problems("train") == [] and task.samples >= 1
    assert task.texts()[0][1][0] in problem.text and "{" not in TABLE[name].prompt.replace("{{", "").split("{")[0]
    assert problem.meta["language"] == TABLE[name].language
    if name not in RIGHT:
        return
    right = RIGHT[name].format(letter=problem.answer["answer"]) if name == "gpqa_diamond" else RIGHT[name]
    assert measured(task, lambda *_: right)["pass@1"] == 1.0
    assert measured(task, lambda *_: WRONG)["pass@1"] == 0.0
    assert measured(task, lambda *_: "")["pass@1"] == 0.0


@pytest.mark.parametrize("name", [name for name in TABLE if name != "gsm8k"])
def test_a_file_is_recognised_by_its_fields(name):
    assert recognise(ROWS[name]) == name
    assert recognise({}) is None and recognise({"question": "", "answer": ""}) is None


def test_recognised_files_are_tasks_without_a_name(tmp_path):
    path = written(tmp_path / "some.jsonl", [ROWS["math500"]])
    assert kind_of_rows(path) == "math500" and find_task(str(path), None).name == "math500"


@pytest.mark.parametrize("name", [name for name in JUDGEABLE if name != "arena_hard"])
def test_a_row_without_a_field_is_named(tmp_path, name):
    for field in TABLE[name].fields:
        row = {key: value for key, value in ROWS[name].items() if key != field}
        path = written(tmp_path / "rows.jsonl", [ROWS[name], row])
        try:
            find_task(name, str(path))
        except UserError as error:
            assert "rows.jsonl:2" in str(error) or "no problems" in str(error)


ODD = [None, 3, -1.5, float("nan"), True, "", " ", "nan", [], [[]], {}, {"a": None}, [None], ["x"], "x" * 5000, "\x00"]


@pytest.mark.parametrize("name", [name for name in JUDGEABLE if name != "arena_hard"])
def test_odd_values_are_problems_or_one_sentence(tmp_path, name):
    for field in ROWS[name]:
        for value in ODD:
            path = written(tmp_path / "rows.jsonl", [{**ROWS[name], field: value}])
            try:
                (problem,) = find_task(name, str(path)).problems("test")
                json.dumps([problem.text, problem.answer, dict(problem.meta)])
            except UserError as error:
                assert "rows.jsonl" in str(error) or "no problems" in str(error)


# -- formats --------------------------------------------------------------------------------------------------------


def texts(task):
    return [problem.text for problem in task.problems("test")]


def test_all_formats_of_a_file_give_the_same_problems(tmp_path):
    needs("multiple_choice")
    import pyarrow
    import pyarrow.parquet

    rows = [{**ROWS["cmmlu"], "Question": f"第{i}题"} for i in range(3)]
    expected = texts(task_of(tmp_path, "cmmlu", *rows))
    assert len(set(expected)) == 3
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(map(json.dumps, rows)))
    for kind, between in (("csv", ","), ("tsv", "\t")):
        with (tmp_path / f"rows.{kind}").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["", *rows[0]], delimiter=between)
            writer.writeheader()
            writer.writerows({"": i, **row} for i, row in enumerate(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for ending in ("json", "jsonl.gz", "csv", "tsv", "parquet"):
        assert texts(find_task("cmmlu", str(tmp_path / f"rows.{ending}"))) == expected, ending


def test_a_folder_of_the_authors_csv_files_gives_the_subjects(tmp_path):
    needs("multiple_choice")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "abstract_algebra_test.csv").write_text('"Which, of these?",w,x,y,z,C\n')
    (tmp_path / "test" / "virology_test.csv").write_text("Second?,a,b,c,d,A\nThird?,a,b,c,d,D\n")
    task = find_task("mmlu", str(tmp_path / "test"))
    assert [p.meta["category"] for p in task.problems("test")] == ["abstract_algebra", "virology", "virology"]
    assert [p.answer["answer"] for p in task.problems("test")] == ["C", "A", "D"]
    assert "C) y" in task.problems("test")[0].text and "Which, of these?" in task.problems("test")[0].text


def test_drop_is_read_as_its_authors_publish_it_and_as_tables(tmp_path):
    row = ROWS["drop"]
    pair = {key: row[key] for key in ("query_id", "question", "answer", "validated_answers")}
    (tmp_path / "own.json").write_text(json.dumps({"own_1": {"passage": row["passage"], "qa_pairs": [pair]}}))
    (problem,) = find_task("drop", str(tmp_path / "own.json")).problems("test")
    assert problem.answer == {"answers": [["Reds", "Blues"], ["the Reds", "the Blues"]]}
    assert problem.text == texts(task_of(tmp_path, "drop"))[0]
    columns = {"number": ["", "2"], "date": [{}, {}], "spans": [["the Reds"], []]}
    (problem,) = task_of(tmp_path, "drop", {**row, "validated_answers": columns}).problems("test")
    assert problem.answer == {"answers": [["Reds", "Blues"], ["the Reds"], ["2"]]}
    dated = {"number": "", "date": {"day": "4", "month": "July", "year": "1776"}, "spans": []}
    (problem,) = task_of(tmp_path, "drop", {**row, "answer": dated, "validated_answers": []}).problems("test")
    assert problem.answer == {"answers": [["4 July 1776"]]}
    flat = {key: row[key] for key in ("query_id", "passage", "question")}
    flat["answers_spans"] = {"spans": ["3", "three"], "types": ["number", "span"]}
    assert task_of(tmp_path, "drop", flat).problems("test")[0].answer == {"answers": [["3"], ["three"]]}


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("rows.jsonl", "{bad\n", "rows.jsonl:1: not JSON"),
        ("rows.jsonl", "[1]\n", "rows.jsonl:1: a row is a JSON object, not list"),
        ("rows.json", "[{]", "not JSON"),
        ("rows.csv", "Question,A,B,C,D,Answer\na,b\n", "rows.csv:2: 2 cells where there are 6 columns"),
        ("rows.csv", "Question,A,B,C,D,Answer\nq,1,2,3,4,E\n", "option is number 4"),
        ("rows.csv", "Question,A,B,C,D,Answer\nq,1,2,3,4,yes\n", "must be the letter or the index"),
        ("rows.parquet", "no", "not Parquet"),
        ("rows.txt", "no", "not a format that is read here"),
        ("rows.jsonl", "", "no problems"),
    ],
)
def test_a_broken_file_is_one_sentence(tmp_path, name, text, says):
    needs("multiple_choice")
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=says):
        find_task("cmmlu", str(tmp_path / name))


def test_what_cannot_be_found_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        find_task("math500", str(tmp_path / "gone.jsonl"))
    with pytest.raises(UserError, match=r"no benchmark 'mat500' \(did you mean 'math500'\?\)"):
        find_task("benchmark", None, ["name=mat500"])
    with pytest.raises(UserError, match="no option of kind 'benchmark'"):
        find_task("math500", None, ["sed=3"])


# -- schemas --------------------------------------------------------------------------------------------------------


def test_gpqa_options_are_shuffled_by_the_seed_and_the_question(tmp_path):
    needs("multiple_choice")
    rows = [{**ROWS["gpqa_diamond"], "Question": f"Which one is noble, {i}?"} for i in range(40)]

    def letters(seed):
        problems = task_of(tmp_path, "gpqa_diamond", *rows, seed=seed).problems("test")
        for problem in problems:
            assert f"{problem.answer['answer']}) Neon" in problem.text
        return [problem.answer["answer"] for problem in problems]

    first = letters(0)
    assert first == letters(0) != letters(1) and set(first) == set("ABCD")
    assert task_of(tmp_path, "gpqa_diamond", *rows[5:]).problems("test")[0].answer["answer"] == first[5]


def test_mmlu_redux_leaves_out_what_has_no_answer(tmp_path):
    needs("multiple_choice")
    base = ROWS["mmlu_redux"]
    kinds = [
        {**base, "error_type": "ok", "correct_answer": None},
        {**base, "error_type": "bad_question_clarity"},
        {**base, "error_type": "no_correct_answer"},
        {**base, "correct_answer": "Rome"},
        {**base, "correct_answer": 3.0},
        {**base, "correct_answer": None},
    ]
    task = task_of(tmp_path, "mmlu_redux", *kinds)
    assert [p.answer["answer"] for p in task.problems("test")] == ["C", "B", "D"] and task.left_out == 3
    zero_eval = {"id": "z", "question": "q", "choices": ["a", "b"], "correct_answer": "b", "config": "logic"}
    (problem,) = task_of(tmp_path, "mmlu_redux", zero_eval).problems("test")
    assert problem.answer["answer"] == "B" and problem.meta["category"] == "logic"


def test_livecodebench_hidden_tests_calls_and_dates(tmp_path):
    needs("code")
    row = ROWS["livecodebench"]
    (problem,) = task_of(tmp_path, "livecodebench").problems("test")
    assert [test["input"] for test in problem.answer["tests"]] == ["2 3\n", "40 2\n"]
    call = {"input": '[1, 2]\n"x"', "output": "3", "testtype": "functional"}
    starter = "class Solution:\n    def add(self, v, s):\n        "
    called = {**row, "starter_code": starter, "metadata": '{"func_name": "add"}', "contest_date": "2025-02-01"}
    called |= {"public_test_cases": json.dumps([call]), "private_test_cases": json.dumps([call])}
    task = task_of(tmp_path, "livecodebench", row, called)
    assert task.problems("test")[1].answer["tests"][0] == {"input": [[1, 2], "x"], "output": 3}
    assert task.problems("test")[1].answer["function"] == "add" and "class Solution" in task.problems("test")[1].text
    assert task_of(tmp_path, "livecodebench", row, called, since="2024-08-01", until="2025-01-31").left_out == 1
    import base64
    import pickle
    import zlib

    evil = base64.b64encode(zlib.compress(pickle.dumps(Path("x")))).decode()
    with pytest.raises(UserError, match="it holds an object"):
        task_of(tmp_path, "livecodebench", {**row, "private_test_cases": evil})
    assert hidden([]) and task_of(tmp_path, "livecodebench", {**row, "private_test_cases": hidden([])})


def test_codeforces_leaves_out_what_cannot_be_judged_by_output(tmp_path):
    needs("code")
    row = ROWS["codeforces"]
    others = [
        {**row, "interaction_format": "Ask."},
        {**row, "input_mode": "file"},
        {**row, "rating": None},
        {**row, "official_tests": []},
    ]
    checked = {**row, "id": "1/B", "description": "Name a sum.", "generated_checker": "print(1)"}
    task = task_of(tmp_path, "codeforces", row, checked, *others)
    problem, with_checker = task.problems("test")
    assert with_checker.answer["checker"] == "print(1)" and "checker" not in problem.answer
    assert task.left_out == 4 and problem.answer["seconds"] == 1.0 and problem.meta["rating"] == 800
    assert "Example input\n1 1" in problem.text and "1 s and 256 MB" in problem.text


def test_a_data_set_by_its_name_is_loaded_with_all_its_configurations(tmp_path):
    """As the hub keeps it, in a folder here; `datasets` itself reads it."""
    subjects = {"anatomy": "liver", "virology": "virus"}
    for subject, word in subjects.items():
        written(tmp_path / f"{subject}.jsonl", [{"question": f"{word}{i}?"} for i in range(2)])
    files = "".join(
        f"- config_name: {s}\n  data_files:\n  - split: test\n    path: {s}.jsonl\n" for s in subjects
    )
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{files}---\n")
    rows = list(read_hub(Hub(str(tmp_path), "test", "*")))
    assert [row["subject"] for row, _ in rows] == ["anatomy"] * 2 + ["virology"] * 2
    assert rows[2][0]["question"] == "virus0?" and rows[3][1] == f"{tmp_path}, virology, test row 1"
    assert [dict(row) for row, _ in read_hub(Hub(str(tmp_path), "test", "anatomy"))] == [
        {"question": "liver0?"}, {"question": "liver1?"},
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"could not be loaded .*; give its rows with --data FILE"):
        list(read_hub(Hub(str(tmp_path), "dev", "anatomy")))


def test_a_data_set_that_is_a_program_is_read_from_the_hubs_own_copy(monkeypatch):
    asked = []

    def load_dataset(name, config, split, revision=None):
        asked.append(revision)
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found it.py")
        return [{"question": "1 + 1"}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert list(read_hub(Hub("a/b", "test"))) == [({"question": "1 + 1"}, "a/b, test row 0")]
    assert asked == [None, "refs/convert/parquet"]


# -- the project's own data: a model that knows, and one that does not ------------------------------------------------


def oracle(task):
    """What is right of each problem, as a model would say it."""
    worked = dict(zip((p.id for p in task.problems("test")), task.items, strict=True))

    def say(prompt, _):
        item = worked[prompt.id]
        if TABLE[task.name].verifier == "code":
            return f"```python\n{item.question}{item.worked}```"
        return f"<think> I know. </think> \\boxed{{{item.answer}}}"

    return say


@pytest.mark.parametrize(
    ("file", "name", "count", "sampled"),
    [("aime24", "aime24", 30, 30), ("math500", "math500", 500, 120), ("gsm8k_test", "gsm8k", 1319, 400),
     ("humaneval", "humaneval", 164, 24)],
)  # fmt: skip
def test_an_oracle_scores_everything_and_an_ignorant_model_nothing(file, name, count, sampled):
    path = DATA / f"{file}.jsonl"
    if not path.is_file():
        pytest.skip(f"there is no {path}")
    needs(TABLE[name].verifier)
    task = find_task(name, str(path))
    assert len(task.problems("test")) == count
    task._problems, task.items = task._problems[:sampled], task.items[:sampled]
    right, wrong = measured(task, oracle(task)), measured(task, lambda *_: WRONG)
    assert (right["problems"], right["pass@1"], right["errors"]) == (sampled, 1.0, 0)
    assert (wrong["problems"], wrong["pass@1"], wrong["errors"]) == (sampled, 0.0, 0)
    if name == "math500":
        assert len(right["categories"]) == 7 and sum(c["problems"] for c in right["categories"].values()) == 120


@pytest.mark.parametrize(
    ("name", "file"),
    [("aime24", "aime24"), ("math500", "math500"), ("gsm8k", "gsm8k_test"), ("humaneval", "humaneval")],
)
def test_the_whole_command_on_the_projects_data(checkpoint, tmp_path, capsys, name, file):
    """A random model: nothing is right, and every step of the way is taken."""
    if not (DATA / f"{file}.jsonl").is_file():
        pytest.skip(f"there is no {DATA / file}.jsonl")
    out = tmp_path / "numbers.json"
    command = [str(checkpoint), "--task", name, "--data", str(DATA / f"{file}.jsonl"), "--device", "cpu"]
    assert main([*command, "--limit", "5", "--samples", "2", "--max-tokens", "12", "--out", str(out)]) == 0
    found, told = json.loads(out.read_text()), capsys.readouterr().out
    assert (found["problems"], found["samples"], found["pass@1"], found["errors"]) == (5, 2, 0.0, 0)
    assert found["truncated"] > 0 and 0 < found["tokens"] <= 5 * 2 * 12 and "pass@2" in told
    row = json.loads((DATA / f"{file}.jsonl").read_text().splitlines()[0])
    asked = row.get("problem") or row.get("question") or row["prompt"]
    assert asked.strip() in found["rows"][0]["prompt"] and len(found["rows"][4]["completions"]) == 2
    if name == "math500":
        assert sum(part["problems"] for part in found["categories"].values()) == 5 and "category" in told


def test_a_benchmark_that_a_model_judges(checkpoint, tmp_path, capsys, monkeypatch):
    """The whole command against a scripted judge: failures are told, and judged when it is asked again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(judge, "WAIT", 0.01)
    rows = [{**ROWS["simpleqa"], "problem": f"Which river runs through town {i}?"} for i in range(4)]
    path = written(tmp_path / "rows.jsonl", rows)
    command = [str(checkpoint), "--task", "simpleqa", "--data", str(path), "--device", "cpu", "--max-tokens", "8"]
    command += ["--samples", "2", "--out", "out.json"]
    assert main(command) == 2 and "no judge is named" in capsys.readouterr().err
    assert main([*command, "--judge-url", "http://x/v1"]) == 2 and "go together" in capsys.readouterr().err

    def say(prompt):
        if "town 3" in prompt and down:
            return 401, {}
        return f"Verdict: {'correct' if 'town 0' in prompt else 'not attempted' if 'town 1' in prompt else 'incorrect'}"

    down, endpoint = True, Endpoint(say)
    command += ["--judge-url", endpoint.url, "--judge-model", "wise"]
    assert main(command) == 0 and "judges the 2 failed samples again" in capsys.readouterr().err
    told = json.loads(Path("out.json").read_text())
    assert told["errors"] == 2 and told["summary"]["correct"] == pytest.approx(1 / 3)
    down, asked = False, len(endpoint.asked)
    assert main(command) == 0 and "correct of attempted" in capsys.readouterr().out
    told = json.loads(Path("out.json").read_text())
    assert told["errors"] == 0 and told["pass@1"] == 0.25 and told["cons@k"] is None
    assert (told["summary"]["not attempted"], told["summary"]["incorrect"]) == (0.25, 0.5)
    assert len(endpoint.asked) == asked + 2 and not Path("out.json.partial").exists()
    rewards.configure(RewardsConfig())
    endpoint.server.shutdown()


def test_a_benchmark_is_a_task_of_a_recipe(checkpoint, tmp_path):
    rows = [{**ROWS["math500"], "problem": f"What is {i} + 1?"} for i in range(300)]
    recipe = {
        "name": "exam",
        "model": {"path": str(checkpoint), "template": "checkpoint", "max_length": 600},
        "tasks": {"math": {"kind": "benchmark", "path": str(written(tmp_path / "rows.jsonl", rows)),
                           "options": {"name": "math500"}}},
        "evaluation": {"task": "math", "limit": 6, "samples": 2, "greedy": False, "sampling": {"max_tokens": 8}},
        "stages": {"exam": {"kind": "evaluate", "from": "model"}},
    }  # fmt: skip
    summary = run(RecipeConfig.model_validate(recipe), tmp_path / "run", progress=Silent())
    told = summary["stages"][0]["evaluation"]
    assert (told["problems"], told["samples"], told["pass@1"]) == (6, 2, 0.0)
    assert len((tmp_path / "run" / "stages" / "exam" / "answers.jsonl").read_text().splitlines()) == 1 + 2 * 6
    written(tmp_path / "rows.jsonl", [*rows, {**ROWS["math500"], "problem": "long " * 150}])  # the last one is seen too
    with pytest.raises(UserError, match="prompt 'math500-00301' of task 'math' has"):
        run(RecipeConfig.model_validate(recipe), tmp_path / "again", progress=Silent())


def test_a_verifier_that_cannot_run_here_is_told_before_the_model_is_read(tmp_path, capsys, monkeypatch, checkpoint):
    monkeypatch.setattr(type(rewards.get("code")), "why_not", lambda self: "there is no bubblewrap; install it")
    path = written(tmp_path / "rows.jsonl", [ROWS["humaneval"]])
    (tmp_path / "no weights").mkdir()
    shutil.copy(Path(checkpoint) / "config.json", tmp_path / "no weights")
    assert main([str(tmp_path / "no weights"), "--task", "humaneval", "--data", str(path)]) == 2
    assert "judged by the reward 'code': there is no bubblewrap" in capsys.readouterr().err


def test_the_page_names_every_benchmark_that_can_be_judged():
    page = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    rows = {name: line for line in page.splitlines() for name in TABLE if f"| `{name}` |" in line}
    assert rows.keys() == TABLE.keys()
    for name, line in rows.items():
        assert TABLE[name].title in line and f"`{TABLE[name].verifier}`" in line and f"`{TABLE[name].hub.name}`" in line
