"""Renderers that turn a :class:`~autobatch.records.Report` into text: one module an output, :func:`render` for all.

The renderers run no trial and read no file. Each module has a ``render(report) -> str``. It is imported when it is
first asked for, so that naming the formats costs nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Protocol, cast

from autobatch.records import Report


class Renderer(Protocol):
    """A module that turns a report into text."""

    def render(self, report: Report, /) -> str:
        """Return the whole report, without a newline at its end."""
        ...


class _Renderers(Mapping[str, Renderer]):
    """The renderers by the name of their format; looking one up imports its module."""

    _formats = ("text", "json", "html", "markdown")

    def __getitem__(self, name: str) -> Renderer:
        if name not in self._formats:
            raise KeyError(name)
        return cast(Renderer, importlib.import_module(f"{__name__}.{name}"))

    def __iter__(self) -> Iterator[str]:
        return iter(self._formats)

    def __len__(self) -> int:
        return len(self._formats)


RENDERERS: Mapping[str, Renderer] = _Renderers()


def render(report: Report, format: str = "text") -> str:
    """Write a report as one string, without a newline at its end.

    Args:
        report: What :func:`autobatch.tune` returns, or ``history.report`` of :func:`autobatch.fit`.
        format: "text" is for people, and plain: without colours. "json" is for programs, and
            :meth:`autobatch.Report.from_json` reads it back. "html" is a page that needs no other file.
            "markdown" is for an issue or a pull request.

    Raises:
        TypeError: ``report`` is no report.
        ValueError: There is no such format.
    """
    if not isinstance(report, Report):
        raise TypeError(
            "report must be an autobatch.Report, such as history.report of autobatch.fit. "
            f"Received: {report!r} (of type {type(report).__name__})"
        )
    if not isinstance(format, str) or format not in RENDERERS:
        names = [f'"{name}"' for name in RENDERERS]
        raise ValueError(f"format must be {', '.join(names[:-1])} or {names[-1]}. Received: {format!r}")
    return RENDERERS[format].render(report)
