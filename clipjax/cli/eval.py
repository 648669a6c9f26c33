"""Evaluate checkpoints: `clipjax eval --checkpoint=WORKDIR_OR_STEP [--suite=NAME] [--tasks=A,B] --output=FILE.json`.

Needs nothing but the checkpoint and the data: config, tokenizer and preprocessing come out of the checkpoint.

Reading order: `main`, `_open`, `open_one`, `run_with`, `_write`; `follow.py` has `--follow=WORKDIR`.
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
from clipjax.cli.eval_fields import NOT_OPENED, base_config, refuse_unread, refuse_unused_tfds, select_tasks
from clipjax.cli.output import show
from clipjax.cli.overrides import changes, override
from clipjax.config import Config
from clipjax.config.paths import expand_paths
from clipjax.config.validation import validate, validate_devices
from clipjax.data.sample import Source
from clipjax.data.sources import check_copies, data_folders, recording_sources
from clipjax.data.tokenizers.protocol import Tokenizer
from clipjax.evals.columns import COMPARABLE, to_csv, to_rows
from clipjax.evals.encoder import Encoder
from clipjax.evals.ensemble import Ensemble, EnsembleKind, JointTask, check_members
from clipjax.evals.examples import Examples, collect
from clipjax.evals.progress import Progress
from clipjax.evals.results import comparison_table, several_to_json, to_json, write_text
from clipjax.evals.runner import Evaluation, Results, Task, build_tasks, run_tasks, task_sources, tfds_dirs
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
PAGE = "index.html"
_EXAMPLES = 16  # of each task, on the page


@dataclass(frozen=True)
class OpenedCheckpoint:
    """A checkpoint that may be evaluated.

    Attributes:
        saved: the checkpoint.
        config: its config, with overrides.
        tokenizer: of the checkpoint.
        tasks: by name.
        key: digest of all that the results depend on; empty if it is not known.
    """

    saved: SavedCheckpoint
    config: Config
    tokenizer: Tokenizer
    tasks: dict[str, Task]
    key: str = ""

    @property
    def title(self) -> str:
        """The line above its table."""
        return f"checkpoint {self.saved.place} ({self.saved.params_group}), step {self.saved.step}"


@dataclass(frozen=True)
class Opened:
    """An evaluation that may begin.

    Attributes:
        checkpoints: one or more, on the same tasks.
        output: file for the results, None for none.
        changed: in words, what overrides changed, and what of a suite is left out.
        csv: file for the results in CLIP_benchmark's columns, None for none.
        report: file for the page, None for none.
        ensemble: the mean by which the checkpoints also act as one; None: they do not.
    """

    checkpoints: Sequence[OpenedCheckpoint]
    output: pathlib.Path | str | None
    changed: Sequence[str] = ()
    csv: pathlib.Path | str | None = None
    report: pathlib.Path | str | None = None
    ensemble: EnsembleKind | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if arguments.wants_help(argv):
        show(_parser().format_help())
        return 0
    if any(argument.partition("=")[0] == "--follow" for argument in argv):
        from clipjax.cli import follow  # which builds on this module

        return follow.main(argv, _parser())
    with processes.abort_on_error():
        with refusals(PROGRAM):
            processes.start(arguments.launch_options(argv))
            opened, _ = consistency.run_on_all("eval", lambda: _open(argv), kinds=(UnusableCheckpoint,))
        if processes.is_first():
            print("\n".join([processes.describe_devices(), *map(printable, opened.changed)]), flush=True)
        with stops(PROGRAM):
            return _evaluate(opened)


def _parser() -> arguments.Parser:
    parser = arguments.Parser(PROGRAM, ABOUT, config="fields")
    parser.add_argument(
        "--checkpoint",
        metavar="WORKDIR_OR_STEP",
        type=arguments.places,
        help="a workdir (its newest step is taken), or the directory of one step, which may have any name; A,B "
        "compares several, on the tasks of the first",
    )
    parser.add_argument(
        "--follow",
        metavar="WORKDIR",
        type=arguments.place,
        help="a workdir of a run that may go on: each checkpoint is evaluated once, and adds a line to --output",
    )
    parser.add_argument(
        "--tasks_from",
        metavar="FILE[:ARG]",
        type=arguments.file_with_argument,
        help="a config file whose eval.tasks are run instead of the checkpoint's own, with its data.tfds_* fields",
    )
    parser.add_argument(
        "--ensemble",
        metavar="KIND",
        type=arguments.choice([kind.value for kind in EnsembleKind]),
        help="also evaluate several checkpoints as one: the mean of their logits, or of their embeddings",
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


def _open(argv: Sequence[str]) -> tuple[Opened, consistency.Fingerprint]:
    """Open this process's part, and return it with all that must be the same on all processes."""
    parsed = _parser().read(argv)
    options = parsed.options
    refuse_unread(parsed.overrides)
    if options.checkpoint is None:
        raise ValueError("--checkpoint=WORKDIR_OR_STEP is missing: name a workdir that training has saved to")
    several = len(options.checkpoint) > 1
    if options.ensemble and not several:
        raise ValueError(f"--ensemble={options.ensemble} needs several checkpoints: --checkpoint=A,B")
    page = options.report
    if page is not None:
        page = objects.join(page, PAGE) if isinstance(page, str) else page / PAGE
    for option, place in (("--output", options.output), ("--csv", options.csv), ("--report", page)):
        if place:
            storage.require_writable(place, option, makes_folder=True)
    checkpoints, facts, changed = list[OpenedCheckpoint](), consistency.Fingerprint(), list[str]()
    first: Config | None = None
    for number, place in enumerate(options.checkpoint, 1):
        saved = SavedCheckpoint(place)
        base = base_config(saved.config, options.tasks_from, first)
        if first is None:
            changed += suites.set_tasks(base, options, parsed.overrides, not_opened=NOT_OPENED)
            first = copy.deepcopy(base)
        config = override(base, parsed.overrides)
        told = [f"--config.{change}" for change in changes(base, config, parsed.overrides)]
        changed = [*told, *changed] if number == 1 else changed
        one, own = open_one(parsed, saved, place, config)
        checkpoints.append(one)
        facts |= {f"{section} of {place}" if several else section: values for section, values in own.items()}
    kind = EnsembleKind(options.ensemble) if options.ensemble else None
    if kind is not None:
        check_members([one.config for one in checkpoints], kind)
    return Opened(checkpoints, options.output, changed, options.csv, page, kind), facts


