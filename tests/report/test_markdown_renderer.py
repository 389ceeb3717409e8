from __future__ import annotations

import re

import golden

from autobatch.report import markdown, sentences


def test_golden(report, report_name):
    golden.check(f"{report_name}.md", markdown.render(report))


def test_every_row_of_a_table_has_as_many_cells(report):
    table = []
    for line in [*markdown.render(report).splitlines(), ""]:
        if line.startswith("|"):
            table.append(len(re.findall(r"(?<!\\)\|", line)))
        else:
            assert len(set(table)) <= 1, line
            table = []


def test_nothing_of_the_users_acts(hostile):
    text = markdown.render(hostile)
    assert "\x1b" not in text
    text = re.sub(r"(?ms)^```python\n.*?^```$", "", text)  # what stands in a block of code is code
    own = {"<details><summary>", "</summary>", "</details>"}
    for tag in own:
        text = text.replace(tag, "")
    assert not re.search(r"(?<!\\)[<>]", text)
    assert not re.search(r"(?<!\\)\[[^]]*(?<!\\)\]\(", text)


def test_what_it_says(full):
    text = markdown.render(full)
    assert text.startswith("### autobatch sizing report")
    assert f"- **Plan**: effective batch 256 = 4 {sentences.TIMES} micro-batch 64" in text
    assert "| 64 | fits | " in text
    assert "| **plan** |" in text
