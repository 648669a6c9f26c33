"""Storage that fails or is slow while a run trains, and then recovers: what the run does, and what it ends with.

`storage.c` is loaded before the C library of the training process, so that Python, TensorStore and Orbax meet the same
faults, as they would on a real disk. It needs a C compiler.
"""

import errno
import pathlib
import random
import shutil
import signal
import subprocess
from dataclasses import dataclass

from clipjax.checkpoints import manifest
from tests.faults.crash import UNDISTURBED, Outcome
from tests.faults.tiny_run import LAST_STEP, SAVE_EVERY, TinyRun, complete_steps, differences, ended, wait_until

SOURCE = pathlib.Path(__file__).with_name("storage.c")
FAULTS = {
    "disk full": ("write", errno.ENOSPC),
    "quota exceeded": ("write", errno.EDQUOT),
    "input/output error": ("write", errno.EIO),
    "input/output error of fsync": ("sync", errno.EIO),
    "read-only": ("open", errno.EROFS),
    "no permission": ("open", errno.EACCES),
    "no inode for a folder": ("mkdir", errno.ENOSPC),
    "a rename fails": ("rename", errno.EIO),
    "slow": ("slow", 20_000),  # bytes per second; a checkpoint has 170,000, so a save takes longer than its interval
}
HANGS = {"fsync hangs": ("sync", -1), "writes hang": ("write", -1), "a rename hangs": ("rename", -1)}
LOOK_AT_STORAGE = 3


@dataclass(frozen=True)
class BrokenStorage:
    """The faults of one folder, switched on and off while processes run.

    Attributes:
        folder: below which operations fail.
        home: of the library and its control file.
    """

    folder: pathlib.Path
    home: pathlib.Path

    @staticmethod
    def is_possible() -> bool:
        """True if this machine has a C compiler."""
        return shutil.which("cc") is not None

    def environment(self) -> dict[str, str]:
        """Return the variables of a process that shall meet the faults."""
        library = self.home / "storage.so"
        if not library.exists():
            command = ("cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE), "-ldl")
            subprocess.run(command, check=True)
        return {
            "LD_PRELOAD": str(library),
            "BROKEN_STORAGE_FOLDER": f"{self.folder}/",
            "BROKEN_STORAGE_CONTROL": str(self._control),
        }

    @property
    def _control(self) -> pathlib.Path:
        return self.home / "storage.control"

    def start(self, fault: str) -> None:
        """From now on one of `FAULTS` or `HANGS` happens."""
        call, value = (FAULTS | HANGS)[fault]
        temporary = self._control.with_suffix(".new")
        temporary.write_text(f"{call} {value}")
        temporary.rename(self._control)

    def end(self) -> None:
        """From now on nothing fails."""
        self._control.unlink(missing_ok=True)


def storage_run(run: TinyRun, name: str, *, seed: int, faults: tuple[str, ...]) -> Outcome:
    """Train in a workdir whose checkpoints or all of whose files are hit by faults; compare with the undisturbed run.

    Each fault lasts for some steps, or until the run gives up, and is then gone; a run that gave up is started again.
    """
    rng = random.Random(f"storage {seed}")
    outcome = Outcome()
    workdir = run.workdir(name)
    for fault in faults:
        everything = rng.random() < 0.5
        storage = BrokenStorage(workdir if everything else workdir / "checkpoints", run.folder)
        steps = rng.choice((SAVE_EVERY, 2 * SAVE_EVERY, 5 * SAVE_EVERY))  # one save or more
        what = f"{fault}, {'the workdir' if everything else 'checkpoints'}, for {steps} steps"
        outcome.kills.append(what)
        outcome.wrong += [f"{what}: {wrong}" for wrong in _break(run, name, storage, fault, steps, rng)]
        if run.logged_step(name) >= LAST_STEP:
            break
    run.finish(name)
    outcome.wrong += differences(run, name, UNDISTURBED)
    return outcome


def _break(run: TinyRun, name: str, storage: BrokenStorage, fault: str, steps: int, rng: random.Random) -> list[str]:
    """Start the run, let a fault happen for some steps, and return what was wrong."""
    wrong = []
    before = run.logged_step(name)
    told = len(run.output(name)) if before else 0
    process = run.start(name, environment=storage.environment())
    with ended(process):
        first = before + 1 + rng.randint(0, SAVE_EVERY)
        wait_until(lambda: run.logged_step(name) >= first, seconds=240, process=process)
        newest = max(complete_steps(run.workdir(name)), default=0)
        storage.start(fault)
        try:
            broken = run.logged_step(name)
            wait_until(lambda: run.logged_step(name) >= broken + steps, seconds=30, process=process)
        finally:
            storage.end()
        # It has given up, or it goes on; then it is stopped as a scheduler would, so that the next fault can come.
        if process.poll() is None and run.logged_step(name) < LAST_STEP - SAVE_EVERY:
            process.terminate()
        code = process.wait(240)
    # A signal that comes when the run has told its end, and its handlers are gone, is no fault of it.
    over = any(words in run.output(name)[told:] for words in ("saves in a row have failed", "done: "))
    allowed = (
        0,
        LOOK_AT_STORAGE,
        128 + signal.SIGTERM,
        *([-signal.SIGTERM] if over else []),
    )
    if code not in allowed:
        wrong.append(f"exit code {code}\n{run.output(name)[-2000:]}")
    if "Traceback" in run.output(name):
        wrong.append(f"a traceback\n{run.output(name)[-2000:]}")
    for path in run.workdir(name).glob("checkpoints/[0-9]*"):
        state = manifest.examine(path).state if path.name.isdigit() else manifest.State.VERIFIED
        if state is not manifest.State.VERIFIED:
            wrong.append(f"{path.name} is {state}")
    if max(complete_steps(run.workdir(name)), default=0) < newest:
        wrong.append(f"the checkpoint of step {newest} is gone, and none has taken its place")
    return wrong
