"""Curves: points lie where their values are, whatever the values."""

import json
import re
from html import unescape

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssd.report.chart import HEIGHT, WIDTH, Line, chart, line_of, short, ticks, value_range


def points(markup: str) -> list[tuple[float, float]]:
    (found,) = re.findall(r'<polyline class="line run-0" points="([^"]*)"', markup)
    return [tuple(map(float, pair.split(","))) for pair in found.split()]


def test_points_stand_in_proportion():
    markup = chart([Line("a", 0, [0, 10, 40], [0.0, 1.0, 4.0])], "x")
    (x0, y0), (x1, y1), (x2, y2) = points(markup)
    assert x1 - x0 == pytest.approx((x2 - x0) / 4, abs=0.1) and y0 - y1 == pytest.approx((y0 - y2) / 4, abs=0.1)
    assert y0 > y2, "up is more"


def test_what_the_script_shows_is_in_the_markup_with_its_unit():
    markup = chart([Line("a <b>", 3, [9, 19], [0.5, 0.912])], "kNN", "%")
    (data,) = json.loads(unescape(re.findall(r'data-points="([^"]*)"', markup)[0]))
    assert data["name"] == "a <b>" and data["text"] == ["50 %", "91.2 %"] and data["steps"] == [9, 19]
    assert "91.2 %</b>" in markup and "<b>" not in data["name"].replace("a <b>", "")


def test_seeds_are_a_mean_in_a_band_over_the_steps_that_all_have():
    line = line_of("a", 0, [{0: 1.0, 5: 2.0, 9: 7.0}, {0: 3.0, 5: 2.0}])
    assert (line.steps, line.values, line.low, line.high) == ([0, 5], [2.0, 2.0], [1.0, 2.0], [3.0, 2.0])
    assert '<polygon class="band run-0"' in chart([line], "x") and "(1 to 3)" in chart([line], "x")
    assert line_of("a", 0, [{1: 1.0}, {2: 1.0}]) is None and line_of("a", 0, []) is None
    assert line_of("a", 0, [{0: float("nan"), 1: 2.0}]).steps == [1]


def test_long_runs_are_thinned_with_their_ends():
    line = line_of("a", 0, [{step: 0.0 for step in range(0, 100_000, 10)}])
    assert len(line.steps) == 240 and (line.steps[0], line.steps[-1]) == (0, 99_990)


def test_a_single_spike_does_not_flatten_all_other_values():
    low, high = value_range([1.0 + 0.01 * n for n in range(200)] + [1e6])
    assert high < 4 and low == pytest.approx(1.0, abs=0.05)
    assert value_range([1.0, 2.0, 50.0]) == (1.0, 50.0), "a few values are all shown"


@given(low=st.floats(-1e6, 1e6), width=st.floats(1e-6, 1e6))
def test_ticks_are_round_few_and_span_the_values(low, width):
    high = low + width
    marks = ticks(low, high)
    assert 2 <= len(marks) <= 7
    slack = 1e-6 * max(1.0, abs(low), abs(high))
    assert marks[0] <= low + slack and marks[-1] >= high - slack


@given(values=st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=30))
def test_every_point_lies_inside_the_chart(values):
    markup = chart([Line("a", 0, list(range(len(values))), values)], "x")
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in points(markup))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1.5, "1.5"),
        (99, "99"),
        (99.24, "99.2"),
        (100, "100"),
        (0.00012, "0.00012"),
        (1234.6, "1,235"),
        (-0.25, "-0.25"),
    ],
)
def test_numbers_are_short(value, text):
    assert short(value) == text
