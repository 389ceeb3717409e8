"""What cannot be the full batch's is said by name before training, and nothing is said of what is exact."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from models import SAMPLES, arrays, classifier, recorded_gradients

import autobatch

NOT_KNOWN = "how its loss is made of the samples is not known"


def cross_entropy(**options):
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True, **options)


def said_of(run):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(warning.message) for warning in caught if warning.category is autobatch.AutobatchWarning]


def said_in_fit(model, x=None, y=None):
    if x is None:
        x, y = arrays()
    return said_of(lambda: autobatch.fit(model, x, y, target_batch=SAMPLES, micro_batch=24, verbose=0))


class Layered(keras.Sequential):
    """Sequential models of 16 features into 10 classes, whose subclasses do something of their own."""

    @classmethod
    def compiled(cls, *extra, loss=None, **options):
        keras.utils.set_random_seed(1)
        model = cls([keras.Input((16,)), *extra, layers.Dense(10, name="last")])
        model.compile(keras.optimizers.SGD(0.1, name="descent"), loss or cross_entropy(), **options)
        return model


class Updating(Layered):
    """A train_step of its own, exact as it stands."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.loss_of(x, y)
        gradients = self.changed(tape.gradient(loss, self.trainable_weights))
        self.optimizer.apply_gradients(zip(gradients, self.trainable_weights, strict=True))
        self.after()
        return {"loss": loss}

    def loss_of(self, x, y):
        return self.compute_loss(x=x, y=y, y_pred=self(x, training=True))

    def changed(self, gradients):
        return gradients

    def after(self):
        pass


class Teacher(Updating):
    """The teacher follows the student after each step, as in BYOL."""

    def build(self, shape):
        super().build(shape)
        self.teacher = self.add_weight(name="teacher", shape=(10,), initializer="zeros", trainable=False)

    def after(self):
        self.teacher.assign(0.5 * self.teacher + 0.5 * self.layers[-1].bias)


class ClippedWeights(Updating):
    """Clips its weights, as a Wasserstein GAN's critic does."""

    def after(self):
        for weight in self.trainable_weights:
            weight.assign(tf.clip_by_value(weight, -0.1, 0.1))


class ClippedByNorm(Updating):
    def changed(self, gradients):
        return tf.clip_by_global_norm(gradients, 0.05)[0]


class ClippedByValue(Updating):
    def changed(self, gradients):
        return [ops.clip(gradient, -0.01, 0.01) for gradient in gradients]


class Scaled(Updating):
    """Changes its gradients linearly, which is the same for the sum as for its parts."""

    def changed(self, gradients):
        return [0.5 * gradient - tf.reduce_mean(gradient) / 4.0 for gradient in gradients]


class WithTheRegularizers(Updating):
    def loss_of(self, x, y):
        return cross_entropy()(y, self(x, training=True)) * 2.0 + sum(self.losses)


class Summing(Updating):
    def loss_of(self, x, y):
        return tf.reduce_sum(keras.losses.sparse_categorical_crossentropy(y, self(x), from_logits=True))


class OneByOne(Updating):
    def loss_of(self, x, y):
        values = keras.losses.sparse_categorical_crossentropy(y, self(x), from_logits=True)
        return tf.reduce_mean(tf.map_fn(tf.sqrt, values))


class Largest(Updating):
    def loss_of(self, x, y):
        return tf.reduce_max(keras.losses.sparse_categorical_crossentropy(y, self(x), from_logits=True))


class MaskedMean(Layered):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        mask = tf.cast(y % 3 == 0, tf.float32)
        values = keras.losses.sparse_categorical_crossentropy(y, y_pred, from_logits=True)
        return tf.reduce_sum(values * mask) / tf.reduce_sum(mask)


class OnlyCalling(Layered):
    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs)


def similarities(predicted):
    normalized = predicted / ops.norm(predicted, axis=-1, keepdims=True)
    return ops.matmul(normalized, ops.transpose(normalized)) / 0.1


def contrastive(y, predicted):
    """As in SimCLR and InfoNCE: a sample's similarity with itself against that with all others, one value a sample."""
    own = ops.arange(ops.shape(predicted)[0])
    return keras.losses.sparse_categorical_crossentropy(own, similarities(predicted), from_logits=True)


def by_einsum(y, predicted):
    return ops.sum(ops.square(tf.einsum("bd,cd->bc", predicted, predicted)), axis=1)


