"""A method of another name."""

from lightning_modules.dino import DINO


class Other(DINO):
    """DINO by another name."""
