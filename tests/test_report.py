"""The report of a run: the page says what the files say, shows what a model wrote without running it, and reads a run
that was killed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from synthetic_run import STAGES, write_run

from r1fast.config import UserError
from r1fast.report import markdown_table, write_picture, write_report
from r1fast.report.__main__ import main
from r1fast.report.charts import Line, Panel, downsample, line_chart, trend
from r1fast.report.layers import place
from r1fast.report.markup import tag
from r1fast.report.run import load
from r1fast.report.scale import duration, linear, logarithmic, percent, short
from r1fast.report.spread import spread, within
from r1fast.report.tables import phase_seconds

ATTACK = (
    "<think> 1 </think><script>document.title='ran'</script><img src=x onerror=\"document.title='ran'\"> &amp; </p>"
)


class Page(HTMLParser):
    """What a browser would see: elements with their attributes, the text of each section, and unclosed elements."""

    def __init__(self, html: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.sections: dict[str, str] = {}
        self.text = ""
        self._open: list[str] = []
        self._section = ""
        self.feed(html)
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, name, attributes):
        attributes = dict(attributes)
        self.elements.append((name, attributes))
        if name == "section" and attributes.get("class") == "part":
            self._section = attributes["id"]
            self.sections[self._section] = ""
        self._open.append(name)  # the page writes elements without children as <x/>

    def handle_startendtag(self, name, attributes):
        self.elements.append((name, dict(attributes)))

    def handle_endtag(self, name):
        assert self._open.pop() == name

    def handle_data(self, data):
        if self._open and self._open[-1] in ("script", "style"):
            return
        self.text += data
        if self._section:
            self.sections[self._section] += data

    def named(self, name: str, **attributes: str) -> list[dict]:
        return [a for n, a in self.elements if n == name and all(a.get(k) == v for k, v in attributes.items())]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    run = write_run(tmp_path_factory.mktemp("run"), completion=ATTACK)
    write_report(run)  # here, so that no test waits for another one to write it
    return run


@pytest.fixture(scope="module")
def page(run_dir) -> Page:
    return Page((run_dir / "report.html").read_text(encoding="utf-8"))


# -- the page -------------------------------------------------------------------------------------------------------


def test_every_section_is_there_and_linked(page):
    expected = ["recipe", "curves", "losses", "stages", "time", "transcripts", "limits", "settings"]
    assert list(page.sections) == expected
    assert [a["href"] for a in page.named("a")] == [f"#{name}" for name in expected]
    assert "tiny" in page.text and "Xeon" in page.text and "3 min 56 s" in page.text


def test_the_page_is_self_contained_and_small(run_dir, page):
    for name, attributes in page.elements:
        for key in ("src", "srcset", "href", "action"):
            assert attributes.get(key, "#").startswith("#"), (name, attributes)
    style = (run_dir / "report.html").read_text().split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style
    assert (run_dir / "report.html").stat().st_size < 1_500_000
    assert not list(run_dir.glob("*.part"))


def test_the_table_holds_the_numbers_of_stage_json(run_dir):
    table = (run_dir / "report.html").read_text(encoding="utf-8").split('id="stages"')[1].split("</table>")[0]
    rows = dict(re.findall(r'<tr data-stage="(\w+)">(.*?)</tr>', table))
    assert list(rows) == list(STAGES)
    for name, row in rows.items():
        record = json.loads((run_dir / "stages" / name / "stage.json").read_text())
        cells = {
            key: (value, shown) for value, key, shown in re.findall(r'value="(.*?)" data-key="(.*?)">([^<]*)', row)
        }
        assert float(cells["seconds"][0]) == record["seconds"]
        evaluation = record["evaluation"]
        if evaluation is None:
            assert record["note"] in row
            continue
        for key in ("pass@1", "pass@1_t1", "greedy", "cons@k", "format", "language", "length"):
            assert float(cells[key][0]) == evaluation[key]
            written = f"{evaluation[key]:.1f}" if key == "length" else f"{100 * evaluation[key]:.1f}%"
            assert cells[key][1].strip() == written
        for measure, value in evaluation["general"].items():
            assert float(cells[f"general.{measure}"][0]) == value
        assert f"{100 * evaluation['pass@1_low']:.1f}–{100 * evaluation['pass@1_high']:.1f}" in row


def test_claims_say_whether_they_hold(run_dir, page):
    checks = json.loads((run_dir / "summary.json").read_text())["checks"]
    assert page.text.count("✓ holds") == sum(check["holds"] for check in checks) == 3
    assert page.text.count("✗ does not hold") == 1
    for check in checks:
        assert check["claim"] in page.text


def test_the_sentence_compares_start_end_and_students(run_dir, page):
    run = load(run_dir)
    scores = {name: f"{100 * s.evaluation['pass@1']:.1f}%" for name, s in run.stages.items() if s.evaluation}
    said = page.text.split("pass@1 on 256")[1].split("The whole")[0]
    assert re.findall(r"[\d.]+%", said) == [scores[n] for n in ("base", "all_rl", "distill", "student_rl")]


def test_curves_draw_every_rl_stage(page):
    labels = [a["data-label"] for a in page.named("polyline") if "data-label" in a]
    assert labels.count("pass@1") == labels.count("cons@16") == 4
    for stage in ("zero", "reasoning_rl", "all_rl", "student_rl"):
        assert labels.count(stage) >= 8
    assert labels.count("loss") == 6
    for title in ("Response length", "Reward: accuracy", "Reward: language", "Entropy", "Clip fraction"):
        assert title in page.sections["curves"]
    assert "Not drawn" in page.sections["curves"] and "KL" in page.sections["curves"]  # the run has no KL term


def test_the_picture_shows_where_each_stage_starts(run_dir):
    links = {(link.source, link.target, link.kind) for link in load(run_dir).links}
    assert {("base", "sft", "from"), ("base", "zero", "from"), ("base", "cold_start", "from")} <= links
    assert ("rejection", "sft", "data") in links and ("preference", "all_rl", "reward model") in links
    html = (run_dir / "report.html").read_text(encoding="utf-8")
    assert html.count('class="link ') == len(links) + 4  # and the four lines of the legend
    assert "sft starts from these weights: base" in html


def test_transcripts_are_the_first_problems_of_every_column(run_dir, page):
    first = [row["prompt"] for row in load(run_dir).samples if row["stage"] == "base"][:5]
    assert len(first) == 5
    shown = page.sections["transcripts"]
    assert [shown.count(prompt) for prompt in first] == [1] * 5
    assert "of training" not in shown and "the first problems of the test split" in shown
    for stage in ("base", "zero", "reasoning_rl", "all_rl", "distill"):
        assert shown.count(stage) == 5
    assert shown.count("✓ correct") + shown.count("✗ incorrect") == 25


def test_what_a_model_wrote_is_shown_and_not_run(run_dir, page):
    assert page.sections["transcripts"].count(ATTACK) == 5  # whole, as text
    assert len(page.named("script")) == 1 and not page.named("img")
    assert not [a for _, a in page.elements if any(key.startswith("on") for key in a)]
    policy = page.named("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy


def test_endless_completions_are_shortened_and_said_so(tmp_path):
    page = Page(write_report(write_run(tmp_path, completion="<think> " + "9 " * 60_000 + "</think> end")).read_text())
    assert page.sections["transcripts"].count("[… 110,020 characters left out …]") == 5
    assert page.sections["transcripts"].count("</think> end") == 5
    assert (tmp_path / "report.html").stat().st_size < 1_500_000


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here to open the page in")
def test_a_browser_runs_the_pages_own_script_and_no_other(run_dir, tmp_path):
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    command = ["chromium", *flags.split(), "--disable-component-update", "--disable-sync", "--virtual-time-budget=2000"]
    command += [f"--user-data-dir={tmp_path}", "--dump-dom", (run_dir / "report.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    assert "<title>tiny · r1fast report</title>" in dom  # the attack sets another
    assert '<div id="tip"' in dom  # which the page's own script makes
    assert "&lt;script&gt;document.title" in dom


def test_hostile_names_and_settings_are_escaped(tmp_path):
    run = write_run(tmp_path)
    recipe = yaml.safe_load((run / "config.yaml").read_text())
    recipe |= {"name": "<b>x</b>", "description": "</main><script>1</script>"}
    (run / "config.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert "<b>x</b>" in page.text and len(page.named("script")) == 1
    assert "</main><script>1</script>" in page.sections["settings"]


def test_a_killed_run_is_reported_as_such(tmp_path):
    run = write_run(tmp_path, finished=False)  # metrics.jsonl ends in the middle of a line
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert "has not finished: 2 of 12 stages are done" in page.text
    assert "cold_start was at step 600 of 1800" in page.text
    assert "✓ holds" not in page.text and "not run yet" in page.sections["stages"]
    assert "interrupted" in page.sections["stages"]
    assert f"{100 * load(run).stages['zero'].evaluation['pass@1']:.1f}%" in page.sections["stages"]


def test_a_run_that_has_just_begun_has_a_page(tmp_path):
    run = write_run(tmp_path, finished=False)
    shutil.rmtree(run / "stages")
    (run / "samples.jsonl").unlink()
    (run / "metrics.jsonl").write_text("")
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert "0 of 12 stages" in page.text and "No stage has been evaluated yet." in page.text
    assert "curves" not in page.sections and "recipe" in page.sections


def test_a_run_from_a_checkpoint_says_nothing_of_a_corpus(tmp_path):
    run = write_run(tmp_path)
    recipe = yaml.safe_load((run / "config.yaml").read_text())
    for name in ("base", "student_base"):
        recipe["stages"][name] = {"kind": "evaluate", "from": "model"}
    (run / "config.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert "limits" not in page.sections
    assert "checkpoint" in page.sections["recipe"]  # the box that `model` gets


def test_null_numbers_leave_gaps_and_not_errors(tmp_path):
    run = write_run(tmp_path)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    for event in events:
        if event["event"] == "step" and event["step"] % 2:
            event |= {"entropy": None, "response_length": None, "rewards": {"accuracy": None}}
    (run / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    labels = [a for a in Page(write_report(run).read_text()).named("polyline") if a.get("data-label") == "zero"]
    assert min(len(a["data-x"].split(",")) for a in labels) >= 7
    assert all("nan" not in a["points"] and "None" not in a["points"] for a in labels)


@pytest.mark.parametrize("missing", ["config.yaml", "metrics.jsonl", "."])
def test_what_is_no_run_directory_is_refused(tmp_path, missing, capsys):
    run = write_run(tmp_path / "run")
    shutil.rmtree(run) if missing == "." else (run / missing).unlink()
    with pytest.raises(UserError, match=re.escape(str(run))):
        write_report(run)
    assert main([str(run)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("metrics.jsonl", '{"event": "x"}\n{"event": \n{}\n', "line 2"),
        ("metrics.jsonl", '{"event": "x"}\n[1]\n', "line 2"),
        ("config.yaml", "stages: [", "config.yaml"),
        ("config.yaml", "name: x\n", "config.yaml"),
        ("summary.json", "{", "summary.json"),
    ],
)
def test_a_broken_file_is_named(tmp_path, name, content, where):
    run = write_run(tmp_path)
    (run / name).write_text(content)
    with pytest.raises(UserError, match=where):
        write_report(run)


def test_phases_add_up_to_the_stages_seconds(run_dir):
    for stage in load(run_dir).stages.values():
        seconds = phase_seconds(stage)
        assert sum(seconds.values()) >= stage.seconds - 1e-9
        if stage.kind == "grpo":
            assert seconds["sample"] == pytest.approx(0.45 * 0.85 * stage.seconds)
            assert seconds["evaluate"] == pytest.approx(3.4 + 7 * 0.3)


# -- for the README -------------------------------------------------------------------------------------------------


def test_markdown_gives_medians_and_ranges(tmp_path):
    runs = [write_run(tmp_path / str(seed), seed=seed) for seed in range(3)]
    scores = sorted(100 * load(run).stages["zero"].evaluation["pass@1"] for run in runs)
    table = markdown_table(runs)
    lines = table.splitlines()
    assert lines[0].startswith("| stage | kind | from | pass@1 | T = 1 | greedy | cons@16 |")
    row = next(line for line in lines if line.startswith("| `zero`"))
    assert f"| {scores[1]:.1f}% ({scores[0]:.1f}–{scores[2]:.1f}) |" in row
    assert len({line.count("|") for line in lines[: 2 + len(STAGES)]}) == 1
    assert "Median and (range) over the seeds 0, 1, 2; 256 test problems." in table
    assert "| RL adds at least 25 points of pass@1 (`zero`, `base`) |" in table and "| 3 of 3 |" in table
    assert "| RL adds at least 25 points of pass@1 (`student_rl`, `student_base`) | 1.9 | 0 of 3 |" in table


def test_markdown_refuses_runs_that_do_not_compare(tmp_path):
    whole, killed = write_run(tmp_path / "a"), write_run(tmp_path / "b", finished=False)
    with pytest.raises(UserError, match="has not finished"):
        markdown_table([whole, killed])
    other = write_run(tmp_path / "c")
    recipe = yaml.safe_load((other / "config.yaml").read_text())
    del recipe["stages"]["student_rl"]
    (other / "config.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    with pytest.raises(UserError, match="not those of"):
        markdown_table([whole, other])


@pytest.mark.parametrize("arguments", [[], ["--nonsense"], ["run", "--picture", "gone/curves.png"]])
def test_bad_arguments_are_one_sentence(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run")
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def test_the_command_prints_the_table_and_writes_the_picture(run_dir, tmp_path, capsys):
    assert main(["--markdown", str(run_dir)]) == 0
    assert capsys.readouterr().out == markdown_table([run_dir]) + "\n"
    assert main(["--picture", str(tmp_path / "curves.png"), str(run_dir)]) == 0
    image = (tmp_path / "curves.png").read_bytes()
    assert image.startswith(b"\x89PNG") and 20_000 < len(image) < 400_000


def test_the_svg_picture_names_every_rl_stage(run_dir, tmp_path):
    root = ElementTree.parse(write_picture(run_dir, tmp_path / "curves.svg")).getroot()
    words = "".join(root.itertext())
    for word in ("zero", "reasoning_rl", "all_rl", "student_rl", "cons@16", "response length"):
        assert word in words
    with pytest.raises(UserError, match=r"\.png or a \.svg"):
        write_picture(run_dir, tmp_path / "curves.jpg")


# -- parts ----------------------------------------------------------------------------------------------------------


def test_tag_escapes_children_and_attributes():
    assert tag("p", "<&", tag("b", '"'), title='"><script>') == (
        '<p title="&quot;&gt;&lt;script&gt;">&lt;&amp;<b>&quot;</b></p>'
    )
    assert tag("rect", x=1.25, y=2.0, class_="a", hidden=False, data_x=None) == '<rect x="1.2" y="2" class="a"/>'


def test_spread_is_the_nearest_arrangement_without_overlap():
    assert spread([0, 10, 20], [5, 5]) == [0, 10, 20]
    assert spread([10, 10], [4]) == [8, 12]
    assert spread([0, 0], [10], [1e9, 1])[0] == pytest.approx(0, abs=1e-6)
    placed = spread([5, 3, 3.5, 40], [10, 10, 10])
    assert all(b - a >= 10 - 1e-9 for a, b in pairwise(placed)) and placed[3] == 40
    assert sum(placed[:3]) / 3 == pytest.approx((5 + 3 + 3.5) / 3)
    assert within([-5, 5], 0, 100) == [0, 10] and within([95, 105], 0, 100) == [90, 100]


def test_scales_end_on_ticks():
    assert linear([0, 0.93], 0, 1).ticks == pytest.approx((0, 0.25, 0.5, 0.75, 1.0))
    assert linear([3.0, 3.0], 0, 1)(3.0) == 0.5
    log = logarithmic([3e-8, 2e-6], 0.0, 1.0)
    assert (log.low, log.high) == pytest.approx((1e-8, 1e-5)) and log(1e-8) == 0 and log(1e-5) == pytest.approx(1)


def test_numbers_are_written_short():
    written = {0: "0", 0.0123: "0.0123", 27.34: "27.3", 1234: "1234", 75321: "75.3k", 2e-7: "2e-7", -1.5: "-1.5"}
    assert {value: short(value) for value in written} == written
    assert percent(0.97412) == "97.4%"
    seconds = {4.24: "4.2 s", 59.6: "60 s", 283: "4 min 43 s", 7530: "2 h 05 min"}
    assert {value: duration(value) for value in seconds} == seconds


def test_trend_keeps_straight_lines_and_downsampling_keeps_means():
    ramp = [(float(x), 2.0 * x + 1) for x in range(60)]
    assert [y for _, y in trend(ramp)] == pytest.approx([y for _, y in ramp])
    noise = [(float(x), (-1.0) ** x) for x in range(60)]
    assert max(abs(y) for _, y in trend(noise)[5:-5]) < 0.3
    few = downsample([(float(x), float(x % 7)) for x in range(7500)], 240)
    assert len(few) == 240 and sum(y for _, y in few) / 240 == pytest.approx(3.0, abs=0.05)


def test_a_chart_of_nothing_is_nothing():
    assert line_chart(Panel("x"), [Line("a", [1, 2], [0.0, 0.0], "")]) == ""
    assert line_chart(Panel("x"), [Line("a", [1], [2.0], "")]) == ""
    assert line_chart(Panel("x", log=True), [Line("a", [1, 2], [0.0, 1.0], "")]) == ""


def test_layout_puts_stages_behind_what_they_need_and_apart():
    nodes = ["base", "zero", "rows", "sft", "small", "distill", "alone"]
    edges = [("base", "zero"), ("zero", "rows"), ("base", "sft"), ("rows", "sft"), ("rows", "distill")]
    edges += [("small", "distill"), ("small", "alone")]
    placed = place(nodes, edges, size=100, bead=8, gap=10)
    layer = {name: where for name, (where, _) in placed.nodes.items()}
    assert all(layer[a] < layer[b] for a, b in edges) and placed.layers == 4
    assert layer["small"] == 2 and layer["alone"] == 3  # moved to where they are needed
    assert len({round(placed.nodes[name][1], 2) for name in ("base", "zero", "rows")}) == 1  # one straight line
    beads = [(where, cross, 8) for route in placed.routes for where, cross in route]
    items = [*((where, cross, 100) for where, cross in placed.nodes.values()), *beads]
    for i, (where, cross, size) in enumerate(items):
        for other, beside, extent in items[:i]:
            assert where != other or abs(cross - beside) >= (size + extent) / 2 + 10 - 1e-3
