"""The report: one HTML file that says what ran, what came out, and what it does not show. No network, no library."""

from __future__ import annotations

import hashlib
import os
from base64 import b64encode
from pathlib import Path

from r1fast.report import curves, dag, tables, transcripts
from r1fast.report.markup import Html, raw, tag
from r1fast.report.run import Run, StageRecord, load, number
from r1fast.report.scale import duration, percent, short

HERE = Path(__file__).parent


def write_report(run_dir: Path) -> Path:
    """Writes RUN_DIR/report.html, whole or not at all, and returns its path. UserError: not a run directory."""
    path = Path(run_dir) / "report.html"
    content = render(load(Path(run_dir)))
    temporary = path.with_suffix(".html.part")
    temporary.write_text(content, encoding="utf-8")
    os.replace(temporary, path)
    return path


def render(run: Run) -> str:
    """The page. Only its own script may run (by hash) and nothing may be fetched: a missed escape would do nothing."""
    style = raw((HERE / "page.css").read_text(encoding="utf-8"))
    script = raw((HERE / "page.js").read_text(encoding="utf-8"))
    digest = b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:"
    parts = _parts(run)
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{run.recipe} · r1fast report"),
        tag("style", style),
    )
    body = [_header(run, parts)]
    body += [tag("section", tag("h2", heading), content, class_="part", id=name) for name, heading, content in parts]
    page = tag("html", head, tag("body", tag("main", body), tag("script", script)), lang="en")
    return f"<!doctype html>\n{page}\n"


def _parts(run: Run) -> list[tuple[str, str, Html]]:
    parts = [("recipe", "The recipe", tag("div", tag("p", _how_recipe(run), class_="how"), dag.picture(run)))]
    parts += curves.sections(run)
    parts.append(("stages", "The stages", tag("div", _protocol(run), tables.stage_table(run))))
    parts.append(("time", "Where the time went", tables.time_section(run)))
    parts.append(("transcripts", "Before and after", transcripts.section(run)))
    if run.from_scratch:
        parts.append(("limits", "What this does not show", _limits(run)))
    settings = tag("details", tag("summary", "config.yaml, complete"), tag("pre", run.config_text))
    parts.append(("settings", "Settings", settings))
    return parts


# -- the top of the page --------------------------------------------------------------------------------------------


def _header(run: Run, parts: list[tuple[str, str, Html]]) -> Html:
    return tag(
        "header",
        tag("p", "r1fast run report", class_="overline"),
        tag("h1", run.recipe),
        None if run.finished else _partial(run),
        tag("p", sentence(run), class_="lead"),
        tag("p", run.description, class_="description") if run.description else None,
        _facts(run),
        _checks(run),
        tag("nav", [tag("a", heading, href=f"#{name}") for name, heading, _ in parts], aria_label="Sections"),
    )


def sentence(run: Run) -> Html:
    """What came out, in one sentence, from the evaluations alone."""
    line = run.main_line()
    if not line:
        return tag("span", "No stage has been evaluated yet.")
    problems = number(line[-1].evaluation, "problems")
    among = f"{problems:.0f} held-out problems" if problems else "held-out problems"
    first, last = line[0], line[-1]
    if first is last:
        return tag("span", "pass@1 on ", among, " is ", _pass(first), " after ", _named(first), ".")
    said = ["pass@1 on ", among, " went from ", _pass(first), " (", _named(first), ") to "]
    said += [_pass(last), " (", _named(last), ")"]
    for student in run.of_kind("distill"):
        if not student.evaluation:
            continue
        said += ["; the distilled student reaches ", _pass(student)]
        rivals = [s for s in run.of_kind("grpo") if s.start == student.start and s.evaluation and s not in line]
        if rivals:
            said += [", the same student by RL alone ", _pass(rivals[0])]
    return tag("span", said, ".")


def _pass(stage: StageRecord) -> Html:
    return tag("b", percent(number(stage.evaluation, "pass@1") or 0.0))


def _named(stage: StageRecord) -> Html:
    return tag("code", stage.name)


def _partial(run: Run) -> Html:
    done = sum(stage.done for stage in run.stages.values())
    words = f"This run has not finished: {done} of {len(run.stages)} stages are done."
    for stage in run.stages.values():
        if stage.status == "started" and stage.steps:
            last = stage.steps[max(stage.steps)]
            words += f" {stage.name} was at step {last['step']} of {last.get('steps', '?')}."
    words += " What follows is what had been measured when this page was written."
    return tag("p", words, class_="partial", role="note")


