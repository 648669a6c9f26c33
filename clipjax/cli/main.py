"""The console script: `clipjax COMMAND ...` runs the command that the first argument names."""

import difflib
import os
import signal
import sys
from collections.abc import Sequence

from clipjax import __version__
from clipjax.cli.output import close_output, show

HELP = f"""clipjax {__version__}: contrastive image-text pretraining in JAX

  clipjax train      train a model, or go on with a run
  clipjax eval       evaluate a checkpoint: zero-shot classification, retrieval
  clipjax plan       tell memory, time and cost of a run on accelerators that are not here
  clipjax sweep      train over a grid or random draws of config fields
  clipjax data       make the embedded dataset, train a tokenizer, look into a source
  clipjax suites     list and prepare the datasets of evaluation suites
  clipjax checkpoint verify the files of checkpoints
  clipjax presets    list the known models: parameters, FLOPs, source
  clipjax convert    open a peer's weights as a clipjax checkpoint
  clipjax export     write a checkpoint as a peer's own loader opens it
  clipjax classify   tell which of some labels fit pictures
  clipjax embed      write embeddings of a source, with a map, to search in
  clipjax search     find images or texts among embeddings, by a text or a picture
  clipjax rank       order pictures by a prompt

`clipjax COMMAND --help` tells more. Start with:

  clipjax data scenes
  clipjax train --config=configs/quickstart.py --workdir=runs/quickstart
"""


COMMANDS = (
    "train",
    "eval",
    "plan",
    "sweep",
    "data",
    "suites",
    "checkpoint",
    "presets",
    "convert",
    "export",
    "classify",
    "embed",
    "search",
    "rank",
)
LARGE_PAGES = "glibc.malloc.hugetlb=1"


def console() -> int:
    """The console script. On Linux it starts itself again once, with large pages for the heap.

    Only the environment of a process can ask glibc for them. On CPUs they halve the time of a training step, as XLA
    takes and touches fresh memory in every step. `GLIBC_TUNABLES` that is set already stays as it is.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        environment = {**os.environ, "GLIBC_TUNABLES": LARGE_PAGES}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
    return main()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names; return the exit code.

    Where nobody reads the standard output any more (`| head`), a command ends quietly, as others do.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _run(argv[0], argv[1:]) if argv else _run("--help", [])
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        close_output()
        return 128 + signal.SIGPIPE


def _run(command: str, rest: list[str]) -> int:
    match command:
        case "train":
            return _train(rest)
        case "eval":
            from clipjax.cli.eval import main as run
        case "plan":
            from clipjax.cli.plan import main as run
        case "sweep":
            from clipjax.cli.sweep import main as run
        case "data":
            from clipjax.cli.data import main as run
        case "suites":
            from clipjax.cli.suites import main as run
        case "checkpoint":
            from clipjax.cli.checkpoint import main as run
        case "presets":
            from clipjax.cli.presets import main as run
        case "convert":
            from clipjax.cli.convert import main_convert as run
        case "export":
            from clipjax.cli.convert import main_export as run
        case "classify":
            from clipjax.cli.classify import main as run
        case "embed":
            from clipjax.cli.embed import main as run
        case "search":
            from clipjax.cli.search import main as run
        case "rank":
            from clipjax.cli.rank import main as run
        case "--version":
            print(__version__)
            return 0
        case "-h" | "--help" | "help":
            show(HELP)
            return 0
        case _:
            close = difflib.get_close_matches(command, COMMANDS, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            known = ", ".join(COMMANDS)
            print(f"clipjax: error: unknown command {command!r}; known: {known}{hint}", file=sys.stderr)
            return 2
    return run(rest)


def _train(rest: list[str]) -> int:
    """Train; signals are answered from here on, as importing JAX takes seconds."""
    from clipjax.runtime import start_signals

    with start_signals.session():
        _refuse_held_workdir(rest)
        from clipjax.cli.train import console

        return console(rest)


def _refuse_held_workdir(rest: list[str]) -> None:
    """Refuse a workdir that another run holds, before the seconds that importing JAX takes; preflight asks again.

    Only a process that is alone may leave so early: the others of a run would wait for it, and process 0 of its own run
    may hold the workdir already.
    """
    from importlib.util import find_spec

    from clipjax.cli.arguments import launch_options, option_value, path, wants_help
    from clipjax.cli.errors import refusals
    from clipjax.runtime import launchers, owner

    workdir = option_value(rest, "workdir")
    try:
        off_tpu = find_spec("libtpu") is None or os.environ.get("JAX_PLATFORMS") == "cpu"
        is_alone = off_tpu and launchers.find_launch(launch_options(rest)) is None
        held = path(workdir) if workdir and is_alone and not wants_help(rest) else None
    except Exception:  # the command's own parser tells what is wrong
        return
    if held is not None:
        with refusals("clipjax train"):
            owner.refuse_held(held)