def by_pairs(y, predicted):
    """Distances of all from all, of samples with the same label."""
    distances = ops.sum(ops.square(predicted[:, None] - predicted[None]), axis=-1)
    return ops.mean(distances, axis=1)


def by_labels(y, predicted):
    """What samples of the same label have in common, told by the labels alone."""
    same = ops.cast(ops.equal(ops.reshape(y, (-1, 1)), ops.reshape(y, (1, -1))), "float32")
    return ops.sum(same, axis=1) * ops.sum(ops.square(predicted), axis=1)


class Contrastive(Updating):
    """A loss of Keras's, over the similarities of all with all."""

    def loss_of(self, x, y):
        scores = similarities(self(x, training=True))
        return cross_entropy()(tf.range(tf.shape(scores)[0]), scores)


def mean_square(y, predicted):
    return ops.mean(predicted**2)


class Spread(layers.Layer):
    """StyleGAN's minibatch standard deviation."""

    def call(self, inputs):
        spread = ops.mean(ops.std(inputs, axis=0))
        return ops.concatenate([inputs, ops.ones_like(inputs[:, :1]) * spread], -1)


class Centre(layers.Layer):
    def call(self, inputs):
        return inputs - ops.mean(inputs, axis=0, keepdims=True)


class AddsSum(layers.Layer):
    def call(self, inputs):
        self.add_loss(1e-3 * ops.sum(ops.square(inputs)))
        return inputs


class AddsOfWeights(layers.Layer):
    def build(self, shape):
        self.weight = self.add_weight(shape=(4,), name="weight")

    def call(self, inputs):
        self.add_loss(ops.sum(ops.square(self.weight)))
        return inputs


class Counting(layers.Layer):
    def build(self, shape):
        self.count = self.add_weight(shape=(), initializer="zeros", trainable=False, name="count")

    def call(self, inputs):
        # In a branch, so that it is written in a function of its own.
        tf.cond(tf.shape(inputs)[0] > 0, lambda: self.count.value.assign_add(1.0), lambda: self.count.value * 1.0)
        return inputs


class Noisy(layers.Layer):
    def __init__(self, **options):
        super().__init__(**options)
        self.seed_generator = keras.random.SeedGenerator(1)

    def call(self, inputs):
        return inputs + keras.random.normal(ops.shape(inputs), seed=self.seed_generator)


def recurrent(layer, **options):
    return [layers.Reshape((4, 4)), layer(5, **options)]


def attention(dropout):
    inputs = keras.Input((16,))
    steps = layers.Reshape((4, 4))(inputs)
    return keras.Model(inputs, layers.Flatten()(layers.MultiHeadAttention(2, 4, dropout=dropout)(steps, steps)))


def embedding(optimizer):
    """A small table, in which rows occur several times in a batch: 16 numbers of one digit each."""
    keras.utils.set_random_seed(1)
    digit = layers.Lambda(lambda x: tf.cast(x * 2.0, "int32") % 10, output_shape=(16,))
    table = layers.Embedding(10, 4, name="table")
    model = keras.Sequential([keras.Input((16,)), digit, table, layers.Flatten(), layers.Dense(10)])
    model.compile(optimizer, cross_entropy())
    return model


DEPENDS = "a sample depends on the others of its batch"
COMPARES = r"The loss compares samples with each other, in \S*"
SUMMED = r"of a row of Embedding \(table\) that occurs several times are summed before the optimizer "

