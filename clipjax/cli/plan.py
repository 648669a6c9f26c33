"""Tell what a run will need before it starts: `clipjax plan --config=FILE[:ARG] --topology=CHIP:SHAPE`.

The step is compiled for accelerators that are not here, exactly as `clipjax train` compiles it there.
"""

import argparse
import json
import sys
from collections.abc import Sequence

from clipjax.cli import arguments
from clipjax.cli.errors import DOES_NOT_FIT, refusals
from clipjax.cli.output import show
from clipjax.config import AttentionMethod, Config
from clipjax.config.validation import validate
from clipjax.planning import targets
from clipjax.runtime import storage

PROGRAM = "clipjax plan"
ABOUT = """Tell what a run will need before it starts, by compiling its step for accelerators that are not here.

Takes the config and overrides of `clipjax train`, and refuses what that would refuse of them; a field that does not
change the step (where the data lies, eval.*, log.*, checkpoint.*, ...) does not change the plan.
Exit code 0 if the run fits, 3 if it does not, 2 if something is refused."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if arguments.wants_help(argv):
        show(_parser().format_help())
        return 0
    with refusals(PROGRAM):
        parsed = _parser().read(argv)
        targets.prepare_environment(parsed.options.topology)
        config = parsed.config()
        target, teacher = _check(config, parsed.options)
        if parsed.options.search:
            from clipjax.planning.search import Search

            search = Search(
                config,
                target,
                num_samples=parsed.options.num_samples,
                teacher=teacher,
                price=parsed.options.price,
                output=parsed.options.output,
            )
    if parsed.options.search:
        from clipjax.planning.search import run_search

        return 0 if run_search(search) else DOES_NOT_FIT
    return 0 if _plan(config, target, parsed.options, teacher=teacher) else DOES_NOT_FIT


def _parser() -> arguments.Parser:
    parser = arguments.Parser(PROGRAM, ABOUT, config="file", more="--config.FIELD=VALUE sets a field of the config.")
    parser.add_argument(
        "--topology",
        metavar="CHIP:SHAPE",
        help="for example v5e:16x16, v5p:4x8x8, h100:32x8 (nodes x GPUs); here: this machine",
        missing="=CHIP:SHAPE is missing, for example --topology=v5e:16x16",
    )
    whole_number = arguments.whole_number(1)
    parser.add_argument(
        "--slices",
        metavar="N",
        type=whole_number,
        default=1,
        help="so many of these, with the data-center network between them (1)",
    )
    parser.add_argument("--output", metavar="FILE", type=arguments.place, help="file for the plan as JSON")
    parser.add_argument(
        "--dump_hlo", metavar="FILE", type=arguments.place, help="file for the text of the compiled step"
    )
    parser.add_argument("--price", type=_price, help="per chip and hour, in any currency: adds the cost of the run")
    parser.add_argument(
        "--num_samples",
        metavar="N",
        type=whole_number,
        default=400_000_000,
        help="size of the training source; only the memory of loss.kind=global depends on it (400000000)",
    )
    for name, text in (
        ("search", "try rematerialisation, microbatches, meshes and loss methods, and rank what fits (no)"),
        ("measure", "with --topology=here, run the step as well and print what it takes (no)"),
    ):
        parser.add_argument(
            f"--{name}", metavar="yes|no", type=arguments.yes_or_no, nargs="?", const=True, default=False, help=text
        )
    return parser


def _price(text: str) -> float:
    try:
        price = float(text)
    except ValueError:
        price = -1.0
    if not 0 <= price < 1e9:
        raise argparse.ArgumentTypeError(f"={text} must be a number of at least 0, per chip and hour")
    return price


def _check(config: Config, options: argparse.Namespace) -> tuple[targets.Target, Config | None]:
    """Refuse all that can be refused; the accelerators and the teacher's config.

    Raises:
        ValueError: for the user, with field, value, rule and remedy.
    """
    topology = options.topology
    validate(config)
    for name in ("output", "dump_hlo"):
        if path := getattr(options, name):
            storage.require_writable(path, f"--{name}")
    if config.model.attention is AttentionMethod.CUDNN and topology != targets.HERE:
        raise ValueError(
            f"config.model.attention=cudnn cannot be compiled for --topology={topology}, which is not here: cuDNN has "
            "to run for it; plan with --config.model.attention=xla, whose memory is the same within 2 % "
            "(docs/planning.md), or on such a machine with --topology=here"
        )
    target = targets.find_target(topology, options.slices)
    if options.measure and not target.is_here:
        raise ValueError("--measure=yes runs the step, and needs --topology=here")
    if options.search and (options.measure or options.dump_hlo):
        raise ValueError("--measure and --dump_hlo are of one plan; give them with what the search has found")
    teacher = _teacher(config)
    if not options.search:
        targets.check_devices(config, target, teacher)
    return target, teacher


def _plan(config: Config, target: targets.Target, options: argparse.Namespace, *, teacher: Config | None) -> bool:
    """Compile, print and write the plan; return whether the run fits."""
    from clipjax.planning import report

    plan, compiled = report.plan_run(
        config, target, num_samples=options.num_samples, teacher=teacher, price=options.price
    )
    if options.measure and plan["fits"]:
        from clipjax.planning.measure import measure

        measured = measure(compiled, compiled.init_state)
        measured["mfu"] = plan["predicted_mfu"] * plan["predicted_step_seconds"] / measured["step_seconds"]
        plan["measured"] = measured
    for path, text in (
        (options.output, json.dumps(plan, indent=1) + "\n"),
        (options.dump_hlo, compiled.text or compiled.refusal),
    ):
        if path:
            storage.write(path, text)
    print(report.describe(plan))
    return plan["fits"]


def _teacher(config: Config) -> Config | None:
    if config.loss.distill_from is None:
        return None
    from clipjax.checkpoints.saved import SavedCheckpoint

    return SavedCheckpoint(config.loss.distill_from).config
