"""The version of autobatch, in one place: ``pyproject.toml`` reads this file as text, without importing anything."""

from __future__ import annotations

__version__ = "0.1.0"
