"""Folder in which remembered results are kept."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path


def cache_folder(environ: Mapping[str, str] | None = None, platform: str = sys.platform) -> Path:
    """Return ``$AUTOBATCH_CACHE_DIR``, or ``autobatch`` in the folder that the platform keeps caches in.

    The platform's folder is ``$XDG_CACHE_HOME`` or ``~/.cache``, on macOS ``~/Library/Caches``, on Windows
    ``%LOCALAPPDATA%``. The folder that is returned need not exist.

    Raises:
        RuntimeError: there is no home folder to be found.
    """
    known = os.environ if environ is None else environ
    if chosen := known.get("AUTOBATCH_CACHE_DIR"):
        return Path(chosen).expanduser().absolute()
    if platform == "win32":
        local = known.get("LOCALAPPDATA")
        return (Path(local) if local else Path.home() / "AppData" / "Local") / "autobatch"
    if platform == "darwin":
        return Path.home() / "Library" / "Caches" / "autobatch"
    base = known.get("XDG_CACHE_HOME", "")
    # A relative path there is invalid, says the XDG specification, and is to be ignored.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "autobatch"
