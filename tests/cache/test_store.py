"""What is remembered comes back, and nothing that is wrong with the file stops anybody."""

from __future__ import annotations

import dataclasses
import random
import sqlite3
import warnings

import pytest
from remembered import LIMIT, a_key, a_result

from autobatch.cache import store as store_module
from autobatch.cache.entry import Remembered
from autobatch.cache.store import SCHEMA_VERSION, ResultStore
from autobatch.errors import AutobatchWarning
from autobatch.records import MemoryModel


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "_warned", set())
    return ResultStore(tmp_path / "cache")


def edit(store, *statements):
    connection = sqlite3.connect(store.path)
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"smallest_failure": 17, "target_batch": 64, "peak_bytes": None, "memory_model": None},
        {"limit_bytes": None, "is_bound": False},
        {"model_name": "r\u00e9seau \U0001f600 '; DROP TABLE results", "device": "", "stopped_because": ""},
    ],
)
def test_what_is_put_is_found(store, fields):
    result = a_result(**fields)
    key = a_key(limit_bytes=result.limit_bytes)
    assert store.find(key) is None
    assert not store.path.exists()  # asking makes nothing
    assert store.put(key, result)
    assert store.find(key) == result
    assert ResultStore(store.folder).entries() == (result,)
    assert store.find(a_key("another", result.limit_bytes)) is None


def test_text_and_lines_that_a_file_cannot_hold(store):
    odd = a_result(model_name="\udc80", limit_bytes=10**30, memory_model=MemoryModel(float("-inf"), 1.0))
    key = a_key(limit_bytes=10**30)
    assert store.put(key, odd)
    (found,) = store.entries()
    assert (found.model_name, found.memory_model, found.limit_bytes) == ("?", None, 2**63 - 1)


def test_a_limit_that_is_nearly_the_same_finds_it_and_the_nearest_wins(store):
    store.put(a_key(limit_bytes=2000), a_result(16, limit_bytes=2000))
    for limit_bytes, finds in [(1500, True), (2100, True), (1499, False), (2101, False), (None, False)]:
        assert (store.find(a_key(limit_bytes=limit_bytes)) is not None) == finds, limit_bytes
    store.put(a_key(limit_bytes=2150), a_result(15, limit_bytes=2150))
    assert len(store.entries()) == 2
    assert store.find(a_key(limit_bytes=2070)).micro_batch == 16
    assert store.find(a_key(limit_bytes=2080)).micro_batch == 15


def test_what_memory_did_not_bound_holds_for_other_limits(store):
    store.put(a_key(), a_result(is_bound=False))
    for limit_bytes in (LIMIT // 2, 3 * LIMIT):
        assert store.find(a_key(limit_bytes=limit_bytes)) is not None
    assert store.find(a_key(limit_bytes=None)) is None


def test_a_proof_holds_for_its_limit_alone(store):
    key = a_key(exact=True)
    store.put(key, a_result(is_bound=False))
    assert store.find(key) is not None
    assert store.find(dataclasses.replace(key, limit_bytes=LIMIT + 1)) is None


def test_a_new_result_takes_the_place_of_what_would_be_found(store):
    store.put(a_key(), a_result(16))
    nearly = LIMIT + LIMIT // 100
    store.put(a_key(limit_bytes=nearly), a_result(8, limit_bytes=nearly))
    assert [found.micro_batch for found in store.entries()] == [8]
    store.put(a_key(limit_bytes=2 * LIMIT), a_result(32, limit_bytes=2 * LIMIT))
    assert len(store.entries()) == 2


def test_the_oldest_go_first(store, monkeypatch):
    monkeypatch.setattr(store_module, "MOST_RESULTS", 3)
    for number in (5, 1, 4, 2, 3):
        store.put(a_key(str(number)), a_result(created_seconds=float(number)))
    # When 2 came, 5 and 4 were newer and 1 was gone; 3 took its place.
    assert [found.created_seconds for found in store.entries()] == [5.0, 4.0, 3.0]


def test_clear_forgets_and_tells_how_many(store):
    assert store.clear() == 0
    assert not store.folder.exists()
    for digest in "abc":
        store.put(a_key(digest), a_result())
    broken = store.path.with_name(store.path.name + ".broken-1-1")
    broken.write_text("set aside earlier")
    assert store.clear() == 3
    assert store.entries() == ()
    assert not broken.exists()
    assert store.put(a_key(), a_result())


@pytest.mark.parametrize(
    "content",
    [b"this is no database", b"SQLite format 3\0" + b"\xff" * 4096, b"\0" * 8192],
    ids=["text", "header", "zeros"],
)
def test_a_broken_file_is_set_aside_with_a_warning(store, content):
    store.folder.mkdir()
    store.path.write_bytes(content)
    with pytest.warns(AutobatchWarning, match=r"cannot be read \(.+\): the file was renamed to results-1.db.broken-"):
        assert store.find(a_key()) is None
    (aside,) = store.folder.glob("*.broken-*")
    assert aside.read_bytes() == content
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.put(a_key(), a_result())
        assert store.find(a_key()) == a_result()


@pytest.mark.parametrize("cut", [100, 4096, 5000])
def test_a_file_that_was_cut_off(store, cut):
    for number in range(200):
        store.put(a_key(f"digest-{number}"), a_result())
    whole = store.path.read_bytes()
    assert len(whole) > 2 * cut
    store.path.write_bytes(whole[:cut])
    with pytest.warns(AutobatchWarning, match="was renamed"):
        assert store.put(a_key("after"), a_result())
    assert store.find(a_key("after")) == a_result()


def test_random_damage_never_raises(store):
    rng = random.Random(11)
    for number in range(100):
        store.put(a_key(f"digest-{number}"), a_result())
    whole = store.path.read_bytes()
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(rng.choice((1, 20, 500))):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        store.path.write_bytes(damaged)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AutobatchWarning)
            found = store.find(a_key("digest-7"))
            assert found is None or isinstance(found, Remembered)
            store.entries()
            # A counter of the file's own can be such that nothing is found wrong with it; it is set aside or replaced.
            store.put(a_key("digest-7"), a_result(3))
            store.clear()


