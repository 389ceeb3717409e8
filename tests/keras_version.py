"""The version of Keras that is tested, and parameters of tests that are new in a later one."""

from __future__ import annotations

import keras
import pytest

KERAS = tuple(int(number) for number in keras.__version__.split(".")[:2])


def since(version, *values):
    """Parameters of a test that Keras has since ``version``: "3.7". In an older one, the test is skipped."""
    is_older = tuple(map(int, version.split("."))) > KERAS
    return pytest.param(*values, marks=pytest.mark.skipif(is_older, reason=f"{values[0]} is new in Keras {version}"))
