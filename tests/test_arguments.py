"""Every bad argument is refused before anything runs, with a message that names the value and the remedy."""

from __future__ import annotations

import warnings

import keras
import numpy as np
import pytest
from models import arrays, classifier

import autobatch
from autobatch.units import headroom_share, less_headroom

NOT_WHOLE = [2.5, True, "256", None, [1]]


@pytest.fixture
def untouched():
    model = classifier("adam")
    before = [weight.copy() for weight in model.get_weights()]
    yield model
    for left, right in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(left, right)
    assert not model.optimizer.built
    assert model.train_function is None


@pytest.mark.parametrize("function", [autobatch.fit, autobatch.tune])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        *[
            ({"target_batch": value}, TypeError, r"target_batch must be a whole number.*Received")
            for value in NOT_WHOLE[:3]
        ],
        ({"target_batch": 0}, ValueError, "target_batch must be a whole number of at least 1.*Received: 0"),
        ({"target_batch": -1}, ValueError, "Received: -1"),
        ({"target_batch": 8, "memory_limit": "lots"}, ValueError, "memory_limit.*Received: 'lots'"),
        ({"target_batch": 8, "memory_limit": 0}, ValueError, "memory_limit.*Received: 0"),
        ({"target_batch": 8, "memory_limit": -5}, ValueError, "memory_limit.*Received: -5"),
        (
            {"target_batch": 8, "memory_limit": 2**63},
            ValueError,
            "memory_limit must be less than 8 EiB.*Received: 9223",
        ),
        ({"target_batch": 8, "memory_limit": "9999999999TB"}, ValueError, "must be less than 8 EiB.*Received: '9999"),
        ({"target_batch": 8, "memory_limit": 1.5}, TypeError, "memory_limit.*Received: 1.5"),
        ({"target_batch": 8, "headroom": 1}, ValueError, "headroom.*Received: 1"),
        ({"target_batch": 8, "headroom": -0.1}, ValueError, "headroom.*Received: -0.1"),
        ({"target_batch": 8, "headroom": float("nan")}, ValueError, "headroom.*Received: nan"),
        ({"target_batch": 8, "headroom": "5%"}, TypeError, "headroom.*Received: '5%'"),
        ({"target_batch": 8, "headroom": "500"}, TypeError, "headroom.*\"500MiB\".*Received: '500'"),
        ({"target_batch": 8, "headroom": "5 apples"}, ValueError, "headroom.*\"500MiB\".*Received: '5 apples'"),
        ({"target_batch": 8, "headroom": "0 MiB"}, ValueError, "headroom.*Received: '0 MiB'"),
        (
            {"target_batch": 8, "headroom": "2GiB", "memory_limit": "1GiB", "cache": False},
            ValueError,
            "headroom must leave something of the limit, which is 1 GiB .*Received: 2 GiB",
        ),
        ({"target_batch": 8, "cache": "/tmp"}, TypeError, "cache must be True or False.*AUTOBATCH_CACHE_DIR.*'/tmp'"),
    ],
    ids=str,
)
def test_numbers(untouched, function, arguments, error, message):
    with pytest.raises(error, match=message):
        function(untouched, *arrays(), **arguments)


def test_headroom_in_bytes():
    assert (less_headroom(1000, 0.25), less_headroom(1000, 250), less_headroom(1000, 2000)) == (750, 750, 0)
    assert (headroom_share(1000, 0.25), headroom_share(1000, 250), headroom_share(None, 250)) == (0.25, 0.25, 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", autobatch.AutobatchWarning)  # this CPU's allocator keeps no figures
        limits = {"memory_limit": "1GiB", "headroom": "64 MiB"}
        report = autobatch.tune(classifier(), *arrays(), target_batch=8, cache=False, **limits)
        history = autobatch.fit(
            classifier(), *arrays(), target_batch=8, micro_batch=4, cache=False, verbose=0, **limits
        )
    for environment in (report.environment, history.report.environment):
        assert environment.budget_bytes == 2**30 - 2**26
        assert (environment.headroom, environment.headroom_bytes) == (0.0625, 2**26)
    assert "960 MiB, the limit less 64 MiB (6.25 % headroom)" in str(report)
    assert autobatch.Report.from_json(report.to_json()) == report
    assert autobatch.tune(classifier(), *arrays(), target_batch=8, cache=False).environment.headroom_bytes is None
    with pytest.raises(ValueError, match="headroom must leave something of the limit.*Received: 4096 TiB"):
        autobatch.tune(classifier(), *arrays(), target_batch=8, headroom="4096TiB", cache=False)


def test_target_batch_none(untouched):
    with pytest.raises(TypeError, match="target_batch must be a whole number.*Received: None"):
        autobatch.fit(untouched, *arrays(), target_batch=None)


@pytest.mark.parametrize("value", [0, -3, 2.5, True, "all", None])
def test_micro_batch(untouched, value):
    with pytest.raises((TypeError, ValueError), match="micro_batch must be .*Received: "):
        autobatch.fit(untouched, *arrays(), target_batch=8, micro_batch=value)


def test_batch_size_is_refused_with_its_remedy(untouched):
    with pytest.raises(TypeError, match="batch_size is not an option.*Pass target_batch instead.*batch_size=32"):
        autobatch.fit(untouched, *arrays(), target_batch=8, batch_size=32)


def test_an_unknown_option_is_refused_before_the_search(untouched):
    with pytest.raises(TypeError, match="epochz"):
        autobatch.fit(untouched, *arrays(), target_batch=8, epochz=3)


@pytest.mark.parametrize("function", [autobatch.fit, autobatch.tune])
def test_a_model_that_is_none_or_is_not_compiled(function):
    with pytest.raises(TypeError, match="model must be a Keras model. Received: 'resnet'"):
        function("resnet", *arrays(), target_batch=8)
    with pytest.raises(ValueError, match=r"not compiled: call model.compile\(optimizer, loss\) first"):
        function(keras.Sequential([keras.layers.Dense(2)]), *arrays(), target_batch=8)


def test_tune_does_not_use_up_a_generator(untouched):
    x, y = arrays()
    generator = ((x[i : i + 8], y[i : i + 8]) for i in range(0, 48, 8))
    with pytest.raises(ValueError, match="A generator can be read only once"):
        autobatch.tune(untouched, generator, target_batch=8)
    assert len(list(generator)) == 6


def test_a_target_larger_than_the_data_set_is_warned_about():
    model = classifier()
    x, y = arrays(samples=40)
    with pytest.warns(autobatch.AutobatchWarning, match="target_batch=64 is larger than the data set.*40 samples"):
        history = autobatch.fit(model, x, y, target_batch=64, epochs=2, verbose=0)
    assert history.plan.effective_batch == 40
    assert int(model.optimizer.iterations.numpy()) == 2
