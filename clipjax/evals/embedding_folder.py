"""A folder of embeddings: parts of a fixed number of samples, and a manifest of those that are whole.

    manifest.json            what was embedded by what, the parts, and in the end the counts
    images/part-00000.*      rows in the order of the source, as Parquet; or .npy and a Parquet of the other columns
    texts/part-00000.*       the same for captions

Parts lie in `.unfinished` until all are there: the map (`x`, `y`) needs all embeddings. A part is in the manifest only
once its files are on the disk, so that a run that is killed goes on with the next one.

Reading order: `Rows`, `EmbeddingWriter`, `EmbeddingFolder`. Axes: n rows, e embed.
"""

import io
import json
import pathlib
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipjax.data.sample import UnreadableData
from clipjax.data.tokenizers.protocol import without_surrogates
from clipjax.evals.principal_axes import find_axes, project
from clipjax.runtime.files import read_bounded, require_writable, write_atomic

FORMAT = 1
IMAGES, TEXTS = KINDS = ("images", "texts")
PARQUET, NPY = FORMS = ("parquet", "npy")
MANIFEST, UNFINISHED, LOCK = "manifest.json", ".unfinished", ".lock"
PLACES = ("checkpoint", "source")
"""Entries of what a manifest tells that say where something lay: elsewhere it is the same, by its digest."""

_MAX_MANIFEST_BYTES = 500_000_000
_ROWS_AT_ONCE = 16_384
_KNOWN = {MANIFEST, f"{MANIFEST}.tmp", UNFINISHED, LOCK, ".write-probe", *KINDS}


@dataclass(frozen=True)
class Rows:
    """Embeddings of one kind.

    Attributes:
        ids: key of the sample in its source, or its position.
        index: position of the sample in the source.
        captions: of the sample, the first one of an image, empty if there is none; or the text itself.
        embeddings: unit-norm float32 `[n, e]`.
    """

    ids: Sequence[str]
    index: Sequence[int]
    captions: Sequence[str]
    embeddings: np.ndarray


