"""What one source knows of each of its samples, for those that were made from it by choosing or renaming."""

from collections.abc import Callable
from typing import Any

import numpy as np

from ssd.data.sources import Source, Subset


def inherited(source: Source, answer: Callable[[Any], np.ndarray | None]) -> np.ndarray | None:
    """The answer (N,) of `source`, or of the first source behind it that has one, for the samples of `source`.

    `answer` gives one entry a sample, or None where a source does not know.
    """
    found = answer(source)
    if found is not None:
        return found
    behind = getattr(source, "source", None)
    if behind is None:
        return None
    found = inherited(behind, answer)
    return found[source.rows] if found is not None and isinstance(source, Subset) else found


def groups_of(source: Source) -> np.ndarray | None:
    """The group of each sample, (N,) int64 with -1 for a sample that stands alone, or None where nothing is grouped."""
    return inherited(source, lambda one: getattr(one, "groups", None))
