"""What is private in Keras still is where the seams look for it."""

from __future__ import annotations

import inspect

import keras
import pytest
from keras.src.losses import loss as loss_module
from keras.src.trainers.compile_utils import CompileLoss
from models import arrays, classifier

from autobatch.train import keras_seams


def test_every_built_in_loss_reduces_through_the_one_function():
    x, y = arrays()
    called = []

    def handler(original, of_compile, *arguments):
        called.append(of_compile)
        values, sample_weight, mask, reduction, dtype = arguments
        return original(values, sample_weight=sample_weight, mask=mask, reduction=reduction, dtype=dtype)

    model = classifier()
    before = loss_module.reduce_weighted_values, CompileLoss.call
    with keras_seams.intercept_reductions(handler):
        keras.losses.MeanSquaredError()(x, x)
        model.compute_loss(x, y, model(x))
    assert called == [False, True]
    assert before == (loss_module.reduce_weighted_values, CompileLoss.call)


def test_the_signatures_that_are_called():
    names = list(inspect.signature(loss_module.reduce_weighted_values).parameters)
    assert names == ["values", "sample_weight", "mask", "reduction", "dtype"]
    assert list(inspect.signature(loss_module.apply_mask).parameters) == ["sample_weight", "mask", "dtype", "reduction"]


@pytest.mark.parametrize("through", ["apply", "apply_gradients"])
def test_the_outermost_apply_is_captured_and_given_back(through):
    model = classifier(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1)))
    (optimizer,) = keras_seams.optimizers_of(model)
    assert isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    variables = model.trainable_variables
    gradients = [keras.ops.ones(variable.shape) for variable in variables]
    before = [variable.numpy() for variable in variables]
    captured = []
    with keras_seams.capture_apply([optimizer], lambda *arguments: captured.append(arguments)):
        if through == "apply":
            optimizer.apply(gradients, variables)
        else:
            optimizer.apply_gradients(zip(gradients, variables, strict=True))
    assert len(captured) == 1
    assert all((variable.numpy() == value).all() for variable, value in zip(variables, before, strict=True))
    assert "apply" not in vars(optimizer)


def test_fit_takes_a_data_adapter_and_a_train_function_that_is_there_already():
    x, y = arrays()
    model = classifier(metrics=())
    taken = []

    def train_function(iterator):
        taken.append(next(iterator))
        return model.test_step(taken[-1])

    model.train_function = train_function
    adapter = keras_seams.data_adapter_for(x=x, y=y, batch_size=16, shuffle=False)
    assert keras_seams.is_array_adapter(adapter)
    model.fit(adapter, verbose=0)
    assert len(taken) == 3


def test_assignments_are_discarded():
    model = classifier(extra=[keras.layers.BatchNormalization(), keras.layers.Dense(4, kernel_regularizer="l2")])
    before = [weight.copy() for weight in model.get_weights()]
    with keras_seams.discarding_assignments(model):
        model(arrays()[0], training=True)
        assert float(sum(model.losses)) > 0
    assert all((left == right).all() for left, right in zip(model.get_weights(), before, strict=True))
