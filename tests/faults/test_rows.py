"""The rows of the table in `docs/reliability.md`: exit code and message are what it says."""

import pathlib

import pytest

from tests.faults.rows import ROWS, SAVES, Rows
from tests.faults.tiny_run import TinyRun

pytestmark = [pytest.mark.process, pytest.mark.slow]  # others test the same faults one by one


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    run = TinyRun(pathlib.Path(tmp_path_factory.mktemp("rows")), SAVES)
    run.write()
    return Rows(run)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_as_the_table_says(rows, name):
    assert rows.outcome(name) == []
