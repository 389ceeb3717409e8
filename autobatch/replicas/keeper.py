"""Keeper of the values that undo a step on several replicas."""

from __future__ import annotations

from autobatch.memory import limits
from autobatch.recovery.keeper import Keeper, SnapshotPlace
from autobatch.replicas.agreement import SingleProcess
from autobatch.replicas.step import ReplicatedStep
from autobatch.tensors.variables import bytes_of
from autobatch.units import less_headroom


class ReplicatedKeeper(Keeper):
    """Keeper of the values of all replicas of this process: the weights are kept on their devices, or nowhere."""

    def __init__(
        self, step: ReplicatedStep, agreement: SingleProcess, *, user_limit_bytes: int | None, headroom: float
    ):
        self._devices = step.devices
        super().__init__(step, step.devices[0], user_limit_bytes=user_limit_bytes, headroom=headroom)
        self._agreement = agreement

    def _place(self, *, whole: bool, proven: bool) -> SnapshotPlace:
        if self._agreement.count > 1:
            return SnapshotPlace.NOWHERE  # what another worker has applied already cannot be taken back from here
        if self._room is None:
            self._room = not self.ran_out_beside_copies and self._has_room()
        return SnapshotPlace.DEVICE if self._room else SnapshotPlace.NOWHERE

    def _has_room(self) -> bool:
        """Return True if each device has room for its copies and, at the same time, for the update itself."""
        weights = [bytes_of([variable]) for variable in self._step.model.trainable_variables]
        copies_bytes = bytes_of(self._step.updated_variables) // len(self._devices)
        # The sums and what is reduced take the weights' size once more each, and the update its temporaries.
        each = copies_bytes + 4 * sum(weights) + 2 * max(weights, default=0)
        for device in self._devices:
            limit = limits.find_limit(device, self._user_limit_bytes).limit_bytes
            in_use = limits.bytes_in_use(device)
            if limit is not None and in_use is not None and in_use + each > less_headroom(limit, self._headroom):
                return False
        return True
