"""Warnings stand at the user's own line, however deep in autobatch or in Keras they are made."""

from __future__ import annotations

import inspect
import linecache
import os
import subprocess
import sys
import warnings
from pathlib import Path

import keras
import pytest
from models import SAMPLES, arrays, classifier

import autobatch
from autobatch.errors import warn


@pytest.fixture
def caught():
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield found


def lines_of(caught):
    """The source lines that autobatch's warnings stand at, all of them of this file."""
    own = [each for each in caught if each.category is autobatch.AutobatchWarning]
    assert own
    assert {each.filename for each in own} == {__file__}
    return [linecache.getline(each.filename, each.lineno).strip() for each in own]


def dropping_out(**options):
    return classifier(extra=[keras.layers.Dropout(0.5)], **options)


def test_of_a_fit(caught):
    model = dropping_out()
    autobatch.fit(model, *arrays(), target_batch=SAMPLES, micro_batch=12, verbose=0)
    assert all(line.startswith("autobatch.fit(") for line in lines_of(caught))


def test_of_a_tune_on_fewer_samples_than_the_target(caught):
    model = classifier()
    autobatch.tune(model, *arrays(), target_batch=10 * SAMPLES, cache=False)
    assert all(line.startswith("autobatch.tune(") for line in lines_of(caught))


def test_of_a_loop_of_ones_own(caught):
    model = dropping_out()
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def train_step(batch):
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss = loss_of(batch[1], model(batch[0], training=True))
        model.optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
        return loss

    step = autobatch.wrap_step(train_step, model=model, optimizer=model.optimizer, target_batch=SAMPLES, micro_batch=12)
    step(arrays())
    assert lines_of(caught) == ["step(arrays())"]


def test_repeated_at_one_line_it_is_shown_once():
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("default")
        for _ in range(3):
            warn("again")
        warn("again")
    assert [str(each.message) for each in found] == ["again", "again"]
    assert found[0].lineno + 1 == found[1].lineno == inspect.currentframe().f_lineno - 2


@pytest.mark.parametrize("name", [None, "__main__"])
def test_code_without_a_name_is_warned_as_well(caught, name):
    namespace = {"warn": warn} if name is None else {"warn": warn, "__name__": name}
    exec(compile("warn('said')", "<ipython-input-1>", "exec"), namespace)
    assert [(str(each.message), each.filename, each.lineno) for each in caught] == [("said", "<ipython-input-1>", 1)]


def test_through_a_link_and_through_packages_it_is_still_the_users_line(tmp_path):
    (tmp_path / "linked").symlink_to(Path(autobatch.__file__).parents[1])
    packages = tmp_path / "somewhere" / "site-packages"
    packages.mkdir(parents=True)
    (packages / "a_library.py").write_text("def call(function):\n    function('said')\n")
    program = tmp_path / "program.py"
    program.write_text("import a_library\nfrom autobatch.errors import warn\n\na_library.call(warn)\n")
    paths = os.pathsep.join([str(tmp_path / "linked"), str(packages)])
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, check=True, env=environment)
    assert f"{program}:4: AutobatchWarning: said" in done.stderr
