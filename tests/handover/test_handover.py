"""What a script and the process that starts it again tell each other."""

import json
import os

import numpy as np
import pytest
import tensorflow as tf

import autobatch
from autobatch.handover import causes, folder, status
from autobatch.handover.causes import Causes, Death
from autobatch.handover.status import Doing, ProcessStatus


@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    """The folder of a run, as if ``autobatch run`` had started this process."""
    monkeypatch.setenv(folder.VARIABLE, str(tmp_path))
    status._forget()
    yield tmp_path
    status._forget()


def test_a_status_comes_back_as_it_was():
    told = ProcessStatus(3, Doing.VALIDATION, 2**40, 7, 5, -1, True, False, "ä" * 400)
    read = ProcessStatus.unpacked(told.packed())
    assert read.poison == "ä" * 150, "as much of it as there is room for"
    assert read == ProcessStatus(3, Doing.VALIDATION, 2**40, 7, 5, -1, True, False, read.poison)
    assert ProcessStatus.unpacked(b"") is None
    assert ProcessStatus.unpacked(bytes(1000)) is None


def test_nothing_is_noted_where_nobody_reads(tmp_path, monkeypatch):
    monkeypatch.setenv(folder.VARIABLE, str(tmp_path / "gone"))
    status._forget()
    assert status.note_training() == 0
    assert not status.is_watched()
    assert causes.told_causes() == Causes()


def test_notes(run_folder):
    assert status.read_status(run_folder, os.getpid()) is None
    assert [status.note_training(), status.note_training()] == [1, 2]
    status.note_doing(Doing.UPDATE, 64, 48)
    status.note_backup(3)
    status.note_backup(5)
    read = status.read_status(run_folder, os.getpid())
    assert read == ProcessStatus(2, Doing.UPDATE, 64, 48, backups=2, kept_update=5)
    status.note_poison("lost")
    status.note_doing(Doing.ELSE)
    assert status.read_status(run_folder, os.getpid()).micro_batch == 64, "where it was lost is still known"
    status.note_training()
    assert status.read_status(run_folder, os.getpid()) == ProcessStatus(3)
    status.note_worker_lost("Worker 1 is lost")
    assert status.read_status(run_folder, os.getpid()) == ProcessStatus(
        3, poison="Worker 1 is lost", worker_is_lost=True
    )


def test_causes_come_back_as_they_were(run_folder):
    told = Causes((Death("killed", 1, "update", 64), Death("lost")), 1)
    causes.write_causes(run_folder, told)
    assert causes.told_causes() == told
    assert told.sizes(1, in_trials=False) == told.deaths[:1]
    assert told.sizes(2, in_trials=False) == told.sizes(1, in_trials=True) == ()


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"deaths": [{"other": 1}], "host_deaths": 0}'])
def test_causes_that_cannot_be_read_are_none(run_folder, text):
    folder.causes_file(run_folder).write_text(text)
    assert causes.told_causes() == Causes()


def train(model, **options):
    x, y = np.ones((32, 4), "float32"), np.ones((32, 1), "float32")
    return autobatch.fit(model, x, y, target_batch=16, micro_batch=8, verbose=0, **options)


@pytest.fixture
def model():
    import keras

    made = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    made.compile("sgd", "mse")
    return made


def test_fit_notes_what_it_does(run_folder, model, tmp_path):
    import keras

    seen = []

    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(status.read_status(run_folder, os.getpid()))

    class Inside(keras.layers.Layer):
        def call(self, inputs):
            def look(rows):
                seen.append(status.read_status(run_folder, os.getpid()))
                return rows

            with tf.control_dependencies([tf.numpy_function(look, [tf.shape(inputs)[0]], tf.int32)]):
                return tf.identity(inputs)

    model = keras.Sequential([keras.Input((4,)), Inside(), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    train(model, callbacks=[Look()], backup=tmp_path / "backup", backup_every=1, epochs=2)
    doing = [(each.doing, each.micro_batch, each.smaller) for each in seen if each is not None]
    assert (Doing.UPDATE, 8, 6) in doing or (Doing.UPDATE, 8, 4) in doing
    assert (Doing.ELSE, 0, 0) in doing
    before = [each for each in seen if each is not None][-1]
    assert before.backups >= 2
    assert before.kept_update in (2, 3)
    last = status.read_status(run_folder, os.getpid())
    assert last == ProcessStatus(1, device_is_host=True), "the backups are removed"


def test_fit_notes_what_poisons_a_device(run_folder, model):
    import keras

    class Poison(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            raise tf.errors.InternalError(None, None, "CUDA_ERROR_LAUNCH_FAILED: unspecified launch failure")

    with pytest.raises(tf.errors.InternalError):
        train(model, callbacks=[Poison()])
    assert "CUDA_ERROR_LAUNCH_FAILED" in status.read_status(run_folder, os.getpid()).poison
    train(model)
    assert status.read_status(run_folder, os.getpid()).poison == ""


def test_only_the_fit_that_died_begins_smaller(run_folder, model):
    told = Causes((Death("killed", 2, "update", 8), Death("killed", 2, "update", 6)), 0)
    causes.write_causes(run_folder, told)
    first, second, third = (train(model) for _ in range(3))
    assert first.recoveries == third.recoveries == ()
    sizes = [(each.phase, each.micro_batch_before, each.micro_batch_after) for each in second.recoveries]
    assert sizes[0][:2] == ("restart", 8)
    assert 8 > sizes[0][2] > sizes[1][2]


def test_no_trial_of_a_size_that_an_earlier_process_died_of(run_folder, model):
    causes.write_causes(run_folder, Causes((Death("killed", 1, "trial", 16),), 0))
    x, y = np.ones((32, 4), "float32"), np.ones((32, 1), "float32")
    history = autobatch.fit(model, x, y, target_batch=16, verbose=0, cache=False)
    assert history.plan.micro_batch <= 8
    assert "not run: an earlier process died in a trial of 16 (killed)" in [
        trial.detail for trial in history.report.trials
    ]


def test_the_file_of_causes_is_json(run_folder):
    causes.write_causes(run_folder, Causes((Death("killed"),), 2))
    assert json.loads(folder.causes_file(run_folder).read_text())["host_deaths"] == 2


def test_a_loop_of_ones_own_begins_smaller_too(run_folder, model):
    causes.write_causes(run_folder, Causes((Death("killed", 1, "update", 8),), 0))

    def train_step(batch):
        with tf.GradientTape() as tape:
            loss = model.compute_loss(y=batch[1], y_pred=model(batch[0], training=True))
        model.optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
        return loss

    steps = autobatch.wrap_step(train_step, model=model, optimizer=model.optimizer, target_batch=16, micro_batch=8)
    steps((tf.ones([16, 4]), tf.ones([16, 1])))
    assert [(each.phase, each.micro_batch_before, each.micro_batch_after) for each in steps.recoveries] == [
        ("restart", 8, 6)
    ]
    read = status.read_status(run_folder, os.getpid())
    assert (read.training, read.doing) == (1, Doing.ELSE)
