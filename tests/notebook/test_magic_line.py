from __future__ import annotations

import pytest

from autobatch.notebook import magic_line


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", []),
        ("  model   data ", ["model", "data"]),
        ("model (x, y) --exact", ["model", "(x, y)", "--exact"]),
        ("build(a, b)[0] {'x': x, 'y': [1, 2]}", ["build(a, b)[0]", "{'x': x, 'y': [1, 2]}"]),
        ("""f("a b") g('it\\'s one')""", ['f("a b")', "g('it\\'s one')"]),
        ("model f(')') # the rest (is", ["model", "f(')')"]),
        ('--memory-limit="512 MiB" x', ['--memory-limit="512 MiB"', "x"]),
        ("model x # y", ["model", "x"]),
        ("model x#y", ["model", "x#y"]),
        ("a)b c", ["a)b", "c"]),
    ],
)
def test_a_line_is_cut_where_python_would_not_go_on(text, parts):
    assert magic_line.split(text) == parts


@pytest.mark.parametrize(
    ("text", "message"), [("model (x, y", "A bracket is never closed"), ("model 'x y", "A string is never closed")]
)
def test_what_is_never_closed_is_told(text, message):
    with pytest.raises(magic_line.LineError, match=f"{message}. Received: "):
        magic_line.split(text)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (["--memory-limit", '"512 MiB"'], ["--memory-limit", "512 MiB"]),
        (["--memory-limit='512 MiB'"], ["--memory-limit=512 MiB"]),
        (["--target-batch", "{2 * n}", "--headroom=$share"], ["--target-batch", "16", "--headroom=0.5"]),
        (["--target-batch", "n"], ["--target-batch", "n"]),
        # A dictionary is data, wherever it stands.
        (["model", "{'x': n}", "{n}"], ["model", "{'x': n}", "{n}"]),
        (["--exact", "{'x': n}"], ["--exact", "{'x': n}"]),
        (["model", "'text'", "$n"], ["model", "'text'", "$n"]),
    ],
)
def test_the_values_of_options_may_be_quoted_or_computed(parts, expected):
    assert magic_line.with_values(parts, {"n": 8, "share": 0.5}) == expected


def test_an_expression_is_evaluated_among_the_names():
    assert magic_line.evaluate("[a * i for i in range(3)]", {"a": 2}) == [0, 2, 4]


def test_a_wrong_expression_is_told_in_a_line():
    with pytest.raises(magic_line.LineError, match="no Python expression: .* Received: '\\(x y\\)'"):
        magic_line.evaluate("(x y)", {})
    with pytest.raises(magic_line.LineError, match="name 'modle' is not defined. Received: 'modle'"):
        magic_line.evaluate("modle", {})


def test_what_the_users_code_raises_is_passed_on():
    def build():
        return undefined  # noqa: F821 - not defined is the point

    with pytest.raises(NameError, match="undefined"):
        magic_line.evaluate("build()", {"build": build})
    with pytest.raises(ZeroDivisionError):
        magic_line.evaluate("1 / 0", {})
