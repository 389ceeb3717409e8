"""What the search's rules save where no recording leads it, beside plain bisection and a plain secant.

    python benchmarks/search_rules.py

Nothing is run on a device. The memory curves are those that ``benchmarks/search_cost.py`` has measured of ten real
models (``benchmarks/results/search_cost.json``), with a straight line between neighbouring sizes. Each model is
searched under its own limit and under smaller ones, 24 in all. A size runs out of memory where it would be further into
its limit than the largest size was that ran under the real one: the free memory of a nearly full allocator is in
pieces. All three begin with the same first trial: from the same estimate, or at 8.

- The rules: :mod:`autobatch.search.proposals_by_line`.
- Bisection: the size doubles until it fails, and is then halved between what fits and what fails, to 3 %.
- Secant: the line through the two largest sizes that fit leads, with a margin of 2 %. What fails against it is
  bisected.
"""

from __future__ import annotations

import argparse
import bisect
import itertools
import json
import math
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from autobatch.records import Outcome, SampleEstimate, TrialRequest, TrialResult
from autobatch.search import Goal, Room, candidate_sizes, driver, proposals_by_line, search
from autobatch.search.bracket import Bracket, Stage
from autobatch.search.memory_model import fit_memory_model, largest_within
from autobatch.search.moves import Measure, Run, SearchTerms, Stop, size_between

CURVES = Path(__file__).parent / "results" / "search_cost.json"
LIMITS = 24
LEAST_SHARE = 0.35
TARGETS = (64, 128, 256, 512, 1000, 1024)
AIM = 0.9775
CLOSE_ENOUGH = proposals_by_line.CLOSE_ENOUGH

Proposer = Callable[[Bracket, Sequence[TrialResult], SearchTerms], Run | Measure | Stop]


