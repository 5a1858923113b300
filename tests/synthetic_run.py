"""Writes a run directory as a finished (or killed) run of the preset `tiny` leaves it: the report's tests read it, and
`python tests/synthetic_run.py DIR` makes one to look at. The numbers are drawn, in the size of measured ones."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from random import Random

import yaml

# stage -> (block of the recipe, pass@1, language, length, seconds)
STAGES = {
    "base": ({"kind": "pretrain", "task": "totals"}, 0.115, 0.87, 12.1, 62.3),
    "zero": ({"kind": "grpo", "from": "base"}, 0.974, 0.65, 27.4, 29.1),
    "cold_start": (
        {"kind": "sft", "from": "base", "data": [{"stage": "readable"}, {"task": "totals", "limit": 300}]},
        0.352,
        0.98,
        25.9,
        5.4,
    ),
    "readable": ({"kind": "reject", "from": "zero"}, None, None, None, 2.1),
    "reasoning_rl": ({"kind": "grpo", "from": "cold_start"}, 0.981, 1.0, 30.2, 30.4),
    "rejection": ({"kind": "reject", "from": "reasoning_rl"}, None, None, None, 2.9),
    "sft": ({"kind": "sft", "from": "base", "data": [{"stage": "rejection"}]}, 0.959, 0.99, 29.8, 8.2),
    "preference": ({"kind": "reward_model", "from": "sft"}, None, None, None, 1.6),
    "all_rl": ({"kind": "grpo", "from": "sft", "reward_model": "preference"}, 0.985, 1.0, 30.1, 33.7),
    "student_base": ({"kind": "pretrain", "task": "totals"}, 0.031, 0.71, 11.4, 24.8),
    "distill": (
        {"kind": "distill", "from": "student_base", "teacher": "all_rl", "data": [{"stage": "rejection"}]},
        0.605,
        0.97,
        28.8,
        12.9,
    ),
    "student_rl": ({"kind": "grpo", "from": "student_base"}, 0.050, 0.55, 9.3, 21.5),
}
RL = {"steps": 60, "prompts_per_step": 32, "group_size": 8, "reward_model": None}
RL["mix"] = [{"task": "totals", "start": 0.0, "rewards": {"accuracy": 1.0, "format": 0.2, "language": 0.2}}]
SETTINGS = {
    "pretrain": {"steps": 7500, "batch_tokens": 256},
    "grpo": RL,
    "reject": {"prompts": 600, "samples": 4, "general": [{"stage": None, "task": "general", "limit": 300}]},
    "sft": {"epochs": 2},
    "distill": {"epochs": 2},
    "reward_model": {"pairs": 1500, "epochs": 1},
}
RL_STEPS, SUPERVISED_LINES, PROBLEMS, SAMPLES = 60, 90, 256, 16
PROMPT = "{name} has {a} eggs . mon eats {b} tue buys {c} how many ?"
RIGHT = "<think> {a} mon - {b} = {m} good {m} tue + {c} = {t} good </think> <answer> {t} </answer>"
SLIP = "<think> {a} mon - {b} = {m} good {m} tue + {c} = {w} wait {t} good </think> <answer> {t} </answer>"
GUESS = "guess {w} answer : {w}"
OPEN = "<think> {a} mon - {b} = {w} {w} tue + {c} = {w} good <answer> {w} </answer>"
CHINESE = "<think> {a} 周一 - {b} = {m} 对 {m} 周二 + {c} = {t} 对 </think> <answer> {t} </answer>"


def write_run(directory: Path, *, seed: int = 0, finished: bool = True, completion: str | None = None) -> Path:
    """A run of STAGES. `finished=False`: killed in the third stage, in the middle of a line. `completion`: what every
    stage says to the first problem instead of the drawn text."""
    random = Random(seed)
    directory.mkdir(parents=True, exist_ok=True)
    blocks = {
        name: {**SETTINGS.get(stage[0]["kind"], {}), **stage[0], "evaluate": stage[1] is not None}
        for name, stage in STAGES.items()
    }
    blocks["all_rl"]["mix"] = [*RL["mix"], {"task": "general", "start": 0.75, "rewards": {"preference": 1.0}}]
    recipe = {
        "name": "tiny",
        "description": "The whole R1 recipe on generated stories, from scratch, on a CPU in minutes.",
        "seed": seed,
        "evaluation": {"sampling": {"temperature": 0.6, "top_p": 0.95}, "limit": PROBLEMS, "samples": SAMPLES},
        "stages": blocks,
    }
    (directory / "config.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    events: list[dict] = []
    samples: list[dict] = []
    records: list[dict] = []
    names = list(STAGES) if finished else ["base", "zero", "cold_start"]
    for name in names:
        whole = finished or name != "cold_start"
        records.append(_stage(name, events, samples, random, completion, whole))
    for record in records if finished else records[:-1]:
        path = directory / "stages" / record["name"] / "stage.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record), encoding="utf-8")
    text = "".join(json.dumps(event) + "\n" for event in events)
    (directory / "metrics.jsonl").write_text(text if finished else text + '{"event": "step", "sta', encoding="utf-8")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in samples)
    (directory / "samples.jsonl").write_text(text, encoding="utf-8")
    if finished:
        (directory / "summary.json").write_text(json.dumps(_summary(recipe, records)), encoding="utf-8")
    return directory


def _stage(name: str, events: list, samples: list, random: Random, completion: str | None, whole: bool) -> dict:
    block, score, language, length, seconds = STAGES[name]
    kind = block["kind"]
    events.append({"event": "stage", "stage": name, "kind": kind, "status": "started", "from": block.get("from")})
    before = STAGES[block["from"]] if "from" in block else None
    if kind == "grpo":
        _reinforce(name, events, random, before, (score, language, length, seconds), "reward_model" in block)
    elif kind == "reject":
        _step(events, name, kind, 600, 600, 9000, {"sample": seconds * 0.8, "score": seconds * 0.1})
    else:
        lines = SUPERVISED_LINES if whole else SUPERVISED_LINES // 3
        for line in range(1, lines + 1):
            loss = 0.35 + 2.6 * math.exp(-line / 14) + random.gauss(0, 0.04)
            extra = {"accuracy": min(1.0, 0.5 + line / 100)} if kind == "reward_model" else {}
            phases = {"learn": seconds * 0.75 / SUPERVISED_LINES}
            _step(events, name, kind, line * 20, SUPERVISED_LINES * 20, 5120, phases, loss=loss, **extra)
    evaluation = None
    if score is not None and whole:
        evaluation = _evaluation(score, language, length, random)
        events.append({"event": "evaluation", "stage": name, **evaluation})
        samples += list(_samples(name, score, Random(7), random, completion))
    if whole:
        events.append({"event": "stage", "stage": name, "kind": kind, "status": "finished", "seconds": seconds})
    note = {"reject": "kept 1,812 of 2,400 samples, 300 general rows added", "reward_model": "orders 96.8% of pairs"}
    start = block.get("from")
    return {
        **{"name": name, "kind": kind, "from": start, "seconds": seconds, "evaluation": evaluation},
        "note": note.get(kind, ""),
    }


def _step(events: list, stage: str, kind: str, step: int, steps: int, tokens: int, phases: dict, **more) -> None:
    rate = tokens / sum(phases.values())
    fixed = {"event": "step", "stage": stage, "kind": kind, "step": step, "steps": steps, "phase_seconds": phases}
    events.append({**fixed, "tokens": tokens, "tokens_per_second": rate, **more})


def _reinforce(name: str, events: list, random: Random, before: tuple, after: tuple, preference: bool) -> None:
    start = (before[1] or 0.1, before[2] or 0.8, before[3] or 20.0)
    for step in range(RL_STEPS + 1):
        rise = 1 / (1 + math.exp(-(step - 22) / 6))
        score, language, length = (a + (b - a) * rise for a, b in zip(start, after, strict=False))
        if step % 10 == 0:
            curve = {"pass@1": score, "cons@k": min(1.0, score * 1.3 + 0.05), "k": 16, "length": length, "seconds": 0.3}
            curve |= {"format": min(1.0, score + 0.02), "language": min(1.0, language)}
            events.append({"event": "curve", "stage": name, "step": step, **curve})
        if step == 0:
            continue
        noisy = max(0.0, min(1.0, score * 0.9 + random.gauss(0, 0.03)))
        rewards = {"accuracy": noisy, "format": min(1.0, 0.3 + rise * 0.7), "language": min(1.0, language)}
        if preference and step > 45:
            rewards["preference"] = 0.6 + random.gauss(0, 0.02)
        share = after[3] * 0.85 / RL_STEPS
        _step(
            events,
            name,
            "grpo",
            step,
            RL_STEPS,
            int(256 * length),
            {"sample": share * 0.45, "score": share * 0.08, "logprob": share * 0.05, "learn": share * 0.42},
            reward=noisy + 0.2 * rewards["format"],
            rewards=rewards,
            pass_rate=noisy,
            response_length=length + random.gauss(0, 0.8),
            truncated=max(0.0, 0.08 - 0.08 * rise),
            kl=0.0,
            entropy=0.9 - 0.75 * rise + random.gauss(0, 0.02),
            clip_fraction=max(0.0, 0.02 + random.gauss(0, 0.006)),
            grad_norm=0.8 + random.gauss(0, 0.15),
            loss=random.gauss(0, 0.01),
            learning_rate=6e-4,
            logprob_difference_mean=10 ** random.gauss(-7.2, 0.1),
            logprob_difference_max=10 ** random.gauss(-5.9, 0.15),
            groups_trained=32 if rise < 0.5 else 12,
        )


def _evaluation(score: float, language: float, length: float, random: Random) -> dict:
    half = 1.96 * math.sqrt(score * (1 - score) / PROBLEMS) * 0.8
    score += random.gauss(0, 0.004)
    score = min(1.0, max(0.0, score))
    return {
        **{"task": "totals", "problems": PROBLEMS, "samples": SAMPLES, "k": SAMPLES},
        **{"pass@1": score, "pass@1_low": max(0.0, score - half), "pass@1_high": min(1.0, score + half)},
        **{"cons@k": min(1.0, score * 1.1 + 0.02), "pass@1_t1": score * 0.94, "greedy": min(1.0, score * 1.02)},
        **{"format": min(1.0, score + 0.02), "language": language, "length": length, "truncated": 0.01, "errors": 0},
        **{"seconds": 3.4, "general": {"helpfulness": 0.4 + 0.5 * score, "refusal": 0.3 + 0.6 * score}},
    }


def _samples(stage: str, score: float, problems: Random, random: Random, completion: str | None):
    for index in range(8):
        a, b, c = problems.randint(10, 25), problems.randint(1, 9), problems.randint(1, 9)
        n = {"a": a, "b": b, "c": c, "m": a - b, "t": a - b + c, "w": a - b + c + problems.randint(1, 3)}
        right = random.random() < score
        form = random.choice([RIGHT, RIGHT, SLIP, CHINESE] if right else [GUESS, OPEN, GUESS])
        said = completion if completion is not None and index == 0 else form.format(**n)
        rewards = {"accuracy": float(right), "format": float(form not in (GUESS, OPEN))}
        rewards["language"] = float(form != CHINESE)
        row = {"stage": stage, "step": 60, "moment": "evaluation", "prompt": PROMPT.format(name="Mia", **n)}
        row |= {"answer": str(n["t"]), "completion": said, "reward": float(right), "rewards": rewards}
        yield {**row, "finish": "stop"}
    row = {"stage": stage, "step": 60, "moment": "train", "prompt": "of training", "answer": "1", "completion": "x"}
    yield {**row, "reward": 0.0, "rewards": {}, "finish": "stop"}


def _summary(recipe: dict, records: list[dict]) -> dict:
    score = {record["name"]: record["evaluation"]["pass@1"] for record in records if record["evaluation"]}
    gain = 100 * (score["zero"] - score["base"])
    ahead = 100 * (score["distill"] - score["student_rl"])
    checks = [
        (f"RL adds at least 25 points of pass@1: zero {score['zero']:.1%} from base {score['base']:.1%}", gain, True),
        ("cons@16 is at least pass@1 in most evaluations: in 9 of 9", 1.0, True),
        ("distilling beats RL alone in the same student: distill 60.5%, student_rl 5.0%", ahead, True),
        ("RL adds at least 25 points of pass@1: student_rl 5.0% from student_base 3.1%", 1.9, False),
    ]
    return {
        **{"recipe": recipe["name"], "description": recipe["description"], "seed": recipe["seed"], "seconds": 236.4},
        **{"machine": "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "threads": 2, "torch": "2.13.0+cpu"},
        "stages": records,
        "checks": [{"claim": claim, "value": value, "holds": holds} for claim, value, holds in checks],
        "phase_seconds": {"sample": 60.1, "learn": 130.2},
        "tokens_per_second": {"sample": 7512.0, "learn": 5210.0},
    }


if __name__ == "__main__":
    print(write_run(Path(sys.argv[1]), finished="--partial" not in sys.argv))
