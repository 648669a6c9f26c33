"""Evaluate a checkpoint: `clipjax eval --checkpoint=WORKDIR_OR_STEP [--suite=NAME] [--tasks=A,B] --output=FILE.json`.

Needs nothing but the checkpoint and the data: config, tokenizer and preprocessing come out of the checkpoint.
"""

import copy
import datetime
import functools
import hashlib
import json
import pathlib
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax

from clipjax.checkpoints import exchange
from clipjax.checkpoints.manifest import UnusableCheckpoint
from clipjax.checkpoints.manifest import read as read_manifest
from clipjax.checkpoints.records import FOLDER
from clipjax.checkpoints.saved import SavedCheckpoint, load_params
from clipjax.cli import arguments, suites
from clipjax.cli.errors import UNUSABLE_DATA, print_error, refusals, stops
from clipjax.cli.output import show
from clipjax.cli.overrides import Override, changes, load_config, override
from clipjax.config import CheckpointConfig, Config, MeshConfig
from clipjax.config.data import TFDS_PREFIX
from clipjax.config.paths import expand_paths
from clipjax.config.serialization import path_parts
from clipjax.config.validation import validate, validate_devices
from clipjax.data.sample import Source
from clipjax.data.sources import check_copies, data_folders, recording_sources
from clipjax.data.tokenizers.protocol import Tokenizer
from clipjax.evals.columns import COMPARABLE, to_csv, to_rows
from clipjax.evals.encoder import Encoder
from clipjax.evals.examples import Examples, collect
from clipjax.evals.progress import Progress
from clipjax.evals.runner import (
    Evaluation,
    Task,
    build_tasks,
    run_tasks,
    task_sources,
    tfds_dirs,
    write_results,
    write_text,
)
from clipjax.models.clip import build_clip
from clipjax.monitoring import run_record
from clipjax.monitoring.run_logger import results_table
from clipjax.reports.evaluation import render
from clipjax.runtime import compilation, consistency, objects, processes, sharding, storage
from clipjax.runtime.terminal import printable
from clipjax.training import fingerprints

PROGRAM = "clipjax eval"
ABOUT = """Evaluate a checkpoint on the tasks of its config.

Needs nothing but the checkpoint and the data. Fields of the saved config that evaluation reads can be overridden, for
example where the data lies now (--config.data.tfds_dir=DIR, --config.eval.tasks['NAME'].source=PATH) or the mesh
(--config.mesh.fsdp=2); all others are refused. The mesh of the training run is not taken over.
A task that fails, also by embeddings that are not finite, is named, and the exit code is 3; the others go on."""
TFDS_DATA = {"tfds_dir": "tfds_dir", "tfds_image_key": "image_field", "tfds_caption_key": "caption_field"}
"""Fields of the data that TFDS sources read, and those of a task that stand in their place."""

TASK_DATA = (*TFDS_DATA, "image_field", "caption_field", "image_root")

READ = (
    "eval.batch_size",
    "eval.tasks",
    "mesh",
    *(f"data.{name}" for name in TASK_DATA),
    "data.num_threads",
    "data.cache_dir",
    "data.cache_gib",
    "data.max_image_pixels",
    "data.max_caption_bytes",
    "data.background",
    "data.exif_orientation",
    "data.resize",
    "data.interpolation",
    "data.mean",
    "data.std",
    "model.compute_dtype",
    "model.matmul_dtype",
    "model.attention",
    "compile_cache",
)
"""Fields, or groups of them, that evaluation reads and an override may change."""

TRAINED = ("model", "data.tokenizer", "loss.contrastive_weight")
"""Fields, or groups of them, that the weights were trained with, unless they are among `READ` or `TRAINING_ONLY`."""

TRAINING_ONLY = ("model.remat", "model.init_logit_scale", "model.max_logit_scale", "model.image.patch_dropout")
"""Fields of the model that only training reads."""

PAGE = "index.html"
_EXAMPLES = 16  # of each task, on the page

NOT_OPENED = ("init_from", "loss.distill_from", "data.train", "data.tokenizer")
"""Fields that name what evaluation does not open."""


