"""Lines about a training, whatever stands in the place of standard error."""

import io

import pytest

from autobatch.terminal import notices


class OnlyWrites:
    """What a notebook, an IDE, or a few lines of somebody's logging may put in the place of ``sys.stderr``."""

    def __init__(self):
        self.written = ""

    def write(self, text):
        self.written += text


class Full(io.StringIO):
    def write(self, text):
        raise BrokenPipeError


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


def test_a_stream_that_can_only_write_gets_the_line(monkeypatch):
    stream = OnlyWrites()
    monkeypatch.setattr("sys.stderr", stream)
    notices.write_line("micro-batch 4")
    assert stream.written == "autobatch: micro-batch 4\n"


@pytest.mark.parametrize("stream", [None, closed(), Full(), object()])
def test_a_stream_that_cannot_write_ends_no_training(monkeypatch, stream):
    monkeypatch.setattr("sys.stderr", stream)
    notices.write_line("micro-batch 4")
