"""The table of benchmarks: what each is made of. All that they share is in task.py.

k is the paper's where it says one (appendix D.1: 64 for AIME and GPQA, 16 for MATH and Codeforces, 8 for LiveCodeBench;
elsewhere between 4 and 64, by the size of the set).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from r1fast.tasks.benchmarks import programs, prompts, rows
from r1fast.tasks.benchmarks.files import Hub
from r1fast.tasks.benchmarks.ratings import codeforces_summary
from r1fast.tasks.benchmarks.shares import facts_summary, ifeval_summary, mean_beside
from r1fast.tasks.benchmarks.win_rates import alpaca_summary, arena_summary

Summary = Callable[[Sequence[tuple[Any, Sequence[Any]]], Any], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One line of the table."""

    title: str
    read: Callable[[rows.Row, str, Any], rows.Item | None]
    prompt: str
    verifier: str  # a reward's name
    hub: Hub
    fields: tuple[str, ...]  # that every row has: how a file is recognised
    samples: int = 4  # k
    beside: tuple[str, ...] = ()  # further rewards that are measured
    summary: Summary | None = None  # numbers that are no mean of verdicts
    language: str = "en"
    columns: tuple[str, ...] = ()  # of its CSV files without a line of names


_CHOICES = ("question", "A", "B", "C", "D", "answer")

TABLE: dict[str, Benchmark] = {
    "aime24": Benchmark(
        "AIME 2024", rows.math, prompts.MATH, "math", Hub("Maxwell-Jia/AIME_2024", "train"), ("Problem", "Answer"), 64
    ),
    "math500": Benchmark(
        "MATH-500", rows.math, prompts.MATH, "math", Hub("HuggingFaceH4/MATH-500", "test"),
        ("problem", "answer", "subject", "level"), 16,
    ),
    "cnmo24": Benchmark(
        "CNMO 2024", rows.math, prompts.MATH, "math", Hub("opencompass/LiveMathBench", "test", "v202412_CNMO_en"),
        ("question", "answer", "question_type"), 64,
    ),
    "gsm8k": Benchmark(
        "GSM8K", rows.gsm8k, prompts.MATH, "gsm8k", Hub("openai/gsm8k", "test", "main"), ("question", "answer")
    ),
    "gpqa_diamond": Benchmark(
        "GPQA Diamond", rows.gpqa, prompts.CHOICE, "multiple_choice", Hub("Idavidrein/gpqa", "train", "gpqa_diamond"),
        ("Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"), 64,
    ),
    "mmlu": Benchmark(
        "MMLU", rows.mmlu, prompts.CHOICE, "multiple_choice", Hub("cais/mmlu", "test", "all"),
        ("question", "choices", "answer", "subject"), columns=_CHOICES,
    ),
    "mmlu_redux": Benchmark(
        "MMLU-Redux", rows.mmlu_redux, prompts.CHOICE, "multiple_choice",
        Hub("edinburgh-dawg/mmlu-redux-2.0", "test", "*"), ("question", "choices", "answer", "error_type"),
    ),
    "mmlu_pro": Benchmark(
        "MMLU-Pro", rows.mmlu_pro, prompts.CHOICE, "multiple_choice", Hub("TIGER-Lab/MMLU-Pro", "test"),
        ("question", "options", "answer", "answer_index"),
    ),
    "ceval": Benchmark(
        "C-Eval", rows.lettered, prompts.CHOICE_ZH, "multiple_choice", Hub("ceval/ceval-exam", "val", "*"),
        ("id", "question", "A", "B", "C", "D", "answer"), language="zh",
    ),
    "cmmlu": Benchmark(
        "CMMLU", rows.lettered, prompts.CHOICE_ZH, "multiple_choice", Hub("haonan-li/cmmlu", "test", "*"),
        ("Question", "A", "B", "C", "D", "Answer"), language="zh",
    ),
    "drop": Benchmark(
        "DROP", rows.drop, prompts.DROP, "drop_f1", Hub("EleutherAI/drop", "validation"),
        ("passage", "question", "query_id"), beside=("drop_em",),
        summary=mean_beside({"F1": "accuracy", "EM": "drop_em"}),
    ),
    "ifeval": Benchmark(
        "IFEval", rows.ifeval, prompts.PLAIN, "ifeval", Hub("google/IFEval", "train"),
        ("prompt", "instruction_id_list", "kwargs"),
        beside=("ifeval_loose", "ifeval_instructions", "ifeval_loose_instructions"), summary=ifeval_summary,
    ),
    "frames": Benchmark(
        "FRAMES", rows.frames, prompts.FACTS, "judge", Hub("google/frames-benchmark", "test"),
        ("Prompt", "Answer", "reasoning_types"), beside=("judge_attempted",), summary=facts_summary,
    ),
    "simpleqa": Benchmark(
        "SimpleQA", rows.simpleqa, prompts.PLAIN, "judge", Hub("basicv8vc/SimpleQA", "test"),
        ("metadata", "problem", "answer"), beside=("judge_attempted",), summary=facts_summary,
    ),
    "csimpleqa": Benchmark(
        "Chinese SimpleQA", rows.simpleqa, prompts.PLAIN, "judge",
        Hub("OpenStellarTeam/Chinese-SimpleQA", "train"), ("primary_category", "question", "answer"),
        beside=("judge_attempted",), summary=facts_summary, language="zh",
    ),
    "humaneval": Benchmark(
        "HumanEval", programs.humaneval, prompts.HUMANEVAL, "code", Hub("openai/openai_humaneval", "test"),
        ("task_id", "prompt", "test", "entry_point"), 16,
    ),
    "livecodebench": Benchmark(
        "LiveCodeBench", programs.livecodebench, prompts.CONTEST, "code",
        Hub("livecodebench/code_generation_lite", "test"),
        ("question_content", "public_test_cases", "private_test_cases"), 8,
    ),
    "codeforces": Benchmark(
        "Codeforces", programs.codeforces, prompts.CODEFORCES, "code", Hub("open-r1/codeforces", "test"),
        ("contest_id", "index", "description", "official_tests", "rating"), 16, summary=codeforces_summary,
    ),
    "alpaca_eval": Benchmark(
        "AlpacaEval 2.0", rows.alpaca_eval, prompts.PLAIN, "judge",
        Hub("tatsu-lab/alpaca_eval", "eval", "alpaca_eval_gpt4_baseline"), ("instruction", "output", "generator"), 1,
        summary=alpaca_summary,
    ),
    "arena_hard": Benchmark(
        "Arena-Hard", rows.arena_hard, prompts.PLAIN, "judge", Hub("lmarena-ai/arena-hard-auto", "train"),
        ("question_id", "cluster", "turns"), 1, summary=arena_summary,
    ),
}  # fmt: skip


def recognise(fields: Iterable[str]) -> str | None:
    """The one benchmark whose rows have these fields; None where there is none, or several. Where one's fields hold
    another's (GSM8K's are those of anything), the one that names most is meant."""
    have = set(fields)
    found = sorted((len(b.fields), name) for name, b in TABLE.items() if have >= set(b.fields) and name != "gsm8k")
    if not found or (len(found) > 1 and found[-1][0] == found[-2][0]):
        return None
    return found[-1][1]
