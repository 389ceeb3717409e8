"""``backup`` of ``fit``: what is refused, what is passed over, what stays behind."""

import contextlib
import inspect
import itertools
import json
import os
import shutil
import signal
import types

import keras
import models
import numpy as np
import optional
import pytest
import tensorflow as tf
import uneven

import autobatch
from autobatch import arguments
from autobatch.backup import training_backup
from autobatch.backup.settings import BackupSettings
from autobatch.backup.training_backup import TrainingBackup
from autobatch.errors import AutobatchWarning

TARGET = 16


class StopAt(keras.callbacks.Callback):
    """Ends a training by an error behind an update."""

    def __init__(self, update):
        super().__init__()
        self.left = update

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if self.left < 0:
            raise InterruptedError


def fit(folder, *, stop=None, model=None, data=None, **options):
    model = model or models.classifier("adam")
    callbacks = [*options.pop("callbacks", []), *([] if stop is None else [StopAt(stop)])]
    often = {} if folder is None else {"backup_every": 1}
    settings = {"target_batch": TARGET, "micro_batch": 8, "epochs": 2, "verbose": 0, **often, **options}
    history = autobatch.fit(model, data or models.arrays(), callbacks=callbacks, backup=folder, **settings)
    return model, history


def interrupted(folder, stop=4, **options):
    with pytest.raises(InterruptedError):
        fit(folder, stop=stop, **options)
    return sorted(path.name for path in folder.iterdir())


def weights(model):
    return [variable.numpy() for variable in (*model.variables, *model.optimizer.variables)]


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))


@pytest.fixture(scope="module")
def whole():
    return fit(None)


@pytest.fixture(scope="module")
def kept_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("once") / "backup"
    assert interrupted(folder) == ["update-000000000003", "update-000000000004"]
    return folder


@pytest.fixture
def kept(kept_once, tmp_path):
    """A folder with the backups of the third and the fourth update of six."""
    return shutil.copytree(kept_once, tmp_path / "backup")


def test_an_interrupted_training_goes_on_and_its_backups_are_removed(kept, whole):
    model, history = fit(kept)
    assert same(model, whole[0])
    assert history.history == whole[1].history
    assert history.epoch == [0, 1]
    assert not kept.exists()


def test_updates_between_two_backups_are_counted_over_epochs(tmp_path):
    kept = interrupted(tmp_path / "backup", stop=10, backup_every=5, epochs=9)  # an epoch has three
    assert kept == ["update-000000000005", "update-000000000010"]


