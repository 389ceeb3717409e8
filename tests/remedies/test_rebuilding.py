"""A live model written aside and built anew: what comes back, and what cannot."""

from __future__ import annotations

import json
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from autobatch import api
from autobatch.errors import NotApplicableError
from autobatch.records import Environment
from autobatch.remedies import rebuilding


def model_of(**options):
    inputs = {"a": keras.Input((6,), name="a"), "b": keras.Input((3,), name="b", dtype="int32")}
    x = layers.Dense(5, activation="gelu", name="first")(inputs["a"])
    x = layers.Concatenate()([x, layers.Flatten()(layers.Embedding(7, 2)(inputs["b"]))])
    x = layers.Lambda(lambda t: t * 2)(x)
    outputs = layers.Dense(1, name="last", dtype="float64")(x)
    model = keras.Model(inputs, outputs, name="two_inputs")
    options = {"loss": keras.losses.Huber(0.5), "metrics": ["mae"], **options}
    model.compile(keras.optimizers.AdamW(0.02, clipnorm=1.0), **options)
    return model


def batch_of(samples):
    x = {"a": tf.random.normal((samples, 6)), "b": tf.zeros((samples, 3), tf.int32)}
    return x, tf.zeros((samples, 1)), tf.ones((samples,))


@pytest.fixture
def policy():
    before = keras.config.dtype_policy()
    yield keras.config.set_dtype_policy
    keras.config.set_dtype_policy(before)


def test_a_model_comes_back_as_it_was_compiled(tmp_path):
    model = model_of(jit_compile=True)
    assert rebuilding._write(tmp_path, model, batch_of, 100) == {"policy": "float32"}
    again, dataset = rebuilding.build(str(tmp_path))
    assert [tuple(v.shape) for v in again.variables] == [tuple(v.shape) for v in model.variables]
    assert again.name == "two_inputs"
    assert again.jit_compile is True
    assert again.optimizer.get_config() == model.optimizer.get_config()
    assert not again.optimizer.built  # no slots yet: a remedy may replace it
    assert again.loss.get_config() == model.loss.get_config()
    sizes = [len(y) for _, y, _ in dataset]
    assert (sum(sizes), max(sizes)) == (100, 32)
    again.jit_compile = False
    assert np.isfinite(again.fit(dataset, verbose=0).history["loss"][0])


def test_layers_that_follow_the_global_policy_follow_the_workers(tmp_path, policy):
    rebuilding._write(tmp_path, model_of(), batch_of, 8)
    policy("mixed_bfloat16")
    again, _ = rebuilding.build(str(tmp_path))
    assert again.get_layer("first").dtype_policy.name == "mixed_bfloat16"
    assert again.get_layer("last").dtype_policy.name == "float64"


def test_a_loss_scale_that_the_policy_brought_is_left_to_the_policy(tmp_path, policy):
    policy("mixed_float16")
    model = model_of()
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert rebuilding._write(tmp_path, model, batch_of, 8) == {"policy": "mixed_float16"}
    policy("float32")
    again, _ = rebuilding.build(str(tmp_path))
    assert isinstance(again.optimizer, keras.optimizers.AdamW)


class Untold(keras.Model):
    def __init__(self, function):
        super().__init__()
        self.function, self.dense = function, layers.Dense(1)

    def call(self, x):
        return self.dense(self.function(x))


class Doubled(layers.Layer):
    def call(self, x):
        return 2 * x


def far_off(y_true, y_pred):
    return tf.abs(y_true - y_pred)


def test_why_a_model_cannot_be_rebuilt(tmp_path):
    model = Untold(np.sin)
    model.compile("sgd", "mse")
    with pytest.raises(NotApplicableError, match=r"cannot be rebuilt in a worker: .*autobatch report file.py:function"):
        rebuilding._write(tmp_path, model, batch_of, 8)

    rebuilding._write(tmp_path, model_of(), batch_of, 8)
    path = Path(tmp_path, "model.json")
    written = json.loads(path.read_text())
    path.write_text(json.dumps({**written, "own": [["absent_module", "Mine"]]}))
    with pytest.raises(NotApplicableError, match=r"cannot be rebuilt in a worker: No module named 'absent_module'"):
        rebuilding.build(str(tmp_path))


def test_a_class_of_the_script_itself_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(Doubled, "__module__", "__main__")
    model = keras.Sequential([keras.Input((6,)), Doubled(), layers.Dense(1)])
    model.compile("sgd", "mse")
    with pytest.raises(NotApplicableError, match="Doubled is defined in the script itself"):
        rebuilding._write(tmp_path, model, batch_of, 8)


def test_classes_and_functions_of_the_users_modules_are_imported(tmp_path):
    model = keras.Sequential([keras.Input((6,)), Doubled(), layers.Dense(1)])
    model.compile("sgd", loss=far_off, metrics=["mae"])
    rebuilding._write(tmp_path, model, lambda samples: (tf.zeros((samples, 6)), tf.zeros((samples, 1))), 8)
    again, dataset = rebuilding.build(str(tmp_path))
    assert type(again.layers[0]) is Doubled
    assert again.fit(dataset, verbose=0).history["loss"] == [0.0]


@pytest.mark.parametrize(
    "leaf", [tf.ragged.constant([[1.0], [2.0, 3.0]]), tf.constant(["a", "b"]), tf.sparse.eye(2)], ids=type
)
def test_data_that_cannot_be_carried(leaf):
    with pytest.raises(NotApplicableError, match="cannot be carried into a worker"):
        rebuilding._on_host((leaf, tf.zeros((2, 1))))


def test_a_gpu_whose_memory_this_process_holds():
    environment = Environment("GPU:0", 8 << 30, "all memory", 7 << 30, 0.05, "float32", True)
    # Where there is no driver, nobody can say what is free.
    if not tf.config.list_physical_devices("GPU"):
        with pytest.raises(NotApplicableError, match="a worker needs the memory of GPU:0"):
            rebuilding._require_room(environment)


def test_tune_says_of_each_remedy_that_the_model_cannot_be_rebuilt():
    model = Untold(tf.sin)
    model.compile("sgd", "mse")
    data = (np.ones((16, 4), "float32"), np.ones((16, 1), "float32"))
    report = api.tune(model, data, target_batch=16, remedies=True)
    assert report.largest_fit == 16
    assert len(report.remedies) == 7
    assert all("does not apply: the model cannot be rebuilt in a worker" in each.why_not for each in report.remedies)
