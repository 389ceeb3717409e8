"""Packages that autobatch works with and does without."""

from __future__ import annotations

import importlib
import os

import pytest


def torch():
    """PyTorch; without it the test is skipped, unless the environment says that it is to be there."""
    if os.environ.get("AUTOBATCH_EXPECT_TORCH"):
        return importlib.import_module("torch")
    return pytest.importorskip("torch")


def grain():
    """Grain; without it the test is skipped."""
    return pytest.importorskip("grain")


def keras_hub():
    """KerasHub; without it the test is skipped, unless the environment says that it is to be there."""
    if os.environ.get("AUTOBATCH_EXPECT_KERAS_HUB"):
        return importlib.import_module("keras_hub")
    return pytest.importorskip("keras_hub")


def keras_tuner():
    """KerasTuner; without it the test is skipped, unless the environment says that it is to be there."""
    if os.environ.get("AUTOBATCH_EXPECT_KERAS_TUNER"):
        return importlib.import_module("keras_tuner")
    return pytest.importorskip("keras_tuner")
