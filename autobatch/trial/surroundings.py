"""Surroundings of trials: the device, its limit, what holds memory there already, and the versions."""

from __future__ import annotations

import gc
import platform

import keras
import tensorflow as tf

from autobatch.arguments import require_left
from autobatch.errors import warn
from autobatch.memory import limits
from autobatch.memory.other_users import HOW_TO_FREE
from autobatch.records import Environment, Limit
from autobatch.types import Model
from autobatch.units import format_bytes, headroom_share, less_headroom
from autobatch.version import __version__

_LEAST_HELD, _MUCH_HELD = 0.02, 0.25
"""Shares of the limit held by others from which on it is told in the report, and warned of."""


def environment_of(model: Model, device: str, limit: Limit, *, headroom: float, own_bytes: int) -> Environment:
    """Return the surroundings of trials of ``model``; warn if much of the limit is held by others.

    Args:
        own_bytes: what the model and its optimizer hold.
        limit: what ``device`` may hold.
        headroom: what is left alone of the limit: a share as a float, bytes as an int.

    Raises:
        ValueError: the headroom leaves nothing of the limit.
    """
    in_bytes = headroom if isinstance(headroom, int) else None
    if in_bytes is not None:
        require_left(in_bytes, limit.limit_bytes, limit.source)
    budget = None if limit.limit_bytes is None else less_headroom(limit.limit_bytes, headroom)
    versions = (("autobatch", __version__), ("tensorflow", tf.__version__), ("keras", keras.__version__))
    return Environment(
        device=device,
        limit_bytes=limit.limit_bytes,
        limit_source=limit.source,
        budget_bytes=budget,
        headroom=headroom_share(limit.limit_bytes, headroom),
        headroom_bytes=in_bytes,
        precision=str(model.dtype_policy.name),
        jit_compile=bool(model.jit_compile),
        versions=(*versions, ("python", platform.python_version())),
        held_by_others_bytes=_held_by_others(device, limit, own_bytes),
    )


def _held_by_others(device: str, limit: Limit, own_bytes: int) -> int:
    """Return the bytes held by anything but the model and its optimizer; warn if that is much of the limit."""

    def held_now() -> int:
        return max(0, (limits.bytes_in_use(device) or 0) - own_bytes)

    if limit.limit_bytes is None or held_now() < _LEAST_HELD * limit.limit_bytes:
        return 0
    gc.collect()  # a model that was dropped holds its memory until then
    held = held_now()
    if held < _LEAST_HELD * limit.limit_bytes:
        return 0
    if held > _MUCH_HELD * limit.limit_bytes:
        warn(
            f"{format_bytes(held)} of {format_bytes(limit.limit_bytes)} on {device} are held by other tensors of this "
            f"process, such as earlier models, and data on a CPU; this model has the rest. {HOW_TO_FREE}",
        )
    return held
