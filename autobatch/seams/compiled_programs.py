"""Memory of the programs that XLA has compiled: the buffers of each, and where they lie in the blocks that it asks for.

XLA plans all memory when it compiles. It writes the plan, its buffer assignment, into the ``HloProto`` of the program.
TensorFlow's profiler puts the ``HloProto`` of every program that runs into its file, so that reading it costs no
compilation.

Private here: ``tensorflow.compiler.xla.service.hlo_pb2``, the names of its fields, and the profile's plane
``/host:metadata`` (seen in 2.16 to 2.21 on a CPU). Where they are missing, only a hint is lost: the caller catches
what is raised.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

_MESSAGES = "tensorflow.compiler.xla.service.hlo_pb2"
_PLANE, _PROGRAM = "/host:metadata", "Hlo Proto"


@dataclass(frozen=True, slots=True)
class Buffer:
    """One value of a compiled program, at ``offset_bytes`` in its block. ``shape`` is empty if it is not known."""

    offset_bytes: int
    size_bytes: int
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Block:
    """One block that a compiled program asks the allocator for, and the buffers in it; some share their place."""

    size_bytes: int
    buffers: tuple[Buffer, ...]


def blocks_in(planes: Iterable[Any]) -> list[Block]:
    """Return the blocks of all compiled programs in a profile, given its planes."""
    return [
        block
        for plane in planes
        if plane.name == _PLANE
        for program in plane.event_metadata.values()
        for stat in program.stats
        if plane.stat_metadata[stat.metadata_id].name == _PROGRAM
        for block in blocks_of(stat.bytes_value)
    ]


def blocks_of(program: bytes) -> Iterator[Block]:
    """Yield the blocks that a compiled program, a serialized ``HloProto``, asks for: temporary values and outputs."""
    parsed = importlib.import_module(_MESSAGES).HloProto.FromString(program)
    shapes = {
        instruction.id: instruction.shape
        for computation in parsed.hlo_module.computations
        for instruction in computation.instructions
    }
    values = {value.id: value.defined_at for value in parsed.buffer_assignment.logical_buffers}
    for block in parsed.buffer_assignment.buffer_allocations:
        if block.is_entry_computation_parameter or block.is_constant or block.is_thread_local:
            continue
        buffers = (
            Buffer(each.offset, each.size, _shape(values.get(each.logical_buffer_id), shapes))
            for each in block.assigned
        )
        yield Block(block.size, tuple(buffers))


def _shape(place: Any, shapes: dict[int, Any]) -> tuple[int, ...]:
    shape = None if place is None else shapes.get(place.instruction_id)
    if shape is None:
        return ()
    for index in place.shape_index:
        shape = shape.tuple_shapes[index]
    return tuple(shape.dimensions)
