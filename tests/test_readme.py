"""README.md and the pages of docs/ against the repository: a reader who follows them must not be
sent to a file that is gone, or miss one that is there.

The glossary of metrics is checked against real runs in test_loop_sync.py and test_loop_async.py;
the install lines are what .ci/run runs. A fork may add files: that every file is listed is asked by
.ci/run alone. How large files are is asked by test_structure.py.
"""

import os
import re
from pathlib import Path

import pytest

from conftest import ROOT, SOURCES

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "tests" / "README.md"]
TEXT = {page: page.read_text(encoding="utf-8") for page in PAGES}
FILES = TEXT[README] + TEXT[ROOT / "docs" / "files.md"]
LISTED = set(re.findall(r"^\| `([^`]+)` \| [^|]+ \|$", FILES, re.MULTILINE))
IN_CI = pytest.mark.skipif("CI" not in os.environ, reason="a fork may add files; .ci/run sets CI")


def outside_of_code(page: Path) -> list[tuple[int, str]]:
    """(line number, line) of what is no fenced code."""
    lines, is_code = [], False
    for i, line in enumerate(TEXT[page].splitlines()):
        if line.startswith("```"):
            is_code = not is_code
        elif not is_code:
            lines.append((i + 1, line))
    return lines


def test_the_tables_of_files_list_what_is_there():
    assert {"loop_sync.py", "harness/", "backends/", "tests/"} <= LISTED
    assert [name for name in LISTED if re.search("[./]", name) and not (ROOT / name).exists()] == []


@IN_CI
def test_every_file_is_listed():
    paths = {str(path.relative_to(ROOT)) for path in SOURCES}
    tests = {path for path in paths if re.search(r"(^|/)test_\w+\.py$", path)}
    assert sorted(paths - tests - LISTED) == []
    assert {f"{path.partition('/')[0]}/" for path in paths if "/" in path} <= LISTED


@IN_CI
def test_every_test_is_in_the_reading_order():
    named = set(re.findall(r"`([^`]*test_\w+\.py)`", TEXT[ROOT / "tests" / "README.md"]))
    there = {str(path.relative_to(ROOT / "tests")) for path in (ROOT / "tests").rglob("test_*.py")}
    assert named == there


def test_the_readme_is_short():
    assert len(TEXT[README].splitlines()) <= 250


def test_the_first_test_line_is_the_whole_command():
    """.ci/run takes it: a fresh environment, the install, and the tests."""
    lines = TEXT[README].replace("\\\n", " ").splitlines()
    line = next(line for line in lines if "python -m pytest" in line)
    assert line.startswith("python3 -m venv .venv && ") and line.endswith("&& python -m pytest")


def test_no_line_of_the_readme_is_wide():
    lines = [line for line in TEXT[README].splitlines() if not line.startswith("![")]
    assert [line for line in lines if len(line) > 100] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_sentence_of_a_page_is_wide(page):
    """Tables and fenced output may be: what a program printed is shown as it was."""
    lines = [(i, line) for i, line in outside_of_code(page) if not line.startswith(("|", "!["))]
    assert [(i, line) for i, line in lines if len(line) > 100] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for _, line in outside_of_code(page):
        for link in re.findall(r"\]\(([^)\s]+)\)", line):
            name, _, heading = link.partition("#")
            if name.startswith("https:"):
                continue
            target = (page.parent / name).resolve() if name else page
            assert target.exists(), link
            if heading:
                heads = re.findall(r"^#+ (.*)$", TEXT[target], re.MULTILINE)
                words = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}
                assert heading in words, link


def test_the_toy_is_small():
    assert (
        sum(path.stat().st_size for path in (ROOT / "toy").iterdir() if path.is_file()) < 4 * 2**20
    )


def test_every_requirement_is_pinned():
    for name in ("requirements.txt", "requirements-engine.txt", "requirements-gpu.txt"):
        lines = [
            line
            for line in (ROOT / name).read_text(encoding="utf-8").splitlines()
            if line and not line.startswith("#")
        ]
        assert lines and all(re.fullmatch(r"[A-Za-z0-9_.\-]+==[^=\s]+", line) for line in lines), (
            name
        )
