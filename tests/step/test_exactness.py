"""The accumulated update is the full batch's: `autobatch.fit` against `Model.fit`, losses and metrics included."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from keras_version import KERAS, since
from models import SAMPLES, arrays, classifier, recorded_gradients, relative_error

import autobatch

UNEVEN = 11  # of 48 samples: micro-batches of 10, 10, 10, 9 and 9


@pytest.fixture(params=["float32", "float64"])
def precision(request):
    """Everything in float32, then in float64: :func:`compare` asks for 1e-5, and for 1e-12."""
    keras.config.set_floatx(request.param)
    keras.config.set_dtype_policy(request.param)
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


def compare(build, x, y=None, *, micro_batch=UNEVEN, epochs=2, target_batch=SAMPLES, tolerance=None, **options):
    """Train both ways; each update's gradients, the weights and every number of the History must agree."""
    tolerance = tolerance or {"float32": 1e-5, "float64": 1e-12}[keras.config.floatx()]
    plain, ours = build(), build()
    gradients = [recorded_gradients(model) for model in (ours, plain)]
    expected = plain.fit(x, y, batch_size=target_batch, epochs=epochs, shuffle=False, verbose=0, **options)
    actual = autobatch.fit(
        ours,
        x,
        y,
        target_batch=target_batch,
        micro_batch=micro_batch,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        **options,
    )
    assert relative_error(gradients[0](), gradients[1]()) < tolerance
    assert relative_error(ours.get_weights(), plain.get_weights()) < tolerance
    assert actual.history.keys() == expected.history.keys()
    for name, values in expected.history.items():
        np.testing.assert_allclose(actual.history[name], values, rtol=20 * tolerance, atol=1e-7, err_msg=name)
    if ours.optimizer is not None:
        assert int(ours.optimizer.iterations.numpy()) == int(plain.optimizer.iterations.numpy())
    return actual


REDUCTIONS = ["sum_over_batch_size", "sum", "none"]
LATER_REDUCTIONS = ["mean", "mean_with_sample_weight"]
# A reduction with another denominator than the number of elements, where Keras has one.
OF_WEIGHTS = "mean_with_sample_weight" if KERAS >= (3, 7) else "sum_over_batch_size"


XLA = {"jit_compile": True}


COMPILED_REDUCTIONS = ["sum_over_batch_size", "none"]


@pytest.mark.parametrize(
    ("reduction", "weighted", "options"),
    [
        *((reduction, weighted, {}) for reduction in REDUCTIONS for weighted in (False, True)),
        *(since("3.7", reduction, weighted, {}) for reduction in LATER_REDUCTIONS for weighted in (False, True)),
        *((reduction, True, XLA) for reduction in COMPILED_REDUCTIONS),
        since("3.7", "mean_with_sample_weight", True, XLA),
    ],
    ids=str,
)
def test_every_reduction_with_and_without_sample_weights(reduction, weighted, options):
    x, y = arrays()
    weight = np.random.default_rng(3).uniform(0, 2, SAMPLES).astype("float32") if weighted else None
    rate = 1e-3 if reduction in ("sum", "none") else 0.3

    def build():
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction)
        return classifier(keras.optimizers.SGD(rate), loss, **options)

    compare(build, x, y, sample_weight=weight)


def test_a_loss_without_a_reduction_beside_another_outputs():
    # Keras adds the other's mean to each sample's loss, and differentiates the sum of all. (Beside a regularizer it
    # takes no loss without a reduction: it stacks the two.)
    x, _ = arrays()
    random = np.random.default_rng(4)
    y = {name: random.normal(size=(SAMPLES, 2)).astype("float32") for name in ("a", "b")}

    def build():
        keras.utils.set_random_seed(1)
        inputs = keras.Input(x.shape[1:])
        hidden = keras.layers.Dense(8)(inputs)
        model = keras.Model(inputs, {name: keras.layers.Dense(2, name=name)(hidden) for name in ("a", "b")})
        losses = {
            "a": keras.losses.MeanSquaredError(reduction="none"),
            "b": keras.losses.MeanAbsoluteError(reduction="sum_over_batch_size"),
        }
        model.compile(keras.optimizers.SGD(1e-4), losses, loss_weights={"a": 0.7, "b": 0.4})
        return model

    compare(build, x, y)


