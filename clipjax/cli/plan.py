"""Tell what a run will need before it starts: `clipjax plan --config=FILE[:ARG] --topology=CHIP:SHAPE`.

The step is compiled for accelerators that are not here, exactly as `clipjax train` compiles it there.
"""

import json
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from clipjax.cli import arguments
from clipjax.cli.errors import refusals
from clipjax.config import AttentionMethod, Config
from clipjax.config.validation import validate
from clipjax.planning import targets

PROGRAM = "clipjax plan"
OPTIONS = {
    "topology": "CHIP:SHAPE, for example v5e:16x16, v5p:4x8x8, h100:32x8 (nodes x GPUs); here: this machine",
    "slices": "so many of these, with the data-center network between them (1)",
    "output": "file for the plan as JSON",
    "dump_hlo": "file for the text of the compiled step",
    "price": "per chip and hour, in any currency: adds the cost of the run",
    "num_samples": "size of the training source; only the memory of loss.kind=global depends on it (400000000)",
    "search": "try rematerialisation, microbatches, meshes and loss methods, and rank what fits (no)",
    "measure": "with --topology=here, run the step as well and print what it takes (no)",
}
SWITCHES = ("search", "measure")
HELP = f"""Tell what a run will need before it starts, by compiling its step for accelerators that are not here.

  {PROGRAM} --config=FILE[:ARG] --topology=CHIP:SHAPE [--slices=N] [--output=FILE] [--dump_hlo=FILE]
      [--price=P] [--search] [--config.FIELD=VALUE ...]

Exit code 0 if the run fits, 3 if it does not, 2 if something is refused.

"""


def main(argv: Sequence[str] | None = None) -> int:
    """The front door; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if arguments.wants_help(argv):
        print(HELP + "\n".join(f"  --{name:<12} {text}" for name, text in OPTIONS.items()))
        return 0
    argv = _switched(argv)
    given = [argument.partition("=")[2] for argument in argv if argument.lstrip("-").startswith("topology=")]
    targets.prepare_environment(given[-1] if given else "")
    with refusals(PROGRAM):
        work = prepare(argv)
    return work()


def _switched(argv: Sequence[str]) -> list[str]:
    """`--search` alone means `--search=yes`."""
    following = [*argv[1:], ""]
    return [
        f"{argument}=yes" if argument.lstrip("-") in SWITCHES and after not in ("yes", "no") else argument
        for argument, after in zip(argv, following, strict=True)
    ]


def prepare(argv: Sequence[str]) -> Callable[[], int]:
    """Everything that can be refused. Returns the planning itself.

    Raises:
        ValueError: for the user, with field, value, rule and remedy.
    """
    parsed = arguments.parse(PROGRAM, argv, options=OPTIONS)
    config, options = parsed.config, parsed.options
    topology = options["topology"]
    if not topology:
        raise ValueError("--topology=CHIP:SHAPE is missing, for example --topology=v5e:16x16")
    for name in SWITCHES:
        if options[name] not in (None, "yes", "no"):
            raise ValueError(f"--{name}={options[name]} must be yes or no")
    validate(config)
    for name in ("output", "dump_hlo"):
        if path := options[name]:
            _check_writable(name, pathlib.Path(path))
    price = None if options["price"] is None else _price(options["price"])
    num_samples, slices = _number(options, "num_samples", 400_000_000), _number(options, "slices", 1)
    if config.model.attention is AttentionMethod.CUDNN and topology != targets.HERE:
        raise ValueError(
            f"config.model.attention=cudnn cannot be compiled for --topology={topology}, which is not here: cuDNN has "
            "to run for it; plan with --config.model.attention=xla, whose memory is the same within 2 % "
            "(docs/planning.md), or on such a machine with --topology=here"
        )
    target = targets.find_target(topology, slices)
    if options["measure"] == "yes" and not target.is_here:
        raise ValueError("--measure=yes runs the step, and needs --topology=here")
    teacher = _teacher(config)
    if options["search"] == "yes":
        from clipjax.planning import search

        if options["measure"] == "yes" or options["dump_hlo"]:
            raise ValueError("--measure and --dump_hlo are of one plan; give them with what the search has found")
        tries = search.Search(
            config, target, num_samples=num_samples, teacher=teacher, price=price, output=options["output"]
        )
        return lambda: search.run_search(tries)
    targets.check_devices(config, target, teacher)
    return lambda: _plan(config, target, options, num_samples=num_samples, teacher=teacher, price=price)


def _plan(
    config: Config,
    target: targets.Target,
    options: Mapping[str, str | None],
    *,
    num_samples: int,
    teacher: Config | None,
    price: float | None,
) -> int:
    from clipjax.planning import report

    compiled = report.compile_step(config, target, num_samples=num_samples, teacher=teacher)
    plan = report.make_plan(config, target, compiled, price=price)
    if options["measure"] == "yes" and plan["fits"]:
        from clipjax.planning.measure import measure

        measured = measure(compiled, compiled.init_state)
        measured["mfu"] = plan["predicted_mfu"] * plan["predicted_step_seconds"] / measured["step_seconds"]
        plan["measured"] = measured
    print(report.describe(plan))
    for name, text in (("output", json.dumps(plan, indent=1) + "\n"), ("dump_hlo", compiled.text or compiled.refusal)):
        if path := options[name]:
            pathlib.Path(path).write_text(text, encoding="utf-8")
    return 0 if plan["fits"] else report.DOES_NOT_FIT


def _check_writable(name: str, path: pathlib.Path) -> None:
    """Before minutes of compilation."""
    if not path.parent.is_dir():
        raise ValueError(f"--{name}={path}: there is no folder {path.parent}; make it first")
    if path.is_dir():
        raise ValueError(f"--{name}={path} is a folder; name a file in it")
    existed = path.exists()
    with path.open("a"):
        pass
    if not existed:
        path.unlink()


def _teacher(config: Config) -> Config | None:
    if config.loss.distill_from is None:
        return None
    from clipjax.checkpoints.saved import SavedCheckpoint

    return SavedCheckpoint(config.loss.distill_from).config


def _number(options: Mapping[str, str | None], name: str, default: int) -> int:
    text: Any = options[name]
    if text is None:
        return default
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"--{name}={text} must be a whole number of at least 1")
    return int(text)


def _price(text: str) -> float:
    try:
        price = float(text)
    except ValueError:
        price = -1.0
    if not 0 <= price < 1e9:
        raise ValueError(f"--price={text} must be a number of at least 0, per chip and hour")
    return price
