"""The console script: what it runs, and the one thing that it changes about its process."""

import os
import sys

import pytest

from clipjax.cli import main

pytestmark = pytest.mark.newest


@pytest.fixture
def restarts(monkeypatch) -> list:
    """Instead of starting anew, note the arguments and the environment."""
    noted: list = []
    monkeypatch.setattr(os, "execve", lambda *arguments: noted.append(arguments))
    monkeypatch.setattr(sys, "argv", ["clipjax", "--version"])
    monkeypatch.setattr(sys, "orig_argv", ["python3", "-X", "utf8", "bin/clipjax", "--version"])
    monkeypatch.setattr(sys, "platform", "linux")
    return noted


def test_the_console_script_starts_itself_again_with_large_pages(restarts, monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    main.console()
    ((executable, arguments, environment),) = restarts
    assert executable == sys.executable
    assert arguments == [sys.executable, "-X", "utf8", "bin/clipjax", "--version"]
    assert environment == {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_it_leaves_what_is_set_and_other_systems_alone(restarts, monkeypatch, capsys, platform):
    monkeypatch.setattr(sys, "platform", platform)
    if platform == "linux":
        monkeypatch.setenv("GLIBC_TUNABLES", "")
    assert main.console() == 0
    assert not restarts
    assert capsys.readouterr().out.strip() == main.__version__


def test_an_unknown_command_is_refused(capsys):
    assert main.main(["tarin"]) == 2
    assert "unknown command 'tarin'; known: train, eval, plan, sweep, data" in capsys.readouterr().err