NAMED = {
    "contrastive": (lambda: Layered.compiled(loss=contrastive), f"{COMPARES}MatMul"),
    "contrastive train_step": (lambda: Contrastive.compiled(), f"{COMPARES}MatMul"),
    "contrastive by einsum": (lambda: Layered.compiled(loss=by_einsum), f"{COMPARES}[Ee]insum"),
    "pairs": (lambda: Layered.compiled(loss=by_pairs), f"{COMPARES}[Ss]ub"),
    "labels": (lambda: Layered.compiled(loss=by_labels), f"{COMPARES}[Ee]qual"),
    "rows, squared": (lambda: embedding(keras.optimizers.Adam(name="descent")), f"{SUMMED}squares them"),
    "rows, clipped": (lambda: embedding(keras.optimizers.SGD(clipnorm=0.1, name="descent")), f"{SUMMED}clips them"),
    "rows, all clipped": (
        lambda: embedding(keras.optimizers.SGD(global_clipnorm=0.1, name="descent")),
        f"{SUMMED}clips them",
    ),
    "values clipped": (lambda: embedding(keras.optimizers.SGD(clipvalue=0.1, name="descent")), f"{SUMMED}clips them"),
    "clipped weights": (lambda: ClippedWeights.compiled(), r"train_step changes \S*last/kernel, \S*last/bias itself"),
    "counting layer": (lambda: Layered.compiled(Counting()), r"train_step changes \S*count itself"),
    "spectral": (
        lambda: Layered.compiled(layers.SpectralNormalization(layers.Dense(8), name="spectral")),
        r"SpectralNormalization \(spectral\) changes its kernel once for each micro-batch",
    ),
    "clip_by_global_norm": (
        lambda: ClippedByNorm.compiled(),
        "The gradients are changed before the optimizer gets them",
    ),
    "clip": (lambda: ClippedByValue.compiled(), "The gradients are changed before the optimizer gets them"),
    "sample by sample": (lambda: OneByOne.compiled(), rf"OneByOne.train_step: {NOT_KNOWN} \(in \S*map"),
    "largest": (lambda: Largest.compiled(), rf"Largest.train_step: {NOT_KNOWN} \(in \S*Max"),
    "deviation of the batch": (lambda: Layered.compiled(Spread(name="spread")), rf"In Spread \(spread\) {DEPENDS}"),
    "centred": (lambda: Layered.compiled(Centre(name="centre")), rf"In Centre \(centre\) {DEPENDS}"),
    "centred, eager": (
        lambda: Layered.compiled(Centre(name="centre"), run_eagerly=True),
        rf"In Centre \(centre\) {DEPENDS}",
    ),
    "custom noise": (lambda: Layered.compiled(Noisy(name="noisy")), r"Noisy \(noisy\) draws new random numbers"),
    "LSTM": (lambda: Layered.compiled(*recurrent(layers.LSTM, recurrent_dropout=0.2)), r"LSTM \(lstm\S*\) draws new"),
    "attention": (lambda: Layered.compiled(attention(0.3)), "Dropout .* draws new random numbers"),
}


@pytest.mark.parametrize("case", NAMED)
def test_what_differs_is_named(case):
    build, words = NAMED[case]
    (said,) = said_in_fit(build())
    assert re.search(words, said)
    assert said.count("micro-batch") <= 4, "more is said than the one thing"


def test_random_flips_are_named():
    x, y = arrays()
    model = Layered.compiled(layers.Reshape((4, 4, 1)), layers.RandomFlip(seed=3, name="flip"), layers.Flatten())
    assert "RandomFlip (flip) draws new random numbers" in said_in_fit(model, x, y)[0]


def masked_by_lengths(x):
    """The length of the longest is the batch's, but no sample is set against another by it."""
    lengths = 1 + ops.cast(x[:, 0] > 0, "int32")
    mask = ops.arange(ops.max(lengths))[None] < lengths[:, None]
    return x * ops.sum(ops.cast(mask, "float32"), axis=1, keepdims=True)


def dot_products():
    """Products of a sample with itself, which put no samples together."""
    inputs = keras.Input((16,))
    steps = layers.Reshape((4, 4))(inputs)
    both = [layers.Dot(axes=2)([steps, steps]), layers.Attention()([steps, steps])]
    return keras.Model(inputs, layers.Flatten()(layers.Concatenate()(both)))


EXACT = {
    "regularizers": lambda: classifier(
        extra=[layers.Dense(8, kernel_regularizer="l2", activity_regularizer="l2"), layers.ActivityRegularization(0.01)]
    ),
    "summed": lambda: classifier(loss=cross_entropy(reduction="sum")),
    "summed by itself": lambda: Summing.compiled(),
    "masked mean": lambda: MaskedMean.compiled(),
    "mean of a function's own, eager": lambda: classifier(
        loss=lambda y, predicted: ops.mean(predicted**2), run_eagerly=True
    ),
    "summed by itself, eager": lambda: Summing.compiled(run_eagerly=True),
    "sum by add_loss": lambda: Layered.compiled(AddsSum()),
    "several outputs' weights": lambda: classifier(loss=[cross_entropy()], loss_weights=[0.3]),
    "weight loss by add_loss": lambda: Layered.compiled(AddsOfWeights()),
    "train_step": lambda: Updating.compiled(),
    "train_step with regularizers": lambda: WithTheRegularizers.compiled(layers.Dense(8, kernel_regularizer="l2")),
    "linear in the gradients": lambda: Scaled.compiled(),
    "teacher": lambda: Teacher.compiled(),
    "compute_loss": lambda: OnlyCalling.compiled(),
    "LSTM": lambda: Layered.compiled(*recurrent(layers.LSTM)),
    "GRU": lambda: Layered.compiled(*recurrent(layers.GRU)),
    "attention": lambda: Layered.compiled(attention(0.0)),
    "masked by lengths": lambda: Layered.compiled(layers.Lambda(masked_by_lengths, output_shape=(16,))),
    "query with keys": lambda: Layered.compiled(dot_products()),
    "rows": lambda: embedding(keras.optimizers.SGD(0.1)),
    "no dropout": lambda: Layered.compiled(layers.Dropout(0.0), layers.GaussianNoise(0.0)),
}


