"""Suites of datasets: `clipjax suites` lists and prepares them; `set_tasks` is `clipjax eval --suite=NAME`."""

import copy
import importlib
import os
import sys
from argparse import Namespace
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from clipjax.cli import arguments
from clipjax.cli.errors import UNUSABLE_DATA, print_error, refusals
from clipjax.cli.output import show
from clipjax.cli.overrides import Override, override
from clipjax.config import Config, EvalConfig
from clipjax.config.paths import expand_paths
from clipjax.evals.datasets.specs import Spec, specs
from clipjax.evals.suites import SUITES, Plan, plan_suite, require_tasks
from clipjax.runtime.storage import is_address
from clipjax.runtime.terminal import format_table, printable

if TYPE_CHECKING:
    from clipjax.evals.runner import Task

PROGRAM = "clipjax suites"
ABOUT = """List the suites of datasets that `clipjax eval --suite=NAME` runs, and what is there of one.

  clipjax suites
  clipjax suites --suite=robustness --suite_dir=DIR --tfds_dir=DIR
  clipjax suites --prepare=mnist,dtd --tfds_dir=DIR     download and prepare by TFDS, as ArrayRecord
"""
SUITE_DIR_HELP = "folder, or address of one, that holds folders of tars in CLIP_benchmark's layout, as wds_imagenetv2"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = arguments.Parser(PROGRAM, ABOUT)
    parser.add_argument("--suite", metavar="NAME", type=arguments.choice(SUITES), help=f"one of {', '.join(SUITES)}")
    parser.add_argument("--suite_dir", metavar="DIR", type=arguments.place, help=SUITE_DIR_HELP)
    parser.add_argument("--tfds_dir", metavar="DIR", type=arguments.place, help="folder of prepared TFDS data")
    parser.add_argument("--prepare", metavar="A,B", help="names of datasets that TFDS is to prepare in --tfds_dir")
    if arguments.wants_help(argv):
        show(parser.format_help())
        return 0
    with refusals(PROGRAM):
        options = parser.read(argv).options
        if options.prepare is not None:
            return _prepare(_to_prepare(options), _text(options.tfds_dir))
        if options.suite is None:
            if options.suite_dir is not None or options.tfds_dir is not None:
                raise ValueError(f"--suite=NAME is missing: name one of {', '.join(SUITES)}")
            rows = [[name, str(len(suite.names)), suite.title] for name, suite in SUITES.items()]
            show(format_table(rows, ("suite", "datasets", "title")))
            return 0
        plan = plan_suite(options.suite, folder=_text(options.suite_dir), tfds_dir=_text(options.tfds_dir))
        show(_table(options.suite, plan))
    return 0


def _text(place: Any) -> str | None:
    return None if place is None else str(place)


def _table(name: str, plan: Plan) -> str:
    suite, rows = SUITES[name], []
    for each in suite.names:
        spec, examples = specs()[each], suite.examples(each)
        counts = [f"{number:,}" if number else "-" for number in (spec.classes, examples)]
        source = plan.tasks[each].source if each in plan.tasks else "missing"
        rows.append([each, spec.title, spec.metric, *counts, spec.licence, spec.home, source])
    table = format_table(rows, ("dataset", "title", "metric", "classes", "examples", "licence", "home", "source"))
    return "\n".join([table, *(printable(f"{each}: {why}") for each, why in plan.missing.items())])


# Preparing


def _to_prepare(options: Namespace) -> list[Spec]:
    """Return the datasets that TFDS is to prepare.

    Raises:
        ValueError: one is none that TFDS has, or options do not fit.
    """
    for name in ("suite", "suite_dir"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name} would be ignored beside --prepare; leave one of them out")
    if isinstance(options.tfds_dir, str) and is_address(options.tfds_dir):
        raise ValueError(f"--tfds_dir={options.tfds_dir}: data is prepared on a disk; copy the folder there afterwards")
    known = [name for name, spec in specs().items() if spec.tfds is not None]
    names = list(dict.fromkeys(name.strip() for name in options.prepare.split(",") if name.strip()))
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(
            f"--prepare={options.prepare}: {', '.join(unknown) or 'nothing'} is not among the datasets that TFDS has "
            f"({', '.join(known)})"
        )
    return [specs()[name] for name in names]


