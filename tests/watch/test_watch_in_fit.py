"""``fit`` watches memory unless told not to, and leaves a watch of the user's own in place."""

from __future__ import annotations

import pytest
from models import arrays, classifier

import autobatch


@pytest.fixture
def begun(monkeypatch):
    """The watches whose training began."""
    watches = []
    original = autobatch.MemoryWatch.on_train_begin

    def on_train_begin(self, logs=None):
        watches.append(self)
        original(self, logs)

    monkeypatch.setattr(autobatch.MemoryWatch, "on_train_begin", on_train_begin)
    return watches


def fit(**options):
    return autobatch.fit(classifier(), *arrays(samples=64), target_batch=32, micro_batch=16, verbose=0, **options)


def test_by_default(begun):
    fit()
    assert len(begun) == 1
    assert len(begun[0].samples) == 1


def test_told_not_to(begun):
    fit(memory_watch=False)
    assert begun == []


def test_one_of_the_users_own(begun):
    own = autobatch.MemoryWatch()
    fit(callbacks=[own])
    assert begun == [own]
