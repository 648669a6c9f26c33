"""Preflight of a run: everything that can be refused before training, by all of its processes together."""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import optax

from clipjax.checkpoints.apart import find_folder
from clipjax.checkpoints.manifest import UnusableCheckpoint
from clipjax.checkpoints.mirrored import open_mirror
from clipjax.checkpoints.records import FOLDER as CHECKPOINTS_FOLDER
from clipjax.checkpoints.saved import SavedCheckpoint, newest_checkpoint
from clipjax.config import Config, OnUnreadable
from clipjax.config.validation import validate, validate_devices
from clipjax.data.sources import data_folders
from clipjax.data.training_order import require_places
from clipjax.evals.runner import RESULTS_FILE, check_metric, check_samples, tfds_dirs
from clipjax.models.clip import abstract_params
from clipjax.monitoring import events, profile, run_record
from clipjax.monitoring.prometheus import Exporter
from clipjax.monitoring.writers import METRICS_FILE, TENSORBOARD_FOLDER
from clipjax.runtime import compilation, consistency, device_counts, files, owner, process_log, sharding, staging
from clipjax.runtime.compilation import compiler_options
from clipjax.runtime.consistency import Fingerprint
from clipjax.runtime.mirror import Mirror
from clipjax.runtime.processes import announce, is_first
from clipjax.runtime.storage import is_address
from clipjax.runtime.watchdog import Watchdog
from clipjax.training import fingerprints, left_out, optimizer
from clipjax.training.decisions import FILE as DECISIONS_FILE
from clipjax.training.decisions import Decisions
from clipjax.training.inputs import Inputs, open_inputs
from clipjax.training.resume import check_same_run

_FILES = (METRICS_FILE, RESULTS_FILE, owner.FILE, run_record.FILE, events.FILE, DECISIONS_FILE)
_FOLDERS = (CHECKPOINTS_FOLDER, process_log.FOLDER, left_out.FOLDER, profile.FOLDER, TENSORBOARD_FOLDER)
_LOADED = (*_FILES, process_log.FOLDER, left_out.FOLDER)  # of a workdir on a store: what a start reads or adds to
_OTHER_WORKDIR = "move it away, or use another workdir"
_OTHERS_SECONDS = 1.0  # in which the other processes delete their logs


@dataclass(frozen=True)
class Checked:
    """A run that may begin.

    Attributes:
        config: all of its settings.
        workdir: the folder of its files.
        place: where they are kept: the workdir, or the address that it is a local folder of.
        mirror: keeps them there, on process 0, and on others their logs; None: they are kept in the workdir.
        apart: some processes do not see the workdir of process 0.
        inputs: data, tokenizer, tasks, first weights.
        tx: the optimizer.
        decisions: that the run has taken.
        exporter: the server of metrics on this process, if there is one.
    """

    config: Config
    workdir: Path
    place: str
    mirror: Mirror | None
    apart: bool
    inputs: Inputs
    tx: optax.GradientTransformationExtraArgs
    decisions: Decisions
    exporter: Exporter | None


def check(parse: Callable[[], tuple[Config, Path | str]], *, replays: bool = False) -> Checked:
    """Open and check everything, on all processes; they go on only if all of them can, and would do the same.

    A start that is refused deletes the files that it made.

    Args:
        parse: gives the config and the workdir of the command line, a path or the address of a folder of a store.
        replays: this start trains nothing; it is not recorded, and needs no checkpoint.

    Raises:
        ValueError: for the user, on every process: with field, value, rule and remedy.
        UnusableCheckpoint: on every process: no checkpoint can be used, and nothing else is wrong.
    """
    made: list[Path] = []
    mirrors: list[Mirror] = []
    try:
        claim, _ = consistency.run_on_all("owner", lambda: (_claim(parse, made, mirrors), {}))
        if claim.place != str(claim.workdir):
            claim, _ = consistency.run_on_all("staging", lambda claim=claim: (_spread(claim), {}))
        config, workdir, warning = claim.config, claim.workdir, claim.warning
        warnings = [warning, *_missing_devices(workdir)] if is_first() else []
        stuck = config.recovery.stuck_seconds  # ten times that for what a slow file system may take
        with Watchdog(None if stuck is None else 10 * stuck) as watchdog, watchdog.paused("preflight"):
            opened, facts = consistency.run_on_all(
                "train", lambda: _open_here(claim, warnings, made, replays), kinds=(UnusableCheckpoint,)
            )
            if not claim.apart:
                consistency.check_shared(workdir)
            if is_first() and not replays:
                record_start(opened.workdir, facts)
    except BaseException as error:
        for mirror in mirrors:
            mirror.close()
        if isinstance(error, ValueError | OSError):
            _delete(made)
        raise
    return opened


