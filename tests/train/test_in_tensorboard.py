"""What TensorBoard gets: summaries of the user's model once an update, and a run of autobatch's own."""

import glob
import os

import keras
import numpy as np
import pytest
import tensorflow as tf
from models import AtCall, MemoryHog

import autobatch

SAMPLES, TARGET = 48, 12
OPTIONS = {"target_batch": TARGET, "verbose": 0, "cache": False}


class Seen(keras.layers.Layer):
    """Writes what passes through it, as people do who look for a fault."""

    def call(self, inputs, training=None):
        # tf.summary.scalar does the same by this, where TensorBoard is installed.
        tf.summary.write("in_training" if training else "in_validation", tf.reduce_mean(inputs), step=0)
        return inputs


class Board(keras.callbacks.TensorBoard):
    """Keras's own, less its own logs, for which TensorBoard must be installed."""

    def on_epoch_end(self, epoch, logs=None):
        pass

    def on_train_batch_end(self, batch, logs=None):
        pass

    def _log_epoch_metrics(self, epoch, logs):
        pass


def model(*layers, **compiled):
    built = keras.Sequential([keras.Input((8,)), Seen(), *layers, keras.layers.Dense(3)])
    built.compile("sgd", "mse", **compiled)
    return built


def data():
    return np.ones((SAMPLES, 8), "float32"), np.ones((SAMPLES, 3), "float32")


def values(folder):
    """Every value by its tag, in turn, as (step, value)."""
    found = {}
    for path in sorted(glob.glob(os.path.join(str(folder), "**", "*tfevents*"), recursive=True)):
        for record in tf.data.TFRecordDataset(path):
            event = tf.compat.v1.Event.FromString(record.numpy())
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, tf.make_ndarray(value.tensor).item()))
    return found


def within(folder, train):
    writer = tf.summary.create_file_writer(str(folder))
    with writer.as_default():
        train()
    writer.close()
    return {tag: len(each) for tag, each in values(folder).items()}


def test_plain_keras_writes_once_an_update(tmp_path):
    options = {"batch_size": TARGET, "validation_data": data(), "validation_batch_size": 32, "verbose": 0}
    found = within(tmp_path, lambda: model().fit(*data(), **options))
    assert found == {"in_training": 4, "in_validation": 2}


@pytest.mark.parametrize(
    "options",
    [{"micro_batch": 5}, {"micro_batch": TARGET}, {}, {"micro_batch": 5, "sample_weight": np.linspace(0, 1, SAMPLES)}],
    ids=["accumulated", "whole", "searched", "weighted"],
)
def test_so_does_a_training_in_micro_batches(tmp_path, options):
    assert within(tmp_path, lambda: autobatch.fit(model(), *data(), **OPTIONS, **options)) == {"in_training": 4}


def test_so_does_an_eager_one_and_validation(tmp_path):
    eager = model(run_eagerly=True)
    assert within(tmp_path / "a", lambda: autobatch.fit(eager, *data(), micro_batch=5, **OPTIONS)) == {"in_training": 4}
    found = within(
        tmp_path / "b",
        lambda: autobatch.fit(model(), *data(), micro_batch=5, validation_data=data(), **OPTIONS),
    )
    assert found == {"in_training": 4, "in_validation": 2}


def test_an_update_that_is_run_again_is_written_once(tmp_path):
    def train():
        history = autobatch.fit(model(MemoryHog(AtCall(4))), *data(), micro_batch=6, **OPTIONS)
        assert len(history.recoveries) == 1

    assert within(tmp_path, train) == {"in_training": 4}


def test_neither_tune_nor_a_search_writes_and_a_writer_may_come_later(tmp_path):
    trained = model()
    assert within(tmp_path / "tune", lambda: autobatch.tune(trained, *data(), target_batch=TARGET, cache=False)) == {}
    autobatch.fit(trained, *data(), **OPTIONS)
    for name in ("second", "third"):  # each time another writer than the step was traced with
        found = within(tmp_path / name, lambda: autobatch.fit(trained, *data(), **OPTIONS))
        assert found == {"in_training": 4}


