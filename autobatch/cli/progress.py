"""Progress on standard error while trials run; silent where that is no terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from autobatch.records import Environment, HostUse, SampleEstimate, TrialRequest, TrialResult
from autobatch.report import sentences
from autobatch.trial.protocol import Trials

if TYPE_CHECKING:
    from rich.live import Live


class Progress(Protocol):
    """A display of a search, called when something begins or ends."""

    def under(self, heading: str) -> None:
        """Show what follows as part of ``heading``."""
        ...

    def doing(self, what: str) -> None: ...

    def tried(self, result: TrialResult) -> None: ...


class _Silent:
    def under(self, heading: str) -> None:
        pass

    def doing(self, what: str) -> None:
        pass

    def tried(self, result: TrialResult) -> None:
        pass


class _Lines:
    """A line for each trial that has ended, and a line with a spinner for what is under way."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._done: list[str] = []
        self._heading = ""
        self._doing = ""

    def under(self, heading: str) -> None:
        self._heading = heading
        self._done.append(heading)
        self.doing("Starting a worker and building the model")

    def doing(self, what: str) -> None:
        self._doing = f"{self._heading}: {what}" if self._heading else what
        self._show()

    def tried(self, result: TrialResult) -> None:
        outcome = sentences.OUTCOME_LABELS[result.outcome]
        cells = sentences.trial_cells(result, _NO_ENVIRONMENT)
        figures = [cells.peak, f"{cells.speed} samples/s"] if result.fits else []
        self._done.append(f"  micro-batch {result.micro_batch:>6,}  {', '.join((outcome, *figures))}")
        self._show()

    def _show(self) -> None:
        from rich.console import Group
        from rich.spinner import Spinner
        from rich.text import Text

        # A search has about a dozen trials; the last of them are enough on a low terminal.
        lines = [Text(line, style="dim") for line in self._done[-12:]]
        self._live.update(Group(*lines, Spinner("dots", Text(self._doing))), refresh=True)


_NO_ENVIRONMENT = Environment("", None, "", None, 0.0, "", False)


@contextmanager
def progress() -> Iterator[Progress]:
    """Yield a display of progress; its lines are wiped away when the ``with`` block ends."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield _Silent()
        return
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True, markup=False, highlight=False, emoji=False)
    with Live(console=console, transient=True, redirect_stdout=False, redirect_stderr=False) as live:
        yield _Lines(live)


class WatchedTrials:
    """Trials that announce each size to a `Progress` before it runs."""

    def __init__(self, trials: Trials, told: Progress) -> None:
        self._trials = trials
        self._told = told

    @property
    def replicas(self) -> int:
        return self._trials.replicas

    @property
    def samples_in_portion(self) -> int:
        return int(getattr(self._trials, "samples_in_portion", 1))

    @property
    def takes_elements_whole(self) -> bool:
        return bool(getattr(self._trials, "takes_elements_whole", False))

    @property
    def environment(self) -> Environment:
        return self._trials.environment

    @property
    def largest_useful(self) -> int | None:
        return self._trials.largest_useful

    @property
    def fixed_bytes_hint(self) -> int | None:
        return self._trials.fixed_bytes_hint

    @property
    def model_name(self) -> str:
        return self._trials.model_name

    @property
    def warnings(self) -> tuple[str, ...]:
        return self._trials.warnings

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(getattr(self._trials, "notes", ()))

    @property
    def host_uses(self) -> tuple[HostUse, ...]:
        return self._trials.host_uses

    @property
    def content(self) -> str:
        return self._trials.content

    def estimate_sample(self) -> SampleEstimate | None:
        self._told.doing("Tracing the step")
        return self._trials.estimate_sample()

    def run(self, request: TrialRequest) -> TrialResult:
        self._told.doing(f"Trying micro-batch {request.micro_batch:,}")
        result = self._trials.run(request)
        self._told.doing("Choosing the next size")
        return result

    def close(self) -> None:
        self._trials.close()
