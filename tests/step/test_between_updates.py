"""What a step does between its updates and behind them: assignments, statistics, draws, metrics and logs."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from models import SAMPLES as MANY
from models import arrays, said_of
from updating_models import SAMPLES, InTurn, Pair, SharedFakes, compare, dense, noise, wasserstein

import autobatch
from autobatch.graphs import parts

pytestmark = pytest.mark.usefixtures("double_precision")

REAL, LATENT = noise()


class Alternating(Pair):
    """Updates the critic, then the generator; subclasses do something in between and behind, and return logs of it."""

    def train_step(self, data):
        real, latent = data
        self.before(real)
        with tf.GradientTape() as tape:
            loss = wasserstein(self.critic(self.generator(latent[:, 0])), self.critic(real))
        self.update_critic(tape, loss)
        self.between(real)
        with tf.GradientTape() as tape:
            of_generator = -tf.reduce_mean(self.judged(latent[:, 1]))
        self.update_generator(tape, of_generator)
        return {"critic": loss, "generator": of_generator, **self.behind(real, latent)}

    def judged(self, latent):
        return self.critic(self.generator(latent))

    def before(self, real):
        pass

    def between(self, real):
        pass

    def behind(self, real, latent):
        return {}


class Followed(Alternating):
    """An average of the generator's weights, counters of both kinds, and logs that see updated weights."""

    def __init__(self):
        super().__init__()
        self.shadow = dense(3, 16)
        self.shadow.trainable = False
        self.count = tf.Variable(0, trainable=False)
        self.seen = self.add_weight(shape=(), initializer="zeros", trainable=False, name="seen")

    def before(self, real):
        self.count.assign_add(1)
        self.seen.assign_add(1.0)

    def between(self, real):
        self.old = [tf.identity(weight) for weight in self.generator.trainable_variables]

    def behind(self, real, latent):
        for slow, fast in zip(self.shadow.variables, self.generator.variables, strict=True):
            slow.assign(0.9 * slow + 0.1 * fast)
        self.count.assign_add(1)
        both = zip(self.old, self.generator.trainable_variables, strict=True)
        return {
            "moved": tf.add_n([tf.reduce_sum(tf.abs(old - new)) for old, new in both]),
            "after": -tf.reduce_mean(self.judged(latent[:, 1])),
            "count": tf.cast(self.count, "float64"),
            "updates": tf.cast(self.g_optimizer.iterations, "float64"),
        }


def test_averages_counters_and_logs_of_updated_weights():
    model, history = compare(Followed, REAL, LATENT)
    assert history.report.warnings == ()
    assert int(model.count) == 4
    assert float(model.seen) == 2


class Standardised(Alternating):
    """The running statistics that the first part moves are used by the second."""

    def __init__(self):
        super().__init__()
        self.norm = layers.BatchNormalization(momentum=0.5)

    def before(self, real):
        self.norm(real, training=True)

    def between(self, real):
        self.norm(real[:, ::-1], training=True)

    def judged(self, latent):
        return self.critic(self.norm(self.generator(latent), training=False))


def test_moving_statistics_move_with_each_call_and_are_the_whole_batchs_in_the_next_part():
    compare(Standardised, REAL, LATENT)


class SpectralCritic(Alternating):
    def __init__(self):
        super().__init__()
        stack = [layers.Dense(8, activation="tanh"), layers.Dense(1)]
        self.critic = keras.Sequential([keras.Input((16,)), *map(layers.SpectralNormalization, stack)])

    def train_step(self, data):
        real, latent = data
        with tf.GradientTape() as tape:
            fake = self.generator(latent[:, 0], training=True)
            loss = wasserstein(self.critic(fake, training=True), self.critic(real, training=True))
        self.update_critic(tape, loss)
        with tf.GradientTape() as tape:
            of_generator = -tf.reduce_mean(self.critic(self.generator(latent[:, 1], training=True), training=True))
        self.update_generator(tape, of_generator)
        return {"critic": loss}


