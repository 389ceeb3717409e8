"""The CUDA devices that this process may see."""

from __future__ import annotations

import os


def visible_devices(device: str) -> dict[str, str]:
    """Return the environment in which CUDA shows only ``device``, numbered among the devices that it shows now.

    Raises:
        ValueError: ``device`` is not written as "CPU", "GPU" or "GPU:1", or there is no such device.
    """
    kind, _, index = device.upper().partition(":")
    if kind == "CPU":
        return {"CUDA_VISIBLE_DEVICES": "-1"}
    if kind != "GPU" or not (index or "0").isdecimal():
        raise ValueError(f'device is "CPU", "GPU" or "GPU:1". Received: {device!r}')
    number = int(index or "0")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        # nvidia-smi and NVML count in the order of the bus, CUDA by default does not.
        return {"CUDA_VISIBLE_DEVICES": str(number), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    names = [name.strip() for name in visible.split(",") if name.strip()]
    if number >= len(names):
        raise ValueError(f"CUDA_VISIBLE_DEVICES={visible!r} shows {len(names)} device(s). Received: {device!r}")
    return {"CUDA_VISIBLE_DEVICES": names[number]}
