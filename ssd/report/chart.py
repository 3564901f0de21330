"""Curves as SVG: one chart a number, one line a run or a band over the seeds of one."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 340, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 24
MOST_POINTS = 240
CLIPPED = 0.01  # share of the values at each end that may lie outside, where they would flatten all others


@dataclass
class Line:
    """Values over steps; `low` and `high` where they are the mean of several seeds."""

    name: str
    colour: int
    steps: list[int]
    values: list[float]
    low: list[float] | None = None
    high: list[float] | None = None


def line_of(name: str, colour: int, series: Sequence[dict[int, float]]) -> Line | None:
    """Of one run or of several seeds: their mean over the steps that all of them have. None where there are no values."""
    steps = sorted(set.intersection(*(set(one) for one in series))) if series else []
    steps = [step for step in steps if all(math.isfinite(one[step]) for one in series)]
    if not steps:
        return None
    steps = thinned(steps)
    columns = [[one[step] for one in series] for step in steps]
    line = Line(name, colour, steps, [sum(column) / len(column) for column in columns])
    if len(series) > 1:
        line.low, line.high = [min(column) for column in columns], [max(column) for column in columns]
    return line


def thinned(steps: list[int]) -> list[int]:
    """At most so many, the first and the last among them."""
    if len(steps) <= MOST_POINTS:
        return steps
    last = len(steps) - 1
    return [steps[round(place * last / (MOST_POINTS - 1))] for place in range(MOST_POINTS)]


def chart(lines: Sequence[Line], title: str, unit: str = "") -> str:
    """One chart with its heading; `unit` "%" shows shares in percent. Points are in the markup for the page's script, and
    the last value of each line stands in its heading, for readers without it."""
    factor = 100.0 if unit == "%" else 1.0
    ends = [step for line in lines for step in (line.steps[0], line.steps[-1])]
    first, last = min(ends), max(ends)
    values = [factor * value for line in lines for part in (line.values, line.low, line.high) for value in part or ()]
    low, high = value_range(values)
    marks = ticks(low, high)
    low, high = min(low, marks[0]), max(high, marks[-1])

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (0.5 if last == first else (step - first) / (last - first))

    def y(value: float) -> float:
        inside = min(max(factor * value, low), high)
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - (inside - low) / (high - low))

    parts = []
    for mark in marks:
        height = y(mark / factor)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height:.1f}" y2="{height:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{height + 3:.1f}" text-anchor="end">{short(mark)}</text>')
    for step, anchor in ((first, "start"), (last, "end")) if last > first else ((first, "middle"),):
        parts.append(
            f'<text class="tick" x="{x(step):.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{step + 1:,}</text>'
        )
    points = []
    for line in lines:
        if line.low is not None and line.high is not None:
            upper = [f"{x(step):.1f},{y(value):.1f}" for step, value in zip(line.steps, line.high)]
            lower = [f"{x(step):.1f},{y(value):.1f}" for step, value in zip(line.steps, line.low)]
            parts.append(f'<polygon class="band run-{line.colour}" points="{" ".join(upper + lower[::-1])}"/>')
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in zip(line.steps, line.values))
        parts.append(f'<polyline class="line run-{line.colour}" points="{path}"/>')
        for step, value in zip(line.steps, line.values) if len(line.steps) <= 25 else ():
            parts.append(f'<circle class="dot run-{line.colour}" cx="{x(step):.1f}" cy="{y(value):.1f}" r="2.2"/>')
        points.append(
            {
                "name": line.name,
                "colour": line.colour,
                "steps": line.steps,
                "x": [round(x(step), 1) for step in line.steps],
                "y": [round(y(value), 1) for value in line.values],
                "text": [told(line, number, factor, unit) for number in range(len(line.steps))],
            }
        )
    heading = " ".join(
        f'<b class="run-{line.colour}">{escape(told(line, len(line.steps) - 1, factor, unit))}</b>' for line in lines
    )
    label = escape(f"{title}, steps {first + 1} to {last + 1}")
    return (
        f'<figure class="chart"><figcaption><span>{escape(title)}</span><span class="lasts">{heading}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}" data-points="{escape(json.dumps(points))}">'
        f'{"".join(parts)}<line class="cross" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></svg><div class="hover"></div></figure>'
    )


def told(line: Line, number: int, factor: float, unit: str) -> str:
    text = short(factor * line.values[number])
    if line.low is not None and line.high is not None:
        text += f" ({short(factor * line.low[number])} to {short(factor * line.high[number])})"
    return f"{text}{' %' if unit == '%' else ''}"


def value_range(values: Sequence[float]) -> tuple[float, float]:
    """What the axis spans: all values, or all but a few that would make the others a flat line."""
    ordered = sorted(values)
    aside = int(CLIPPED * len(ordered))
    low, high = ordered[0], ordered[-1]
    inner_low, inner_high = ordered[aside], ordered[len(ordered) - 1 - aside]
    if inner_high > inner_low and high - low > 10 * (inner_high - inner_low):
        low, high = inner_low, inner_high
    if high - low < 1e-12 * max(1.0, abs(high)):
        around = max(abs(high) * 0.1, 1e-3)
        return low - around, high + around
    return low, high


def ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers that span a range: 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    apart = next(step * power for step in (1, 2, 5, 10) if step * power >= rough)
    first, last = math.floor(low / apart + 1e-9), math.ceil(high / apart - 1e-9)
    return [round(number * apart, 12) for number in range(first, last + 1)]


def short(value: float) -> str:
    """Three or four figures, without an exponent where one is not needed."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 10_000 or size < 1e-3:
        return f"{value:.2g}" if size < 1e-3 else f"{value:,.0f}"
    return (
        f"{value:.{max(0, 3 - math.floor(math.log10(size)) - 1)}f}".rstrip("0").rstrip(".")
        if size < 100
        else f"{value:,.0f}"
    )