def test_a_writer_of_the_models_own(tmp_path):
    writer = tf.summary.create_file_writer(str(tmp_path / "own"))

    class WithWriter(Seen):
        def call(self, inputs, training=None):
            with writer.as_default():
                return super().call(inputs, training=training)

    def built():
        made = keras.Sequential([keras.Input((8,)), WithWriter(), keras.layers.Dense(3)])
        made.compile("sgd", "mse")
        return made

    autobatch.fit(built(), *data(), **OPTIONS)
    autobatch.fit(built(), *data(), micro_batch=5, **OPTIONS)
    writer.close()
    assert len(values(tmp_path)["in_training"]) == 8


def test_the_users_own_condition_holds_too(tmp_path):
    def train():
        with tf.summary.record_if(False):
            autobatch.fit(model(), *data(), micro_batch=5, **OPTIONS)

    assert within(tmp_path, train) == {}


def test_a_wrapped_step_writes_once_an_update(tmp_path):
    built = model()

    def train_step(batch):
        with tf.GradientTape() as tape:
            loss = keras.losses.MeanSquaredError()(batch[1], built(batch[0], training=True))
        built.optimizer.apply(tape.gradient(loss, built.trainable_variables), built.trainable_variables)
        return loss

    def train():
        options = {"model": built, "optimizer": built.optimizer, "target_batch": TARGET, "micro_batch": 5}
        step = autobatch.wrap_step(train_step, **options)
        for _ in range(3):
            step(tuple(part[:TARGET] for part in data()))

    assert within(tmp_path, train) == {"in_training": 3}


def test_tensorboards_callback_gets_the_models_summaries_and_a_run_of_ours(tmp_path):
    board = Board(str(tmp_path), update_freq=1, write_graph=False)
    options = {"callbacks": [board], "epochs": 2, **OPTIONS}
    history = autobatch.fit(model(MemoryHog(AtCall(10))), *data(), micro_batch=6, **options)
    (recovery,) = history.recoveries
    assert len(values(tmp_path / "train")["in_training"]) == 8
    found = values(tmp_path / "autobatch")
    assert found["report"][0][0] == 0
    assert found["report"][0][1].decode().startswith("### autobatch sizing report")
    after = recovery.micro_batch_after
    assert found["micro_batch"][0] == (0, 6)
    assert found["micro_batch"][-1] == (8, after)
    assert (recovery.update + 1, after) in found["micro_batch"]
    count, text = (found["recoveries"][place] for place in (1, 0))
    assert count == (recovery.update + 1, 1.0)
    assert text[1].decode() == f"out of memory in update {recovery.update}, train: micro-batch 6 to {after}"
    assert "trials/fits" not in found  # there was no search
    searched = autobatch.fit(model(), *data(), callbacks=[Board(str(tmp_path / "searched"))], **OPTIONS)
    found = values(tmp_path / "searched" / "autobatch")
    sizes = [trial.micro_batch for trial in searched.report.trials]
    assert found["trials/micro_batch"] == list(enumerate(sizes))
    assert [value for _, value in found["trials/fits"]] == [float(trial.fits) for trial in searched.report.trials]


def test_without_the_callback_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    autobatch.fit(model(), *data(), **OPTIONS)
    assert list(tmp_path.iterdir()) == []


def test_a_training_that_goes_on_counts_its_updates_on(tmp_path):
    fails = {"left": 1}

    def once():
        fails["left"] -= 1
        return fails["left"] == -3

    def train(folder, *callbacks):
        autobatch.fit(
            model(MemoryHog(lambda samples: once())),
            *data(),
            micro_batch=4,
            epochs=2,
            callbacks=[Board(folder), *callbacks],
            backup=tmp_path / "backup",
            backup_every=1,
            **OPTIONS,
        )

    def stop(batch, logs):
        if fails["left"] < -12:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        train(tmp_path / "a", keras.callbacks.LambdaCallback(on_train_batch_end=stop))
    before = values(tmp_path / "a")
    kept = int(max((tmp_path / "backup").iterdir()).name.rpartition("-")[2])
    fails["left"] = 10**6
    train(tmp_path / "b")
    found = values(tmp_path / "b")
    assert "recoveries" in before
    assert "recoveries" not in found, "what was written by the process before is not written again"
    assert [step for step, _ in found["micro_batch"]] == [kept, *(step for step in (4, 8) if step > kept)]
