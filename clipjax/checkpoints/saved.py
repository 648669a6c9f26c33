"""A checkpoint opened for reading."""

import pathlib
from typing import Any

from jax.sharding import Mesh

from clipjax.checkpoints.folder import find_checkpoint, is_step, is_step_name, steps_in
from clipjax.checkpoints.manifest import DamagedCheckpoint, Verdict, examine
from clipjax.checkpoints.reading import restore_arrays
from clipjax.checkpoints.records import RECORDS, read_record, unpack_tokenizer
from clipjax.checkpoints.verdicts import all_damaged, going_on, refuse_damaged, refuse_undecided, warn
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

    Its records are verified when it is opened, its arrays before `params` gives any. It asks no other process.

    Args:
        path: a workdir (its newest step is taken, or if that is damaged the newest good one, with a warning), its
            `checkpoints` folder, or one step directory, which may have been copied under another name.
        step: another step in the same place.

    Raises:
        DamagedCheckpoint: all steps are damaged, or the one that is named.
        UndecidedCheckpoint: the storage does not give one, or it is of a newer format.
        ValueError: there is no checkpoint there, or it is not clipjax's.
    """

    def __init__(self, path: str | pathlib.Path, *, step: int | None = None) -> None:
        self.path, self._verdict = _find_directory(pathlib.Path(expand(str(path), "checkpoint")), step)
        opened = self._verdict or examine(self.path, contents=False)
        if not opened.usable:
            refuse_damaged(self.path, opened)
        try:
            self.records: dict[str, Any] = {name: read_record(self.path, name) for name in RECORDS}
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

        Raises:
            DamagedCheckpoint: a file has changed since it was written, or an array is missing or misshapen.
        """
        if self._verdict is None:
            self._verdict = examine(self.path)
        refuse_damaged(self.path, self._verdict)
        group, wanted = self.params_group, dict(abstract_params)
        groups = {"batch_stats": wanted.pop("batch_stats")} if "batch_stats" in wanted else {}
        restored = restore_arrays(self.path, {group: wanted, **groups})
        return {**restored[group], **{name: restored[name] for name in groups}}

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer that was saved."""
        return unpack_tokenizer(self.records["tokenizer"])


def _find_directory(path: pathlib.Path, step: int | None) -> tuple[pathlib.Path, Verdict | None]:
    """The directory of a step (of a copy under another name, its own), and the verdict if all of it was verified."""
    if is_step(path):
        renamed = not is_step_name(path.name)
        found = path if renamed or step is None else path.with_name(str(step))
        if renamed or found.is_dir():
            return found, None
        return path, None  # its record tells that it is another
    folder, newest = find_checkpoint(path)
    if step is None and len(steps_in(folder)) > 1:
        return _newest_good(folder)
    found = folder / str(newest if step is None else step)
    if not found.is_dir():
        raise ValueError(f"checkpoint {found} is needed, but no longer there; bring it back")
    return found, None


def _newest_good(folder: pathlib.Path) -> tuple[pathlib.Path, Verdict]:
    """The newest step directory whose files are unchanged, with a warning for each that is not, and its verdict."""
    bad: dict[int, Verdict] = {}
    for step in reversed(steps_in(folder)):
        path = folder / str(step)
        verdict = examine(path, step=step)
        if verdict.usable:
            for worse, why in bad.items():
                warn(going_on(folder / str(worse), why, path))
            return path, verdict
        refuse_undecided(path, verdict)
        bad[step] = verdict
    raise DamagedCheckpoint(all_damaged(folder, bad))


def _step_of(path: pathlib.Path, data: Any) -> int:
    """The step of a checkpoint as it was saved; a converted one has no record of it."""
    if not isinstance(data, dict):
        raise ValueError(f"data={data!r} must be an object")
    step = data.get("step")
    if step is None:
        return int(path.name) if is_step_name(path.name) else 0
    if type(step) is not int or step < 0:
        raise ValueError(f"data.step={step!r} must be a whole number of at least 0")
    return step


def newest_checkpoint(workdir: pathlib.Path) -> SavedCheckpoint | None:
    """Return the newest checkpoint in a workdir that looks good, or None where there is none yet.

    Only records and sizes are compared, and nothing is told: `Checkpoints.newest_verified` decides.

    Raises:
        DamagedCheckpoint: all of them are damaged.
        UndecidedCheckpoint: one may be good, but cannot be read here.
        ValueError: the workdir is itself the directory of one step.
    """
    if is_step(workdir):
        raise ValueError(
            f"workdir {workdir} is the directory of one checkpoint; name the workdir above it, or a new one"
        )
    try:
        folder, _ = find_checkpoint(workdir)
    except ValueError:
        return None
    bad: dict[int, Verdict] = {}
    for step in reversed(steps_in(folder)):
        verdict = examine(folder / str(step), step=step, contents=False)
        if verdict.usable:
            return SavedCheckpoint(folder / str(step))
        refuse_undecided(folder / str(step), verdict)
        bad[step] = verdict
    raise DamagedCheckpoint(all_damaged(folder, bad))


def load_params(saved: SavedCheckpoint, mesh: Mesh) -> Params:
    """Return the parameters to evaluate, on any mesh."""
    abstract = abstract_model(saved.config.model)
    return saved.params(sharding.with_shardings(abstract, sharding.state_shardings(mesh, abstract, PARAMETER_RULES)))