LOSSES = {
    "MeanSquaredError": "real",
    "MeanAbsoluteError": "real",
    "MeanAbsolutePercentageError": "real",
    "MeanSquaredLogarithmicError": "positive",
    "Huber": "real",
    "LogCosh": "real",
    "CosineSimilarity": "real",
    "BinaryCrossentropy": "probability",
    "BinaryFocalCrossentropy": "probability",
    "CategoricalCrossentropy": "one_hot",
    "CategoricalFocalCrossentropy": "one_hot",
    "CategoricalHinge": "one_hot",
    "Hinge": "sign",
    "SquaredHinge": "sign",
    "KLDivergence": "one_hot",
    "Poisson": "positive",
    "Tversky": "probability",
    "Dice": "probability",
    "CategoricalGeneralizedCrossEntropy": "class",
}
if KERAS < (3, 10):
    del LOSSES["CategoricalGeneralizedCrossEntropy"]
if KERAS < (3, 7):
    del LOSSES["Tversky"]  # it takes no axis yet
ACROSS_THE_BATCH = {"Tversky", "Dice"}  # one number for the whole batch unless told an axis


def targets(kind):
    """Targets of 10 values for each sample, as a loss of this kind takes them; of a "class" one."""
    random = np.random.default_rng(5)
    _, labels = arrays()
    made = {
        "real": random.normal(size=(SAMPLES, 10)),
        "positive": random.uniform(0.1, 2, (SAMPLES, 10)),
        "probability": random.integers(0, 2, (SAMPLES, 10)),
        "one_hot": np.eye(10)[labels],
        "sign": random.choice([-1, 1], (SAMPLES, 10)),
        "class": labels,
    }[kind]
    return made.astype("int32" if kind == "class" else "float32")


def loss_named(name, **options):
    return getattr(keras.losses, name)(**options, **({"axis": (1,)} if name in ACROSS_THE_BATCH else {}))


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_built_in_loss(name):
    def build():
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((16,)), layers.Dense(8, "relu"), layers.Dense(10, "softmax")])
        # Targets near zero make percentages large: another rate would carry the weights off.
        rate = 1e-5 if name == "MeanAbsolutePercentageError" else 0.1
        model.compile(keras.optimizers.SGD(rate), loss_named(name))
        return model

    compare(build, arrays()[0], targets(LOSSES[name]))


OTHER_REDUCTIONS = ["mean", "sum", "mean_with_sample_weight"]


@pytest.mark.parametrize("reduction", [since("3.7", "mean"), "sum", since("3.7", "mean_with_sample_weight")])
@pytest.mark.parametrize("weighted", [False, True])
def test_every_built_in_loss_with_every_other_reduction(reduction, weighted):
    """Half of the losses have sample weights, the other half has none, in turn: each loss has them with a reduction."""
    random = np.random.default_rng(6)
    names = sorted(LOSSES)[(OTHER_REDUCTIONS.index(reduction) + weighted) % 2 :: 2]
    weight = {name: random.uniform(0, 2, SAMPLES).astype("float32") for name in names} if weighted else None

    def build():
        keras.utils.set_random_seed(1)
        inputs = keras.Input((16,))
        model = keras.Model(inputs, {name: layers.Dense(10, "softmax", name=name)(inputs) for name in names})
        losses = {name: loss_named(name, reduction=reduction) for name in names}
        weights = {name: 1e-5 if name == "MeanAbsolutePercentageError" else 1e-2 for name in names}
        model.compile(keras.optimizers.SGD(0.1), losses, loss_weights=weights)
        return model

    # Each loss has weights of its own, which are compared each by itself.
    compare(build, arrays()[0], {name: targets(LOSSES[name]) for name in names}, sample_weight=weight)


