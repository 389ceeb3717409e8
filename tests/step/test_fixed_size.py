"""Code written for one batch size: traced with that size where it wants it, refused where it cannot be cut."""

from __future__ import annotations

import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from models import AtCall, MemoryHog, arrays, relative_error
from put_back import putting_back

import autobatch

pytestmark = pytest.mark.filterwarnings("ignore::autobatch.AutobatchWarning", "ignore::UserWarning")

TARGET = 16
OPTIONS = {"shuffle": False, "verbose": 0}


class Applied(layers.Layer):
    """A layer of one function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def call(self, inputs):
        return self.function(inputs)

    def compute_output_shape(self, shape):
        return shape


def made(function=None, *, loss=None, kind=keras.Sequential, metrics=(), batch_size=None, extra=()):
    keras.utils.set_random_seed(1)
    middle = [] if function is None else [Applied(function)]
    model = kind([keras.Input((16,), batch_size=batch_size), layers.Dense(8), *extra, *middle, layers.Dense(10)])
    loss = loss or keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1), loss, metrics=list(metrics))
    return model


def stacked(inputs):
    return tf.stack([2 * row for row in tf.unstack(inputs)])


def reshaped(inputs):
    return tf.reshape(tf.reshape(inputs, (inputs.shape[0] * 8,)), (inputs.shape[0], 8))


def row_by_row(inputs):
    return tf.concat([inputs[place : place + 1] + 1 for place in range(inputs.shape[0])], 0)


def with_ones(inputs):
    return inputs + tf.ones((inputs.shape[0], 8))


class Stepping(keras.Sequential):
    def train_step(self, data):
        x, y = data
        return super().train_step((x + tf.ones((x.shape[0], 16)), y))


def squeezed(y_true, y_pred):
    return (tf.squeeze(tf.cast(y_true, tf.float32)) - tf.squeeze(tf.reduce_mean(y_pred, -1, keepdims=True))) ** 2


class OwnLoss(keras.losses.Loss):
    def call(self, y_true, y_pred):
        rows = [tf.reduce_mean(y_pred[place] ** 2) for place in range(y_pred.shape[0])]
        return tf.stack(rows)


class OwnSum(OwnLoss):
    def __init__(self):
        super().__init__(reduction="sum")


def mean_of_ones_own(y_true, y_pred):
    return tf.reduce_sum(tf.reduce_mean(y_pred, -1) ** 2) / y_pred.shape[0]


class Counted(keras.metrics.Metric):
    def __init__(self, **options):
        super().__init__(**options)
        self.total = self.add_weight(name="total", initializer="zeros")

    def update_state(self, y_true, y_pred, sample_weight=None):
        for place in range(y_pred.shape[0]):
            self.total.assign_add(tf.reduce_sum(y_pred[place]))

    def result(self):
        return self.total


WANTING = {
    "unstack": {"function": stacked},
    "reshape": {"function": reshaped},
    "a loop": {"function": row_by_row},
    "ones": {"function": with_ones},
    "train_step": {"kind": Stepping},
    "squeeze": {"loss": squeezed},
    "a loss": {"loss": OwnLoss()},
    "a sum": {"loss": OwnSum()},
    "a mean": {"loss": mean_of_ones_own},
    "a metric": {"metrics": [Counted]},
    "an input": {"batch_size": TARGET},
}


def built(kind):
    options = dict(WANTING[kind])
    if kind == "a metric":
        options["metrics"] = [Counted(name="counted")]
    return made(**options)


# The sizes that each kind is trained in, and the size that the plan has then.
SIZES = {kind: {6: 4, 16: 16} for kind in WANTING}
SIZES["a loop"] = SIZES["a loss"] = {6: 4, 16: 16, 1: 1}


@pytest.mark.parametrize("kind", WANTING)
def test_it_trains_as_under_keras(kind):
    plain, ours = built(kind), built(kind)
    put_back = putting_back(ours)
    x, y = arrays()
    options = {**OPTIONS, "epochs": 2, "validation_data": (x[:32], y[:32])}
    if kind == "a metric":
        options.pop("validation_data")
    expected = plain.fit(x, y, batch_size=TARGET, validation_batch_size=16, **options)
    for micro_batch, planned in SIZES[kind].items():
        put_back()
        history = autobatch.fit(
            ours, x, y, target_batch=TARGET, micro_batch=micro_batch, validation_batch_size=16, **options
        )
        assert relative_error(ours.get_weights(), plain.get_weights()) < 1e-5
        for name, values in expected.history.items():
            np.testing.assert_allclose(history.history[name], values, rtol=1e-4, atol=1e-6)
        if kind != "an input":
            assert history.plan.micro_batch == planned


def test_the_whole_batch_has_the_shape_that_keras_gives_it():
    seen = []
    model = made(lambda inputs: seen.append(inputs.shape) or inputs)
    slices = tf.data.Dataset.from_tensor_slices(arrays())
    even, uneven = slices.batch(8, drop_remainder=True), slices.batch(8)
    for data, expected in ((arrays(), 16), (arrays(samples=40), None), ((even,), 16), ((uneven,), None)):
        model.compile("sgd", model.loss)
        autobatch.fit(model, *data, target_batch=TARGET, micro_batch=TARGET, **OPTIONS)
        assert seen[-1][0] == expected


def test_a_search_finds_a_size_that_cuts_all_alike():
    plain = made(stacked)
    plain.fit(*arrays(), batch_size=TARGET, **OPTIONS)
    ours = made(stacked, extra=[MemoryHog(lambda samples: samples > 6)])
    history = autobatch.fit(ours, *arrays(), target_batch=TARGET, **OPTIONS)
    assert history.plan.micro_batches in ((4, 4, 4, 4), (2,) * 8)
    assert relative_error(ours.get_weights(), plain.get_weights()) < 1e-5
    again = autobatch.fit(ours, *arrays(), target_batch=TARGET, **OPTIONS)
    assert again.plan == history.plan


def test_running_out_of_memory_leads_to_a_smaller_size_that_cuts_all_alike():
    room = {"samples": 16}
    plain = made(stacked)
    ours = made(stacked, extra=[MemoryHog(lambda samples: samples > room["samples"])])

    class Tighter(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            room["samples"] = 5

    plain.fit(*arrays(), batch_size=TARGET, **OPTIONS)
    history = autobatch.fit(ours, *arrays(), target_batch=TARGET, micro_batch=8, callbacks=[Tighter()], **OPTIONS)
    assert history.recoveries
    assert relative_error(ours.get_weights(), plain.get_weights()) < 1e-5


def added_constant(inputs):
    return inputs + tf.ones((16, 8))


def to_a_constant(inputs):
    return tf.reshape(inputs, (16, 8))


def beside_a_constant(inputs):
    return tf.concat([inputs, tf.zeros((16, 1))], -1)[:, :8]


class HoldingStep(keras.Sequential):
    def train_step(self, data):
        x, y = data
        return super().train_step((x * tf.ones((16, 16)), y))


def holding_loss(y_true, y_pred):
    return tf.reshape(tf.reduce_mean(y_pred**2, -1), (16,))


def added_to_entries(inputs):
    return tf.reshape(tf.reshape(inputs, (-1, 4)) + tf.ones((32, 4)), (-1, 8))


HOLDING = {
    "a sum of entries": ({"function": added_to_entries}, added_to_entries),
    "a sum with a constant": ({"function": added_constant}, added_constant),
    "a constant shape": ({"function": to_a_constant}, to_a_constant),
    "beside a constant": ({"function": beside_a_constant}, beside_a_constant),
    "train_step": ({"kind": HoldingStep}, HoldingStep.train_step),
    "a loss": ({"loss": holding_loss}, holding_loss),
}


@pytest.mark.parametrize("kind", HOLDING)
def test_a_number_that_the_code_holds_is_said_with_its_line(kind):
    options, where = HOLDING[kind]
    plain, ours = made(**options), made(**options)
    before = ours.get_weights()
    lines, first = inspect.getsourcelines(where)
    places = [f"{__file__}:{number}" for number in range(first, first + len(lines))]
    for micro_batch in (8, 1):
        with pytest.raises(autobatch.FixedBatchSizeError) as raised:
            autobatch.fit(ours, *arrays(), target_batch=TARGET, micro_batch=micro_batch, **OPTIONS)
        message = str(raised.value)
        assert any(f"{place}, " in message for place in places), message
        assert f"with {TARGET} samples at a time and not with {micro_batch}" in message
        assert f"pass micro_batch={TARGET}." in message
        assert int(ours.optimizer.iterations) == 0
        for left, right in zip(ours.get_weights(), before, strict=True):
            np.testing.assert_array_equal(left, right)
    plain.fit(*arrays(), batch_size=TARGET, **OPTIONS)
    # The model that was refused takes the size that the message names. A search is of a model that nothing is known of.
    for model, chosen in ((ours, {"micro_batch": TARGET}), (made(**options), {})):
        history = autobatch.fit(model, *arrays(), target_batch=TARGET, **chosen, **OPTIONS)
        assert history.plan.micro_batch == TARGET
        assert relative_error(model.get_weights(), plain.get_weights()) < 1e-5


def test_a_number_that_the_code_holds_is_good_for_micro_batches_of_that_size():
    model = made(to_a_constant)
    history = autobatch.fit(model, *arrays(), target_batch=48, micro_batch=16, **OPTIONS)
    assert history.plan.micro_batches == (16, 16, 16)
    assert int(model.optimizer.iterations) == 1


@pytest.mark.parametrize("kind", HOLDING)
def test_where_the_whole_batch_does_not_fit_both_are_said(kind):
    # The first trial is of the whole. Later ones must not run out: TensorFlow takes the number of samples for 16 there.
    model = made(**HOLDING[kind][0], extra=[MemoryHog(AtCall(0))])
    with pytest.raises(autobatch.NoFeasibleBatchError, match="16 samples at a time do not fit.*cannot take fewer"):
        autobatch.fit(model, *arrays(), target_batch=TARGET, **OPTIONS)


def test_validation_batches_are_taken_whole_where_they_cannot_be_cut():
    plain, ours = made(to_a_constant), made(to_a_constant)
    x, y = arrays()
    options = {**OPTIONS, "validation_data": (x, y), "validation_batch_size": 16}
    expected = plain.fit(x, y, batch_size=16, **options)
    history = autobatch.fit(ours, x, y, target_batch=48, micro_batch=16, **{**options, "validation_batch_size": 16})
    assert history.history["val_loss"][0] > 0
    whole = autobatch.fit(made(to_a_constant), x, y, target_batch=16, micro_batch=16, **options)
    np.testing.assert_allclose(whole.history["val_loss"], expected.history["val_loss"], rtol=1e-5)


def test_a_stack_without_an_input_is_built_as_by_keras():
    def build():
        keras.utils.set_random_seed(1)
        model = keras.Sequential([layers.Dense(8), Applied(stacked), layers.Dense(10)])
        model.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        return model

    plain = build()
    plain.fit(*arrays(), batch_size=TARGET, **OPTIONS)
    for micro_batch in (16, 4):
        ours = build()
        autobatch.fit(ours, *arrays(), target_batch=TARGET, micro_batch=micro_batch, **OPTIONS)
        assert relative_error(ours.get_weights(), plain.get_weights()) < 1e-5


def test_tune_without_a_target_tries_fixed_sizes():
    model = made(stacked, extra=[MemoryHog(lambda samples: samples > 6)])
    assert autobatch.tune(model, *arrays(samples=64), exact=True).largest_fit == 6


def test_errors_of_another_kind_are_raised_as_they_are():
    class Wrong(keras.Sequential):
        def train_step(self, data):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        autobatch.fit(made(kind=Wrong), *arrays(), target_batch=TARGET, micro_batch=4, **OPTIONS)
    x, y = arrays()
    with pytest.raises(tf.errors.InvalidArgumentError, match="label value"):
        autobatch.fit(made(), x, y + 50, target_batch=TARGET, micro_batch=4, **OPTIONS)


def test_where_keras_has_no_fixed_size_the_error_is_kerass():
    x, y = arrays(samples=40)
    with pytest.raises(ValueError, match="Cannot infer argument `num`"):
        made(stacked).fit(x, y, batch_size=TARGET, **OPTIONS)
    with pytest.raises(ValueError, match="Cannot infer argument `num`"):
        autobatch.fit(made(stacked), x, y, target_batch=TARGET, micro_batch=4, **OPTIONS)


def test_a_loop_of_ones_own_has_the_sizes_of_its_batches():
    x, y = arrays()
    losses = {}
    for how in ("plain", 4, 16):
        model = made(stacked)

        def train_step(batch, model=model):
            with tf.GradientTape() as tape:
                loss = model.loss(batch[1], model(batch[0], training=True))
            model.optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
            return loss

        step = tf.function(train_step)
        if how != "plain":
            options = {"model": model, "optimizer": model.optimizer, "target_batch": 16, "micro_batch": how}
            step = autobatch.wrap_step(train_step, **options)
        sizes = (16, 16, 8)
        batches = [(tf.constant(x[:size]), tf.constant(y[:size])) for size in sizes]
        losses[how] = [float(step(batch)) for batch in batches]
    np.testing.assert_allclose(losses[4], losses["plain"], rtol=1e-5)
    np.testing.assert_allclose(losses[16], losses["plain"], rtol=1e-5)
