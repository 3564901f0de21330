"""Where things are kept that can be made again: `~/.cache/ssd`, or what SSD_CACHE names."""

import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """The user's cache, or a folder of the user's own among the temporary ones. Raises OSError where there is neither."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    home = Path(os.environ.get("SSD_CACHE") or base / "ssd")
    try:
        home.mkdir(parents=True, exist_ok=True)
        if os.access(home, os.W_OK):
            return home
    except OSError:
        pass
    own = Path(tempfile.gettempdir()) / f"ssd-{os.getuid()}"
    own.mkdir(mode=0o700, exist_ok=True)
    if own.stat().st_uid != os.getuid():
        raise OSError(f"{own} belongs to somebody else")
    return own
