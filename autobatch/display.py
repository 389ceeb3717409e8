"""What is shown to people, and by whom: the places where the upper rooms hang in what the lower ones call.

This is the ground floor: it knows no other room. So a record can be printed although no record knows a format, and a
search can be watched although no search knows a notebook.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

show_search: Callable[[Any, Callable[..., Any]], Any] | None = None
"""What shows a search on a live model while it runs, None for nothing; a front end, such as a notebook, sets it.

It is given the trials and the search to run, and returns the search's report.
"""

report_format: Callable[[str], Any]
"""Finds the module that writes reports in the format of this name; the package sets it before it has any record."""
