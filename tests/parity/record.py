"""Writes what `ssd verify parity` compares with, all of it or cases by name: `python -m tests.parity.record [NAME ...]`, in a
clone."""

import json
import sys
from pathlib import Path

import ssd.parity
from ssd.parity.compare import recorded
from ssd.parity.inputs import digest
from tests.parity.restated import RESTATED

FILE = Path(ssd.parity.__file__).with_name("values.json")


def digests(name: str) -> dict[str, list[float]]:
    """What is recorded of a case: its restatement's outputs to ten digits."""
    return {output: [float(f"{value:.10g}") for value in digest(tensor)] for output, tensor in RESTATED[name]().items()}


def record(names: list[str]) -> None:
    """One line an output, so that a change shows what it is of. Without names all cases are restated, else they alone."""
    kept = {name: values for name, values in recorded().items() if names and name not in names}
    cases = []
    for name in RESTATED:
        values = kept[name] if name in kept else digests(name)
        lines = [f"    {json.dumps(output)}: {json.dumps(numbers)}" for output, numbers in values.items()]
        cases.append(f"  {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n  }")
    FILE.write_text("{\n" + ",\n".join(cases) + "\n}\n")


if __name__ == "__main__":
    record(sys.argv[1:])
