"""Recordings as an allocator would leave them, and what may become of them on the way."""

from __future__ import annotations

import random
from dataclasses import replace

from autobatch.memory.profile_reader import Event
from autobatch.search.replay import Allocator

UNIT = 256


def whole(rng: random.Random, micro_batch: int) -> tuple[dict[int, int], list[Event]]:
    """What is held, and the events of one small step on a model of the allocator, in one region or in two."""
    base = 0x7F0000000000 + UNIT * rng.randrange(1000)
    limit = UNIT * rng.choice((4_000, 40_000, 400_000))
    if rng.random() < 0.5:
        regions: tuple[tuple[int, int], ...] = ((base, limit),)
    else:
        first = UNIT * rng.randrange(500, limit // UNIT - 500)
        gap = UNIT * rng.choice((0, 1, 1000, 10**6, 10**9))
        regions = ((base, first), (base + first + gap, limit - first))
    weights = Allocator(regions, ())
    held = {weights.allocate(size): size for size in rng.choices((UNIT, 4 * UNIT, 40 * UNIT), k=rng.randrange(6))}
    allocator = Allocator(regions, tuple(held.items()))
    events: list[Event] = []
    live: list[tuple[int, int, int]] = [(address, size, size) for address, size in held.items()]

    def note(allocated: bool, address: int, wanted: int, taken: int) -> None:
        shape = f"[{micro_batch},{wanted // 4 // micro_batch}]" if wanted % (4 * micro_batch) == 0 else ""
        free = limit - allocator.in_use_bytes
        events.append(
            Event(allocated, address, wanted, taken, shape, "op", True, allocator.in_use_bytes, free, rng.random())
        )

    for _ in range(rng.randrange(1, 24)):
        if live and rng.random() < 0.45:
            address, wanted, taken = live.pop(rng.randrange(len(live)))
            allocator.release(address)
            note(False, address, wanted, taken)
        else:
            wanted = rng.choice((4, 1000, 4 * micro_batch * 10, 4 * micro_batch * 100))
            before = allocator.in_use_bytes
            address = allocator.allocate(wanted)
            taken = allocator.in_use_bytes - before
            live.append((address, wanted, taken))
            note(True, address, wanted, taken)
    return held, events


def damaged(rng: random.Random, held: dict[int, int], events: list[Event]) -> tuple[dict[int, int], list[Event]]:
    """The same with one to three faults: events lost, doubled, moved or cut off, figures and places that are wrong."""
    held, events = dict(held), list(events)
    for _ in range(rng.randrange(1, 4)):
        if not events:
            break
        at = rng.randrange(len(events))
        kind = rng.randrange(10)
        if kind == 0:
            del events[at]
        elif kind == 1:
            events.insert(rng.randrange(len(events)), events[at])
        elif kind == 2:
            events.insert(rng.randrange(len(events)), events.pop(at))
        elif kind == 3:
            rng.shuffle(events)
        elif kind == 4:
            events = events[: at + 1] if rng.random() < 0.5 else events[at:]
        elif kind == 5:
            name = rng.choice(("requested_bytes", "chunk_bytes", "in_use_bytes", "free_bytes", "address"))
            wrong = rng.choice((0, 1, -UNIT, 2**63, rng.randrange(2**40)))
            events[at] = replace(events[at], **{name: wrong})
        elif kind == 6:
            figure = rng.choice((float("nan"), float("inf"), -1.0, 2.0, 1.0))
            events[at] = replace(events[at], fragmentation=figure)
        elif kind == 7:
            shape = rng.choice(("[", "[-1,0]", "[0]", "?,1]", "[999999999999,7]"))
            events[at] = replace(events[at], shape=shape)
        elif kind == 8:  # two blocks over one another
            shifted = events[at].address + UNIT * rng.randrange(-3, 4)
            events[at] = replace(events[at], address=shifted)
        else:  # a variable over a block, or over another variable
            held[events[at].address + UNIT * rng.randrange(-2, 3)] = rng.choice((0, UNIT, 10**6, 2**62))
    return held, events
