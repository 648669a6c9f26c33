"""A checkpoint opened for reading."""

import functools
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from clipjax.checkpoints.manager import restore_items
from clipjax.checkpoints.records import FOLDER, RECORDS, unpack_tokenizer
from clipjax.config import Config
from clipjax.config.paths import expand
from clipjax.config.serialization import from_dict
from clipjax.data.tokenizers.protocol import Tokenizer
from clipjax.models.clip import abstract_model
from clipjax.models.towers import PARAMETER_RULES
from clipjax.runtime import sharding
from clipjax.typing import Params


class SavedCheckpoint:
    """One checkpoint opened for reading.

    Args:
        path: a workdir (its newest step is taken), its `checkpoints` folder, or one step directory, which may have been
            copied under another name.
        step: another step in the same place.

    Raises:
        ValueError: there is no checkpoint there, or its records are damaged.
    """

    def __init__(self, path: str | pathlib.Path, *, step: int | None = None) -> None:
        self.path = _find_directory(pathlib.Path(expand(str(path), "checkpoint")), step)
        reader = ocp.Checkpointer(ocp.CompositeCheckpointHandler())
        self._restore = functools.partial(reader.restore, self.path.absolute())
        items: dict[str, Any] = {name: ocp.args.JsonRestore() for name in RECORDS}
        try:
            records = _independent_reader().restore(self.path.absolute(), args=ocp.args.Composite(**items))
            self.records: dict[str, Any] = dict(records.items())
            self.config: Config = from_dict(self.records["config"])
            self.step = _step_of(self.path, self.records["data"])
        except (ValueError, KeyError, OSError) as error:
            raise ValueError(f"checkpoint {self.path} is damaged or not clipjax's: {error}") from error
        if step not in (None, self.step):
            raise ValueError(
                f"checkpoint {self.path} is that of step {self.step}, but step {step} is needed; bring that back"
            )

    @property
    def params_group(self) -> str:
        """The group to evaluate: `ema` where one was kept, else `params`."""
        return "ema" if (self.path / "ema").is_dir() else "params"

    def params(self, abstract_params: Any) -> Any:
        """Return the parameters to evaluate, placed by the shardings of `abstract_params`.

        They include BatchNorm's statistics, as `batch_stats`, if `abstract_params` does.
        """
        group, wanted = self.params_group, dict(abstract_params)
        groups = {"batch_stats": wanted.pop("batch_stats")} if "batch_stats" in wanted else {}
        restored = restore_items(self._restore, self.path, {group: wanted, **groups})
        return {**restored[group], **{name: restored[name] for name in groups}}

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer that was saved."""
        return unpack_tokenizer(self.records["tokenizer"])


def _independent_reader() -> ocp.Checkpointer:
    """Return a reader that does not wait for other processes, which may be unable to read."""
    me = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process_{me}"
    )
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler(), multiprocessing_options=options)


def _find_directory(path: pathlib.Path, step: int | None) -> pathlib.Path:
    """The directory of a step; of a copy under another name, its own."""
    if _is_step(path):
        renamed = not is_step_name(path.name)
        found = path if renamed or step is None else path.with_name(str(step))
        if renamed or found.is_dir():
            return found
        return path  # its record tells that it is another
    folder, newest = find_checkpoint(path)
    found = folder / str(newest if step is None else step)
    if not found.is_dir():
        raise ValueError(f"checkpoint {found} is needed, but no longer there; bring it back")
    return found


def is_step_name(name: str) -> bool:
    """Return True if training gives a step's directory this name: 7, and not 007."""
    return name.isascii() and name.isdecimal() and name == str(int(name))


def steps_in(folder: pathlib.Path) -> list[int]:
    """Return the steps whose directories lie in a folder, in order; none where there is no folder."""
    children = folder.iterdir() if folder.is_dir() else ()
    return sorted(int(child.name) for child in children if is_step_name(child.name))


def _is_step(path: pathlib.Path) -> bool:
    """Return True if a directory is that of a step, by any name."""
    return (path / "config").is_dir() and (is_step_name(path.name) or (path / "tokenizer").is_dir())


def _step_of(path: pathlib.Path, data: Any) -> int:
    """The step of a checkpoint as it was saved; a converted one has no record of it."""
    step = data.get("step") if isinstance(data, dict) else None
    if step is None:
        return int(path.name) if is_step_name(path.name) else 0
    if type(step) is not int or step < 0:
        raise ValueError(f"data.step={step!r} must be a whole number of at least 0")
    return step


def find_checkpoint(path: pathlib.Path) -> tuple[pathlib.Path, int]:
    """Return the folder of steps and the step that a path means.

    Raises:
        ValueError: there is none.
    """
    if is_step_name(path.name) and _is_step(path):
        return path.parent, int(path.name)
    folder = path / FOLDER if (path / FOLDER).is_dir() else path
    steps = steps_in(folder)
    if not steps:
        raise ValueError(
            f"no checkpoint at {str(path)!r}: give a workdir that training has saved to, or one of its "
            f"{FOLDER}/STEP directories"
        )
    return folder, max(steps)


def newest_checkpoint(workdir: pathlib.Path) -> SavedCheckpoint | None:
    """Return the newest checkpoint in a workdir, or None where there is none yet.

    Raises:
        ValueError: it is damaged, or the workdir is itself the directory of one step.
    """
    if _is_step(workdir):
        raise ValueError(
            f"workdir {workdir} is the directory of one checkpoint; name the workdir above it, or a new one"
        )
    try:
        find_checkpoint(workdir)
    except ValueError:
        return None
    return SavedCheckpoint(workdir)


def load_params(saved: SavedCheckpoint, mesh: Mesh) -> Params:
    """Return the parameters to evaluate, on any mesh."""
    abstract = abstract_model(saved.config.model)
    return saved.params(sharding.with_shardings(abstract, sharding.state_shardings(mesh, abstract, PARAMETER_RULES)))
