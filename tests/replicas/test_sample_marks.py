"""A mark by which workers see that they have been given the same samples."""

from __future__ import annotations

import pytest
import tensorflow as tf

from autobatch.replicas.transaction import _mark_of


@pytest.mark.parametrize(
    ("sample", "other"),
    [
        (lambda: tf.constant([["a text", "another"]]), lambda: tf.constant([["a text", "yet another"]])),
        (lambda: tf.constant([[1.5, 2.5]]), lambda: tf.constant([[1.5, 2.25]])),
        (lambda: tf.constant([[7, 8]], tf.int64), lambda: tf.constant([[8, 7]], tf.int64)),
        (lambda: tf.constant([[True, False]]), lambda: tf.constant([[True, True]])),
        (lambda: tf.constant([[1.5]], tf.bfloat16), lambda: tf.constant([[2.5]], tf.bfloat16)),
    ],
    ids=["text", "float32", "int64", "bool", "bfloat16"],
)
def test_the_mark_is_that_of_the_content(sample, other):
    assert _mark_of(sample()) == _mark_of(sample())
    assert _mark_of(sample()) != _mark_of(other())