def test_spectral_normalization_changes_its_kernel_once_a_call():
    _, history = compare(SpectralCritic, REAL, LATENT)
    assert history.report.warnings == ()


class Recurrent(SharedFakes):
    """What a loop of TensorFlow's computes in one part is needed in the next, its inner states included."""

    def __init__(self):
        super().__init__()
        shape = [keras.Input((3,)), layers.Reshape((3, 1))]
        self.generator = keras.Sequential([*shape, layers.SimpleRNN(4), layers.Dense(16)])
        shape = [keras.Input((16,)), layers.Reshape((8, 2))]
        self.critic = keras.Sequential([*shape, layers.LSTM(4), layers.Dense(1)])


def test_loops_within_the_networks():
    compare(Recurrent, REAL, LATENT)


class Remembering(Pair):
    """Compares the critic with what it was before: its old predictions and its old weights."""

    def train_step(self, data):
        real, latent = data
        old, kernel = self.critic(real), tf.identity(self.critic.trainable_variables[0])
        with tf.GradientTape() as tape:
            loss = wasserstein(self.critic(self.generator(latent[:, 0])), self.critic(real))
        self.update_critic(tape, loss)
        with tf.GradientTape() as tape:
            apart = tf.reduce_mean(tf.square(self.critic(real) - old))
            apart += tf.reduce_sum(tf.square(self.critic.trainable_variables[0] - kernel))
            again = wasserstein(self.critic(self.generator(latent[:, 1])), self.critic(real)) + 50.0 * apart
        self.update_critic(tape, again)
        return {"loss": loss, "again": again, "old": tf.reduce_mean(old), "old rows": old[:, 0]}


def test_values_of_old_weights_are_the_old_ones():
    real, latent = noise()

    class Scalars(Remembering):
        def train_step(self, data):
            logs = super().train_step(data)
            return {name: value for name, value in logs.items() if value.shape.rank == 0}

    compare(Scalars, real, latent)


class Overlap(Pair):
    """A loss that is a function of sums over the batch, at each of three places."""

    def overlap(self, judged, labels):
        predicted = tf.sigmoid(judged)
        return 1 - (2 * tf.reduce_sum(predicted * labels) + 1) / (tf.reduce_sum(predicted) + tf.reduce_sum(labels) + 1)

    def train_step(self, data):
        real, latent = data
        labels = tf.sigmoid(real[:, :1])
        with tf.GradientTape() as tape:
            first = self.overlap(self.critic(real), labels)
        self.update_critic(tape, first)
        with tf.GradientTape() as tape:
            second = self.overlap(self.critic(self.generator(latent[:, 0])), labels)
        self.update_generator(tape, second)
        with tf.GradientTape() as tape:
            third = self.overlap(self.critic(self.generator(latent[:, 1])), labels) * tf.exp(first)
        self.update_critic(tape, third)
        return {"first": first, "second": second, "third": third}


def test_what_a_loss_needs_of_the_whole_batch_is_counted_with_the_weights_of_its_part():
    compare(Overlap, REAL, LATENT)


class Spread(keras.metrics.Metric):
    """No sum over samples."""

    def __init__(self, name):
        super().__init__(name=name)
        self.value = self.add_weight(shape=(), initializer="zeros", name="value")

    def update_state(self, values, sample_weight=None):
        self.value.assign(tf.cast(tf.reduce_max(values) - tf.math.reduce_std(values), self.value.dtype))

    def result(self):
        return self.value


class Measured(Alternating):
    def __init__(self):
        super().__init__()
        self.spread, self.area = Spread(name="spread"), keras.metrics.AUC(name="area")

    @property
    def metrics(self):
        return [self.critic_loss, self.spread, self.area]

    def before(self, real):
        self.critic_loss.update_state(tf.reduce_mean(self.critic(real)))

    def between(self, real):
        judged = self.critic(real)
        self.spread.update_state(judged)
        self.area.update_state(real[:, :1] > 0, tf.sigmoid(judged))
        self.critic_loss.update_state(tf.reduce_mean(judged))

    def behind(self, real, latent):
        return {metric.name: metric.result() for metric in self.metrics}


