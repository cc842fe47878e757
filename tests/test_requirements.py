"""requirements.txt: every Python that README.md names, and ARM processors, find their wheels.

pip resolves and installs nothing. Not covered: what the packages then do. The tests themselves run
on one version; README.md says on which. Nothing has run on ARM.
"""

import subprocess
import sys

import pytest
from conftest import ROOT

GLIBC = [5, 12, 17, 24, 26, 27, 28, 31, 34]  # a wheel for an older one fits a newer one
TAGS = [*(f"manylinux_2_{minor}" for minor in GLIBC), "manylinux2014", "manylinux1"]


def test_readme_and_requirements_name_the_same_versions():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    assert "Python 3.11 to 3.13" in readme
    assert "Python 3.11 to 3.13" in requirements.splitlines()[0]


@pytest.mark.complete
@pytest.mark.parametrize("version, processor", [("3.13", "x86_64"), ("3.11", "aarch64")])
def test_every_package_has_a_wheel(tmp_path, version, processor):
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
    command += ["--no-deps", "--only-binary=:all:", "--target", str(tmp_path)]
    command += ["--python-version", version, "-r", "requirements.txt"]
    command += ["-r", "requirements-engine.txt"]
    command += [word for tag in TAGS for word in ("--platform", f"{tag}_{processor}")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert not done.returncode, done.stderr[-3000:]
