"""Signals at random moments: to the process or its group, once or twice; loader workers that are killed, or hang."""

import os
import pathlib
import random
import signal
import subprocess
import time

from tests.faults.crash import UNDISTURBED, Outcome
from tests.faults.tiny_run import LAST_STEP, TinyRun, complete_steps, differences, ended, wait_until

PROMISED_SECONDS = 30.0
"""Time to save and leave at test size."""

STUCK_SECONDS = 8.0


def stop_run(run: TinyRun, name: str, *, seed: int, count: int, options: tuple[str, ...] = ()) -> Outcome:
    """Train in a workdir with so many SIGTERMs on the way, and compare the end with the undisturbed run."""
    rng = random.Random(f"stop {seed}")
    outcome = Outcome()
    for _ in range(count):
        process = run.start(name, *options)
        with ended(process):
            what = _stop(run, name, process, rng)
            start = time.monotonic()
            code = process.wait(120)
            seconds = time.monotonic() - start
        if code == 0:
            break
        outcome.kills.append(what)
        newest = max(complete_steps(run.workdir(name)), default=0)
        outcome.lost_steps.append(max(0, run.logged_step(name) - newest))
        if code not in (128 + signal.SIGTERM, -signal.SIGTERM) or (code < 0 and run.logged_step(name) > newest):
            outcome.wrong.append(f"{what}: exit code {code}\n{run.output(name)[-2000:]}")
        if code > 0 and outcome.lost_steps[-1]:
            outcome.wrong.append(f"{what}: stopped after step {run.logged_step(name)}, but saved {newest}")
        if seconds > PROMISED_SECONDS:
            outcome.wrong.append(f"{what}: left after {seconds:.1f} s")
    run.finish(name, *options)
    outcome.wrong += differences(run, name, UNDISTURBED)
    return outcome


def _stop(run: TinyRun, name: str, process: subprocess.Popen, rng: random.Random) -> str:
    """Send signals at a random moment; return what was sent."""
    before = run.logged_step(name)
    target = rng.randint(before, max(before, (before + LAST_STEP) // 2))
    wait_until(lambda: run.logged_step(name) > target, seconds=240, process=process)
    time.sleep(rng.uniform(0, 0.05))
    send = rng.choice((os.kill, os.killpg))
    times = rng.choice((1, 1, 2))
    for _ in range(times):
        if process.poll() is None:
            send(process.pid, signal.SIGTERM)
            time.sleep(rng.uniform(0, 0.02))
    return f"SIGTERM to the {'process' if send is os.kill else 'group'}, {times} x, after step {target}"


def kill_workers_run(run: TinyRun, name: str, *, seed: int, count: int, options: tuple[str, ...] = ()) -> Outcome:
    """Train while loader workers are killed, and compare the end with the undisturbed run."""
    rng = random.Random(f"workers {seed}")
    outcome = Outcome()
    process = run.start(name, *options)
    with ended(process):
        for _ in range(count):
            target = run.logged_step(name) + rng.randint(1, max(1, LAST_STEP // (2 * count)))
            if not wait_until(lambda target=target: run.logged_step(name) >= target, seconds=240, process=process):
                break
            workers = worker_pids(process.pid)
            if workers:
                os.kill(rng.choice(workers), signal.SIGKILL)
                outcome.kills.append(f"a loader worker after step {target}")
        code = process.wait(300)
    if code:
        outcome.wrong.append(f"exit code {code}\n{run.output(name)[-2000:]}")
        return outcome
    outcome.wrong += differences(run, name, UNDISTURBED)
    return outcome


def hang_workers_run(run: TinyRun, name: str, *, seed: int, count: int, options: tuple[str, ...] = ()) -> Outcome:
    """Train while all loader workers stop working again and again, and compare the end with the undisturbed run."""
    rng = random.Random(f"hang {seed}")
    outcome = Outcome()
    for number in range(1, count + 1):
        process = run.start(name, *options, f"--config.recovery.stuck_seconds={STUCK_SECONDS}")
        with ended(process):
            target = run.logged_step(name) + rng.randint(1, LAST_STEP // (2 * count))
            if not wait_until(lambda target=target: run.logged_step(name) >= target, seconds=240, process=process):
                break
            for pid in worker_pids(process.pid):
                os.kill(pid, signal.SIGSTOP)
            start = time.monotonic()
            code = process.wait(240)
            seconds = time.monotonic() - start
        outcome.kills.append(f"all loader workers hang after step {target}")
        newest = max(complete_steps(run.workdir(name)), default=0)
        outcome.lost_steps.append(max(0, run.logged_step(name) - newest))
        if code != 1 or run.output(name).count("is stuck after step") != number:
            outcome.wrong.append(f"exit code {code}\n{run.output(name)[-2000:]}")
        if seconds > STUCK_SECONDS + PROMISED_SECONDS:
            outcome.wrong.append(f"ended after {seconds:.1f} s")
    run.finish(name, *options)
    outcome.wrong += differences(run, name, UNDISTURBED)
    return outcome


def worker_pids(pid: int) -> list[int]:
    """Return the loader workers of a process: its children that multiprocessing has started."""
    found = []
    for place in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            parent = int(place.joinpath("stat").read_text().rpartition(")")[2].split()[1])
            command = place.joinpath("cmdline").read_bytes()
        except (OSError, ValueError, IndexError):
            continue
        if parent == pid and b"spawn_main" in command:
            found.append(int(place.name))
    return found
