"""Every difference between the versions that are admitted does what its name says, in the version that is here."""

from __future__ import annotations

from collections import OrderedDict

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras_version import KERAS
from models import arrays, classifier

import autobatch
from autobatch.seams import versions

NESTS = (
    None,
    1,
    [],
    {"b": 1, "a": (2, [None, 3])},
    (1, {"x": {}, "y": [4]}),
    OrderedDict([("b", 1), ("a", 2)]),
    [tf.RaggedTensor.from_row_lengths([1, 2], [2]), np.zeros(2)],
)


@pytest.mark.parametrize("nest", NESTS, ids=range(len(NESTS)))
def test_leaves_come_with_their_paths_in_the_order_of_keras(nest):
    found = versions.leaves_with_paths(nest)
    walked = list(versions._walked(nest, ()))
    assert [path for path, _ in found] == [path for path, _ in walked]
    for leaves in (found, walked):
        assert all(leaf is flat for (_, leaf), flat in zip(leaves, keras.tree.flatten(nest), strict=True))
    for path, leaf in found:
        part = nest
        for key in path:
            part = part[key]
        assert part is leaf


def test_several_devices_are_refused_in_a_sentence_by_a_keras_that_is_too_old_for_them():
    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        model = classifier()
    if KERAS >= (3, 10):
        assert not versions.why_not_on_several_devices()
        autobatch.fit(model, *arrays(), target_batch=24, micro_batch=12, verbose=0)
        return
    with pytest.raises(ValueError, match=rf"needs Keras 3.10 or newer.*Received: Keras {keras.__version__}"):
        autobatch.fit(model, *arrays(), target_batch=24, micro_batch=12, verbose=0)


def test_validation_data_that_begin_anew_are_said_by_a_keras_that_hides_its_passes():
    why = versions.why_validation_begins_anew()
    assert bool(why) == (KERAS < (3, 7))
    assert why == "" or why.endswith(f"Received: Keras {keras.__version__}")