def test_training_stands_still_for_a_hundredth_of_its_time_at_most(tmp_path, monkeypatch):
    seconds = 0.0
    taken = []  # when training stood still, by a clock on which an update takes a second, and a backup half of one

    class Second(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            nonlocal seconds
            seconds += 1

    def state_of(backup, *args, **kwargs):
        nonlocal seconds
        seconds += 0.5
        taken.append(seconds)
        return original(backup, *args, **kwargs)

    original = TrainingBackup._state
    monkeypatch.setattr(TrainingBackup, "_state", state_of)
    monkeypatch.setattr(training_backup, "time", types.SimpleNamespace(monotonic=lambda: seconds))
    updates = 170
    data = models.arrays(samples=TARGET * updates)
    fit(tmp_path / "backup", data=data, backup_every="2s", epochs=1, callbacks=[Second()])
    first, *later = taken[:-1]  # the last one is held at the end of the epoch
    assert first <= 5
    assert len(later) >= 2
    assert all(following - before >= 99 * 0.5 for before, following in itertools.pairwise([first, *later]))
    assert 0.5 * len(taken) <= seconds / 100 + 2 * 0.5  # the first one, and the end's


def test_other_files_in_the_folder_are_left_alone(kept):
    (kept / "mine.txt").write_text("mine")
    fit(kept)
    assert [path.name for path in kept.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("what", "how"),
    [
        ("arrays.npz", "cut"),
        ("arrays.npz", "changed"),
        ("state.json", "changed"),
        ("sha256sums", "cut"),
        ("state.json", "gone"),
    ],
)
def test_a_damaged_backup_is_passed_over_for_the_one_before(kept, whole, what, how):
    file = kept / "update-000000000004" / what
    content = file.read_bytes()
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(content[: len(content) // 2] if how == "cut" else content[:-9] + b"x" + content[-8:])
    with pytest.warns(autobatch.errors.AutobatchWarning, match=r"update-000000000004 cannot be used"):
        model, _ = fit(kept)
    assert same(model, whole[0])


def test_a_half_written_one_is_cleared_away(kept, whole):
    shutil.copytree(kept / "update-000000000004", kept / ".new-update-000000000005-123")
    (kept / ".new-update-000000000005-123" / "sha256sums").unlink()
    model, _ = fit(kept)
    assert same(model, whole[0])
    assert not kept.exists()


def test_where_none_can_be_read_training_begins_anew(kept, whole):
    for backup in kept.iterdir():
        (backup / "state.json").write_text("{}")
    with pytest.warns(autobatch.errors.AutobatchWarning, match="cannot be used"):
        model, _ = fit(kept)
    assert same(model, whole[0])


def test_nothing_that_is_read_is_executed(kept):
    for backup in kept.iterdir():
        np.savez(backup / "arrays.npz", **{"state/variables/kernel": np.array([print], dtype=object)})
        sums = backup / "sha256sums"
        from autobatch.backup import folder

        digests = {name: folder._sha256(backup / name) for name in ("state.json", "arrays.npz")}
        sums.write_text("".join(f"{digest}  {name}\n" for name, digest in digests.items()))
    with pytest.warns(autobatch.errors.AutobatchWarning, match="cannot be used"):
        fit(kept)


def test_a_format_of_a_newer_release_is_refused(kept):
    from autobatch.backup import folder

    for backup in kept.iterdir():
        state = json.loads((backup / "state.json").read_text()) | {"schema": 2}
        (backup / "state.json").write_text(json.dumps(state))
        digests = {name: folder._sha256(backup / name) for name in ("state.json", "arrays.npz")}
        (backup / "sha256sums").write_text("".join(f"{digest}  {name}\n" for name, digest in digests.items()))
    with pytest.raises(ValueError, match=r"newer autobatch, in format 2; this one reads formats up to 1"):
        fit(kept)
    assert len(list(kept.iterdir())) == 2


def wider():
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(33), keras.layers.Dense(10)])
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    return model


def other_samples():
    x, y = models.arrays()
    x[-1] += 1
    return x, y


REFUSED = {
    "target": ({"target_batch": 12}, r"another target: target_batch was 16 then, and is 12 now"),
    "samples": ({"data": other_samples()}, r"other data: x was float32 of shape \(48, 16\), samples"),
    "size": ({"data": models.arrays(samples=40)}, r"other data: x was float32 of shape \(48, 16\).*\(40, 16\)"),
    "kind": (
        {"data": tf.data.Dataset.from_tensor_slices(models.arrays()).batch(4)},
        r"other data: x was float32 of shape .*tf.data.Dataset of",
    ),
    "shuffle": ({"shuffle": False}, r"other data: shuffle was not there then, and is False now"),
    "optimizer": (
        {"model": lambda: models.classifier("sgd")},
        r"another model: optimizer was Adam then, and is SGD now",
    ),
    "weights": (
        {"model": wider},
        r"another model: weight sequential/dense/kernel was float32 of shape \(16, 32\).*\(16, 33\)",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_backup_of_something_else_is_refused_by_name(kept, what):
    options, message = REFUSED[what]
    model = options.get("model", lambda: models.classifier("adam"))()
    before = [value.copy() for value in model.get_weights()]
    with pytest.raises(ValueError, match=message) as refused:
        fit(kept, **{**options, "model": model})
    assert f"Give another folder, or remove this one to train from the start. Received: backup='{kept}'" in str(
        refused.value
    )
    assert len(list(kept.iterdir())) == 2
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))


def test_keras_numbers_in_names_do_not_count(kept, whole):
    keras.layers.Dense(1)
    keras.Sequential()
    model, _ = fit(kept)
    assert same(model, whole[0])


def test_another_micro_batch_may_be_given(kept, whole):
    model, history = fit(kept, micro_batch=4)
    assert history.plan.micro_batch == 4
    assert all(np.allclose(a, b, atol=1e-5) for a, b in zip(weights(model), weights(whole[0]), strict=True))


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("soon", ValueError),
        ("0s", ValueError),
        ("60", ValueError),
        (0, ValueError),
        (1.5, TypeError),
        (True, TypeError),
    ],
)
def test_backup_every_is_checked(tmp_path, value, kind):
    with pytest.raises(kind, match=rf'backup_every must be a time such as "60s".*Received: {value!r}'):
        fit(tmp_path / "backup", backup_every=value)


