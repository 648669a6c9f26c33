"""Evaluate a checkpoint: `clipjax eval --checkpoint=WORKDIR_OR_STEP [--tasks=A,B] --output=results.json`.

Needs nothing but the checkpoint and the data: config, tokenizer and preprocessing come out of the checkpoint.
"""

import pathlib
import sys
from collections.abc import Callable, Sequence

import jax

from clipjax.checkpoints.saved import SavedCheckpoint, load_params
from clipjax.cli import arguments
from clipjax.cli.errors import refusals
from clipjax.config import MeshConfig, TaskKind
from clipjax.config.validation import validate, validate_devices
from clipjax.data.sample import Source
from clipjax.data.sources import recording_sources
from clipjax.data.tokenizers.protocol import Tokenizer
from clipjax.evals.encoder import Encoder
from clipjax.evals.runner import Task, build_tasks, run_tasks, write_results
from clipjax.models.clip import build_clip
from clipjax.monitoring.run_logger import results_table
from clipjax.runtime import compilation, consistency, files, launchers, processes, sharding
from clipjax.training import fingerprints

PROGRAM = "clipjax eval"
OPTIONS = {
    "checkpoint": "a workdir (its newest step is taken) or one of its checkpoints/STEP directories",
    "tasks_from": "a config file whose eval.tasks are run instead of the checkpoint's own, with its data.tfds_* fields",
    "tasks": "names of the config's eval.tasks, separated by commas; all of them if left out",
    "output": "JSON file for the results",
    **launchers.OPTIONS,
}
TASK_DATA = ("tfds_dir", "tfds_image_key", "tfds_caption_key")
HELP = f"""Evaluate a checkpoint on the tasks of its config.

  {PROGRAM} --checkpoint=WORKDIR_OR_STEP [--tasks_from=FILE[:ARG]] [--tasks=A,B] [--output=results.json]
      [--config.FIELD=VALUE ...] [--coordinator=HOST:PORT --num_processes=N --process_id=I]

  --checkpoint  {OPTIONS["checkpoint"]}
  --tasks_from  {OPTIONS["tasks_from"]}
  --tasks       {OPTIONS["tasks"]}
  --output      {OPTIONS["output"]}

Fields of the saved config can be overridden, for example where the data lies now (--config.data.tfds_dir=DIR) or the
mesh (--config.mesh.fsdp=2). The mesh of the training run is not taken over.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The front door; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if arguments.wants_help(argv):
        print(HELP)
        return 0
    with processes.abort_on_error():
        with refusals(PROGRAM):
            work = prepare(argv)
        return work()


def prepare(argv: Sequence[str]) -> Callable[[], int]:
    """Open and check everything, on all processes together; returns the evaluation itself.

    Raises:
        ValueError: for the user, with field, value, rule and remedy.
    """
    processes.start(arguments.option_values(argv, launchers.OPTIONS))
    return consistency.run_on_all("eval", lambda: _open_here(argv))[0]


def _open_here(argv: Sequence[str]) -> tuple[Callable[[], int], consistency.Fingerprint]:
    """This process's part, and what must be the same on all processes."""
    path = arguments.option_value(argv, "checkpoint")
    if not path:
        raise ValueError("--checkpoint=WORKDIR_OR_STEP is missing: name a workdir that training has saved to")
    saved = SavedCheckpoint(path)
    saved.config.mesh = MeshConfig()
    if tasks_from := arguments.option_value(argv, "tasks_from"):
        other = arguments.parse(PROGRAM, [f"--config={tasks_from}"], options={}).config
        saved.config.eval.tasks = other.eval.tasks
        for name in TASK_DATA:
            setattr(saved.config.data, name, getattr(other.data, name))
    parsed = arguments.parse(PROGRAM, argv, options=OPTIONS, config=saved.config)
    output = parsed.options["output"]
    if output:
        files.require_writable(pathlib.Path(output).parent)
    validate(saved.config, batch_fields=("eval.batch_size",))
    compilation.enable(saved.config.compile_cache)
    _select_tasks(saved, parsed.options["tasks"])
    tokenizer = saved.tokenizer()
    if any(task.kind is not TaskKind.IMAGE_RETRIEVAL for task in saved.config.eval.tasks.values()):
        tokenizer.encode("a")  # of a checkpoint that was converted without one, this says so
    sources: dict[str, Source] = {}
    tasks = build_tasks(saved.config, recording_sources(sources))
    validate_devices(
        saved.config,
        num_devices=jax.device_count(),
        num_processes=jax.process_count(),
        num_slices=sharding.hardware_slices(jax.devices()),
        batch_fields=("eval.batch_size",),
    )
    facts: consistency.Fingerprint = {
        "config": fingerprints.config_fingerprint(saved.config),
        "code": fingerprints.code_fingerprint(),
        "data": fingerprints.data_fingerprint(sources, tokenizer, {"checkpoint": saved}),
    }
    return lambda: evaluate(saved, tokenizer, tasks, pathlib.Path(output) if output else None), facts


def _select_tasks(saved: SavedCheckpoint, chosen: str | None) -> None:
    tasks = saved.config.eval.tasks
    wanted = list(tasks) if chosen is None else [name.strip() for name in chosen.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in tasks]
    if unknown or not wanted:
        raise ValueError(
            f"--tasks={chosen or ''}: {', '.join(unknown) or 'nothing'} is not among the tasks of the checkpoint's "
            f"config ({', '.join(tasks) or 'none; --tasks_from=CONFIG takes them from there'})"
        )
    saved.config.eval.tasks = {name: tasks[name] for name in wanted}


def evaluate(saved: SavedCheckpoint, tokenizer: Tokenizer, tasks: dict[str, Task], output: pathlib.Path | None) -> int:
    """Run the tasks, print the table, write the JSON; returns the exit code."""
    config = saved.config
    mesh = sharding.make_mesh(config.mesh)
    clip = build_clip(config.model, data=config.data)
    with jax.set_mesh(mesh):
        results = run_tasks(tasks, Encoder(config, clip, mesh, tokenizer, load_params(saved, mesh)))
    if processes.is_first():
        print(f"checkpoint {saved.path} ({saved.params_group}), step {saved.step}")
        print(results_table(results))
        if output is not None:
            write_results(output, saved.path, results)
            print(f"results: {output}")
    return 0
