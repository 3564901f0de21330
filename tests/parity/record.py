"""Writes what `ssd verify parity` compares with: `python -m tests.parity.record`, in a clone."""

import json
from pathlib import Path

import ssd.parity
from ssd.parity.inputs import digest
from tests.parity.restated import RESTATED

FILE = Path(ssd.parity.__file__).with_name("values.json")


def digests(name: str) -> dict[str, list[float]]:
    """What is recorded of a case: its restatement's outputs to ten digits."""
    return {output: [float(f"{value:.10g}") for value in digest(tensor)] for output, tensor in RESTATED[name]().items()}


def record() -> None:
    """One line an output, so that a change shows what it is of."""
    cases = []
    for name in RESTATED:
        lines = [f"    {json.dumps(output)}: {json.dumps(values)}" for output, values in digests(name).items()]
        cases.append(f"  {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n  }")
    FILE.write_text("{\n" + ",\n".join(cases) + "\n}\n")


if __name__ == "__main__":
    record()
