"""Compilation: the compile cache is this user's alone; every TPU has a preset of options that its compiler takes."""

import importlib.util
import json
import os
import stat
import subprocess
import sys

import jax
import pytest

from clipjax.runtime import compilation
from clipjax.runtime.chips import CHIPS, Tpu
from clipjax.runtime.compilation import PRESETS, compiler_options
from tests.faults.tiny_run import TinyRun, ended

LEAST_TIME = "jax_persistent_cache_min_compile_time_secs"
SMALLEST = {"v4": "2x2x1", "v5e": "2x2", "v5p": "2x2x1", "v6e": "2x2"}
COMPILE = """
import json, sys
from clipjax.planning import targets
targets.prepare_environment("v5e:2x2")
import jax, jax.numpy as jnp
from clipjax.runtime.compilation import compiler_options
from jax.sharding import Mesh, NamedSharding, PartitionSpec
for chip, shape in json.loads(sys.argv[1]).items():
    devices = targets.find_target(f"{chip}:{shape}").devices
    mesh = Mesh(devices, ("fsdp",))
    rows = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))
    options = compiler_options(devices)
    text = jax.jit(lambda x: x @ x, compiler_options=options).lower(rows).compile().as_text()
    assert "all-gather" in text
    print(chip, len(options))
"""


@pytest.fixture(autouse=True)
def kept():
    """JAX's own settings come back after a test."""
    names = ("jax_compilation_cache_dir", "jax_enable_compilation_cache", LEAST_TIME)
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_named_directory_is_made_for_this_user_alone(tmp_path):
    folder = tmp_path / "new" / "cache"
    assert compilation.enable(str(folder)) == str(folder)
    assert mode(folder) == 0o700
    assert jax.config.jax_compilation_cache_dir == str(folder)


def test_one_inside_a_folder_of_others_is_refused_and_not_made(tmp_path):
    theirs = tmp_path / "run"
    theirs.mkdir()
    (tmp_path / "link").symlink_to(theirs)
    for folder in (theirs, theirs / "xla", theirs / "checkpoints" / "xla", tmp_path / "link" / "xla"):
        with pytest.raises(ValueError, match=r"compile_cache='.*' lies in .*run, a folder of data or checkpoints"):
            compilation.enable(str(folder), outside=[tmp_path / "elsewhere", theirs])
    assert list(theirs.iterdir()) == []
    assert compilation.enable(str(tmp_path / "runs"), outside=[theirs]) == str(tmp_path / "runs")


def test_one_that_others_may_read_is_closed(tmp_path):
    tmp_path.chmod(0o755)
    compilation.enable(str(tmp_path))
    assert mode(tmp_path) == 0o700


@pytest.mark.parametrize("bits", [0o770, 0o707, 0o777])
def test_one_that_others_may_write_to_is_refused(tmp_path, bits):
    tmp_path.chmod(bits)
    with pytest.raises(ValueError, match=rf"may be written to by others \(mode {bits:04o}\).*chmod 700"):
        compilation.enable(str(tmp_path))
    assert mode(tmp_path) == bits


def test_another_users_directory_a_link_and_a_file_are_refused(tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "file").write_text("")
    for name in ("link", "file"):
        with pytest.raises(ValueError, match="must be a directory, and no link"):
            compilation.enable(str(tmp_path / name))
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(ValueError, match=f"belongs to user {owner}, not to you"):
        compilation.enable(str(tmp_path))


def test_one_that_cannot_be_made_is_refused_if_it_was_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="compile_cache='.*' cannot be made"):
        compilation.enable(str(tmp_path / "file" / "cache"))


def test_auto_is_off_on_cpus_and_in_the_users_cache_on_accelerators(tmp_path, monkeypatch):
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    assert compilation.enable(compilation.AUTO, environment) is None
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert compilation.enable(compilation.AUTO, environment) == str(tmp_path / "clipjax" / "xla")
    assert mode(tmp_path / "clipjax" / "xla") == 0o700
    (tmp_path / "file").write_text("")
    assert compilation.enable(compilation.AUTO, {"XDG_CACHE_HOME": str(tmp_path / "file")}) is None
    home = compilation.enable(compilation.AUTO, {"HOME": str(tmp_path)})
    assert home == str(tmp_path / ".cache" / "clipjax" / "xla")
    assert compilation.enable(compilation.AUTO, environment | {"JAX_COMPILATION_CACHE_DIR": "mine"}) == "mine"


def test_auto_in_a_folder_of_data_is_off_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert compilation.enable(compilation.AUTO, {"HOME": str(tmp_path)}, outside=[tmp_path]) is None
    assert list(tmp_path.iterdir()) == []
    assert f"lies in {tmp_path}, a folder of data or checkpoints" in capsys.readouterr().err


def test_programs_that_compile_at_once_are_kept_too_unless_jax_is_told_otherwise(tmp_path):
    jax.config.update(LEAST_TIME, 3.0)
    compilation.enable(str(tmp_path), {LEAST_TIME.upper(): "3"})
    assert getattr(jax.config, LEAST_TIME) == 3
    compilation.enable(str(tmp_path), {})
    assert getattr(jax.config, LEAST_TIME) == 0


COUNT = """
import collections, os, sys
for name in [name for name in os.environ if name.startswith("JAX_PERSISTENT_CACHE")]:
    del os.environ[name]  # as a user starts it
import jax

counts = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: counts.update([event.rpartition("/")[2]]))
jax.monitoring.register_event_duration_secs_listener(lambda event, _, **__: counts.update([event.rpartition("/")[2]]))
from clipjax.cli.main import main

code = main(sys.argv[1:])
print("COUNTS", counts["backend_compile_duration"], counts["cache_hits"])
sys.exit(code)
"""


@pytest.mark.process
def test_the_second_start_of_a_run_compiles_nothing_and_two_runs_share_the_directory(tmp_path):
    """JAX times a program that it takes from the cache as if it was compiled: all of them are hits."""
    run = TinyRun(tmp_path, ("--config.total_examples=96", "--config.eval.every_examples=48"))
    run.write()
    driver = tmp_path / "driver.py"
    driver.write_text(COUNT)

    def count(*names: str) -> list[tuple[int, ...]]:
        started = [run.start(name, prefix=(str(driver),)) for name in names]
        for process, name in zip(started, names, strict=True):
            with ended(process):
                assert process.wait(timeout=300) == 0, run.output(name)
        lines = [run.output(name).partition("COUNTS ")[2].split() for name in names]
        return [tuple(map(int, line[:2])) for line in lines]

    ((programs, hits),) = count("first")
    assert programs > 3 and hits == 0
    assert count("second", "third") == [(programs, programs)] * 2


def test_none_switches_jaxs_own_cache_off_too():
    assert compilation.enable(None) is None
    assert not jax.config.jax_enable_compilation_cache


def test_cpus_are_told_nothing():
    assert compiler_options(jax.devices()) == {}


def test_every_tpu_has_a_preset():
    assert set(PRESETS) == set(SMALLEST) == {name for name, chip in CHIPS.items() if isinstance(chip, Tpu)}


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: pip install libtpu")
def test_compilers_take_the_presets():
    """An option that a compiler does not know is an error, as is one out of its range."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, json.dumps(SMALLEST)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert dict(line.split() for line in done.stdout.splitlines()) == {
        chip: str(len(options)) for chip, options in PRESETS.items()
    }
