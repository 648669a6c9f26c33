"""`clipjax checkpoint verify`: the state of each step, and an exit code for scripts."""

import json
import pathlib
import shutil

import jax.numpy as jnp
import pytest

from clipjax.checkpoints.manager import Checkpoints
from clipjax.cli.main import main
from clipjax.config import CheckpointConfig
from tests.commands import exit_code

VERIFY = ("checkpoint", "verify")
GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "checkpoint_before_layout"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(workdir, CheckpointConfig(best_metric="val:top1"))
    for step in (10, 20, 30):
        checkpoints.save(step, {"params": {"x": jnp.ones(3)}}, {"data": {"format": 2}}, 0.5)
    checkpoints.wait()
    checkpoints.mark_good(10)
    checkpoints.set_aside(30, "rejected")
    return workdir


def rows(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()[2:]]


def test_what_is_whole_is_said_to_be(saved, capsys):
    assert exit_code(main, [*VERIFY, str(saved)]) == 0
    first, second, third = rows(capsys.readouterr().out)
    assert first.startswith("10 complete and verified ") and first.endswith("yes val:top1 0.5")
    assert second.startswith("20 complete and verified ") and second.endswith(" val:top1 0.5") and "yes" not in second
    assert third.startswith("30.rejected set aside ")
    assert exit_code(main, [*VERIFY, f"{saved}/checkpoints/20"]) == 0
    assert len(rows(capsys.readouterr().out)) == 1


def test_what_is_damaged_is_named(saved, tmp_path, capsys):
    shutil.copytree(saved, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    (folder / "10" / "params" / "_METADATA").write_text("x")
    (folder / "20" / "manifest.json").unlink()
    assert exit_code(main, [*VERIFY, str(tmp_path / "run")]) == 3
    first, second, _ = rows(capsys.readouterr().out)
    assert first.startswith("10 damaged: params/_METADATA: 1 bytes instead of ")
    assert second.startswith("20 incomplete: manifest.json: missing ")
    assert exit_code(main, [*VERIFY, "--json", str(folder / "10")]) == 3
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["step"], row["state"], row["good"]) == ("10", "damaged", True)
    assert row["bytes"] > 1000


def test_an_older_format_is_complete_but_not_verified(capsys):
    assert exit_code(main, [*VERIFY, str(GOLDEN)]) == 0
    assert rows(capsys.readouterr().out)[0].startswith("9 unverified: older format ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "a command is missing; the one there is: verify"),
        (["mend"], "'mend' is not a command"),
        (["verify"], "the following arguments are required: WORKDIR_OR_STEP"),
        (["verify", "nowhere"], "no checkpoint at 'nowhere'"),
    ],
)
def test_what_it_cannot_do_is_refused(arguments, message, capsys):
    assert exit_code(main, ["checkpoint", *arguments]) == 2
    assert f"clipjax checkpoint: error: {message}" in capsys.readouterr().err


def test_help(capsys):
    assert exit_code(main, ["checkpoint", "--help"]) == 0
    assert "clipjax checkpoint verify WORKDIR_OR_STEP" in capsys.readouterr().out
    assert exit_code(main, [*VERIFY, "--help"]) == 0
    assert "Exit code 0" in capsys.readouterr().out
