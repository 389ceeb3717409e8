"""Under what a result is remembered: everything that decides which micro-batch fits and is fastest.

Made of plain values. What describes the model and its data comes as one digest from whoever has them at hand
(:mod:`autobatch.trial.content_digest`). Too much in a key costs a search that was not needed, too little a trial: a
result
that is found is run once before anything is made of it. The limit in force is no part of the key but is compared
(:func:`limits_agree`), since what is free on a device differs from run to run.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from autobatch.records import Environment

KEY_VERSION = 1
"""Raised when the same key comes to stand for something else."""

MORE = 1.05
"""A limit larger by this factor is still alike: a search would find a size that is hardly larger ..."""

LESS = 0.75
"""... and so is one smaller by this: what was found is too large, if anything, and the trial that confirms it tells."""

_VERSIONS = ("autobatch", "keras", "tensorflow")


@dataclass(frozen=True, slots=True)
class Key:
    """What a result is remembered under. ``limit_bytes`` is the limit in force, None where none is known."""

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
    """The key of a search.

    Args:
        content: A digest of model, optimizer, loss, input shapes and dtypes, device name, and the limits that somebody
            set.
        environment: Where the trials run.
        target_batch, largest_useful, objective, exact: What is searched for.
    """
    versions = dict(environment.versions)
    depends_on = {
        "key_version": KEY_VERSION,
        "content": content,
        "device": environment.device,
        "precision": environment.precision,
        "jit_compile": environment.jit_compile,
        "headroom": environment.headroom,
        "versions": {name: versions.get(name) for name in _VERSIONS},
        "target_batch": target_batch,
        "largest_useful": largest_useful,
        "objective": objective,
        "exact": exact,
    }
    text = json.dumps(depends_on, sort_keys=True, allow_nan=False)
    return Key(hashlib.sha256(text.encode()).hexdigest(), environment.limit_bytes, exact)


def limits_agree(now_bytes: int | None, then_bytes: int | None, *, is_bound: bool, exact: bool) -> bool:
    """Whether what was found under the limit of then may be what would be found under the one of now.

    Both are what was in force, which for a device that others use is what was free. Limits that somebody set are in the
    key's digest, to the byte. ``is_bound`` tells that memory ended the search; a target that fitted whole fits whole
    under a larger limit as well, and under a smaller one the trial tells. ``exact`` results are proven for one limit,
    to the byte.
    """
    if exact or now_bytes is None or then_bytes is None:
        return now_bytes == then_bytes
    return not is_bound or LESS * then_bytes <= now_bytes <= MORE * then_bytes
