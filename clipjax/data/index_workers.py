"""Processes that index shards: each reads paths from its standard input and builds one index after the other.

They are programs of their own and no forks or copies of this one: a fork may stand still behind a lock of one of JAX's
threads, and a copy runs the user's own script again.

Reading order: `Builder` (this process's side), `main` (the other's).
"""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
from typing import Any

from clipjax.data import index_store

_KINDS: dict[str, type[Exception]] = {"ValueError": ValueError, "OSError": OSError}


class Builder:
    """A process that builds indexes, started when the first one is asked for; it ends with this one, too."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def close(self) -> None:
        """End the process after the shard that it reads."""
        if self._process is not None:
            assert self._process.stdin is not None and self._process.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
            self._process.stdout.close()
            self._process.wait()

    def build(self, path: str, *, limit: int, may_wait: bool) -> "index_store.Entry | None":
        """Build the index of a shard there; where that process is gone or can write nothing, here.

        Raises:
            ValueError: the shard is no tar.
            OSError: it cannot be read.
        """
        answer = self._ask({"path": path, "limit": limit, "may_wait": may_wait})
        if answer.get("error"):
            raise _KINDS[answer["kind"]](answer["error"])
        if answer.get("is_held"):
            return None
        found = index_store.find(path)
        return (
            found if isinstance(found, index_store.Entry) else index_store.build(path, limit=limit, may_wait=may_wait)
        )

    def _ask(self, job: dict[str, Any]) -> dict[str, Any]:
        try:
            if self._process is None:
                self._process = _start()
            assert self._process.stdin is not None and self._process.stdout is not None
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline() or "{}")
        except (OSError, ValueError):
            return {}


def _start() -> subprocess.Popen[str]:
    # The same code, however it was found; paths are no UTF-8 sometimes, so JSON escapes them.
    code = pathlib.Path(__file__).resolve().parents[2]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(code), os.environ.get("PYTHONPATH", "")]).rstrip(":"),
    }
    return subprocess.Popen(
        [sys.executable or "python3", "-m", "clipjax.data.index_workers"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="ascii",
        env=environment,
    )


def main() -> None:
    """Answer jobs until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the shard that is being read is soon done
    for line in sys.stdin:
        job = json.loads(line)
        try:
            entry = index_store.build(job["path"], limit=job["limit"], may_wait=job["may_wait"])
            answer: dict[str, Any] = {"is_held": entry is None}
        except (ValueError, OSError) as error:
            answer = {"error": str(error), "kind": "OSError" if isinstance(error, OSError) else "ValueError"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
