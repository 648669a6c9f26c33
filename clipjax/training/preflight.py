"""Preflight of a run: everything that can be refused before training, by all of its processes together."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import optax

from clipjax.checkpoints.saved import newest_checkpoint
from clipjax.config import Config
from clipjax.config.validation import validate, validate_devices
from clipjax.evals.runner import check_metric
from clipjax.models.clip import abstract_params
from clipjax.monitoring import run_record
from clipjax.runtime import compilation, consistency, files, process_log, sharding
from clipjax.runtime.compilation import compiler_options
from clipjax.runtime.consistency import Fingerprint
from clipjax.runtime.processes import is_first
from clipjax.training import fingerprints, optimizer
from clipjax.training.inputs import Inputs, open_inputs
from clipjax.training.resume import check_same_run


@dataclass(frozen=True)
class Checked:
    """A run that may begin.

    Attributes:
        config: all of its settings.
        workdir: the folder of its files.
        inputs: data, tokenizer, tasks, first weights.
        tx: the optimizer.
    """

    config: Config
    workdir: Path
    inputs: Inputs
    tx: optax.GradientTransformationExtraArgs


def check(parse: Callable[[], tuple[Config, Path]]) -> Checked:
    """Open and check everything, on all processes; they go on only if all of them can, and would do the same.

    Args:
        parse: gives the config and the workdir of the command line.

    Raises:
        ValueError: for the user, on every process: with field, value, rule and remedy.
    """
    opened, facts = consistency.run_on_all("train", lambda: _open_here(*parse()))
    consistency.check_shared(opened.workdir)
    if is_first():
        record_start(opened.workdir, facts)
    return opened


def _open_here(config: Config, workdir: Path) -> tuple[Checked, Fingerprint]:
    """Check this process's part."""
    validate(config)
    files.require_writable(workdir)
    process_log.open_log(workdir, rank=jax.process_index(), header=run_record.describe_start())
    compilation.enable(config.compile_cache)
    saved = newest_checkpoint(workdir)
    inputs = open_inputs(config, saved)
    if config.checkpoint.best_metric is not None:
        check_metric(config.checkpoint.best_metric, inputs.tasks)
    if saved is not None:
        check_same_run(saved, config, inputs)
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
        "checkpoint": fingerprints.checkpoint_fingerprint(workdir),
        "data": fingerprints.data_fingerprint(inputs.sources, inputs.tokenizer, checkpoints),
    }
    return Checked(config, workdir, inputs, tx), facts


def record_start(workdir: Path, facts: Mapping[str, Mapping[str, object]]) -> None:
    """Add this start to `run.json`; if it cannot be written, the run starts all the same."""
    about = {
        **run_record.describe_start(),
        "compile_cache": jax.config.jax_compilation_cache_dir,  # pyright: ignore[reportAttributeAccessIssue]
        "compiler_options": compiler_options(jax.devices()),
        "digests": fingerprints.digests(facts),
    }
    try:
        run_record.write(workdir, about)
    except OSError as error:
        process_log.info(f"run.json cannot be written: {error}")
