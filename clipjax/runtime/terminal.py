"""Text for people: tables and durations."""

import math
from collections.abc import Sequence


def format_duration(seconds: float) -> str:
    """`m:ss` or `h:mm:ss`; "?" if it is not known."""
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def format_table(rows: Sequence[Sequence[str]], header: Sequence[str]) -> str:
    """A table in plain text, without a final newline; columns that hold only numbers are right-aligned."""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    numeric = [bool(rows) and all(map(_is_number, column[1:])) for column in columns]
    lines = [header, ["-" * width for width in widths], *rows]
    cells = [
        [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ]
        for line in lines
    ]
    return "\n".join("  ".join(line).rstrip() for line in cells)


def _is_number(cell: str) -> bool:
    if cell in ("", "-"):
        return True
    try:
        float(cell.replace(",", "").removesuffix("%"))
    except ValueError:
        return False
    return True
