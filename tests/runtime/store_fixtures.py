"""Fixtures: object stores on this machine. `tests/conftest.py` gives them to all tests."""

import pathlib

import pytest

from clipjax.runtime import connections
from tests.runtime import stores


@pytest.fixture(scope="session")
def gcs_session():
    with stores.gcs_server() as found:
        yield found


@pytest.fixture(scope="session")
def s3_session():
    with stores.s3_server() as found:
        yield found


@pytest.fixture
def gcs(gcs_session, monkeypatch):
    """A server of GCS, to which gs:// leads here."""
    server, environment = gcs_session
    server.reset()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return server


@pytest.fixture
def s3(s3_session, monkeypatch):
    """A server of S3, to which s3:// leads here."""
    server, environment = s3_session
    server.reset()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return server


@pytest.fixture
def web():
    """A server of files by HTTP; its backend has the contents."""
    server = stores.StoreServer(stores.Files())
    yield server
    server.close()


@pytest.fixture
def impatient(monkeypatch):
    """Time limits in which a test can see them."""
    monkeypatch.setattr(connections, "REQUEST_SECONDS", 0.5)
    monkeypatch.setattr(connections, "CONNECT_SECONDS", 0.5)
    monkeypatch.setattr(connections, "MAX_RETRIES", 2)
    connections._open_store.cache_clear()
    yield
    connections._open_store.cache_clear()


@pytest.fixture
def on_machine(tmp_path, monkeypatch):
    """Go to another machine: one with an empty cache folder."""

    def go(name: str) -> pathlib.Path:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
        return tmp_path / name / "clipjax" / "index"

    return go
