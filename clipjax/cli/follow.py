"""Evaluate each checkpoint of a run beside it: `clipjax eval --follow=WORKDIR --output=FILE.jsonl`.

Reading order: `main`, `Follower.run`, `_take`, `_evaluate`; `Lines` is the file of the results.
"""

import collections
import json
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from clipjax.checkpoints.manifest import UndecidedCheckpoint, UnusableCheckpoint
from clipjax.checkpoints.records import FOLDER
from clipjax.checkpoints.saved import SavedCheckpoint, load_params
from clipjax.checkpoints.watching import complete_steps, drop_copy, step_place
from clipjax.cli import arguments, suites
from clipjax.cli.errors import SIGNAL, UNUSABLE_DATA, print_error, refusals
from clipjax.cli.eval import PROGRAM, Opened, OpenedCheckpoint, open_one, run_with
from clipjax.cli.eval_fields import NOT_OPENED, base_config, refuse_unread
from clipjax.cli.overrides import changes, override
from clipjax.config import Config, total_steps
from clipjax.evals.encoder import Encoder
from clipjax.evals.runner import Evaluation
from clipjax.models.clip import Clip, build_clip
from clipjax.monitoring.run_logger import results_table
from clipjax.runtime import launchers, processes, sharding, storage
from clipjax.runtime.terminal import printable

POLL_SECONDS = 10.0
"""Wait between looks at the workdir: little beside the minutes between checkpoints, and few requests to a store."""

TRIES = 3
"""Looks at a checkpoint that its storage does not give, before it is passed over."""

_MAX_BYTES = 2**28
_EXCLUDED = ("checkpoint", "ensemble", "report", "csv")
_SIGINT = 2


class Lines:
    """The lines of `--output`, one for each checkpoint that was evaluated: what is there is not done again.

    The file is written anew with each line, so that it is whole at any time, also on an object store.

    Args:
        place: path or address of the file.

    Attributes:
        lines: JSON objects with `step`, `key`, `checkpoint`, `tasks`, and `failed` and `shifts` where there are any.

    Raises:
        ValueError: the file holds something else.
        OSError: it cannot be read.
    """

    def __init__(self, place: pathlib.Path | str) -> None:
        self._place, self._text = place, _read(place)
        self.lines: list[dict[str, Any]] = []
        for number, text in enumerate(self._text.splitlines(), 1):
            try:
                line = json.loads(text)
                is_ours = isinstance(line["tasks"], dict) and isinstance(line["key"], str) and type(line["step"]) is int
            except (ValueError, LookupError, TypeError, RecursionError):
                is_ours = False
            if not is_ours:
                raise ValueError(
                    f"--output={place}: line {number} is not one of --follow's; name a new file, or the one of an "
                    "earlier start"
                )
            self.lines.append(line)

    def has(self, step: int, key: str) -> bool:
        """Return True if there is a line of this step, and of all that its results depend on."""
        return any(line["step"] == step and line["key"] == key for line in self.lines)

    def add(self, line: Mapping[str, Any]) -> None:
        """Add a line.

        Raises:
            ValueError: another program has written to the file since.
            OSError: the file cannot be written.
        """
        if _read(self._place) != self._text:
            raise ValueError(
                f"--output={self._place} was changed by another program meanwhile; give each follower a file of its own"
            )
        text = f"{self._text}{json.dumps(line, allow_nan=False)}\n"
        storage.write(self._place, text)
        self._text = text
        self.lines.append(dict(line))


def _read(place: pathlib.Path | str) -> str:
    try:
        text = storage.read_small(place, _MAX_BYTES).decode()
    except FileNotFoundError:
        return ""
    except UnicodeDecodeError as error:
        raise ValueError(f"--output={place} is no file of --follow's; name a new file") from error
    return text if text.endswith("\n") or not text else f"{text}\n"


def main(argv: Sequence[str], parser: arguments.Parser) -> int:
    """Evaluate the checkpoints of a run until the last one, and return the exit code.

    Args:
        argv: the command line of `clipjax eval`.
        parser: of it.
    """
    with processes.abort_on_error(), refusals(PROGRAM):
        launch = launchers.find_launch(arguments.launch_options(argv))
        _refuse_several(1 if launch is None else launch.num_processes or 1)
        parsed = parser.read(argv)
        workdir, output = check_options(parsed)
        lines = Lines(output)
        storage.require_writable(output, "--output", makes_folder=True)
        complete_steps(workdir)  # tells of a place that is no workdir, or of a store that cannot be used
        processes.start(arguments.launch_options(argv))
        _refuse_several(jax.process_count())
    print(processes.describe_devices(), flush=True)
    try:
        return Follower(parsed, workdir, output, lines).run()
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", flush=True)
        return SIGNAL + _SIGINT


