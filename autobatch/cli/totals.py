"""How much memory a device has in all, asked for without TensorFlow: what "80%" is a share of."""

from __future__ import annotations

import dataclasses

from autobatch.cli.exit_codes import UsageError
from autobatch.memory import nvml
from autobatch.memory.limits import host_total_bytes
from autobatch.memory.visible_devices import visible_devices

__all__ = ["host_total_bytes", "total_bytes"]


def total_bytes(device: str | None) -> int:
    """The total of ``device`` ("CPU", "GPU:1"), or of what TensorFlow would choose: the first GPU, else the host."""
    answer = nvml.devices()
    # As the worker's environment will be: there, the card that was asked for is the only one, and GPU:0.
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
