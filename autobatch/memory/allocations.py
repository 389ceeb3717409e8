"""Records what a piece of a program asks of TensorFlow's allocator: every block, in order, with its address.

TensorFlow's BFC allocator, which GPUs have and limited CPU arenas too, tells its profiler of each allocation: bytes,
address, the operation that asked, and the shape of the tensor. A profile of one small step is therefore all that is
needed to know where in memory everything will lie in a large one: see :mod:`autobatch.search.replay`.

What is not a documented interface of TensorFlow and touched here: the names of the profiler's events
(``MemoryAllocation``, ``MemoryDeallocation``) and of their figures, and the place of the module that reads its files,
seen in 2.21. Where any of it is missing, or another profile is being taken, nothing is recorded and nothing is lost.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import logging
import os
import tempfile
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autobatch.memory import arena
from autobatch.records import AllocationTrace

logger = logging.getLogger(__name__)

_READERS = ("tensorflow.tsl.profiler.protobuf.xplane_pb2", "tensorflow.core.profiler.protobuf.xplane_pb2")
_ALLOCATED, _FREED = "MemoryAllocation", "MemoryDeallocation"

SWITCH = "AUTOBATCH_RECORD_ALLOCATIONS"
"""An environment variable: "0" leaves the profiler alone."""

_OF_THE_PROFILER = (b"profiler_session.cc", b"save_profile.cc")

_MOST_BYTES = 64 * 2**20
"""A profile larger than this is not read: it would take longer than the trial that it might save."""

_LEAST_PRIME = 11
"""From here on a prime micro-batch is unlikely to divide a dimension that has nothing to do with it."""

_WORKSPACES = ("Conv2DBackpropInput", "Conv2DBackpropFilter")
"""On a CPU these work on so many images at once as its cache holds, whatever the micro-batch: temporaries of rank 3."""

_ROUND_BYTES = 256
"""The allocator's unit."""


