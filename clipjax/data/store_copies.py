"""Sources in a store whose library reads from a disk alone: all of their files are copied to `data.cache_dir` first.

Reading order: `make_cache`, `require_cache`, `look_up`, `keep_array_records`.
"""

from collections.abc import Sequence
from concurrent import futures

from clipjax.config import DataConfig
from clipjax.data.digests import DIGEST_THREADS
from clipjax.runtime.file_cache import FileCache
from clipjax.runtime.kept_files import KeptFiles, Wanted, keep_files
from clipjax.runtime.objects import Listed
from clipjax.runtime.storage import is_address, open_file


def make_cache(data: DataConfig) -> FileCache | None:
    """Return the cache of copies of objects that a config chooses; None without one."""
    return None if data.cache_dir is None else FileCache(data.cache_dir, round(data.cache_gib * 2**30))


def require_cache(data: DataConfig, spec: str) -> FileCache:
    """Return the cache that a source in a store cannot do without.

    Raises:
        ValueError: the config has none.
    """
    cache = make_cache(data)
    if cache is None:
        raise ValueError(
            f"source {spec!r} lies in a store, and its library reads files on a disk alone, so all of them are copied "
            "first: set data.cache_dir (--cache_dir of `clipjax data`), a folder on a disk of each machine, and "
            "data.cache_gib to their size at least"
        )
    return cache


def look_up(places: Sequence[str]) -> list[Wanted]:
    """Return the size and the version that objects have now.

    Raises:
        OSError: one is not there, or its store does not tell of it.
    """

    def find(place: str) -> Wanted:
        file = open_file(place)
        return Wanted(place, Listed(file.size, file.version))

    with futures.ThreadPoolExecutor(DIGEST_THREADS) as pool:
        return list(pool.map(find, places))


def keep_array_records(paths: Sequence[str], data: DataConfig, spec: str) -> tuple[list[str], KeptFiles | None]:
    """Return paths on the disk for files of which some may lie in a store, and what keeps the copies of those there.

    Args:
        paths: of the files, or addresses.
        data: chooses the cache.
        spec: string that names the source, for messages.

    Raises:
        ValueError: there is no cache, no room in it, or a file cannot be copied.
        OSError: a store does not tell of a file.
    """
    places = [path for path in paths if is_address(path)]
    if not places:
        return list(paths), None
    cache = require_cache(data, spec)
    folders = {folder: number for number, folder in enumerate(dict.fromkeys(map(_folder_of, places)))}
    names = {place: f"{folders[_folder_of(place)]}/{place.rpartition('/')[2]}" for place in places}
    kept = keep_files(cache, {names[each.place]: each for each in look_up(places)}, spec)
    return [kept.path(names[path]) if path in names else path for path in paths], kept


def _folder_of(place: str) -> str:
    return place.rpartition("/")[0]
