"""Work of this process and its loader workers: processor time and bytes of files; the end of the workers."""

import contextlib
import multiprocessing
import os
import pathlib

_WORK_SHARE = 0.05  # of a core: what idle threads take together is far below
_WORK_BYTES = 4096  # of files in a tick


class WorkMeter:
    """Work of this process and its loader workers so far, without that of looking for it."""

    def __init__(self) -> None:
        self._looked = 0  # bytes that the looks themselves have read, which the kernel counts as this process's

    def read(self) -> tuple[float, int]:
        """Return the processor seconds, and the bytes read and written."""
        times = os.times()
        seconds, size = times.user + times.system, -self._looked
        for pid in ("self", *(child.pid for child in multiprocessing.active_children())):
            with contextlib.suppress(OSError, ValueError, IndexError):  # not on Linux, or it has just ended
                lines = self._look(f"/proc/{pid}/io").splitlines()
                size += sum(int(line.split()[1]) for line in lines if line.startswith(("rchar", "wchar")))
                if pid != "self":
                    fields = self._look(f"/proc/{pid}/stat").rpartition(")")[2].split()
                    seconds += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return seconds, size

    def _look(self, path: str) -> str:
        content = pathlib.Path(path).read_bytes()
        self._looked += len(content)
        return content.decode(errors="replace")


def is_work(before: tuple[float, int], after: tuple[float, int], seconds: float) -> bool:
    """Return True if more was done between two readings, so many seconds apart, than idle threads do."""
    return after[0] - before[0] > _WORK_SHARE * seconds or after[1] - before[1] > _WORK_BYTES


def kill_workers() -> None:
    """Kill the loader workers of this process, which is about to end at once: a stopped one does not end by itself."""
    for child in multiprocessing.active_children():
        child.kill()
