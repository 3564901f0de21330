"""Two ways to do the same work, timed in turn, so that what else the machine does meets both."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table


@dataclass(frozen=True)
class Pair:
    """What a comparison found.

    Args:
        case: what was done.
        against: whose way ours is compared with.
        ours, baseline: median over the rounds, in `unit`, more is better.
        ratio, low, high: ours over the baseline's, of each round: median, lowest and highest.
    """

    case: str
    against: str
    ours: float
    baseline: float
    ratio: float
    low: float
    high: float
    unit: str

    def row(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    case: str,
    ours: Callable[[], Any],
    baseline: Callable[[], Any],
    *,
    count: int,
    rounds: int,
    unit: str,
    against: str = "lightly",
    times: int = 1,
    clock: Callable[[], float] = time.process_time,
) -> Pair:
    """Both in turn, `rounds` times after one to warm up; each call does `count` units of work.

    Args:
        times: that ours is called in its turn, where one call is too short to be timed.
    """

    def ours_again() -> None:
        for _ in range(times):
            ours()

    speeds = []
    for number in range(rounds + 1):
        found = [count * times / seconds(ours_again, clock), count / seconds(baseline, clock)]
        if number:
            speeds.append(found)
    ratios = [mine / theirs for mine, theirs in speeds]
    return Pair(
        case,
        against,
        statistics.median(mine for mine, _ in speeds),
        statistics.median(theirs for _, theirs in speeds),
        statistics.median(ratios),
        min(ratios),
        max(ratios),
        unit,
    )


def seconds(work: Callable[[], Any], clock: Callable[[], float]) -> float:
    start = clock()
    work()
    return max(clock() - start, 1e-9)


def pairs_table(pairs: Sequence[Pair], title: str) -> Table:
    table = Table("case", "ours", "theirs", "ratio", "lowest to highest", title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for pair in pairs:
        table.add_row(
            pair.case,
            f"{pair.ours:,.0f} {pair.unit}",
            f"{pair.against} {pair.baseline:,.0f}",
            f"{pair.ratio:.2f}",
            f"{pair.low:.2f} to {pair.high:.2f}",
        )
    return table
