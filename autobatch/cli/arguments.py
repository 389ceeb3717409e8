"""The values that options take, read from text: each raises ``ArgumentTypeError``, which argparse prints."""

from __future__ import annotations

import argparse
import math
import re
from dataclasses import dataclass

from autobatch.units import parse_bytes

SMALLEST_LIMIT_BYTES = 2**20  # TensorFlow counts the limit of an arena in MiB


@dataclass(frozen=True, slots=True)
class Share:
    """A memory limit as a share of the device's total."""

    fraction: float


def positive_int(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number, at least 1. Received: {text!r}")
    return int(text)


def seconds(text: str) -> float:
    value = _float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"a number of seconds above 0. Received: {text!r}")
    return value


def headroom(text: str) -> float:
    value = _float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"a share of the limit, at least 0 and below 1. Received: {text!r}")
    return value


def memory_limit(text: str) -> int | Share:
    """``"512MiB"``, ``"1.5GB"``, bytes, or ``"80%"``."""
    if text.rstrip().endswith("%"):
        percent = _float(text.rstrip()[:-1])
        if not 0 < percent <= 100:
            raise argparse.ArgumentTypeError(f"a percentage is above 0 and at most 100. Received: {text!r}")
        return Share(percent / 100)
    try:
        limit_bytes = parse_bytes(text)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(
            f'a size such as "512MiB" or "1.5GB", or a share of the device such as "80%". Received: {text!r}'
        ) from None
    if limit_bytes < SMALLEST_LIMIT_BYTES:
        raise argparse.ArgumentTypeError(f"at least 1 MiB. Received: {text!r}")
    return limit_bytes


def input_shape(text: str) -> tuple[int, ...]:
    """``"224,224,3"``."""
    if not re.fullmatch(r"[0-9]{1,9}(,[0-9]{1,9})*", text) or "0" in text.split(","):
        raise argparse.ArgumentTypeError(f'sizes above 0 such as "224,224,3". Received: {text!r}')
    return tuple(int(part) for part in text.split(","))


def device(text: str) -> str:
    if not re.fullmatch(r"CPU|GPU(:[0-9]{1,3})?", text.upper()):
        raise argparse.ArgumentTypeError(f'"CPU", "GPU" or "GPU:1". Received: {text!r}')
    return text.upper()


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan  # fails every comparison that follows
