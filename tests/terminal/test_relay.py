"""The sieve between TensorFlow's allocator lines and all else, byte for byte; the table below what comes through."""

import itertools
import os
import random
import re
from pathlib import Path

import pytest
from screen import Screen as Terminal

from autobatch.terminal.relay import Screen, Sieve

DUMP = (Path(__file__).parent / "allocator_dump.txt").read_bytes()
# TensorFlow up to 2.20 writes the same behind another header.
OLDER = re.sub(
    rb"(?m)^([IWE])0000 00:00:\d+\.(\d+) +\d+ (\w+\.(?:cc|h))",
    rb"2025-11-29 14:56:06.\2: \1 external/local_xla/xla/tsl/framework/\3",
    DUMP,
)
XLA = b"""\
E0000 00:00:1795964932.742629   20763 pjrt_stream_executor_client.cc:3077] Execution of replica 0 failed: \
RESOURCE_EXHAUSTED: Out of memory while trying to allocate 123456 bytes.
BufferAssignment OOM Debugging.
BufferAssignment stats:
             parameter allocation:    1.00MiB
              constant allocation:         0B
        maybe_live_out allocation:   12.00MiB
     preallocated temp allocation:  300.00MiB
                 total allocation:  313.00MiB
Peak buffers:
	Buffer 1:
		Size: 100.00MiB
		Operator: op_type="Conv2D" op_name="conv"
		XLA Label: custom-call
		Shape: f32[64,60,60,32]
		==========================

"""
THEIRS = [
    b"a print of the user's\n",
    b"\n",
    b"Limit: 3 apples\n",
    b"InUse at home\n",
    b"W1129 14:56:02.113828    1575 train.py:502] Out of memory, says somebody's own Python\n",
    b"I0000 00:00:1795964932.742629   20763 cudart_stub.cc:31] Could not find cuda drivers on your machine\n",
    b"2025-11-29 14:56:06.113828: I tensorflow/core/util/port.cc:153] oneDNN custom operations are on.\n",
    b"F0000 00:00:1795964932.742629   20763 bfc_allocator.cc:411] Check failed: h != kInvalidChunkHandle\n",
    b"\xff\xfe not UTF-8 \x00\n",
    b"45%|####      | 9/20\r",
    b"2025-11-29 somebody's own log: W out of memory\n",
]


def sieved(pieces):
    sieve = Sieve()
    passed, kept = zip(*map(sieve.feed, pieces), strict=True) if pieces else ((), ())
    return b"".join(passed) + sieve.let_go(), b"".join(kept)


@pytest.mark.parametrize("dump", [DUMP, OLDER, XLA], ids=["2.21", "older", "XLA"])
def test_a_whole_dump_is_kept_and_nothing_else(dump):
    assert dump.count(b"\n") > 10
    assert sieved([dump]) == (b"", dump)
    before, behind = b"before\n", b"behind\n\n"
    assert sieved([before, dump, behind]) == (before + behind, dump)
    assert sieved([before + dump + behind]) == (before + behind, dump)


@pytest.mark.parametrize("theirs", THEIRS)
def test_what_is_not_of_an_allocator_is_passed_on(theirs):
    assert sieved([theirs]) == (theirs, b"")
    assert sieved([DUMP + theirs + DUMP]) == (theirs, DUMP + DUMP)


def test_whatever_the_pieces_the_bytes_and_their_order_are_kept():
    draw = random.Random(0)
    for _ in range(300):
        parts = [draw.choice([*THEIRS, DUMP[:4000], OLDER[:3000], XLA]) for _ in range(6)]
        whole = [part if part.endswith((b"\n", b"\r")) else part[: part.rindex(b"\n") + 1] for part in parts]
        data = b"".join(whole)
        cuts = sorted(draw.sample(range(1, len(data)), min(len(data) - 1, 8)))
        # TensorFlow writes a header in one go: none is cut in the few characters that anybody's line might begin with.
        begins = [0, *itertools.accumulate(map(len, whole))]
        cuts = [next((at for at in begins if at < cut < at + 5), cut) for cut in cuts]
        pieces = [data[a:b] for a, b in itertools.pairwise([0, *cuts, len(data)])]
        own = [part for part in whole if part in THEIRS]
        theirs = [part for part in whole if part not in THEIRS]
        assert sieved(pieces) == (b"".join(own), b"".join(theirs))


def test_a_piece_of_a_line_is_passed_on_at_once():
    for piece in (b"name? ", b"12", b"W", b"loading", b"\r 50%", b"I like 2025"):
        assert Sieve().feed(piece) == (piece, b""), piece
    sieve = Sieve()
    assert sieve.feed(b"name? ") == (b"name? ", b"")
    assert sieve.feed(DUMP) == (b"", DUMP)
    assert sieve.feed(b"Anna\n") == (b"Anna\n", b"")
    assert sieve.feed(DUMP + b"age? ") == (b"", DUMP)  # it might be the beginning of more of it, for a moment
    assert sieve.let_go() == b"age? "
    # Behind a piece of somebody's own line TensorFlow's begins in its middle.
    assert sieved([b"dots ...." + DUMP + b"....\n"]) == (b"dots ........\n", DUMP)


def test_a_line_that_begins_like_tensorflows_waits_for_its_rest_alone():
    sieve = Sieve()
    line = b"W0000 00:00:1795964932.742629   20763 bfc_allocator.cc:502] Allocator (x) ran out of memory\n"
    assert sieve.feed(line[:30]) == (b"", b"")
    assert sieve.holds
    assert sieve.feed(line[30:]) == (b"", line)
    assert not sieve.holds
    sieve.feed(b"2025-11-29 14:56:06.113828: ")
    assert sieve.let_go() == b"2025-11-29 14:56:06.113828: "
    assert sieve.feed(b"my own log\nmore\n") == (b"my own log\nmore\n", b"")


def test_the_table_stays_below_what_comes_through():
    read, write = os.pipe()
    terminal, screen = Terminal(40), Screen(write)

    def shown():
        terminal.feed(os.read(read, 1 << 16).decode().replace("\n", "\r\n"))
        return terminal.lines

    screen.show(b"heading\nrow 1")
    assert shown() == ["heading", "row 1"]
    screen.write(b"a print\n")
    assert shown() == ["a print", "heading", "row 1"]
    screen.show(b"heading\nrow 1\nrow 2")
    assert shown() == ["a print", "heading", "row 1", "row 2"]
    screen.write(b"half a ")  # a line that is not ended is not broken: the table waits
    assert shown() == ["a print", "half a"]
    screen.write(b"line\n")
    assert shown() == ["a print", "half a line", "heading", "row 1", "row 2"]
    screen.show(b"")
    assert shown() == ["a print", "half a line"]
    os.close(read)
    screen.write(b"nobody reads this any more")
    os.close(write)