@pytest.mark.parametrize("case", EXACT)
def test_nothing_is_said_of_what_is_exact_and_it_is(case):
    model, plain = EXACT[case](), EXACT[case]()
    plain.set_weights(model.get_weights())
    gradients = [recorded_gradients(each, updates=1) for each in (model, plain)]
    assert said_in_fit(model) == []
    plain.run_eagerly = True  # one step takes less than its trace
    plain.fit(*arrays(), batch_size=SAMPLES, verbose=0)
    for own, expected in ((gradients[0](), gradients[1]()), (model.get_weights(), plain.get_weights())):
        for one, other in zip(own, expected, strict=True):
            # The gradient of a bias of attention's keys is zero but for rounding.
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max() + 1e-8)


def test_it_is_said_before_the_first_update(monkeypatch):
    model = Layered.compiled(layers.Dropout(0.5))
    model.optimizer.build(model.trainable_variables)
    before, updates = model.get_weights(), []

    def seen(message, *_):
        if isinstance(message, autobatch.AutobatchWarning):
            updates.append(int(model.optimizer.iterations.numpy()))
            assert all((now == then).all() for now, then in zip(model.get_weights(), before, strict=True))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", lambda message, category, *rest: seen(message))
        autobatch.fit(model, *arrays(), target_batch=24, micro_batch=8, epochs=2, verbose=0)
    assert updates == [0], "said once, when nothing was updated yet"
    assert int(model.optimizer.iterations.numpy()) == 4


def in_a_loop(loss_of, changed=lambda gradients: gradients, after=lambda model: None, extra=()):
    model, optimizer = classifier(extra=extra), keras.optimizers.SGD(0.1, name="descent")
    seen = keras.metrics.SparseCategoricalAccuracy()

    def train_step(batch):
        x, y = batch
        with tf.GradientTape() as tape:
            predicted = model(x, training=True)
            loss = loss_of(y, predicted)
        gradients = changed(tape.gradient(loss, model.trainable_variables))
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        after(model)
        seen.update_state(y, predicted)
        return loss

    step = autobatch.wrap_step(train_step, model=model, optimizer=optimizer, target_batch=SAMPLES, micro_batch=24)
    return said_of(lambda: step(arrays()))


def averaged(y, predicted):
    values = cross_entropy(reduction="none")(y, predicted)
    return tf.nn.compute_average_loss(values, global_batch_size=SAMPLES)


def largest(y, predicted):
    return tf.reduce_max(cross_entropy(reduction="none")(y, predicted))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss_of": largest}, f"The train_step of this loop: {NOT_KNOWN}"),
        ({"changed": lambda gradients: tf.clip_by_global_norm(gradients, 0.1)[0]}, "are changed before descent gets"),
        (
            {"after": lambda model: model.layers[0].bias.assign(ops.zeros(32))},
            r"train_step changes \S*dense\S*/bias itself",
        ),
        ({"extra": [Noisy(name="noisy")]}, r"Noisy \(noisy\) draws new random numbers"),
    ],
    ids=["largest", "clipped gradients", "changed weights", "noise"],
)
def test_what_differs_in_a_loop_is_named(options, words):
    (said,) = in_a_loop(**{"loss_of": cross_entropy(), **options})
    assert re.search(words, said)


@pytest.mark.parametrize(
    "loss_of", [cross_entropy(), cross_entropy(reduction="sum"), averaged], ids=["mean", "sum", "average"]
)
def test_nothing_is_said_of_a_loop_with_a_loss_of_keras_and_a_metric(loss_of):
    assert in_a_loop(loss_of) == []


class Shaken(layers.Layer):
    def call(self, inputs):
        return inputs + tf.random.normal(tf.shape(inputs))