@dataclass(frozen=True)
class Claim:
    """The settings and places of the command line, once process 0 holds the workdir; see `Checked`.

    Attributes:
        config: all settings.
        workdir: the folder of the run's files.
        place: where they are kept.
        mirror: keeps them there.
        warning: for the user.
        apart: some processes do not see the workdir of process 0.
    """

    config: Config
    workdir: Path
    place: str
    mirror: Mirror | None
    warning: str
    apart: bool = False


def _spread(claim: Claim) -> Claim:
    """Return the claim of this process, once process 0 has filled its local folder of a workdir on a store."""
    files = (run_record.FILE, DECISIONS_FILE)
    workdir, mirror, apart = find_folder(claim.place, claim.workdir, claim.mirror, files)
    return replace(claim, workdir=workdir, mirror=mirror, apart=apart)


def _claim(parse: Callable[[], tuple[Config, Path | str]], made: list[Path], mirrors: list[Mirror]) -> Claim:
    """Return config and workdir once process 0 holds the workdir; nothing is written there before.

    Args:
        parse: gives them.
        made: gets the paths that this start makes, the innermost last.
        mirrors: gets the mirror of a workdir on a store.
    """
    config, place = parse()
    validate(config)
    device_counts.share()
    workdir = place if isinstance(place, Path) else staging.folder_of(place)
    warning = ""
    if is_first():
        new = [path for path in (workdir / owner.FILE, workdir, *workdir.parents) if not path.exists()]
        made += reversed(new)
        _check_entries(workdir)
        warning = owner.take(workdir, place=place if isinstance(place, str) else "")
        if isinstance(place, str):
            mirrors.append(open_mirror(place, workdir, _LOADED, announce, is_locked=not warning))
            _check_entries(workdir)
    return Claim(config, workdir, str(place), next(iter(mirrors), None), warning)


def _check_entries(workdir: Path) -> None:
    """Check that what lies in a workdir is a file or a folder where the run has one of its own.

    Raises:
        ValueError: it is the other.
    """
    for name in _FOLDERS:
        if (workdir / name).exists() and not (workdir / name).is_dir():
            raise ValueError(f"--workdir={workdir}: {name} in it is no folder, as a run has one; {_OTHER_WORKDIR}")
    for name in _FILES:
        if (workdir / name).exists() and not (workdir / name).is_file():
            raise ValueError(f"--workdir={workdir}: {name} in it is no file, as a run has one; {_OTHER_WORKDIR}")


def _missing_devices(workdir: Path) -> list[str]:
    """Return warnings on devices, for a person who reads of a mesh that does not fit, or of none and a smaller one."""
    now, last = device_counts.by_host(), {}
    with contextlib.suppress(run_record.DamagedRecord, OSError):  # others tell of it
        last = next(iter(reversed(run_record.read(workdir).get("starts", []))), {})
    return [device_counts.find_odd(now), device_counts.find_changes(now, last if isinstance(last, dict) else {})]


def _delete(made: Sequence[Path]) -> None:
    """Delete what this start has made, the innermost first; folders that are not empty stay."""
    for path in reversed(made):
        if path.name == owner.FILE:
            owner.release(path.parent, delete=True)
            continue
        deadline = time.monotonic() + (_OTHERS_SECONDS if jax.process_count() > 1 else 0)
        while not _is_deleted(path) and time.monotonic() < deadline:  # another process's log may still be there
            time.sleep(0.05)


def _is_deleted(path: Path) -> bool:
    with contextlib.suppress(OSError):
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
        return True
    return False


