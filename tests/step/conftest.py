"""Fixtures of the tests of steps."""

from __future__ import annotations

import keras
import pytest


@pytest.fixture
def double_precision():
    """In float32 the rounding of the weights would hide what updates differ by."""
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")
