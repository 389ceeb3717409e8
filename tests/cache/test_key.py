"""What is part of a key, and where the file is."""

from __future__ import annotations

from pathlib import Path

import pytest

from autobatch.cache.folder import cache_folder
from autobatch.cache.key import limits_agree, make_key
from autobatch.records import Environment

VERSIONS = (("autobatch", "1"), ("tensorflow", "2"), ("keras", "3"), ("python", "3.11"))
WHERE = {
    "device": "GPU:0",
    "limit_bytes": 1000,
    "limit_source": "NVML",
    "budget_bytes": 950,
    "headroom": 0.05,
    "precision": "float32",
    "jit_compile": False,
    "versions": VERSIONS,
}
WHAT = {"content": "abc", "target_batch": 64, "largest_useful": 64, "objective": "throughput", "exact": False}


def key(**changes):
    where = {name: changes.pop(name, value) for name, value in WHERE.items()}
    return make_key(environment=Environment(**where), **{**WHAT, **changes})


@pytest.mark.parametrize(
    "change",
    [
        {"content": "abd"},
        {"device": "GPU:1"},
        {"headroom": 0.06},
        {"precision": "mixed_float16"},
        {"jit_compile": True},
        {"target_batch": 65},
        {"target_batch": None},
        {"largest_useful": 128},
        {"objective": "largest"},
        {"exact": True},
        *({"versions": ((name, "9"), *VERSIONS[1:])} for name in ("autobatch",)),
        {"versions": (VERSIONS[0], ("tensorflow", "9"), VERSIONS[2])},
        {"versions": (*VERSIONS[:2], ("keras", "9"))},
    ],
    ids=str,
)
def test_what_makes_another_key(change):
    assert key(**change).digest != key().digest


def test_what_does_not():
    same = key(limit_bytes=2000, limit_source="else", budget_bytes=1, versions=(*VERSIONS[:3], ("python", "3.13")))
    assert same.digest == key().digest
    assert same.limit_bytes == 2000


def test_limits():
    assert limits_agree(105, 100, is_bound=True, exact=False)
    assert not limits_agree(106, 100, is_bound=True, exact=False)
    assert limits_agree(75, 100, is_bound=True, exact=False)
    assert not limits_agree(74, 100, is_bound=True, exact=False)
    assert limits_agree(100, 1000, is_bound=False, exact=False)
    assert not limits_agree(100, 101, is_bound=False, exact=True)
    assert limits_agree(None, None, is_bound=True, exact=True)
    assert not limits_agree(None, 100, is_bound=False, exact=False)


@pytest.mark.parametrize(
    ("environ", "platform", "folder"),
    [
        ({"AUTOBATCH_CACHE_DIR": "/a/b", "XDG_CACHE_HOME": "/x"}, "linux", "/a/b"),
        ({"AUTOBATCH_CACHE_DIR": "/a/b"}, "win32", "/a/b"),
        ({"AUTOBATCH_CACHE_DIR": "~/c"}, "linux", "/home/me/c"),
        ({"AUTOBATCH_CACHE_DIR": "", "XDG_CACHE_HOME": "/x"}, "linux", "/x/autobatch"),
        ({"XDG_CACHE_HOME": "relative"}, "linux", "/home/me/.cache/autobatch"),
        ({}, "linux", "/home/me/.cache/autobatch"),
        ({"XDG_CACHE_HOME": "/x"}, "darwin", "/home/me/Library/Caches/autobatch"),
        ({"LOCALAPPDATA": "/local"}, "win32", "/local/autobatch"),
        ({}, "win32", "/home/me/AppData/Local/autobatch"),
    ],
)
def test_the_folder(environ, platform, folder, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_folder(environ, platform) == Path(folder)
