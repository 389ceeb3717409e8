"""Replacements hold for the thread that made them, end in any order, and leave the attribute as it was."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import json
import random
import subprocess
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import keras
import numpy as np
import optional
import pytest
from models import arrays, classifier

import autobatch
from autobatch.seams import patching
from autobatch.seams.patching import replaced, replaced_in_each, suspended

SCRIPT = Path(__file__).parents[1] / "integration" / "replaced_on_replicas.py"


def saying(word):
    """Makes what returns ``word`` before the words of the original."""
    return lambda original: lambda *arguments: (word, *original(*arguments))


class Base:
    def inherited(self):
        """Say it."""
        return ()

    def own(self):
        return ()

    @property
    def read(self):
        return ()

    @read.setter
    def read(self, value):
        self.written = value


class Derived(Base):
    def own(self):
        return ()


def on_an_instance(with_an_own):
    owner = Derived()
    if with_an_own:
        owner.own = lambda: ()
    return owner, "own", lambda: owner.own()


def of_a_module():
    module = types.ModuleType("some_module")
    module.function = lambda: ()
    return module, "function", lambda: module.function()


KINDS = {
    "class": lambda: (Derived, "own", lambda: Derived().own()),
    "inherited": lambda: (Derived, "inherited", lambda: Derived().inherited()),
    "property": lambda: (Base, "read", lambda: Derived().read),
    "inherited property": lambda: (Derived, "read", lambda: Derived().read),
    "instance": lambda: on_an_instance(True),
    "instance of a class": lambda: on_an_instance(False),
    "module": of_a_module,
}


@pytest.fixture(params=KINDS)
def attribute(request):
    owner, name, call = KINDS[request.param]()
    before = dict(vars(owner))
    yield owner, name, call
    assert_as_before(owner, before)


def assert_as_before(owner, before):
    now = dict(vars(owner))
    assert now.keys() == before.keys()
    assert all(now[name] is before[name] for name in now)
    assert not [key for key, place in patching._PLACES.items() if place._owner is owner]


@pytest.fixture
def threads():
    """Two threads that each run what they are given."""
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        yield first, second


def test_one_replacement_and_one_within_it(attribute):
    owner, name, call = attribute
    with replaced(owner, name, saying("outer")):
        assert call() == ("outer",)
        with replaced(owner, name, saying("inner")):
            assert call() == ("inner", "outer")
        assert call() == ("outer",)
    assert call() == ()


def orders():
    """Every order in which two replacements of one thread and one of another can begin and end."""
    events = [(kind, word) for word in ("a1", "a2", "b1") for kind in ("begin", "end")]
    for order in itertools.permutations(events):
        if all(order.index(("begin", word)) < order.index(("end", word)) for word in ("a1", "a2", "b1")):
            yield order


def test_replacements_begin_and_end_in_every_order_on_two_threads(attribute, threads):
    owner, name, call = attribute
    before = dict(vars(owner))
    for order in orders():
        current, contexts = {"a": [], "b": []}, {}
        thread_of = dict(zip("ab", threads, strict=True))
        for kind, word in order:
            thread, words = thread_of[word[0]], current[word[0]]
            if kind == "begin":
                contexts[word] = replaced(owner, name, saying(word))
                thread.submit(contexts[word].__enter__).result()
                words.insert(0, word)
            else:
                thread.submit(contexts[word].__exit__, None, None, None).result()
                words.remove(word)
            for letter in "ab":
                assert thread_of[letter].submit(call).result() == tuple(current[letter]), order
            assert call() == ()
        assert_as_before(owner, before)


def test_a_replacement_that_another_thread_ends_ends_on_its_own(threads):
    owner, name, call = KINDS["class"]()
    context = replaced(owner, name, saying("a"))
    first, second = threads
    first.submit(context.__enter__).result()
    with replaced(owner, name, saying("here")):
        second.submit(context.__exit__, None, None, None).result()
        assert first.submit(call).result() == ()
        assert call() == ("here",)


def test_suspended_leaves_the_original_and_what_is_replaced_within(attribute):
    owner, name, call = attribute
    with replaced(owner, name, saying("outer")), replaced(owner, name, saying("middle")):
        with suspended():
            assert call() == ()
            with replaced(owner, name, saying("inner")):
                assert call() == ("inner",)  # its original is what was there without any
                with suspended():
                    assert call() == ()
            assert call() == ()
        assert call() == ("middle", "outer")


def test_an_original_that_is_kept_is_the_original_when_all_has_ended():
    owner, name, call = KINDS["class"]()
    kept = []
    with replaced(owner, name, saying("outer")):
        with replaced(owner, name, lambda original: kept.append(original) or original):
            assert kept[0](None) == call() == ("outer",)
        assert kept[0](None) == ("outer",)
    assert kept[0](None) == ()
    with replaced(owner, name, lambda original: kept.append(original) or original):
        assert kept[1] is Derived.__dict__["own"].__wrapped__  # nothing is between: AutoGraph looks into it


def test_an_exception_ends_a_replacement(attribute):
    owner, name, call = attribute

    def fail(*_):
        raise KeyError(name)

    with pytest.raises(KeyError), replaced(owner, name, saying("outer")), replaced(owner, name, lambda _: fail):
        call()
    assert call() == ()
    with replaced(owner, name, saying("outer")):
        with pytest.raises(KeyError), replaced(owner, name, fail):
            pass
        assert call() == ("outer",)
    with pytest.raises(KeyError), replaced(owner, name, fail):
        pass


def test_what_is_missing_is_said_by_name():
    with pytest.raises(AttributeError, match="gone"), replaced(Derived, "gone", saying("a")):
        pass
    assert not [place for place in patching._PLACES.values() if place._owner is Derived]


def test_what_somebody_else_puts_there_meanwhile_stays_and_can_be_replaced(attribute):
    owner, name, call = attribute
    found = vars(owner).get(name)
    is_property = isinstance(inspect.getattr_static(owner, name), property)
    with replaced(owner, name, saying("ours")):
        put = vars(owner)[name]
        wrapped = saying("theirs")(put.fget if is_property else put)
        theirs = property(wrapped) if is_property else wrapped
        setattr(owner, name, theirs)
        assert call() == ("theirs", "ours")
        with replaced(owner, name, saying("on top")):
            assert call() == ("on top", "theirs", "ours")
        assert vars(owner)[name] is theirs
    assert vars(owner)[name] is theirs
    assert call() == ("theirs",)
    with replaced(owner, name, saying("later")):
        assert call() == ("later", "theirs")
    assert vars(owner)[name] is theirs
    delattr(owner, name) if found is None else setattr(owner, name, found)


def test_a_property_keeps_its_setter_and_a_function_its_name():
    with replaced(Base, "read", saying("a")), replaced(Derived, "inherited", saying("a")):
        instance = Derived()
        instance.read = 3
        assert instance.written == 3
        assert Derived.inherited.__name__ == "inherited"
        assert Derived.inherited.__doc__ == "Say it."


def test_a_subclass_replaced_inside_of_its_class(threads):
    """What a class inherits may be somebody's replacement when it is replaced itself."""
    first, second = threads
    outer, inner = replaced(Base, "inherited", saying("base")), replaced(Derived, "inherited", saying("derived"))
    call = Derived().inherited
    first.submit(outer.__enter__).result()
    second.submit(inner.__enter__).result()
    assert first.submit(lambda: Derived().inherited()).result() == ("base",)
    assert second.submit(lambda: Derived().inherited()).result() == ("derived",)
    first.submit(outer.__exit__, None, None, None).result()
    assert second.submit(lambda: Derived().inherited()).result() == ("derived",)
    second.submit(inner.__exit__, None, None, None).result()
    assert call() == ()
    assert "inherited" not in vars(Derived)


