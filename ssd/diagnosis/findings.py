"""What is wrong with a run, in a form for people and for programs."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

WORSE = 2.0  # factor on its severity from which a finding is said again
OFTEN = 3  # times that a kind of finding is said at most


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Args:
        kind: a name that does not change, such as "uniform-collapse".
        step: steps that the run had done.
        message: what is wrong, with the numbers that say so.
        advice: one change to try.
        term: the loss term, layer: the module or parameter, rank: the process that it was found in, where it is of one.
        severity: how bad, to be compared with others of its kind alone; larger is worse.
        batch: file in the run's folder that keeps the batch.
    """

    kind: str
    step: int
    message: str
    advice: str
    term: str | None = None
    layer: str | None = None
    rank: int | None = None
    severity: float = 1.0
    batch: str | None = None

    def text(self) -> str:
        kept = "" if self.batch is None else f" The batch is kept in {self.batch}."
        return f"{self.message} {self.advice}{kept}"

    def row(self) -> dict[str, Any]:
        """Plain data, for a checkpoint and for JSON."""
        return asdict(self)


def is_news(finding: Finding, before: Sequence[Finding]) -> bool:
    """Whether it is the first of its kind, or much worse than what was said, and not said too often."""
    known = [old.severity for old in before if old.kind == finding.kind]
    return not known or (finding.severity >= WORSE * max(known) and len(known) < OFTEN)