def _open_here(claim: Claim, warnings: Sequence[str], made: list[Path], replays: bool) -> tuple[Checked, Fingerprint]:
    """Check this process's part."""
    config, workdir, mirror = claim.config, claim.workdir, claim.mirror
    files.require_writable(workdir)
    if is_first() and not replays:
        files.require_file_writable(workdir / METRICS_FILE, "--workdir")
    log = process_log.path_of(workdir, jax.process_index())
    made += [path for path in (log.parent, log) if not path.exists()]
    process_log.open_log(workdir, rank=jax.process_index(), header=run_record.describe_start())
    for warning in filter(None, warnings):
        announce(f"warning: {warning}")
    decisions = Decisions(workdir, None if mirror is None else mirror.send)
    saved = newest_checkpoint(workdir) if replays else _open_newest(workdir, decisions)
    if saved is None and decisions.stand_ins and not replays:
        count = len(decisions.stand_ins)
        announce(f"{decisions.path.name}: its {count} stand-ins are forgotten: the start that took them saved nothing")
        decisions.forget_stand_ins()
    inputs = open_inputs(config, saved)
    folders = [
        workdir,
        *(Path(each) for each in (config.init_from, config.loss.distill_from) if each and not is_address(each)),
    ]
    folders += data_folders(inputs.sources, tfds_dirs(config))
    compilation.enable(config.compile_cache, outside=folders)
    if config.checkpoint.best_metric is not None:
        check_metric(config.checkpoint.best_metric, inputs.tasks)
    if saved is not None:
        check_same_run(saved, config, inputs)
    if config.data.on_unreadable is OnUnreadable.SKIP:
        require_places(inputs.order)
    check_samples(inputs.tasks)
    tx = optimizer.make_tx(config, abstract_params(config.model))
    validate_devices(
        config,
        num_devices=jax.device_count(),
        num_processes=jax.process_count(),
        num_slices=sharding.hardware_slices(jax.devices()),
        teacher=None if inputs.teacher_checkpoint is None else inputs.teacher_checkpoint.config,
        platform=jax.devices()[0].platform,
    )
    checkpoints = {"init_from": inputs.init_checkpoint, "loss.distill_from": inputs.teacher_checkpoint}
    facts: Fingerprint = {
        "config": fingerprints.config_fingerprint(config),
        "code": fingerprints.code_fingerprint(),
        "checkpoint": fingerprints.checkpoint_fingerprint(workdir, decisions),
        "data": fingerprints.data_fingerprint(inputs.sources, inputs.tokenizer, checkpoints),
        "class list": fingerprints.prompts_fingerprint(inputs.tasks),
    }
    exporter = Exporter(config.log) if is_first() and config.log.prometheus_port is not None else None
    return Checked(config, workdir, claim.place, mirror, claim.apart, inputs, tx, decisions, exporter), facts


def _open_newest(workdir: Path, decisions: Decisions) -> SavedCheckpoint | None:
    """Return the newest checkpoint, or None in a workdir that has never had one.

    Raises:
        ValueError: the checkpoints cannot be read, or are gone although `run.json` or decisions tell of some.
    """
    folder = workdir / CHECKPOINTS_FOLDER
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        if folder.is_symlink() or not isinstance(error, FileNotFoundError):
            raise ValueError(
                f"--workdir={workdir}: its folder {CHECKPOINTS_FOLDER} cannot be read ({error.strerror}); make it "
                "readable, or use another workdir to start anew"
            ) from error
        names = []
    saved = newest_checkpoint(workdir)
    if saved is not None:
        return saved
    signs = [path for path in (workdir / run_record.FILE, decisions.path) if path.exists()]
    start_anew = f"or start anew, in another workdir or by removing {' and '.join(map(str, signs))} knowingly"
    try:
        step = run_record.read(workdir).get("committed_step", 0)
    except run_record.DamagedRecord as error:
        raise ValueError(
            f"{error}; whether this workdir once had checkpoints cannot be known, and it has none: bring them back, "
            f"{start_anew}"
        ) from error
    if step or decisions.taken:
        told = (
            f"{run_record.FILE} records a checkpoint at step {step}"
            if step
            else f"{decisions.path.name} holds rollbacks"
        )
        aside = [name for name in names if name.endswith((".rejected", ".damaged"))]
        raise ValueError(
            f"--workdir={workdir}: {told}, but {folder} holds no checkpoint that can be used; bring the checkpoints "
            f"back, {start_anew}" + (f"; set aside there: {', '.join(aside)}" if aside else "")
        )
    return None


def record_start(workdir: Path, facts: Mapping[str, Mapping[str, object]]) -> None:
    """Add this start to `run.json`; if it cannot be written, the run starts all the same."""
    about = {
        **run_record.describe_start(),
        "compile_cache": jax.config.jax_compilation_cache_dir,  # pyright: ignore[reportAttributeAccessIssue]
        "compiler_options": compiler_options(jax.devices()),
        "devices_by_host": device_counts.by_host(),
        "digests": fingerprints.digests(facts),
    }
    try:
        run_record.write(workdir, about)
    except OSError as error:
        process_log.info(f"run.json cannot be written: {error}")
