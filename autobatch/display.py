"""Hooks for what is shown to people: the upper rooms set them, and the lower rooms call them.

This is the ground floor: it knows no other room. So a record can be printed although no record knows a format. A search
can be watched although no search knows a notebook.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

show_search: Callable[[Any, Callable[..., Any]], Any] | None = None
"""Function that shows a search on a live model while it runs; None shows nothing.

A front end sets it: the package one for a terminal, a notebook its own. It is given the trials and the search to run,
and returns the search's report.
"""

search_heading = ""
"""Name of the variant of the model that is searched, where there are several."""

report_format: Callable[[str], Any]
"""Function that finds the module for reports in the named format; the package sets it before it has any record."""
