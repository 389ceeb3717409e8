"""What TensorFlow's profiler tells of a program that XLA has compiled."""

from __future__ import annotations

import pytest
import tensorflow as tf
from google.protobuf.message import DecodeError

from autobatch.memory import profile_reader
from autobatch.memory.compiled_growth import growth
from autobatch.seams.compiled_programs import blocks_of

WIDTH, SMALL, LARGE = 19, 67, 401


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    """The largest block of one program at two numbers of samples; they are no size of a weight."""

    @tf.function(jit_compile=True)
    def step(x, w):
        with tf.GradientTape() as tape:
            tape.watch(w)
            hidden = x
            for _ in range(4):
                hidden = tf.tanh(hidden @ w)
            loss = tf.reduce_sum(hidden**2)
        return tape.gradient(loss, w)

    found = {}
    for samples in (SMALL, LARGE):
        folder = tmp_path_factory.mktemp("profile")
        tf.profiler.experimental.start(str(folder))
        step(tf.ones([samples, WIDTH]), tf.ones([WIDTH, WIDTH])).numpy()
        tf.profiler.experimental.stop()
        told = profile_reader.read_compiled(folder)  # of what was compiled in this process before as well
        own = [block for block in told if any(buffer.shape == (samples, WIDTH) for buffer in block.buffers)]
        found[samples] = max(own, key=lambda each: each.size_bytes)
    return found


def test_the_profile_holds_the_plan_of_what_was_compiled_in_it(blocks):
    assert SMALL * WIDTH * 4 < blocks[SMALL].size_bytes < blocks[LARGE].size_bytes
    assert any(buffer.shape == (SMALL, WIDTH) for buffer in blocks[SMALL].buffers)
    assert all(0 <= each.offset_bytes <= blocks[SMALL].size_bytes - each.size_bytes for each in blocks[SMALL].buffers)


def test_one_size_tells_what_another_needs(blocks):
    fixed, per_sample = growth(blocks[SMALL], SMALL, {(WIDTH, WIDTH)}, at_most=2 * blocks[LARGE].size_bytes)
    assert fixed + LARGE * per_sample == pytest.approx(blocks[LARGE].size_bytes, rel=0.05)


def test_a_folder_without_a_profile_holds_no_plan(tmp_path):
    assert profile_reader.read_compiled(tmp_path) == []


def test_what_is_no_program_is_refused():
    with pytest.raises(DecodeError):
        list(blocks_of(b"\x0a\xff no program"))