def test_ctc():
    random = np.random.default_rng(5)
    x = random.normal(size=(SAMPLES, 10, 6)).astype("float32")
    y = random.integers(1, 5, (SAMPLES, 4))
    y[::3, 2:] = 0  # shorter targets; 0 is the blank

    def build():
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((10, 6)), layers.Dense(6)])
        model.compile(keras.optimizers.SGD(0.01), keras.losses.CTC())
        return model

    compare(build, x, y)


def test_every_loss_of_keras_is_in_the_list():
    known = {*LOSSES, *ACROSS_THE_BATCH, "SparseCategoricalCrossentropy", "CTC", "Circle", "Loss"}
    names = {name for name in dir(keras.losses) if isinstance(getattr(keras.losses, name), type)}
    assert names <= known


@pytest.mark.parametrize("reduction", ["sum_over_batch_size", since("3.7", "mean_with_sample_weight"), "sum"])
def test_ignore_class(reduction, precision):
    x, y = arrays()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=3, reduction=reduction)
    compare(lambda: classifier(keras.optimizers.SGD(1e-3), loss), x, y)


@pytest.mark.parametrize(
    "reduction", ["sum_over_batch_size", since("3.7", "mean_with_sample_weight"), "sum", since("3.7", "mean")]
)
def test_a_mask_made_inside_the_model(reduction, precision):
    random = np.random.default_rng(0)
    lengths = random.integers(1, 13, SAMPLES)
    x = random.integers(1, 30, (SAMPLES, 12))
    x[np.arange(12)[None] >= lengths[:, None]] = 0
    y = random.integers(0, 5, (SAMPLES, 12))

    def build():
        keras.utils.set_random_seed(1)
        recurrent = [layers.LSTM(6, return_sequences=True)] if reduction == OF_WEIGHTS else []
        stack = [keras.Input((12,)), layers.Embedding(30, 6, mask_zero=True), *recurrent]
        model = keras.Sequential([*stack, layers.Dense(5)])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction)
        rate = 1e-3 if reduction == "sum" else 0.3
        model.compile(keras.optimizers.SGD(rate), loss, weighted_metrics=["accuracy"])
        return model

    compare(build, x, y)
    compare(build, x, y, sample_weight=random.uniform(0, 1, (SAMPLES, 12)).astype("float32"))


def test_several_outputs_each_with_its_own_denominator(precision):
    x, labels = arrays()
    random = np.random.default_rng(2)
    y = {"a": random.normal(size=(SAMPLES, 1)).astype("float32"), "b": labels}
    weights = {"a": random.uniform(0, 1, SAMPLES).astype("float32"), "b": np.ones(SAMPLES, "float32")}

    def build():
        keras.utils.set_random_seed(1)
        inputs = keras.Input((16,))
        own = "l1" if KERAS >= (3, 14) else "l2"  # before, Keras's own l1 took no float64
        hidden = layers.Dense(8, activation="tanh", activity_regularizer="l2", kernel_regularizer=own)(inputs)
        model = keras.Model(inputs, {"a": layers.Dense(1, name="a")(hidden), "b": layers.Dense(10, name="b")(hidden)})
        losses = {
            "a": keras.losses.MeanSquaredError(reduction=OF_WEIGHTS),
            "b": keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=2),
        }
        model.compile(keras.optimizers.SGD(0.1), losses, loss_weights={"a": 0.3, "b": 2.0}, metrics={"b": "accuracy"})
        return model

    compare(build, x, y, sample_weight=weights)


