"""Thousands of searches over made-up curves: how many trials, how many failures, how close.

Run it from the repository's root: ``python -m tests.search.simulation [searches per shape]``.
"""

from __future__ import annotations

import itertools
import random
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from autobatch.records import SampleEstimate
from autobatch.search import Goal, Room, candidate_sizes, search

from .curves import SHAPES, make_device


@dataclass(frozen=True)
class Row:
    shape: str
    trials: int
    failures: int
    ratio: float


def simulate(
    shapes: Iterable[str],
    searches: int,
    *,
    exact: bool,
    hinted: bool,
    targeted: bool,
    failure: str,
    estimated: bool = False,
    seed: int = 0,
    sizes: tuple[float, float] = (6, 2000),
) -> Iterator[Row]:
    for shape in shapes:
        rng = random.Random(f"{seed} {shape}")
        for _ in range(searches):
            low, high = sizes
            largest = low * (high / low) ** rng.random()
            device, held = make_device(shape, rng, largest=largest, failure=failure)
            target = rng.choice((16, 32, 64, 128, 256, 512, 1000, 1024, 4096)) if targeted else None
            per_sample = (device.budget_bytes - held) / largest
            # Wrong by as much as it was seen to be on real models; the curves lose nothing to large tensors.
            estimate = SampleEstimate(per_sample * rng.uniform(0.6, 1.7), 0.0) if estimated else None
            result = search(
                device,
                Goal(target_batch=target, exact=exact),
                Room(device.budget_bytes, fixed_bytes_hint=held if hinted else None),
                estimate_sample=lambda estimate=estimate: estimate,
            )
            true = device.largest(candidate_sizes(target) if target else range(1, 1 << 20))
            found = result.largest_fit
            failures = sum(not trial.fits for trial in result.trials)
            ratio = (found or 0) / true if true else 1.0
            yield Row(shape, len(result.trials), failures, ratio)


def share(rows: list[Row], holds: Callable[[Row], bool]) -> float:
    return sum(holds(row) for row in rows) / len(rows)


def summary(rows: list[Row]) -> str:
    trials = sorted(row.trials for row in rows)
    return (
        f"{len(rows):6d} | {statistics.median(trials):3.0f} {trials[int(len(trials) * 0.95)]:3d} {trials[-1]:3d} "
        f"{share(rows, lambda row: row.trials > 4):6.1%} {share(rows, lambda row: row.trials > 6):6.1%} | "
        f"{sum(row.failures for row in rows) / len(rows):5.2f} {share(rows, lambda row: row.failures > 2):6.1%} "
        f"{max(row.failures for row in rows):3d} | {min(row.ratio for row in rows):5.3f} "
        f"{statistics.fmean(row.ratio for row in rows):5.3f} {share(rows, lambda row: row.ratio < 0.97):6.1%}"
    )


HEADING = (
    "                 searches | trials: median, p95, max, above 4, above 6 | failures: a search, above 2, max | "
    "found/true: least, mean, below 0.97"
)


def main(searches: int) -> None:
    print(HEADING)
    for exact, estimated, hinted, targeted in itertools.product(
        (False, True), (True, False), (True, False), (False, True)
    ):
        for failure in ("silent", "measured"):
            settings: dict[str, Any] = {"exact": exact, "estimated": estimated, "hinted": hinted}
            settings |= {"targeted": targeted, "failure": failure}
            print(", ".join(f"{name} {value}" for name, value in settings.items()))
            rows = list(simulate(SHAPES, searches, **settings))
            print(f"    {'all':15s}", summary(rows))
            if hinted and failure == "silent":
                for shape in SHAPES:
                    print(f"    {shape:15s}", summary([row for row in rows if row.shape == shape]))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 300)
