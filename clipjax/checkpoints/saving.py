"""One save: the arrays are copied while the caller waits, and written, hashed and committed by a thread.

Order: arrays and records go into `STEP.orbax-checkpoint-tmp`; every process waits for its own files and hashes them;
process 0 merges and hashes the rest, writes the manifest, waits until all of it is on the disk, and renames the
directory to `STEP`. A kill before the rename leaves no `STEP` at all.
"""

import asyncio
import contextlib
import fnmatch
import os
import pathlib
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from clipjax.checkpoints import exchange, manifest
from clipjax.checkpoints.folder import TEMPORARY, delete, sync_tree
from clipjax.checkpoints.orbax_noise import silence_orbax
from clipjax.checkpoints.records import write_record
from clipjax.checkpoints.verdicts import warn
from clipjax.runtime import process_log, processes
from clipjax.runtime.files import sync_folder

_REASON_CHARACTERS = 400
_STRAGGLERS_SECONDS = 10.0
_THREAD = "save"
_ENDING_SECONDS = 1.0  # of a save whose outcome is known
_TENSORSTORE_ERRNO = re.compile(r"os_error_code='(\d+)'")
_LOCAL_FILE = re.compile(r'local file "([^"]*)"')
OnFailure = Callable[[int, str], None]
OnCommit = Callable[[int], None]


def array_handler(*, alone: bool = False) -> ocp.StandardCheckpointHandler:
    """Return Orbax's writer and reader of arrays; it waits for no other process, and its failures are told once.

    Args:
        alone: of arrays with copies on several processes it writes the first copy, whole; else each process a part.
    """
    silence_orbax()
    options = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={jax.process_index()})
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=options)
    if alone:
        arrays = ocp.type_handlers.ArrayHandler(primary_host=0, replica_id=0, use_replica_parallel=False)
        registry = ocp.type_handlers.create_type_handler_registry(
            (jax.Array, arrays), (np.ndarray, ocp.type_handlers.NumpyHandler())
        )
        handler._impl = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, multiprocessing_options=options)
    return handler


def temporary_path(folder: pathlib.Path, step: int) -> pathlib.Path:
    """Return the directory in which a step is written."""
    return folder / f"{step}{TEMPORARY}"


def is_unfinished() -> bool:
    """Return True if a save was given up and goes on: its threads, some of Orbax, would keep the process at exit."""
    threads = [thread for thread in threading.enumerate() if thread.name == _THREAD]
    for thread in threads:
        thread.join(_ENDING_SECONDS)
    return any(thread.is_alive() for thread in threads)


class SavesFail(RuntimeError):
    """So many saves in a row have failed, or the last one of a run, that a person has to look at the storage."""


class Steps(Protocol):
    """A copy of the steps elsewhere; only process 0 has one."""

    def remove(self, unit: str) -> None:
        """Delete a step there."""

    def rename(self, unit: str, new: str) -> None:
        """Set a step aside there."""


def tell_failure(step: int, reason: str) -> None:
    """Warn of a failure."""
    warn(f"the checkpoint of step {step} is not saved: {reason}")


