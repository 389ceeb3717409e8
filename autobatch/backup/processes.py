"""Interface of the processes that train one model together, as a backup needs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Processes(Protocol):
    """The processes that train one model, this one among them. The first is the chief, which alone touches the folder.

    All of them call the same methods in the same order. ``what`` names the place in messages.
    """

    index: int
    """Number of this process; the chief's is 0."""

    count: int
    """Number of processes."""

    replicas: int
    """Number of replicas in all processes together."""

    def together(self, work: Callable[[], T], what: str) -> T:
        """Return what ``work`` returns here; an error of any process ends all of them."""
        ...

    def gather(self, numbers: list[float], what: str) -> Any:
        """Give numbers to all processes; return those of all, one row a process."""
        ...

    def from_chief(self, data: bytes, what: str) -> bytes:
        """Return the chief's ``data``; what the others give is not looked at."""
        ...

    def of_each(self, data: bytes, what: str) -> list[bytes]:
        """Return the ``data`` of each process."""
        ...
