"""Evidence of growth: the levels of memory, and a mark to compare live objects with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from autobatch.watch.steady_growth import (
    MINIMUM_BYTES,
    MINIMUM_STEPS,
    steady_growth,
)

LATE_STEPS = 2
"""Epochs between a late mark and the comparison with it, so that objects built only once do not count as growth."""

_MARK_BYTES = MINIMUM_BYTES // 4  # less than a steady growth needs, so that the mark comes before its proof


class Evidence:
    """Levels of one kind of memory since the warm-up or the last finding, with a mark from when they first rose.

    After each finding the number of grown steps required doubles, so that looking for causes stays rare.

    Args:
        marks_late: True sets the mark only when the growth is steady, and compares :data:`LATE_STEPS` steps later.
    """

    def __init__(self, *, marks_late: bool = False) -> None:
        self.levels: list[int] = []
        self.mark: Any = None
        self._marks_late = marks_late
        self._marked_at = 0
        self._slope_at_mark: float | None = None
        self._minimum_steps = MINIMUM_STEPS

    @property
    def since_mark(self) -> tuple[int, int]:
        """Number of steps since the mark was set, and bytes by which the level has grown since."""
        return len(self.levels) - 1 - self._marked_at, self.levels[-1] - self.levels[self._marked_at]

    def add(self, level: int, look: Callable[[], Any]) -> float | None:
        """Add a level; return the slope once it is steady and has gone on since the mark, else None.

        The mark is the return value of ``look``. Looking costs time, so ``look`` is called once, when the level has
        first risen, or with ``marks_late`` when the growth is steady.
        """
        self.levels.append(level)
        if self.mark is None and not self._marks_late:
            if level - self.levels[0] >= _MARK_BYTES:
                self._set_mark(look, None)
            return None
        slope = steady_growth(self.levels, minimum_steps=self._minimum_steps)
        if self.mark is None:
            if slope is not None:
                self._set_mark(look, slope)
            return None
        if self._marks_late and self.since_mark[0] < LATE_STEPS:
            return None
        return slope if self._has_gone_on(slope) else None

    def _set_mark(self, look: Callable[[], Any], slope: float | None) -> None:
        self.mark, self._marked_at, self._slope_at_mark = look(), len(self.levels) - 1, slope

    def _has_gone_on(self, slope: float | None) -> bool:
        if slope is None:
            return False
        steps, grown = self.since_mark
        # Half of the usual growth is enough: the mark may have been set at a high level.
        return grown >= slope * steps / 2

    @property
    def unreported(self) -> float | None:
        """Slope that was steady when the mark was set late, if it has gone on and is not returned yet; else None."""
        return self._slope_at_mark if self._has_gone_on(self._slope_at_mark) else None

    def restart(self, level: int | None) -> None:
        """Begin again from this level, after a finding."""
        self.levels, self.mark = self.levels[-1:] if level is None else [level], None
        self._slope_at_mark = None
        self._minimum_steps *= 2