@pytest.mark.parametrize("options", [{"jit_compile": True}, {"run_eagerly": True}], ids=["XLA", "eager"])
def test_several_outputs_of_an_embedding_compiled_by_xla_and_run_eagerly(options):
    random = np.random.default_rng(2)
    x = random.integers(0, 40, (SAMPLES, 4))
    y = {"a": random.normal(size=(SAMPLES, 1)).astype("float32"), "b": random.integers(0, 5, SAMPLES)}
    weights = {"a": random.uniform(0, 1, SAMPLES).astype("float32"), "b": np.ones(SAMPLES, "float32")}

    def build():
        keras.utils.set_random_seed(1)
        inputs = keras.Input((4,), dtype="int32")
        hidden = layers.Flatten()(layers.Embedding(40, 6, embeddings_regularizer="l2")(inputs))
        model = keras.Model(inputs, {"a": layers.Dense(1, name="a")(hidden), "b": layers.Dense(5, name="b")(hidden)})
        losses = {
            "a": keras.losses.MeanSquaredError(reduction=OF_WEIGHTS),
            "b": keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=2),
        }
        model.compile(keras.optimizers.SGD(0.1), losses, loss_weights={"a": 0.3, "b": 2.0}, **options)
        return model

    compare(build, x, y, sample_weight=weights)


def test_add_loss_and_class_weight(precision):
    x, y = arrays()

    class Penalty(layers.Layer):
        def call(self, inputs):
            self.add_loss(0.1 * keras.ops.mean(keras.ops.square(inputs)))
            return inputs

    compare(lambda: classifier(extra=[Penalty()]), x, y, class_weight={0: 0.5, 1: 2.0, 3: 0.1})


OPTIMIZERS = {
    "SGD": {"momentum": 0.9, "nesterov": True},
    "Adam": {"amsgrad": True},
    "AdamW": {"weight_decay": 0.01},
    "Lion": {},
    "Adafactor": {},
    "Muon": {},
    "RMSprop": {"centered": True},
    "Nadam": {},
    "Adagrad": {},
    "Adadelta": {},
    "Adamax": {},
    "Ftrl": {},
    "Lamb": {},
}
if KERAS < (3, 10):
    del OPTIMIZERS["Muon"]


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_optimizer(name):
    # An update that divides by the root of squared gradients doubles a rounding error of a gradient near zero.
    x, y = arrays()
    compare(lambda: classifier(getattr(keras.optimizers, name)(1e-3, **OPTIMIZERS[name])), x, y, tolerance=1e-5)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_how_every_optimizer_moves_the_weights(name):
    """What the weights move by, not where they end: in float64, so that rounding them hides nothing."""
    x, y = arrays()

    def moved(fit):
        model = classifier(getattr(keras.optimizers, name)(1e-3, **OPTIMIZERS[name]), metrics=())
        before = model.get_weights()
        fit(model)
        return [after - weight for after, weight in zip(model.get_weights(), before, strict=True)]

    common = {"epochs": 2, "shuffle": False, "verbose": 0}
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    try:
        expected = moved(lambda model: model.fit(x.astype("float64"), y, batch_size=SAMPLES, **common))
        actual = moved(
            lambda model: autobatch.fit(
                model, x.astype("float64"), y, target_batch=SAMPLES, micro_batch=UNEVEN, **common
            )
        )
    finally:
        keras.config.set_floatx("float32")
        keras.config.set_dtype_policy("float32")
    assert relative_error(actual, expected) < 1e-12


@pytest.mark.parametrize(
    "options",
    [
        {"clipnorm": 0.05},
        {"global_clipnorm": 0.05},
        {"clipvalue": 0.01},
        {"weight_decay": 0.1},
        {"use_ema": True, "ema_momentum": 0.5},
        {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 2},
    ],
    ids=lambda options: "-".join(options),
)
def test_what_an_optimizer_does_beside_the_update_it_does_once(options, precision):
    x, y = arrays(samples=120)
    compare(
        lambda: classifier(keras.optimizers.SGD(0.2, momentum=0.9, **options)), x, y, target_batch=40, micro_batch=14
    )


def test_a_schedule_advances_once_an_update():
    x, y = arrays(samples=100)
    schedule = keras.optimizers.schedules.ExponentialDecay(0.5, 2, 0.5, staircase=True)
    history = compare(
        lambda: classifier(keras.optimizers.SGD(schedule)), x, y, target_batch=32, micro_batch=10, epochs=3
    )
    assert history.plan == autobatch.Plan(micro_batch=10, accumulation_steps=4, effective_batch=32)


