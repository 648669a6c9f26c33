"""Objects of the stores `gs://`, `s3://`, `az://`, and files of `http(s)://` servers: read, listed, written.

obstore speaks with them (`connections.py`), with the credentials that each cloud's own tools would find. A request has
a time limit, and is tried again with growing, random pauses after 5xx, 429, a timeout or a broken connection, also in
the middle of the answer; all that within `connections.RETRY_SECONDS`. Errors are `OSError`s with one sentence and the
address.

Reading order: `ObjectFile`, `read_bytes`, `list_files`, `list_folder`, `write_bytes`, `create`, `replace`.
"""

import errno
import fnmatch
import pathlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from clipjax.runtime.connections import WEB, explain, locate, split

MAX_LISTED = 5_000_000
PART_BYTES = 8 * 2**20
"""Files above this are sent in parts of this size, each with its own time limit."""

_PARTS_AT_ONCE = 2
_WILD = re.compile(r"[*?[]")


class FileChanged(OSError):
    """Another program has written a file anew since it was opened."""


@dataclass(frozen=True)
class Listed:
    """An object of a listing.

    Attributes:
        size: bytes.
        version: another text whenever it has been written anew, as far as the store tells.
    """

    size: int
    version: str


def join(place: str, *names: str) -> str:
    """Return the address of what lies inside a folder of a store."""
    return "/".join([place.rstrip("/"), *names])


class ObjectFile:
    """An object that is open for reading, by several threads at once; another process opens its connections anew.

    Args:
        place: its address.
        listed: size and version of the object, where they are known; it is not asked for then.

    Attributes:
        size: bytes of the object when it was opened.
        version: its etag; where its server gives none, time and size.

    Raises:
        FileNotFoundError: there is none.
        OSError: the store does not tell of it.
        ValueError: nothing here opens such an address.
    """

    def __init__(self, place: str, listed: Listed | None = None) -> None:
        import obstore

        self._place = place
        if listed is not None:
            self.size, self.version = listed.size, listed.version
            return
        try:
            about = obstore.head(*locate(place))
        except Exception as error:
            raise explain(error, place) from error
        self.size = int(about["size"])
        self.version = _version(about)

    def read(self, offset: int, size: int) -> bytes:
        """Return bytes from an offset on, fewer only where the object ends.

        Raises:
            FileChanged: the object is not the one that was opened any more.
            OSError: the store does not give them, after retries.
        """
        import obstore

        size = min(size, self.size - offset)
        if size <= 0:
            return b""
        try:
            answer = obstore.get(*locate(self._place), options={"range": (offset, offset + size)})
            if _version(answer.meta) != self.version:
                raise FileChanged(None, "another program has written the object anew", self._place)
            content = bytes(answer.bytes())
        except FileChanged:
            raise
        except Exception as error:
            if "416 Range" in str(error):
                raise FileChanged(None, "another program has written the object anew", self._place) from error
            raise explain(error, self._place) from error
        if len(content) != size:
            raise OSError(errno.EIO, f"the store gave {len(content)} bytes instead of {size}", self._place)
        return content


def read_bytes(place: str, max_bytes: int) -> bytes:
    """Return the content of an object that should be small.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be read.
        ValueError: it is larger than `max_bytes`, and not read then.
    """
    return read_versioned(place, max_bytes)[0]


def read_versioned(place: str, max_bytes: int) -> tuple[bytes, Any]:
    """Return the content of a small object, and its version for `replace`.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be read.
        ValueError: it is larger than `max_bytes`, and not read then.
    """
    import obstore

    try:
        answer = obstore.get(*locate(place))
        if answer.meta["size"] > max_bytes:
            raise ValueError(f"{place!r} is larger than {max_bytes} bytes")
        return bytes(answer.bytes()), _token(answer.meta)
    except ValueError:
        raise
    except Exception as error:
        raise explain(error, place) from error


def exists(place: str) -> bool:
    """Return True if there is an object of this address.

    Raises:
        OSError: the store does not tell.
    """
    try:
        ObjectFile(place)
    except FileNotFoundError:
        return False
    return True


def is_pattern(place: str) -> bool:
    """Return True if a key has `*`, `?` or `[`."""
    return _WILD.search(place.partition("://")[2]) is not None


def list_files(pattern: str) -> list[str]:
    """Return the addresses that match a pattern, in order; `*` ends at a slash, `**` does not.

    Raises:
        OSError: the store does not tell.
        ValueError: the address is of a web server, which lists nothing.
    """
    scheme, bucket, key = split(pattern)
    if scheme in WEB:
        raise ValueError(
            f"{pattern}: a web server lists no files, so * and ? match nothing there; write the numbers of the shards, "
            "as in {00000..00099}.tar"
        )
    wanted = key.split("/")
    first = next(i for i, part in enumerate(wanted) if _WILD.search(part)) if _WILD.search(key) else len(wanted) - 1
    folder = wanted[:first]
    entries = _list(f"{scheme}://{bucket}/{'/'.join(folder)}", deep=first < len(wanted) - 1)
    return sorted(f"{scheme}://{bucket}/{path}" for path, _ in entries if _matches(path.split("/"), wanted))


