"""The JSON records of a checkpoint: config, data position, tokenizer, preprocessing."""

import base64
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from clipjax.config import Config
from clipjax.config.serialization import to_dict
from clipjax.data.tokenizers.build import tokenizer_from_files
from clipjax.data.tokenizers.protocol import Tokenizer
from clipjax.runtime.files import read_bounded

FOLDER = "checkpoints"
FORMAT = 3
"""Of a checkpoint, in its `data` record and its manifest. Format 1 has neither field nor manifest."""

RECORDS = ("config", "data", "tokenizer", "preprocessing")
RECORD_FILE = "metadata"
_MAX_BYTES = 64 * 2**20  # of a record; JSON takes twenty times its size in memory, and 100,000 shards 20 MiB
_MAX_TOKENIZER_BYTES = 256 * 2**20  # its files have at most 64 MiB each, and base64 adds a third


def read_record(directory: pathlib.Path, name: str) -> Any:
    """Return a JSON record of a step directory.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON, or too large.
    """
    try:
        return json.loads(read_bounded(directory / name / RECORD_FILE, _limit(name)))
    except RecursionError as error:
        raise ValueError(f"record {name} is nested too deeply") from error


def write_record(directory: pathlib.Path, name: str, record: Any) -> None:
    """Write a JSON record into a step directory.

    Raises:
        OSError: it cannot be written.
        ValueError: it is so large that it would not be read back.
    """
    content = json.dumps(record).encode()
    if len(content) > _limit(name):
        raise ValueError(f"record {name} has {len(content)} bytes; at most {_limit(name)} would be read back")
    (directory / name).mkdir(parents=True)
    (directory / name / RECORD_FILE).write_bytes(content)


def _limit(name: str) -> int:
    return _MAX_TOKENIZER_BYTES if name == "tokenizer" else _MAX_BYTES


def pack_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the tokenizer as a JSON record."""
    files = {name: base64.b64encode(content).decode() for name, content in tokenizer.files().items()}
    return {"name": tokenizer.name, "files": files}


def unpack_tokenizer(record: Any) -> Tokenizer:
    """Return the tokenizer of a record.

    Raises:
        ValueError: the record is damaged.
    """
    try:
        files = {str(name): base64.b64decode(content, validate=True) for name, content in record["files"].items()}
        return tokenizer_from_files(str(record["name"]), files)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the checkpoint's tokenizer is damaged: {error!r}") from error


def make_records(config: Config, tokenizer: Tokenizer, data_position: Mapping[str, Any]) -> dict[str, Any]:
    """Return all records of a checkpoint.

    `preprocessing` repeats the fields of the config that turn a picture into the model's input, for other readers.
    """
    return {
        "config": to_dict(config),
        "data": {**data_position, "format": FORMAT},
        "tokenizer": pack_tokenizer(tokenizer),
        "preprocessing": {
            "image_size": config.model.image.image_size,
            "resize": config.data.resize.value,
            "interpolation": f"{config.data.interpolation.value}, antialiased",
            "mean": list(config.data.mean),
            "std": list(config.data.std),
        },
    }
