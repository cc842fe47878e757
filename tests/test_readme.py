"""README.md against the repository: a reader who follows it must not be sent to a file that is gone, or miss one that is there.

The glossary of metrics is checked against a real run in test_loop_sync.py; the install line is what .ci/run runs.
"""

import re

from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_of_files_is_the_repository():
    listed = set(re.findall(r"^\| `([^`]+)` \| [^|]+ \|$", README, re.MULTILINE))
    files = {path.name for path in ROOT.glob("*.py")}
    folders = {f"{name}/" for name in ("toy", "examples", "bench", "tests", "math_rules")}
    assert files | folders <= listed and all((ROOT / name).exists() for name in listed if "." in name or "/" in name)


def test_every_file_is_short_enough_to_read():
    assert {path.name: lines for path in ROOT.glob("*.py") if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 350} == {}
    assert sum(path.stat().st_size for path in (ROOT / "toy").iterdir() if path.is_file()) < 4 * 2**20


def test_every_requirement_is_pinned():
    for name in ("requirements.txt", "requirements-engine.txt", "requirements-gpu.txt"):
        lines = [line for line in (ROOT / name).read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
        assert lines and all(re.fullmatch(r"[A-Za-z0-9_.\-]+==[^=\s]+", line) for line in lines), name
