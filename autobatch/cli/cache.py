"""``autobatch cache list`` and ``autobatch cache clear``: the remembered results of earlier searches."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING

from autobatch.cli import output
from autobatch.cli.exit_codes import OK, UsageError
from autobatch.report.sentences import printable
from autobatch.units import format_bytes

if TYPE_CHECKING:
    from autobatch.cache.entry import Remembered
    from autobatch.cache.store import ResultStore

_HEADINGS = ("Model", "Device", "Limit", "Micro-batch", "Target", "Largest", "When")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    description = (
        "Show or forget the results of earlier searches, which a search under the same conditions confirms with one "
        "trial. They are kept in the user's cache folder, or in the one that AUTOBATCH_CACHE_DIR names."
    )
    parser = commands.add_parser(
        "cache", help="show or forget the remembered results", description=description, allow_abbrev=False
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    for name, run, text in (
        ("list", _list, "show what is remembered, the newest first"),
        ("clear", _clear, "forget everything"),
    ):
        action = actions.add_parser(name, help=text, description=f"{text.capitalize()}.", allow_abbrev=False)
        action.set_defaults(run=run)


def _list(options: argparse.Namespace) -> int:
    del options
    with output.warnings_as_lines():
        store = _store()
        found = store.entries()
    output.reconfigure_stdout()
    if not found:
        print(f"Nothing is remembered in {printable(str(store.path))}.")
    elif sys.stdout is not None and sys.stdout.isatty():
        _print_table(found)
    else:
        for line in [_HEADINGS, *map(_cells, found)]:
            print("\t".join(line))
    return OK


def _clear(options: argparse.Namespace) -> int:
    del options
    with output.warnings_as_lines():
        store = _store()
        count = store.clear()
    output.reconfigure_stdout()
    print(f"Forgot {count} {'result' if count == 1 else 'results'} in {printable(str(store.path))}.")
    return OK


def _store() -> ResultStore:
    try:
        from autobatch.cache.folder import cache_folder
        from autobatch.cache.store import ResultStore

        return ResultStore(cache_folder())
    except ImportError as error:
        raise UsageError(f"This Python has no SQLite, so that nothing is remembered: {error}.") from error
    except RuntimeError as error:
        raise UsageError(f"There is no home folder: {error} AUTOBATCH_CACHE_DIR names a folder.") from error


def _cells(found: Remembered) -> tuple[str, ...]:
    return (
        printable(found.model_name) or "-",
        printable(found.device) or "-",
        "-" if found.limit_bytes is None else format_bytes(found.limit_bytes),
        str(found.micro_batch),
        "-" if found.target_batch is None else str(found.target_batch),
        str(found.largest_fit),
        time.strftime("%Y-%m-%d %H:%M", time.localtime(found.created_seconds)),
    )


def _print_table(found: tuple[Remembered, ...]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in _HEADINGS:
        number = heading in ("Limit", "Micro-batch", "Target", "Largest")
        table.add_column(heading, justify="right" if number else "left", overflow="fold")
    for each in found:
        table.add_row(*map(Text, _cells(each)))
    Console(markup=False, highlight=False, emoji=False).print(table)
