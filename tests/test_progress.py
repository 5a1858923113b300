"""What the person who waits sees, in a pipe and in a terminal."""

import io

import pytest
from rich.console import Console

from r1fast import progress
from r1fast.progress import BLOCKS, CURVE_POINTS, Curve, LiveProgress, PlainProgress, clock, shown


def test_a_curve_keeps_its_shape_in_bounded_space():
    curve = Curve()
    for step in range(100_000):
        curve.add(step / 100_000)
    drawn = curve.draw()
    assert len(curve.values) <= 2 * CURVE_POINTS and CURVE_POINTS / 2 <= len(drawn) <= CURVE_POINTS
    heights = [BLOCKS.index(c) for c in drawn]
    assert heights == sorted(heights) and set(heights) == set(range(len(BLOCKS)))


def test_a_curve_of_few_or_equal_or_missing_values():
    curve = Curve()
    assert curve.draw() == ""
    for value in (1.0, float("nan"), 1.0):
        curve.add(value)
    assert curve.draw() == BLOCKS[0] * 2
    curve.add(2.0)
    assert curve.draw() == BLOCKS[0] * 2 + BLOCKS[-1]


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("loss", 1.23456, "loss 1.235"),
        ("pass_rate", 0.875, "pass rate 88%"),
        ("response_length", 27.4, "response length 27"),
        ("learning_rate", 6e-4, "lr 6.0e-04"),
        ("tokens", 12345.0, "tokens 12,345"),
    ],
)
def test_numbers_as_a_person_reads_them(name, value, text):
    assert shown(name, value) == text


def test_clock():
    assert [clock(s) for s in (0, 59.6, 61, 3700)] == ["0:00", "1:00", "1:01", "1:01:40"]


def run_stages(shown_by) -> None:
    with shown_by:
        shown_by.stage("base", "pretrain", 40)
        for step in range(1, 41):
            shown_by.update(step, loss=4.0 / step, learning_rate=1e-3)
        shown_by.note("evaluating")
        shown_by.finish("pass@1 12.0%")
        shown_by.stage("rows", "reject", 0)
        shown_by.finish("kept 3 of 4 (reused)")


def test_plain_lines_say_all_that_matters(monkeypatch):
    told = io.StringIO()
    run_stages(PlainProgress(["base", "rows"], file=told))
    lines = told.getvalue().splitlines()
    assert lines[0] == "[1/2] base (pretrain): 40 steps"
    assert lines[1].startswith("✓ base  0:00  pass@1 12.0%  █") and lines[1].endswith("▁")
    assert lines[2] == "✓ rows  0:00  kept 3 of 4 (reused)" and len(lines) == 3  # forty steps in no time: no more lines
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
    told = io.StringIO()
    run_stages(PlainProgress(["base", "rows"], file=told))
    assert "base 20/40  loss 0.200  lr 1.0e-03  0:00 left" in told.getvalue()


def test_the_live_display_leaves_a_line_for_each_finished_stage():
    told = io.StringIO()
    run_stages(LiveProgress(["base", "rows"], Console(file=told, force_terminal=True, width=100, color_system=None)))
    assert "✓ base" in told.getvalue() and "pass@1 12.0%" in told.getvalue() and "loss █" in told.getvalue()
    assert "✓ rows" in told.getvalue() and "kept 3 of 4 (reused)" in told.getvalue()


def test_what_the_live_display_draws():
    live = LiveProgress(["base", "rows"], Console(width=100))
    live.stage("base", "pretrain", 40)
    live.update(20, loss=0.5, learning_rate=1e-3)
    live.note("evaluating")
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(live._draw())
    drawn = console.export_text()
    for words in ("1/2 base pretrain", "20/40", "0:00 left", "evaluating", "loss 0.500", BLOCKS[0]):
        assert words in drawn
