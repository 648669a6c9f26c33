"""Processes that hash pictures: each opens the source and reads ranges of samples from its standard input.

Reading order: `SourceSpec`, `Hasher` (this process's side), `main` (the other's).
"""

import base64
import dataclasses
import json
import signal
import sys
from dataclasses import dataclass

import numpy as np

from clipjax.config import DataConfig
from clipjax.data.index_workers import Program
from clipjax.data.picture_rows import PictureHashes, hash_rows
from clipjax.data.sample import Source, UnreadableData


@dataclass(frozen=True, kw_only=True)
class SourceSpec:
    """A source by its string, and the fields of `DataConfig` that choose columns and folders."""

    source: str
    tfds_dir: str | None = None
    cache_dir: str | None = None
    cache_gib: float = DataConfig().cache_gib
    image_field: str | None = None
    caption_field: str | None = None
    image_root: str | None = None

    def data(self) -> DataConfig:
        """Return the config of the source."""
        return DataConfig(
            train=self.source,
            tfds_dir=self.tfds_dir,
            cache_dir=self.cache_dir,
            cache_gib=self.cache_gib,
            image_field=self.image_field,
            caption_field=self.caption_field,
            image_root=self.image_root,
        )

    def open(self) -> Source:
        """Return the source. Raise `ValueError` if it cannot be used."""
        from clipjax.data.sources import build_source

        return build_source(self.source, data=self.data())


class Hasher(Program):
    """A process that hashes samples of a source."""

    def __init__(self, spec: SourceSpec):
        super().__init__("clipjax.data.hash_workers", json.dumps(dataclasses.asdict(spec)))

    def hash(self, source: Source, rows: range) -> PictureHashes:
        """Hash samples there; where that process is gone, here.

        Raises:
            UnreadableData: the data cannot be read.
        """
        answer = self.ask([rows.start, rows.stop])
        if "error" in answer:
            raise UnreadableData(answer["error"])
        if "values" not in answer:
            return hash_rows(source, rows)
        values, reasons = (base64.b64decode(answer[name]) for name in ("values", "reasons"))
        return PictureHashes(np.frombuffer(values, "<u8"), np.frombuffer(reasons, np.int8))


def main() -> None:
    """Answer jobs until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the samples that are being read are soon done
    source = SourceSpec(**json.loads(sys.argv[1])).open()
    for line in sys.stdin:
        start, stop = json.loads(line)
        try:
            found = hash_rows(source, range(start, stop))
            answer = {
                "values": base64.b64encode(found.values.astype("<u8").tobytes()).decode(),
                "reasons": base64.b64encode(found.reasons.tobytes()).decode(),
            }
        except UnreadableData as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
