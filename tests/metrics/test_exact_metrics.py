"""Keras's metrics over epochs with a ragged tail: what `autobatch.fit` reports is what `Model.fit` reports."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers, metrics
from models import arrays

import autobatch

SAMPLES, TARGET, MICRO_BATCH = 100, 40, 14  # updates of 14 + 13 + 13 samples, twice, and of 10 + 10


def binary():
    x, labels = arrays(samples=SAMPLES)
    kinds = [metrics.AUC(), metrics.Precision(), metrics.Recall(), metrics.F1Score(threshold=0.5)]
    return x, (labels % 2).astype("float32")[:, None], "sigmoid", "binary_crossentropy", kinds


def classes():
    x, labels = arrays(samples=SAMPLES)
    kinds = [metrics.TopKCategoricalAccuracy(3), metrics.F1Score(average="macro"), metrics.OneHotMeanIoU(10)]
    return x, np.eye(10)[labels].astype("float32"), "softmax", "categorical_crossentropy", kinds


def real():
    x, _ = arrays(samples=SAMPLES)
    kinds = [metrics.R2Score(), metrics.RootMeanSquaredError(), metrics.PearsonCorrelation()]
    return x, x[:, :3], None, "mse", kinds


@pytest.mark.parametrize("kind", [binary, classes, real])
def test_every_kind_of_metric(kind):
    """Weighted and unweighted, in training and in validation."""
    x, y, activation, loss, _ = kind()
    weight = np.random.default_rng(3).uniform(0, 2, SAMPLES).astype("float32")

    def build():
        keras.backend.clear_session()  # names are given anew
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((16,)), layers.Dense(y.shape[1], activation)])
        # A correlation takes no weights of samples: it has a value for each sample, and no place for one.
        weighted = [metric for metric in kind()[-1] if not isinstance(metric, metrics.PearsonCorrelation)]
        model.compile(keras.optimizers.SGD(0.1), loss, metrics=kind()[-1], weighted_metrics=weighted)
        return model

    common = {"sample_weight": weight, "epochs": 2, "shuffle": False, "verbose": 0}
    common |= {"validation_data": (x[:30], y[:30], weight[:30]), "validation_batch_size": 20}
    expected = build().fit(x, y, batch_size=TARGET, **common)
    actual = autobatch.fit(build(), x, y, target_batch=TARGET, micro_batch=MICRO_BATCH, **common)
    assert actual.history.keys() == expected.history.keys()
    assert len(expected.history) >= 12
    for name, values in expected.history.items():
        np.testing.assert_allclose(actual.history[name], values, rtol=2e-5, atol=1e-6, err_msg=name)