def test_times_and_numbers_of_updates_are_understood():
    given = {"1s": (1.0, None), "0.5min": (30.0, None), " 2 h ": (7200.0, None), 3: (float("inf"), 3)}
    assert {value: arguments.backup_every(value) for value in given} == given


def test_the_folder_is_checked(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="a file has that name"):
        fit(tmp_path / "file")
    with pytest.raises(TypeError, match="backup must be the path of a folder"):
        fit(3)
    with pytest.raises(TypeError, match="keep_backup must be True or False"):
        fit(tmp_path / "a", keep_backup="yes")
    with pytest.raises(ValueError, match="keeps a backup, and none is made"):
        fit(None, keep_backup=True)
    with pytest.raises(ValueError, match="none is made.*Received: backup_every='5min'"):
        fit(None, backup_every="5min")


def test_the_time_between_two_backups_by_default_is_the_one_that_needs_no_folder():
    default = inspect.signature(autobatch.fit).parameters["backup_every"].default
    assert BackupSettings.of(None, default, False) is None


def test_generators_are_refused_with_what_to_use(tmp_path):
    x, y = models.arrays()
    with pytest.raises(ValueError, match=r"read only once.*Pass arrays, a keras.utils.PyDataset, or tf.data"):
        fit(tmp_path / "backup", data=((x[i : i + 4], y[i : i + 4]) for i in range(0, 48, 4)))
    assert not (tmp_path / "backup").exists()


def test_two_backups_at_a_time_are_refused(tmp_path):
    backup = keras.callbacks.BackupAndRestore(tmp_path / "keras")
    with pytest.raises(ValueError, match="Leave one of them out"):
        fit(tmp_path / "backup", callbacks=[backup])


def test_another_number_of_replicas_is_refused(kept_once, tmp_path):
    optional.several_devices()
    folder = shutil.copytree(kept_once, tmp_path / "backup")
    for backup in folder.iterdir():
        from autobatch.backup import folder as folders

        path = backup / "state.json"
        packed = json.loads(path.read_text())
        assert packed["state"]["dict"]["replicas"] == 1
        packed["state"]["dict"] |= {"replicas": 4, "processes": 2}
        path.write_text(json.dumps(packed))
        digests = {name: folders._sha256(backup / name) for name in ("state.json", "arrays.npz")}
        (backup / "sha256sums").write_text("".join(f"{digest}  {name}\n" for name, digest in digests.items()))
    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        model = models.classifier("adam")
    with pytest.raises(
        ValueError, match=r"number of replicas: 4 replicas in 2 processes then, 1 replica now\..*Train on as many"
    ):
        fit(folder, model=model)


def test_a_stopped_training_on_replicas_goes_on(tmp_path, whole):
    optional.several_devices()

    def model():
        with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
            return models.classifier("adam")

    interrupted(tmp_path / "backup", model=model())
    found, history = fit(tmp_path / "backup", model=model())
    assert history.epoch == [0, 1]
    assert history.history["loss"] == pytest.approx(whole[1].history["loss"], rel=1e-5)
    assert all(np.allclose(a, b, atol=1e-5) for a, b in zip(weights(found), weights(whole[0]), strict=True))


def test_a_kept_backup_trains_longer(tmp_path):
    folder = tmp_path / "backup"
    fit(folder, keep_backup=True, backup_every="1h")
    assert [path.name for path in folder.iterdir()] == ["update-000000000006"]
    longer, history = fit(folder, epochs=4)
    assert same(longer, fit(None, epochs=4)[0])
    assert history.epoch == [0, 1, 2, 3]


def test_a_folder_that_cannot_be_written_does_not_end_the_training(tmp_path, whole):
    (tmp_path / "blocked").write_text("")
    with pytest.warns(autobatch.errors.AutobatchWarning, match=r"could not be written .*Training goes on"):
        model, _ = fit(tmp_path / "blocked" / "backup")
    assert same(model, whole[0])


class StopsTraining(keras.callbacks.Callback):
    """Stops a training behind an update, as one that minds a time limit may; or at the end of an epoch."""

    def __init__(self, update=None, epoch=None):
        super().__init__()
        self.left, self.epoch = update, epoch

    def on_train_batch_end(self, batch, logs=None):
        if self.left is not None:
            self.left -= 1
            self.model.stop_training = self.left < 0

    def on_epoch_end(self, epoch, logs=None):
        if epoch == self.epoch:
            self.model.stop_training = True


@pytest.fixture(scope="module")
def whole_of_four():
    return fit(None, epochs=4)