def open_one(
    parsed: arguments.Arguments, saved: SavedCheckpoint, place: pathlib.Path | str, config: Config
) -> tuple[OpenedCheckpoint, consistency.Fingerprint]:
    """Open one checkpoint and its tasks."""
    options = parsed.options
    expand_paths(config, skip=NOT_OPENED)
    validate(config, batch_fields=("eval.batch_size",))
    select_tasks(config, options.tasks, parsed.overrides)
    read = {"data.tfds_dir"} if options.suite else set()  # by the search for its datasets
    refuse_unused_tfds(config, [one for one in parsed.overrides if one.path not in read])
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
    folders = [*_folders(saved, place), *data_folders(sources, tfds_dirs(config))]
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
    return OpenedCheckpoint(saved, config, tokenizer, tasks, _key(saved, facts)), facts


def _key(saved: SavedCheckpoint, facts: consistency.Fingerprint) -> str:
    """Return a digest of all that results depend on, the checkpoint's arrays among it; empty if one has no digests."""
    try:
        files = read_manifest(saved.path).files
    except (OSError, UnusableCheckpoint):  # of an old format
        return ""
    return hashlib.sha256(json.dumps([fingerprints.digests(facts), files], sort_keys=True).encode()).hexdigest()


def _folders(saved: SavedCheckpoint, given: pathlib.Path | str) -> list[pathlib.Path]:
    """Return the folders that came with a checkpoint: that of its workdir, or of the step alone, and the one given."""
    parent = saved.path.parent
    return [parent.parent if parent.name == FOLDER else saved.path, *([] if isinstance(given, str) else [given])]


@dataclass(frozen=True)
class Outcome:
    """The results of a checkpoint, or of all as one.

    Attributes:
        name: place of the checkpoint, or what the ensemble is.
        title: line above its table.
        evaluation: the results.
        examples: for the page, by task.
        progress: of this evaluation, None where nothing is kept.
    """

    name: str
    title: str
    evaluation: Evaluation
    examples: Mapping[str, Examples]
    progress: Progress | None


def _evaluate(opened: Opened) -> int:
    """Run the tasks, write the results, print the tables; return the exit code."""
    config = opened.checkpoints[0].config
    mesh, outcomes, encoders = sharding.make_mesh(config.mesh), list[Outcome](), list[Encoder]()
    with jax.set_mesh(mesh):
        for number, one in enumerate(opened.checkpoints):
            clip = build_clip(one.config.model, data=one.config.data)
            encoder = Encoder(one.config, clip, mesh, one.tokenizer, load_params(one.saved, mesh))
            suffix = f"-{number + 1}" if number else ""
            outcomes.append(run_with(opened, one.tasks, encoder, one.saved.place, one.title, one.key, suffix))
            encoders += [encoder] if opened.ensemble else []
        if opened.ensemble is not None:
            outcomes.append(_run_ensemble(opened, encoders))
    failures = [
        f"eval.tasks.{name} on {one.name}: {reason}"
        for one in outcomes
        for name, reason in one.evaluation.failures.items()
    ]
    written, refused = _write(opened, outcomes)
    failures += refused
    for one in outcomes:
        if one.progress is not None and not failures:
            one.progress.finish()
    if processes.is_first():
        for one in outcomes:
            print(printable(one.title))
            if one.evaluation.results:
                print(results_table(one.evaluation.results))
        if len(outcomes) > 1:
            print(comparison_table([(one.name, one.evaluation.results) for one in outcomes]))
        if written:
            print(f"results: {printable(', '.join(written))}", flush=True)
        for failure in failures:
            print_error(PROGRAM, ValueError(failure))
    return UNUSABLE_DATA if failures else 0


