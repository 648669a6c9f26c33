"""The index of a tar shard: the members of each sample, and their places.

A sample is the members that share everything before the first dot of their base name, as in WebDataset; what follows
is the kind of the member. Two kinds of members are samples only where nothing else is: images in formats that
training data rarely has (`KEY.tif`), where the key has no other image; and names with more dots, such as
`photo.2019-05.1.jpg`, where all before the last dot is the key of an image and something that describes it, and no
sample has the part before the first dot as its key: of that one they would be further fields (`x.seg.png`).

Reading order: `index_shard`, `_Collector` (members to samples), `ShardIndex`. The tar format is in `tar_format.py`,
the meaning of names in `tar_names.py`; `tar_ranges.py` finds the members of one sample again.
"""

from dataclasses import dataclass, field

import numpy as np

from clipjax.data.sample import REASONS
from clipjax.data.tar_format import BLOCK, DamagedTar, Member, next_header, parse_header, walk
from clipjax.data.tar_names import IMAGE, NUM_COLUMNS, classify
from clipjax.data.tar_ranges import windowed
from clipjax.runtime.storage import OpenFile, is_address

NO_FAULT = -1

MAX_GAP_BYTES = 64 * 2**10
"""Bytes between the members of a sample that are read in one go."""

_WINDOW = 4 * 2**10  # of a local file: a small member and the headers around it
_REMOTE_WINDOW = 8 * 2**20
_FOREIGN = frozenset(
    [
        "text",
        "caption",
        "captions",
        "cap",
        "prompt",
        "svg",
        "ppm",
        "pgm",
        "pbm",
        "tga",
        "psd",
        "dng",
        "cr2",
        "nef",
        "arw",
        "ico",
    ]
)
"""Extensions of texts and images that are never read, and are missed where a sample lacks the like."""

_MOST_EXTENSIONS = 32
_MAX_SHOWN_NAME = 200
_MAX_SHOWN_EXTENSION = 20


@dataclass(slots=True)
class Unused:
    """Members with one extension that belong to no sample.

    Attributes:
        count: of all of them.
        lost: how many of them may be parts of pairs that were meant.
        example: name of one, if possible of those that are lost.
    """

    count: int
    lost: int
    example: str


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """Index of the n samples of one tar.

    Attributes:
        keys: names of the samples.
        offsets: int64 [n, 4] by column (image, caption, JSON, class); -1: absent.
        sizes: uint32 [n, 4].
        faults: int8 [n], index into `REASONS`, or `NO_FAULT`.
        starts: int64 [n + 1], place of the first header of each sample; behind the last one, its end.
        is_compact: True if all of a sample lies before the next one's start, without large members that are not used.
        unused: members that belong to no sample, by extension.
        damage: what cut the shard short; "" if it is whole.
    """

    keys: list[str]
    offsets: np.ndarray
    sizes: np.ndarray
    faults: np.ndarray
    starts: np.ndarray
    is_compact: bool
    unused: dict[str, Unused]
    damage: str


def index_shard(file: OpenFile, path: str) -> ShardIndex:
    """Read the headers of a tar.

    Args:
        file: the tar.
        path: its place, for messages.

    Raises:
        ValueError: the file is no tar.
        OSError: it cannot be read.
    """
    collector = _Collector(file.size)
    damage = _collect(collector, file, path)
    if collector.has_links:  # rare, and the names of all files take more memory than all else
        collector = _Collector(file.size, files={})
        damage = _collect(collector, file, path)
    return collector.finish(damage)


def _collect(collector: "_Collector", file: OpenFile, path: str) -> str:
    """Give all members to a collector; return what cuts the archive short, or ""."""
    read = windowed(file, _REMOTE_WINDOW if is_address(path) else _WINDOW)
    try:
        for member in walk(read, file.size):
            collector.add(member)
    except DamagedTar as error:
        if not collector.is_used and not _starts_like_tar(file):
            raise ValueError(f"{path} is not a tar file; an archive that is compressed must be decompressed") from None
        return str(error)
    return ""


def _starts_like_tar(file: OpenFile) -> bool:
    try:
        return parse_header(file.read(0, BLOCK)) is not None
    except DamagedTar:
        return False


@dataclass(slots=True)
class _Row:
    """A sample that is being collected. `used` counts the bytes of its members and their headers."""

    start: int
    end: int = 0
    used: int = 0
    fault: int = NO_FAULT
    is_linked: bool = False
    offsets: list[int] = field(default_factory=lambda: [-1] * NUM_COLUMNS)
    sizes: list[int] = field(default_factory=lambda: [0] * NUM_COLUMNS)

    @property
    def is_whole(self) -> bool:
        return self.offsets[IMAGE] >= 0 and max(self.offsets[1:]) >= 0


def _name(name: str) -> str:
    return name.removeprefix("./")


def _extension(member: Member) -> str:
    _, dot, extension = member.name.rpartition("/")[2].rpartition(".")
    return extension.lower() if dot else ""


