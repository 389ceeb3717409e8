"""A :class:`~autobatch.records.Report` goes in, text comes out: one module an output.

The renderers know the records and nothing else of autobatch: they run no trial and read no file. Each module has a
``render(report) -> str``; it is imported when it is first asked for, so that naming the formats costs nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Protocol, cast

from autobatch.records import Report


class Renderer(Protocol):
    """A module that turns a report into text."""

    def render(self, report: Report, /) -> str:
        """The whole report, without a newline at its end."""
        ...


class _Renderers(Mapping[str, Renderer]):
    """The formats by name; looking one up imports its module."""

    _formats = ("text", "json", "html")

    def __getitem__(self, name: str) -> Renderer:
        if name not in self._formats:
            raise KeyError(name)
        return cast(Renderer, importlib.import_module(f"{__name__}.{name}"))

    def __iter__(self) -> Iterator[str]:
        return iter(self._formats)

    def __len__(self) -> int:
        return len(self._formats)


RENDERERS: Mapping[str, Renderer] = _Renderers()