def run_with(
    opened: Opened, tasks: Mapping[str, Task], encoder: Encoder, name: str, title: str, key: str, suffix: str
) -> Outcome:
    """Run tasks with one encoder, behind those that are done."""
    keeps = opened.output is not None and key and processes.is_first()
    progress = Progress(_beside(opened.output, suffix), key) if keeps and opened.output is not None else None
    done = exchange.publish(f"progress{suffix}", lambda: {} if progress is None else dict(progress.results))
    if done and processes.is_first():
        print(f"done before, and not again: {printable(', '.join(done))}", flush=True)
    keep = {} if progress is None else {"keep": progress.add}
    evaluation = run_tasks(tasks, encoder, done=done, **keep)
    if progress is not None:
        evaluation.details.update((each, progress.details[each]) for each in done if each in progress.details)
    shows = opened.report is not None and not isinstance(encoder, Ensemble)  # whose pictures are several
    examples = _examples(tasks, evaluation, encoder) if shows else {}
    return Outcome(name, title, evaluation, examples, progress)


def _run_ensemble(opened: Opened, encoders: Sequence[Encoder]) -> Outcome:
    """Run the tasks with all checkpoints as one."""
    assert opened.ensemble is not None
    tasks = {
        name: JointTask.of([one.tasks[name] for one in opened.checkpoints]) for name in opened.checkpoints[0].tasks
    }
    places, kind = ", ".join(one.saved.place for one in opened.checkpoints), opened.ensemble.value
    keys = [one.key for one in opened.checkpoints]
    key = hashlib.sha256(json.dumps([kind, keys]).encode()).hexdigest() if all(keys) else ""
    encoder = Ensemble.of(encoders, opened.ensemble)
    return run_with(opened, tasks, encoder, f"mean of {kind}", f"mean of {kind} of {places}", key, "-ensemble")


def _beside(output: pathlib.Path | str, suffix: str) -> pathlib.Path | str:
    return f"{output}{suffix}" if isinstance(output, str) else output.with_name(f"{output.name}{suffix}")


def _write(opened: Opened, outcomes: Sequence[Outcome]) -> tuple[list[str], list[str]]:
    """Write what options ask for; return the places, and what went wrong."""
    tasks = opened.checkpoints[0].config.eval.tasks
    parts = [(one.name, one.evaluation) for one in outcomes]
    rows = [row for name, evaluation in parts for row in to_rows(evaluation.results, tasks, name)]
    text = to_json(*parts[0]) if len(parts) == 1 else several_to_json(parts)
    writes: list[tuple[str, pathlib.Path | str | None, Callable[[pathlib.Path | str], str]]] = [
        ("--output", opened.output, lambda place: write_text(place, text)),
        ("--csv", opened.csv, lambda place: write_text(place, to_csv(rows))),
        ("--report", opened.report, lambda place: _write_pages(opened, outcomes, place)),
    ]
    written, refused = list[str](), list[str]()
    for option, place, write in writes:
        if place is None or not any(evaluation.results for _, evaluation in parts):
            continue
        if why := exchange.publish(f"results{option}", functools.partial(write, place)):
            refused.append(f"{option}={place}: the results, which are shown, cannot be written there: {why}")
        else:
            written.append(str(place))
    return written, refused


def _examples(tasks: Mapping[str, Task], evaluation: Evaluation, encoder: Encoder) -> dict[str, Examples]:
    """Return samples of the tasks that worked, for the page."""
    found = {name: collect(tasks[name], encoder, _EXAMPLES) for name in evaluation.results}
    return {name: each for name, each in found.items() if each is not None}


def _write_pages(opened: Opened, outcomes: Sequence[Outcome], place: pathlib.Path | str) -> str:
    """Write a page for each outcome, the first one at `place`; return why one is absent."""
    models = [(one.name, f"{i}.html" if i else PAGE, one.evaluation.results) for i, one in enumerate(outcomes)]
    refused = ""
    for one, (_, name, _) in zip(outcomes, models, strict=True):
        where = objects.join(place.rpartition("/")[0], name) if isinstance(place, str) else place.with_name(name)
        refused = refused or write_text(where, _render(opened, one, models if len(models) > 1 else ()))
    return refused


def _render(opened: Opened, outcome: Outcome, models: Sequence[tuple[str, str, Results]]) -> str:
    """Return the page of an outcome, with links to those of the others."""
    facts = [
        ("checkpoint", outcome.title.removeprefix("checkpoint ")),
        ("devices", processes.describe_devices().removeprefix("devices: ")),
        ("versions", ", ".join(f"{name} {version}" for name, version in run_record.versions().items())),
        ("command", shlex.join(["clipjax", *sys.argv[1:]])),
        ("date", datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")),
    ]
    tasks = opened.checkpoints[0].config.eval.tasks
    return render(outcome.evaluation, tasks, outcome.examples, title="Evaluation", facts=facts, models=models)
