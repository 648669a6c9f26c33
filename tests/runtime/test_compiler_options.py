"""Presets of compiler options: one for every TPU, taken as they are by the compiler of each, none for CPUs."""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import pytest

from clipjax.runtime.chips import CHIPS, Tpu
from clipjax.runtime.compilation import PRESETS, compiler_options

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
