"""The two ends of JAX that CI runs on: what reaches the newest, which Python, which versions, their locks and audit."""

import ast
import json
import pathlib
import re
import runpy
import subprocess
import sys

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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


def read_lock(name: str) -> dict[str, tuple[str, list[str]]]:
    """The version and hashes of each package of a lock, of which every line must be understood."""
    text = re.sub(r"^#.*\n", "", (ROOT / "constraints" / f"{name}.lock").read_text(), flags=re.MULTILINE)
    entry = r"([a-z0-9-]+)==([^ ]+)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)\n"
    assert re.fullmatch(f"({entry})+", text)  # no index, no address, no path, no package without hashes
    return {name: (version, hashes.split()[1::2]) for name, version, hashes in re.findall(entry, text)}


@pytest.mark.parametrize("end", ["python3.11", "newest"])
def test_a_lock_holds_the_versions_that_passed_and_no_others(end):
    lines = (ROOT / "constraints" / f"{end}.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    locked = read_lock(end)
    assert {name: f"=={version}" for name, (version, _) in locked.items()} == {
        canonicalize_name(pin.name): str(pin.specifier) for pin in pins
    }, "run `make locks`"
    assert {"pip", "setuptools"} <= locked.keys()  # they install and build the others


def test_what_audits_is_locked_too():
    assert {"pip-audit", "requests"} <= read_lock("audit").keys()


FAKE_PYTHON = """#!/usr/bin/env bash
echo "$@" >>"$(dirname "$0")/calls"
case "$*" in *--requirement*) grep -o '^[a-z0-9-]*==' >>"$(dirname "$0")/calls";; esac
"""


@pytest.mark.process
@pytest.mark.parametrize("extras", ["test", "test,plan"])
def test_with_a_lock_pip_checks_hashes_and_builders_come_first(tmp_path, extras):
    python = tmp_path / "python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    subprocess.run([".ci/install", python, "constraints/python3.11.txt", extras], cwd=ROOT, check=True)
    lines = (tmp_path / "calls").read_text().splitlines()
    hashed = "-m pip install --quiet --require-hashes --no-deps --no-build-isolation --requirement=/dev/stdin"
    assert lines[:4] == [hashed, "pip==", "setuptools==", hashed]
    assert lines[-2:] == ["-m pip install --quiet --no-deps --no-build-isolation --editable .", "-m pip check"]
    skipped = set() if "plan" in extras else {"libtpu"}
    assert {line.removesuffix("==") for line in lines[4:-2]} == read_lock("python3.11").keys() - skipped


@pytest.mark.process
def test_without_a_lock_pip_takes_what_it_finds(tmp_path):
    python = tmp_path / "python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    for constraints in ("", tmp_path / "mine.txt"):
        subprocess.run([".ci/install", python, constraints, "test"], cwd=ROOT, check=True)
    install = "-m pip install --quiet"
    assert (tmp_path / "calls").read_text().splitlines() == [
        f"{install} --upgrade pip",
        f"{install} --editable .[test]",
        f"{install} --upgrade pip",
        f"{install} --constraint={tmp_path / 'mine.txt'} --editable .[test]",
    ]


GOOD = {"name": "einops", "version": "0.8.2", "vulns": []}
BAD = {"name": "pillow", "version": "1.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["2.0"], "aliases": ["CVE-2"]}]}
UNKNOWN = {"name": "etils", "skip_reason": "not found"}


@pytest.mark.parametrize(
    ("packages", "allowed", "status", "told"),
    [
        ([GOOD], "", 0, "Audited: 1 of 1 packages in a.lock, 0 vulnerabilities"),
        ([GOOD, BAD], "", 1, "VULNERABLE: a.lock: pillow 1.0 has PYSEC-1, fixed in ['2.0']"),
        ([BAD], "# a comment\nCVE-2 only its command line is affected", 0, "Audited: 1 of 1"),
        ([BAD], "CVE-3 another", 1, "VULNERABLE"),
        ([UNKNOWN, UNKNOWN], "", 0, "NOT AUDITED: 2 packages in a.lock"),  # pip-audit itself would say: none found
        ([UNKNOWN, BAD], "", 1, "NOT AUDITED: 1 packages in a.lock"),
        (None, "", 0, "NOT AUDITED: a.lock: pip-audit has no answer: no network"),
        ("no pip-audit", "", 0, "NOT AUDITED: pip-audit cannot be installed here: no network"),
        ("slow", "", 0, "NOT AUDITED: the audit takes longer than 60 s"),
        ("changed", "", "DO NOT MATCH THE HASHES", ""),
        ([GOOD], "CVE-2", "allowed-vulnerabilities.txt: CVE-2 has no reason", ""),
    ],
)
def test_the_audit_fails_on_what_it_knows_and_says_what_it_could_not_ask(
    packages, allowed, status, told, tmp_path, monkeypatch, capsys
):
    def answer(command, *, timeout, **_):
        if command[2] == "pip":
            error = {"no pip-audit": "no network", "changed": "DO NOT MATCH THE HASHES"}.get(str(packages), "")
            return subprocess.CompletedProcess(command, bool(error), "", error)
        if packages == "slow":
            raise subprocess.TimeoutExpired(command, timeout)
        out = json.dumps({"dependencies": packages}) if packages else ""
        return subprocess.CompletedProcess(command, 1, out, "no network")

    main = runpy.run_path(str(ROOT / ".ci" / "audit"))["main"]
    monkeypatch.setitem(main.__globals__, "FOLDER", tmp_path)
    monkeypatch.setattr(subprocess, "run", answer)
    (tmp_path / "a.lock").touch()
    (tmp_path / "allowed-vulnerabilities.txt").write_text(allowed)
    if isinstance(status, str):
        with pytest.raises(SystemExit, match=status):
            main()
    else:
        assert main() == status
    assert told in capsys.readouterr().out
