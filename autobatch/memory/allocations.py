"""Recordings of what a piece of a program asks of TensorFlow's allocator: every block, in order, with its address.

TensorFlow's BFC allocator serves GPUs and limited CPU arenas. It reports each allocation to its profiler: bytes,
address, the operation that asked, and the shape of the tensor. So a profile of one small step is enough to compute
where everything will lie in memory during a large one: see :mod:`autobatch.search.replay`.

A recording is only a hint. There is none where it cannot be made or read, or cannot be true: events are lost or out of
order, or blocks overlap. The search then goes on without it, for no error of this module leaves it.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import tempfile
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from autobatch.allocation_trace import AllocationTrace
from autobatch.memory import arena, arena_regions, held_blocks, profile_reader
from autobatch.memory.arena_regions import ROUND_BYTES
from autobatch.memory.compiled_growth import growth
from autobatch.memory.profile_reader import Event
from autobatch.seams.compiled_programs import Block
from autobatch.types import Tensor, Variable

logger = logging.getLogger(__name__)

SWITCH = "AUTOBATCH_RECORD_ALLOCATIONS"
"""Name of the environment variable that decides about recording: "0" leaves the profiler alone."""

_OF_THE_PROFILER = (b"profiler_session.cc", b"save_profile.cc")

_LEAST_PRIME = 11
"""Least prime micro-batch that is unlikely to divide a dimension that has nothing to do with it."""

_WORKSPACES = ("Conv2DBackpropInput", "Conv2DBackpropFilter")
"""Operations with temporaries of rank 3 that do not grow: a CPU works on as many images at once as 30 MiB hold."""

_TURNS = 10
"""Turns of threads from which on operations ran side by side: with one thread for them there are 1 to 3 in a step."""


@dataclass(slots=True)
class Recording:
    """Events that :func:`recording` saw, in order. ``held`` gives bytes by address for the variables before it.

    ``compiled`` are the blocks that programs compiled by XLA ask for, by their own plans.
    """

    held: dict[int, int] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    compiled: list[Block] = field(default_factory=list)

    def most_bytes(self, *, leaving_out: str | None = None) -> int:
        """Return the most bytes that were held at one time beyond what was held before the recording.

        Bytes count as they were asked for, without the allocator's rounding. A variable's new value counts until the
        old one is given back. Blocks of operations whose name contains ``leaving_out`` are not counted.
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
def recording(device: str, held: Iterable[Variable | Tensor]) -> Iterator[Recording]:
    """Record what the ``with`` block allocates on ``device``; the addresses of what is ``held`` are looked up first.

    The recording is complete once the ``with`` block has ended. It stays empty where nothing can be recorded, and where
    the ``with`` block raises.
    """
    import tensorflow as tf

    found = Recording()
    if os.environ.get(SWITCH) == "0" or not _tells(device):
        yield found
        return
    profiler = tf.profiler.experimental
    with tempfile.TemporaryDirectory(prefix="autobatch-") as folder:
        started = False
        with _as_a_hint("started"):
            found.held = held_blocks.addresses_of(held, device)
            # No options: TensorFlow 2.21 takes none of them, and complains.
            with _silenced():
                profiler.start(folder)
            started = True
        saved = False
        try:
            yield found
            saved = True
        finally:
            if started:
                with _as_a_hint("ended"), _silenced():
                    profiler.stop(save=saved)
        if started:
            with _as_a_hint("read"):
                found.events = profile_reader.read(Path(folder), device)
            with _as_a_hint("read as compiled"):
                found.compiled = profile_reader.read_compiled(Path(folder))


@contextlib.contextmanager
def _as_a_hint(done: str) -> Iterator[None]:
    """Log every error of the ``with`` block and suppress it."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - whatever a profiler or a damaged file raises must not end a search
        logger.info("allocations are not recorded, for the recording could not be %s: %r", done, error)


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Keep the profiler's own messages from standard error; write all others there when the ``with`` block ends."""
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
    """Return what was recorded while ``micro_batch`` samples ran, as a trace that can be replayed for other sizes.

    A block grows with the micro-batch if the first dimension of its tensor is a multiple of it. Any dimension counts if
    the micro-batch is a prime of at least 11. ``fixed_shapes`` are the shapes of the weights, which never grow. The
    growth of a block of a compiled program, which holds many values, comes from the program's own plan.
    The result is None where nothing was recorded, or what was recorded cannot be true.
    """
    with _as_a_hint("believed"):
        return _trace_of(found, micro_batch, fixed_shapes) if found.events else None
    return None