@dataclass(frozen=True)
class Opened:
    """An evaluation that may begin.

    Attributes:
        saved: the checkpoint.
        config: its config, with overrides.
        tokenizer: of the checkpoint.
        tasks: by name.
        output: file for the results, None for none.
        changed: in words, what overrides changed, and what of a suite is left out.
        csv: file for the results in CLIP_benchmark's columns, None for none.
        report: folder for the page, None for none.
        key: digest of all that the results depend on; empty if it is not known.
    """

    saved: SavedCheckpoint
    config: Config
    tokenizer: Tokenizer
    tasks: dict[str, Task]
    output: pathlib.Path | str | None
    changed: Sequence[str] = ()
    csv: pathlib.Path | str | None = None
    report: pathlib.Path | str | None = None
    key: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if arguments.wants_help(argv):
        show(_parser().format_help())
        return 0
    with processes.abort_on_error():
        with refusals(PROGRAM):
            processes.start(arguments.launch_options(argv))
            opened, _ = consistency.run_on_all("eval", lambda: _open_here(argv), kinds=(UnusableCheckpoint,))
        if processes.is_first():
            print("\n".join([processes.describe_devices(), *map(printable, opened.changed)]), flush=True)
        with stops(PROGRAM):
            return _evaluate(opened)


def _parser() -> arguments.Parser:
    parser = arguments.Parser(PROGRAM, ABOUT, config="fields")
    parser.add_argument(
        "--checkpoint",
        metavar="WORKDIR_OR_STEP",
        type=arguments.place,
        help="a workdir (its newest step is taken), or the directory of one step, which may have any name",
        missing="=WORKDIR_OR_STEP is missing: name a workdir that training has saved to",
    )
    parser.add_argument(
        "--tasks_from",
        metavar="FILE[:ARG]",
        type=arguments.file_with_argument,
        help="a config file whose eval.tasks are run instead of the checkpoint's own, with its data.tfds_* fields",
    )
    suites.add_options(parser)
    parser.add_argument("--tasks", metavar="A,B", help="names of eval.tasks, or of the suite's; all if left out")
    parser.add_argument("--output", metavar="FILE", type=arguments.place, help="JSON file for the results")
    parser.add_argument(
        "--csv", metavar="FILE", type=arguments.place, help="CSV file for the results, in the columns of CLIP_benchmark"
    )
    parser.add_argument(
        "--report", metavar="DIR", type=arguments.place, help=f"folder for a page of the results, DIR/{PAGE}"
    )
    arguments.add_launch_options(parser)
    return parser


def _open_here(argv: Sequence[str]) -> tuple[Opened, consistency.Fingerprint]:
    """Open this process's part, and return it with all that must be the same on all processes."""
    parsed = _parser().read(argv)
    options = parsed.options
    _refuse_unread(parsed.overrides)
    saved = SavedCheckpoint(options.checkpoint)
    base = _base_config(saved.config, options.tasks_from)
    of_suite = suites.set_tasks(base, options, parsed.overrides, not_opened=NOT_OPENED)
    config = override(base, parsed.overrides)
    expand_paths(config, skip=NOT_OPENED)
    changed = [f"--config.{change}" for change in changes(base, config, parsed.overrides)] + of_suite
    page = options.report
    if page is not None:
        page = objects.join(page, PAGE) if isinstance(page, str) else page / PAGE
    for option, place in (("--output", options.output), ("--csv", options.csv), ("--report", page)):
        if place:
            storage.require_writable(place, option, makes_folder=True)
    validate(config, batch_fields=("eval.batch_size",))
    _select_tasks(config, options.tasks, parsed.overrides)
    read = {"data.tfds_dir"} if options.suite else set()  # by the search for its datasets
    _refuse_unused_tfds(config, [one for one in parsed.overrides if one.path not in read])
    if options.csv and not any(task.kind in COMPARABLE for task in config.eval.tasks.values()):
        kinds = ", ".join(kind.value for kind in COMPARABLE)
        raise ValueError(
            f"--csv={options.csv}: CLIP_benchmark has columns for {kinds}, and no task is of these; leave it out"
        )
    tokenizer = saved.tokenizer()
    if any(task.reads_texts for task in config.eval.tasks.values()):
        tokenizer.encode("a")  # of a checkpoint that was converted without one, this says so
    check_copies(task_sources(config))
    sources: dict[str, Source] = {}
    tasks = build_tasks(config, recording_sources(sources))
    folders = [*_folders(saved, options.checkpoint), *data_folders(sources, tfds_dirs(config))]
    compilation.enable(config.compile_cache, outside=folders)
    validate_devices(
        config,
        num_devices=jax.device_count(),
        num_processes=jax.process_count(),
        num_slices=sharding.hardware_slices(jax.devices()),
        batch_fields=("eval.batch_size",),
        platform=jax.devices()[0].platform if config.model.attention is not saved.config.model.attention else "",
    )
    facts: consistency.Fingerprint = {
        "config": fingerprints.config_fingerprint(config),
        "code": fingerprints.code_fingerprint(),
        "data": fingerprints.data_fingerprint(sources, tokenizer, {"checkpoint": saved}),
        "class list": fingerprints.prompts_fingerprint(tasks),
    }
    key = _key(saved, facts)
    return Opened(saved, config, tokenizer, tasks, options.output, changed, options.csv, page, key), facts


