"""Members of shards that are no sample: told where pairs may have been lost.

Reading order: `require_samples`, `tell_unused`, `tell_damage`.
"""

import logging
from collections.abc import Iterable, Sequence

from clipjax.data.index_file import IndexHeader
from clipjax.data.tar_index import Unused
from clipjax.runtime.terminal import printable

EXPECTED = "members KEY.jpg (jpeg, png, webp) and KEY.txt or KEY.json, where KEY has no dot or both have the same"
_MOST_SHOWN = 5
_log = logging.getLogger(__name__)


def require_samples(paths: Sequence[str], headers: Sequence[IndexHeader]) -> None:
    """Refuse shards without any sample, with what is in them instead.

    Raises:
        ValueError: there is no sample.
    """
    if any(header.count for header in headers):
        return
    unused = _sum(headers)
    shown = [f"{printable(each.example)}" for each in _by_loss(unused)]
    found = f"there are members like {_list(shown)}" if shown else "there is no member at all"
    raise ValueError(f"no sample in {', '.join(paths[:_MOST_SHOWN])}: {found}; expected {EXPECTED}")


def tell_unused(paths: Sequence[str], headers: Sequence[IndexHeader]) -> None:
    """Warn of members that may be parts of pairs and are not used, and of shards that are cut short."""
    lost = [each for each in _by_loss(_sum(headers)) if each.lost]
    if lost:
        shown = [f"{each.lost} like {printable(each.example)}" for each in lost]
        first = next(
            path for path, header in zip(paths, headers, strict=True) if any(u.lost for u in header.unused.values())
        )
        _log.warning(
            "members that look like parts of pairs are in no sample and are not used: %s (first in %s); expected %s",
            _list(shown),
            printable(first),
            EXPECTED,
        )
    damaged = [(path, header) for path, header in zip(paths, headers, strict=True) if header.damage]
    for path, header in damaged[:_MOST_SHOWN]:
        _log.warning("%s: %s; using the %d keys before", printable(path), printable(header.damage), header.count)
    if len(damaged) > _MOST_SHOWN:
        _log.warning("and %d more shards are cut short or damaged", len(damaged) - _MOST_SHOWN)


def _sum(headers: Iterable[IndexHeader]) -> dict[str, Unused]:
    total: dict[str, Unused] = {}
    for header in headers:
        for extension, each in header.unused.items():
            seen = total.setdefault(extension, Unused(0, 0, each.example))
            if each.lost and not seen.lost:
                seen.example = each.example
            seen.count += each.count
            seen.lost += each.lost
    return total


def _by_loss(unused: dict[str, Unused]) -> list[Unused]:
    return sorted(unused.values(), key=lambda each: (-each.lost, -each.count))


def _list(shown: Sequence[str]) -> str:
    return ", ".join(shown[:_MOST_SHOWN]) + (", ..." if len(shown) > _MOST_SHOWN else "")