@pytest.mark.parametrize(
    ("samples", "options"), [*((samples, {}) for samples in (33, 34, 47, 63, 64, 65)), (47, XLA), (65, XLA)], ids=str
)
def test_ragged_tails(samples, options):
    x, y = arrays(samples=samples)
    compare(lambda: classifier(**options), x, y, target_batch=32, micro_batch=7)


def test_the_classifier(precision):
    x, y = arrays()
    compare(lambda: classifier(keras.optimizers.SGD(0.3)), x, y)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy):
    x, y = arrays()
    keras.config.set_dtype_policy(policy)
    try:
        compare(
            lambda: classifier(keras.optimizers.SGD(0.3)), x, y, tolerance=2e-3 if policy == "mixed_float16" else 2e-2
        )
    finally:
        keras.config.set_dtype_policy("float32")


def test_dynamic_loss_scaling_skips_an_update_that_overflows():
    x, y = arrays()
    x[5] = 1e6  # overflows float16 in one of the micro-batches

    def build():
        keras.config.set_dtype_policy("mixed_float16")
        try:
            return classifier(keras.optimizers.SGD(0.3), metrics=())
        finally:
            keras.config.set_dtype_policy("float32")

    plain, ours = build(), build()
    plain.fit(x, y, batch_size=SAMPLES, shuffle=False, verbose=0)
    autobatch.fit(ours, x, y, target_batch=SAMPLES, micro_batch=11, shuffle=False, verbose=0)
    assert float(ours.optimizer.dynamic_scale.numpy()) == float(plain.optimizer.dynamic_scale.numpy()) == 2.0**14
    assert relative_error(ours.get_weights(), plain.get_weights()) == 0


class DenseGradients(keras.Sequential):
    """Sums the gradients of a repeated embedding row before the optimizer sees them, as other backends of Keras do."""

    def train_step(self, data):
        own_apply = self.optimizer.apply

        def apply(grads, variables=None):
            own_apply([tf.convert_to_tensor(gradient) for gradient in grads], variables)

        self.optimizer.__dict__["apply"] = apply
        try:
            return super().train_step(data)
        finally:
            del self.optimizer.__dict__["apply"]


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_frozen_layers_and_embeddings(optimizer):
    random = np.random.default_rng(0)
    x, y = random.integers(0, 200, (SAMPLES, 4)), random.integers(0, 3, SAMPLES)

    def build(kind):
        keras.utils.set_random_seed(1)
        frozen = layers.Dense(6, trainable=False)
        model = kind([keras.Input((4,)), layers.Embedding(200, 6), layers.Flatten(), frozen, layers.Dense(3)])
        options = {"sgd": keras.optimizers.SGD(0.3, clipnorm=0.01), "adam": keras.optimizers.Adam(0.01, epsilon=1e-3)}
        model.compile(options[optimizer], keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        return model

    plain, ours = build(DenseGradients), build(keras.Sequential)
    plain.fit(x, y, batch_size=SAMPLES, epochs=3, shuffle=False, verbose=0)
    autobatch.fit(ours, x, y, target_batch=SAMPLES, micro_batch=11, epochs=3, shuffle=False, verbose=0)
    assert relative_error(ours.get_weights(), plain.get_weights()) < 1e-5


def test_one_micro_batch_is_kerass_own_step_to_the_bit():
    x, y = arrays(samples=100)
    plain, ours = classifier("adam"), classifier("adam")
    plain.fit(x, y, batch_size=32, epochs=3, shuffle=False, verbose=0)
    autobatch.fit(ours, x, y, target_batch=32, micro_batch=32, epochs=3, shuffle=False, verbose=0)
    for actual, expected in zip(ours.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("options", [{}, {"jit_compile": True}], ids=["graph", "XLA"])
@pytest.mark.parametrize("name", sorted(ACROSS_THE_BATCH))
def test_a_loss_across_the_whole_batch(name, options):
    x, y = arrays()

    def build():
        return classifier("sgd", getattr(keras.losses, name)(), metrics=(), **options)

    compare(build, x, np.eye(10, dtype="float32")[y])
