"""Keys under which results are remembered: everything that decides which micro-batch fits and is fastest.

A key is made of plain values. The model and its data come as one digest (:mod:`autobatch.trial.content_digest`). Too
much in a key costs a search that was not needed. Too little costs a trial, for a result that is found is run once
before it is used. The limit in force is not in the digest but is compared (:func:`limits_agree`), since what is free
on a device differs from run to run.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from autobatch.records import Environment

KEY_VERSION = 1
"""Version of the keys; it is raised when the same values come to stand for something else."""

MORE = 1.05
"""Factor over the remembered limit up to which a limit is alike: a search would find a size that is hardly larger."""

LESS = 0.75
"""Factor of the remembered limit down to which a limit is alike: the trial that confirms a size shows if it is too
large."""

_VERSIONS = ("autobatch", "keras", "tensorflow")


@dataclass(frozen=True, slots=True)
class Key:
    """The key of one search. ``limit_bytes`` is the limit in force, None where none is known."""

    digest: str
    limit_bytes: int | None
    exact: bool


def make_key(
    content: str,
    environment: Environment,
    *,
    target_batch: int | None,
    largest_useful: int | None,
    objective: str,
    exact: bool,
) -> Key:
    """Make the key of a search.

    Args:
        content: A digest of model, optimizer, loss, input shapes and dtypes, device name, and the limits that somebody
            set.
        environment: The conditions under which the trials run.
        target_batch, largest_useful, objective, exact: The aim of the search.
    """
    versions = dict(environment.versions)
    depends_on = {
        "key_version": KEY_VERSION,
        "content": content,
        "device": environment.device,
        "precision": environment.precision,
        "jit_compile": environment.jit_compile,
        "headroom": environment.headroom if environment.headroom_bytes is None else f"{environment.headroom_bytes} B",
        "versions": {name: versions.get(name) for name in _VERSIONS},
        "target_batch": target_batch,
        "largest_useful": largest_useful,
        "objective": objective,
        "exact": exact,
    }
    text = json.dumps(depends_on, sort_keys=True, allow_nan=False)
    return Key(hashlib.sha256(text.encode()).hexdigest(), environment.limit_bytes, exact)


def limits_agree(now_bytes: int | None, then_bytes: int | None, *, is_bound: bool, exact: bool) -> bool:
    """Return True if a result found under ``then_bytes`` may be used under ``now_bytes``.

    Both are limits in force, which for a device that others use is what was free. Limits that somebody set are in the
    key's digest, to the byte. Without ``is_bound``, memory did not limit the result, and any two limits agree: the size
    fits under a larger limit as well, and under a smaller one the trial that confirms it decides. An ``exact`` result
    is proven for one limit only, to the byte.
    """
    if exact or now_bytes is None or then_bytes is None:
        return now_bytes == then_bytes
    return not is_bound or LESS * then_bytes <= now_bytes <= MORE * then_bytes
