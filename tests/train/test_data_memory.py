"""Host memory: what is really held while training reads a file or a stream, and what is estimated beforehand."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from models import arrays, classifier

import autobatch
from autobatch.memory import limits
from autobatch.records import HostUse, Limit
from autobatch.train import session

MEASURE = """
import json, re, sys
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

small = np.zeros((1000, 1024), "float32")
train(small, small[:, :4], validation_split=0.5)  # whatever a first training needs is there now

rows = 100_000  # 400 MB in a file of holes
mapped = np.memmap(sys.argv[1], dtype="float64", mode="w+", shape=(rows // 2, 1024))
before = anonymous_bytes()
held = train(mapped, np.zeros((rows // 2, 4), "float32"), validation_split=0.001, steps_per_epoch=20)
of_file = max(held) - before

def stream():
    for start in range(120):  # 240 MB in all
        yield np.random.uniform(size=(500, 1024)).astype("float32"), np.zeros((500, 4), "float32")

held = train(stream(), steps_per_epoch=240)
print(json.dumps({"file": of_file, "stream": max(held[60:]) - max(held[:60]), "updates": len(held)}))
"""


def test_host_memory_stays_flat(tmp_path):
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEASURE), str(tmp_path / "samples")],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    measured = json.loads(ran.stdout.splitlines()[-1])
    assert measured["updates"] == 240
    assert measured["file"] < 60 * 2**20  # of 400 MB
    assert measured["stream"] < 30 * 2**20  # of 180 MB that pass through


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
        batches, _ = session.prepare_data(
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
        batches, _ = session.prepare_data(classifier(), x, y, target_batch=16, options=options)
        found.append(np.concatenate([weight.numpy() for _, _, weight in batches]))
    np.testing.assert_array_equal(found[0], np.where(Y == 1, 3.0, 1.0))
    np.testing.assert_array_equal(found[0], found[1])


# -- estimated


def uses_of(*data, target=16, **options):
    x, y = (*data, None)[:2]
    batches, _ = session.prepare_data(classifier(), x, y, target_batch=target, options=options)
    return {use.name: use.held_bytes for use in batches.host_uses()}


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
