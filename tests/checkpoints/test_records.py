"""Records of a checkpoint: their size is bounded, for the reader and before that for the writer."""

import json

import pytest

from clipjax.checkpoints import records
from clipjax.checkpoints.records import RECORDS, read_record, write_record

pytestmark = pytest.mark.newest


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_beyond_its_limit_is_not_read(tmp_path, name):
    write_record(tmp_path, name, {"a": "é"})
    assert read_record(tmp_path, name) == {"a": "é"}
    limit = (256 if name == "tokenizer" else 64) * 2**20
    with (tmp_path / name / "metadata").open("r+b") as file:
        file.truncate(limit + 1)
    with pytest.raises(ValueError, match=f"larger than {limit} bytes"):
        read_record(tmp_path, name)


def test_what_would_not_be_read_back_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_MAX_BYTES", 100)
    with pytest.raises(ValueError, match="record data has 102 bytes; at most 100 would be read back"):
        write_record(tmp_path, "data", "x" * 100)
    assert not (tmp_path / "data").exists()
    write_record(tmp_path, "tokenizer", "x" * 100)


def test_the_digests_of_a_hundred_thousand_shards_fit():
    path = "/a/folder/with/a/rather/long/name/and/many/others/in/it" * 4 + "00000.tar"
    shard = [path, "0123456789abcdef" * 4, 10_000]
    assert 100_000 * len(json.dumps(shard) + ", ") < records._MAX_BYTES / 1.5
