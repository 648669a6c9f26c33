"""The two ends of JAX that CI runs on: which tests reach the newest, which Python that is, which versions passed."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest
from packaging.requirements import Requirement

ROOT = pathlib.Path(__file__).parents[1]


def test_what_runs_on_the_newest_end_reaches_every_folder_of_the_package():
    folders = {path.parent.name for path in (ROOT / "clipjax").glob("*/__init__.py")}
    marked = {
        path.relative_to(ROOT / "tests").parts[0]
        for path in (ROOT / "tests").rglob("test_*.py")
        if "pytest.mark.newest" in path.read_text()
    }
    assert len(folders) > 10
    assert folders <= marked


@pytest.mark.process
@pytest.mark.parametrize("name", ["no-such-python", sys.executable])
def test_the_newest_python_is_the_named_one_or_refused(name):
    command, environment = ROOT / ".ci" / "newest-python", {"NEWEST_PYTHON": name, "PATH": "/usr/bin:/bin"}
    done = subprocess.run([command], env=environment, capture_output=True, text=True)
    if sys.version_info >= (3, 12) and name == sys.executable:
        assert (done.returncode, done.stdout) == (0, f"{sys.executable}\n")
    else:
        assert (done.returncode, done.stdout) == (1, "")
        assert f"no Python 3.12 or newer is here ({name})" in done.stderr
        assert "NEWEST_PYTHON=" in done.stderr


def requirements() -> list[Requirement]:
    """What setup.py asks for, in any case or for the tests."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    test = next(node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "TEST")
    always = next(
        node.value for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "install_requires"
    )
    return [Requirement(text) for text in ast.literal_eval(always) + ast.literal_eval(test)]


@pytest.mark.parametrize("end", ["python3.11", "newest"])
def test_the_versions_that_passed_are_exact_and_allowed(end):
    lines = (ROOT / "constraints" / f"{end}.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"==[^*,]+", str(pin.specifier)) for pin in pins)  # neither paths nor ranges
    versions = {pin.name.lower().replace("_", "-"): str(pin.specifier)[2:] for pin in pins}
    assert "clipjax" not in versions
    for required in requirements():
        assert required.specifier.contains(versions[required.name.lower()]), required