@pytest.mark.parametrize(
    ("stop", "kept", "room"),
    [({"update": 3}, 4, True), ({"update": 5}, 6, False), ({"epoch": 1}, 6, True), ({"epoch": 1}, 6, False)],
)
def test_a_training_that_is_stopped_keeps_its_end(tmp_path, monkeypatch, whole_of_four, stop, kept, room):
    if not room:
        monkeypatch.setattr("autobatch.backup.training_backup._host_has_room", lambda of: False)
    folder = tmp_path / "backup"
    fit(folder, callbacks=[StopsTraining(**stop)], epochs=3, keep_backup=True, backup_every="1h")
    assert max(path.name for path in folder.iterdir()) == f"update-{kept:012d}"
    assert same(fit(folder, epochs=4)[0], whole_of_four[0])


def test_backups_that_cannot_be_removed_do_not_end_the_training(tmp_path, whole):
    folder = tmp_path / "backup"

    class InTheWay(keras.callbacks.Callback):
        def on_train_end(self, logs=None):
            (folder / f".old-update-000000000006-{os.getpid()}").write_text("")  # where it would be renamed to

    with pytest.warns(autobatch.errors.AutobatchWarning, match=r"cannot be removed .*Remove the folder yourself"):
        model, history = fit(folder, callbacks=[InTheWay()])
    assert same(model, whole[0])
    assert history.epoch == [0, 1]


def test_a_folder_in_use_is_refused_and_its_training_goes_on(tmp_path, whole):
    folder, refused = tmp_path / "backup", []

    class Second(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            with pytest.raises(ValueError, match="in use by another training, of this process itself") as caught:
                fit(folder)
            refused.append(caught.value)

    model, _ = fit(folder, callbacks=[Second()])
    assert len(refused) == 2
    assert same(model, whole[0])
    assert not folder.exists()


def test_a_relative_folder_is_the_one_at_the_beginning(tmp_path, monkeypatch):
    class GoesElsewhere(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            (tmp_path / "elsewhere").mkdir(exist_ok=True)
            os.chdir(tmp_path / "elsewhere")

    monkeypatch.chdir(tmp_path)
    with pytest.raises(InterruptedError):
        fit("backup", stop=4, callbacks=[GoesElsewhere()])
    assert sorted(path.name for path in tmp_path.glob("*/*")) == ["update-000000000003", "update-000000000004"]
    monkeypatch.chdir(tmp_path)
    fit("backup", callbacks=[GoesElsewhere()])
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]


def test_fewer_epochs_than_were_begun_are_refused_and_nothing_is_lost(kept, whole):
    with pytest.raises(
        ValueError, match=r"one of epoch 2, which is not reached with epochs=1: nothing would be trained"
    ):
        fit(kept, epochs=1)
    assert same(fit(kept)[0], whole[0])


def test_the_plan_is_searched_anew_where_another_limit_is_given(tmp_path):
    folder = tmp_path / "backup"
    interrupted(folder, micro_batch="auto", memory_limit="64MiB")
    _, history = fit(folder, micro_batch="auto", memory_limit="60MiB", cache=False)
    assert history.report.environment.limit_bytes == 60 * 2**20
    interrupted(folder, memory_limit="64MiB")
    assert fit(folder, headroom=0.3)[1].report.environment.headroom == 0.3


def test_the_plan_of_the_search_is_kept(tmp_path):
    folder = tmp_path / "backup"
    interrupted(folder, micro_batch="auto", memory_limit="64MiB")
    _, history = fit(folder, micro_batch="auto", memory_limit="64MiB", cache=False)
    assert history.report.trials
    assert history.report.stopped_because


def test_what_differs_is_said_as_in_the_first_process(tmp_path):
    def said(**options):
        with pytest.warns(AutobatchWarning) as caught, contextlib.suppress(InterruptedError):
            fit(
                tmp_path / "b",
                model=models.classifier("adam", extra=[keras.layers.Dropout(0.5, name="drop")]),
                **options,
            )
        return [str(each.message) for each in caught if "not identical" in str(each.message)]

    first = said(stop=2)
    assert "#random-draws" in first[0]
    assert said() == first


def test_recoveries_and_the_size_that_failed_are_kept(tmp_path):
    fails = {"left": 1}

    def once():
        fails["left"] -= 1
        return fails["left"] == -3

    def hog():
        return models.classifier("adam", extra=[models.MemoryHog(lambda samples: once())])

    folder = tmp_path / "backup"
    with pytest.raises(InterruptedError):
        fit(folder, stop=4, model=hog())
    fails["left"] = 10**6
    _, history = fit(folder, model=hog())
    assert len(history.recoveries) == 1
    assert history.recoveries[0].micro_batch_before == 8


def test_hidden_draws_are_said(tmp_path):
    class Noise(keras.layers.Layer):
        def call(self, inputs):
            return inputs + 0.01 * tf.random.normal(tf.shape(inputs))

    with pytest.warns(autobatch.errors.AutobatchWarning, match=r"RandomStandardNormal.*keras.random"):
        fit(tmp_path / "backup", model=models.classifier("adam", extra=[Noise()]), epochs=1)


def test_the_programs_own_handler_of_the_signal_is_called_and_put_back(tmp_path):
    class Terminated(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 1:
                signal.raise_signal(signal.SIGTERM)

    seen = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(sorted((tmp_path / "b").glob("update-*"))))
    mine = signal.getsignal(signal.SIGTERM)
    try:
        fit(tmp_path / "b", callbacks=[Terminated()], backup_every="1h")
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)
    assert [[path.name for path in paths] for paths in seen] == [
        ["update-000000000002"],
        ["update-000000000002", "update-000000000005"],
    ]