def _refuse_several(count: int) -> None:
    if count > 1:
        raise ValueError(f"--follow runs as one process, and {count} were started; start one, with its devices")


def check_options(parsed: arguments.Arguments) -> tuple[pathlib.Path | str, pathlib.Path | str]:
    """Return the workdir and the file of the results.

    Raises:
        ValueError: an option would be ignored or is missing, or the file lies in the workdir.
    """
    options = parsed.options
    refuse_unread(parsed.overrides)
    for name in _EXCLUDED:
        if getattr(options, name) is not None:
            raise ValueError(f"--{name} would be ignored beside --follow, which writes --output alone; leave one out")
    workdir, output = options.follow, options.output
    if isinstance(workdir, pathlib.Path):
        workdir = workdir.parent if workdir.name == FOLDER else workdir
    else:
        workdir = workdir.removesuffix(f"/{FOLDER}")
    if output is None:
        raise ValueError("--output=FILE.jsonl is missing: --follow adds a line to it for each checkpoint")
    if isinstance(output, pathlib.Path) and isinstance(workdir, pathlib.Path):
        is_inside = output.resolve().is_relative_to(workdir.resolve())
    else:
        is_inside = str(output).startswith(f"{workdir}/")
    if is_inside:
        raise ValueError(f"--output={output} lies in the workdir, where only the run writes; name a file outside of it")
    return workdir, output