def test_what_an_eager_models_first_micro_batch_shows_is_said_then():
    model = Layered.compiled(Shaken(name="shaken"), run_eagerly=True)
    (said,) = said_in_fit(model)
    assert re.match(r"The first micro-batch shows what else differs.*Shaken \(shaken\) draws new random numbers", said)


def test_the_variables_that_micro_steps_write_are_known():
    from autobatch.step.accumulated_step import AccumulatedStep

    extra = [layers.BatchNormalization(name="norm"), layers.SpectralNormalization(layers.Dense(8, name="inner"))]
    model = classifier("adam", extra=extra)
    model.optimizer.build(model.trainable_variables)
    for whole in (True, False):
        step = AccumulatedStep(model, (tf.TensorSpec((None, 16), tf.float32), tf.TensorSpec((None,), tf.int64)))
        step.prepare(whole=whole)
        written = {id(variable) for variable in step.variables_written_by_micro_steps}
        names = {variable.path.split("/", 1)[-1] for variable in model.variables if id(variable.value) in written}
        names = {name.split("/")[-1] for name in names}
        assert {"vector_u", "kernel"} <= names
        # Of several micro-batches none writes a running average: it is assigned behind the last one.
        assert {"moving_mean", "moving_variance"} & names == ({"moving_mean", "moving_variance"} if whole else set())
        kept = {id(variable) for variable in step.changed_before_update}
        assert {id(variable.value) for variable in model.layers[1].non_trainable_variables} <= kept
        assert not written & {id(variable.value) for variable in model.optimizer.variables}
        assert id(model.layers[0].kernel.value) not in written
        step.release_accumulators()


class BuiltLater(keras.Model):
    """Not built before its train_step is traced: the layers make their variables there."""

    def __init__(self, *extra):
        super().__init__()
        self.stack = keras.Sequential([layers.Dense(8, name="first"), *extra, layers.Dense(10, name="last")])

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = cross_entropy()(y, self.stack(x, training=True))
        weights = self.stack.trainable_variables
        self.optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        return {"loss": loss}


@pytest.mark.parametrize("whole", [True, False])
def test_the_first_values_of_variables_made_in_the_trace_are_no_changes(whole):
    from autobatch.step.accumulated_step import AccumulatedStep

    model = BuiltLater(layers.BatchNormalization(name="norm"))
    model.compile(keras.optimizers.Adam(0.01))
    step = AccumulatedStep(model, (tf.TensorSpec((None, 16), tf.float32), tf.TensorSpec((None,), tf.int64)))
    step.prepare(whole=whole)
    names = {variable.name.partition(":")[0].split("/")[-1] for variable in step.variables_written_by_micro_steps}
    assert names == ({"moving_mean", "moving_variance"} if whole else set())
    assert not {"kernel", "bias"} & {variable.name.split("/")[-1] for variable in step.changed_before_update}


def test_nothing_is_said_of_a_model_that_its_train_step_builds():
    model = BuiltLater()
    model.compile("sgd")
    assert said_in_fit(model) == []


def test_every_kind_of_difference_has_a_place_on_the_page():
    from autobatch.differences import difference, rules

    page = (Path(__file__).parents[2] / difference.PAGE).read_text(encoding="utf-8")
    headings = [line[3:].lower().replace(" ", "-") for line in page.splitlines() if line.startswith("## ")]
    kinds = list(dict.fromkeys(anchor for anchor, _ in rules.KINDS))
    not_of_a_kind = [heading for heading in headings if heading not in kinds and not heading.startswith("limits:")]
    assert [heading for heading in headings if heading in kinds] == kinds
    assert not_of_a_kind == ["how-close-it-is", "sixteen-bit-layers"]


def test_a_warning_says_what_is_sure_before_what_may_be():
    from autobatch.differences import difference

    may = difference.Difference("The teacher may follow. What to do.", "losses")
    sure = difference.Difference("Dropout (a) draws. More of it.", "random-draws")
    words = {"sure": "Differs", "unsure": "May differ", "listed_in": "report.warnings"}
    page = difference.PAGE
    assert difference.in_short([may], **words) == f"May differ: The teacher may follow. See {page}#losses."
    assert difference.in_short([may, sure], **words) == (
        f"Differs: Dropout (a) draws; and 1 more difference. See report.warnings and {page}#random-draws."
    )
    assert difference.in_short(["From a file."], **words) == f"Differs: From a file. See {page}."
