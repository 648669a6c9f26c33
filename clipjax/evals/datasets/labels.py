"""Class names in the order in which data numbers them. TFDS numbers some sets otherwise than published lists."""

import re
from collections.abc import Mapping, Sequence

from clipjax.evals import datasets
from clipjax.evals.datasets.specs import specs

_MOST_SHOWN = 3


def order_names(
    classes: Sequence[str], labels: Sequence[str] | None, *, field: str, is_file: bool, aliases: Mapping[str, str]
) -> tuple[str, ...]:
    """Return class names in the order of the data's labels.

    Labels that are numbers or WordNet's ids are no words: class names stay in their order beside them. So do those of a
    file, which is the user's own, unless it plainly holds the data's names in another order.

    Args:
        classes: names of a list.
        labels: the data's own names of its labels, in their order; None: it has none.
        field: names the list in messages.
        is_file: the list is a file, and not one that is published.
        aliases: class names by the data's own, where they differ by more than case, spaces and marks.

    Raises:
        ValueError: the numbers differ, or a published list has other names; or a file has them in another order.
    """
    if labels is None:
        return tuple(classes)
    if len(labels) != len(classes):
        raise ValueError(
            f"{field} holds {len(classes)} names, and the data has {len(labels)} classes; give the list of this data"
        )
    if all(label.isdecimal() for label in labels) or _are_sorted_ids(labels):
        return tuple(classes)
    wanted = [_plain(aliases.get(label, label)) for label in labels]
    by_name = {_plain(name): name for name in classes}
    fits = len(by_name) == len(classes) and set(wanted) == set(by_name)
    if fits and not is_file:
        return tuple(by_name[name] for name in wanted)
    if fits and [_plain(name) for name in classes] != wanted:
        place = next(at for at, name in enumerate(classes) if _plain(name) != wanted[at])
        raise ValueError(
            f"{field} has the data's classes in another order: label {place} is {labels[place]!r} in the data, and "
            f"{classes[place]!r} in the list; sort it as the data does"
        )
    if not fits and not is_file:
        unknown = [label for label, name in zip(labels, wanted, strict=True) if name not in by_name]
        shown = ", ".join(map(repr, unknown[:_MOST_SHOWN])) + (", ..." if len(unknown) > _MOST_SHOWN else "")
        why = "holds several names that differ by marks alone"
        if unknown:
            why = f"lacks {len(unknown)} classes of the data ({shown})"
        raise ValueError(
            f"{field} {why}, so it cannot tell which is which; give a file with names in the order of the data's labels"
        )
    return tuple(classes)


def numbers_by_id(name: str, labels: Sequence[str]) -> list[int] | None:
    """Return the place in a list of each of the data's labels, -1 if it is not there; None if they are the same.

    It is for a list that is a part of ImageNet's classes, and for data that numbers all of these, as TFDS does.

    Args:
        name: of the list.
        labels: WordNet's ids of the data's labels, in their order.

    Raises:
        ValueError: the data lacks a class of the list.
    """
    ids = datasets.prompts_of(name).ids if name in datasets.names() else ()
    if not ids or list(ids) == list(labels) or not all(map(_is_id, labels)):
        return None
    if missing := sorted(set(ids) - set(labels)):
        raise ValueError(f"classes={name!r} has {len(missing)} classes that the data lacks, {missing[0]} for one")
    places = {each: place for place, each in enumerate(ids)}
    return [places.get(label, -1) for label in labels]


def aliases_of(name: str) -> Mapping[str, str]:
    """Return class names of a list by the names that TFDS has for them."""
    spec = specs().get(name)
    return {} if spec is None else spec.names_in_tfds


def _are_sorted_ids(labels: Sequence[str]) -> bool:
    """Return True for ids of WordNet in their order, which is that of ImageNet's lists."""
    return all(map(_is_id, labels)) and sorted(labels) == list(labels)


def _is_id(label: str) -> bool:
    return re.fullmatch(r"n\d{8}", label) is not None


def _plain(name: str) -> str:
    """Return a name without case, spaces and marks, and without the letter that SUN397 puts in front: `/a/abbey`."""
    return re.sub(r"[\W_]", "", re.sub(r"^/[a-z]/", "", name)).casefold()