class _Collector:
    """Members to samples.

    Args:
        length: size of the archive.
        files: to fill with the files by name, for hard links to find them; None: links are not followed.

    Attributes:
        is_used: a member has been given to a sample.
        has_links: there were hard links, and they were not followed.
    """

    def __init__(self, length: int, files: dict[str, Member] | None = None):
        self._length, self._end = length, next_header(0, length)
        self._rows: dict[str, _Row] = {}
        self._files = files
        self._rare: dict[str, list[Member]] = {}
        self._dotted: dict[str, list[Member]] = {}
        self._foreign: list[tuple[str, Member]] = []
        self._unused: dict[str, Unused] = {}
        self._latest: _Row | None = None
        self.is_used = self.has_links = False

    def add(self, member: Member) -> None:
        """Take the next member of the archive."""
        place = classify(member.name)
        if member.target is not None:
            target = None if self._files is None else self._files.get(_name(member.target))
            self.has_links |= self._files is None
            if target is not None:
                member = member._replace(offset=target.offset, size=target.size, is_file=True)
        if not member.is_file:
            self._leave(member, is_lost=place.column >= 0)
            return
        if self._files is not None:
            self._files[_name(member.name)] = member
        if place.is_certain:
            self._latest = self._put(place.key, place.column, member)
        elif place.column < 0 and _extension(member) in _FOREIGN:
            self._foreign.append((place.key, member))
        elif place.column < 0:
            self._leave(member, is_lost=False)
        else:
            (self._rare if place.base is None else self._dotted).setdefault(place.key, []).append(member)

    def _put(self, key: str, column: int, member: Member) -> _Row:
        self.is_used = True
        row = self._rows.get(key)
        if row is None:
            row = self._rows[key] = _Row(member.start)
        if member.offset + member.size > self._length:
            row.fault = REASONS.index("truncated_tar")
        elif row.offsets[column] >= 0:
            row.fault = REASONS.index("duplicate_key")
        row.offsets[column] = member.offset
        row.sizes[column] = min(member.size, 2**32 - 1)  # far above every limit
        end = min(member.end, self._end)  # sizes of others may be absurd
        row.start, row.end = min(row.start, member.start), max(row.end, end)
        row.used += end - member.start
        row.is_linked |= member.target is not None
        return row

    def _leave(self, member: Member, *, is_lost: bool) -> None:
        """Count a member that belongs to no sample."""
        extension = _extension(member)[:_MAX_SHOWN_EXTENSION]
        name = member.name[:_MAX_SHOWN_NAME]
        if not member.is_file:
            extension, name = f"{extension} link", f"{name} (a link)"
        known = extension in self._unused or len(self._unused) < _MOST_EXTENSIONS
        unused = self._unused.setdefault(extension if known else "*", Unused(0, 0, name))
        if is_lost and not unused.lost:
            unused.example = name
        unused.count += 1
        unused.lost += is_lost

    def finish(self, damage: str) -> ShardIndex:
        """Return the index of all members; `damage` is what cut the archive short."""
        for key, members in self._rare.items():
            if (row := self._rows.get(key)) is None or row.offsets[IMAGE] < 0:
                for member in members:
                    self._put(key, IMAGE, member)
            else:
                for member in members:
                    self._leave(member, is_lost=False)
        for key, members in self._dotted.items():
            self._add_dotted(key, members)
        for key, member in self._foreign:
            self._leave(member, is_lost=key not in self._rows or not self._rows[key].is_whole)
        if damage and self._latest is not None and not self._latest.is_whole:
            self._latest.fault = REASONS.index("truncated_tar")
        return self._table(damage)

    def _add_dotted(self, key: str, members: list[Member]) -> None:
        """Take members with dots in their name as a sample, or count them."""
        places = [classify(member.name) for member in members]
        columns = {place.column for place in places}
        is_pair = IMAGE in columns and len(columns) > 1
        sample = self._rows.get(places[0].base or "")  # of which they may be further fields
        has_image = any(place.column == IMAGE and not place.is_rare for place in places)
        for member, place in zip(members, places, strict=True):
            if not is_pair or sample is not None:
                is_lost = is_pair or sample is None or not (sample.is_whole or sample.offsets[place.column] >= 0)
                self._leave(member, is_lost=is_lost)
            elif place.is_rare and has_image:
                self._leave(member, is_lost=False)
            else:
                self._put(key, place.column, member)

    def _table(self, damage: str) -> ShardIndex:
        keys = sorted(self._rows, key=lambda key: self._rows[key].start)
        rows = [self._rows[key] for key in keys]
        starts = np.array([row.start for row in rows] + [rows[-1].end if rows else 0], np.int64)
        ends, used = (np.array([getattr(row, name) for row in rows], np.int64) for name in ("end", "used"))
        is_compact = (
            not any(row.is_linked for row in rows)
            and bool((ends[:-1] <= starts[1:-1]).all())
            and bool((np.diff(starts) - used <= MAX_GAP_BYTES).all())
        )
        return ShardIndex(
            keys=keys,
            offsets=np.array([row.offsets for row in rows], np.int64).reshape(-1, NUM_COLUMNS),
            sizes=np.array([row.sizes for row in rows], np.uint32).reshape(-1, NUM_COLUMNS),
            faults=np.array([row.fault for row in rows], np.int8),
            starts=starts,
            is_compact=is_compact,
            unused=self._unused,
            damage=damage,
        )
