"""Train the first steps of the quickstart with two revisions of the code and compare their metrics bit for bit.

    python -m benchmarks.same_loss main                # main against the working tree, uncommitted changes included
    python -m benchmarks.same_loss v0.1 main --data=data

A refactor has to give the same bits; this command proves it. It copies each revision into a temporary folder and runs
`python -m clipjax train --config=configs/quickstart.py` there. The process that trains prints where it imported
clipjax from, and a place outside that folder is an error. Then every metric of the first `--steps` lines of the two
`metrics.jsonl` is compared, except rates and times.

The run is the quickstart itself: `total_examples` stays as it is, so the schedule of the learning rate does too. The
command watches `metrics.jsonl` and stops the run once it has the lines. Only the interval of the log changes, to every
step, and TensorBoard is off; neither enters the compiled step. No task is evaluated, as that waits for the last step.

Bits on CPUs depend on the number of devices and threads and on XLA's flags, so these are fixed. Both runs read the same
prepared data, which the second revision makes first unless `--data` names the folder of an earlier `make quickstart`.

Exit code 0: equal; 1: they differ, or one of them could not be trained; 2: the arguments are refused. This file imports
nothing of clipjax, so it works for all revisions that have `python -m clipjax train`.
"""

import argparse
import io
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
WORKING_TREE = "the working tree"
TIMINGS = ("examples_per_second", "input_wait_fraction", "seconds_left", "mfu", "goodput", "wall_seconds")
"""Metrics that depend on the clock."""
SHOW_ORIGIN = (
    "import runpy, clipjax; print('clipjax is', clipjax.__file__, flush=True); "
    "runpy.run_module('clipjax', run_name='__main__', alter_sys=True)"
)
"""`python -m clipjax`, which first prints where the package lies."""
TIMEOUT_SECONDS = 1800


class Failure(Exception):
    """A revision that could not be run; `code` is the exit code of this command."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


def read_metrics(text: str, steps: int) -> list[dict[str, Any]]:
    """Return the lines of `metrics.jsonl` up to a step, without rates and times; a half-written line is left out."""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    kept = [line for line in lines if line["step"] <= steps]
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in kept]


def first_difference(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the first step and all metrics of it that differ in a bit, with both values; None if all are equal.

    Numbers are compared by their shortest decimal text, which tells any two apart, and -0.0 from 0.0.
    """
    for left, right in zip(ours, theirs, strict=False):
        if left["step"] != right["step"]:
            return f"a line of step {left['step']} stands against one of step {right['step']}"
        shown = [
            {name: json.dumps(value, sort_keys=True) for name, value in line.items()}
            for line in (dict(left), dict(right))
        ]
        differing = [
            f"  {name}: {shown[0].get(name, 'absent')} and {shown[1].get(name, 'absent')}"
            for name in dict.fromkeys([*shown[0], *shown[1]])
            if shown[0].get(name) != shown[1].get(name)
        ]
        if differing:
            return "\n".join([f"step {left['step']} is the first that differs:", *differing])
    if len(ours) != len(theirs):
        return f"there are {len(ours)} lines and {len(theirs)} lines"
    return None


def git(*arguments: str) -> bytes:
    """Return the output of git in this repository."""
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True).stdout


def find_commit(revision: str) -> str | None:
    """Return the commit of a revision, or None if there is no such revision."""
    try:
        return git("rev-parse", "--verify", "--quiet", "--end-of-options", revision + "^{commit}").decode().strip()
    except subprocess.CalledProcessError:
        return None


def extract(commit: str | None, folder: pathlib.Path) -> None:
    """Write the files of a commit into a new folder; None takes the working tree, without ignored files."""
    folder.mkdir()
    if commit is not None:
        with tarfile.open(fileobj=io.BytesIO(git("archive", commit))) as archive:
            archive.extractall(folder, filter="data")
        return
    for name in git("ls-files", "-z", "--cached", "--others", "--exclude-standard").decode().split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)