class EmbeddingWriter:
    """The folder while it is written.

    Args:
        folder: to write, new, empty, or of a run with the same `about`.
        about: everything that the bytes depend on; `what`, `format`, `embed_dim`, `num_samples` and `samples_per_part`
            among it.

    Raises:
        ValueError: it holds something else, or what another checkpoint, source or option gave; or cannot be written to.
    """

    def __init__(self, folder: pathlib.Path, about: Mapping[str, Any]) -> None:
        self._folder, self._about = folder, dict(about)
        self._kinds = KINDS if about["what"] == "both" else (about["what"],)
        require_writable(folder, "--output")
        self._parts: list[dict[str, Any]] = []
        self.counts: dict[str, Any] | None = None
        if (folder / MANIFEST).exists():
            manifest = read_manifest(folder)
            _require_same(folder, manifest["about"], self._about)
            self._about |= {name: manifest["about"][name] for name in PLACES}  # so that the bytes stay the same
            self._parts = manifest["parts"]
            self.counts = None if _lost_file(folder, manifest) else manifest["counts"]
        elif others := sorted({path.name for path in folder.iterdir()} - {LOCK}):
            raise ValueError(f"--output={folder} holds {others[0]!r}, which is of something else; name an empty folder")
        if self.counts is None:
            self._drop_parts_without_files()
            self._write_manifest()

    @property
    def start(self) -> int:
        """The first sample that is not there yet."""
        return self._parts[-1]["samples"][1] if self._parts else 0

    def add(self, stop: int, rows: Mapping[str, Rows], unusable: Mapping[str, Mapping[str, int]]) -> None:
        """Write the next part, which reaches to sample `stop`.

        Args:
            stop: the first sample behind it.
            rows: by kind.
            unusable: number of samples that were left out, by kind and reason.

        Raises:
            OSError: the disk does not take it.
        """
        number, files = len(self._parts), {}
        for kind in self._kinds:
            for path, content in self._contents(kind, number, rows[kind]).items():
                (self._folder / path).parent.mkdir(parents=True, exist_ok=True)
                write_atomic(self._folder / path, content, sync=True)
                files[path] = len(content)
        self._parts.append(
            {
                "samples": [self.start, stop],
                "rows": {kind: len(rows[kind].ids) for kind in self._kinds},
                "unusable": {kind: dict(sorted(unusable[kind].items())) for kind in self._kinds},
                "files": files,
            }
        )
        self._write_manifest()

    def finish(self) -> dict[str, Any]:
        """Compute the map, put the parts in their places, and return the counts.

        Raises:
            OSError: the disk does not take a part, or does not give one.
        """
        if self.counts is None:
            assert self.start == self._about["num_samples"], self.start
            for kind in self._kinds:
                self._place_parts(kind)
            unusable = {kind: Counter[str]() for kind in self._kinds}
            for part in self._parts:
                for kind in self._kinds:
                    unusable[kind].update(part["unusable"][kind])
            self.counts = {
                "samples": self._about["num_samples"],
                **{kind: sum(part["rows"][kind] for part in self._parts) for kind in self._kinds},
                "unusable": {kind: dict(sorted(each.items())) for kind, each in unusable.items()},
            }
            self._write_manifest()
        shutil.rmtree(self._folder / UNFINISHED, ignore_errors=True)
        return self.counts

    def _contents(self, kind: str, number: int, rows: Rows) -> dict[str, bytes]:
        """Return the files of a part by path."""
        import pyarrow

        embeddings = np.ascontiguousarray(rows.embeddings, np.float32)
        assert embeddings.shape == (len(rows.ids), self._about["embed_dim"]), embeddings.shape
        columns = {
            "id": pyarrow.array(map(without_surrogates, rows.ids), pyarrow.string()),
            "index": pyarrow.array(rows.index, pyarrow.int64()),
            "caption": pyarrow.array(map(without_surrogates, rows.captions), pyarrow.string()),
        }
        name, files = f"{kind}/part-{number:05d}", {}
        if self._about["format"] == NPY:
            stream = io.BytesIO()
            np.save(stream, embeddings, allow_pickle=False)
            files[f"{name}.npy"] = stream.getvalue()
        else:
            flat = pyarrow.array(embeddings.reshape(-1), pyarrow.float32())
            columns["embedding"] = pyarrow.FixedSizeListArray.from_arrays(flat, self._about["embed_dim"])
        return {**files, f"{UNFINISHED}/{name}.parquet": _to_parquet(pyarrow.table(columns))}

    def _place_parts(self, kind: str) -> None:
        """Write the parts again, with their places on the map."""
        import pyarrow
        import pyarrow.parquet

        dim, counts = self._about["embed_dim"], [part["rows"][kind] for part in self._parts]
        read = lambda number: self._embeddings(kind, number)  # noqa: E731
        mean, axes = find_axes(lambda: map(read, range(len(counts))), sum(counts), dim)
        (self._folder / kind).mkdir(exist_ok=True)
        for number in range(len(counts)):
            name = f"{kind}/part-{number:05d}.parquet"
            table = pyarrow.parquet.read_table(self._folder / UNFINISHED / name)
            places = project(read(number), mean, axes)
            for axis, column in zip("xy", places.T, strict=True):
                table = table.append_column(axis, pyarrow.array(np.ascontiguousarray(column)))
            content = _to_parquet(table)
            write_atomic(self._folder / name, content, sync=True)
            files = self._parts[number]["files"]
            self._parts[number]["final"] = self._parts[number].get("final", {}) | {name: len(content)}
            for path in files:
                if path.endswith(".npy"):
                    self._parts[number]["final"][path] = files[path]

    def _embeddings(self, kind: str, number: int) -> np.ndarray:
        folder = self._folder if self._about["format"] == NPY else self._folder / UNFINISHED
        blocks = list(_read_part(folder, kind, number, self._about["format"], self._about["embed_dim"]))
        return np.concatenate([np.zeros((0, self._about["embed_dim"]), np.float32), *blocks])

    def _drop_parts_without_files(self) -> None:
        """Forget the first part of which a file is not as it was written, and those behind it: they are made anew."""
        for number, part in enumerate(self._parts):
            if any(_size_of(self._folder / path) != size for path, size in part["files"].items()):
                del self._parts[number:]
                return
            part.pop("final", None)

    def _write_manifest(self) -> None:
        manifest = {"format": FORMAT, "about": self._about, "counts": self.counts, "parts": self._parts}
        write_atomic(self._folder / MANIFEST, json.dumps(manifest, indent=1) + "\n", sync=True)


class EmbeddingFolder:
    """A finished folder, for reading.

    Attributes:
        about: what was embedded by what.

    Raises:
        ValueError: it is none, is not finished, or has lost a file.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        if not (folder / MANIFEST).is_file():
            raise ValueError(f"{folder} is no folder of embeddings: it has no {MANIFEST}; clipjax embed makes one")
        manifest = read_manifest(folder)
        self.about: dict[str, Any] = manifest["about"]
        self._folder, self._parts = folder, manifest["parts"]
        if manifest["counts"] is None:
            raise ValueError(f"{folder} is not finished; the same clipjax embed goes on where it was stopped")
        if lost := _lost_file(folder, manifest):
            raise ValueError(f"{lost}; the same clipjax embed makes it anew")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of embeddings that are there."""
        return tuple(kind for kind in KINDS if self.about["what"] in (kind, "both"))

    def count(self, kind: str) -> int:
        """Return the number of rows of a kind."""
        return sum(part["rows"][kind] for part in self._parts)

    def blocks(self, kind: str) -> Iterator[np.ndarray]:
        """Yield all embeddings of a kind in their order, float32 `[n, e]`; of `.npy` they stay on the disk until read.

        Raises:
            UnreadableData: a file is not as it was written.
        """
        for number in range(len(self._parts)):
            yield from _read_part(self._folder, kind, number, self.about["format"], self.about["embed_dim"])

    def rows(self, kind: str, places: Sequence[int]) -> list[dict[str, Any]]:
        """Return `id`, `index` and `caption` of rows.

        Raises:
            UnreadableData: a file is not as it was written.
        """
        import pyarrow.parquet

        ends = np.cumsum([part["rows"][kind] for part in self._parts])
        tables: dict[int, Any] = {}
        found = []
        for place in places:
            number = int(np.searchsorted(ends, place, side="right"))
            if number not in tables:
                path = self._folder / f"{kind}/part-{number:05d}.parquet"
                try:
                    tables[number] = pyarrow.parquet.read_table(path, columns=["id", "index", "caption"])
                except (ValueError, KeyError, pyarrow.ArrowException) as error:
                    raise _damaged(path, error) from error
            found += tables[number].slice(place - (int(ends[number - 1]) if number else 0), 1).to_pylist()
        return found


