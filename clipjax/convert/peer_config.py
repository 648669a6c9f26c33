"""Reader of a peer's JSON config: a field that nobody takes is an error, and all errors come together."""

import math
from collections.abc import Mapping
from typing import Any

from clipjax.config import ModelConfig
from clipjax.convert.peer_fields import Fields

_REQUIRED = object()
MOST = 2**24
"""Limit of widths, lengths and vocabularies; a file with a larger one is damaged or means harm."""
MOST_LAYERS = 1_000
MOST_LOG_SCALE = 20


class PeerConfig:
    """One JSON object of a peer's config.

    Args:
        values: the object.
        path: its name, for errors.
        errors: where to collect them; groups inside share it.
    """

    def __init__(self, values: Any, path: str, errors: list[str] | None = None) -> None:
        self._errors = [] if errors is None else errors
        self._groups: list[PeerConfig] = []
        self._path, self._left = path, dict(values) if isinstance(values, Mapping) else {}
        if not isinstance(values, Mapping):
            self._errors.append(f"{path}: must be a JSON object, not {values!r}")

    def has(self, name: str) -> bool:
        """Return true if the field is there and not null."""
        return self._left.get(name) is not None

    def holds(self, name: str, value: Any) -> bool:
        """Return true if the field is there with this value; it stays to be taken."""
        return self._left.get(name) == value

    def take(self, name: str, kind: Any, default: Any = _REQUIRED) -> Any:
        """Take a field of a type (or one of several); whole numbers are floats too."""
        value = self._left.pop(name, default)
        if value is _REQUIRED:
            self._errors.append(f"{self._path}.{name}: missing")
            return None if isinstance(kind, tuple) else kind()
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if isinstance(value, float) and not math.isfinite(value):
            self.refuse(name, value, "must be finite")
            return kinds[0]() if default is _REQUIRED else default
        if value is default or (isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))):
            return value
        if float in kinds and isinstance(value, int) and not isinstance(value, bool) and abs(value) < MOST:
            return float(value)
        self.refuse(name, value, f"must be {' or '.join(kind.__name__ for kind in kinds)}")
        return kinds[0]() if default is _REQUIRED else default

    def size(self, name: str, default: Any = _REQUIRED, most: int = MOST) -> int:
        """Take a whole number from 1 to `most`."""
        before = len(self._errors)
        value = self.take(name, int, default)
        return 1 if len(self._errors) > before else self._bounded(name, value, most)

    def sizes(self, name: str, default: int, most: int = MOST) -> int | tuple[int, ...]:
        """Take one such number, or a list of them."""
        value = self.take(name, (int, list), default)
        if not isinstance(value, list):
            return self._bounded(name, value, most)
        return tuple(self._bounded(name, item, most) for item in value)

    def square(self, name: str, default: int) -> int:
        """Such a number, or a list of two that are equal: the sides of a square."""
        value = self._left.get(name)
        if isinstance(value, list):
            if len(value) != 2 or value[0] != value[1]:
                self.refuse(
                    name, value, "must be one number or two equal ones: clipjax's images and patches are square"
                )
                value = [default]
            self._left[name] = value[0]
        return self.size(name, default)

    def _bounded(self, name: str, value: Any, most: int) -> int:
        if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most:
            return value
        self.refuse(name, value, f"must be a whole number from 1 to {most}")
        return 1

    def logit_scale(self, name: str, default: float) -> float:
        """Take the logarithm of a logit scale and return the scale, or `default`; the weights have their own."""
        value = self.take(name, float, None)
        if value is None:
            return default
        if abs(value) > MOST_LOG_SCALE:
            self.refuse(name, value, f"must lie between -{MOST_LOG_SCALE} and {MOST_LOG_SCALE}: it is a logarithm")
            return default
        return min(math.exp(value), ModelConfig().max_logit_scale)

    def choose(self, name: str, choices: Mapping[Any, Any], default: Any = _REQUIRED) -> Any:
        """Take a field and return the choice that its value stands for."""
        value = self._left.pop(name, default)
        if not isinstance(value, str | int | bool | type(None)) or value not in choices:
            shown = "nothing" if value is _REQUIRED else value
            self.refuse(name, shown, f"must be {', '.join(repr(choice) for choice in choices)}")
            return next(iter(choices.values()))
        return choices[value]

    def group(self, name: str) -> "PeerConfig":
        """Take a nested object; one that is null or absent has no fields."""
        value = self._left.pop(name, None)
        inside = PeerConfig({} if value is None else value, f"{self._path}.{name}", self._errors)
        self._groups.append(inside)
        return inside

    def check(self, fields: Fields) -> None:
        """Accept fields without effect, and of those with fixed values no other value."""
        for name, (accepted, reason) in fields.fixed.items():
            value = self._left.pop(name, accepted[0])
            if value not in accepted:
                shown = [repr(item) for item in accepted if item not in (None, "", {})]
                self.refuse(name, value, f"must be {' or '.join(shown) or 'absent'}: {reason}")
        self.skip(*fields.without_effect)

    def skip(self, *names: str) -> None:
        """Skip fields that say nothing about the model."""
        for name in names:
            self._left.pop(name, None)

    def refuse(self, name: str, value: Any, rule: str) -> None:
        """Collect an error."""
        self._errors.append(f"{self._path}.{name}={value!r} {rule}")

    def finish(self) -> None:
        """Refuse fields that nobody took.

        Raises:
            ValueError: every error, a line each.
        """
        for part in (self, *self._groups):
            self._errors += [
                f"{part._path}.{name}={value!r} is nothing that clipjax has" for name, value in part._left.items()
            ]
        if self._errors:
            raise ValueError("\n".join(self._errors))