def environment(tree: pathlib.Path) -> dict[str, str]:
    """Return the variables of a run: this tree's code, and what bits on CPUs depend on."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_", "CLIPJAX_"))}
    return {
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # only faster
        **kept,
        "PYTHONPATH": str(tree),
        "JAX_PLATFORMS": "cpu",
        "NPROC": "2",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
    }


def prepare_data(tree: pathlib.Path, folder: pathlib.Path) -> None:
    """Make the quickstart's data and tokenizer, as `make quickstart` does.

    Raises:
        Failure: a command failed.
    """
    command = [sys.executable, "-m", "clipjax", "data"]
    model = f"--output={folder / 'scenes.model'}"
    for arguments in (
        ["scenes", f"--tfds_dir={folder}"],
        ["tokenizer", "--source=tfds:scenes/train", f"--tfds_dir={folder}", "--vocab_size=304", model],
    ):
        done = subprocess.run([*command, *arguments], cwd=tree, env=environment(tree), capture_output=True, text=True)
        if done.returncode:
            raise Failure(f"clipjax data {shlex.join(arguments)} failed:\n{done.stdout}{done.stderr}")


def train(tree: pathlib.Path, data: pathlib.Path, steps: int, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """Train with a tree's code until the log has the steps, and return their metrics.

    Raises:
        Failure: training ended before that, took too long, or ran other code than the tree's.
    """
    (tree / "data").symlink_to(data.absolute())  # where the quickstart looks for it
    workdir, output = tree.with_name(f"{tree.name}_run"), tree.with_name(f"{tree.name}.txt")
    options = ["--config=configs/quickstart.py", f"--workdir={workdir}"]
    options += ["--config.log.every_examples=1", "--config.log.tensorboard=False", *overrides]
    with output.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", SHOW_ORIGIN, "train", *options],
            cwd=tree,
            env=environment(tree),
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    metrics, deadline, lines = workdir / "metrics.jsonl", time.monotonic() + TIMEOUT_SECONDS, []
    try:
        while len(lines) < steps and time.monotonic() < deadline:
            ended = process.poll() is not None
            lines = read_metrics(metrics.read_text(), steps) if metrics.exists() else []
            if ended:
                break
            time.sleep(0.1)
    finally:
        process.kill()  # its workdir is thrown away
        process.wait()
    said = output.read_text(errors="replace")
    if f"clipjax is {tree / 'clipjax' / '__init__.py'}" not in said:
        raise Failure(f"clipjax was not imported from {tree}:\n{said[-2000:]}")
    if len(lines) < steps:
        code = 2 if process.returncode == 2 else 1
        raise Failure(f"training ended after {len(lines)} of {steps} steps:\n{said[-2000:]}", code)
    return lines


def compare(revisions: Mapping[str, str | None], arguments: argparse.Namespace) -> int:
    """Train with both revisions and print the verdict; return the exit code."""
    runs: list[list[dict[str, Any]]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name).resolve()
        trees = [folder / "first", folder / "second"]
        for tree, commit in zip(trees, revisions.values(), strict=True):
            extract(commit, tree)
        data = arguments.data or folder / "prepared"
        if arguments.data is None:
            began = time.monotonic()
            prepare_data(trees[1], data)
            print(f"data prepared in {time.monotonic() - began:.0f} s", flush=True)
        for tree, revision in zip(trees, revisions, strict=True):
            began = time.monotonic()
            try:
                runs.append(train(tree, data, arguments.steps, arguments.overrides))
            except Failure as failure:
                raise Failure(f"{revision}: {failure}", failure.code) from failure
            first, last = runs[-1][0]["loss"], runs[-1][-1]["loss"]
            seconds = time.monotonic() - began
            print(f"{revision}: {arguments.steps} steps in {seconds:.0f} s, loss {first!r} to {last!r}", flush=True)
    for line in (line for lines in runs for line in lines):
        for metric in arguments.ignore:
            line.pop(metric, None)
    difference = first_difference(*runs)
    both = " and ".join(revisions)
    if difference is not None:
        print(f"DIFFERENT: {both}: {difference}")
        return 1
    names = ", ".join(name for name in runs[0][0] if name != "step")
    print(f"EQUAL: {both} agree bit for bit in {arguments.steps} steps: {names}")
    return 0


def parse(argv: Sequence[str] | None) -> tuple[dict[str, str | None], argparse.Namespace]:
    """Return the commits by what to call them (None for the working tree), and the options; refuse with code 2."""
    parser = argparse.ArgumentParser(
        prog="same_loss", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("first", metavar="REV", help="a revision, as git calls it")
    parser.add_argument("second", metavar="REV2", nargs="?", help="another; the working tree if left out")
    parser.add_argument(
        "--ignore", type=lambda text: text.split(","), default=[], help="metrics that only one of them has, by commas"
    )
    parser.add_argument("--steps", type=int, default=50, help="how many steps to compare; 50 if left out")
    parser.add_argument("--data", type=pathlib.Path, help="a folder with the quickstart's data; made if left out")
    parser.add_argument(
        "--overrides",
        type=shlex.split,
        default=[],
        help="--overrides='--config.X=Y ...' for both runs of the quickstart",
    )
    arguments = parser.parse_args(argv)
    if arguments.steps < 1:
        parser.error(f"--steps={arguments.steps} must be at least 1")
    if arguments.data is not None and not (arguments.data / "scenes.model").is_file():
        parser.error(f"--data={arguments.data} has no scenes.model; name the folder that `make quickstart` filled")
    commits: list[tuple[str, str | None]] = []
    for revision in (arguments.first, arguments.second):
        commit = None if revision is None else find_commit(revision)
        if revision is not None and commit is None:
            parser.error(f"{revision!r} is no revision of this repository")
        commits.append((WORKING_TREE if commit is None else f"{revision} ({commit[:10]})", commit))
    if commits[0] == commits[1]:  # of a run against itself
        commits[1] = (f"{commits[1][0]} again", commits[1][1])
    return dict(commits), arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    revisions, arguments = parse(argv)
    try:
        return compare(revisions, arguments)
    except Failure as failure:
        print(f"same_loss: error: {failure}", file=sys.stderr)
        return failure.code


if __name__ == "__main__":
    sys.exit(main())