def _matches(parts: Sequence[str], wanted: Sequence[str]) -> bool:
    if not wanted:
        return not parts
    if wanted[0] == "**":
        return any(_matches(parts[i:], wanted[1:]) for i in range(len(parts) + 1))
    if not parts or (parts[0].startswith(".") and not wanted[0].startswith(".")):
        return False
    return fnmatch.fnmatchcase(parts[0], wanted[0]) and _matches(parts[1:], wanted[1:])


def list_folder(place: str) -> dict[str, Listed]:
    """Return all objects below a folder of a store, by their path inside it.

    Consoles and file systems on stores keep empty objects for folders; these are left out.

    Raises:
        OSError: the store does not tell.
    """
    start = len(split(place)[2].rstrip("/"))
    found = {path[start:].lstrip("/"): listed for path, listed in _list(place, deep=True)}
    folders = {path[:at] for path in found for at, letter in enumerate(path) if letter == "/"} | {""}
    return {path: listed for path, listed in found.items() if listed.size or path not in folders}


def list_objects(place: str) -> dict[str, Listed]:
    """Return the objects in a folder of a store, without those in folders inside it, by name.

    Raises:
        OSError: the store does not tell.
    """
    start = len(split(place)[2].rstrip("/"))
    found = {path[start:].lstrip("/"): listed for path, listed in _list(place, deep=False)}
    return {path: listed for path, listed in found.items() if "/" not in path}  # an emulator gives those inside, too


def _list(place: str, *, deep: bool) -> Iterator[tuple[str, Listed]]:
    import obstore

    store, key = locate(place)
    count = 0
    try:
        pages = (
            obstore.list(store, key, chunk_size=1000) if deep else [obstore.list_with_delimiter(store, key)["objects"]]
        )
        for page in pages:
            count += len(page)
            if count > MAX_LISTED:
                raise ValueError(f"{place}: more than {MAX_LISTED} objects; name a smaller folder")
            for about in page:
                yield about["path"], Listed(about["size"], _version(about))
    except ValueError:
        raise
    except Exception as error:
        raise explain(error, place) from error


def write_bytes(place: str, content: bytes, retry_seconds: float | None = None) -> None:
    """Write an object; it is whole or the old one at any time. `retry_seconds` as `connections.locate` takes it.

    Raises:
        OSError: the store does not take it.
    """
    _put(place, content, retry_seconds)


def write_file(place: str, path: pathlib.Path, retry_seconds: float | None = None) -> None:
    """Write an object from a file, a large one in parts; it is whole or the old one at any time.

    Args:
        place: address of the object.
        path: of the file.
        retry_seconds: as `connections.locate` takes it, for each request.

    Raises:
        OSError: the file cannot be read, or the store does not take it.
    """
    large = path.stat().st_size > PART_BYTES
    content = path if large else path.read_bytes()
    _put(place, content, retry_seconds, chunk_size=PART_BYTES, max_concurrency=_PARTS_AT_ONCE)


def create(place: str, content: bytes) -> Any:
    """Write an object if there is none of this address; return its version for `replace`, or None if there is one.

    Raises:
        OSError: the store does not take it.
    """
    return _put(place, content, mode="create")


def replace(place: str, content: bytes, version: Any) -> Any:
    """Write an object anew if it still has this version; return the new version, or None if it has another or is gone.

    Raises:
        OSError: the store does not take it.
    """
    return _put(place, content, mode=version)


def _put(place: str, content: bytes | pathlib.Path, retry_seconds: float | None = None, **options: Any) -> Any:
    import obstore
    from obstore.exceptions import AlreadyExistsError, PreconditionError

    if split(place)[0] in WEB:
        raise PermissionError(
            errno.EACCES, "a web server takes no files; write to a disk, gs://, s3:// or az://", place
        )
    try:
        return _token(obstore.put(*locate(place, retry_seconds), content, **options))
    except (AlreadyExistsError, PreconditionError):
        return None
    except Exception as error:
        if isinstance(error, FileNotFoundError) and isinstance(options.get("mode"), dict):
            return None
        raise explain(error, place) from error


def copy(place: str, target: str, retry_seconds: float | None = None) -> None:
    """Copy an object inside one bucket, without reading it; `retry_seconds` as `connections.locate` takes it.

    Raises:
        FileNotFoundError: there is none.
        OSError: the store does not do it.
    """
    import obstore

    try:
        obstore.copy(*locate(place, retry_seconds), split(target)[2])
    except Exception as error:
        raise explain(error, place) from error


def delete(place: str, retry_seconds: float | None = None) -> None:
    """Delete an object, if there is one; `retry_seconds` as `connections.locate` takes it.

    Raises:
        OSError: the store does not do it.
    """
    import obstore

    try:
        obstore.delete(*locate(place, retry_seconds))
    except FileNotFoundError:
        return
    except Exception as error:
        raise explain(error, place) from error


def _version(about: Any) -> str:
    return about["e_tag"] or f"{about['last_modified'].isoformat()}-{about['size']}"


def _token(about: Any) -> dict[str, str]:
    """Return what a conditional write compares: etag and generation, as far as the store has them."""
    return {name: about[name] for name in ("e_tag", "version") if about.get(name)}