def test_metrics_are_updated_where_they_stand():
    compare(Measured, REAL, LATENT)


class Twice(keras.Sequential):
    """Keras's own step, twice on the same samples."""

    def train_step(self, data):
        super().train_step(data)
        return super().train_step(data)


def test_kerass_own_step_twice():
    def make():
        regularized = layers.Dense(8, activation="tanh", kernel_regularizer="l2", activity_regularizer="l2")
        return Twice([keras.Input((16,)), regularized, layers.Dense(10)])

    def options():
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        return {"optimizer": keras.optimizers.SGD(0.1), "loss": loss, "metrics": ["accuracy"]}

    compare(make, *arrays(), target_batch=MANY, micro_batch=11, options=options)


class SameGradients(Pair):
    """Applies the same gradients twice, then these and others."""

    def train_step(self, data):
        real, latent = data
        weights = self.critic.trainable_variables
        with tf.GradientTape() as tape:
            loss = wasserstein(self.critic(self.generator(latent[:, 0])), self.critic(real))
        first = tape.gradient(loss, weights)
        self.c_optimizer.apply(first, weights)
        self.c_optimizer.apply(first, weights)
        with tf.GradientTape() as tape:
            again = tf.reduce_mean(tf.square(self.critic(real)))
        both = [0.5 * (one + other) for one, other in zip(first, tape.gradient(again, weights), strict=True)]
        self.c_optimizer.apply(both, weights)
        return {"loss": loss, "again": again}


def test_the_same_gradients_may_be_applied_again():
    compare(SameGradients, REAL, LATENT)


class TwoLists(Pair):
    """One optimizer for two lists of weights, whose gradients are taken together."""

    def train_step(self, data):
        real, latent = data
        lists = [self.critic.trainable_variables, self.generator.trainable_variables]
        if not self.c_optimizer.built:
            self.c_optimizer.build([*lists[0], *lists[1]])
        with tf.GradientTape() as tape:
            loss = wasserstein(self.critic(self.generator(latent[:, 0])), self.critic(real))
        for gradients, weights in zip(tape.gradient(loss, lists), lists, strict=True):
            self.c_optimizer.apply(gradients, weights)
        return {"loss": loss}


@pytest.mark.parametrize("options", [{}, {"run_eagerly": True}], ids=["graph", "eager"])
def test_one_optimizer_over_two_lists(options):
    compare(TwoLists, REAL, LATENT, options=lambda: options)


class Scheduled(Pair):
    """Sets the learning rate before each of its updates."""

    def train_step(self, data):
        losses = {}
        for name, rate, sign in (("first", 0.2, 1.0), ("second", 0.02, -1.0)):
            self.c_optimizer.learning_rate.assign(rate)
            with tf.GradientTape() as tape:
                losses[name] = tf.reduce_mean(tf.square(self.critic(data[0]) - sign))
            self.update_critic(tape, losses[name])
        return {**losses, "rate": self.c_optimizer.learning_rate + 0.0}


def test_a_learning_rate_is_that_of_the_next_update():
    compare(Scheduled, REAL, LATENT)


class Crossed(Pair):
    """Gradients that are taken before an update, and applied behind it."""

    def train_step(self, data):
        real, latent = data
        with tf.GradientTape(persistent=True) as tape:
            judged = self.critic(self.generator(latent[:, 0]))
            loss = wasserstein(judged, self.critic(real))
            of_generator = -tf.reduce_mean(judged)
        mine, theirs = self.critic.trainable_variables, self.generator.trainable_variables
        taken = tape.gradient(of_generator, theirs)
        self.c_optimizer.apply(tape.gradient(loss, mine), mine)
        with tf.GradientTape() as other:
            again = wasserstein(self.critic(self.generator(latent[:, 1])), self.critic(real))
        self.c_optimizer.apply(other.gradient(again, mine), mine)
        self.g_optimizer.apply([0.5 * gradient for gradient in taken], theirs)
        return {"loss": loss, "again": again, "generator": of_generator}


