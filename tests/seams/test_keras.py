"""What is private in Keras still is where the seams look for it."""

from __future__ import annotations

import inspect
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras.src.losses import loss as loss_module
from keras.src.trainers.compile_utils import CompileLoss
from models import arrays, classifier
from tensorflow.python.eager import execute

from autobatch.losses.loss_weights import LossWeights, Mode
from autobatch.seams import data_adapters, graph_functions, losses, models, update_order
from autobatch.seams.metrics import noting_results, single_numbers_weighed
from autobatch.seams.optimizers import apply_of, capture_apply, optimizers_of
from autobatch.seams.random_operations import eager_operations_noted
from autobatch.seams.variables import assignments_taken, has_own_call, inner_of, moments_handled, statistics_of
from autobatch.seams.versions import adapters_admitted


def test_every_built_in_loss_reduces_through_the_one_function():
    x, y = arrays()
    called = []

    def handler(original, of_compile, *arguments):
        called.append(of_compile)
        values, sample_weight, mask, reduction, dtype = arguments
        return original(values, sample_weight=sample_weight, mask=mask, reduction=reduction, dtype=dtype)

    model = classifier()
    before = loss_module.reduce_weighted_values, CompileLoss.call
    with losses.intercept_reductions(handler):
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
    (optimizer,) = optimizers_of(model)
    assert isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    variables = model.trainable_variables
    gradients = [keras.ops.ones(variable.shape) for variable in variables]
    before = [variable.numpy() for variable in variables]
    captured = []
    with capture_apply([optimizer], lambda *arguments: captured.append(arguments)):
        if through == "apply":
            optimizer.apply(gradients, variables)
        else:
            optimizer.apply_gradients(zip(gradients, variables, strict=True))
    assert len(captured) == 1
    assert all((variable.numpy() == value).all() for variable, value in zip(variables, before, strict=True))
    assert "apply" not in vars(optimizer)


class Scaling:
    def apply(self, grads, trainable_variables=None):
        super().apply([0.5 * gradient for gradient in grads], trainable_variables)


class ScaledSGD(Scaling, keras.optimizers.SGD):
    """Gets an apply of the user's from a class that is no optimizer."""


@pytest.mark.parametrize(
    "make",
    [
        lambda: keras.optimizers.SGD(0.1),
        lambda: ScaledSGD(0.1),
        lambda: keras.optimizers.LossScaleOptimizer(ScaledSGD(0.1)),
    ],
    ids=["keras", "mixed in", "loss scale"],
)
def test_an_optimizer_that_nobody_knows_of_is_captured_at_its_outermost_apply(make):
    weight, optimizer = keras.Variable([1.0, 1.0]), make()
    classes = (keras.optimizers.Optimizer, keras.optimizers.LossScaleOptimizer, Scaling)
    before = [cls.apply for cls in classes]
    captured, elsewhere = [], []

    def update_elsewhere():
        other = keras.Variable([1.0])
        keras.optimizers.SGD(0.5).apply([tf.ones(1)], [other])
        elsewhere.append(float(other.numpy()[0]))

    with capture_apply([], lambda *arguments: captured.append(arguments)):
        optimizer.apply([tf.ones(2)], [weight])
        thread = threading.Thread(target=update_elsewhere)
        thread.start()
        thread.join()
    ((of, (gradient,), (variable,)),) = captured
    assert of is optimizer
    assert variable is weight
    assert gradient.numpy().tolist() == [1.0, 1.0]
    assert weight.numpy().tolist() == [1.0, 1.0]
    assert elsewhere == [0.5]
    assert [cls.apply for cls in classes] == before


def test_what_was_captured_can_be_applied_meanwhile():
    weight, optimizer = keras.Variable([1.0]), keras.optimizers.LossScaleOptimizer(ScaledSGD(0.5), initial_scale=1.0)
    optimizer.build([weight])

    def update(optimizer, gradients, variables):
        apply_of(optimizer)(gradients, variables)

    with capture_apply([], update):
        optimizer.apply([tf.ones(1)], [weight])
    assert weight.numpy().tolist() == [0.75]
    assert int(optimizer.inner_optimizer.iterations.numpy()) == 1


