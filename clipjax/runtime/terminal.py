"""Text for people: tables, durations, and text of others that steers no terminal.

A table is the same in a terminal, a file and a log, as wide as it needs to be. rich measures its cells (a Chinese
character takes two columns), but does not lay it out: rich's own table breaks a cell at its line ends, has no rule
for each column, and loses the alignment of numbers when it is told to leave long cells whole.
"""

import math
from collections.abc import Sequence

from rich.cells import cell_len


def printable(text: str) -> str:
    """Return text of others, such as a caption or a name, as one line that steers no terminal.

    Control and escape sequences, line ends, marks that turn the direction of writing, and half characters become
    backslash escapes.
    """
    return text if text.isprintable() else "".join(each if each.isprintable() else _escape(each) for each in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def format_duration(seconds: float) -> str:
    """Return `m:ss` or `h:mm:ss`; "?" if the duration is not known."""
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def format_table(rows: Sequence[Sequence[str]], header: Sequence[str]) -> str:
    """Return a table in plain text, without a final newline; columns that hold only numbers are right-aligned.

    Cells may be text of others: they are made `printable`.
    """
    header, *rows = [list(map(printable, row)) for row in (header, *rows)]
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(cell_len, column)) for column in columns]
    numeric = [bool(rows) and all(map(_is_number, column[1:])) for column in columns]
    lines = [header, ["-" * width for width in widths], *rows]
    cells = [map(_pad, line, widths, numeric) for line in lines]
    return "\n".join("  ".join(line).rstrip() for line in cells)


def _pad(cell: str, width: int, right: bool) -> str:
    space = " " * (width - cell_len(cell))
    return space + cell if right else cell + space


def _is_number(cell: str) -> bool:
    if cell in ("", "-"):
        return True
    try:
        float(cell.replace(",", "").removesuffix("%"))
    except ValueError:
        return False
    return True