def test_gradients_belong_to_where_they_were_taken():
    _, history = compare(Crossed, REAL, LATENT)
    assert history.report.warnings == ()


class Clipping(Pair):
    """Clips the gradients themselves, at the first of two updates."""

    def train_step(self, data):
        real, latent = data
        weights = self.critic.trainable_variables
        for draw, most in ((0, 0.1), (1, None)):
            with tf.GradientTape() as tape:
                loss = wasserstein(self.critic(self.generator(latent[:, draw])), self.critic(real))
            gradients = tape.gradient(loss, weights)
            if most is not None:
                gradients, _ = tf.clip_by_global_norm(gradients, most)
            self.c_optimizer.apply(gradients, weights)
        return {"loss": loss}


def test_clipped_gradients_are_named_once():
    model = Clipping()
    model.compile()
    x, y = REAL.astype("float64"), LATENT.astype("float64")
    (said,) = said_of(lambda: autobatch.fit(model, x, y, target_batch=SAMPLES, micro_batch=5, verbose=0))
    assert "The gradients are changed before c_optimizer gets them, by clipping say" in said


class Drawing(Pair):
    """The latent vectors are drawn in the step, and those of the first part are used again in the second."""

    def __init__(self):
        super().__init__()
        self.seeds = keras.random.SeedGenerator(3)
        self.drawn = tf.Variable(tf.zeros([2, 100, 3], "float64"), trainable=False)
        self.at = tf.Variable(0, trainable=False)

    def note(self, place, latent):
        rows = self.at + tf.range(tf.shape(latent)[0])
        self.drawn.scatter_nd_update(tf.stack([tf.fill(tf.shape(rows), place), rows], axis=1), latent)
        return rows

    def train_step(self, data):
        real, _ = data
        shape = (tf.shape(real)[0], 3)
        latent = self.draw(shape)
        rows = self.note(0, latent)
        with tf.GradientTape() as tape:
            loss = wasserstein(self.critic(self.generator(latent)), self.critic(real))
        self.update_critic(tape, loss)
        judged = self.critic(self.generator(latent))
        self.note(1, latent + 0.0 * judged)
        with tf.GradientTape() as tape:
            of_generator = -tf.reduce_mean(self.critic(self.generator(latent))) - tf.reduce_mean(judged)
        self.update_generator(tape, of_generator)
        self.at.assign(tf.reduce_max(rows) + 1)
        return {"loss": loss}

    def draw(self, shape):
        return keras.random.normal(shape, seed=self.seeds)


class DrawingByTensorFlow(Drawing):
    def draw(self, shape):
        return tf.raw_ops.RandomStandardNormal(shape=shape, dtype=tf.float64, seed=0, seed2=0)  # never the same twice


@pytest.mark.parametrize(("make", "most_bytes"), [(Drawing, 2**24), (DrawingByTensorFlow, 0)])
def test_a_draw_that_two_parts_use_is_one_draw(make, most_bytes, monkeypatch):
    monkeypatch.setattr(parts, "MOST_BYTES", most_bytes)
    keras.utils.set_random_seed(1)
    model = make()
    model.compile()
    seeds = int(model.seeds.state.value[1])
    autobatch.fit(model, REAL.astype("float64"), LATENT, target_batch=SAMPLES, micro_batch=8, epochs=1, verbose=0)
    rows = model.drawn.numpy()[:, : int(model.at)]
    assert rows.shape[1] == 24
    np.testing.assert_array_equal(rows[0], rows[1])
    assert len(np.unique(rows[0][:, 0])) == rows.shape[1], "each micro-batch draws its own"
    if make is Drawing:
        assert int(model.seeds.state.value[1]) - seeds == 3, "once for each micro-batch"


