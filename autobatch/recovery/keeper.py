"""Values that undo a failed step, kept beside the variables, in host memory, or nowhere.

The variables that every micro-batch changes (statistics, seeds, metrics) are small and always kept on the device. If
one micro-batch is the whole effective batch, the step itself keeps them, which saves a call.

The weights and the optimizer's variables change in the update alone. They are kept in one of three places:

* On the device, if the budget has room for copies and update at once. A copy there costs no memory until the update
  overwrites the variables.
* In host memory, if the device has no room or an update ran out of memory beside the copies, and if the host has room.
  That takes time before each step, but no device memory.
* Nowhere, if neither has room, or once :data:`PROVEN_UPDATES` updates have gone well without room on the device. Each
  update needs the same memory, so those that follow will fit. A step on a whole effective batch keeps nothing from then
  on even if there is room: keeping the weights would take a small model longer than its step. But a step with several
  updates goes on keeping them: after an update another forward and backward pass may follow.

Under XLA a step on a whole effective batch always keeps the weights on the device. Without a second reference to their
buffers TensorFlow 2.21 loses them when the step runs out of memory.

Trials take the same copies as training, so that they prove what training does.
"""

from __future__ import annotations

import enum
import sys
from dataclasses import dataclass

from autobatch.memory import limits
from autobatch.step.compiled_step import CompiledStep
from autobatch.tensors.snapshots import InGraphSnapshot, Snapshot, SnapshotTaker
from autobatch.tensors.variables import bytes_of
from autobatch.units import less_headroom

PROVEN_UPDATES = 4
"""Successful updates in a row that prove that the optimizer's update fits beside everything else that is held."""


class SnapshotPlace(enum.Enum):
    """Place where the weights and the optimizer's variables are kept during a step."""

    DEVICE = "device"
    HOST = "host"
    NOWHERE = "nowhere"


@dataclass(frozen=True, slots=True)
class SavedState:
    """Values of variables from before one step."""

    weights_at: SnapshotPlace
    snapshots: tuple[Snapshot | InGraphSnapshot, ...]

    def restore(self) -> None:
        """Give every kept variable its value back, and let go of the values."""
        for snapshot in self.snapshots:
            snapshot.restore()
        self.drop()

    def drop(self) -> None:
        """Let go of the values."""
        for snapshot in self.snapshots:
            snapshot.drop()


class Keeper:
    """Keeper of the values that undo the steps of one training and of the trials before it.

    Args:
        step: the compiled steps.
        device: TensorFlow's name of the device, such as "GPU:0".
        user_limit_bytes, headroom: as for ``fit``.
    """

    def __init__(self, step: CompiledStep, device: str, *, user_limit_bytes: int | None, headroom: float) -> None:
        self._step = step
        self._device = device
        self._user_limit_bytes = user_limit_bytes
        self._headroom = headroom
        self._room: bool | None = None
        self._optimizers = len(step.optimizers)
        self.ran_out_beside_copies = False
        """True if an update ran out of memory beside copies on the device, so that none may be kept there."""

    def follow(self, step: CompiledStep) -> None:
        """Keep the values of another step of the same training from now on."""
        self._step = step
        self._optimizers = len(step.optimizers)
        self.forget()

    def forget(self) -> None:
        """Find out again what there is to keep and how much room there is, after a trace or running out of memory."""
        self._step.recorders.clear()
        self._room = None

    def take(self, *, whole: bool, proven: bool) -> SavedState:
        """Keep the present values; call it once everything that the step needs is traced.

        ``whole`` is True if one micro-batch is the whole effective batch, ``proven`` if :data:`PROVEN_UPDATES` updates
        have gone well.
        """
        step = self._step
        if len(step.optimizers) != self._optimizers:  # an eager step has applied one unknown before
            self._optimizers = len(step.optimizers)
            self.forget()
        place = self._place(whole=whole, proven=proven)
        copies = step.copies if whole else None
        snapshots: list[Snapshot | InGraphSnapshot] = []
        if copies is not None:
            snapshots.append(copies)
        if place is SnapshotPlace.DEVICE or copies is None:
            key = place is SnapshotPlace.DEVICE, copies is None
            if key not in self._step.recorders:
                updated = step.updated_variables if place is SnapshotPlace.DEVICE else []
                others = step.changed_before_update if copies is None else []
                self._step.recorders[key] = SnapshotTaker([*updated, *others], beforehand=step.update_room.note_begun)
            snapshots.append(self._step.recorders[key].take())
        if place is SnapshotPlace.HOST:
            snapshots.append(Snapshot.on_host(step.updated_variables))
        return SavedState(place, tuple(snapshots))

    def _place(self, *, whole: bool, proven: bool) -> SnapshotPlace:
        if whole and self._step.model.jit_compile:
            # When it runs out of memory, it frees the buffers of the variables that it writes, unless copies hold them.
            return SnapshotPlace.DEVICE
        if self._room is None:
            self._room = not self.ran_out_beside_copies and self._has_room()
        several = self._step.computes_between_updates(whole=whole)
        if proven and (whole or not self._room) and not several:
            return SnapshotPlace.NOWHERE
        if self._room:
            return SnapshotPlace.DEVICE
        return SnapshotPlace.HOST if self._host_has_room() else SnapshotPlace.NOWHERE

    def _has_room(self) -> bool:
        """Return True if the budget has room for the copies and the update at the same time."""
        limit = limits.find_limit(self._device, self._user_limit_bytes)
        in_use = limits.bytes_in_use(self._device)
        if limit.limit_bytes is None or in_use is None:
            return True
        # A whole effective batch's gradients have no accumulators.
        gradients_bytes = bytes_of(self._step.model.trainable_variables)
        needed = bytes_of(self._step.updated_variables) + gradients_bytes + self._step.update_room_bytes
        return in_use + needed <= less_headroom(limit.limit_bytes, self._headroom)

    def _host_has_room(self) -> bool:
        # An arena's limit on the CPU is enforced by TensorFlow's allocator, and the copies are not TensorFlow's.
        found = limits.all_limits("CPU:0")
        known = [limit.limit_bytes for limit in found if limit.limit_bytes is not None and not limit.enforced]
        return bytes_of(self._step.updated_variables) <= min(known, default=sys.maxsize)