def asked_peak_bytes(found: Recording) -> int | None:
    """Return the most bytes held at one time, each recorded block by what was asked for; None if nothing is believed.

    The allocator counts the chunk that it gave. It does not split a free chunk that is less than twice as large as the
    block, and not 128 MiB larger, so that a chunk may hold up to that much more.
    """
    with _as_a_hint("believed"):
        if found.events:
            _require_possible(found.events)
            return _in_use_before(found.events[0]) + found.most_bytes()
    return None


def _in_use_before(first: Event) -> int:
    return first.in_use_bytes - (first.chunk_bytes if first.allocated else -first.chunk_bytes)


def _trace_of(found: Recording, micro_batch: int, fixed_shapes: Collection[tuple[int, ...]]) -> AllocationTrace:
    _require_possible(found.events)
    first = found.events[0]
    blocks: dict[int, int] = {}
    live: dict[int, int] = {}
    order: list[int] = []
    sizes: list[tuple[float, float]] = []
    freed: list[int] = []
    steps: list[tuple[bool, int]] = []
    places: list[tuple[int, int]] = []
    planned = _planned(found.compiled, micro_batch, fixed_shapes, at_most=first.in_use_bytes + first.free_bytes)
    for event in found.events:
        if event.allocated:
            places.append((event.address, event.chunk_bytes))
            live[event.address] = len(sizes)
            steps.append((True, len(sizes)))
            sizes.append(planned.get(event.requested_bytes) or _sizes(event, micro_batch, fixed_shapes))
        elif event.address in live:
            steps.append((False, live.pop(event.address)))
        else:
            blocks[event.address] = event.chunk_bytes
            steps.append((False, -1 - len(freed)))
            freed.append(event.address)
    for address, held_bytes in found.held.items():
        blocks.setdefault(address, -(-held_bytes // ROUND_BYTES) * ROUND_BYTES)
    in_use = _in_use_before(first)
    touched = {event.address: event.chunk_bytes for event in found.events}
    regions = arena_regions.find_regions(found.events, blocks)
    held = held_blocks.within(regions, blocks)
    lost = [address for address in freed if address not in dict(held)]
    if lost:
        raise ValueError(f"blocks that were given back do not lie in the allocator's memory: {lost[:3]}")
    elsewhere = first.in_use_bytes + first.free_bytes - sum(taken for _, taken in regions)
    unknown = in_use - sum(taken for _, taken in held) - max(0, elsewhere)
    largest_free = arena_regions.largest_free_before(found.events)
    held += held_blocks.unaccounted(regions, held, touched, unknown, largest_free)
    held.sort()
    index = {address: number for number, (address, _) in enumerate(held)}
    known = len(held)
    for allocated, number in steps:
        if number >= 0:
            order.append(known + number if allocated else ~(known + number))
        else:
            order.append(~index[freed[-1 - number]])
    # The block of a compiled program is alone, and holds nearly everything.
    compiled = max((event.requested_bytes for event in found.events if event.allocated), default=0) in planned
    in_parallel = not compiled and _turns(found.events) >= _TURNS
    # Pieces of one operation ask for temporaries alone, in many threads.
    outputs = [event for event in found.events if event.allocated and event.is_output]
    within_operations = in_parallel and _turns(outputs) < _TURNS
    memory = tuple(regions), tuple(held), tuple(sizes), tuple(order)
    trace = AllocationTrace(micro_batch, *memory, in_parallel, compiled, within_operations)
    return _settled(trace, places) if compiled else trace


def _settled(trace: AllocationTrace, places: Sequence[tuple[int, int]]) -> AllocationTrace:
    """Return a trace as the next trial will begin: what this one left behind is held, what it gave back is not.

    The first trial makes what stays, such as slots of the optimizer. Where that lies decides where the single block of
    a compiled program finds room. ``places`` are the addresses and chunks of the trial's own blocks.
    """
    known = len(trace.held)
    alive = set(range(known))
    for step in trace.order:
        alive ^= {step if step >= 0 else ~step}
    stays = {block for block in alive if block < known or not trace.sizes[block - known][1]}
    held = sorted((trace.held[block] if block < known else places[block - known], block) for block in stays)
    others = [block for block in range(known, known + len(trace.sizes)) if block not in stays]
    index = {block: number for number, block in enumerate(others, len(held))}
    order = ((index.get(step), True) if step >= 0 else (index.get(~step), False) for step in trace.order)
    return replace(
        trace,
        held=tuple(place for place, _ in held),
        sizes=tuple(trace.sizes[block - known] for block in others),
        order=tuple(block if allocated else ~block for block, allocated in order if block is not None),
    )


def _planned(
    blocks: Iterable[Block], micro_batch: int, fixed_shapes: Collection[tuple[int, ...]], *, at_most: int
) -> dict[int, tuple[float, float]]:
    """Return the growth of the blocks of compiled programs, by their size in bytes; of equals, the one that grows most.

    Programs of other sizes may be among them, which were compiled earlier. Their blocks have other sizes, unless they
    do not grow.
    """
    found: dict[int, tuple[float, float]] = {}
    for block in blocks:
        known = growth(block, micro_batch, fixed_shapes, at_most=at_most)
        size = block.size_bytes
        found[size] = max(known, found.get(size, known), key=lambda each: each[1])
    return found


def _turns(events: Sequence[Event]) -> int:
    """Return how often another thread asked for memory than the one before."""
    return sum(one.thread != other.thread for one, other in itertools.pairwise(events))


def _sizes(event: Event, micro_batch: int, fixed_shapes: Collection[tuple[int, ...]]) -> tuple[float, float]:
    """Return the bytes of a block that do not depend on the micro-batch, and its bytes for each sample."""
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


def _require_possible(events: Sequence[Event]) -> None:
    """Refuse events that no allocator can have seen: lost, doubled, out of order.

    Raises:
        ValueError: says what is impossible, and where.
    """
    live: dict[int, int] = {}
    starts: list[int] = []
    in_use = None
    for number, event in enumerate(events):
        sizes = (event.address, event.requested_bytes, event.chunk_bytes, event.in_use_bytes, event.free_bytes)
        if min(sizes) < 0 or not 0 <= event.fragmentation <= 1:
            raise ValueError(f"event {number} has a figure that cannot be: {event}")
        if event.chunk_bytes < max(event.requested_bytes, 1):
            raise ValueError(f"event {number} is about a chunk smaller than what was asked for: {event}")
        change = event.chunk_bytes if event.allocated else -event.chunk_bytes
        if in_use is not None and in_use + change != event.in_use_bytes:
            raise ValueError(f"the bytes in use do not add up at event {number}: {event}, after {in_use}")
        in_use = event.in_use_bytes
        if event.allocated:
            place = bisect_left(starts, event.address)
            below, above = starts[max(place - 1, 0) : place], starts[place : place + 1]
            if (below and below[0] + live[below[0]] > event.address) or (
                above and above[0] < event.address + event.chunk_bytes
            ):
                raise ValueError(f"event {number} puts a block over another one: {event}")
            starts.insert(place, event.address)
            live[event.address] = event.chunk_bytes
        elif event.address in live:
            if live.pop(event.address) != event.chunk_bytes:
                raise ValueError(f"event {number} gives back another chunk than was taken: {event}")
            starts.remove(event.address)


def _tells(device: str) -> bool:
    """Return True if ``device`` has the BFC allocator; other allocators report nothing of use."""
    if device.startswith("GPU"):
        return os.environ.get("TF_GPU_ALLOCATOR", "").strip().lower() != "cuda_malloc_async"
    return arena.arena_limit_bytes(device) is not None
