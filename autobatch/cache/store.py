"""Remembered results in a SQLite file, which any number of processes may read and write at once.

Each operation opens the file, does one short transaction, and closes it. The journal is SQLite's rollback journal. Its
write-ahead log does not work on network file systems. A process that is killed in the middle of a transaction leaves
what was there before it. The version of the tables is part of the file's name, so that an older and a newer autobatch
keep a file each.

No fault of the file stops a run. A file that is broken, or that a newer autobatch made, is renamed, with a warning, and
a new one is begun. Where nothing can be read or written, nothing is remembered, with a warning.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from autobatch.cache.entry import Remembered
from autobatch.cache.key import Key, limits_agree
from autobatch.errors import warn

SCHEMA_VERSION = 1
"""Version of the tables; it is raised when the meaning of a column changes."""

MOST_RESULTS = 1000
"""Number of results that are kept at most; the oldest are removed first."""

BUSY_SECONDS = 10.0
"""Seconds to wait for other processes' transactions, each of which takes milliseconds."""

_PAUSE_SECONDS = 0.02

_COLUMNS = (
    "limit_bytes",
    "is_bound",
    "created_seconds",
    "model_name",
    "device",
    "target_batch",
    "micro_batch",
    "largest_fit",
    "smallest_failure",
    "peak_bytes",
    "fixed_bytes",
    "per_sample_bytes",
    "stopped_because",
)
# limit_bytes is 0 where no limit is known, since no two NULLs are the same key.
_CREATE = """
CREATE TABLE results (
    digest TEXT NOT NULL,
    limit_bytes INTEGER NOT NULL,
    is_bound INTEGER NOT NULL,
    created_seconds REAL NOT NULL,
    model_name TEXT NOT NULL,
    device TEXT NOT NULL,
    target_batch INTEGER,
    micro_batch INTEGER NOT NULL,
    largest_fit INTEGER NOT NULL,
    smallest_failure INTEGER,
    peak_bytes INTEGER,
    fixed_bytes REAL,
    per_sample_bytes REAL,
    stopped_because TEXT NOT NULL,
    PRIMARY KEY (digest, limit_bytes)
)
"""
_SELECT = f"SELECT {', '.join(_COLUMNS)} FROM results"
_INSERT = f"INSERT OR REPLACE INTO results (digest, {', '.join(_COLUMNS)}) VALUES (?{', ?' * len(_COLUMNS)})"

logger = logging.getLogger(__name__)
_T = TypeVar("_T")
_warned: set[Path] = set()


class _Unusable(Exception):
    """The error for a file that this version cannot use; ``kind`` becomes part of the file's new name."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


_FAILURES = (_Unusable, sqlite3.Error, UnicodeDecodeError)
"""Errors of an operation on the file; `UnicodeDecodeError` comes where SQLite's message quotes a damaged file."""