class InALoop(Pair):
    def train_step(self, data):
        real, _ = data

        def update(count):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(self.critic(real)))
            self.update_critic(tape, loss)
            return (count + 1,)

        tf.while_loop(lambda count: count < 3, update, (tf.constant(0),))
        return {}


class EveryThird(Pair):
    """The critic is updated in every third step, by a counter that the step moves, and counts what it does."""

    def __init__(self):
        super().__init__()
        self.count = self.add_weight(shape=(), initializer="zeros", trainable=False, dtype="int64", name="count")

    def chosen(self, loss):
        return self.count % 3 == 0

    def train_step(self, data):
        self.count.assign_add(1)
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(self.critic(data[0])))
        weights = self.critic.trainable_variables
        gradients = tape.gradient(loss, weights)

        def update():
            self.c_optimizer.apply(gradients, weights)
            self.critic_loss.update_state(loss)

        tf.cond(self.chosen(loss), update, lambda: None)
        return {"loss": loss, "critic_loss": self.critic_loss.result()}


class Delayed(Pair):
    """As TD3: the generator follows the critic in every second step, and an average of its weights follows it."""

    def __init__(self):
        super().__init__()
        self.shadow = dense(3, 16)

    def train_step(self, data):
        real, latent = data
        with tf.GradientTape() as tape:
            loss = wasserstein(self.critic(self.shadow(latent[:, 0])), self.critic(real))
        self.update_critic(tape, loss)

        def follow():
            with tf.GradientTape() as tape:
                of_generator = -tf.reduce_mean(self.critic(self.generator(latent[:, 1])))
            self.update_generator(tape, of_generator)
            for slow, fast in zip(self.shadow.variables, self.generator.variables, strict=True):
                slow.assign(0.9 * slow + 0.1 * fast)
            return of_generator

        chosen = self.c_optimizer.iterations % 2 == 0
        return {"loss": loss, "generator": tf.cond(chosen, follow, lambda: tf.constant(0.0, "float64"))}


@pytest.mark.parametrize("make", [EveryThird, Delayed])
def test_an_update_in_every_nth_step(make):
    model, _ = compare(make, REAL, LATENT, epochs=5)
    if make is EveryThird:
        assert int(model.c_optimizer.iterations) == 1


class BuiltInABranch(Pair):
    """Networks that are built where they are first used: in a branch that makes the only update."""

    def __init__(self):
        super().__init__()
        self.critic = keras.Sequential([layers.Dense(8, activation="tanh"), layers.Dense(1)])

    def train_step(self, data):
        def update():
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(self.critic(data[0]) - 1.0))
            self.update_critic(tape, loss)
            return loss

        return {"loss": tf.cond(self.g_optimizer.iterations >= 0, update, lambda: tf.constant(0.0, "float64"))}


def test_a_network_may_be_built_in_a_branch_that_updates_it():
    compare(BuiltInABranch, REAL, LATENT)


class ChosenByData(EveryThird):
    def chosen(self, loss):
        return loss > 0


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (InALoop, {}, r"within a loop that TensorFlow runs.*range\(...\).*Received: 'sgd"),
        (ChosenByData, {}, "within a branch that is chosen by the data.*optimizer.iterations.*Received: 'sgd"),
        (InTurn, {"run_eagerly": True}, "runs eagerly.*Leave run_eagerly=True out.*Received: InTurn"),
        (SameGradients, {"run_eagerly": True}, "runs eagerly.*Leave run_eagerly=True out.*Received: SameGradients"),
    ],
)
def test_what_cannot_be_divided_is_refused_before_anything_changes(make, options, message):
    model = make()
    model.compile(**options)
    before = model.get_weights()
    with pytest.raises(ValueError, match=message):
        autobatch.fit(model, REAL.astype("float64"), LATENT, target_batch=SAMPLES, micro_batch=5, verbose=0)
    for new, old in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(new, old)