def test_losses_that_layers_add_are_told_apart_from_activity_regularizers():
    class Adding(keras.layers.Layer):
        def call(self, inputs):
            self.add_loss(tf.reduce_sum(inputs))
            return inputs

    adding, noted = Adding(activity_regularizer="l2"), []
    with losses.added_losses_noted(lambda layer, loss: noted.append((layer, float(loss)))):
        adding(tf.ones([2, 3]))
    assert noted == [(adding, 6.0)]
    assert len(adding.losses) == 2


def test_fit_takes_a_data_adapter_and_a_train_function_that_is_there_already():
    x, y = arrays()
    model = classifier(metrics=())
    taken = []

    def train_function(iterator):
        taken.append(next(iterator))
        return model.test_step(taken[-1])

    model.train_function = train_function
    adapter = data_adapters.data_adapter_for(x=x, y=y, batch_size=16, shuffle=False)
    assert data_adapters.is_array_adapter(adapter)
    with adapters_admitted():
        model.fit(adapter, verbose=0)
    assert len(taken) == 3


def test_assignments_are_taken_and_read_instead():
    held = {}
    layer = keras.layers.BatchNormalization()
    layer.build((None, 4))
    means = []

    def take(variable, value):
        held[id(variable)] = value
        return variable is layer.moving_mean

    def handle(normalising, inputs, compute):
        weight, mean, variance = compute()
        means.append((normalising, float(weight)))
        return mean, variance

    with (
        assignments_taken(take, lambda variable: held.get(id(variable))),
        moments_handled(handle),
    ):
        layer(np.ones((6, 4), "float32"), training=True)
        np.testing.assert_allclose(layer.moving_mean, 0.01, rtol=1e-5)
        assert inner_of(layer.moving_mean) is layer.moving_mean._value
    assert means == [(layer, 6.0)]
    np.testing.assert_array_equal(layer.moving_mean, 0.0)
    np.testing.assert_allclose(layer.moving_variance, 0.99, rtol=1e-5)
    assert not has_own_call(layer)
    assert len(statistics_of(layer)) == 2


def test_assignments_are_discarded():
    model = classifier(extra=[keras.layers.BatchNormalization(), keras.layers.Dense(4, kernel_regularizer="l2")])
    before = [weight.copy() for weight in model.get_weights()]
    with models.discarding_assignments(model):
        model(arrays()[0], training=True)
        assert float(sum(model.losses)) > 0
    assert all((left == right).all() for left, right in zip(model.get_weights(), before, strict=True))


def test_the_result_of_every_metric_is_noted():
    noted = []
    metrics = [keras.metrics.AUC(), keras.metrics.RootMeanSquaredError(), keras.metrics.F1Score(), keras.metrics.Sum()]
    kinds = [type(metric) for metric in metrics]
    before = [kind.result for kind in kinds]
    for metric in metrics:
        metric.update_state([[0.2], [0.7]], *([] if isinstance(metric, keras.metrics.Sum) else [[[0.0], [1.0]]]))
    with noting_results(lambda metric, result: noted.append((metric, result))):
        results = [metric.result() for metric in metrics]
    pairs = list(zip(metrics, results, strict=True))
    assert all(any(one is metric and got is result for one, got in noted) for metric, result in pairs)
    assert before == [kind.result for kind in kinds]


def test_a_mean_of_single_numbers_weighs_them():
    named = []
    mean, of_function = (
        keras.metrics.Mean(),
        keras.metrics.MeanMetricWrapper(lambda y, p: keras.ops.mean(p), name="own"),
    )
    before = keras.metrics.Mean.update_state
    with single_numbers_weighed(0.25, named.append):
        mean.update_state(4.0)
        mean.update_state([1.0, 3.0])  # values of samples count as ever
        mean.update_state(7.0, sample_weight=2)
        of_function.update_state([[1.0]], [[3.0]])
    assert before == keras.metrics.Mean.update_state
    assert float(mean.total.numpy()) == 0.25 * 4 + 4 + 14
    assert float(mean.count.numpy()) == 0.25 + 2 + 2
    assert float(of_function.count.numpy()) == 0.25
    assert named == ["own"]


def test_a_called_function_is_looked_into():
    inner = tf.function(lambda x: (x + 1, tf.constant(2.0)))
    with tf.Graph().as_default():
        first, second = inner(tf.zeros([]))
        graph = graph_functions.called_graph(first.op)
        assert [output.op.type for output in graph.outputs] == ["Identity", "Identity"]
        assert len(graph.inputs) == len(first.op.inputs) == 1
        assert second.op is first.op
        assert graph_functions.called_graph(first.op.inputs[0].op) is None