def _first_or_last(bracket: Bracket, trials: Sequence[TrialResult], terms: SearchTerms) -> Run | Stop | None:
    low, high = bracket.largest_fit, bracket.smallest_failure
    if bracket.stage is Stage.UNTRIED:
        proposal = proposals_by_line.propose(bracket, trials, terms)
        assert isinstance(proposal, Run)
        return proposal
    if bracket.is_closed:
        return Stop("closed")
    if low is None:
        assert high is not None
        return Run(bracket.floor(high // 2))
    if not terms.exact and high is not None and low >= CLOSE_ENOUGH * bracket.untried[-1]:
        return Stop("within 3 %")
    return None


def bisection(bracket: Bracket, trials: Sequence[TrialResult], terms: SearchTerms) -> Run | Stop:
    proposal = _first_or_last(bracket, trials, terms)
    if proposal is not None:
        return proposal
    low, high = bracket.largest_fit or 1, bracket.smallest_failure
    return Run(bracket.floor(2 * low) if high is None else size_between(bracket, low, high))


def secant(bracket: Bracket, trials: Sequence[TrialResult], terms: SearchTerms) -> Run | Stop:
    proposal = _first_or_last(bracket, trials, terms)
    if proposal is not None:
        return proposal
    low, high, budget = bracket.largest_fit or 1, bracket.smallest_failure, terms.budget_bytes
    fit = fit_memory_model(trials, budget_bytes=budget, fixed_bytes_hint=terms.fixed_bytes_hint)
    misled = high is not None and fit is not None and budget is not None and fit.model.peak_bytes(high) <= budget
    if budget is None or fit is None or misled or len(trials) >= proposals_by_line.MODEL_TRIALS:
        return bisection(bracket, trials, terms)
    edge = largest_within(fit.model, budget, at_most=bracket.untried[-1])
    if edge < bracket.untried[0]:
        return Run(bracket.untried[0]) if terms.exact else Stop("the next size is predicted not to fit")
    if terms.exact:
        return Run(bracket.floor(edge))
    if low >= CLOSE_ENOUGH * edge:
        return Stop("close to the prediction")
    return Run(bracket.floor(max(low + 1, math.ceil(AIM * edge))))


@dataclass(frozen=True)
class Curve:
    """Measured peaks of one model, in bytes, and what was held before each."""

    sizes: list[int]
    peaks: list[float]
    held: list[float]

    @classmethod
    def of(cls, measurements: list[dict[str, Any]]) -> Curve:
        fitting: dict[int, list[dict[str, Any]]] = {}
        for row in measurements:
            if row["outcome"] == "fits" and row["peak_bytes"]:
                fitting.setdefault(row["micro_batch"], []).append(row)
        sizes = sorted(fitting)
        peaks = [max(row["peak_bytes"] for row in fitting[size]) for size in sizes]
        held = [statistics.median(row["held_bytes"] for row in fitting[size]) for size in sizes]
        return cls(sizes, list(itertools.accumulate(peaks, max)), held)

    def peak(self, size: int) -> float:
        rise = (self.peaks[-1] - self.peaks[0]) / (self.sizes[-1] - self.sizes[0])
        if size < self.sizes[0]:
            return max(self.peaks[0] / 2, self.peaks[0] - rise * (self.sizes[0] - size))
        if size >= self.sizes[-1]:
            return self.peaks[-1] + rise * (size - self.sizes[-1])
        after = bisect.bisect_right(self.sizes, size)
        share = (size - self.sizes[after - 1]) / (self.sizes[after] - self.sizes[after - 1])
        return self.peaks[after - 1] + share * (self.peaks[after] - self.peaks[after - 1])

    def held_before(self, size: int) -> float:
        return self.held[min(bisect.bisect_left(self.sizes, size), len(self.held) - 1)]


@dataclass(frozen=True)
class Row:
    trials: int
    failures: int
    share: float


def searches(models: dict[str, Any], *, headroom: float, exact: bool, estimated: bool, targeted: bool) -> Iterator[Row]:
    for name, model in models.items():
        curve = Curve.of(model["measurements"])
        real = model["limit_mib"] * 2**20
        usable = curve.peak(model["true_largest"]) / real
        draws = random.Random(name)
        for number in range(LIMITS):
            limit = real if number == 0 else real * draws.uniform(LEAST_SHARE, 1)
            target = draws.choice(TARGETS) if targeted else None
            budget = int(limit * (1 - headroom))
            if 0.9 * limit < curve.peak(2):
                continue

            def trial(
                request: TrialRequest, curve: Curve = curve, edge: float = usable * limit, budget: int = budget
            ) -> TrialResult:
                peak = int(curve.peak(request.micro_batch))
                if peak > edge:
                    return TrialResult(request.micro_batch, Outcome.OUT_OF_MEMORY)
                held = min(peak, int(curve.held_before(request.micro_batch)))
                outcome = Outcome.FITS if peak <= budget else Outcome.OUT_OF_MEMORY
                return TrialResult(request.micro_batch, outcome, peak_bytes=peak, held_bytes=held)

            estimate = SampleEstimate(**model["estimate"]) if estimated else None
            result = search(
                trial,
                Goal(target_batch=target, exact=exact),
                Room(
                    budget,
                    headroom_bytes=int(limit) - budget,
                    fixed_bytes_hint=min(model["fixed_bytes_hint"], budget - 1),
                ),
                estimate_sample=lambda estimate=estimate: estimate,
            )
            candidates = candidate_sizes(target) if target else range(1, 4096)
            true = max(size for size in candidates if curve.peak(size) <= min(budget, usable * limit))
            failures = sum(not trial.fits and trial.peak_bytes is None for trial in result.trials)
            yield Row(len(result.trials), failures, (result.largest_fit or 0) / true)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    models = json.loads(CURVES.read_text())["models"]
    proposers: dict[str, Proposer] = {"rules": proposals_by_line.propose, "bisection": bisection, "secant": secant}
    print("| headroom, mode, first trial, candidates | searcher | searches | trials: median, 95 %, most |", end="")
    print(" out of memory a search | found / largest: mean, least |\n|---|---|---|---|---|---|")
    for headroom, exact, estimated, targeted in itertools.product((0.05, 0.0), *[(False, True)] * 3):
        mode = f"{headroom:.0%}, {'exact' if exact else 'default'}, {'by estimate' if estimated else 'at 8'}"
        mode += f", {'of a target' if targeted else 'all'}"
        for name, proposer in proposers.items():
            with mock.patch.object(driver, "propose", proposer):
                rows = list(searches(models, headroom=headroom, exact=exact, estimated=estimated, targeted=targeted))
            trials = sorted(row.trials for row in rows)
            shares = [row.share for row in rows]
            print(
                f"| {mode} | {name} | {len(rows)} | {statistics.median(trials):g}, {trials[int(0.95 * len(rows))]}, "
                f"{trials[-1]} | {statistics.fmean(row.failures for row in rows):.2f} "
                f"| {statistics.fmean(shares):.3f}, {min(shares):.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
