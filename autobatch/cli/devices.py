"""``autobatch devices``: the devices to train on, how much memory each has, who holds it, and what limits it.

The command asks the driver and the operating system, not TensorFlow. So it answers at once and takes no memory on any
device.
"""

from __future__ import annotations

import argparse
import os
import platform
from typing import TYPE_CHECKING

from autobatch.cli.exit_codes import OK
from autobatch.report.sentences import printable
from autobatch.units import format_bytes

if TYPE_CHECKING:
    from autobatch.memory.nvml import NvmlAnswer, NvmlCard
    from autobatch.records import Limit


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "devices",
        help="show each device, its memory, who uses it, and the limits in force",
        description="Show each device, its memory, who uses it, and the limits in force.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    del options
    from autobatch.memory import nvml

    print("\n".join([*_gpu_lines(nvml.devices()), "", *_host_lines()]))
    return OK


def _gpu_lines(answer: NvmlAnswer) -> list[str]:
    if not answer.cards:
        return [f"No NVIDIA GPU: {printable(answer.reason) or 'the driver lists none'}."]
    lines = []
    for card in answer.cards:
        lines += _card_lines(card)
    if answer.reason:
        lines.append(f"Not all cards answered: {printable(answer.reason)}.")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        lines.append(f"CUDA_VISIBLE_DEVICES={visible!r} decides which of these TensorFlow sees.")
    return lines


def _card_lines(card: NvmlCard) -> list[str]:
    kind = "MIG instance of a GPU" if card.mig_parent_uuid else f"GPU {card.index}"
    memory = f"{format_bytes(card.total_bytes)}, {format_bytes(card.free_bytes)} free"
    lines = [f"{kind}: {printable(card.name)}", f"  memory   {memory}"]
    if card.mig_enabled:
        lines.append("  split    into MIG instances; programs see those, not this card")
    if card.processes is None:
        lines.append("  used by  the driver would not tell")
    elif not card.processes:
        lines.append("  used by  nobody")
    for process in card.processes or ():
        size = "an unknown amount" if process.used_bytes is None else format_bytes(process.used_bytes)
        lines.append(f"  used by  {printable(process.name or 'process')} (pid {process.pid}): {size}")
    return lines


def _host_lines() -> list[str]:
    from autobatch.cli.totals import host_total_bytes

    lines = [
        f"Host: {platform.machine()}, {os.cpu_count()} CPU cores",
        f"  memory   {format_bytes(host_total_bytes())}",
    ]
    return lines + [f"  limit    {_limit_line(limit)}" for limit in _host_limits()]


def _host_limits() -> tuple[Limit, ...]:
    from autobatch.memory import limits

    return limits.all_limits("CPU:0")


def _limit_line(limit: Limit) -> str:
    size = "unknown" if limit.limit_bytes is None else format_bytes(limit.limit_bytes)
    return f"{size} ({limit.source})" + (", held by the allocator" if limit.enforced else "")