class Subclassed(keras.Model):
    """A model that is built by its first trace, with a generator of its own and a statistic that it assigns."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(10)
        self.generator = tf.random.Generator.from_seed(3)
        self.calls = tf.Variable(0.0, trainable=False)

    def call(self, inputs, training=False):
        self.calls.assign_add(1.0)
        return self.dense(inputs + 0.01 * self.generator.normal(tf.shape(inputs)))


def subclassed():
    keras.utils.set_random_seed(1)
    model = Subclassed()
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


MODELS = {
    "eager": lambda: models.classifier("adam", extra=[keras.layers.Dropout(0.2, seed=3)], run_eagerly=True),
    "scaled losses": lambda: models.classifier(
        keras.optimizers.LossScaleOptimizer(
            keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5), momentum=0.9, use_ema=True)
        )
    ),
    "subclassed": subclassed,
}


@pytest.mark.parametrize("kind", MODELS)
def test_models_of_other_kinds_go_on_too(tmp_path, kind):
    interrupted(tmp_path / "backup", model=MODELS[kind]())
    resumed, _ = fit(tmp_path / "backup", model=MODELS[kind]())
    expected, _ = fit(None, model=MODELS[kind]())
    assert same(resumed, expected)
    if kind == "subclassed":
        assert float(resumed.calls) == float(expected.calls)
        assert np.array_equal(resumed.generator.state, expected.generator.state)


def test_elements_that_cannot_be_cut_go_on_too(tmp_path):
    elements = uneven.graphs((4, 4), (6, 6), (5, 5))  # what shows it is the trace, and no search traces after a restart
    with pytest.warns(autobatch.AutobatchWarning, match="takes rows of the batch"):
        interrupted(tmp_path / "backup", model=uneven.made(uneven.graph), data=elements)
    with pytest.warns(autobatch.AutobatchWarning, match="takes rows of the batch"):
        resumed, _ = fit(tmp_path / "backup", model=uneven.made(uneven.graph), data=elements)
    assert int(resumed.optimizer.iterations.numpy()) == 6
    assert same(resumed, fit(None, model=uneven.made(uneven.graph), data=elements)[0])


class OwnFit(keras.Sequential):
    trainings = 1

    def fit(self, x=None, y=None, **options):
        for _ in range(self.trainings):
            history = super().fit(2 * x, y, **options)
        return history


def own_fit(trainings):
    keras.utils.set_random_seed(1)
    model = OwnFit([keras.Input((16,)), keras.layers.Dense(10)])
    model.trainings = trainings
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def test_a_fit_of_the_models_own_goes_on(tmp_path):
    interrupted(tmp_path / "backup", model=own_fit(1))
    resumed, history = fit(tmp_path / "backup", model=own_fit(1))
    assert same(resumed, fit(None, model=own_fit(1))[0])
    assert history.epoch == [0, 1]


def test_a_second_training_of_an_own_fit_has_no_backup_and_says_so(tmp_path):
    with pytest.warns(autobatch.errors.AutobatchWarning, match="own fit trains more than once"):
        model, _ = fit(tmp_path / "backup", model=own_fit(2))
    assert same(model, fit(None, model=own_fit(2))[0])
