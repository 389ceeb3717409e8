"""``autobatch report TARGET``: run the trials in a worker, print the sizing report."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from autobatch.cli import arguments, output, target
from autobatch.cli.exit_codes import FAILED, INTERRUPTED, OK, UsageError
from autobatch.errors import CannotBeCutError
from autobatch.records import Variant

if TYPE_CHECKING:
    from autobatch.records import Report
    from autobatch.worker.trials import WorkerTrials

_EXAMPLES = """\
examples:
  autobatch report train.py:build --target-batch 256 --memory-limit 512MiB
  autobatch report keras:ResNet50 --format html --output report.html
  autobatch report model.keras --target-batch 64 --format markdown
"""
_PRECISIONS = ("float32", "mixed_float16", "mixed_bfloat16", "float16", "bfloat16", "float64")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "report",
        help="find out by trials what fits, and print the sizing report",
        description="Run training steps of TARGET in a worker process, find the micro-batch that\n"
        "fits and is fastest, and print the sizing report.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "target",
        metavar="TARGET",
        help=f"{target.FORMS}; the function returns (model, dataset), a compiled Keras model and its training data",
    )
    add_search_arguments(parser)
    add_worker_arguments(parser)
    keras_targets = parser.add_argument_group("Keras targets")
    keras_targets.add_argument(
        "--input",
        type=arguments.input_shape,
        metavar="H,W,C",
        help="input shape of a keras: target (default: 224,224,3), or of a Keras file whose model leaves it open",
    )
    keras_targets.add_argument(
        "--classes",
        type=arguments.positive_int,
        default=1000,
        metavar="N",
        help="classes of a keras: target (default: 1000)",
    )
    output.add_arguments(parser).add_argument(
        "--fail-under",
        type=arguments.positive_int,
        metavar="N",
        help="exit with 1 when the largest micro-batch that fits is under N; always searches, as with --no-cache",
    )
    parser.set_defaults(run=run)


def add_search_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the search itself, which the notebook's magic shares."""
    group = parser.add_argument_group("search")
    positive = arguments.positive_int
    group.add_argument("--target-batch", type=positive, metavar="N", help="effective batch to make a plan for")
    group.add_argument(
        "--memory-limit",
        type=arguments.memory_limit,
        metavar="SIZE",
        help='what the device may use: "512MiB", or "80%%" of its total',
    )
    group.add_argument(
        "--headroom",
        type=arguments.headroom,
        default=0.05,
        metavar="SHARE",
        help='share of the limit to keep free, or a size as "500MiB" (default: %(default)s)',
    )
    group.add_argument("--exact", action="store_true", help="prove the largest size: run the next one up as well")
    group.add_argument(
        "--objective",
        choices=["throughput", "largest"],
        default="throughput",
        help="plan for the shortest update or for the largest micro-batch (default: %(default)s)",
    )
    group.add_argument(
        "--no-cache",
        dest="cache",
        action="store_false",
        help="search anew, and do not remember what is found; else a remembered size is confirmed with one trial",
    )
    group.add_argument(
        "--remedies",
        action="store_true",
        help="try mixed precision, XLA, rematerialisation and an optimizer without slots as well, each in a worker of "
        "its own, and what gains together; --max-trials and --max-seconds then count for each (minutes in all)",
    )
    group.add_argument("--max-trials", type=positive, metavar="N", help="stop after N trials")
    group.add_argument(
        "--max-seconds", type=arguments.seconds, metavar="SECONDS", help="start no new trial after SECONDS"
    )


