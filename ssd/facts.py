"""`run.json`, in which a run says what it is: written beside it and read for people."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE = "run.json"


def read_facts(folder: Path) -> dict[str, Any]:
    """Empty where there are none that can be read."""
    try:
        found = json.loads((folder / FILE).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    """Whole or not at all: who reads while a run goes on sees the old ones or the new ones."""
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f".{FILE}.unfinished"
    unfinished.write_text(json.dumps(facts, indent=2) + "\n")
    os.replace(unfinished, folder / FILE)
