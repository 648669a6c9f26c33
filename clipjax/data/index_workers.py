"""Processes that index shards: each reads paths from its standard input and builds one index after the other.

They are programs of their own and no forks or copies of this one: a fork may stand still behind a lock of one of JAX's
threads, and a copy runs the user's own script again.

Reading order: `Program`, `run_threads`, `Builder` (this process's side), `main` (the other's).
"""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any

from clipjax.data import index_store

_KINDS: dict[str, type[Exception]] = {"ValueError": ValueError, "OSError": OSError}


class Program:
    """A process that answers jobs, started when the first one is asked for; it ends with this one, too.

    Args:
        module: whose `main` reads a JSON value per line, and writes an object for each.
        arguments: of the program.
    """

    def __init__(self, module: str, *arguments: str) -> None:
        self._words = (module, *arguments)
        self._process: subprocess.Popen[str] | None = None

    def close(self) -> None:
        """End the process after the job that it does."""
        if self._process is not None:
            assert self._process.stdin is not None and self._process.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
            self._process.stdout.close()
            self._process.wait()

    def ask(self, job: Any) -> dict[str, Any]:
        """Return the answer to a job; an empty one where the process is gone."""
        try:
            if self._process is None:
                self._process = _start(*self._words)
            assert self._process.stdin is not None and self._process.stdout is not None
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline() or "{}")
        except (OSError, ValueError):
            return {}


def run_threads(works: Sequence[Callable[[], None]], *, stop: Callable[[], None]) -> None:
    """Run jobs in a thread each.

    Args:
        works: the jobs.
        stop: makes each of them end soon; it is called after the first error, after a signal, and at the end.
    """
    with futures.ThreadPoolExecutor(len(works)) as pool:
        runs = [pool.submit(work) for work in works]
        try:
            for each in futures.as_completed(runs):
                each.result()
        finally:
            stop()


class Builder(Program):
    """A process that builds indexes."""

    def __init__(self) -> None:
        super().__init__("clipjax.data.index_workers")

    def build(self, path: str, *, limit: int, may_wait: bool) -> "index_store.Entry | None":
        """Build the index of a shard there; where that process is gone or can write nothing, here.

        Raises:
            ValueError: the shard is no tar.
            OSError: it cannot be read.
        """
        answer = self.ask({"path": path, "limit": limit, "may_wait": may_wait})
        if answer.get("error"):
            raise _KINDS[answer["kind"]](answer["error"])
        if answer.get("is_held"):
            return None
        found = index_store.find(path)
        return (
            found if isinstance(found, index_store.Entry) else index_store.build(path, limit=limit, may_wait=may_wait)
        )


def _start(*words: str) -> subprocess.Popen[str]:
    # The same code, however it was found; paths are no UTF-8 sometimes, so JSON escapes them.
    code = pathlib.Path(__file__).resolve().parents[2]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(code), os.environ.get("PYTHONPATH", "")]).rstrip(":"),
    }
    return subprocess.Popen(
        [sys.executable or "python3", "-m", *words],
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