def read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    """Return the manifest of a folder.

    Raises:
        ValueError: it is damaged, or of a newer format.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(read_bounded(path, _MAX_MANIFEST_BYTES))
        is_ours = isinstance(manifest["about"], dict) and all(
            isinstance(part[name], kind)
            for part in manifest["parts"]
            for name, kind in (("samples", list), ("rows", dict), ("unusable", dict), ("files", dict))
        )
        if type(manifest["format"]) is not int or not is_ours or manifest["about"]["what"] not in (*KINDS, "both"):
            raise ValueError("another content")
        if manifest["counts"] is not None and not all(isinstance(part["final"], dict) for part in manifest["parts"]):
            raise ValueError("another content")
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); remove {folder} and embed again") from error
    if manifest["format"] > FORMAT:
        raise ValueError(f"{path} is of format {manifest['format']}, and this version of clipjax knows up to {FORMAT}")
    return manifest


def _lost_file(folder: pathlib.Path, manifest: Mapping[str, Any]) -> str:
    """Return the first file of a finished folder that is not as it was written, and how; empty if there is none."""
    if manifest["counts"] is not None:
        for part in manifest["parts"]:
            for path, size in part["final"].items():
                if (found := _size_of(folder / path)) != size:
                    return f"{folder / path} " + ("is missing" if found is None else f"has {found} bytes, not {size}")
    return ""


def _size_of(path: pathlib.Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _to_parquet(table: Any) -> bytes:
    import pyarrow.parquet

    stream = io.BytesIO()
    # Embeddings do not shrink; without compression they are read at the speed of the disk.
    pyarrow.parquet.write_table(table, stream, compression="NONE", use_dictionary=False)
    return stream.getvalue()


def _require_same(folder: pathlib.Path, recorded: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse to go on with embeddings of something else.

    Raises:
        ValueError: all differences, with both values.
    """
    names = [name for name in given if name not in PLACES and recorded.get(name) != given[name]]
    if not names:
        return
    shown = [f"{name} {recorded.get(name)!r}, now {given[name]!r}" for name in names]
    places = [f"{name} {recorded.get(name)!r}" for name in PLACES]
    hint = ""
    if set(names) <= {"batch_size", "samples_per_part"}:  # its default depends on the number of devices
        options = " ".join(f"--{name}={recorded.get(name)}" for name in ("batch_size", "samples_per_part"))
        hint = f", or go on with {options}"
    raise ValueError(
        f"--output={folder} holds embeddings of {' and '.join(places)} with {'; '.join(shown)}: name another folder, "
        f"or remove this one{hint}"
    )


def _read_part(folder: pathlib.Path, kind: str, number: int, form: str, dim: int) -> Iterator[np.ndarray]:
    """Yield the embeddings of a part."""
    import pyarrow
    import pyarrow.parquet

    path = folder / f"{kind}/part-{number:05d}.{form}"
    try:
        if form == NPY:
            rows = np.load(path, mmap_mode="r", allow_pickle=False)
            if rows.ndim != 2 or rows.shape[1] != dim or rows.dtype != np.float32:
                raise ValueError(f"float32 [n, {dim}] is expected, not {rows.dtype} {rows.shape}")
            yield rows
            return
        with pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
            if file.schema_arrow.field("embedding").type != pyarrow.list_(pyarrow.float32(), dim):
                raise ValueError(f"a column embedding of {dim} floats is expected")
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=["embedding"]):
                yield np.asarray(batch.column(0).flatten()).reshape(-1, dim)
    except (ValueError, KeyError, pyarrow.ArrowException) as error:
        raise _damaged(path, error) from error


def _damaged(path: pathlib.Path, error: Exception) -> UnreadableData:
    return UnreadableData(f"{path} is damaged: {error}; remove the folder and embed again")
