"""A second fit confirms what the first one found, with one trial; whatever changes memory leads to a new search."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import layers
from models import SAMPLES, MemoryHog, arrays, classifier

import autobatch
from autobatch.cache.folder import cache_folder
from autobatch.cache.store import ResultStore
from autobatch.trial.live_trials import LiveTrials

# Not held to without an arena, but the same in each run: what is free on the host is not.
LIMIT = "512MiB"
room = {"samples": 21}

pytestmark = pytest.mark.filterwarnings("ignore::autobatch.AutobatchWarning")


def too_many(samples):
    return samples > room["samples"]


@pytest.fixture(autouse=True)
def enough_room(monkeypatch):
    monkeypatch.setitem(room, "samples", 21)


# Where it is not about models that are made alike, one is searched for again and again: its step is traced once.
def model(optimizer="adam", **compile_options):
    return classifier(optimizer, extra=[MemoryHog(too_many)], **compile_options)


def tune(of, *, samples=SAMPLES, features=16, **options):
    data = arrays(samples=samples, features=features)
    return autobatch.tune(of, *data, **{"target_batch": 40, "memory_limit": LIMIT, **options})


def is_remembered(report):
    return report.stopped_because.startswith("remembered from ")


def entries():
    return ResultStore(cache_folder()).entries()


def test_a_second_fit_runs_one_trial():
    options = {"target_batch": 40, "memory_limit": LIMIT, "verbose": 0, "shuffle": False}
    first = autobatch.fit(model(), *arrays(), **options)
    assert len(first.report.trials) > 1
    again = autobatch.fit(model(), *arrays(), **options)
    (trial,) = again.report.trials
    assert trial.fits
    assert trial.micro_batch == again.report.largest_fit == again.plan.micro_batch == first.plan.micro_batch
    assert again.plan == first.plan
    assert again.report.memory_model == first.report.memory_model
    assert again.report.smallest_failure is None
    assert is_remembered(again.report)
    assert "confirmed with one trial" in again.report.stopped_because
    assert len(entries()) == 1


def test_the_trial_that_confirms_is_measured_as_the_search_was(monkeypatch):
    # By what was asked for: the chunks that were given may be larger, and what fits would look as if it did not.
    recorded = []
    run = LiveTrials.run
    monkeypatch.setattr(
        LiveTrials, "run", lambda self, request: recorded.append(request.record_allocations) or run(self, request)
    )
    of = model()
    searched = len(tune(of).trials)
    assert is_remembered(tune(of))
    assert recorded == [True] * (searched + 1)


def test_a_confirmed_fit_trains_as_a_searched_one():
    options = {"target_batch": 40, "memory_limit": LIMIT, "verbose": 0, "shuffle": False, "epochs": 2}
    searched, confirmed = model(), model()
    first = autobatch.fit(searched, *arrays(), **options)
    second = autobatch.fit(confirmed, *arrays(), **options)
    assert is_remembered(second.report)
    for left, right in zip(searched.get_weights(), confirmed.get_weights(), strict=True):
        np.testing.assert_array_equal(left, right)
    assert first.history == second.history


def test_without_the_cache_every_fit_searches_and_nothing_is_written():
    of = model()
    first, second = (tune(of, cache=False) for _ in range(2))
    assert len(first.trials) == len(second.trials) > 1
    assert not cache_folder().exists()


@pytest.mark.slow
def test_what_is_another_training_and_what_is_not():
    assert not is_remembered(tune(model()))
    same = {
        "the same": model(),
        "another learning rate": model(keras.optimizers.Adam(0.5)),
        "a schedule": model(keras.optimizers.Adam(keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9))),
    }
    for name, again in same.items():
        assert is_remembered(tune(again)), name
    assert len(entries()) == 1
    others = {
        "another optimizer": (model("sgd"), {}),
        "slots": (model(keras.optimizers.Adam(amsgrad=True)), {}),
        "an average of the weights": (model(keras.optimizers.Adam(use_ema=True)), {}),
        "another loss": (model(loss="mse"), {}),
        "frozen weights": (frozen(), {}),
        "a layer more": (classifier("adam", extra=[layers.Dense(32), MemoryHog(too_many)]), {}),
        "XLA": (model(jit_compile=True), {}),
        "a limit": (model(), {"memory_limit": "520MiB"}),
        "headroom": (model(), {"headroom": 0.1}),
        "a target": (model(), {"target_batch": 41}),
        "no target": (model(), {"target_batch": None}),
        "an objective": (model(), {"objective": "largest"}),
        "proof": (model(), {"exact": True}),
    }
    digests = {name: key_of(other, **options) for name, (other, options) in others.items()}
    digests["the same"] = key_of(model())
    digests["no hog"] = key_of(classifier("adam"))
    digests["input shape"] = key_of(wide(), features=24)
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        digests["precision"] = key_of(classifier("adam"))
    finally:
        keras.config.set_dtype_policy("float32")
    assert len(set(digests.values())) == len(digests), digests


def key_of(of, *, features=16, target_batch=40, memory_limit=LIMIT, headroom=0.05, objective="throughput", exact=False):
    """The key alone, without the search that would follow."""
    from autobatch.cache.key import make_key
    from autobatch.opening import open_trials
    from autobatch.units import parse_bytes

    limit_bytes = parse_bytes(memory_limit)
    data = arrays(features=features)
    trials = open_trials(of, *data, target_batch=target_batch, memory_limit_bytes=limit_bytes, headroom=headroom)
    useful = trials.largest_useful
    what = {"target_batch": target_batch, "largest_useful": useful, "objective": objective, "exact": exact}
    return make_key(trials.content, trials.environment, **what).digest


def frozen():
    made = model()
    made.layers[0].trainable = False
    made.compile("adam", made.loss)
    return made


def wide():
    made = keras.Sequential([keras.Input((24,)), layers.Dense(32), MemoryHog(too_many), layers.Dense(10)])
    made.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return made


def test_a_size_that_fits_no_more_leads_to_a_search_that_replaces_it():
    options = {"objective": "largest"}  # else how long a small step takes decides which size is remembered
    of = model()
    before = tune(of, **options)
    room["samples"] = 9
    after = tune(of, **options)
    assert not is_remembered(after)
    assert [trial for trial in after.trials if trial.micro_batch == before.plan.micro_batch and not trial.fits]
    sizes = [trial.micro_batch for trial in after.trials]
    assert len(sizes) == len(set(sizes)), "a size that had just failed was run again"
    assert after.plan.micro_batch <= 9
    (entry,) = entries()
    assert entry.micro_batch == after.plan.micro_batch
    assert is_remembered(tune(of, **options))


def test_when_nothing_fits_any_more_the_error_is_that_of_a_search():
    of = model()
    tune(of)
    room["samples"] = 0
    with pytest.raises(autobatch.NoFeasibleBatchError, match="Not even a micro-batch of 1 fits"):
        tune(of)


def test_a_proof_is_remembered_with_its_limit():
    of = model()
    first = tune(of, exact=True, target_batch=None)
    assert (first.largest_fit, first.smallest_failure) == (21, 22)
    again = tune(of, exact=True, target_batch=None)
    assert [trial.micro_batch for trial in again.trials] == [21]
    assert (again.largest_fit, again.smallest_failure) == (21, 22)
    assert "that 22 does not fit was shown then" in again.stopped_because
    assert not is_remembered(tune(of, target_batch=None))  # and the other way round


def test_a_search_that_was_cut_short_is_not_remembered():
    of = model()
    assert len(tune(of, max_trials=2).trials) == 2
    with contextlib.suppress(autobatch.NoFeasibleBatchError):  # the one trial that is run may be too large
        tune(of, max_seconds=1e-3)
    assert entries() == ()
    tune(of, max_trials=50, max_seconds=1000)
    assert len(entries()) == 1
    assert len(tune(of, max_trials=1).trials) == 1  # that of confirming


def test_a_given_micro_batch_neither_reads_nor_writes():
    autobatch.fit(model(), *arrays(), target_batch=40, micro_batch=20, memory_limit=LIMIT, verbose=0)
    assert not cache_folder().exists()


def test_a_broken_file_does_not_stop_a_fit():
    folder = cache_folder()
    folder.mkdir(parents=True)
    ResultStore(folder).path.write_bytes(b"broken" * 100)
    of = model()
    with pytest.warns(autobatch.AutobatchWarning, match="was renamed"):
        assert not is_remembered(tune(of))
    assert is_remembered(tune(of))


class Subclassed(keras.Model):
    def __init__(self, units):
        super().__init__()
        self.inner = layers.Dense(units)
        self.hog = MemoryHog(too_many)
        self.outer = layers.Dense(10)
        self.untold = {"a": object()}  # nothing that a configuration could hold

    def call(self, inputs):
        return self.outer(self.hog(self.inner(inputs)))


class Stepping(Subclassed):
    def train_step(self, data):
        return super().train_step(data)


def compiled(made):
    made.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return made


def test_a_subclassed_model_is_known_before_and_after_it_was_built():
    first = compiled(Subclassed(8))
    assert not is_remembered(tune(first))
    assert is_remembered(tune(compiled(Subclassed(8))))
    assert is_remembered(tune(first))
    assert key_of(compiled(Subclassed(9))) != key_of(compiled(Subclassed(8)))
    assert key_of(compiled(Stepping(8))) != key_of(compiled(Subclassed(8)))


def test_a_loop_of_ones_own_remembers_too():
    x, y = arrays()

    def step_of(made):
        loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

        def train_step(batch):
            import tensorflow as tf

            with tf.GradientTape() as tape:
                loss = loss_of(batch[1], made(batch[0], training=True))
            made.optimizer.apply(tape.gradient(loss, made.trainable_variables), made.trainable_variables)
            return loss

        options = {"model": made, "optimizer": made.optimizer, "target_batch": SAMPLES, "memory_limit": LIMIT}
        return autobatch.wrap_step(train_step, **options)

    first, second = step_of(model()), step_of(model())
    losses = [float(step((x, y))) for step in (first, second)]
    assert not is_remembered(first.report)
    assert is_remembered(second.report)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


_OTHER_PROCESS = """
import sys
import keras
from models import classifier, MemoryHog
from keras import layers
sys.path.insert(0, sys.argv[1])
import test_remembered_fit as t
keras.layers.Dense(1)  # names are counted on
print(t.key_of(t.model()))
print(t.key_of(t.compiled(t.Subclassed(8))))
"""


@pytest.mark.slow
def test_another_process_knows_it_by_the_same_key():
    here = os.path.dirname(__file__)
    folder, root = os.path.dirname(here), os.path.dirname(os.path.dirname(autobatch.__file__))
    path = os.pathsep.join([os.path.join(folder, "lean_children"), folder, root])
    known = []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", _OTHER_PROCESS, here]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        known.append(done.stdout.split())
    assert known[0] == known[1] == [key_of(model()), key_of(compiled(Subclassed(8)))]
