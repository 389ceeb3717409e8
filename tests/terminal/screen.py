"""What a terminal shows of the bytes that it was sent: enough of one for Keras's bar and for the table of a search."""

import codecs
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

_CONTROL = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])")


class Screen:
    def __init__(self, columns):
        self.columns = columns
        self.rows = [""]
        self.row = self.column = 0

    def feed(self, text):
        at = 0
        while at < len(text):
            found = _CONTROL.match(text, at)
            if found:
                self._control(found[2], int(found[1]) if found[1].isdigit() else 1, found[1])
                at = found.end()
                continue
            self._put(text[at])
            at += 1

    def _control(self, kind, count, argument):
        if kind == "A":
            self.row = max(0, self.row - count)
        elif kind == "J":
            assert not argument
            self.rows[self.row] = self.rows[self.row][: self.column]
            del self.rows[self.row + 1 :]
        elif kind == "K":
            self.rows[self.row] = "" if argument == "2" else self.rows[self.row][: self.column]
        else:
            assert kind in "mhl", kind

    def _put(self, character):
        if character == "\r":
            self.column = 0
        elif character == "\b":
            self.column = max(0, self.column - 1)
        elif character == "\n":
            self._down()
        else:
            if self.column == self.columns:
                self._down()
                self.column = 0
            line = self.rows[self.row].ljust(self.column)
            self.rows[self.row] = line[: self.column] + character + line[self.column + 1 :]
            self.column += 1

    def _down(self):
        self.row += 1
        if self.row == len(self.rows):
            self.rows.append("")

    @property
    def lines(self):
        return [row.rstrip() for row in self.rows if row.strip()]


def run_in_terminal(arguments, *, columns, environment, seconds=120):
    """Run Python in a terminal of so many columns; return its exit code, the last screen, and every screen before.

    A screen is taken whenever the process has paused for a moment.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm-256color", **environment},
        start_new_session=True,
    )
    os.close(theirs)
    screen, screens, ends = Screen(columns), [], time.monotonic() + seconds
    decoder, rest = codecs.getincrementaldecoder("utf-8")("replace"), ""
    while time.monotonic() < ends:
        ready, _, _ = select.select([ours], [], [], 0.05)
        if not ready:
            if not screens or screens[-1] != screen.lines:
                screens.append(screen.lines)
            continue
        try:
            text = rest + decoder.decode(os.read(ours, 1 << 16))
        except OSError:
            break  # the last process that had it open has ended
        cut = text.find("\x1b", max(0, len(text) - 8))  # a control that has not come whole
        text, rest = (text, "") if cut < 0 else (text[:cut], text[cut:])
        screen.feed(text)
    os.close(ours)
    screen.feed(rest)
    return process.wait(10), screen.lines, screens


HERE = Path(__file__).parent
