"""Host memory: what is really held while training reads a file or a stream, and what is estimated beforehand."""

import json
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import optional
import pytest
import tensorflow as tf
from models import arrays, classifier

import autobatch
from autobatch.data import fit_data
from autobatch.data.effective_batches import EffectiveBatches
from autobatch.memory import limits
from autobatch.records import HostUse, Limit
from autobatch.report.text import render

# Each measurement is in a fork of a process that has only imported TensorFlow.
BEGINNING = """
import json, os, re, sys, traceback
import keras, numpy as np, tensorflow as tf
import autobatch
from autobatch.memory import limits

def anonymous_bytes():  # what is held, without the pages of files, which the kernel takes back when it needs them
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read()).group(1)) * 1024

class Watch(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.held = []
    def on_train_batch_end(self, batch, logs=None):
        self.held.append(anonymous_bytes())
    def on_test_batch_end(self, batch, logs=None):
        self.held.append(anonymous_bytes())

def model():
    made = keras.Sequential([keras.Input((1024,)), keras.layers.Dense(4)])
    made.compile("sgd", "mse")
    return made

def train(*data, **options):
    watch = Watch()
    autobatch.fit(model(), *data, target_batch=250, micro_batch=125, verbose=0, callbacks=[watch], **options)
    return watch.held

def stream(batches=120):  # 240 MB in all
    for start in range(batches):
        yield np.random.uniform(size=(500, 1024)).astype("float32"), np.zeros((500, 4), "float32")

def forked(measure):
    process = os.fork()
    if process:
        if os.waitpid(process, 0)[1]:
            sys.exit("A measurement failed.")
        return
    try:
        small = np.zeros((1000, 1024), "float32")
        train(small, small[:, :4], validation_split=0.5)  # whatever a first training needs is there now
        print(json.dumps(measure()), flush=True)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
"""

FILE_AND_STREAM = """
def file_and_stream():
    rows = 100_000  # 400 MB in a file of holes
    mapped = np.memmap(sys.argv[1], dtype="float64", mode="w+", shape=(rows // 2, 1024))
    before = anonymous_bytes()
    held = train(mapped, np.zeros((rows // 2, 4), "float32"), validation_split=0.001, steps_per_epoch=20)
    of_file = max(held) - before
    held = train(stream(), steps_per_epoch=240)
    return {"file": of_file, "stream": max(held[60:]) - max(held[:60]), "updates": len(held)}

forked(file_and_stream)
"""

OTHER_STREAMS = """
BATCHES = 80  # 160 MB

def pipeline():
    batches = tf.data.Dataset.range(BATCHES).map(lambda _: (tf.random.uniform((500, 1024)), tf.zeros((500, 4))))
    return batches.unbatch().shuffle(1000).batch(125).prefetch(2)

class Batches(keras.utils.PyDataset):
    def __len__(self):
        return BATCHES

    def __getitem__(self, index):
        return next(stream())

def torch_stream():
    import torch

    class Rows(torch.utils.data.IterableDataset):
        def __iter__(self):
            for x, y in stream(BATCHES):
                yield from zip(torch.tensor(x), torch.tensor(y))

    return torch.utils.data.DataLoader(Rows(), batch_size=125)

kinds = {"tf.data": pipeline, "PyDataset": lambda: Batches(workers=2, max_queue_size=4), "torch": torch_stream}

def other_streams():
    measured = {}
    for kind in sys.argv[2:]:
        held = train(kinds[kind]())
        measured[kind] = {"held": max(held[80:]) - max(held[:80]), "updates": len(held)}
    return measured

forked(other_streams)
"""


def measure(program, *arguments):
    """What each fork of a program has printed."""
    ran = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    program = BEGINNING + FILE_AND_STREAM + OTHER_STREAMS
    return measure(program, tmp_path_factory.mktemp("file") / "samples", "tf.data", "PyDataset")


def test_host_memory_stays_flat(measured):
    found, _ = measured
    assert found["updates"] == 240
    assert found["file"] < 60 * 2**20  # of 400 MB
    assert found["stream"] < 30 * 2**20  # of 180 MB that pass through


def assert_flat(found, *kinds):
    assert list(found) == list(kinds)
    for kind in kinds:
        assert found[kind]["updates"] == 160, kind
        assert found[kind]["held"] < 30 * 2**20, kind  # of 80 MB that pass through meanwhile


