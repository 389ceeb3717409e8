"""Reader of the allocations in the files that TensorFlow's profiler writes.

It uses what is no documented interface of TensorFlow, as seen in 2.21: the names of the profiler's events
(``MemoryAllocation``, ``MemoryDeallocation``), the names of their figures, and the place of the module that reads the
files. The caller catches what a damaged file raises.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autobatch.seams.compiled_programs import Block, blocks_in

_READERS = ("tensorflow.tsl.profiler.protobuf.xplane_pb2", "tensorflow.core.profiler.protobuf.xplane_pb2")
_ALLOCATED, _FREED = "MemoryAllocation", "MemoryDeallocation"

_MOST_BYTES = 64 * 2**20
"""Bytes of the largest profile that is read: a larger one would take longer than the trial that it might save."""


@dataclass(frozen=True, slots=True)
class Event:
    """One allocation or one release, with the allocator's figures after it.

    ``shape`` is written as in the profile, "[37,64]". ``is_output`` is True for a tensor that ``operation`` returns,
    and False for a temporary one. ``thread`` tells the threads apart that asked.
    """

    allocated: bool
    address: int
    requested_bytes: int
    chunk_bytes: int
    shape: str
    operation: str
    is_output: bool
    in_use_bytes: int
    free_bytes: int
    fragmentation: float
    thread: int = 0


def read(folder: Path, device: str) -> list[Event]:
    """Return the allocations and releases on ``device`` in a profile's folder, in order.

    The list is empty if there is no file, if the file is too large, or if this TensorFlow has no reader for it.
    """
    timed: list[tuple[int, Event]] = []
    for plane in _planes(folder):
        kinds = {number: named.name for number, named in plane.event_metadata.items()}
        names = {number: named.name for number, named in plane.stat_metadata.items()}
        for line in plane.lines:
            for event in line.events:
                kind = kinds[event.metadata_id]
                if (
                    kind in (_ALLOCATED, _FREED)
                    and (found := _event(kind, event.stats, names, device, line.id)) is not None
                ):
                    timed.append((line.timestamp_ns * 1000 + event.offset_ps, found))
    timed.sort(key=lambda each: each[0])
    return [event for _, event in timed]


def read_compiled(folder: Path) -> list[Block]:
    """Return the blocks of the programs in a profile's folder that XLA has compiled; empty where nothing is read."""
    return blocks_in(_planes(folder))


def _planes(folder: Path) -> Iterable[Any]:
    reader = _reader()
    files = sorted(folder.rglob("*.xplane.pb"))
    if reader is None or not files or files[0].stat().st_size > _MOST_BYTES:
        return ()
    space = reader.XSpace()
    space.ParseFromString(files[0].read_bytes())
    planes: Iterable[Any] = space.planes
    return planes


def _event(kind: str, stats: Iterable[Any], names: dict[int, str], device: str, thread: int) -> Event | None:
    figures: dict[str, Any] = {}
    for stat in stats:
        field_name = stat.WhichOneof("value")
        value = getattr(stat, field_name)
        figures[names[stat.metadata_id]] = names[value] if field_name == "ref_value" else value
    if not _is_allocator_of(device, str(figures.get("allocator_name", ""))):
        return None
    try:
        return Event(
            allocated=kind == _ALLOCATED,
            address=int(figures["addr"]),
            requested_bytes=int(figures["requested_bytes"]),
            chunk_bytes=int(figures["allocation_bytes"]),
            shape=str(figures.get("shape", "")),
            operation=str(figures.get("tf_op", "")),
            is_output=figures.get("region_type") != "temp",
            in_use_bytes=int(figures["bytes_allocated"]),
            free_bytes=int(figures["bytes_available"]),
            fragmentation=float(figures["fragmentation"]),
            thread=thread,
        )
    except KeyError:
        return None


def _is_allocator_of(device: str, name: str) -> bool:
    kind, _, index = device.partition(":")
    return name == f"GPU_{index}_bfc" if kind == "GPU" else name == "bfc_cpu_allocator_for_gpu"


def _reader() -> Any:
    for name in _READERS:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    return None
