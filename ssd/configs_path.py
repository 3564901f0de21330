"""Where configs are: in the installed package, or beside it in a checkout."""

import difflib
from pathlib import Path

from ssd.errors import UserError


def config_root() -> Path:
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "configs"


def config_names() -> list[str]:
    """Names such as `method/dino` of all configs that come with the package."""
    root = config_root()
    return sorted(str(path.relative_to(root).with_suffix("")) for path in root.rglob("*.yaml"))


def config_file(name: str) -> Path:
    """A file of the user's, or else a config by its name, with or without `configs/` and `.yaml`.

    Raises UserError that lists what there is.
    """
    if Path(name).is_file():
        return Path(name)
    short = name.removeprefix("configs/").removesuffix(".yaml").removesuffix(".yml")
    found = config_root() / f"{short}.yaml"
    if found.is_file():
        return found
    names = config_names()
    near = difflib.get_close_matches(short, names, n=3, cutoff=0.4) or names
    raise UserError(f"config '{name}' is neither a file nor one of ours. Nearest: {', '.join(near)}.")
