"""Process between a training and its standard error: it passes everything on, but for TensorFlow's allocator lines.

Run as a script by :mod:`autobatch.terminal.kept_aside`, which replaces file descriptor 2 by a pipe that this reads.
Why a process of its own, and no thread: it outlives a crash of the training. What was kept aside is then printed, and
so is what the training said in the moment of its death. It imports the standard library alone, to start fast.
Under ``autobatch run`` a file gets all that comes through, to be read after such a crash.

It also draws the table of a running search, below whatever comes through, so that neither tears the other.
"""

from __future__ import annotations

import mmap
import os
import re
import select
import struct
import sys
import time

FRAME = struct.Struct(">I")
"""Length in front of a table on the control pipe; a table of no bytes takes the last one away."""

HOLD_SECONDS = 0.05
"""Time that a piece of a line waits for its rest, if it begins like a line of TensorFlow's."""

_LOOK_SECONDS = 0.25
_LAST_WORDS_BYTES = 1 << 20
_READ_BYTES = 1 << 18  # more than a pipe holds: a read empties it

# "2025-11-29 14:56:06.113828: W xla/tsl/framework/bfc_allocator.cc:502] " up to TensorFlow 2.20 or so, then
# "W0000 00:00:1795964166.113828    1575 bfc_allocator.cc:502] ". Severity F, of a process that dies, is never kept.
_HEADER = re.compile(
    rb"(?:\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}: [IWE] |[IWE]\d{4} \d\d:\d\d:\d+(?:\.\d+)? +\d+ )"
    rb"(?P<file>[\w./+-]+\.(?:cc|h)):\d+\] (?P<message>[^\n]*)"
)
_STARTS = (b"0000-00-00 00:00:00.000000: ", b"I0000 00:00:", b"W0000 00:00:", b"E0000 00:00:")
_LEAST_START = 5
_DIGITS = bytes.maketrans(b"123456789", b"000000000")
_LONGEST_START = 256

_FILES = re.compile(rb"(?:^|/)(?:bfc_allocator|gpu_cudamallocasync_allocator|cpu_allocator_impl)\.cc$")
_MESSAGES = re.compile(
    rb"RESOURCE_EXHAUSTED|OUT_OF_MEMORY|OOM when allocating|[Oo]ut of memory|_ALLOC_FAILED|failed to alloc"
    rb"|recv item cancelled|rematerialization; only reduced"
)
_MORE_OF_IT = re.compile(
    rb"If the cause is memory fragmentation|Current allocation summary follows\.|Hint: If you want to see a list of all"
    rb"|(?:Limit|InUse|MaxInUse|NumAllocs|MaxAllocSize|Reserved|PeakReserved|LargestFreeBlock): {2,}"
    rb"|\t? ?\[\[\{\{|\(\d+\) RESOURCE_EXHAUSTED|\d+ (?:successful operations|derived errors ignored)\."
    rb"|BufferAssignment (?:OOM Debugging|stats)|Peak buffers:|\tBuffer \d+:|\t\t(?:Size|Operator|XLA Label|Shape|Entry"
    rb"|=====)|\t?\s+(?:parameter|constant|maybe_live_out|preallocated temp|total)[\w ]* allocation:"
)
_BLANK_BEHIND = re.compile(rb"LargestFreeBlock:|Hint: If|\t\t=====|\d+ derived errors|\t? ?\[\[\{\{")


class Sieve:
    """Separation of TensorFlow's allocator lines from all else, byte for byte, whatever the pieces it comes in."""

    def __init__(self) -> None:
        self._held = b""
        self._last_kept = b""
        self._mid_line = False

    @property
    def holds(self) -> bool:
        """True if the beginning of a line is held back until its rest comes."""
        return bool(self._held)

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        """Return what of ``data``, and of what was held before it, is to be passed on, and what is kept aside."""
        passed, kept = [], []
        *lines, rest = _cut(self._held + data)
        self._held = b""
        for line in lines:
            own, theirs = self._divide(line)
            passed.append(own)
            kept.append(theirs)
        start = self._start_of_theirs(rest)
        passed.append(rest[:start])
        self._held = rest[start:]
        if start:
            self._mid_line = True
        return b"".join(passed), b"".join(kept)

    def let_go(self) -> bytes:
        """Return what is held back, to be passed on."""
        held, self._held = self._held, b""
        if held:
            self._last_kept = b""
        self._mid_line = self._mid_line or bool(held)
        return held

    def _divide(self, line: bytes) -> tuple[bytes, bytes]:
        """Divide a whole line, its end included: what somebody had written before TensorFlow's header is theirs."""
        began_before, self._mid_line = self._mid_line, False
        found = _HEADER.search(line)
        if found is not None:
            is_ours = _FILES.search(found["file"]) or _MESSAGES.search(found["message"])
            self._last_kept = line[found.start() :] if is_ours else b""
            return (line[: found.start()], line[found.start() :]) if is_ours else (line, b"")
        if self._last_kept and not began_before:
            is_more = _MORE_OF_IT.match(line) or (line == b"\n" and _BLANK_BEHIND.match(self._last_kept))
            if is_more:
                self._last_kept = line
                return b"", line
        self._last_kept = b""
        return line, b""

    def _start_of_theirs(self, rest: bytes) -> int:
        """Return where, in a piece of a line, a line of TensorFlow's may begin; its length if nowhere."""
        found = _HEADER.search(rest)
        if found is not None:
            return found.start()
        if self._last_kept and not self._mid_line:
            return 0  # a long message comes in pieces
        digits = rest.translate(_DIGITS)
        for start in range(max(0, len(rest) - _LONGEST_START), len(rest) - _LEAST_START + 1):
            tail = digits[start:]
            for template in _STARTS:
                if template.startswith(tail[: len(template)]):
                    return start
        return len(rest)


