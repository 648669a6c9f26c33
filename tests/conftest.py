"""Fixtures, and the machine that every test runs on: 8 simulated CPU devices, fixed before JAX starts."""

import os
import pathlib

from tests.commands import QUICK_COMPILE

os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {QUICK_COMPILE}"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("NPROC", "2")  # bits on the CPU depend on the size of XLA's thread pool

import jax
import pytest
from jaxtyping import install_import_hook

from tests.runtime.store_fixtures import gcs, gcs_session, impatient, on_machine, s3, s3_session, web  # noqa: F401

# Shapes and dtypes in signatures are checked here, and only here.
CHECKED = ("clipjax.models", "clipjax.losses")
install_import_hook(CHECKED, "beartype.beartype")

jax.config.update("jax_numpy_rank_promotion", "raise")

SHARED = pathlib.Path(os.environ.get("CLIPJAX_SHARED", pathlib.Path(__file__).resolve().parents[1].parent / "shared"))


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder of data and parity targets beside the repository; tests that need it skip without it."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the folder {SHARED.name}/ beside the repository, which is absent")
    return SHARED


@pytest.fixture(scope="session", autouse=True)
def compile_cache(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The folder of what was compiled in this session: what several tests or processes compile is compiled once."""
    folder = tmp_path_factory.mktemp("compiled")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder
