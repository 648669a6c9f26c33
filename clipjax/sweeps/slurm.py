"""Trials of a sweep as an array job of Slurm: its script, its submission, and its state in the queue.

The script is written into the sweep's folder, so an installed clipjax needs no checkout beside it.
"""

import json
import pathlib
import shlex
import shutil
import subprocess
from collections.abc import Sequence

from clipjax.runtime.terminal import printable

SCRIPT = """#!/usr/bin/env bash
# Written by clipjax sweep --launcher=slurm: one trial per array index.
#SBATCH --job-name=clipjax-sweep
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
#SBATCH --open-mode=append
set -uo pipefail
# At a time limit Slurm signals this script first; the trial saves and leaves with 130, and the index is requeued.
# Cancelled indices no longer run by then, and preempted ones Slurm requeues itself.
trap 'kill -TERM "$pid" 2>/dev/null' TERM
{command} --trial="$SLURM_ARRAY_TASK_ID" &
pid=$!
wait "$pid"; code=$?
while kill -0 "$pid" 2>/dev/null; do wait "$pid"; code=$?; done
echo "trial $SLURM_ARRAY_TASK_ID left with exit code $code"
if [[ $code -eq 130 && $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) == RUNNING ]]; then
  scontrol requeue "$SLURM_JOB_ID"
  sleep 60  # Slurm ends this script
fi
exit "$code"
"""


def require_slurm() -> None:
    """Check that Slurm's commands are there.

    Raises:
        ValueError: they are not on this machine.
    """
    missing = [name for name in ("sbatch", "squeue", "scontrol") if shutil.which(name) is None]
    if missing:
        raise ValueError(
            f"--launcher=slurm needs Slurm's {', '.join(missing)}, not found in PATH; run it on a login node of the "
            "cluster, or give --launcher=local"
        )


def array_command(workdir: pathlib.Path, indices: Sequence[int], options: Sequence[str]) -> list[str]:
    """Return the sbatch command for the trials `indices`."""
    array = ",".join(map(str, indices))
    return [
        "sbatch",
        "--parsable",
        f"--array={array}",
        f"--output={workdir}/slurm-%A-%a.log",
        *options,
        str(workdir / "sweep.sbatch"),
    ]


def submit_array(
    workdir: pathlib.Path, indices: Sequence[int], *, command: Sequence[str], options: Sequence[str]
) -> str:
    """Submit trials and remember the job.

    Args:
        workdir: folder of the sweep; takes `sweep.sbatch` and `slurm.json`.
        indices: numbers of the trials to run.
        command: command that runs one trial when `--trial=INDEX` is appended.
        options: more options of sbatch.

    Returns:
        The job's number.

    Raises:
        ValueError: sbatch refused; the text is its own.
    """
    (workdir / "sweep.sbatch").write_text(SCRIPT.format(command=shlex.join(command)), encoding="utf-8")
    submit = array_command(workdir, indices, options)
    print(printable(f"+ {shlex.join(submit)}"), flush=True)
    done = subprocess.run(submit, capture_output=True, text=True)
    if done.returncode != 0:
        raise ValueError(f"sbatch refused: {done.stderr.strip()}; change --sbatch_options")
    job = done.stdout.strip().partition(";")[0]
    (workdir / "slurm.json").write_text(json.dumps({"job": job, "command": submit}) + "\n", encoding="utf-8")
    return job


def in_queue(workdir: pathlib.Path) -> str | None:
    """Return the number of the sweep's last job if any part of it waits or runs.

    Raises:
        ValueError: Slurm does not answer, so nobody knows.
    """
    try:
        job = json.loads((workdir / "slurm.json").read_text(encoding="utf-8"))["job"]
    except FileNotFoundError:
        return None
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{workdir / 'slurm.json'} is damaged ({error}); cancel its job and delete it") from error
    done = subprocess.run(["squeue", "--noheader", f"--jobs={job}", "--format=%i"], capture_output=True, text=True)
    if done.returncode != 0 and "Invalid job id" not in done.stderr:
        raise ValueError(f"squeue fails: {done.stderr.strip()}; try again once Slurm answers")
    return job if done.stdout.strip() else None
