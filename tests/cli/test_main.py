"""The console script: what it runs, and the one thing that it changes about its process."""

import os
import signal
import sys

import pytest

from clipjax.cli import data, errors, main
from tests.commands import exit_code

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
    assert main.main(["evl"]) == 2
    assert "did you mean eval?" in capsys.readouterr().err


def run_with_closed_pipe(monkeypatch, argv: list[str]) -> int:
    """Run a command whose standard output nobody reads any more; return its exit code."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        code = main.main(argv)
        stream.write("more")  # goes nowhere
    return code


@pytest.mark.parametrize("argv", [["--help"], [], *([command, "--help"] for command in main.COMMANDS)])
def test_help_ends_quietly_where_nobody_reads_on(capfd, monkeypatch, argv):
    assert run_with_closed_pipe(monkeypatch, argv) == 0
    assert capfd.readouterr().err == ""


def test_a_command_ends_quietly_where_nobody_reads_on(capfd, monkeypatch):
    def show_samples(options) -> int:
        print("a sample", flush=True)
        raise AssertionError("not reached")

    monkeypatch.setattr(data, "_show", show_samples)
    assert run_with_closed_pipe(monkeypatch, ["data", "show", "--source=a.tar"]) == 128 + signal.SIGPIPE
    assert capfd.readouterr().err == ""


class Gone:
    """A terminal that is gone."""

    def write(self, text: str) -> None:
        raise BrokenPipeError


def test_an_error_that_nobody_reads_keeps_its_exit_code(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Gone())
    with pytest.raises(SystemExit) as left, errors.refusals("clipjax train"):
        raise ValueError("a line for nobody")
    assert left.value.code == 2


def test_a_folder_as_output_is_refused_before_a_tokenizer_is_trained(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(data, "_captions", lambda source: pytest.fail("the source is read"))
    monkeypatch.setattr(data, "_open", lambda options: None)
    argv = ["tokenizer", "--source=x.tar", "--vocab_size=300", f"--output={tmp_path}"]
    assert exit_code(data.main, argv) == 2
    assert f"--output={tmp_path} is a folder; name a file in it" in capsys.readouterr().err
    assert list(tmp_path.parent.glob("*.tmp")) == []
