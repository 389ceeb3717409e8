"""Every value that training changes, and that two trainings ended with the same ones, bit for bit."""

from __future__ import annotations

import numpy as np


def everything(model):
    """Every variable's value, with its name."""
    variables = [*model.variables, *model.optimizer.variables, *(v for m in model.metrics for v in m.variables)]
    return [(variable.name, variable.numpy()) for variable in variables]


def assert_same_bits(actual, expected):
    for (_, left), (name, right) in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(left, right, err_msg=name)
