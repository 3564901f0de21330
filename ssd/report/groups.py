"""Runs that belong together: what shares a colour on the page."""

from collections.abc import Sequence
from dataclasses import dataclass

from ssd.report.reading import Run, seeds_of_one

COLOURS = 8


@dataclass
class Group:
    """Runs of one colour: one, or several seeds of one."""

    name: str
    colour: int
    runs: list[Run]


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Runs that differ in nothing but their seed share a colour and a band."""
    groups: list[Group] = []
    for run in runs:
        home = next((group for group in groups if seeds_of_one([group.runs[0], run])), None)
        if home is not None:
            home.runs.append(run)
        else:
            groups.append(Group(run.name, len(groups) % COLOURS, [run]))
    for group in groups:
        if len(group.runs) > 1:
            group.name = f"{group.runs[0].name} and {len(group.runs) - 1} more seeds"
    return groups