def test_host_memory_stays_flat_for_other_streams(measured):
    assert_flat(measured[1], "tf.data", "PyDataset")


def test_host_memory_stays_flat_for_a_torch_stream():
    optional.torch()
    (found,) = measure(BEGINNING + OTHER_STREAMS, "no file", "torch")
    assert_flat(found, "torch")


X, Y = arrays(samples=44)
SAMPLE_BYTES = 16 * 4 + 8


@pytest.fixture
def mapped(tmp_path):
    def mapped(array):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.npy"
        np.save(path, array)
        return np.load(path, mmap_mode="r")

    return mapped


@pytest.mark.parametrize("shuffle", [False, True, "batch"])
def test_files_are_read_in_the_order_of_arrays_in_memory(mapped, shuffle):
    x = X.astype("float64")
    found = []
    for parts in (
        (x, Y, X[:, 0]),
        (mapped(x), mapped(Y), mapped(X[:, 0])),
        (mapped(np.repeat(x, 2, 0))[::2], Y, X[:, 0]),
    ):
        keras.utils.set_random_seed(7)
        batches, _ = fit_data.prepare_data(
            classifier(), tuple(parts), None, target_batch=16, options={"shuffle": shuffle}
        )
        keras.utils.set_random_seed(7)
        batches.look()
        found.append([[part.numpy() for part in batch] for _ in range(2) for batch in batches])
        assert batches.num_batches == 3
        assert [spec.dtype for spec in batches.structure.specs] == [tf.float32, tf.int64, tf.float32]
    for other in found[1:]:
        for batch, expected in zip(other, found[0], strict=True):
            for part, expected_part in zip(batch, expected, strict=True):
                np.testing.assert_array_equal(part, expected_part)


def test_files_train_the_weights_of_arrays_in_memory(mapped):
    options = {"target_batch": 16, "micro_batch": 5, "shuffle": False, "verbose": 0}
    results = []
    for x, y in ((X, Y), (mapped(X), mapped(Y))):
        model = classifier()
        history = autobatch.fit(model, x, y, validation_split=0.25, **options)
        results.append((model.get_weights(), history.history))
    for one, other in zip(results[0][0], results[1][0], strict=True):
        np.testing.assert_array_equal(one, other)
    assert results[0][1] == results[1][1]


def test_class_weights_of_targets_in_a_file(mapped):
    found = []
    for x, y in ((X, Y), (mapped(X), mapped(Y))):
        options = {"shuffle": False, "class_weight": {1: 3.0}}
        batches, _ = fit_data.prepare_data(classifier(), x, y, target_batch=16, options=options)
        found.append(np.concatenate([weight.numpy() for _, _, weight in batches]))
    np.testing.assert_array_equal(found[0], np.where(Y == 1, 3.0, 1.0))
    np.testing.assert_array_equal(found[0], found[1])


# -- estimated


def uses_of(*data, target=16, **options):
    x, y = (*data, None)[:2]
    batches, _ = fit_data.prepare_data(classifier(), x, y, target_batch=target, options=options)
    return {use.name: use.held_bytes for use in batches.host_uses()}


def test_effective_batches_to_come_are_those_that_are_not_there_yet():
    x, y = np.zeros((100, 6), "float32"), np.zeros(100, "int64")
    sample_bytes = 6 * 4 + 8

    def to_come(data, target, samples):
        batches, _ = fit_data.prepare_data(classifier(), data, None, target_batch=target, options={"shuffle": False})
        batches.look()
        return batches.bytes_to_come(samples)

    assert to_come((x, y), 16, 5) == (3 * 16 - 5) * sample_bytes
    assert to_come((x, y), 16, sys.maxsize) == 2 * 16 * sample_bytes
    assert to_come((x, y), 64, 64) == 64 * sample_bytes  # two in an epoch
    assert to_come((x, y), 128, 40) == 60 * sample_bytes
    assert to_come((x, y), 128, 200) == 0
    assert to_come(((x[i : i + 8], y[i : i + 8]) for i in range(0, 96, 8)), 16, 5) == 0  # they are read from there


