"""What finding the largest micro-batch costs: autobatch beside Accelerate, Lightning and a loop that halves.

    python benchmarks/search_cost.py --models lstm,unet --output benchmarks/results/search_cost.json

Every searcher gets the very same trial, autobatch's own, which runs a size for real on the model in a limited arena.
Each model lives in a process of its own. A size is run once and every searcher that asks for it is charged the seconds
measured, because a failed allocation alone waits ten seconds or more; tracing and the first execution are charged once
a searcher. No headroom: running out of memory is only ever a genuine failure. The largest size that really fits is
found by bisection, and its neighbours are run too. In an arena that is nearly full, whether a size fits is partly luck:
free memory is in pieces. So two figures stand beside each other: the largest size that was seen to fit, and the largest
below the first that was seen to fail.

With ``--xla`` every step is compiled, as it is on a single GPU by default. Each size is then compiled by itself, and
whoever asks for it is charged that too. Arenas are of 1 GiB at least: the allocator gives a whole free chunk to a block
of more than half of it, so that in small arenas chunks decide what fits. What a compiled program needs is the same each
time, so that fewer neighbours of the edge are run.

Results are written after each model; a later run adds its models to the file. ``--resume`` takes the sizes that the
file has recorded as measured and runs the others; what a trial allocated is not in the file, so that the sizes that
autobatch asks for are run again.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import importlib.metadata
import json
import logging
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from autobatch.allocation_trace import AllocationTrace
from autobatch.records import Outcome, SampleEstimate, TrialRequest, TrialResult
from autobatch.search import Goal, Room, search

SCHEMA_VERSION = 1
RESULTS = Path(__file__).parent / "results" / "search_cost.json"
PACKAGES = ("autobatch", "tensorflow", "keras", "accelerate", "lightning", "torch")
OURS = ("autobatch", "autobatch exact", "autobatch, headroom 5 %")
CURVE = (4, 8, 16, 32, 64, 128, 256, 512)
SWEEP = (1, 2, 3, 0.02, 0.04, 0.08, -1, -2, -0.01, -0.02, -0.04)
"""Where sizes are run beside the edge that bisection ends on: samples, or parts of it."""
SWEEP_COMPILED = (1, 2, -1)
MIB = 2**20
LEAST_MIB_COMPILED = 1024
COMPILED = "AUTOBATCH_BENCHMARK_XLA"
"""Environment variable that is set for the processes of trials where steps are compiled."""
HEADROOM = 0.05
"""What ``fit`` leaves alone unless it is told otherwise."""


# -- the trials, in a process of their own --------------------------------------------------------------------------


def serve(name: str) -> None:
    """Run the sizes that arrive on standard input, one a line, in the model's arena; answer in lines of JSON."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the model or TensorFlow prints must not look like an answer
    import autobatch

    sys.path.insert(0, str(Path(__file__).parent))
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    warnings.simplefilter("ignore")
    limit_bytes = _limit_mib(name) * MIB
    autobatch.limit_memory(limit_bytes)
    import numpy as np
    import tensorflow as tf
    from models import MODELS

    from autobatch import opening

    # One operation at a time, as a GPU's single stream runs them. Operations in parallel wait for each other's memory,
    # so that peaks end at the limit whatever the size, and the largest size that fits is another one at each try.
    tf.config.threading.set_inter_op_parallelism_threads(1)
    # The arena in one piece from the start, as a GPU's is by default; it grows by and by otherwise, in pieces that
    # later allocations may not fit into.
    with contextlib.suppress(tf.errors.ResourceExhaustedError):
        tf.raw_ops.Empty(shape=[limit_bytes - 2**23], dtype=tf.uint8)
    started = time.perf_counter()
    entry = MODELS[name]
    model = entry.build()
    model.jit_compile = bool(os.environ.get(COMPILED))
    x, y = entry.data()
    trials = opening.open_trials(model, x, y, target_batch=None, memory_limit_bytes=None, headroom=0.0)
    trials.step.prepare()
    estimate = trials.estimate_sample()
    trials.run(TrialRequest(1, timed_steps=0))
    environment = trials.environment
    greeting = {
        "start_seconds": time.perf_counter() - started,
        "fixed_bytes_hint": trials.fixed_bytes_hint,
        "estimate": None if estimate is None else asdict(estimate),
        "budget_bytes": environment.budget_bytes,
        "limit_source": environment.limit_source,
        "weights": sum(int(np.prod(weight.shape)) for weight in model.weights),
    }
    print(json.dumps(greeting), file=answers)
    for line in sys.stdin:
        started = time.perf_counter()
        size, record = map(int, line.split())
        result = trials.run(TrialRequest(size, timed_steps=0, record_allocations=bool(record)))
        seconds = time.perf_counter() - started
        answer = asdict(result) | {"outcome": result.outcome.value, "seconds": seconds}
        print(json.dumps(answer), file=answers)


