"""Blocks that lay in the allocator's memory before a recording: known ones, and others that stand for the rest.

Between what is held lie the holes that a block may get. So a trace is replayed as well as these are known. The
addresses of weights and of other tensors can be looked up. Everything else is known by its bytes alone.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

from autobatch.memory.arena_regions import ROUND_BYTES
from autobatch.types import Tensor, Variable

_ABOUT = 1.00001
"""Factor by which the largest free piece may be told too large, since ``fragmentation`` is told to six digits."""


def within(regions: list[tuple[int, int]], blocks: dict[int, int]) -> list[tuple[int, int]]:
    """Return the blocks that lie in a region; of two that overlap, only the lower one."""
    inside: list[tuple[int, int]] = []
    for address, taken in sorted(blocks.items()):
        fits = any(start <= address and address + taken <= start + size for start, size in regions)
        if fits and (not inside or inside[-1][0] + inside[-1][1] <= address):
            inside.append((address, taken))
    return inside


def unaccounted(
    regions: list[tuple[int, int]],
    held: list[tuple[int, int]],
    touched: dict[int, int],
    rest: int,
    largest_free: int | None,
) -> list[tuple[int, int]]:
    """Return blocks that stand for ``rest`` bytes held at unknown addresses.

    They fill the smallest holes between what is ``held`` and what moved, where the allocator puts small blocks. The
    ``largest_free`` piece, if it is known, stays free.
    """
    kept_out = [*held, *touched.items()]
    if largest_free is not None:
        size, address = max(_holes(regions, held), default=(0, 0))
        if largest_free <= size * _ABOUT:
            largest_free = min(size, largest_free)
            kept_out.append((address + size - largest_free, largest_free))
    blocks = []
    # Where something moved there may have been a smaller block before, which is held: what is behind that is free.
    holes = _holes(regions, kept_out)
    before = {start + size: size for start, size in held}
    # A chunk is not split where it is less than twice as large as the block, so that a block may have all of the hole.
    for size, address in sorted(holes, key=lambda hole: (hole[0] >= before.get(hole[1], 0), hole)):
        filled = min(size, rest) // ROUND_BYTES * ROUND_BYTES
        if filled > 0:
            blocks.append((address, filled))
        rest -= filled
    return blocks


def _holes(regions: Iterable[tuple[int, int]], taken: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return (bytes, start) of each piece of the ``regions`` that no (start, bytes) of ``taken`` covers."""
    blocks = sorted(taken)
    holes = []
    for start, size in regions:
        free_from = start
        for address, bytes_taken in [*blocks, (start + size, 0)]:
            if start <= address <= start + size:
                holes.append((address - free_from, free_from))
                free_from = max(free_from, address + bytes_taken)
    return [hole for hole in holes if hole[0] > 0]


def addresses_of(held: Iterable[Variable | Tensor], device: str) -> dict[int, int]:
    """Return the address of each buffer on ``device`` with its bytes; one whose address is unknown is left out."""
    import tensorflow as tf

    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]

    def address_of(value: Tensor) -> int | None:
        capsule = tf.experimental.dlpack.to_dlpack(value)
        # The first field of DLPack's tensor is the address of its data.
        address: int | None = ctypes.cast(pointer(capsule, b"dltensor"), ctypes.POINTER(ctypes.c_void_p))[0]
        return address

    found = {}
    for each in held:
        try:
            value = each.read_value() if hasattr(each, "read_value") else each
            if not value.device.endswith(device):
                continue
            address = address_of(value)
            if hasattr(each, "read_value") and address != address_of(each.read_value()):
                continue  # what was scattered into is copied by every reading
        except (tf.errors.OpError, AttributeError, TypeError, ValueError, NotImplementedError):
            continue  # a type that DLPack lacks, a buffer that is a component of something else
        if address:
            found[int(address)] = int(value.dtype.size * (value.shape.num_elements() or 0))
    return found