def test_arrays_are_copied_and_mapped_ones_are_not(tmp_path):
    in_flight = {"3 effective batches of 16 samples": 3 * 16 * SAMPLE_BYTES}
    copied_y = {"the copy of y as a tensor": 44 * 8}
    assert uses_of(X, Y) == {"the copy of x as a tensor": 44 * 16 * 4, **copied_y, **in_flight}
    assert uses_of(X.astype("float64"), Y)["the copy of x as a tensor"] == 44 * 16 * 4
    np.save(tmp_path / "x.npy", X)
    assert uses_of(np.load(tmp_path / "x.npy", mmap_mode="r"), Y) == {**copied_y, **in_flight}
    assert uses_of(tf.constant(X), tf.constant(Y)) == in_flight


def test_buffers_of_a_dataset():
    samples = tf.data.Dataset.from_tensor_slices((X, Y))
    found = uses_of(samples.cache().shuffle(1000).batch(7).shuffle(3).prefetch(4))
    assert found == {
        "3 effective batches of 16 samples": 3 * 16 * SAMPLE_BYTES,
        "prefetch(4)": 4 * 7 * SAMPLE_BYTES,
        "shuffle(3)": 3 * 7 * SAMPLE_BYTES,
        "shuffle(1000)": 44 * SAMPLE_BYTES,  # no more than there are
        "cache()": 44 * SAMPLE_BYTES,
    }
    assert uses_of(samples.repeat().shuffle(1000).batch(7), steps_per_epoch=2)["shuffle(1000)"] == 1000 * SAMPLE_BYTES


def test_a_cache_in_a_file_or_of_unknown_length_is_left_out(tmp_path):
    samples = tf.data.Dataset.from_tensor_slices((X, Y))
    assert "cache()" not in uses_of(samples.cache(str(tmp_path / "cache")).batch(7))
    assert "cache()" not in uses_of(samples.filter(lambda x, y: True).cache().batch(7))


def test_samples_of_varying_size_count_as_the_ones_looked_at():
    ragged = tf.ragged.constant([[1.0] * 10] * 20)
    found = uses_of(tf.data.Dataset.from_tensor_slices((ragged, Y[:20])).shuffle(8).batch(4))
    assert found["shuffle(8)"] == 8 * (10 * 4 + 8)


def test_queues_of_loaders():
    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return X[:10], Y[:10]

    found = uses_of(Batches(workers=2, max_queue_size=6))
    assert found["the PyDataset's queue (max_queue_size=6)"] == 6 * 10 * SAMPLE_BYTES


class Whole(keras.utils.PyDataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        return X, Y


def test_validation_is_counted_by_name(tmp_path):
    def found(validation_data=None, **options):
        uses = uses_of(X, Y, validation_data=validation_data, **options)
        return {name: held for name, held in uses.items() if name.startswith("validation")}

    samples = tf.data.Dataset.from_tensor_slices((X, Y))
    copied = {"validation: the copy of x as a tensor": 40 * 64, "validation: the copy of y as a tensor": 40 * 8}
    weights = {"validation: the copy of sample_weight as a tensor": 40 * 4}
    assert found() == {}
    assert found((X[:40], Y[:40])) == copied
    assert found((X[:40], Y[:40], X[:40, 0])) == {**copied, **weights}
    assert found(validation_split=1 / 4)["validation: the copy of y as a tensor"] == 11 * 8
    for buffered in (samples.cache().shuffle(400), samples.cache().shuffle(400).batch(8)):
        each = 44 * SAMPLE_BYTES
        assert found(buffered) == {"validation: shuffle(400)": each, "validation: cache()": each}
    # Of varying size: as large as those to train on.
    ragged = tf.data.Dataset.from_tensor_slices((tf.ragged.constant([[1.0] * 10] * 9), Y[:9])).batch(3).prefetch(2)
    assert found(ragged) == {"validation: prefetch(2)": 2 * 3 * SAMPLE_BYTES}
    queued = found(Whole(workers=2, max_queue_size=6))
    assert queued == {"validation: the PyDataset's queue (max_queue_size=6)": 6 * SAMPLE_BYTES}
    assert found(Whole()) == {}
    np.save(tmp_path / "x.npy", X)
    assert found((np.load(tmp_path / "x.npy", mmap_mode="r"), Y)) == {
        "validation: the copy of y as a tensor": 44 * 8,
    }


def test_workers_of_a_torch_loader_for_validation():
    torch = optional.torch()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.tensor(X)), batch_size=5, num_workers=2)
    assert uses_of(X, Y, validation_data=loader)["validation: the DataLoader's workers (4 batches)"] == (
        4 * 5 * SAMPLE_BYTES
    )