def _key(saved: SavedCheckpoint, facts: consistency.Fingerprint) -> str:
    """Return a digest of all that results depend on, the checkpoint's arrays among it; empty if one has no digests."""
    try:
        files = read_manifest(saved.path).files
    except (OSError, UnusableCheckpoint):  # of an old format
        return ""
    return hashlib.sha256(json.dumps([fingerprints.digests(facts), files], sort_keys=True).encode()).hexdigest()


def _base_config(saved: Config, tasks_from: str | None) -> Config:
    """The checkpoint's config, before overrides, without what only its training run could use.

    Nor does a checkpoint, which others may have made, choose the compile cache: what lies there is executed.
    """
    config = copy.deepcopy(saved)
    config.compile_cache = Config().compile_cache
    config.mesh = MeshConfig()
    config.checkpoint = CheckpointConfig()  # its best_metric speaks of tasks that may not be run
    if tasks_from:
        other = load_config(tasks_from)
        config.eval.tasks = other.eval.tasks
        for name in TASK_DATA:
            setattr(config.data, name, getattr(other.data, name))
    return config


def _folders(saved: SavedCheckpoint, given: pathlib.Path | str) -> list[pathlib.Path]:
    """Return the folders that came with a checkpoint: that of its workdir, or of the step alone, and the one given."""
    parent = saved.path.parent
    return [parent.parent if parent.name == FOLDER else saved.path, *([] if isinstance(given, str) else [given])]


def _refuse_unread(overrides: Sequence[Override]) -> None:
    """Refuse overrides that would change nothing.

    Raises:
        ValueError: all of them, a line each.
    """
    errors = []
    for one in overrides:
        if _is_within(one.path, READ):
            continue
        if _is_within(one.path, TRAINED) and not _is_within(one.path, TRAINING_ONLY):
            why = "the weights of the checkpoint were trained with its own value, and fix it"
        else:
            why = "only training reads it"
        errors.append(f"config.{one.path}={one.text}: {why}; {PROGRAM} takes {', '.join(READ)}")
    if errors:
        raise ValueError("\n".join(errors))


def _refuse_unused_tfds(config: Config, overrides: Sequence[Override]) -> None:
    """Refuse to say where TFDS data lies for tasks that read none.

    Raises:
        ValueError: all such overrides, a line each.
    """
    errors = []
    for name, own in TFDS_DATA.items():
        given = [one for one in overrides if one.path == f"data.{name}"]
        reading = [task for task in config.eval.tasks.values() if any(map(_is_tfds, task.sources))]
        if given and all(getattr(task, own) is not None for task in reading):
            why = f"each task that reads TFDS data has its own {own}" if reading else "no task reads TFDS data"
            errors += [f"config.{one.path}={one.text}: {why}; leave it out" for one in given]
    if errors:
        raise ValueError("\n".join(errors))


def _is_tfds(source: str) -> bool:
    return source.startswith(TFDS_PREFIX)


def _is_within(path: str, groups: Sequence[str]) -> bool:
    return any(path == group or path.startswith((f"{group}.", f"{group}[")) for group in groups)


