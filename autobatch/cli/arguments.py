"""Values of options, read from text and then checked in the same way as the arguments of ``fit`` and ``tune``."""

from __future__ import annotations

import argparse
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from autobatch import arguments
from autobatch.units import parse_bytes

SMALLEST_LIMIT_BYTES = 2**20  # TensorFlow counts the limit of an arena in MiB

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Share:
    """A memory limit as a share of the device's total."""

    fraction: float


def _option(check: Callable[[str], _T]) -> Callable[[str], _T]:
    """Wrap ``check`` so that argparse prints the fault that it finds, with the text as it was typed."""

    @functools.wraps(check)
    def read(text: str) -> _T:
        try:
            return check(text)
        except (TypeError, ValueError) as error:
            reason = str(error).partition(" Received: ")[0]
            raise argparse.ArgumentTypeError(f"{reason} Received: {text!r}") from None

    return read


@_option
def positive_int(text: str) -> int:
    """Read a whole number of at least 1."""
    # No more digits than Python reads at once, and ASCII digits alone: int() takes others as well.
    return arguments.positive_int(int(text) if re.fullmatch(r"[0-9]{1,18}", text) else text, "N")


@_option
def restarts(text: str) -> int:
    """Read a whole number of at least 0."""
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise ValueError("N must be a whole number of at least 0.")
    return int(text)


@_option
def seconds(text: str) -> float:
    """Read a number of seconds above 0."""
    return arguments.seconds(_number(text), "SECONDS")


@_option
def headroom(text: str) -> float:
    """Read a share of the limit, at least 0 and below 1, or bytes: ``"500MiB"``."""
    return arguments.headroom(_number(text))


@_option
def memory_limit(text: str) -> int | Share:
    """Read ``"512MiB"``, ``"1.5GB"``, bytes, or ``"80%"``."""
    if text.rstrip().endswith("%"):
        percent = _number(text.rstrip()[:-1])
        if not isinstance(percent, float) or not 0 < percent <= 100:
            raise ValueError("a percentage is above 0 and at most 100.")
        return Share(percent / 100)
    limit_bytes = parse_bytes(text, name='SIZE, unless it is a share of the device such as "80%",')
    if limit_bytes < SMALLEST_LIMIT_BYTES:
        raise ValueError("SIZE must be at least 1 MiB.")
    return limit_bytes


@_option
def input_shape(text: str) -> tuple[int, ...]:
    """Read ``"224,224,3"``."""
    if not re.fullmatch(r"[0-9]{1,9}(,[0-9]{1,9})*", text) or "0" in text.split(","):
        raise ValueError('sizes above 0 such as "224,224,3".')
    return tuple(int(part) for part in text.split(","))


@_option
def device(text: str) -> str:
    """Read ``"CPU"``, ``"GPU"`` or ``"GPU:1"``, in capitals or not."""
    if not re.fullmatch(r"CPU|GPU(:[0-9]{1,3})?", text.upper()):
        raise ValueError('"CPU", "GPU" or "GPU:1".')
    return text.upper()


def _number(text: str) -> Any:
    """Read a number; return ``text`` unchanged if it is none, for a check to refuse."""
    try:
        return float(text)
    except ValueError:
        return text