def _limit_mib(name: str) -> int:
    # models.py imports TensorFlow, which must not happen before the limit is set.
    found = json.loads(os.environ["AUTOBATCH_BENCHMARK_LIMITS"])
    return int(found[name])


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


@dataclass
class Measurements:
    """One model's trials, each size run once; ``start_seconds`` is building, tracing and the first execution."""

    name: str
    limit_mib: int
    top: int
    greeting: dict[str, Any] = field(default_factory=dict)
    taken: dict[int, dict[str, Any]] = field(default_factory=dict)
    traces: dict[int, AllocationTrace] = field(default_factory=dict)
    died: int = 0
    compiled: bool = False
    _process: subprocess.Popen[str] | None = None

    def open(self) -> None:
        limits = json.dumps({self.name: self.limit_mib})
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve", self.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={
                **os.environ,
                "AUTOBATCH_BENCHMARK_LIMITS": limits,
                "TF_CPP_MIN_LOG_LEVEL": "3",
                COMPILED: "1" if self.compiled else "",
            },
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} did not start in {self.limit_mib} MiB")
        self.greeting = self.greeting or json.loads(line)

    def close(self) -> None:
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait()
            self._process = None

    def take(self, micro_batch: int) -> dict[str, Any]:
        """The measurement of this size, run now if it has not been."""
        if micro_batch not in self.taken:
            self.taken[micro_batch] = self._run(micro_batch, record=False)
        return self.taken[micro_batch]

    def record(self, micro_batch: int) -> dict[str, Any]:
        """The same, with what it allocated in ``traces`` if it fits."""
        known = self.taken.get(micro_batch)
        if known is None or (self.fits(micro_batch) and micro_batch not in self.traces):
            again = self._run(micro_batch, record=True)
            if known is not None and self.compiled:  # it was compiled the first time
                again["seconds"] = max(known["seconds"], again["seconds"])
            self.taken[micro_batch] = again
        return self.taken[micro_batch]

    def _run(self, micro_batch: int, *, record: bool) -> dict[str, Any]:
        if self._process is None:
            self.open()
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        started = time.perf_counter()
        print(micro_batch, int(record), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            trace = answer.pop("allocations")
            if trace is not None:
                self.traces[micro_batch] = AllocationTrace(**{name: _tuples(value) for name, value in trace.items()})
        else:
            self._process.wait()
            self._process = None
            self.died += 1
            outcome = Outcome.OUT_OF_MEMORY.value
            answer = {"micro_batch": micro_batch, "outcome": outcome, "detail": "the process died"}
            answer["seconds"] = time.perf_counter() - started
        return answer

    def fits(self, micro_batch: int) -> bool:
        return bool(self.take(micro_batch)["outcome"] == Outcome.FITS.value)

    def true_largest(self) -> int:
        """The largest size up to ``top`` that was seen to fit.

        By bisection; then sizes up to 8 % above what it ends on, and as many below, are run too, and where one above
        fits it goes on from there.
        """
        low = max((size for size in self.taken if size <= self.top and self.fits(size)), default=0)
        high = min((size for size in self.taken if low < size <= self.top), default=self.top + 1)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.fits(middle) else (low, middle)
        for part in SWEEP_COMPILED if self.compiled else SWEEP:
            near = low + (int(part) if abs(part) >= 1 else round(part * low))
            if 1 <= near <= self.top:
                self.take(near)
        largest = max(size for size in self.taken if size <= self.top and self.fits(size))
        return largest if largest <= low else self.true_largest()

    def largest_within(self, budget_bytes: int) -> int:
        """The largest size whose peak stays within the budget, by bisection; then one and two above it are run."""

        def within(size: int) -> bool:
            return self.fits(size) and (self.take(size).get("peak_bytes") or 0) <= budget_bytes

        def known() -> list[int]:
            return [size for size in sorted(self.taken) if size <= self.top]

        low = max((size for size in known() if within(size)), default=0)
        high = min((size for size in known() if size > low), default=self.top + 1)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if within(middle) else (low, middle)
        for near in (low + 1, low + 2):
            if near <= self.top:
                self.take(near)
        return max((size for size in known() if within(size)), default=0)

    def first_failure(self) -> int:
        """The smallest size that was seen to fail; one above the range if none was."""
        failed = (size for size in self.taken if size <= self.top and not self.fits(size))
        return min(failed, default=self.top + 1)


@dataclass
class Charged:
    """The trial function as one searcher sees it, with what it was charged."""

    measurements: Measurements
    asked: list[int] = field(default_factory=list)

    def __call__(self, micro_batch: int) -> bool:
        self.asked.append(micro_batch)
        return self.measurements.fits(micro_batch)

    def trial(self, request: TrialRequest, budget_bytes: int) -> TrialResult:
        self.asked.append(request.micro_batch)
        taken = dict(self.measurements.record(request.micro_batch))
        taken.pop("seconds")
        trace = self.measurements.traces.get(request.micro_batch)
        # What autobatch's own trial does where there is headroom: a peak above the budget counts as out of memory.
        over = (taken.get("peak_bytes") or 0) > budget_bytes
        outcome = Outcome.OUT_OF_MEMORY if over else Outcome(taken["outcome"])
        return TrialResult(**(taken | {"outcome": outcome, "allocations": trace}))

    @property
    def trial_seconds(self) -> float:
        return sum(float(self.measurements.take(size)["seconds"]) for size in self.asked)


# -- the searchers: each gets the trial function and the largest size worth considering -----------------------------


def _autobatch(charged: Charged, *, exact: bool = False, headroom: float = 0.0) -> int | None:
    greeting = charged.measurements.greeting
    budget_bytes = int(greeting["budget_bytes"] * (1 - headroom))
    estimate = greeting["estimate"]
    return search(
        lambda request: charged.trial(request, budget_bytes),
        Goal(max_micro_batch=charged.measurements.top, objective="largest", exact=exact),
        Room(
            budget_bytes=budget_bytes,
            headroom_bytes=greeting["budget_bytes"] - budget_bytes,
            fixed_bytes_hint=greeting["fixed_bytes_hint"],
        ),
        estimate_sample=lambda: None if estimate is None else SampleEstimate(**estimate),
    ).largest_fit


def _accelerate(charged: Charged) -> int | None:
    from accelerate.utils import find_executable_batch_size

    @find_executable_batch_size(starting_batch_size=charged.measurements.top)
    def train(batch_size: int) -> int:
        if not charged(batch_size):
            raise RuntimeError("CUDA out of memory.")
        return batch_size

    return int(train())


def _lightning(charged: Charged, *, mode: str) -> int | None:
    import lightning.pytorch as pl
    import torch
    from lightning.pytorch.tuner import Tuner

    class Endless(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            while True:
                yield torch.zeros(1)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.batch_size = 2
            self.layer = torch.nn.Linear(1, 1)

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(Endless(), batch_size=self.batch_size)

        def training_step(self, batch: Any, batch_index: int) -> Any:
            # The trial repeats the step itself, so that the first of Lightning's three steps is all of them.
            if batch_index == 0 and not charged(self.batch_size):
                raise RuntimeError("CUDA out of memory.")
            return self.layer(batch).mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.pytorch.tuner"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        return Tuner(trainer).scale_batch_size(Module(), mode=mode)


def _halving(charged: Charged) -> int | None:
    size = charged.measurements.top
    while size >= 1 and not charged(size):
        size //= 2
    return size or None


SEARCHERS: dict[str, Callable[[Charged], int | None]] = {
    "autobatch": _autobatch,
    "autobatch exact": lambda charged: _autobatch(charged, exact=True),
    "autobatch, headroom 5 %": lambda charged: _autobatch(charged, headroom=HEADROOM),
    "Lightning power": lambda charged: _lightning(charged, mode="power"),
    "Lightning binsearch": lambda charged: _lightning(charged, mode="binsearch"),
    "Accelerate": _accelerate,
    "halving loop": _halving,
}


# -- a model's results ----------------------------------------------------------------------------------------------


def measure(measurements: Measurements) -> dict[str, Any]:
    """Run every searcher on a model, find its true largest, and sample its memory curve."""
    searches = []
    for name, searcher in SEARCHERS.items():
        charged = Charged(measurements)
        returned = searcher(charged)
        searches.append((name, charged, returned))
        print(f"  {name:20s} {returned}: ran {' '.join(map(str, charged.asked))}", flush=True)
    true = measurements.true_largest()
    for size in CURVE:
        if size < true and not measurements.compiled:
            measurements.take(size)
    start_seconds = measurements.greeting["start_seconds"]
    within = measurements.largest_within(int(measurements.greeting["budget_bytes"] * (1 - HEADROOM)))
    return {
        "limit_mib": measurements.limit_mib,
        "largest_considered": measurements.top,
        "true_largest": true,
        "largest_within_budget": within,
        "first_failure": measurements.first_failure(),
        **measurements.greeting,
        "processes_died": measurements.died,
        "searches": {
            name: {
                "returned": returned,
                "returned_over_true": (returned or 0) / true if true else None,
                "returned_was_run_and_fits": returned in charged.asked and measurements.fits(returned or 0),
                "trials": len(charged.asked),
                "out_of_memory_trials": sum(not measurements.fits(size) for size in charged.asked),
                "trial_seconds": charged.trial_seconds,
                "seconds": start_seconds + charged.trial_seconds,
                "sizes_in_order": charged.asked,
            }
            for name, charged, returned in searches
        },
        "measurements": [measurements.taken[size] for size in sorted(measurements.taken)],
    }


def against_fastest_peer(model: dict[str, Any], seconds: str, *, least: float = 0.0) -> float | None:
    """Autobatch's seconds over those of the fastest peer that returns a size it has run, at least ``least`` of true."""
    peers = [
        found[seconds]
        for name, found in model["searches"].items()
        if name not in OURS and found["returned_was_run_and_fits"] and found["returned_over_true"] >= least
    ]
    return float(model["searches"]["autobatch"][seconds] / min(peers)) if peers else None


def goals(models: dict[str, dict[str, Any]]) -> list[tuple[str, str, bool]]:
    """What was to be reached, what was, and whether the two agree."""
    default = [model["searches"]["autobatch"] for model in models.values()]
    exact = [model["searches"]["autobatch exact"] for model in models.values()]
    trials = [found["trials"] for found in default]
    failures = sum(found["out_of_memory_trials"] for found in default)
    ratios = [found["returned_over_true"] for found in default]
    exact_trials = max(found["trials"] for found in exact)
    exact_failures = max(found["out_of_memory_trials"] for found in exact)
    proven = sum(found["returned_over_true"] == 1 for found in exact)
    speed = [ratio for model in models.values() if (ratio := against_fastest_peer(model, "seconds")) is not None]
    unfailing = [model["searches"]["autobatch"]["returned"] / (model["first_failure"] - 1) for model in models.values()]
    in_trials = [r for model in models.values() if (r := against_fastest_peer(model, "trial_seconds")) is not None]
    run = sum(found["returned_was_run_and_fits"] for found in (*default, *exact))
    shipped_models = [model for model in models.values() if "largest_within_budget" in model]
    shipped = [model["searches"]["autobatch, headroom 5 %"] for model in shipped_models]
    shipped_trials = [found["trials"] for found in shipped]
    shipped_failures = sum(found["out_of_memory_trials"] for found in shipped)
    shipped_ratios = [
        model["searches"]["autobatch, headroom 5 %"]["returned"] / model["largest_within_budget"]
        for model in shipped_models
    ]
    return [
        (
            "fit's own default, headroom 5 %: at most 4 trials, 3 in the median",
            f"at most {max(shipped_trials)}, {statistics.median(shipped_trials):g} in the median",
            max(shipped_trials) <= 4 and statistics.median(shipped_trials) <= 3,
        ),
        (
            "headroom 5 %: at most 1 out-of-memory trial in 10 searches",
            f"{shipped_failures} in {len(shipped)}",
            shipped_failures <= len(shipped) / 10,
        ),
        (
            "headroom 5 %: 0.97 of the largest that fits the budget at least, never above",
            f"{min(shipped_ratios):.3f} to {max(shipped_ratios):.3f}, median {statistics.median(shipped_ratios):.3f}",
            min(shipped_ratios) >= 0.97 and max(shipped_ratios) <= 1,
        ),
        ("no headroom: at most 4 trials", f"at most {max(trials)}", max(trials) <= 4),
        ("no headroom: 3 trials in the median", f"{statistics.median(trials):g}", statistics.median(trials) <= 3),
        ("no headroom: 2 trials in the median", f"{statistics.median(trials):g}", statistics.median(trials) <= 2),
        (
            "no headroom: at most 1 out-of-memory trial in 10 searches",
            f"{failures} in {len(default)}",
            failures <= len(default) / 10,
        ),
        (
            "no headroom: 0.97 of the true largest at least, never above",
            f"{min(ratios):.3f} to {max(ratios):.3f}",
            min(ratios) >= 0.97 and max(ratios) <= 1,
        ),
        (
            "the same of the largest size below the first that fails, 0.97 at least",
            f"{min(unfailing):.3f} to {max(unfailing):.3f}",
            min(unfailing) >= 0.97,
        ),
        ("exact: the true largest", f"{proven} of {len(exact)}", proven == len(exact)),
        ("exact: at most 6 trials", f"at most {exact_trials}", exact_trials <= 6),
        ("exact: at most 2 out-of-memory trials", f"at most {exact_failures}", exact_failures <= 2),
        ("the size returned was run and fits", f"{run} of {2 * len(default)}", run == 2 * len(default)),
        (
            "seconds at most 0.25 of the fastest peer's that returns a tested size, tracing included",
            f"median {statistics.median(speed):.2f}, at most {max(speed):.2f}",
            max(speed) <= 0.25,
        ),
        (
            "the same, tracing left out",
            f"median {statistics.median(in_trials):.2f}, at most {max(in_trials):.2f}",
            max(in_trials) <= 0.25,
        ),
    ]


# -- what is printed ------------------------------------------------------------------------------------------------


def summary_table(models: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| search | trials: median (most) | out of memory: in all (most) | seconds: median (most) | of them tracing "
        "| found / true largest: median (least, most) | found size was run |",
        "|---|---|---|---|---|---|---|",
    ]
    tracing = statistics.median(model["start_seconds"] for model in models.values())
    for name in SEARCHERS:
        found = [model["searches"][name] for model in models.values()]
        trials = [one["trials"] for one in found]
        failures = [one["out_of_memory_trials"] for one in found]
        seconds = [one["seconds"] for one in found]
        ratios = [one["returned_over_true"] for one in found]
        run = sum(one["returned_was_run_and_fits"] for one in found)
        lines.append(
            f"| {name} | {statistics.median(trials):g} ({max(trials)}) | {sum(failures)} ({max(failures)}) "
            f"| {statistics.median(seconds):.1f} ({max(seconds):.1f}) | {tracing:.1f} "
            f"| {statistics.median(ratios):.3f} ({min(ratios):.3f}, {max(ratios):.3f}) | {run} of {len(found)} |"
        )
    return "\n".join(lines)


def model_table(models: dict[str, dict[str, Any]]) -> str:
    lines = [
        "Each cell: found / true largest, trials, out-of-memory trials among them, seconds in trials. "
        "A star: the size returned had not been run, or does not fit.",
        "",
        "| model (limit, true largest, first failure, tracing) | " + " | ".join(SEARCHERS) + " |",
        "|---" * (len(SEARCHERS) + 1) + "|",
    ]
    for name, model in models.items():
        cells = []
        for searcher in SEARCHERS:
            found = model["searches"][searcher]
            star = "" if found["returned_was_run_and_fits"] else "*"
            cells.append(
                f"{found['returned_over_true']:.2f}{star}, {found['trials']}, {found['out_of_memory_trials']}, "
                f"{found['trial_seconds']:.1f} s"
            )
        title = f"{name} ({model['limit_mib']} MiB, {model['true_largest']}, {model['first_failure']}, "
        title += f"{model['start_seconds']:.1f} s)"
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _complete(document: dict[str, Any]) -> dict[str, Any]:
    """The models of a file that hold every searcher of this version of the benchmark."""
    return {name: model for name, model in document["models"].items() if set(SEARCHERS) <= set(model["searches"])}


def markdown(document: dict[str, Any]) -> str:
    models, machine = _complete(document), document["machine"]
    if not models:
        return "No model has been searched by all searchers.\n"
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    compared = [
        (f"{name}", against_fastest_peer(model, "seconds"), against_fastest_peer(model, "trial_seconds"))
        for name, model in models.items()
    ]
    near = [against_fastest_peer(model, "seconds", least=0.97) for model in models.values()]
    close = [ratio for ratio in near if ratio is not None]
    lines = [
        "# What finding the largest micro-batch costs",
        "",
        "Every step is compiled by XLA, for each size anew." if "--xla" in document["command"] else "",
        "",
        f"`{document['command']}` on {machine['cores']} cores of {machine['cpu']}, no GPU; {versions}.",
        "",
        f"{len(models)} models, each in a limited TensorFlow arena on the CPU; every searcher has the same trial "
        "function. Each size was run once for real, and every searcher that asked for it is charged its measured "
        "seconds; building, tracing and the first execution are charged once a searcher. No headroom, but for the row "
        "that says so, which is autobatch's default: a peak over its budget ends a trial there without a failed "
        "allocation, and is not counted as out of memory.",
        "",
        document.get("note", ""),
        "",
        summary_table(models),
        "",
        "| to reach | reached | |",
        "|---|---|---|",
        *(f"| {goal} | {reached} | {'yes' if held else 'no'} |" for goal, reached, held in goals(models)),
        "",
        "Seconds of autobatch over those of the fastest peer that returns a tested size (whatever that size), with "
        "tracing and without: "
        + "; ".join(f"{name} {with_:.2f}, {without:.2f}" for name, with_, without in compared if with_ and without)
        + ".",
        "",
        (
            f"Over those of the fastest peer that returns a tested size of at least 0.97 of the true largest, with "
            f"tracing: median {statistics.median(close):.2f}, at most {max(close):.2f}, on the {len(close)} models "
            "where there is such a peer."
            if close
            else "No peer returned a tested size of at least 0.97 of the true largest."
        ),
        "",
        model_table(models),
        "",
    ]
    return "\n".join(lines)


# -- the result file ------------------------------------------------------------------------------------------------


def _machine() -> dict[str, Any]:
    cpu = platform.processor() or "unknown"
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    return {"cpu": cpu, "cores": os.cpu_count(), "python": platform.python_version()}


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def save(output: Path, name: str, model: dict[str, Any], note: str = "", *, compiled: bool = False) -> dict[str, Any]:
    """Add one model to the file, which another run may be writing to at the same time."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(tempfile.gettempdir() + f"/autobatch_{output.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        document: dict[str, Any] = {"models": {}}
        if output.exists():
            document = json.loads(output.read_text())
        models = {**document["models"], name: model}
        document = {
            "schema_version": SCHEMA_VERSION,
            "benchmark": "search_cost",
            "command": "python benchmarks/search_cost.py" + (" --xla" if compiled else ""),
            "note": note or document.get("note", ""),
            "machine": _machine(),
            "versions": _versions(),
            "models": {known: models[known] for known in sorted(models)},
        }
        aside = output.with_suffix(".json.part")
        aside.write_text(json.dumps(document, indent=1) + "\n")
        aside.replace(output)
        output.with_suffix(".md").write_text(markdown(document))
    return document


def _recorded(name: str, model: dict[str, Any]) -> Measurements:
    taken = {one["micro_batch"]: one for one in model["measurements"]}
    greeting = {
        key: model[key]
        for key in (
            "start_seconds",
            "fixed_bytes_hint",
            "estimate",
            "budget_bytes",
            "limit_source",
            "weights",
        )
    }
    return Measurements(name, model["limit_mib"], model["largest_considered"], greeting, taken)


def _for_compiled(limit_mib: int, top: int) -> tuple[int, int]:
    """The limit and the range of a model whose steps are compiled: a larger arena takes more samples."""
    larger = max(limit_mib, LEAST_MIB_COMPILED)
    return larger, 2 ** math.ceil(math.log2(top * larger / limit_mib))


def _to_run(name: str, limit_mib: int, top: int, output: Path, resume: bool) -> Measurements:
    """Measurements to be made; with ``resume`` those that the file holds for the same limit are made already."""
    recorded = json.loads(output.read_text())["models"].get(name) if resume and output.exists() else None
    if recorded is not None and (recorded["limit_mib"], recorded["largest_considered"]) == (limit_mib, top):
        return _recorded(name, recorded)
    return Measurements(name, limit_mib, top)


def _catalogue() -> dict[str, tuple[int, int]]:
    # In a process of its own too: models.py imports TensorFlow, and this process has no need of it.
    code = "import json, models; print(json.dumps({m.name: [m.limit_mib, m.largest_considered] "
    code += "for m in models.MODELS.values()}))"
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return {name: (limit, top) for name, (limit, top) in json.loads(done.stdout.splitlines()[-1]).items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", help="names, separated by commas; all of them by default")
    parser.add_argument("--output", type=Path, help="the result file; a .md stands beside it")
    parser.add_argument("--xla", action="store_true", help="compile every step")
    parser.add_argument("--resume", action="store_true", help="run no size again that the file has recorded")
    parser.add_argument("--note", default="", help="a sentence about this run, kept in the results")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
        return 0
    document: dict[str, Any] = {}
    output = options.output or (RESULTS.with_stem(f"{RESULTS.stem}_xla") if options.xla else RESULTS)
    catalogue = _catalogue()
    names = options.models.split(",") if options.models else list(catalogue)
    if unknown := [name for name in names if name not in catalogue]:
        parser.error(f"--models must be among {', '.join(catalogue)}. Received: {', '.join(unknown)}")
    for name in names:
        limit_mib, top = _for_compiled(*catalogue[name]) if options.xla else catalogue[name]
        print(f"{name}, {limit_mib} MiB", flush=True)
        measurements = _to_run(name, limit_mib, top, output, options.resume)
        measurements.compiled = options.xla
        try:
            if not measurements.greeting:
                measurements.open()
            document = save(output, name, measure(measurements), options.note, compiled=options.xla)
        finally:
            measurements.close()
    print()
    print(markdown(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
