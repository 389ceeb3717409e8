"""Parts that each process of a training has of its own, beside what is alike in all: the chief keeps them for it.

These are the metrics, seeds and statistics of its replicas, the states of its callbacks, and its random numbers. What
is the same as the chief's is not sent.
"""

from __future__ import annotations

import hashlib
from typing import Any

from autobatch.backup import callback_states, packing, variables
from autobatch.backup.folder import BackupFolder
from autobatch.backup.identity import Identity
from autobatch.backup.processes import Processes
from autobatch.backup.training_parts import Training
from autobatch.data.random_states import RandomStates
from autobatch.errors import warn
from autobatch.seams import random_states

KEY = "of_others"
"""Name, in the chief's state, of the list of what the other processes have of their own."""

_UNKNOWN = -1.0
"""Mark of a part that cannot be kept; that of another is at least 0."""


def random_parts(of: Training) -> dict[str, Any]:
    """Return the states of callbacks and of random numbers, as plain values and arrays."""
    return {
        "callbacks": callback_states.states_of(of.callbacks),
        "random": RandomStates(of.batches.loader).as_plain(),
        "seeds": random_states.eager_seeds(),
    }


def gathered(processes: Processes, of: Training) -> list[dict[str, Any]]:
    """Give the chief what it does not have; return there, for each other process, the parts that differ from its own.

    Elsewhere the list is not complete.
    """
    if processes.count == 1:
        return []
    own = {**random_parts(of), "variables": variables.values_apart_from(of.variables, of.alike)}
    packed = {name: _packed(name, part) for name, part in own.items()}
    marks = processes.gather([_mark_of(data) for data in packed.values()], "what each worker has of its own")
    differ = marks != marks[0]
    if not differ.any():
        return [{}] * (processes.count - 1)
    sent = {
        name: own[name]
        for (name, data), is_other in zip(packed.items(), differ[processes.index], strict=True)
        if is_other and data is not None
    }
    of_each = processes.of_each(packing.to_bytes(sent), "what each worker has of its own")
    return [packing.from_bytes(data) for data in of_each[1:]] if processes.index == 0 else []


def _packed(name: str, part: Any) -> bytes | None:
    try:
        return packing.to_bytes(part)
    except TypeError as error:
        warn(f"This worker's {name} are in no backup, and a restart begins with the chief's: {error}")
        return None


def _mark_of(data: bytes | None) -> float:
    # 52 bits: a float64 holds them exactly
    return _UNKNOWN if data is None else float(int.from_bytes(hashlib.sha256(data).digest()[:6], "little"))


def kept_by_chief(folder: BackupFolder, identity: Identity, processes: Processes) -> dict[str, Any] | None:
    """Return the newest backup that is whole, as this process goes on from it; None if the chief has none.

    Raises:
        ValueError: it is one of another training.
    """

    def read() -> dict[str, Any] | None:
        if processes.index:
            return None
        folder.clean()
        found = folder.newest()
        if found is not None:
            identity.require_same(found)
        return found

    kept = processes.together(read, "the backup to go on from")
    if processes.count == 1:
        return kept
    data = processes.from_chief(b"" if kept is None else packing.to_bytes(kept), "the backup to go on from")
    if not data:
        return None
    if kept is not None:
        return kept
    kept = packing.from_bytes(data)
    own = kept[KEY][processes.index - 1]
    return {**kept, **own, "variables": {**kept["variables"], **own.get("variables", {})}}