@pytest.mark.parametrize("micro_batch", ["auto", 5])
def test_the_report_of_a_training_lists_them(micro_batch):
    samples = tf.data.Dataset.from_tensor_slices((X, Y))
    history = autobatch.fit(
        classifier(),
        samples.shuffle(30).batch(4),
        target_batch=16,
        micro_batch=micro_batch,
        validation_data=samples.cache().shuffle(400).batch(8),
        verbose=0,
    )
    expected = {
        "3 effective batches of 16 samples": 3 * 16 * SAMPLE_BYTES,
        "shuffle(30)": 30 * SAMPLE_BYTES,
        "validation: shuffle(400)": 44 * SAMPLE_BYTES,
        "validation: cache()": 44 * SAMPLE_BYTES,
    }
    assert {use.name: use.held_bytes for use in history.report.host_uses} == expected
    assert json.loads(history.report.to_json())["host_uses"] == [
        {"name": name, "held_bytes": held} for name, held in expected.items()
    ]
    text = " ".join(render(history.report, width=500).split())
    assert "Data hold 11.7 KiB in host memory: 3.4 KiB 3 effective batches of 16 samples" in text
    assert "3.1 KiB validation: shuffle(400); 3.1 KiB validation: cache()" in text


@pytest.mark.parametrize(
    ("validation", "name"),
    [
        pytest.param((np.repeat(X, 20, 0), np.repeat(Y, 20)), "validation: the copy of x as a tensor", id="arrays"),
        pytest.param(
            tf.data.Dataset.from_tensor_slices((X, Y)).repeat(20).cache().shuffle(400).batch(8),
            r"validation: cache\(\) [0-9.]+ KiB, validation: shuffle\(400\)",
            id="dataset",
        ),
    ],
)
@pytest.mark.parametrize("arrays_given", [True, False])
def test_too_much_for_validation_is_warned_about_by_name(monkeypatch, arrays_given, validation, name):
    monkeypatch.setattr(limits, "all_limits", lambda device: (Limit(30_000, "cgroup v2 limit at /x"),))
    data = (X, Y) if arrays_given else (tf.data.Dataset.from_tensor_slices((X, Y)).batch(4),)
    with pytest.warns(autobatch.AutobatchWarning, match=rf"\({name} [0-9.]+ KiB, .*29.3 KiB \(cgroup v2") as warned:
        uses_of(*data, validation_data=validation)
    assert len(warned) == 1


@pytest.mark.parametrize("arrays_given", [True, False])
def test_too_much_is_warned_about_by_name_before_it_is_held(monkeypatch, arrays_given):
    monkeypatch.setattr(limits, "all_limits", lambda device: (Limit(2**10, "cgroup v2 limit at /x"), Limit(None, "?")))
    data = (X, Y) if arrays_given else (tf.data.Dataset.from_tensor_slices((X, Y)).shuffle(40).batch(4),)
    name = "the copy of x as a tensor" if arrays_given else r"shuffle\(40\)"
    with pytest.warns(autobatch.AutobatchWarning, match=rf"at least .*{name} [0-9.]+ KiB.*1 KiB \(cgroup v2") as warned:
        uses_of(*data)
    assert len(warned) == 1


def test_a_use_is_never_negative():
    with pytest.raises(ValueError, match="Received: -1"):
        HostUse("cache()", -1)


def test_elements_that_turn_out_to_be_taken_whole_are_counted_as_such():
    lengths = tf.data.Dataset.from_tensor_slices([3, 5, 4, 5]).map(lambda length: tf.zeros([8, length, 4]))
    for dataset, sample in (
        (tf.data.Dataset.from_tensor_slices(np.zeros((40, 16), "float32")).batch(8), 16 * 4),
        (lengths, 5 * 4 * 4),
        (lengths.unbatch().padded_batch(8), 5 * 4 * 4),
    ):
        batches = EffectiveBatches(dataset.shuffle(3).prefetch(2), target_batch=16, only_look=True)
        assert batches.host_uses()[0].name == "3 effective batches of 16 samples"
        with pytest.warns(autobatch.errors.AutobatchWarning, match="neither cut nor joined"):
            batches.keep_whole("It cannot be cut")
        uses = {use.name: use.held_bytes for use in batches.host_uses()}
        assert uses == {
            "3 effective batches of one element": 3 * 8 * sample,
            "prefetch(2)": 2 * 8 * sample,
            "shuffle(3)": 3 * 8 * sample,
        }
