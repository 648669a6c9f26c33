"""A training process that kills itself at a chosen moment of a save.

    python -m tests.faults.kill_points POINT COUNT train --config=... --workdir=...

It ends by SIGKILL when POINT is reached for the COUNT-th time. The points are found by the file operations of a save,
so the product knows nothing of them.
"""

import os
import pathlib
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

TEMPORARY = re.compile(r"\.orbax-checkpoint-tmp")
POINTS = (
    "before_data",  # the temporary folder is there, nothing in it
    "mid_file",  # the first array file has some bytes
    "before_manifest",  # all data is there, and the manifest under a temporary name
    "after_manifest",  # the manifest is there, in the temporary folder
    "before_commit",  # all of it is on the disk, under the temporary name
    "after_commit",  # the checkpoint is complete
    "before_deletion",  # of an old checkpoint
    "during_deletion",  # one of its files is gone
)


class Killer:
    """The count of a point, and the end of the process."""

    def __init__(self, point: str, count: int) -> None:
        self._point, self._left = point, count

    def reach(self, point: str) -> None:
        """Count a point; at the last one the process ends here."""
        if point != self._point:
            return
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def install(killer: Killer, workdir: pathlib.Path) -> None:
    """Watch the file operations of this process, and the files of array data."""

    def around(function: Callable[..., Any], points: Callable[[str, str], tuple[str, str]]) -> Callable[..., Any]:
        def watched(*args: Any, **options: Any) -> Any:
            paths = [os.fspath(each) for each in args[:2] if isinstance(each, str | os.PathLike)]
            before, after = points(paths[0] if paths else "", paths[1] if len(paths) > 1 else "")
            killer.reach(before)
            result = function(*args, **options)
            killer.reach(after)
            return result

        return watched

    def moved(source: str, target: str) -> tuple[str, str]:
        if TEMPORARY.search(source) and pathlib.Path(target).name.isdigit():
            return "before_commit", "after_commit"
        if target.endswith("manifest.json"):
            return "before_manifest", "after_manifest"
        if target.endswith(".deleting"):
            return "before_deletion", ""
        return "", ""

    for name in ("rename", "replace"):
        setattr(os, name, around(getattr(os, name), moved))
    os.mkdir = around(
        os.mkdir, lambda path, _: ("", "before_data" if TEMPORARY.search(pathlib.Path(path).name) else "")
    )
    remove = shutil.rmtree

    def remove_tree(path: Any, *args: Any, **options: Any) -> None:
        if os.fspath(path).endswith(".deleting"):
            files = sorted(each for each in pathlib.Path(path).rglob("*") if each.is_file())
            if files:
                files[len(files) // 2].unlink()
            killer.reach("during_deletion")
        remove(path, *args, **options)

    shutil.rmtree = remove_tree  # type: ignore[assignment]

    def watch_files() -> None:
        seen: set[str] = set()
        while True:
            for folder in workdir.glob("checkpoints/*.orbax-checkpoint-tmp*"):
                if folder.name not in seen and any(
                    each.is_file() and each.stat().st_size for each in folder.glob("*/ocdbt.process_*/d/*")
                ):
                    seen.add(folder.name)
                    killer.reach("mid_file")
            time.sleep(0.0005)

    def watch() -> None:
        while True:
            try:
                watch_files()
            except OSError:  # a folder has just got its name
                continue

    threading.Thread(target=watch, daemon=True).start()


def main() -> int:
    """Run the command."""
    point, count, *arguments = sys.argv[1:]
    if point not in POINTS:
        raise SystemExit(f"{point!r} must be one of {', '.join(POINTS)}")
    workdir = next(word.partition("=")[2] for word in arguments if word.startswith("--workdir="))
    install(Killer(point, int(count)), pathlib.Path(workdir))
    from clipjax.cli.main import main as clipjax

    return clipjax(arguments)


if __name__ == "__main__":
    sys.exit(main())