def _facts(run: Run) -> Html:
    summary = run.summary or {}
    seconds = number(summary, "seconds")
    facts = {
        "Time": duration(seconds) if seconds is not None else None,
        "Machine": summary.get("machine"),
        "CPU threads": summary.get("threads"),
        "torch": summary.get("torch"),
        "Seed": run.seed,
    }
    pairs = [tag("div", tag("dt", k), tag("dd", v)) for k, v in facts.items() if v is not None]
    return tag("dl", pairs, class_="facts")


def _checks(run: Run) -> Html | None:
    """The measured claims; one that does not hold is said as plainly as one that does."""
    checks = (run.summary or {}).get("checks") or []
    if not checks:
        return None
    rows = []
    for check in checks:
        holds, value = bool(check["holds"]), check["value"]
        words = tag("span", "✓ holds" if holds else "✗ does not hold", class_=f"verdict {'yes' if holds else 'no'}")
        written = value if isinstance(value, str) else short(float(value)) if value is not None else "–"
        written = f"{written} {check['unit']}" if check.get("unit") else written
        rows.append(tag("li", words, tag("span", check["claim"], class_="claim"), tag("span", written, class_="value")))
    return tag("ul", rows, class_="checks", aria_label="Measured claims")


# -- words ----------------------------------------------------------------------------------------------------------


def _how_recipe(run: Run) -> str:
    words = "A box is a stage, with its pass@1 on the test problems. A solid arrow means: starts from these weights."
    restarts = [s for s in run.of_kind("sft") if s.start and run.root(s.name) == s.start]
    if len(restarts) > 1:
        names = " and ".join(s.name for s in restarts)
        words += (
            f" Both {names} start from {restarts[0].start}, as in the paper: RL hands on its rows, not its weights."
        )
    return words


def _protocol(run: Run) -> Html:
    evaluation = next((s.evaluation for s in run.stages.values() if s.evaluation), None)
    if evaluation is None:
        return tag("p", "No stage has been evaluated yet.", class_="how")
    sampling = ((run.config.get("evaluation") or {}).get("sampling")) or {}
    at = ", ".join(
        f"{words} {sampling[key]:g}"
        for key, words in (("temperature", "temperature"), ("top_p", "top-p"))
        if isinstance(sampling.get(key), (int, float))
    )
    said = (
        f"{evaluation['problems']} test problems of the task {evaluation['task']}, {evaluation['samples']} samples each"
        f"{f' at {at}' if at else ''}. The interval beside pass@1 is the 95% bootstrap over problems of this one run; "
        "another seed moves the numbers too."
    )
    errors = sum(int(number(s.evaluation, "errors") or 0) for s in run.stages.values() if s.evaluation)
    if errors:
        said += f" The verifier itself failed on {errors} completions; these are not counted as wrong answers."
    return tag("p", said, class_="how")


def _limits(run: Run) -> Html:
    points = [
        "Nothing here is invented by RL. The base was pretrained on a generated corpus that already holds tagged, "
        "longer and self-checking answers; RL selects them. At this size, growth in length and change of style are "
        "selection.",
        "There is no “aha” to be seen. Words that correct a slip come from the corpus too; when this recipe was made "
        "they became rarer, not more frequent, as the slips vanished.",
        "A model this small knows its generated world and nothing else; the numbers say that the recipe works, "
        "not how well a language model reasons.",
        "This is one run with one seed. Differences of a few points between runs are ordinary.",
    ]
    if overlap := _overlapping(run):
        names = " and ".join(filter(None, [", ".join(stage.name for stage in overlap[:-1]), overlap[-1].name]))
        points.insert(
            2,
            f"Where intervals of pass@1 overlap, accuracy differs by noise; here those of {names} do. Language "
            "consistency and the answers to general prompts are what tell late stages apart.",
        )
    return tag("ul", [tag("li", point) for point in points], class_="limits")


def _overlapping(run: Run) -> list[StageRecord]:
    """Stages of the main line, beside its last, whose pass@1 interval meets the last one's."""
    line = run.main_line()
    if len(line) < 2:
        return []
    low, high = (number(line[-1].evaluation, f"pass@1_{end}") for end in ("low", "high"))
    if low is None or high is None:
        return []

    def meets(stage: StageRecord) -> bool:
        a, b = (number(stage.evaluation, f"pass@1_{end}") for end in ("low", "high"))
        return a is not None and b is not None and a <= high and low <= b

    near = [stage for stage in line if meets(stage)]
    return near if len(near) > 1 else []