class Follower:
    """An evaluation of each checkpoint of a run, oldest first, until that of the run's last step.

    Devices, the model and its compiled programs stay from one checkpoint to the next, as long as its config does.

    Args:
        parsed: the command line.
        workdir: of the run; it may not be there yet.
        output: file of the results.
        lines: of that file.
    """

    def __init__(
        self, parsed: arguments.Arguments, workdir: pathlib.Path | str, output: pathlib.Path | str, lines: Lines
    ) -> None:
        self._parsed, self._workdir, self._output, self._lines = parsed, workdir, output, lines
        self._seen: set[tuple[int, str]] = set()
        self._tries = collections.Counter[tuple[int, str]]()
        self._end: int | None = None  # the run's last step, as the newest config that was read tells
        self._is_bad = False
        self._said = ""
        self._changed: list[str] = []
        self._mesh: tuple[Any, Mesh] | None = None
        self._clip: tuple[Any, Clip] | None = None

    def run(self) -> int:
        """Go on until the run has ended and all its checkpoints are done; return the exit code.

        Raises:
            SystemExit: the first checkpoint shows that the command line or the data is wrong; or the results cannot be
                written.
        """
        while True:
            found = self._list()
            waiting = [each for each in found.items() if each not in self._seen]
            if not waiting and found and self._end is not None and (newest := max(found)) >= self._end:
                print(f"the run has ended at step {newest}; results: {printable(str(self._output))}", flush=True)
                is_bad = self._is_bad or any("failed" in line for line in self._lines.lines)
                return UNUSABLE_DATA if is_bad else 0
            if waiting and self._take(*waiting[0]):
                continue
            if not waiting:
                after = f"after step {max(found)}" if found else "at all so far"
                self._say(f"waiting: {self._workdir} has no checkpoint {after}")
            time.sleep(POLL_SECONDS)

    def _list(self) -> dict[int, str]:
        """Return the complete steps; where the storage does not tell, none for now."""
        try:
            return complete_steps(self._workdir)
        except OSError as error:
            self._say(f"waiting: {self._workdir} cannot be listed: {error}")
            return {}

    def _say(self, text: str) -> None:
        """Show a line, unless it was the last one."""
        if text != self._said:
            print(printable(text), flush=True)
        self._said = text

    def _take(self, step: int, version: str) -> bool:
        """Evaluate a checkpoint; return False if its storage does not give it for now."""
        done, place = (step, version), step_place(self._workdir, step)
        try:
            line = self._evaluate(step, place)
        except Exception as error:  # whatever reading a checkpoint raises while its files vanish
            if (reason := self._absence(step, version)) is not None:
                self._say(f"step {step} is passed over: {reason}")
            elif isinstance(error, OSError | UndecidedCheckpoint) and self._tries[done] < TRIES - 1:
                self._tries[done] += 1
                self._say(f"waiting: step {step}: {error}")
                return False
            elif not isinstance(error, ValueError | OSError):
                raise
            elif self._lines.lines or isinstance(error, UnusableCheckpoint | OSError):
                print_error(PROGRAM, ValueError(f"step {step} is passed over: {error}"))
                self._is_bad = True
            else:  # before there is any result: the command line or the data is wrong
                with refusals(PROGRAM):
                    raise
        else:
            if line is not None:
                self._keep(line)
        self._seen.add(done)
        try:
            drop_copy(place)
        except (OSError, ValueError) as error:
            self._say(f"the local copy of step {step} stays: {error}")
        return True

    def _absence(self, step: int, version: str) -> str | None:
        """Return why a checkpoint is not what it was, None if it is."""
        try:
            found = complete_steps(self._workdir)
        except OSError:
            return None
        if step not in found:
            return "the run has deleted it meanwhile"
        return None if found[step] == version else "the run has written it anew meanwhile"

    def _evaluate(self, step: int, place: pathlib.Path | str) -> Callable[[], None] | None:
        """Evaluate a checkpoint; return what keeps the results, None if they are there already."""
        saved = SavedCheckpoint(place)
        self._end = total_steps(saved.config)
        one = self._open(saved, place)
        if self._lines.has(step, one.key):
            self._say(f"step {step}: done before, and not again")
            return None
        mesh = self._mesh_of(one.config)
        with jax.set_mesh(mesh):
            encoder = Encoder(one.config, self._clip_of(one.config), mesh, one.tokenizer, load_params(saved, mesh))
            opened = Opened([one], self._output)
            outcome = run_with(opened, one.tasks, encoder, saved.place, one.title, one.key, "")
        line = _to_line(step, one, outcome.evaluation)

        def keep() -> None:
            self._lines.add(line)
            if outcome.progress is not None:
                outcome.progress.finish()
            self._show(outcome.title, outcome.evaluation)

        return keep

    def _open(self, saved: SavedCheckpoint, place: pathlib.Path | str) -> OpenedCheckpoint:
        """Open a checkpoint with the tasks of its own config, and tell what is changed in it if that is news."""
        parsed = self._parsed
        base = base_config(saved.config, parsed.options.tasks_from)
        left_out = suites.set_tasks(base, parsed.options, parsed.overrides, not_opened=NOT_OPENED)
        config = override(base, parsed.overrides)
        changed = [*(f"--config.{each}" for each in changes(base, config, parsed.overrides)), *left_out]
        one, _ = open_one(parsed, saved, place, config)
        if changed != self._changed:
            print("\n".join(map(printable, changed)), flush=True)
            self._changed = changed
        return one

    def _keep(self, keep: Callable[[], None]) -> None:
        """Write a line; without it nothing would be won by going on.

        Raises:
            SystemExit: it cannot be written.
        """
        try:
            keep()
        except (OSError, ValueError) as error:
            print_error(PROGRAM, error)
            raise SystemExit(UNUSABLE_DATA) from error

    def _show(self, title: str, evaluation: Evaluation) -> None:
        self._say(title)
        if evaluation.results:
            print(results_table(evaluation.results), flush=True)
        for name, reason in evaluation.failures.items():
            print_error(PROGRAM, ValueError(f"eval.tasks.{name}: {reason}"))

    def _mesh_of(self, config: Config) -> Mesh:
        if self._mesh is None or self._mesh[0] != config.mesh:
            self._mesh = config.mesh, sharding.make_mesh(config.mesh)
        return self._mesh[1]

    def _clip_of(self, config: Config) -> Clip:
        """Return the model, the same object as before if its config is equal: encoders of one share its programs."""
        about = config.model, config.data
        if self._clip is None or self._clip[0] != about:
            self._clip = about, build_clip(config.model, data=config.data)
        return self._clip[1]


def _to_line(step: int, one: OpenedCheckpoint, evaluation: Evaluation) -> dict[str, Any]:
    line = {"step": step, "key": one.key, "checkpoint": one.saved.place, "tasks": evaluation.results}
    more = {"failed": evaluation.failures, "shifts": evaluation.shifts}
    return {**line, **{name: value for name, value in more.items() if value}}
