"""What a worker changes in a model for a remedy, on real models in this process."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from autobatch.errors import NotApplicableError
from autobatch.seams.optimizers import optimizers_of
from autobatch.worker import variants


class Block(layers.Layer):
    """A block whose ``call`` takes its input alone, so that TensorFlow can recompute it."""

    def __init__(self, units, **options):
        super().__init__(**options)
        self.dense = layers.Dense(units)

    def call(self, x):
        return x + tf.tanh(tf.exp(-tf.square(self.dense(x))))


def blocks():
    stack = [keras.Input((8,)), *(Block(8, name=f"block_{i}") for i in range(2)), layers.Dropout(0.1)]
    model = keras.Sequential([*stack, layers.Dense(8, activation="gelu", name="gelu"), layers.Dense(1, name="out")])
    model.compile("adam", "mse")
    return model, None, None


def plain(optimizer="adam", **options):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3), layers.Dense(1)])
    model.compile(optimizer, "mse", **options)
    return model


@pytest.mark.parametrize(("what", "names"), [("layers", ["block_0", "block_1"]), ("activations", ["gelu"])])
def test_a_rematerialised_model_has_the_same_gradients(what, names):
    x, y = np.random.default_rng(0).normal(size=(16, 8)).astype("float32"), np.ones((16, 1), "float32")
    (model, _, _), found = variants.rematerialised(blocks, what)
    assert found == names
    reference, _, _ = blocks()
    reference.set_weights(model.get_weights())

    # Eagerly Keras's scope works in every mode; it is the compiled step that must.
    @tf.function
    def gradients(one):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(one(x, training=False) - y))
        return tape.gradient(loss, one.trainable_variables)

    operation = {"layers": "Tanh", "activations": "Erf"}[what]
    assert _count(gradients, model, operation) == 2 * _count(gradients, reference, operation)
    for ours, theirs in zip(gradients(model), gradients(reference), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)
    assert model.fit(x, y, verbose=0).history["loss"][0] > 0


def _count(function, model, operation):
    graph = function.get_concrete_function(model).graph
    kinds = [one.type for one in graph.get_operations()]
    return kinds.count(operation)


def test_what_is_made_outside_of_the_scope_cannot_be_rematerialised():
    made_before = blocks()
    with pytest.raises(NotApplicableError, match="every layer of the model gets training or mask as one"):
        variants.rematerialised(lambda: made_before, "layers")
    with pytest.raises(NotApplicableError, match="no layer of the model has an activation"):
        variants.rematerialised(lambda: made_before, "activations")


def test_keras_still_fails_under_the_scopes_mode_full():
    """Why the layers are named one by one; when this fails, mode "full" can be tried."""
    with keras.RematScope(mode="full"):
        model, _, _ = blocks()
    with pytest.raises(ValueError, match="supports keywords arguments only when eager"):
        model.fit(np.ones((4, 8), "float32"), np.ones((4, 1), "float32"), verbose=0)


def test_an_optimizer_without_slots_keeps_the_rest():
    schedule = keras.optimizers.schedules.ExponentialDecay(0.25, 10, 0.5)
    model = plain(keras.optimizers.AdamW(schedule, weight_decay=0.01, global_clipnorm=2.0))
    variants.take_slots_away(model)
    optimizer = model.optimizer
    assert isinstance(optimizer, keras.optimizers.SGD)
    assert (optimizer.weight_decay, optimizer.global_clipnorm, optimizer.momentum) == (0.01, 2.0, 0.0)
    assert float(optimizer.learning_rate) == 0.25
    model.fit(np.ones((4, 4), "float32"), np.ones((4, 1), "float32"), verbose=0)
    assert sum(int(np.prod(v.shape)) for v in optimizer.variables) == 2  # the iterations and the learning rate


def test_a_loss_scale_stays_around_an_optimizer_without_slots():
    model = plain(keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.1)))
    variants.take_slots_away(model)
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert isinstance(model.optimizer.inner_optimizer, keras.optimizers.SGD)
    assert len(optimizers_of(model)) == 1


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_has_slots_where_it_has_momentum(momentum):
    model = plain(keras.optimizers.SGD(0.1, momentum=momentum))
    if momentum:
        variants.take_slots_away(model)
        assert not model.optimizer.momentum
    else:
        with pytest.raises(NotApplicableError, match="SGD without momentum, has no slots"):
            variants.take_slots_away(model)


def test_several_optimizers_are_left_alone():
    model = plain()
    model.second = keras.optimizers.Adam()
    with pytest.raises(NotApplicableError, match="it has 2"):
        variants.take_slots_away(model)


def test_a_policy_that_no_layer_took_has_no_effect():
    model = plain()
    variants.require_policy(model, "float32")
    with pytest.raises(NotApplicableError, match=r"set their own dtype policy \(float32\)"):
        variants.require_policy(model, "mixed_bfloat16")


def test_xla_has_no_say_in_a_model_that_runs_eagerly():
    model = plain()
    variants.set_jit(model, True)
    assert model.jit_compile
    eager = plain(run_eagerly=True)
    with pytest.raises(NotApplicableError, match="runs eagerly"):
        variants.set_jit(eager, True)
