"""A checkpoint opened for reading."""

import itertools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from clipjax.checkpoints import manifest
from clipjax.checkpoints.exchange import publish
from clipjax.checkpoints.folder import find_checkpoint, is_step, is_step_name, steps_in
from clipjax.checkpoints.manifest import DamagedCheckpoint, UnusableCheckpoint, Verdict, examine
from clipjax.checkpoints.mirrored import fetch
from clipjax.checkpoints.reading import is_read_together, restore_arrays
from clipjax.checkpoints.records import RECORDS, read_record, unpack_tokenizer
from clipjax.checkpoints.verdicts import all_damaged, examine_together, going_on, refuse_damaged, refuse_undecided, warn
from clipjax.config import Config
from clipjax.config.paths import STORES, expand
from clipjax.config.serialization import from_dict
from clipjax.data.tokenizers.protocol import Tokenizer
from clipjax.models.clip import abstract_model
from clipjax.models.towers import PARAMETER_RULES
from clipjax.runtime import sharding
from clipjax.runtime.storage import is_address
from clipjax.typing import Params

_openings = itertools.count()


class SavedCheckpoint:
    """One checkpoint opened for reading.

    Its records are verified when it is opened, its arrays before `params` gives any: those alone that it reads, shared
    out among the processes that read them together. Opening asks no other process.

    Args:
        path: a workdir (its newest step is taken, or if that is damaged the newest good one, with a warning), its
            `checkpoints` folder, or one step directory, which may have been copied under another name; or the address
            of one of these on an object store, of which the step is loaded into a local folder. Several
            processes find damage to an array in `params` only, which then goes on to an older step.
        step: another step in the same place.

    Raises:
        DamagedCheckpoint: all steps are damaged, or the one that is named.
        UndecidedCheckpoint: the storage does not give one, or it is of a newer format.
        ValueError: there is no checkpoint there, or it is not clipjax's.
    """

    def __init__(self, path: str | pathlib.Path, *, step: int | None = None) -> None:
        given = expand(str(path), "checkpoint", schemes=STORES)
        self._address = ""
        if is_address(given):
            directory, self._address = fetch(given, step)
            self._places = [directory]
        else:
            self._places = _find_directories(pathlib.Path(given), step)
        self._is_named = len(self._places) == 1
        several = jax.distributed.is_initialized() and jax.process_count() > 1
        self._is_verified = not self._is_named and not several
        self._open(lambda path, step: examine(path, step=step, contents=self._is_verified, groups=_groups_read(path)))
        if step not in (None, self.step):
            raise ValueError(
                f"checkpoint {self.path} is that of step {self.step}, but step {step} is needed; bring that back"
            )

    def _open(self, judge: Callable[[pathlib.Path, int | None], Verdict]) -> None:
        """Open the newest place that is usable, and warn of those before it.

        Args:
            judge: gives the verdict on a directory, which must be of a step where several are to choose from.
        """
        bad: dict[int, Verdict] = {}
        for path in self._places:
            self._verdict = judge(path, None if self._is_named else int(path.name))
            if self._verdict.usable:
                break
            refuse_undecided(path, self._verdict)
            if self._is_named:
                refuse_damaged(path, self._verdict)
            bad[int(path.name)] = self._verdict
        else:
            raise DamagedCheckpoint(all_damaged(self._places[0].parent, bad))
        for worse, why in bad.items():
            warn(going_on(path.with_name(str(worse)), why, path))
        self.path, self._places = path, self._places[len(bad) :]
        try:
            self.records: dict[str, Any] = {name: read_record(self.path, name) for name in RECORDS}
            self.config: Config = from_dict(self.records["config"])
            self.step = _step_of(self.path, self.records["data"])
        except (ValueError, KeyError, OSError) as error:
            raise ValueError(f"checkpoint {self.path} is damaged or not clipjax's: {error}") from error

    @property
    def place(self) -> str:
        """Path of the checkpoint, or its address."""
        return self._address or str(self.path)

    @property
    def params_group(self) -> str:
        """The group to evaluate: `ema` where one was kept, else `params`."""
        return _groups_read(self.path)[0]

    def params(self, abstract_params: Any) -> Any:
        """Return the parameters to evaluate, placed by the shardings of `abstract_params`.

        They include BatchNorm's statistics, as `batch_stats`, if `abstract_params` does. If the shardings lie on the
        devices of all processes, all processes call this.

        Raises:
            DamagedCheckpoint: a file has changed since it was written, or an array is missing or misshapen.
        """
        if not self._is_verified:
            together = is_read_together(abstract_params)
            if together:  # a run may delete some between two looks at its folder
                folder = self._places[0].parent
                names = publish(f"places/{next(_openings)}", lambda: [path.name for path in self._places])
                self._places = [folder / name for name in names]
            self._open(_examine_together if together else _examine_alone)
            self._is_verified = True
        refuse_damaged(self.path, self._verdict)  # warns of one that cannot be verified
        group, wanted = self.params_group, dict(abstract_params)
        groups = {"batch_stats": wanted.pop("batch_stats")} if "batch_stats" in wanted else {}
        restored = restore_arrays(self.path, {group: wanted, **groups})
        return {**restored[group], **{name: restored[name] for name in groups}}

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer that was saved."""
        return unpack_tokenizer(self.records["tokenizer"])


def _groups_read(path: pathlib.Path) -> tuple[str, str]:
    """The groups of a step directory that give the parameters to evaluate; the second one may not be there."""
    try:
        averaged = any(file.startswith("ema/") for file in manifest.read(path).files)
    except (OSError, UnusableCheckpoint):  # an older format, or what an examination tells
        averaged = (path / "ema").is_dir()
    return "ema" if averaged else "params", "batch_stats"


def _examine_alone(path: pathlib.Path, step: int | None) -> Verdict:
    return examine(path, step=step, groups=_groups_read(path))


def _examine_together(path: pathlib.Path, step: int | None) -> Verdict:
    return examine_together(path, f"saved/{next(_openings)}", step=step, groups=_groups_read(path))


def _find_directories(path: pathlib.Path, step: int | None) -> list[pathlib.Path]:
    """The directories of steps to choose from, the newest first: one, where a step or a copy of one is named."""
    if is_step(path):
        renamed = not is_step_name(path.name)
        found = path if renamed or step is None else path.with_name(str(step))
        return [found if renamed or found.is_dir() else path]  # the record of another tells that it is another
    folder, newest = find_checkpoint(path)
    if step is None and len(steps_in(folder)) > 1:
        return [folder / str(each) for each in reversed(steps_in(folder))]
    found = folder / str(newest if step is None else step)
    if not found.is_dir():
        raise ValueError(f"checkpoint {found} is needed, but no longer there; bring it back")
    return [found]


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