def _prepare(wanted: Sequence[Spec], tfds_dir: str | None) -> int:
    """Download and prepare datasets; one that fails costs none of the others. Return the exit code."""
    code = 0
    for spec in wanted:
        assert spec.tfds is not None
        try:
            place = _prepare_one(spec.tfds.rpartition("/")[0], tfds_dir)
        except Exception as error:  # TFDS raises whatever its downloads and its builders do
            hint = f"; {spec.by_hand}" if spec.by_hand else ""
            text = f"{spec.name}: TFDS could not prepare {spec.tfds}: {type(error).__name__}: {error}{hint}"
            if isinstance(error, ImportError):
                text += "; it needs that package: install it, for preparing alone (pip install tensorflow, for one)"
            print_error(PROGRAM, ValueError(text))
            code = UNUSABLE_DATA
        else:
            print(printable(f"{spec.name} lies in {place}"), flush=True)
    return code


def _prepare_one(name: str, tfds_dir: str | None) -> str:
    """Return where the prepared data lies; TFDS leaves what is there already."""
    import tensorflow_datasets as tfds

    if name == "scenes":
        scenes: Any = importlib.import_module("clipjax.data.scenes.builder")
        return os.fspath(scenes.build_scenes(tfds_dir).data_dir)
    tfds.display_progress_bar(sys.stderr.isatty())
    builder = tfds.builder(name, data_dir=tfds_dir, file_format="array_record")
    builder.download_and_prepare()
    return os.fspath(builder.data_dir)


# clipjax eval --suite


def add_options(parser: arguments.Parser) -> None:
    """Add the options by which `clipjax eval` takes a suite."""
    parser.add_argument(
        "--suite",
        metavar="NAME",
        type=arguments.choice(SUITES),
        help="the tasks of a suite instead of the config's, as far as its data is there (`clipjax suites` tells more): "
        + ", ".join(SUITES),
    )
    parser.add_argument("--suite_dir", metavar="DIR", type=arguments.place, help=SUITE_DIR_HELP)


def set_tasks(
    base: Config, options: Namespace, overrides: Sequence[Override], *, not_opened: Collection[str] = ()
) -> list[str]:
    """Make the tasks of `--suite` those of a config, as far as they can be built; return what is left out, in lines.

    Without `--suite` nothing is changed.

    Args:
        base: the config before overrides; its tasks are changed.
        options: `suite`, `suite_dir`, `tasks` and `tasks_from`.
        overrides: of the command line; those of data tell how a suite's sources are read.
        not_opened: fields that name what evaluation does not open.

    Raises:
        ValueError: an option would be ignored; nothing of the suite is there, or not all that `--tasks` names.
        OSError: a store does not tell.
    """
    if options.suite is None:
        if options.suite_dir is not None:
            raise ValueError(f"--suite_dir={options.suite_dir} would be ignored without --suite; leave it out")
        return []
    if options.tasks_from is not None:
        raise ValueError(f"--tasks_from={options.tasks_from} would be ignored beside --suite; leave one of them out")
    from clipjax.evals.runner import build_tasks

    read = override(base, [one for one in overrides if not one.path.startswith("eval.tasks")])
    expand_paths(read, skip=not_opened)
    only = None if options.tasks is None else [each.strip() for each in options.tasks.split(",") if each.strip()]
    folder = _text(options.suite_dir)
    plan = plan_suite(options.suite, folder=folder, tfds_dir=read.data.tfds_dir, only=only)
    built: dict[str, Task] = {}
    for name, task in list(plan.tasks.items()):
        config = copy.copy(read)
        config.eval = EvalConfig(batch_size=read.eval.batch_size, tasks={name: task})
        try:
            built |= build_tasks(config)
        except (ValueError, OSError) as error:
            plan.missing[name] = str(error).removeprefix(f"eval.tasks.{name}: ")
            del plan.tasks[name]
    require_tasks(options.suite, plan, all_of_them=only is not None)
    base.eval.tasks = plan.tasks
    left_out = [f"suite {options.suite}: {name} is left out: {why}" for name, why in plan.missing.items()]
    return left_out + _other_sizes(options.suite, built)


def _other_sizes(suite: str, built: Mapping[str, "Task"]) -> list[str]:
    """Return what datasets have another number of examples than is published, in lines."""
    lines = []
    for name, task in built.items():
        published, found = SUITES[suite].examples(name), len(task.sources[0])
        if published is not None and published != found:
            lines.append(f"suite {suite}: {name} holds {found:,} examples, where {published:,} are published")
    return lines
