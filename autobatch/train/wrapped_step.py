"""Accumulation and recovery for a training loop of the user's own, without ``fit``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from autobatch.data.loop_batches import element_spec_of, require_alike, widened
from autobatch.records import Recovery, Report
from autobatch.recovery.transaction import Transaction


class WrappedStep:
    """A ``train_step`` that takes effective batches of any size; made by :func:`autobatch.wrap_step`.

    ``report`` is that of the search, None before the first batch; ``recoveries`` lists what happened since.

    Args:
        open_first: Searches on the first batch; returns the transaction for it, its report, and what makes the
            transaction for a wider element spec, given the one before.
        name: What the user's function is called.
        target_batch: The effective batch that the search is made for.
        micro_batch: The size that was given in place of a search.
    """

    def __init__(
        self,
        open_first: Callable[[Any], tuple[Transaction, Report, Callable[[Any, Transaction], Transaction]]],
        *,
        name: str,
        target_batch: int,
        micro_batch: int | None,
    ) -> None:
        self._open_first = open_first
        self._name = name
        self._target_batch = target_batch
        self._micro_batch = micro_batch
        self._open_wider: Callable[[Any, Transaction], Transaction] | None = None
        self._transaction: Transaction | None = None
        self._element_spec: Any = None
        self.report: Report | None = None

    def __repr__(self) -> str:
        """Name the function, its effective batch, and the micro-batch as it is now."""
        if self._transaction is not None:
            size = str(self._transaction.policy.micro_batch)
            count = len(self._transaction.recoveries)
            how = (("searched" if self._micro_batch is None else "given"), *([f"{count} recovered"] if count else []))
        elif self._micro_batch is None:
            size, how = "'auto'", ("not searched yet: the first batch starts it",)
        else:
            size, how = str(self._micro_batch), ("given",)
        return f"<WrappedStep {self._name} target_batch={self._target_batch} micro_batch={size} ({', '.join(how)})>"

    @property
    def recoveries(self) -> tuple[Recovery, ...]:
        """The times that a batch ran out of memory and the loop went on, in turn."""
        return () if self._transaction is None else tuple(self._transaction.recoveries)

    def __call__(self, batch: Any) -> Any:
        """Make one update with an effective batch; return what ``train_step`` returned, for the whole of it."""
        if self._transaction is None or self._open_wider is None:
            self._transaction, self.report, self._open_wider = self._open_first(batch)
            self._element_spec = element_spec_of(batch)
        else:
            require_alike(self._element_spec, batch)
        wider = widened(self._element_spec, batch)
        if wider is not self._element_spec:
            self._transaction = self._open_wider(wider, self._transaction)
            self._element_spec = wider
        return self._transaction.train(batch)
