"""The wheel: what is in it, and that it works in an environment and a folder that know nothing of the checkout."""

import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest

from tests.e2e.conftest import TINY

pytestmark = pytest.mark.process
ROOT = pathlib.Path(__file__).parents[1]


def start(*command: str | pathlib.Path, cwd: pathlib.Path) -> str:
    """Run a program that knows neither the checkout's path nor the simulated devices; return its output."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XLA_FLAGS")}
    merged = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(command, cwd=cwd, env=kept, text=True, timeout=300, **merged)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
    """The wheel, built from a copy of the checkout: nothing that an older build left there can enter it."""
    sources, built = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    for name in ("clipjax", "configs", "tests", "benchmarks", "launch", "docs"):
        shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
    options = ("--quiet", "--no-deps", "--no-build-isolation", f"--wheel-dir={built}")
    start(sys.executable, "-m", "pip", "wheel", *options, sources, cwd=built)
    [path] = built.iterdir()
    return path


def test_it_holds_the_package_the_types_marker_and_the_licence_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
    folder = f"{wheel.name.split('-py3')[0]}.dist-info"
    assert {name.split("/")[0] for name in names} == {"clipjax", folder}
    found = (path for ending in ("*.py", "*.html", "*.json", "*.toml") for path in (ROOT / "clipjax").rglob(ending))
    code = {str(path.relative_to(ROOT)) for path in found}
    assert {name for name in names if name.startswith("clipjax/")} == code | {"clipjax/py.typed"}
    assert [name for name in names if name.startswith(folder) and name.endswith("/LICENSE")]
    assert "Requires-Python: >=3.11\n" in metadata
    assert "Requires-Dist: jax>=" in metadata and "Provides-Extra: gpu13\n" in metadata


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> pathlib.Path:
    """The `bin` of a fresh environment with the wheel in it; the packages that it needs are the tests' own.

    A path file lends them. Path files in a lent folder are not read, so the editable clipjax stays out.
    """
    folder = tmp_path_factory.mktemp("environment")
    start(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    pip = (sys.executable, "-m", "pip", f"--python={folder / 'bin' / 'python'}")
    start(*pip, "install", "--quiet", "--no-deps", wheel, cwd=folder)
    [packages] = folder.glob("lib/python*/site-packages")
    (packages / "lent.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "bin"


def test_away_from_the_checkout_it_makes_data_and_trains(environment, tmp_path):
    def call(program: str, *arguments: str) -> str:
        return start(environment / program, *arguments, cwd=tmp_path)

    place = pathlib.Path(call("python", "-c", "import clipjax; print(clipjax.__file__)").strip())
    assert place.is_relative_to(environment.parent)
    assert "clipjax train" in call("clipjax", "--help")
    assert "siglip" in call("clipjax", "presets").lower()
    assert "train" in call("clipjax", "data", "scenes", "--config=tiny", "--tfds_dir=data")
    (tmp_path / "config.py").write_text(TINY.replace("TFDS_DIR", "'data'"))
    words = ("--config=config.py", "--workdir=run", "--config.total_examples=64", "--config.eval.every_examples=32")
    assert "step 2/2" in call("clipjax", "train", *words)
    assert (tmp_path / "run" / "results.json").is_file()
