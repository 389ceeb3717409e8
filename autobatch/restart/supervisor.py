"""The script, started and started again: from one death to the next, until it ends by itself or nothing helps."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from autobatch.handover import folder as run_folders
from autobatch.handover.causes import Causes, Death, write_causes
from autobatch.handover.status import ProcessStatus, read_status
from autobatch.restart.child import Child, Signals
from autobatch.restart.judgement import Judgement, judge
from autobatch.restart.last_words import LastWords
from autobatch.restart.memory_signs import MemorySigns
from autobatch.restart.orphans import Orphans
from autobatch.restart.terminal_modes import TerminalModes

DEATHS_WITHOUT_A_BACKUP = 3
"""Deaths with no new backup between them that end it: what has changed did not help."""

PAUSE_SECONDS = 0.5
"""Seconds before a new start, in which drivers give back what the dead process held."""


def run_and_restart(command: Sequence[str], restarts: int | None, say: Callable[[str], None]) -> int:
    """Run ``command``, again after each death for want of memory; return its exit code, negative for a signal.

    ``restarts`` is the most times that it is started again; None leaves it to the rule of
    :data:`DEATHS_WITHOUT_A_BACKUP`. ``say`` gets a line about each death.

    Raises:
        OSError: the command cannot be started.
    """
    with (
        tempfile.TemporaryDirectory(prefix="autobatch-run-", ignore_cleanup_errors=True) as named,
        Signals() as signals,
        _held(named),
    ):
        return _Run(command, restarts, say, Path(named), signals).until_the_end()


@contextlib.contextmanager
def _held(folder: str) -> Iterator[None]:
    """Hold a lock on the folder, which those who tidy up temporary files respect: a training may take weeks."""
    import fcntl  # not at the top: Windows has none

    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


class _Run:
    def __init__(
        self, command: Sequence[str], restarts: int | None, say: Callable[[str], None], folder: Path, signals: Signals
    ) -> None:
        self._command = command
        self._restarts = restarts
        self._say = say
        self._folder = folder
        self._signals = signals
        self._signs = MemorySigns()
        self._modes = TerminalModes()
        self._orphans = Orphans()
        self._input = _place_in_input()
        self._deaths: list[Death] = []
        self._all_deaths = 0
        self._without_backup = 0
        self._host_deaths = 0

    def until_the_end(self) -> int:
        while True:
            exit_code, status, found = self._one_process()
            if exit_code < 0:
                self._modes.restore()
            if found.death is None or self._signals.asked_to_end is not None:
                if found.seen and self._signals.asked_to_end is None:
                    self._say(f"{found.seen} ({found.evidence}): it is not started again")
                return exit_code
            if not self._may_start_again(found, status):
                return exit_code
            self._modes.restore()
            self._prepare_restart(found, status)
            if self._signals.asked_to_end is not None:
                return -self._signals.asked_to_end

    def _one_process(self) -> tuple[int, ProcessStatus | None, Judgement]:
        for old in self._folder.glob("status-*"):
            old.unlink(missing_ok=True)  # a process may get the number of a dead one
        words = LastWords(self._folder)
        child = Child(self._command, {**os.environ, run_folders.VARIABLE: str(self._folder)}, self._signals)
        self._signs.begin(child.pid)
        exit_code = child.wait(self._signs.look)
        status = read_status(self._folder, child.pid)
        said = words.of(child.pid) if exit_code < 0 else ""
        return exit_code, status, judge(exit_code, status, said, self._signs)

    def _may_start_again(self, found: Judgement, status: ProcessStatus | None) -> bool:
        assert found.death is not None
        self._all_deaths += 1
        if status is not None and status.backups:
            self._without_backup = 0
            self._deaths.clear()
        self._without_backup += 1
        self._deaths.append(found.death)
        self._host_deaths += int(found.of_host)
        if self._restarts is not None and self._all_deaths > self._restarts:
            self._say(f"{found.seen} ({found.evidence}): it is not started again, as --restarts is {self._restarts}")
            return False
        if self._without_backup >= DEATHS_WITHOUT_A_BACKUP:
            lines = "".join(f"\n{number}. {_in_one_line(each)}" for number, each in enumerate(self._deaths, 1))
            self._say(
                f"{found.seen} ({found.evidence}): it is not started again after {DEATHS_WITHOUT_A_BACKUP} deaths "
                f"without a new backup between them{lines}\n{_remedy(status)}"
            )
            return False
        return True

    def _prepare_restart(self, found: Judgement, status: ProcessStatus | None) -> None:
        changes = " ".join(filter(None, ["starting again", found.changes]))
        self._say(f"{found.seen}: {changes}{_from_where(status)} ({found.evidence})")
        try:
            self._folder.mkdir(exist_ok=True)  # somebody may have tidied up
            write_causes(self._folder, Causes(tuple(self._deaths), self._host_deaths))
        except OSError as error:
            self._say(f"the script begins as before: the cause cannot be left for it ({error})")
        ended = self._orphans.end()
        if ended:
            self._say(f"ended what it had left running ({ended} {'process' if ended == 1 else 'processes'})")
        while self._signals.wait(PAUSE_SECONDS) and self._signals.asked_to_end is None:
            pass
        if self._input is not None:
            with contextlib.suppress(OSError):
                os.lseek(0, self._input, os.SEEK_SET)


def _from_where(status: ProcessStatus | None) -> str:
    if status is not None and status.kept_update >= 0:
        return f", behind update {status.kept_update}"
    return ", from its beginning" + (", as fit has no backup yet" if status is not None and status.training else "")


def _in_one_line(death: Death) -> str:
    where = f" in {'an' if death.doing == 'update' else 'a'} {death.doing}" if death.doing else ""
    size = f" at micro-batch {death.micro_batch}" if death.micro_batch else ""
    return f"{death.words}{where}{size}"


def _remedy(status: ProcessStatus | None) -> str:
    if status is None or not status.training:
        return "The script has not come to autobatch.fit, where something could be changed. Give it more memory."
    if status.kept_update < 0:
        return 'Give autobatch.fit a backup="FOLDER" and a short backup_every, or the script more memory.'
    return "Give autobatch.fit a shorter backup_every, or the script more memory."


def _place_in_input() -> int | None:
    """Return the place in a file as standard input, for the next process to begin there too; None for all else."""
    with contextlib.suppress(OSError, ValueError):
        if sys.stdin is not None and stat.S_ISREG(os.fstat(0).st_mode):
            return os.lseek(0, 0, os.SEEK_CUR)
    return None
