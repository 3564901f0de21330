"""Test pictures that a network has seen before: what is both in its pretraining data, or the labelled data, and the test data."""

import multiprocessing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ssd.data.cache import Pictures
from ssd.data.checks.examine import examine
from ssd.data.checks.findings import leaks
from ssd.data.checks.repeats import repeats, shared
from ssd.data.sources import Source
from ssd.errors import UserError
from ssd.verbs.loading import load_data

TEST, LABELLED = "test", "labelled training"


@dataclass(frozen=True)
class Duplicates:
    """What was found.

    Args:
        seen: (Q,) bool, test pictures that are, or look like one, in other data.
        counts: other data -> how many test pictures are exact copies, and how many only look the same.
        texts: what was found, and what could not be looked for, one sentence or two each.
    """

    seen: np.ndarray
    counts: dict[str, dict[str, int]]
    texts: list[str]


def find_duplicates(data: Any, known: Mapping[str, dict[str, Any]], workers: int = 0) -> Duplicates:
    """Looks at every picture of the test data, of the labelled training data and of what networks learned from.

    Args:
        data: the datamodule whose held-out part is the test data.
        known: network -> what its checkpoint knows, as `load_network` gives it.
    """
    bank, queries = data.labelled_parts()
    parts: dict[str, Source] = {TEST: queries, LABELLED: bank}
    prints = {bank.fingerprint(): LABELLED}
    texts = []
    for name, about in known.items():
        if about.get("data") is None:
            texts.append(f"which data {name} learned from is not known, so that it may have seen test pictures.")
            continue
        try:
            source = load_data([], about, "compare").source
        except (UserError, OSError) as error:
            texts.append(
                f"the data that {name} learned from cannot be opened, so that it may have seen test pictures: {error}"
            )
            continue
        if source.fingerprint() not in prints:
            prints[source.fingerprint()] = f"{name}'s pretraining"
            parts[f"{name}'s pretraining"] = source
        elif prints[source.fingerprint()] == LABELLED:
            texts.append(f"{name} learned from the labelled training data, without the labels.")
    context = multiprocessing.get_context(data.start_method)
    looked_at = {
        name: examine(Pictures(source, data.channels, levels=data.levels), workers, context, f"{name} pictures")
        for name, source in parts.items()
    }
    found = repeats(looked_at)
    seen = np.zeros(len(queries), bool)
    counts = {}
    for name in parts:
        if name == TEST:
            continue
        exact = shared(found.same[TEST], found.same[name])
        alike = shared(found.alike[TEST], found.alike[name])
        seen[alike] = True
        counts[name] = {"exact": len(exact), "near": len(np.setdiff1d(alike, exact))}
        nothing = f"none of the {len(queries):,} test pictures is, or looks like one, in the {name} data."
        texts += [finding.text for finding in leaks(TEST, name, looked_at, found)] or [nothing]
    return Duplicates(seen, counts, texts)
