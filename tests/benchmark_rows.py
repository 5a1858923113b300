"""A row of every benchmark in its data set's own schema, in our own words; and a completion that is right of it."""

from __future__ import annotations

import base64
import json
import pickle
import zlib


def hidden(tests: list[dict]) -> str:
    """Private tests as LiveCodeBench's lite releases hold them."""
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()


_CASE = {"input": "2 3\n", "output": "5\n", "testtype": "stdin"}
_STDIO = "```python\na, b = map(int, input().split())\nprint(a + b)\n```"

ROWS: dict[str, dict] = {
    "aime24": {"ID": "2024-X-1", "Problem": "Find $7 \\cdot 9$.", "Solution": "Multiply.", "Answer": 63},
    "math500": {
        **{"problem": "What is $\\frac{1}{2}+\\frac{1}{4}$?", "solution": "Add.", "answer": "\\frac{3}{4}"},
        **{"subject": "Algebra", "level": 2, "unique_id": "test/algebra/1.json"},
    },
    "cnmo24": {"question": "Let $x+1=3$. Find $x$.", "answer": "$2$", "question_type": "problem-solving"},
    "gsm8k": {"question": "Ana has 3 figs and buys 4. How many?", "answer": "3+4=<<3+4=7>>7\n#### 7"},
    "gpqa_diamond": {
        **{"Question": "Which of these is a noble gas?", "Correct Answer": "Neon", "Incorrect Answer 1": "Iron"},
        **{"Incorrect Answer 2": "Carbon", "Incorrect Answer 3": "Sodium", "Explanation": "Group 18."},
        **{"High-level domain": "Chemistry", "Subdomain": "Inorganic", "Record ID": "rec1"},
    },
    "mmlu": {"question": "Two plus two?", "subject": "arithmetic", "choices": ["3", "4", "5", "6"], "answer": 1},
    "mmlu_redux": {
        **{"question": "Capital of France?", "choices": ["Paris", "Rome", "Bonn", "Bern"], "answer": 2},
        **{"error_type": "wrong_groundtruth", "correct_answer": "0", "source": "x", "potential_reason": "typo"},
    },
    "mmlu_pro": {
        **{"question_id": 70, "question": "Even number?", "options": ["1", "3", "8", "5", "7", "N/A"], "answer": "C"},
        **{"answer_index": 2, "cot_content": "", "category": "math", "src": "own"},
    },
    "ceval": {
        **{"id": 0, "question": "一加一等于____", "A": "一", "B": "二", "C": "三", "D": "四"},
        **{"answer": "B", "explanation": "1+1=2"},
    },
    "cmmlu": {"Question": "太阳从哪边升起？", "A": "西", "B": "南", "C": "东", "D": "北", "Answer": "C"},
    "drop": {
        **{"section_id": "own_1", "query_id": "q1", "passage": "The Reds scored 3 and the Blues 10."},
        **{"question": "Which two teams played?", "answer": {"number": "", "date": {}, "spans": ["Reds", "Blues"]}},
        "validated_answers": [{"number": "", "date": {}, "spans": ["the Reds", "the Blues"]}],
    },
    "ifeval": {
        **{"key": 1001, "prompt": "Write about rain in lower case, without commas."},
        "instruction_id_list": ["change_case:english_lowercase", "punctuation:no_comma"],
        "kwargs": [{"num_words": None, "relation": None}, {"num_words": None, "relation": None}],
    },
    "frames": {
        **{"Unnamed: 0": 0, "Prompt": "How old was X when Y began?", "Answer": "31", "wiki_link_1": "w"},
        **{"reasoning_types": "Numerical reasoning", "wiki_links": "['w']"},
    },
    "simpleqa": {
        "metadata": "{'topic': 'Geography', 'answer_type': 'Place', 'urls': ['u']}",
        **{"problem": "Which river runs through Prague?", "answer": "Vltava"},
    },
    "csimpleqa": {
        **{"id": "a1", "primary_category": "自然", "secondary_category": "地理", "question": "布拉格的河叫什么？"},
        **{"answer": "伏尔塔瓦河", "urls": ["u"]},
    },
    "humaneval": {
        **{"task_id": "HumanEval/0", "prompt": 'def add(a, b):\n    """The sum."""\n', "entry_point": "add"},
        "canonical_solution": "    return a + b\n",
        "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(-1, 1) == 0\n",
    },
    "livecodebench": {
        **{"question_title": "Sum", "question_content": "Add two numbers.", "platform": "atcoder"},
        **{"question_id": "abc1", "contest_id": "abc", "contest_date": "2024-10-05T00:00:00", "starter_code": ""},
        **{"difficulty": "easy", "public_test_cases": json.dumps([_CASE]), "metadata": "{}"},
        "private_test_cases": hidden([{**_CASE, "input": "40 2\n", "output": "42\n"}]),
    },
    "codeforces": {
        **{"id": "1/A", "contest_id": "1", "contest_name": "Round", "contest_type": "CF", "index": "A"},
        **{"time_limit": 1.0, "memory_limit": 256.0, "title": "Sum", "description": "Add two numbers."},
        **{"input_format": "Two integers.", "output_format": "Their sum.", "interaction_format": None, "note": None},
        **{"examples": [{"input": "1 1", "output": "2"}], "rating": 800, "input_mode": "stdio"},
        **{"official_tests": [{"input": "2 3\n", "output": "5\n"}], "generated_checker": None},
    },
    "alpaca_eval": {
        **{"instruction": "Name a colour.", "output": "Red, which is warm.", "generator": "gpt4_1106_preview"},
        "dataset": "own",
    },
    "arena_hard": {
        **{"question_id": "h1", "category": "arena-hard-v0.1", "cluster": "Poems"},
        "turns": [{"content": "Write a line of verse."}],
    },
}
BASELINE = {"question_id": "h1", "model_id": "gpt-4-0314", "choices": [{"index": 0, "turns": [{"content": "Rain."}]}]}

RIGHT: dict[str, str] = {
    "aime24": "so \\boxed{63}",
    "math500": "<think> add </think> \\boxed{0.75}",
    "cnmo24": "\\boxed{2}",
    "gsm8k": "\\boxed{7}",
    "gpqa_diamond": "Answer: {letter}",
    "mmlu": "Answer: B",
    "mmlu_redux": "Answer: A",
    "mmlu_pro": "Answer: C",
    "ceval": "答案：B",
    "cmmlu": "答案：C",
    "drop": "Answer: Blues | Reds",
    "ifeval": "rain falls softly",
    "humaneval": "```python\ndef add(a, b):\n    return a + b\n```",
    "livecodebench": _STDIO,
    "codeforces": _STDIO,
}
WRONG = "I do not know, Sir. \\boxed{-98765}\nAnswer: zebra"
