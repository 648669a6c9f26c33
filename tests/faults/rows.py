"""Each way to lose a run that clipjax guards against, tried once: what is done, and what is printed.

    python -m tests.faults.rows [ROW]

The table of `docs/reliability.md` shows the output. Rows make tiny runs in a temporary folder. An exit code or message
other than the promised one is told, and then the command leaves with 1.
"""

import contextlib
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

from tests.faults.checkpoint_damage import flip_bit, spoil
from tests.faults.signals import worker_pids
from tests.faults.tiny_run import TinyRun, ended, wait_until, write_pairs

SHORT = ("--config.total_examples=160",)
SAVES = ("--config.checkpoint.every_examples=80",)
WORKERS = ("--config.data.num_workers=2",)
REFUSED_WITHIN_SECONDS = 5.0
_SHOWN = ("error", "warning", "not saved", "worker", "signal", "stopped", "going on", "step 0 of", "done:", "rollback")


class Rows:
    """The rows, by the names of the methods.

    Args:
        run: files of a tiny run.
    """

    def __init__(self, run: TinyRun) -> None:
        self.run = run
        self._wrong: list[str] = []

    def outcome(self, name: str) -> list[str]:
        """Try a row; return what was not as promised."""
        self._wrong = []
        getattr(self, name)()
        return self._wrong

    def flipped_bit(self) -> None:
        """a bit flipped in the newest checkpoint's parameters and their average; evaluated, then gone on from."""
        self._train("flip", 0, "done: 20 steps", *SHORT)
        step = self.run.workdir("flip") / "checkpoints" / "20"
        for weights in ("params", "ema"):
            flip_bit(step / weights, random.Random(0))
        self._clipjax(3, "20 is damaged: ema/", "eval", f"--checkpoint={step}")
        (self.run.workdir("flip") / "results.json").unlink()
        self._train("flip", 0, "20 is damaged (", *SHORT)

    def learning_rate_1e30(self) -> None:
        """a learning rate of 1e30."""
        self._train(
            "blown", 3, "the parameters after step 2 were not finite", "--config.optim.learning_rate=1e30", *SHORT
        )

    def second_train(self) -> None:
        """a second `train` on a workdir."""
        first = self.run.start("twice")
        with ended(first):
            wait_until(lambda: self.run.logged_step("twice") > 1, seconds=240, process=first)
            start = time.monotonic()
            self._train("twice", 2, "another run holds it: process")
            took = time.monotonic() - start
            self._judge(took < REFUSED_WITHIN_SECONDS, f"refused after {took:.1f} s")
            print(f"  (after {took:.1f} s)")

    def checkpoints_gone(self) -> None:
        """the checkpoints deleted, then started again."""
        self._train("gone", 0, "done: 20 steps", *SHORT)
        shutil.rmtree(self.run.workdir("gone") / "checkpoints")
        self._train("gone", 2, "run.json records a checkpoint at step 20", *SHORT)

    def sigterm_with_workers(self) -> None:
        """SIGTERM to the training process and its loader workers."""
        process = self.run.start("stopped", *WORKERS)
        with ended(process):
            wait_until(lambda: self.run.logged_step("stopped") > 3, seconds=240, process=process)
            os.killpg(process.pid, signal.SIGTERM)
            code = process.wait(120)
        self._show(code, self.run.output("stopped"), 143, "stopped by signal 15 after step")

    def killed_worker(self) -> None:
        """kill -9 of a loader worker."""
        process = self.run.start("worker", *WORKERS, *SHORT)
        with ended(process):
            wait_until(lambda: self.run.logged_step("worker") > 3, seconds=240, process=process)
            os.kill(worker_pids(process.pid)[0], signal.SIGKILL)
            code = process.wait(240)
        self._show(code, self.run.output("worker"), 0, "a loader worker of process 0 died (signal 9)")

    def replaced_shard(self) -> None:
        """the shard replaced by another with as many samples, then the old one at another place."""
        self._train("data", 0, "done: 20 steps", *SHORT)
        (self.run.workdir("data") / "results.json").unlink()
        shutil.move(self.run.shard, self.run.folder / "data" / "moved.tar")
        write_pairs(self.run.shard, first=1000)
        self._train("data", 2, "other contents than the 64", *SHORT)
        self._train(
            "data", 0, "done: 20 steps", f"--config.data.train={self.run.folder / 'data' / 'moved.tar'}", *SHORT
        )
        shutil.move(self.run.folder / "data" / "moved.tar", self.run.shard)

    def port_in_use(self) -> None:
        """another program holds the coordinator's port."""
        with socket.socket() as holder:
            holder.bind(("127.0.0.1", 0))
            holder.listen()
            port = holder.getsockname()[1]
            place = (f"--coordinator=127.0.0.1:{port}", "--num_processes=2", "--process_id=0")
            self._train("port", 2, "another program uses this port", *place)

    def spoilt_checkpoint_evaluated(self) -> None:
        """a checkpoint whose embeddings are not finite, evaluated."""
        self._train("spoilt", 0, "done: 20 steps", *SHORT)
        step = self.run.workdir("spoilt") / "checkpoints" / "20"
        spoil(step)
        self._clipjax(3, "image embeddings are not finite", "eval", f"--checkpoint={step}")

    def disk_full(self) -> None:
        """checkpoints on a disk with room for one (needs root, for a small tmpfs)."""
        folder = self.run.workdir("full") / "checkpoints"
        folder.mkdir(parents=True)
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=640k", "tmpfs", folder], check=False).returncode:
            print("  NOT TRIED: no tmpfs can be mounted here")
            return
        with contextlib.ExitStack() as stack:
            stack.callback(subprocess.run, ["umount", "-l", folder], check=False)
            self._train("full", 3, "3 saves in a row have failed")
            complete = sorted(int(path.name) for path in folder.glob("[0-9]*") if path.name.isdigit())
            self._judge(complete == [10], f"complete: {complete}")
            print(f"  complete: {complete}")

    def _train(self, name: str, code: int, words: str, *options: str) -> None:
        before = len(self.run.output(name)) if (self.run.folder / f"{name}.out").exists() else 0
        process = self.run.start(name, *options)
        with ended(process):
            found = process.wait(300)
        self._show(found, self.run.output(name)[before:], code, words)

    def _clipjax(self, code: int, words: str, *arguments: str) -> None:
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(
            [sys.executable, "-m", "clipjax", *arguments], capture_output=True, text=True, env=environment, check=False
        )
        self._show(done.returncode, done.stdout + done.stderr, code, words)

    def _show(self, found: int, text: str, code: int, words: str) -> None:
        """Show what a command printed; judge its exit code, and whether the words are there and no traceback is."""
        for line in text.splitlines():
            if any(word in line for word in _SHOWN):
                print("  " + line.replace(str(self.run.folder), "DIR"))
        print(f"  exit code {found}")
        self._judge(found == code, f"exit code {found} in place of {code}: {text[-500:]}")
        self._judge(words in text, f"no {words!r} in {text[-500:]}")
        self._judge("Traceback" not in text, f"a traceback: {text[-1000:]}")

    def _judge(self, right: bool, otherwise: str) -> None:
        if not right:
            self._wrong.append(otherwise)


ROWS = tuple(name for name, value in vars(Rows).items() if not name.startswith("_") and name != "outcome")


def main() -> int:
    """Run the command."""
    chosen = sys.argv[1:] or ROWS
    if unknown := [name for name in chosen if name not in ROWS]:
        print(f"unknown: {', '.join(unknown)}; rows are {', '.join(ROWS)}", file=sys.stderr)
        return 2
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        run = TinyRun(pathlib.Path(folder), SAVES)
        run.write()
        rows = Rows(run)
        for name in chosen:
            print(f"{name}: {getattr(Rows, name).__doc__}", flush=True)
            wrong += [f"{name}: {each}" for each in rows.outcome(name)]
    for each in wrong:
        print(f"NOT AS PROMISED: {each}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
