"""Processes that judge shards by filters: each reads jobs from its standard input, and answers with a result.

Reading order: `Judge` (this process's side), `main` (the other's); `index_workers.py` tells why they are programs.
"""

import base64
import dataclasses
import json
import signal
import sys
from typing import Any

from clipjax.config import DataConfig
from clipjax.data.index_workers import Program

_FIELDS = (
    "filters",
    "keep_keys",
    "drop_keys",
    "image_field",
    "caption_field",
    "image_root",
    "max_image_pixels",
    "max_caption_bytes",
)


class Judge(Program):
    """A process that judges shards.

    Args:
        data: with the filters.
    """

    def __init__(self, data: DataConfig) -> None:
        super().__init__("clipjax.data.filter_workers")
        self._data = {name: getattr(data, name) for name in _FIELDS}

    def judge(self, path: str, *, may_wait: bool) -> dict[str, Any]:
        """Judge a shard there.

        Args:
            path: of the shard.
            may_wait: wait for another process that judges it.

        Returns:
            `result`, the packed result in base64; or `is_held`, if another process judges it and `may_wait` is False;
            or something else, where that failed.
        """
        return self.ask({"path": path, "data": self._data, "may_wait": may_wait})


def main() -> None:
    """Answer jobs until there are no more."""
    from clipjax.data.metadata import DescribedSource
    from clipjax.data.shard_results import judge_shard, make_filters, pack_result
    from clipjax.data.sources import build_source

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the shard that is being read is soon done
    made: dict[str, Any] = {}
    for line in sys.stdin:
        job = json.loads(line)
        try:
            text = json.dumps(job["data"])
            data = dataclasses.replace(DataConfig(), **job["data"])
            if text not in made:
                made[text] = make_filters(data)
            source = build_source(job["path"], data=data)
            assert isinstance(source, DescribedSource)
            [(path, count)] = source.shard_counts()
            if path != job["path"]:  # its name is a pattern that another one matches
                raise ValueError(f"{path} is another shard")
            result = judge_shard(source, 0, path, count, made[text], may_wait=job["may_wait"])
            packed = "" if result is None else base64.b64encode(pack_result(result, made[text])).decode()
            answer: dict[str, Any] = {"is_held": result is None, "result": packed}
        except (ValueError, OSError) as error:
            answer = {"error": str(error)}  # the other process meets it, too
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
