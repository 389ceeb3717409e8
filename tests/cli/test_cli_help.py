"""The help of the command: its groups, its examples, and what an option says that is refused."""

from __future__ import annotations

import re
import shlex
import sys

import pytest

from autobatch import arguments as checks
from autobatch.cli import main


def _help_of(capfd, *command):
    assert main([*command, "--help"]) == 0
    return capfd.readouterr().out


def test_the_command_alone_shows_its_help_as_an_error(capfd):
    assert main([]) == 2
    assert capfd.readouterr() == ("", _help_of(capfd))
    assert re.search(r"^  2 .*no COMMAND was given$", _help_of(capfd), re.MULTILINE)


def test_the_options_of_a_report_stand_in_groups(capfd):
    text = _help_of(capfd, "report")
    groups = dict(re.findall(r"^(\w[\w ]*):\n((?:  .*\n|\n(?=  ))+)", text, re.MULTILINE))
    options = {name: set(re.findall(r"^  (?:-h, )?(--[\w-]+)", body, re.MULTILINE)) for name, body in groups.items()}
    assert options["options"] == {"--help"}, "every other one belongs to a group"
    assert {"--target-batch", "--memory-limit", "--no-cache", "--remedies"} <= options["search"]
    assert options["worker"] == {"--device", "--precision", "--jit", "--strategy", "--timeout"}
    assert options["Keras targets"] == {"--input", "--classes"}
    assert options["output"] == {"--format", "--output", "--fail-under"}
    for name, body in groups.items():
        for entry in re.split(r"^  (?=-)", body, flags=re.MULTILINE)[1:]:
            assert re.search(r"(  |\n {10,})[\w\"(]", entry), f"{name}: no help text for {entry}"


@pytest.mark.parametrize("command", [[], ["report"], ["run"], ["show"], ["devices"], ["cache"], ["cache", "list"]])
def test_the_help_fits_into_a_terminal_of_80_columns(command, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = _help_of(capfd, *command)
    wide = [line for line in text.splitlines() if len(line) > 80]
    assert [line for line in wide if not line.lstrip().startswith("[--")] == [], "but for what argparse cannot break"


def test_the_examples_in_the_help_can_be_run(capfd, tmp_path, monkeypatch):
    lines = re.findall(r"^  (autobatch report .*)$", _help_of(capfd, "report").partition("examples:")[2], re.MULTILINE)
    assert len(lines) == 3
    (tmp_path / "train.py").write_text("def build(): ...")
    (tmp_path / "model.keras").touch()
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr("autobatch.cli.report._search", lambda options: asked.append(options) or sys.exit(0))
    for line in lines:
        with pytest.raises(SystemExit, match="0"):
            main(shlex.split(line)[1:])
    assert [options.target for options in asked] == ["train.py:build", "keras:ResNet50", "model.keras"]


def test_the_examples_of_a_run_can_be_run(capfd, tmp_path, monkeypatch):
    lines = re.findall(r"^  (autobatch run .*)$", _help_of(capfd, "run").partition("examples:")[2], re.MULTILINE)
    (tmp_path / "package").mkdir()
    for name in ("train.py", "package/__init__.py", "package/train.py"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(
        "autobatch.restart.supervisor.run_and_restart",
        lambda command, restarts, say: asked.append((command[1:], restarts)) or 7,
    )
    assert [main(shlex.split(line)[1:]) for line in lines] == [7, 7]
    assert asked == [(["train.py", "config.yaml"], None), (["-m", "package.train", "config.yaml"], 5)]


def test_what_an_option_is_refused_for_is_what_fit_refuses_it_for(capfd):
    for option, name, value in [("--headroom", "headroom", 1.5), ("--timeout", "SECONDS", -1.0)]:
        check = {"headroom": checks.headroom}.get(name, lambda value: checks.seconds(value, "SECONDS"))
        with pytest.raises(ValueError, match=name) as raised:
            check(value)
        assert main(["report", "x:y", option, str(value)]) == 2
        assert str(raised.value).partition(" Received")[0] in capfd.readouterr().err
