"""Ctrl-C in a search ends it, whatever Python or TensorFlow is doing when it comes."""

import gc
import os
import signal
import threading

import pytest
from models import arrays, classifier

import autobatch
from autobatch import interrupts

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


class Garbage:
    """A destructor's exceptions are dropped by Python."""

    def __del__(self):
        interrupt()
        sum(range(1000))  # here the handler runs


def test_one_that_python_drops_is_raised_when_the_block_ends():
    ran = []

    @interrupts.not_lost()
    def block():
        Garbage()
        ran.append("on")

    with pytest.raises(KeyboardInterrupt):
        block()
    assert ran == ["on"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_one_that_comes_out_as_another_error_is_raised_as_what_it_is():
    @interrupts.not_lost()
    def block():
        try:
            interrupt()
            sum(range(1000))
        except KeyboardInterrupt:
            raise TypeError("cannot be converted") from None

    with pytest.raises(KeyboardInterrupt) as caught:
        block()
    assert isinstance(caught.value.__cause__, TypeError)


def test_other_errors_stay_what_they_are():
    with pytest.raises(TypeError), interrupts.not_lost():
        raise TypeError
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_inner_block_ends_at_once():
    ran = []

    @interrupts.not_lost()
    def block():
        with interrupts.not_lost():
            Garbage()
        ran.append("too long")

    with pytest.raises(KeyboardInterrupt):
        block()
    assert not ran


def test_a_handler_of_somebody_elses_stays():
    seen = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        with interrupts.not_lost():
            interrupt()
            sum(range(1000))
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [signal.SIGINT]


def test_on_another_thread_nothing_is_changed():
    found = []

    def run():
        with interrupts.not_lost():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]


def test_a_search_that_collects_garbage_when_it_comes_ends():
    model = classifier()
    before = [weight.copy() for weight in model.get_weights()]
    came = []

    def once(phase, info):
        if phase == "stop" and not came and signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            came.append(phase)
            interrupt()
            sum(range(1000))

    gc.callbacks.append(once)
    try:
        with pytest.raises(KeyboardInterrupt):
            autobatch.tune(model, *arrays(), target_batch=16, cache=False)
    finally:
        gc.callbacks.remove(once)
    assert came
    assert all((left == right).all() for left, right in zip(before, model.get_weights(), strict=True))
    assert autobatch.tune(model, *arrays(), target_batch=16, cache=False).plan is not None