@dataclass(frozen=True, slots=True)
class Event:
    """One allocation (``shape`` as the profiler writes it, "[37,64]") or one release, with the figures after it.

    ``is_output`` tells a tensor that ``operation`` returns from one that it works with.
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


@dataclass(slots=True)
class Recording:
    """What :func:`recording` saw. ``held`` tells where the variables lay before it began, as address to bytes."""

    held: dict[int, int] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)

    def most_bytes(self, *, leaving_out: str | None = None) -> int:
        """The most bytes that the block held beyond what was held before it.

        Bytes as they were asked for, without the allocator's rounding. A value that takes the place of a variable's old
        one counts until the old one is given back. ``leaving_out`` is a part of the names of operations whose blocks
        are not counted.
        """
        alive: dict[int, int] = {}
        now = most = 0
        for event in self.events:
            if event.allocated:
                counts = leaving_out is None or leaving_out not in event.operation
                alive[event.address] = event.requested_bytes if counts else 0
                now += alive[event.address]
                most = max(most, now)
            else:
                now -= alive.pop(event.address, event.chunk_bytes)
        return most


@contextlib.contextmanager
def recording(device: str, variables: Iterable[Any]) -> Iterator[Recording]:
    """Record what the block allocates on ``device``, whose ``variables`` are looked up first.

    The recording is complete once the block has ended; it stays empty where nothing can be recorded, and where the
    block raises.
    """
    import tensorflow as tf

    found = Recording()
    if os.environ.get(SWITCH) == "0" or not _tells(device):
        yield found
        return
    profiler = tf.profiler.experimental
    with tempfile.TemporaryDirectory(prefix="autobatch-") as folder:
        try:
            found.held = _addresses(variables)
            # No options: TensorFlow 2.21 takes none of them, and complains.
            with _silenced():
                profiler.start(folder)
        except (tf.errors.OpError, RuntimeError) as error:
            logger.info("allocations are not recorded: %s", error)
            yield found
            return
        saved = False
        try:
            yield found
            saved = True
        finally:
            with _silenced():
                profiler.stop(save=saved)
        found.events = _read(Path(folder), device)


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """While this lasts, the profiler's own messages are kept from standard error; all others come at its end."""
    try:
        before = os.dup(2)
    except OSError:  # there is no standard error
        yield
        return
    with tempfile.TemporaryFile() as aside:
        os.dup2(aside.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(before, 2)
            os.close(before)
            aside.seek(0)
            for line in aside:
                if not any(name in line for name in _OF_THE_PROFILER):
                    with contextlib.suppress(OSError):
                        os.write(2, line)


def trace_of(found: Recording, micro_batch: int, fixed_shapes: Collection[tuple[int, ...]]) -> AllocationTrace | None:
    """What was recorded while ``micro_batch`` samples ran, as a trace that can be replayed for other sizes.

    A block grows with the micro-batch where a dimension of its tensor is a multiple of it: the first one, or any if
    the micro-batch is a prime that is not small. ``fixed_shapes`` are those of the weights, which never grow.
    None where nothing was recorded.
    """
    if not found.events:
        return None
    first = found.events[0]
    blocks: dict[int, int] = {}
    live: dict[int, int] = {}
    order: list[int] = []
    sizes: list[tuple[float, float]] = []
    freed: list[int] = []
    steps: list[tuple[bool, int]] = []
    for event in found.events:
        if event.allocated:
            live[event.address] = len(sizes)
            steps.append((True, len(sizes)))
            sizes.append(_sizes(event, micro_batch, fixed_shapes))
        elif event.address in live:
            steps.append((False, live.pop(event.address)))
        else:
            blocks[event.address] = event.chunk_bytes
            steps.append((False, -1 - len(freed)))
            freed.append(event.address)
    for address, held_bytes in found.held.items():
        blocks.setdefault(address, -(-held_bytes // _ROUND_BYTES) * _ROUND_BYTES)
    in_use = first.in_use_bytes - (first.chunk_bytes if first.allocated else -first.chunk_bytes)
    touched = {event.address: event.chunk_bytes for event in found.events}
    regions = _regions(blocks, touched, first)
    held = _within(regions, blocks)
    held += _unaccounted(regions, {**touched, **dict(held)}, in_use - sum(taken for _, taken in held))
    held.sort()
    index = {address: number for number, (address, _) in enumerate(held)}
    known = len(held)
    for allocated, number in steps:
        if number >= 0:
            order.append(known + number if allocated else ~(known + number))
        elif freed[-1 - number] in index:
            order.append(~index[freed[-1 - number]])
    return AllocationTrace(micro_batch, tuple(regions), tuple(held), tuple(sizes), tuple(order))


def _sizes(event: Event, micro_batch: int, fixed_shapes: Collection[tuple[int, ...]]) -> tuple[float, float]:
    """Bytes of a block whatever the micro-batch, and bytes for each of its samples."""
    wanted = event.requested_bytes
    shape = tuple(int(size) for size in event.shape.strip("[]").split(",") if size.strip().isdecimal())
    if micro_batch == 1 or not shape or not wanted or wanted % micro_batch or shape in fixed_shapes:
        return float(wanted), 0.0
    if len(shape) == 3 and not event.is_output and event.operation.endswith(_WORKSPACES):
        return float(wanted), 0.0
    looked_at = shape if _is_telling(micro_batch) else shape[:1]
    if any(size and size % micro_batch == 0 for size in looked_at):
        return 0.0, wanted / micro_batch
    return float(wanted), 0.0


def _is_telling(number: int) -> bool:
    return number >= _LEAST_PRIME and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def _regions(held: dict[int, int], touched: dict[int, int], first: Event) -> list[tuple[int, int]]:
    """The allocator's pieces of address space: known at their starts, and for the largest at its end.

    It is not told where a region ends. But the largest free piece was told; it comes behind all that was held.
    """
    total = first.in_use_bytes + first.free_bytes
    largest_free = int(first.free_bytes * (1 - first.fragmentation)) // _ROUND_BYTES * _ROUND_BYTES
    extents: list[list[int]] = []
    for address, taken in sorted({**held, **touched}.items()):
        if extents and address - extents[-1][1] <= total // 8:
            extents[-1][1] = max(extents[-1][1], address + taken)
        else:
            extents.append([address, address + taken])
    used = [(start, end) for start, end in extents if any(start <= address < end for address in touched)]
    main = max(used, key=lambda extent: extent[1] - extent[0])
    regions = [(start, end - start) for start, end in used if (start, end) != main]
    start, end = main
    behind = max((address + taken for address, taken in held.items() if start <= address < end), default=start)
    most = total - sum(taken for _, taken in regions)
    regions.append((start, min(max(end, behind + largest_free) - start, most)))
    rest = most - regions[-1][1]
    if rest > largest_free:
        regions.append((max(s + taken for s, taken in regions) + _ROUND_BYTES, rest))  # not taken from the device yet
    return sorted(regions)


def _within(regions: list[tuple[int, int]], blocks: dict[int, int]) -> list[tuple[int, int]]:
    """The blocks that lie in a region, none over another."""
    inside: list[tuple[int, int]] = []
    for address, taken in sorted(blocks.items()):
        fits = any(start <= address and address + taken <= start + size for start, size in regions)
        if fits and (not inside or inside[-1][0] + inside[-1][1] <= address):
            inside.append((address, taken))
    return inside


def _unaccounted(regions: list[tuple[int, int]], taken: dict[int, int], rest: int) -> list[tuple[int, int]]:
    """Blocks for what is held, it is not known where: in the smallest holes, where the allocator puts small ones."""
    holes: list[tuple[int, int]] = []
    for start, size in regions:
        free_from = start
        for address, bytes_taken in [*sorted(taken.items()), (start + size, 0)]:
            if start <= address <= start + size:
                holes.append((address - free_from, free_from))
                free_from = max(free_from, address + bytes_taken)
    blocks = []
    for size, address in sorted(hole for hole in holes if hole[0] > 0):
        filled = min(size, rest) // _ROUND_BYTES * _ROUND_BYTES
        if filled <= 0:
            break
        blocks.append((address, filled))
        rest -= filled
    return blocks


def _addresses(variables: Iterable[Any]) -> dict[int, int]:
    """Where the variables' buffers lie on their device, as address to bytes; those that cannot be told are left out."""
    import tensorflow as tf

    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    found = {}
    for variable in variables:
        try:
            value = variable.read_value()
            capsule = tf.experimental.dlpack.to_dlpack(value)
        except (tf.errors.OpError, AttributeError, TypeError, ValueError, NotImplementedError):
            continue  # a type that DLPack lacks, a buffer that is a component of something else
        # The first field of DLPack's tensor is the address of its data.
        address = ctypes.cast(pointer(capsule, b"dltensor"), ctypes.POINTER(ctypes.c_void_p))[0]
        if address:
            found[int(address)] = int(value.dtype.size * (value.shape.num_elements() or 0))
    return found


def _read(folder: Path, device: str) -> list[Event]:
    reader = _reader()
    files = sorted(folder.rglob("*.xplane.pb"))
    if reader is None or not files or files[0].stat().st_size > _MOST_BYTES:
        return []
    space = reader.XSpace()
    space.ParseFromString(files[0].read_bytes())
    timed: list[tuple[int, Event]] = []
    for plane in space.planes:
        kinds = {number: named.name for number, named in plane.event_metadata.items()}
        names = {number: named.name for number, named in plane.stat_metadata.items()}
        for line in plane.lines:
            for event in line.events:
                kind = kinds[event.metadata_id]
                if kind in (_ALLOCATED, _FREED) and (found := _event(kind, event.stats, names, device)) is not None:
                    timed.append((line.timestamp_ns * 1000 + event.offset_ps, found))
    timed.sort(key=lambda each: each[0])
    return [event for _, event in timed]


def _event(kind: str, stats: Iterable[Any], names: dict[int, str], device: str) -> Event | None:
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
        )
    except KeyError:
        return None


def _tells(device: str) -> bool:
    """Whether the allocator of ``device`` is BFC, as the environment says: others tell nothing of use."""
    if device.startswith("GPU"):
        return os.environ.get("TF_GPU_ALLOCATOR", "").strip().lower() != "cuda_malloc_async"
    return arena.arena_limit_bytes(device) is not None


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
