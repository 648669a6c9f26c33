"""Reading a peer's JSON config: every field is taken once, what nobody takes is an error; all errors come together."""

from collections.abc import Mapping
from typing import Any

_REQUIRED = object()


class Known:
    """One JSON object of a peer's config.

    Args:
        values: the object.
        path: its name, for errors.
        errors: where to collect them; groups inside share it.
    """

    def __init__(self, values: Any, path: str, errors: list[str] | None = None) -> None:
        self._errors = [] if errors is None else errors
        self._groups: list[Known] = []
        self._path, self._left = path, dict(values) if isinstance(values, Mapping) else {}
        if not isinstance(values, Mapping):
            self._errors.append(f"{path}: must be a JSON object, not {values!r}")

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self._left.get(name) is not None

    def take(self, name: str, kind: Any, default: Any = _REQUIRED) -> Any:
        """A field of a type (or one of several); whole numbers are floats too."""
        value = self._left.pop(name, default)
        if value is _REQUIRED:
            self._errors.append(f"{self._path}.{name}: missing")
            return None if isinstance(kind, tuple) else kind()
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if value is default or (isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))):
            return value
        if float in kinds and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        self.refuse(name, value, f"must be {' or '.join(kind.__name__ for kind in kinds)}")
        return kinds[0]() if default is _REQUIRED else default

    def choose(self, name: str, choices: Mapping[Any, Any], default: Any = _REQUIRED) -> Any:
        """What a field's value stands for."""
        value = self._left.pop(name, default)
        if not isinstance(value, str | int | bool | type(None)) or value not in choices:
            shown = "nothing" if value is _REQUIRED else value
            self.refuse(name, shown, f"must be {', '.join(repr(choice) for choice in choices)}")
            return next(iter(choices.values()))
        return choices[value]

    def group(self, name: str) -> "Known":
        """An object inside."""
        inside = Known(self._left.pop(name, {}), f"{self._path}.{name}", self._errors)
        self._groups.append(inside)
        return inside

    def skip(self, *names: str) -> None:
        """Fields that say nothing about the model."""
        for name in names:
            self._left.pop(name, None)

    def refuse(self, name: str, value: Any, rule: str) -> None:
        """Collect an error."""
        self._errors.append(f"{self._path}.{name}={value!r} {rule}")

    def finish(self) -> None:
        """Nothing may be left.

        Raises:
            ValueError: every error, a line each.
        """
        for part in (self, *self._groups):
            self._errors += [
                f"{part._path}.{name}={value!r} is nothing that clipjax has" for name, value in part._left.items()
            ]
        if self._errors:
            raise ValueError("\n".join(self._errors))