def _select_tasks(config: Config, chosen: str | None, overrides: Sequence[Override]) -> None:
    tasks = config.eval.tasks
    wanted = list(tasks) if chosen is None else [name.strip() for name in chosen.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in tasks]
    if unknown or not wanted:
        raise ValueError(
            f"--tasks={chosen or ''}: {', '.join(unknown) or 'nothing'} is not among the tasks of the checkpoint's "
            f"config ({', '.join(tasks) or 'none; --tasks_from=CONFIG takes them from there'})"
        )
    for one in overrides:
        keys = [name for name, is_key in path_parts(one.path) if is_key]
        if keys and keys[0] not in wanted:
            raise ValueError(f"config.{one.path}={one.text}: the task {keys[0]!r} is not among --tasks={chosen}")
    config.eval.tasks = {name: tasks[name] for name in wanted}


def _evaluate(opened: Opened) -> int:
    """Run the tasks, write the results, print the table; return the exit code."""
    saved, config, output = opened.saved, opened.config, opened.output
    mesh = sharding.make_mesh(config.mesh)
    clip = build_clip(config.model, data=config.data)
    progress = Progress(output, opened.key) if output is not None and opened.key and processes.is_first() else None
    done = exchange.publish("progress", lambda: {} if progress is None else dict(progress.results))
    if done and processes.is_first():
        print(f"done before, and not again: {printable(', '.join(done))}", flush=True)
    with jax.set_mesh(mesh):
        encoder = Encoder(config, clip, mesh, opened.tokenizer, load_params(saved, mesh))
        keep = {} if progress is None else {"keep": progress.add}
        evaluation = run_tasks(opened.tasks, encoder, done=done, **keep)
        examples = {} if opened.report is None else _examples(opened, evaluation, encoder)
    if progress is not None:
        evaluation.details.update((name, progress.details[name]) for name in done if name in progress.details)
    failures = [f"eval.tasks.{name} on {saved.place}: {reason}" for name, reason in evaluation.failures.items()]
    rows = to_rows(evaluation.results, config.eval.tasks, saved.place)
    writes: list[tuple[str, pathlib.Path | str | None, Callable[[pathlib.Path | str], str]]] = [
        ("--output", output, lambda place: write_results(place, saved.place, evaluation)),
        ("--csv", opened.csv, lambda place: write_text(place, to_csv(rows))),
        ("--report", opened.report, lambda place: write_text(place, _render(opened, evaluation, examples))),
    ]
    written = []
    for option, place, write in writes:
        if place is None or not evaluation.results:
            continue
        if refused := exchange.publish(f"results{option}", functools.partial(write, place)):
            failures.append(f"{option}={place}: the results, which are shown, cannot be written there: {refused}")
        else:
            written.append(str(place))
    if progress is not None and not failures:
        progress.finish()
    if processes.is_first():
        print(f"checkpoint {printable(saved.place)} ({saved.params_group}), step {saved.step}")
        if evaluation.results:
            print(results_table(evaluation.results))
        if written:
            print(f"results: {printable(', '.join(written))}", flush=True)
        for failure in failures:
            print_error(PROGRAM, ValueError(failure))
    return UNUSABLE_DATA if failures else 0


def _examples(opened: Opened, evaluation: Evaluation, encoder: Encoder) -> dict[str, Examples]:
    """Return samples of the tasks that worked, for the page."""
    found = {name: collect(opened.tasks[name], encoder, _EXAMPLES) for name in evaluation.results}
    return {name: each for name, each in found.items() if each is not None}


def _render(opened: Opened, evaluation: Evaluation, examples: Mapping[str, Examples]) -> str:
    """Return the page of an evaluation."""
    saved = opened.saved
    facts = [
        ("checkpoint", saved.place),
        ("step", f"{saved.step:,} ({saved.params_group})"),
        ("devices", processes.describe_devices().removeprefix("devices: ")),
        ("versions", ", ".join(f"{name} {version}" for name, version in run_record.versions().items())),
        ("command", shlex.join(["clipjax", *sys.argv[1:]])),
        ("date", datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")),
    ]
    return render(evaluation, opened.config.eval.tasks, examples, title="Evaluation", facts=facts)
