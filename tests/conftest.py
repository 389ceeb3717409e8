"""Set before TensorFlow is loaded: with oneDNN off an allocation that must fail does so at once, not after 10 s."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import pytest


def pytest_sessionstart():
    """Where the environment says which Keras is to be tested, refuse to test another."""
    expected = os.environ.get("AUTOBATCH_EXPECT_KERAS")
    if expected:
        import keras

        if keras.__version__ != expected:
            raise pytest.UsageError(
                f"Keras {expected} is to be tested. Received: {keras.__version__} from {keras.__file__}"
            )
        print(f"testing with Keras {keras.__version__}")


@pytest.fixture
def keras():
    """Keras with all its seeds set, as at the start of a fresh process."""
    import keras

    keras.utils.set_random_seed(7)
    return keras
