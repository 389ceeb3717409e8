"""README and docs/: their Python runs and prints what they show, links lead somewhere, and lists are complete."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import autobatch

ROOT = Path(__file__).parents[1]
PACKAGE = Path(autobatch.__file__).parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SECONDS = 300


def name_of(page):
    return str(page.relative_to(ROOT))


def python_of(page):
    """Return a page's Python blocks, each with the text block that stands directly behind it: what it prints."""
    text = page.read_text(encoding="utf-8")
    blocks = list(FENCE.finditer(text))
    found = []
    for block, following in itertools.zip_longest(blocks, blocks[1:]):
        if block.group(1) != "python":
            continue
        is_output = following is not None and following.group(1) == "text"
        between = "" if following is None else text[block.end() : following.start()]
        shown = following.group(2) if is_output and not between.strip() else None
        found.append((text.count("\n", 0, block.start()) + 2, block.group(2), shown))
    return found


def run_blocks(*pages, checks="", folder=ROOT):
    """Run all blocks of pages in order, each page in a namespace of its own, in one process.

    A page may limit memory, which is done before TensorFlow starts: it comes first. ``checks`` runs behind each page,
    as a test would.

    Returns:
        For each page what each of its blocks has printed, and standard error. A page that fails ends with its
        traceback there, and has fewer blocks than were to be run.
    """
    block_mark, page_mark = "-- a block of the page has ended --\n", "-- the page has ended --\n"
    program = ["import sys, traceback"]
    for page in pages:
        program += [f"page = {name_of(page)!r}", "names = {'__name__': '__main__'}", "try:"]
        for line, source, _ in python_of(page):
            program.append(f"    exec(compile({chr(10) * (line - 1) + source!r}, page, 'exec'), names)")
            program.append(f"    sys.stdout.write({block_mark!r})")
        program += [
            f"    exec({textwrap.dedent(checks)!r}, names)",
            "except BaseException:",
            "    traceback.print_exc()",
        ]
        program += [f"    print({'-- the page has failed --'!r})", f"sys.stdout.write({page_mark!r})"]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(program)],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        timeout=SECONDS,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr[-4000:]
    *texts, _ = done.stdout.split(page_mark)
    assert len(texts) == len(pages)
    return [(text.split(block_mark), done.stderr[-4000:]) for text in texts]


def check_printed(page, printed, said):
    """Check that each block of a page ran to its end and, where the page shows what it prints, printed that."""
    *texts, rest = printed
    assert not rest, said
    for text, (line, _, shown) in zip(texts, python_of(page), strict=True):
        if shown is not None:
            assert without_numbers(text) == without_numbers(shown), f"what {name_of(page)}, line {line}, prints"


def without_numbers(text):
    """Return text with each number as a mark: seconds, bytes and sizes that are chosen by time differ between runs."""
    return re.sub(r"\d[\d.,]*", "#", text)


def anchors_of(page):
    """Return the anchors that GitHub makes of a page's headings."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def links_of(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]


WITH_PYTHON = [page for page in PAGES if page.name != "README.md" and python_of(page)]
LIMITED = [page for page in WITH_PYTHON if any("limit_memory(" in source for _, source, _ in python_of(page))]


@pytest.fixture(scope="module")
def printed(tmp_path_factory, lean_children):
    """What the blocks of each page print: the pages that limit memory, each in its process, and the others in one."""
    found = {}
    for pages in (*([page] for page in LIMITED), [page for page in WITH_PYTHON if page not in LIMITED]):
        # In a folder of its own: a page may write files.
        found |= dict(zip(pages, run_blocks(*pages, folder=tmp_path_factory.mktemp("pages")), strict=True))
    return found


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_python(page, printed):
    check_printed(page, *printed[page])


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for link in links_of(page):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link


def test_every_page_can_be_reached_from_the_readme():
    readme = ROOT / "README.md"
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in links_of(readme)}
    assert [name_of(page) for page in PAGES if page != readme and page.resolve() not in linked] == []


def test_only_public_names_are_imported():
    for page in PAGES:
        for _, source, _ in python_of(page):
            assert not re.search(r"\b(from|import) autobatch\.(?!notebook\b)", source), page
            assert set(re.findall(r"\bautobatch\.(\w+)", source)) <= {*autobatch.__all__, "notebook", "__version__"}, (
                page
            )


def test_every_option_of_the_command_is_on_its_page():
    page = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    for command in (["report"], ["run"], ["show"], ["devices"], ["cache", "list"], ["cache", "clear"]):
        run = subprocess.run(
            [sys.executable, "-m", "autobatch", *command, "--help"], capture_output=True, text=True, check=True
        )
        options = set(re.findall(r"--[a-z][a-z-]*", run.stdout)) - {"--help"}
        assert [option for option in sorted(options) if f"`{option}" not in page] == [], command


def test_every_kind_of_difference_has_its_section():
    source = "\n".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    kinds = set(re.findall(r'^    \("([a-z-]+)", _\w+\),$', source, re.MULTILINE))
    assert len(kinds) >= 7, "where the kinds are listed has another form now"
    assert kinds <= anchors_of(ROOT / "docs" / "exactness-and-limits.md")


def test_the_plan_has_every_room_and_no_other():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z_]+/(?:[a-z_]+\.py)?|[a-z_]+\.py)`", page))
    named = {name for name in named if not name.startswith("tests/")}
    assert [name for name in sorted(named) if not (PACKAGE / name).exists()] == []
    rooms = {f"{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")}
    assert rooms <= named


def test_bounds_of_the_search_name_tests_that_there_are():
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "search.md").read_text(encoding="utf-8")))
    found = {
        name
        for path in (ROOT / "tests" / "search").glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert len(named) >= 6
    assert named <= found, named - found