def test_the_file_of_a_newer_autobatch_is_kept_for_it(store):
    store.put(a_key(), a_result())
    edit(store, "CREATE TABLE more (x)", f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    before = store.path.read_bytes()
    with pytest.warns(AutobatchWarning, match=r"it has version 2, and this autobatch reads version 1"):
        assert store.find(a_key()) is None
    (aside,) = store.folder.glob("*.newer-*")
    assert aside.read_bytes() == before
    assert store.put(a_key(), a_result())
    store.clear()
    assert aside.exists()


@pytest.mark.parametrize(
    "statement",
    ["DROP TABLE results", "ALTER TABLE results DROP COLUMN device", "PRAGMA user_version = 0"],
)
def test_tables_that_were_changed_by_hand(store, statement):
    store.put(a_key(), a_result())
    edit(store, statement)
    with pytest.warns(AutobatchWarning, match="changed by hand"):
        assert store.put(a_key(), a_result())


@pytest.mark.parametrize(
    "change",
    ["micro_batch = 'many'", "micro_batch = 0", "largest_fit = 1", "peak_bytes = x'00'", "created_seconds = 9e300"],
)
def test_a_row_that_makes_no_sense_is_passed_over_and_replaced(store, change, caplog):
    store.put(a_key(), a_result())
    edit(store, f"UPDATE results SET {change}")
    assert store.find(a_key()) is None
    assert "makes no sense" in caplog.text
    assert store.put(a_key(), a_result(8))
    assert store.find(a_key()) == a_result(8)


def test_a_folder_that_cannot_be_made_is_warned_about_once(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "_warned", set())
    (tmp_path / "file").write_text("")
    store = ResultStore(tmp_path / "file" / "cache")
    with pytest.warns(AutobatchWarning, match="Results are not remembered: .* cannot be used .*AUTOBATCH_CACHE_DIR"):
        assert not store.put(a_key(), a_result())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not store.put(a_key(), a_result())
        assert store.find(a_key()) is None
        assert store.entries() == ()
        assert store.clear() == 0


def test_a_folder_in_the_files_place(store):
    store.path.mkdir(parents=True)
    with pytest.warns(AutobatchWarning, match="Results are not remembered"):
        assert store.find(a_key()) is None


def test_a_file_that_somebody_holds_locked_stops_nobody(store, monkeypatch):
    store.put(a_key(), a_result())
    monkeypatch.setattr(store_module, "BUSY_SECONDS", 0.2)
    other = sqlite3.connect(store.path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.warns(AutobatchWarning, match="database is locked"):
        assert not store.put(a_key("another"), a_result())
    other.execute("COMMIT")
    other.close()
    assert not list(store.folder.glob("*.broken-*"))
    assert store.put(a_key("another"), a_result())
    assert len(store.entries()) == 2


def test_a_new_file_that_another_process_writes_to_is_not_taken_for_a_broken_one(store, monkeypatch):
    # Who found the file broken may come to look at it again when another has begun a new one, and is writing to it.
    store.folder.mkdir()
    store.path.write_bytes(b"no database at all\n" * 1000)
    others = []

    def set_aside_by_another(self):
        self.path.unlink()
        others.append(sqlite3.connect(self.path, isolation_level=None))
        for statement in ("BEGIN", store_module._CREATE, f"PRAGMA user_version = {SCHEMA_VERSION}", "COMMIT"):
            others[0].execute(statement)
        others[0].execute("BEGIN EXCLUSIVE")
        original(self)
        others[0].execute("COMMIT")

    original = ResultStore._set_aside_if_unusable
    monkeypatch.setattr(ResultStore, "_set_aside_if_unusable", set_aside_by_another)
    assert store.put(a_key(), a_result())
    others[0].close()
    assert store.find(a_key()) == a_result()
    assert not list(store.folder.glob("*.broken-*"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"micro_batch": 0}, "micro_batch must be a whole number above 0"),
        ({"largest_fit": True}, "largest_fit must be"),
        ({"micro_batch": 17}, "a size that fits"),
        ({"target_batch": 8}, "of use"),
        ({"created_seconds": -1.0}, "a time since 1970"),
        ({"limit_bytes": 1.5}, "limit_bytes must be"),
    ],
)
def test_results_are_checked_when_they_are_made(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(a_result(), **fields)