def _cut(data: bytes) -> list[bytes]:
    """Cut behind every line's end; the last piece, which may be empty, has none. A bar's "\\r" ends a line, too."""
    return re.split(rb"(?<=\n)|(?<=\r)(?!\n)", data) if data else [b""]


class Screen:
    """Standard error as it was: what is passed on is written to it, with the table of a search below."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._table = b""
        self._drawn_lines = 0
        self._at_line_start = True

    def write(self, data: bytes) -> None:
        if not data:
            return
        erase = self._erasure()
        self._at_line_start = data.endswith(b"\n")
        self._put(erase + data + self._drawing())

    def show(self, table: bytes) -> None:
        """Draw ``table`` in place of the one before."""
        erase = self._erasure()
        self._table = table
        self._put(erase + self._drawing())

    def _erasure(self) -> bytes:
        lines, self._drawn_lines = self._drawn_lines, 0
        if not lines:
            return b""
        return b"\r" + (b"\x1b[%dA" % (lines - 1) if lines > 1 else b"") + b"\x1b[J"

    def _drawing(self) -> bytes:
        if not self._table or not self._at_line_start:  # a line that is not ended yet is not ours to break
            return b""
        self._drawn_lines = self._table.count(b"\n") + 1
        return self._table

    def _put(self, data: bytes) -> None:
        while data:
            try:
                data = data[os.write(self._descriptor, data) :]
            except BlockingIOError:
                time.sleep(0.01)
            except OSError:
                return  # nobody reads it any more


def _append(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.pwrite(descriptor, data, os.fstat(descriptor).st_size) :]


class _Relay:
    def __init__(
        self, source: int, target: int, kept: int, state: int, control: int, last_words: int, parent: int
    ) -> None:
        self._source, self._kept, self._control, self._parent = source, kept, control, parent
        self._last_words = last_words
        self._busy = mmap.mmap(state, mmap.PAGESIZE)
        self._sieve: Sieve | None = Sieve()
        self._screen = Screen(target)
        self._frames = b""

    def run(self, *, sieves: bool) -> None:
        if not sieves:
            self._sieve = None
        waiting = select.poll()  # select knows no descriptor above 1023
        for descriptor in (self._source, self._control):
            waiting.register(descriptor, select.POLLIN)
        while True:
            holds = self._sieve is not None and self._sieve.holds
            looks = self._keeps_some() or self._last_words >= 0
            seconds = HOLD_SECONDS if holds else _LOOK_SECONDS if looks else None
            ready = [descriptor for descriptor, _ in waiting.poll(None if seconds is None else 1000 * seconds)]
            self._busy[0] = 1
            if self._control in ready and not self._read_table():
                waiting.unregister(self._control)
            if self._source in ready:
                data = os.read(self._source, _READ_BYTES)
                if not data:
                    break
                self._take(data)
            elif not ready and self._sieve is not None and holds:
                self._screen.write(self._sieve.let_go())
            if not ready and os.getppid() != self._parent:  # it died, and a process that it has started holds the pipe
                self._end_last_words()
                self._print_kept()
                os.ftruncate(self._kept, 0)
            if self._sieve is None or not self._sieve.holds:
                self._busy[0] = 0
        self._screen.show(b"")
        if self._sieve is not None:
            self._screen.write(self._sieve.let_go())
        self._print_kept()
        self._busy[0] = 0

    def _take(self, data: bytes) -> None:
        if self._last_words >= 0:
            if os.fstat(self._last_words).st_size > _LAST_WORDS_BYTES:
                os.ftruncate(self._last_words, 0)
            _append(self._last_words, data)
        if self._sieve is None:
            self._screen.write(data)
            return
        passed, kept = self._sieve.feed(data)
        _append(self._kept, kept)
        self._screen.write(passed)

    def _end_last_words(self) -> None:
        """Let them be read: what comes now is not of the process that died."""
        if self._last_words >= 0:
            import fcntl  # here alone: few trainings are under ``autobatch run``

            fcntl.flock(self._last_words, fcntl.LOCK_UN)
            self._last_words = -1

    def _read_table(self) -> bool:
        data = os.read(self._control, _READ_BYTES)
        self._frames += data
        table = None
        while len(self._frames) >= FRAME.size:
            (length,) = FRAME.unpack_from(self._frames)
            if len(self._frames) < FRAME.size + length:
                break
            table = self._frames[FRAME.size : FRAME.size + length]
            self._frames = self._frames[FRAME.size + length :]
        if table is not None:
            self._screen.show(table)
        return bool(data)

    def _keeps_some(self) -> bool:
        return os.fstat(self._kept).st_size > 0

    def _print_kept(self) -> None:
        """Print what was kept aside: whoever has handled the failures that it tells of empties it before."""
        size = os.fstat(self._kept).st_size
        offset = 0
        while offset < size and (data := os.pread(self._kept, 1 << 16, offset)):
            self._screen.write(data)
            offset += len(data)


def main(arguments: list[str]) -> None:
    *descriptors, parent, sieves = (int(argument) for argument in arguments)
    source, target, kept, state, control, *rest = descriptors
    last_words = rest[0] if rest else -1
    _Relay(source, target, kept, state, control, last_words, parent).run(sieves=bool(sieves))
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
