"""Total memory of a device, found without TensorFlow: a limit such as "80%" is a share of it."""

from __future__ import annotations

import dataclasses

from autobatch.cli.exit_codes import UsageError
from autobatch.memory import nvml
from autobatch.memory.limits import host_total_bytes
from autobatch.memory.visible_devices import visible_devices

__all__ = ["host_total_bytes", "total_bytes"]


def total_bytes(device: str | None) -> int:
    """Return the total bytes of ``device`` ("CPU", "GPU:1"); with None, of the first GPU, or of the host without one.

    Raises:
        UsageError: several kinds of GPU are built in, and TensorFlow's choice among them is unknown.
    """
    answer = nvml.devices()
    # The worker will have this environment: the card that was asked for is the only one there, and GPU:0.
    environ = {**answer.environ, **({} if device is None else visible_devices(device))}
    if device == "CPU" or not nvml.visible_cards(answer.cards, environ):
        return host_total_bytes()
    card = dataclasses.replace(answer, environ=environ).for_tensorflow("GPU:0")
    if card is None:
        raise UsageError(
            "--memory-limit as a share: it cannot be told which of several kinds of GPU TensorFlow will take. "
            "Give the limit as a size, or name the GPU with --device."
        )
    return card.total_bytes