def test_on_every_thread_holds_everywhere_until_it_ends(attribute, threads):
    owner, name, call = attribute
    first, second = threads
    with replaced(owner, name, saying("mine")):
        with replaced(owner, name, saying("all"), on_every_thread=True):
            assert call() == ("all", "mine")
            assert first.submit(call).result() == ("all",)
            with suspended():
                assert call() == ("all",)
            own = replaced(owner, name, saying("first"))
            first.submit(own.__enter__).result()
            assert first.submit(call).result() == ("first", "all")
            assert second.submit(call).result() == ("all",)
        assert first.submit(call).result() == ("first",)
        assert second.submit(call).result() == ()
        assert call() == ("mine",)
        first.submit(own.__exit__, None, None, None).result()


def test_several_owners_are_replaced_and_put_back():
    before = [dict(vars(owner)) for owner in (Base, Derived)]
    with replaced_in_each((Base, Derived), "own", saying("a")):
        assert Base().own() == Derived().own() == ("a",)
    for owner, attributes in zip((Base, Derived), before, strict=True):
        assert_as_before(owner, attributes)


def test_many_threads_replace_and_call_at_once():
    owner, name, call = KINDS["class"]()
    before, interval, failures = dict(vars(owner)), sys.getswitchinterval(), []

    def run(word):
        chooser = random.Random(word)
        try:
            for _ in range(300):
                words = [f"{word}.{number}" for number in range(chooser.randrange(4))]
                with contextlib.ExitStack() as stack:
                    for each in words:
                        stack.enter_context(replaced(owner, name, saying(each)))
                        call()
                    assert call() == tuple(reversed(words))
                    with suspended():
                        assert call() == ()
                assert call() == ()
        except BaseException as error:  # noqa: BLE001 - a thread's failure is the test's
            failures.append(error)

    sys.setswitchinterval(1e-6)
    try:
        running = [threading.Thread(target=run, args=(number,)) for number in range(8)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failures
    assert_as_before(owner, before)


class Waiting(keras.layers.Layer):
    """Lets another fit run from beginning to end while its own is traced, within what it has replaced."""

    meanwhile = None

    def call(self, inputs):
        if self.meanwhile is not None and hasattr(keras.layers.Layer.add_loss, "__wrapped__"):
            thread = threading.Thread(target=self.meanwhile, daemon=True)
            self.meanwhile = None
            thread.start()
            thread.join(120)
            self.ended = not thread.is_alive()
        return inputs


def test_a_fit_traces_trains_and_ends_while_another_is_traced():
    x, y = arrays()

    def fit(model):
        labels = keras.utils.to_categorical(y, 10) if model.loss == "mse" else y
        return autobatch.fit(model, x, labels, target_batch=24, micro_batch=8, shuffle=False, verbose=0).history

    def make():
        inner = classifier("sgd", "mse", seed=2, metrics=["mae", keras.metrics.RootMeanSquaredError()])
        return classifier("adam", extra=[Waiting(), keras.layers.BatchNormalization()]), inner

    alone, apart = make()
    expected = fit(apart), fit(alone)
    outer, inner = make()
    logs = []
    outer.layers[1].meanwhile = lambda: logs.append(fit(inner))
    logs.append(fit(outer))
    assert outer.layers[1].ended
    for logged, known in zip(logs, expected, strict=True):
        assert logged.keys() == known.keys()
        assert all(np.allclose(logged[name], known[name], rtol=1e-5) for name in known)
    for ours, own in ((outer, alone), (inner, apart)):
        for weight, other in zip(ours.get_weights(), own.get_weights(), strict=True):
            np.testing.assert_allclose(weight, other, rtol=1e-5, atol=1e-6)
    assert not patching._PLACES


def test_replicas_are_traced_inside_of_replacements():
    optional.several_devices()
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    replicas = [["replica 0", "own"], ["replica 1", "own"]]
    assert found["by_hand"] == {"seen": [["outside", "own"], ["own"], ["own"], *replicas], "put_back": True}
    assert found["fit"]["weights"] < 1e-5
    assert found["fit"]["noted"] == 0
