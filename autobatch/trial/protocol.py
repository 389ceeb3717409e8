"""Protocol of a source of trials, in this process or in a worker's. Standard library only."""

from __future__ import annotations

from typing import Protocol

from autobatch.records import Environment, HostUse, SampleEstimate, TrialRequest, TrialResult


class Trials(Protocol):
    """Source of trials, which runs micro-batch sizes for real.

    ``largest_useful`` is a size above which trying makes no sense (the target batch, or the samples there are), None if
    unknown. ``fixed_bytes_hint`` is a lower bound on every peak: what weights, accumulators and optimizer slots hold
    together; None if unknown. ``model_name``, ``warnings``, ``notes`` and ``host_uses`` go into the report.

    ``content`` is a digest of what is trained and of what was set for it, by which an earlier result is found. It may
    change when the first trial builds what was not built. ``replicas`` run each size at once: sizes are those of one.

    Sizes count samples. Where streams are cut in proportion they count portions, and the source has an attribute
    ``samples_in_portion``. Where elements cannot be cut they count elements, and ``takes_elements_whole`` is True.
    """

    @property
    def replicas(self) -> int: ...

    @property
    def environment(self) -> Environment: ...

    @property
    def largest_useful(self) -> int | None: ...

    @property
    def fixed_bytes_hint(self) -> int | None: ...

    @property
    def model_name(self) -> str: ...

    @property
    def warnings(self) -> tuple[str, ...]:
        """Differences from the full batch where gradients are accumulated."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on the model and the data for the report, whatever the plan."""
        ...

    @property
    def host_uses(self) -> tuple[HostUse, ...]: ...

    @property
    def content(self) -> str: ...

    def estimate_sample(self) -> SampleEstimate | None:
        """Return what a sample needs, estimated from the traced step before anything ran; None if unknown."""
        ...

    def run(self, request: TrialRequest) -> TrialResult:
        """Run one size. Out of memory is an outcome; an error that the user's code raises is passed on."""
        ...

    def close(self) -> None:
        """Put everything back as it was before the first trial, and release what was held."""
        ...
