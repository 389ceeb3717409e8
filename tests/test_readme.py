"""The README's Python runs as it stands, and its two commands are where CI reads them."""

from __future__ import annotations

from pathlib import Path

from test_docs import FENCE, check_printed, run_blocks

README = Path(__file__).parents[1] / "README.md"
MOST_LINES = 120


def test_there_are_two_commands():
    commands = [source for language, source in FENCE.findall(README.read_text(encoding="utf-8")) if language == "sh"]
    assert len(commands) == 2
    assert "examples/digits.py" in commands[0], "the first is the examples'"
    assert "-m pytest" in commands[1], "the second is the tests'"


def test_it_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def test_python(lean_children):
    checks = """
    assert history.plan.effective_batch == 256
    assert history.plan.accumulation_steps > 1, "in this arena the whole batch does not fit"
    assert history.history["val_accuracy"][-1] > 0.5
    assert float(loss) > 0
    assert step.report.plan.effective_batch == 256
    """
    ((printed, said),) = run_blocks(README, checks=checks)
    check_printed(README, printed, said)