def add_worker_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that apply before the model is built, and so to a worker process alone."""
    group = parser.add_argument_group("worker")
    group.add_argument("--device", type=arguments.device, metavar="DEVICE", help='"CPU", "GPU" or "GPU:1"')
    group.add_argument("--precision", choices=_PRECISIONS, help="Keras dtype policy, set before TARGET is called")
    group.add_argument(
        "--jit",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="XLA on or off (default: as TARGET compiles the model)",
    )
    group.add_argument(
        "--strategy",
        choices=["mirrored"],
        help="call TARGET under a MirroredStrategy over all GPUs; sizes are those of one replica",
    )
    group.add_argument(
        "--timeout",
        type=arguments.seconds,
        default=600.0,
        metavar="SECONDS",
        help="how long building the model, and one trial, may take (default: 600)",
    )


def run(options: argparse.Namespace) -> int:
    target.check(options.target)
    target.check_backend(options.target)
    output.check(options.output)
    if options.fail_under and options.target_batch and options.fail_under > options.target_batch:
        raise UsageError(
            f"--fail-under {options.fail_under} can never be met: nothing above --target-batch {options.target_batch} "
            "is tried."
        )
    with output.warnings_as_lines():
        report, code = _search(options)
    output.write(report, format_name=options.format, path=options.output)
    if code != OK:
        print("autobatch: interrupted; the report has what was measured until then", file=sys.stderr)
        return code
    largest = report.largest_fit or 0
    if options.fail_under is not None and largest < options.fail_under:
        print(f"autobatch: the largest micro-batch is {largest}, under {options.fail_under}", file=sys.stderr)
        return FAILED
    return OK if report.largest_fit is not None else FAILED


def _search(options: argparse.Namespace) -> tuple[Report, int]:
    """Return the report and an exit code: `INTERRUPTED` where Ctrl-C left remedies out of it, else `OK`."""
    # Late, so that usage errors do not wait for them.
    from autobatch import api
    from autobatch.cli.progress import WatchedTrials, progress
    from autobatch.cli.totals import host_total_bytes
    from autobatch.remedies import in_workers
    from autobatch.worker.trials import WorkerTrials

    settings: dict[str, Any] = {
        "target_batch": options.target_batch,
        "memory_limit": limit_bytes(options.memory_limit, options.device),
        "headroom": options.headroom,
        "trial_timeout_seconds": options.timeout,
        "device": options.device,
        "precision": options.precision,
        "jit_compile": options.jit,
        "input_shape": options.input,
        "classes": options.classes,
        "strategy": options.strategy,
    }

    def open_worker(variant: Variant) -> WorkerTrials:
        try:
            return WorkerTrials(options.target, variant=variant, **settings)
        except ValueError as error:
            raise UsageError(str(error)) from error

    with progress() as told:

        def search(trials: WorkerTrials) -> Report:
            where = trials.environment.device
            if (options.device or "").startswith("GPU") and not where.startswith("GPU"):
                raise UsageError(f"--device {options.device}: TensorFlow sees no such device here, only {where}.")
            try:
                return search_cut_or_whole(trials)
            except CannotBeCutError as found:  # the first trace has shown it
                trials.keep_whole(found.reason)
                return search_cut_or_whole(trials)

        def search_cut_or_whole(trials: WorkerTrials) -> Report:
            return api.search_with(
                WatchedTrials(trials, told),
                # The cache confirms the plan's micro-batch, which may be smaller than the largest that fits.
                cache=options.cache and options.fail_under is None and not options.remedies,
                target_batch=options.target_batch,
                exact=options.exact,
                objective=options.objective,
                max_trials=options.max_trials,
                max_seconds=options.max_seconds,
                on_trial=told.tried,
            )

        told.doing(f"Starting a worker and building {options.target}")
        if not options.remedies:
            with open_worker(Variant()) as trials:
                return search(trials), OK
        try:
            base = in_workers.report_as_it_is(open_worker, search)
            total_bytes = host_total_bytes()
            return in_workers.with_remedies(
                base, open_worker, search, host_total_bytes=total_bytes, on_start=told.under
            ), OK
        except in_workers.Interrupted as interrupted:
            return interrupted.report, INTERRUPTED


def limit_bytes(limit: int | arguments.Share | None, device: str | None) -> int | None:
    """Return ``--memory-limit`` in bytes; a share is of the total of ``device``, None for TensorFlow's first."""
    if not isinstance(limit, arguments.Share):
        return limit
    from autobatch.cli.totals import total_bytes

    return max(arguments.SMALLEST_LIMIT_BYTES, int(limit.fraction * total_bytes(device)))