class ResultStore:
    """The results remembered in one folder, which need not exist; see the top of this file.

    ``clock`` returns seconds since 1970.
    """

    def __init__(self, folder: Path, *, clock: Callable[[], float] = time.time) -> None:
        self.folder = folder
        self.path = folder / f"results-{SCHEMA_VERSION}.db"
        self._clock = clock

    def find(self, key: Key) -> Remembered | None:
        """Return the result under ``key`` whose limit agrees and is nearest to the key's; None if there is none."""

        def select(connection: sqlite3.Connection) -> Remembered | None:
            alike = [found for found in _rows(connection, " WHERE digest = ?", (key.digest,)) if _agrees(key, found)]
            return min(alike, key=lambda found: abs((found.limit_bytes or 0) - (key.limit_bytes or 0)), default=None)

        return self._run(select, None) if os.path.exists(self.path) else None

    def put(self, key: Key, result: Remembered) -> bool:
        """Remember ``result`` in place of all whose limit agrees with the key's; return True if it is on the disk."""

        def insert(connection: sqlite3.Connection) -> bool:
            connection.execute("BEGIN IMMEDIATE")
            for old in _rows(connection, " WHERE digest = ?", (key.digest,)):
                if _agrees(key, old):
                    where = (key.digest, old.to_columns()["limit_bytes"])
                    connection.execute("DELETE FROM results WHERE digest = ? AND limit_bytes = ?", where)
            columns = result.to_columns()
            connection.execute(_INSERT, (key.digest, *(columns[name] for name in _COLUMNS)))
            connection.execute(
                "DELETE FROM results WHERE rowid NOT IN "
                "(SELECT rowid FROM results ORDER BY created_seconds DESC, rowid DESC LIMIT ?)",
                (MOST_RESULTS,),
            )
            connection.execute("COMMIT")
            return True

        return self._run(insert, False)

    def entries(self) -> tuple[Remembered, ...]:
        """Return all that is remembered, the newest first."""

        def select(connection: sqlite3.Connection) -> tuple[Remembered, ...]:
            return tuple(_rows(connection, " ORDER BY created_seconds DESC, rowid DESC"))

        return self._run(select, ()) if os.path.exists(self.path) else ()

    def clear(self) -> int:
        """Forget everything, and remove the broken files that were set aside; return how many results there were."""

        def delete(connection: sqlite3.Connection) -> int:
            connection.execute("BEGIN IMMEDIATE")
            count = connection.execute("DELETE FROM results").rowcount
            connection.execute("COMMIT")
            return count

        count = self._run(delete, 0) if os.path.exists(self.path) else 0
        for path in self.folder.glob(f"{self.path.name}.broken-*"):
            with contextlib.suppress(OSError):
                path.unlink()
        return count

    def _run(self, operation: Callable[[sqlite3.Connection], _T], otherwise: _T) -> _T:
        """Return the result of ``operation``; ``otherwise``, with a warning, where the file cannot be used."""
        try:
            for last in (False, True):
                try:
                    return self._patiently(operation)
                except _FAILURES as error:
                    if last or not _is_about_the_file(error):
                        raise
                self._set_aside_if_unusable()
        except (*_FAILURES, OSError) as error:
            if self.folder not in _warned:
                _warned.add(self.folder)
                message = f"Results are not remembered: {self.path} cannot be used ({error}). AUTOBATCH_CACHE_DIR names"
                warn(f"{message} another folder; cache=False does without.")
        return otherwise

    def _patiently(self, operation: Callable[[sqlite3.Connection], _T]) -> _T:
        """Run a transaction, and repeat it while another process is in its own.

        SQLite's lock is no queue: a process that waits for it looks again after up to 100 ms. With many writers that
        was seen to take ten seconds. So each attempt waits for less, and the next one follows after a random pause.
        """
        deadline = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                with self._open() as connection:
                    return operation(connection)
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
            time.sleep(random.uniform(0, _PAUSE_SECONDS))

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """Yield a connection to a file of this version, made if need be; roll back a transaction left open."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with _connect(self.path) as connection:
            if not _is_made(connection):
                connection.execute("BEGIN IMMEDIATE")
                if not _is_made(connection):  # another process may have been quicker
                    connection.execute(_CREATE)
                    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
                connection.execute("COMMIT")
            yield connection

    def _set_aside_if_unusable(self) -> None:
        """Rename the file if it is still unusable: another process that found it so may have made a new one."""
        with _connect(self.folder / "set-aside.lock", wait_seconds=BUSY_SECONDS) as lock:
            # A lock that every platform has and that a killed process does not leave behind.
            lock.execute("BEGIN EXCLUSIVE")
            try:
                with _connect(self.path) as connection:
                    _is_made(connection)
                    problem = str(connection.execute("PRAGMA integrity_check(1)").fetchone()[0])
                if problem == "ok":
                    return
                unusable = _Unusable("broken", problem)
            except _FAILURES as error:
                if "locked" in str(error):
                    return  # another process writes to it: it is a new one
                if not _is_about_the_file(error):
                    raise
                unusable = error if isinstance(error, _Unusable) else _Unusable("broken", str(error))
            name = f"{self.path.name}.{unusable.kind}-{int(self._clock())}-{os.getpid()}"
            # The journal first: it must never be taken for the new file's.
            for suffix in ("-journal", ""):
                with contextlib.suppress(FileNotFoundError):
                    os.replace(f"{self.path}{suffix}", self.path.with_name(f"{name}{suffix}"))
        warn(
            f"The remembered results in {self.path} cannot be read ({unusable}): the file was renamed to {name}, and a "
            "new one is begun.",
        )


@contextlib.contextmanager
def _connect(path: Path, *, wait_seconds: float = 0.05) -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(path, timeout=wait_seconds, isolation_level=None)
    # A flipped bit in a name must not make the whole file unreadable.
    connection.text_factory = lambda text: text.decode("utf-8", "replace")
    with contextlib.closing(connection):
        yield connection


def _is_made(connection: sqlite3.Connection) -> bool:
    """Return True if the tables are there; False for a new, empty file.

    Raises:
        _Unusable: the file was made by somebody else, or by another version.
    """
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > SCHEMA_VERSION:
        raise _Unusable("newer", f"it has version {version}, and this autobatch reads version {SCHEMA_VERSION}")
    columns = [row[1] for row in connection.execute("PRAGMA table_info(results)")]
    if version == SCHEMA_VERSION and columns == ["digest", *_COLUMNS]:
        return True
    if version == 0 and connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
        return False
    raise _Unusable("broken", "it is not a file of autobatch's, or was changed by hand")


def _is_about_the_file(error: Exception) -> bool:
    """Return True if the file itself is at fault. A lock, a full disk or a missing permission is not the file's."""
    return isinstance(error, (_Unusable, UnicodeDecodeError)) or type(error) is sqlite3.DatabaseError


def _agrees(key: Key, found: Remembered) -> bool:
    return limits_agree(key.limit_bytes, found.limit_bytes, is_bound=found.is_bound, exact=key.exact)


def _rows(connection: sqlite3.Connection, rest: str, values: tuple[str, ...] = ()) -> Iterator[Remembered]:
    for row in connection.execute(_SELECT + rest, values).fetchall():
        try:
            found = Remembered.from_columns(dict(zip(_COLUMNS, row, strict=True)))
        except ValueError as error:  # as good as none: the search that follows replaces it
            logger.warning("A remembered result makes no sense and is passed over: %s", error)
            continue
        yield found
