"""Set before TensorFlow is loaded: with oneDNN off an allocation that must fail does so at once, not after 10 s."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import pytest


@pytest.fixture
def keras():
    """Keras with all its seeds set, as at the start of a fresh process."""
    import keras

    keras.utils.set_random_seed(7)
    return keras
