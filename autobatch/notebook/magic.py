"""``%autobatch model dataset --target-batch 256``: the sizing report of a live model.

Its options are those of the command ``autobatch report``, from the same definitions, less what must be decided before
a model is built.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from typing import Any

from autobatch import api, display
from autobatch.cli import output
from autobatch.cli import report as report_command
from autobatch.cli.exit_codes import UsageError as CommandUsageError
from autobatch.notebook import failures, formats, magic_line
from autobatch.notebook.front_end import has_kernel
from autobatch.records import Report
from autobatch.types import Dataset, Model

NAME = "autobatch"

_DESCRIPTION = """\
Search for the micro-batch that fits and is fastest, show the sizing report and return it. The model and the data are
left as they were.

MODEL, DATASET and Y are Python expressions; put one with spaces in it into brackets: %autobatch model (x, y). A value
of an option may be {an expression} or $a_name. The result can be kept: report = %autobatch model data --quiet
"""


def register(shell: Any) -> None:
    """Give ``shell`` the magic."""
    shell.register_magic_function(_magic(shell), "line", NAME)


def unregister(shell: Any) -> None:
    shell.magics_manager.magics["line"].pop(NAME, None)


def _magic(shell: Any) -> Callable[..., Report | None]:
    from IPython.core.error import UsageError
    from IPython.core.magic import needs_local_scope, no_var_expand

    parser = _parser()

    def autobatch(text: str, local_ns: Mapping[str, Any] | None = None) -> Report | None:
        names = {**shell.user_ns, **(local_ns or {})}
        try:
            parts = magic_line.split(text.rstrip().rstrip(";"))
            if {"-h", "--help"} & set(parts):
                print(parser.format_help())
                return None
            options = _options(parser, magic_line.with_values(parts, names))
            output.check(options.output)
            limit_bytes = report_command.limit_bytes(options.memory_limit, None)
            model, dataset, y = (_value(shell, part, names) for part in (options.model, options.dataset, options.y))
        except (magic_line.LineError, CommandUsageError) as error:
            raise UsageError(str(error)) from None
        report = _tune(
            shell,
            model,
            dataset,
            y,
            quiet=options.quiet,
            target_batch=options.target_batch,
            memory_limit=limit_bytes,
            headroom=f"{options.headroom}B" if isinstance(options.headroom, int) else options.headroom,
            exact=options.exact,
            objective=options.objective,
            max_trials=options.max_trials,
            max_seconds=options.max_seconds,
            cache=options.cache,
            remedies=options.remedies,
        )
        try:
            _show(shell, report, options)
        except CommandUsageError as error:
            raise UsageError(str(error)) from None
        return report

    autobatch.__doc__ = parser.format_help()
    # In an expression braces are a dictionary, so IPython must not expand them; values of options are expanded here.
    magic: Callable[..., Report | None] = needs_local_scope(no_var_expand(autobatch))
    return magic


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise magic_line.LineError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=f"%{NAME}",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="a compiled Keras model")
    parser.add_argument("dataset", metavar="DATASET", help="its training data, whatever autobatch.tune takes")
    parser.add_argument("y", metavar="Y", nargs="?", default="None", help="the targets, where DATASET is inputs alone")
    report_command.add_search_arguments(parser)
    output.add_arguments(parser, default_format=None)
    parser.add_argument("--quiet", action="store_true", help="show neither the search nor the report")
    return parser


def _options(parser: argparse.ArgumentParser, parts: list[str]) -> argparse.Namespace:
    options, unknown = parser.parse_known_intermixed_args(parts)
    if not unknown:
        return options
    first = unknown[0]
    if not first.startswith("-"):
        raise magic_line.LineError(
            f"There is one expression too many: put one with spaces in it into brackets, as in %{NAME} model (x, y). "
            f"Received: {first!r}"
        )
    if first.partition("=")[0] in _options_of_the_command():
        raise magic_line.LineError(
            "This is an option of the command autobatch report alone, which builds the model in a process of its own; "
            f"here the model is built already. Received: {first!r}"
        )
    raise magic_line.LineError(f"There is no such option; %{NAME}? lists them. Received: {first!r}")


def _options_of_the_command() -> list[str]:
    commands = argparse.ArgumentParser().add_subparsers()
    report_command.add_parser(commands)
    return re.findall(r"--[\w-]+", commands.choices["report"].format_usage())


def _value(shell: Any, part: str, names: Mapping[str, Any]) -> Any:
    try:
        return magic_line.evaluate(part, names)
    except magic_line.LineError:
        raise
    except BaseException as error:
        failures.prepare(error, shell)
        raise


def _tune(shell: Any, model: Model, dataset: Dataset, y: Any, *, quiet: bool, **settings: Any) -> Report:
    show_search = display.show_search
    if quiet:
        display.show_search = None
    try:
        return api.tune(model, dataset, y, **settings)
    except BaseException as error:
        failures.prepare(error, shell)
        raise
    finally:
        display.show_search = show_search


def _show(shell: Any, report: Report, options: argparse.Namespace) -> None:
    if options.quiet and options.output is None:
        return
    if options.output is None and has_kernel(shell) and options.format in (None, "html"):
        from IPython.display import display

        display(report)
    else:
        output.write(report, format_name=options.format or "text", path=options.output)
    formats.was_shown(report, shell)
