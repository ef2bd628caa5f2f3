"""The folder of this machine's caches: decoded images, activations, remembered checks and downloaded shards."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(cache_dir: str | None) -> Path:
    """Return `data.cache_dir`, or without one the `finetune` folder that the XDG base directory specification gives."""
    if cache_dir:
        return Path(cache_dir).expanduser()
    home = os.environ.get("XDG_CACHE_HOME", "")
    # The specification says that a relative path in XDG_CACHE_HOME is to be ignored.
    return (Path(home) if os.path.isabs(home) else Path.home() / ".cache") / "finetune"
