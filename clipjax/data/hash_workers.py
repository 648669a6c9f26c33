"""Processes that hash pictures: each opens the source and reads ranges of samples from its standard input.

They are programs of their own, as those of `clipjax.data.index_workers`, for the same reasons.

Reading order: `SourceSpec`, `Hasher` (this process's side), `main` (the other's).
"""

import base64
import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
from dataclasses import dataclass

import numpy as np

from clipjax.config import DataConfig
from clipjax.data.picture_rows import PictureHashes, hash_rows
from clipjax.data.sample import Source, UnreadableData


@dataclass(frozen=True, kw_only=True)
class SourceSpec:
    """A source by its string, and the fields of `DataConfig` that choose columns and folders."""

    source: str
    tfds_dir: str | None = None
    image_field: str | None = None
    caption_field: str | None = None
    image_root: str | None = None

    def data(self) -> DataConfig:
        """Return the config of the source."""
        return DataConfig(
            train=self.source,
            tfds_dir=self.tfds_dir,
            image_field=self.image_field,
            caption_field=self.caption_field,
            image_root=self.image_root,
        )

    def open(self) -> Source:
        """Return the source. Raise `ValueError` if it cannot be used."""
        from clipjax.data.sources import build_source

        return build_source(self.source, data=self.data())


class Hasher:
    """A process that hashes samples, started when the first ones are asked for; it ends with this one, too."""

    def __init__(self, spec: SourceSpec):
        self._spec = spec
        self._process: subprocess.Popen[str] | None = None

    def hash(self, source: Source, rows: range) -> PictureHashes:
        """Hash samples there; where that process is gone, here.

        Raises:
            UnreadableData: the data cannot be read.
        """
        try:
            if self._process is None:
                self._process = self._start()
            assert self._process.stdin is not None and self._process.stdout is not None
            self._process.stdin.write(json.dumps([rows.start, rows.stop]) + "\n")
            self._process.stdin.flush()
            answer = json.loads(self._process.stdout.readline() or "{}")
        except (OSError, ValueError):
            answer = {}
        if "error" in answer:
            raise UnreadableData(answer["error"])
        if "values" not in answer:
            return hash_rows(source, rows)
        values, reasons = (base64.b64decode(answer[name]) for name in ("values", "reasons"))
        return PictureHashes(np.frombuffer(values, "<u8"), np.frombuffer(reasons, np.int8))

    def _start(self) -> subprocess.Popen[str]:
        # The same code, however it was found.
        code = pathlib.Path(__file__).resolve().parents[2]
        paths = os.pathsep.join([str(code), os.environ.get("PYTHONPATH", "")]).rstrip(":")
        return subprocess.Popen(
            [
                sys.executable or "python3",
                "-m",
                "clipjax.data.hash_workers",
                json.dumps(dataclasses.asdict(self._spec)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="ascii",
            env={**os.environ, "PYTHONPATH": paths},
        )

    def close(self) -> None:
        """End the process after the samples that it reads."""
        if self._process is not None:
            assert self._process.stdin is not None and self._process.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
            self._process.stdout.close()
            self._process.wait()


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
