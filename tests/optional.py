"""Packages that autobatch works with and does without, and what older versions of Keras cannot do."""

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
    """Grain; without it the test is skipped, unless the environment says that it is to be there."""
    if os.environ.get("AUTOBATCH_EXPECT_GRAIN"):
        return importlib.import_module("grain")
    return pytest.importorskip("grain")


def stateful_data_loader():
    """torchdata's loader whose state can be kept; without it the test is skipped, unless PyTorch is to be there."""
    name = "torchdata.stateful_dataloader"
    if os.environ.get("AUTOBATCH_EXPECT_TORCH"):
        return importlib.import_module(name).StatefulDataLoader
    return pytest.importorskip(name).StatefulDataLoader


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


def several_devices():
    """Training on several devices; under a Keras that is too old for it, the test is skipped with the reason."""
    from autobatch.seams.versions import why_not_on_several_devices

    if reason := why_not_on_several_devices():
        pytest.skip(reason)