class Save:
    """One save, which begins when this is made.

    Args:
        folder: of the checkpoints; the temporary directory of the step exists in it.
        content: what is saved, by `manifest.Manifest` without files.
        arrays: pytrees of arrays by group; they may change once the constructor returns.
        records: JSON values by name.
        key: of the conversation with the other processes.
        doomed: older steps to delete before anything is written.
        on_failure: gets the step and the reason, in the thread that saves.
        on_commit: gets the step once it is complete, in the thread that saves on process 0.
        before_commit: is called in that thread when only the commit is left.

    Attributes:
        step: completed updates.
        best: the metric that chooses the best step, and its value.
        reason: why the save failed; empty if it did not.
        finished: set when the outcome is known.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        content: manifest.Manifest,
        arrays: Mapping[str, Any],
        records: Mapping[str, Any],
        *,
        key: str,
        doomed: Sequence[int],
        on_failure: OnFailure,
        on_commit: OnCommit | None = None,
        before_commit: Callable[[], None] | None = None,
    ) -> None:
        self.step, self.best, self.reason = content.step, content.best, ""
        self.finished = threading.Event()
        self._folder, self._content, self._records = folder, content, records
        self._groups, self._key, self._doomed = tuple(arrays), key, doomed
        self._on_failure, self._on_commit, self._before_commit = on_failure, on_commit, before_commit
        self._temporary = temporary_path(folder, content.step)
        self._handler = array_handler(alone=any(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(arrays)))
        futures, error = self._start(arrays)
        threading.Thread(target=self._run, args=(futures, error), name=_THREAD, daemon=True).start()

    def written_bytes(self) -> int:
        """Return the size of what all processes have written so far."""
        total = 0
        with contextlib.suppress(OSError):  # files and the directory itself get other names meanwhile
            for path in self._temporary.rglob("*"):
                total += path.stat().st_size
        return total

    def _start(self, arrays: Mapping[str, Any]) -> tuple[list[Any], OSError | None]:
        """Copy the arrays to the host and start to write them."""

        async def start() -> list[Any]:
            writes = [
                self._handler.async_save(epath.Path(self._temporary / name), args=ocp.args.StandardSave(tree))
                for name, tree in arrays.items()
            ]
            return await asyncio.gather(*writes)

        try:
            return jax.tree.leaves(asyncio.run(start())), None
        except OSError as error:
            return [], error

    def _run(self, futures: Sequence[Any], error: OSError | None) -> None:
        try:
            self.reason = self._finish(futures, error)
        except Exception as unreachable:  # the other processes
            self.reason = describe(unreachable)
        if self.reason:
            self._on_failure(self.step, self.reason)
        self.finished.set()

    def _finish(self, futures: Sequence[Any], error: OSError | None) -> str:
        """Return why the save failed; empty if it did not: the same on all processes."""
        own: Any
        try:
            own = self._write(futures, error)
        except Exception as failure:  # Orbax and TensorStore have many kinds
            own = describe(failure)
        parts = exchange.gather(f"{self._key}/parts", own)
        reason = exchange.publish(f"{self._key}/verdict", lambda: self._commit(parts))
        return reason

    def _write(self, futures: Sequence[Any], error: OSError | None) -> dict[str, tuple[int, str]]:
        """Wait for the files of this process, and return their sizes and checksums."""
        failures: list[Exception] = [] if error is None else [error]
        try:
            if processes.is_first():
                self._delete_doomed()
                for name, record in self._records.items():
                    write_record(self._temporary, name, record)
        except Exception as failure:
            failures.append(failure)
        for future in futures:  # all of them: nothing may be written any more when the directory is removed
            try:
                future.result()
            except Exception as failure:  # Orbax and TensorStore have many kinds
                failures.append(failure)
        if failures:
            raise failures[0]
        rank = jax.process_index()
        patterns = (f"*/ocdbt.process_{rank}/*", f"*/array_metadatas/process_{rank}")
        own = [path for path in manifest.list_files(self._temporary) if any(fnmatch.fnmatch(path, p) for p in patterns)]
        return manifest.hash_files(self._temporary, own, sync=True)

    def _delete_doomed(self) -> None:
        for step in self._doomed:
            try:
                delete(self._folder, step)
            except OSError as error:  # the next start sees it again
                process_log.info(f"checkpoint {step} cannot be deleted: {describe(error)}")

    def _commit(self, parts: Sequence[Any]) -> str:
        """Make the step complete if all processes have written theirs; process 0 alone does this."""
        many = len(parts) > 1
        reasons = [
            f"process {rank}: {part}" if many else part for rank, part in enumerate(parts) if isinstance(part, str)
        ]
        try:
            if not reasons:
                self._publish({path: (size, checksum) for part in parts for path, (size, checksum) in part.items()})
                self._tell_commit()
                return ""
        except Exception as error:  # Orbax and TensorStore have many kinds
            reasons = [describe(error)]
        _remove(self._temporary)
        return "; ".join(reasons)

    def _tell_commit(self) -> None:
        if self._on_commit is None:
            return
        try:
            self._on_commit(self.step)
        except OSError as error:  # the checkpoint is there all the same
            process_log.info(f"the commit of step {self.step} cannot be recorded: {describe(error)}")

    def _publish(self, files: dict[str, tuple[int, str]]) -> None:
        for name in self._groups:
            self._handler.finalize(epath.Path(self._temporary / name))
        rest = [path for path in manifest.list_files(self._temporary) if path not in files]
        files |= manifest.hash_files(self._temporary, rest, sync=True)
        sync_tree(self._temporary)
        if self._before_commit is not None:
            self._before_commit()
        manifest.write(self._temporary, manifest.Manifest(self.step, self.best, files))
        self._temporary.rename(self._folder / str(self.step))
        sync_folder(self._folder)


def _remove(directory: pathlib.Path) -> None:
    """Delete a directory to which writes that nobody waits for may still be going (see `silence_orbax`).

    What comes after that is deleted before the next save.
    """
    until = time.monotonic() + _STRAGGLERS_SECONDS
    while directory.exists() and time.monotonic() < until:
        shutil.rmtree(directory, ignore_errors=True)
        time.sleep(_STRAGGLERS_SECONDS / 20)  # a write makes the directory anew


def describe(error: Exception) -> str:
    """Return an error's message in one line; of one of the operating system what it says, and the file."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else "")
    text = " ".join(str(error).split()) or repr(error)
    number, file = _TENSORSTORE_ERRNO.search(text), _LOCAL_FILE.search(text)
    if number:
        text = os.strerror(int(number[1])) + (f": {file[1]}" if file else "")
    return text[:_REASON_CHARACTERS]