def test_a_traced_function_is_traced_anew():
    traces = []

    class Owner:
        @tf.function
        def step(self, limit):
            traces.append(self)
            total = 0.0
            for number in tf.range(limit):  # needs AutoGraph
                total += tf.cast(number, tf.float32)
            return total

    owner = Owner()
    assert float(owner.step(tf.constant(4))) == float(owner.step(tf.constant(4))) == 6
    for count in (2, 3):
        untraced = tf.function(models.untraced(owner.step), autograph=False)
        assert float(untraced(tf.constant(4))) == 6
        assert traces == [owner] * count
    assert models.untraced(len) is len


def test_what_is_replaced_on_one_thread_is_as_ever_on_all_others():
    found = {}

    def on_another_thread():
        mean = keras.metrics.Mean()
        mean.update_state(1.0)
        mean.update_state(3.0, sample_weight=1.0)
        found["mean"] = float(mean.result())
        loss = keras.losses.MeanSquaredError(reduction="sum")
        found["loss"] = float(loss(tf.ones([4, 1]), tf.zeros([4, 1])))
        optimizer.apply([tf.constant([1.0])], [variable])

    variable = tf.Variable([0.0])
    optimizer = keras.optimizers.SGD(1.0)
    optimizer.build([variable])
    own = optimizer.apply
    optimizer.apply = lambda *arguments: own(*arguments)  # one that the user has set on the instance
    fraction = tf.constant(0.25, tf.float64)
    captured = []
    with (
        capture_apply([optimizer], lambda *update: captured.append(update)),
        losses.intercept_reductions(LossWeights(Mode.TRAIN, fraction, tf.zeros([0], tf.float64))),
        single_numbers_weighed(fraction, lambda name: None),
    ):
        thread = threading.Thread(target=on_another_thread)
        thread.start()
        thread.join()
    assert found == {"mean": 2.0, "loss": 4.0}
    assert not captured
    np.testing.assert_array_equal(variable, [-1.0])


def test_two_threads_that_replace_different_things_do_not_wait_for_each_other():
    both_hold_theirs = threading.Barrier(2, timeout=10)

    def plain_step():
        with capture_apply((), lambda *_: None):
            both_hold_theirs.wait()
            with update_order.updates_in_turn(), update_order.updates_in_turn():
                pass

    def replica_step():
        with losses.losses_unscaled():
            both_hold_theirs.wait()
            with capture_apply((), lambda *_: None):
                pass

    threads = [threading.Thread(target=target, daemon=True) for target in (plain_step, replica_step)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)
    assert "update" not in vars(tf.distribute.get_strategy().extended)


def on_another_thread(function):
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def test_an_optimizer_is_captured_on_two_threads_at_once():
    weight, optimizer = keras.Variable([1.0]), keras.optimizers.SGD(0.5)
    optimizer.build([weight])
    own, by_user, handled = optimizer.apply, [], []
    optimizer.apply = set_by_user = lambda *arguments: (by_user.append(1), own(*arguments))

    def update(optimizer, gradients, variables):
        handled.append(threading.current_thread())
        apply_of(optimizer)(gradients, variables)

    def elsewhere():
        with capture_apply([optimizer], update):
            optimizer.apply([tf.ones(1)], [weight])

    with capture_apply([optimizer], update):
        optimizer.apply([tf.ones(1)], [weight])
        on_another_thread(elsewhere)
        optimizer.apply([tf.ones(1)], [weight])
    assert len(by_user) == len(handled) == 3
    assert handled[0] is handled[2] is threading.current_thread()
    assert weight.numpy().tolist() == [-0.5]
    assert vars(optimizer)["apply"] is set_by_user


def test_eager_operations_are_noted_until_they_are_not_whatever_other_threads_note():
    called, here, elsewhere = tf.function(lambda: tf.constant(1.0) + 1.0), [], []
    called()
    before = execute.execute

    def note_elsewhere():
        with eager_operations_noted(elsewhere.append):
            called()

    with eager_operations_noted(here.append):
        on_another_thread(note_elsewhere)
        assert len(elsewhere) == 1
        assert not here
        called()
        tf.math.abs(tf.constant(-1.0))
    assert here == [elsewhere[0], "Abs"]
    assert execute.execute is before
