"""The loop: step after step; log, evaluate and save when due; after trouble back to a good checkpoint, and on."""

import jax

from clipjax.config import due_tasks, steps_of, total_steps
from clipjax.data.sample import UnreadableData
from clipjax.data.training_batches import NoUsableSample, TooManyBadSamples
from clipjax.evals.runner import Evaluation
from clipjax.runtime import processes
from clipjax.training.preflight import Checked
from clipjax.training.recovery import RollBack, RunStopped
from clipjax.training.run import Run, build
from clipjax.training.session import open_session
from clipjax.training.step import TrainState


def train(checked: Checked) -> int | None:
    """Train to the end, or to the first signal; return that signal's number, or None at the end.

    Raises:
        TooManyBadSamples: too much of the data is unusable; the state before is saved, if all processes find so.
        UnreadableData: the data has changed, or its storage does not give it; a process alone saves the state before.
        RunStopped: a person has to look at it: updates that are not finite, dead workers, differing replicas.
        SavesFail: the checkpoints cannot be written.
        DamagedCheckpoint: no checkpoint of the workdir can be restored.
        BrokenDevice: a device or link is missing or gives wrong results.
    """
    with open_session(checked) as session:
        while True:
            try:
                with build(session) as run:
                    return _train(run)
            except RollBack as back:
                processes.announce(f"rollback: {back}")


def _train(run: Run) -> int | None:
    """Train from the run's start; see `train`."""
    config, logger, state, start = run.config, run.logger, run.state, run.start
    last = total_steps(config)
    log_every = steps_of(config.log.every_examples, config)
    save_every = steps_of(config.checkpoint.every_examples, config)
    logger.message(f"step {start.step} of {last}, workdir {run.place}")
    evaluation: Evaluation | None = None
    if start.step and (due := due_tasks(config, start.step)) and not start.evaluated:  # a signal came in between
        evaluation = run.evaluate(state, start.step, due)
        run.add_evaluation(start.step, evaluation)
    for step in range(start.step + 1, last + 1):
        try:
            batch = run.next_batch(step)
        except (TooManyBadSamples, UnreadableData) as error:
            # Of the others, nobody would join in a save.
            here_alone = isinstance(error, NoUsableSample | UnreadableData) and jax.process_count() > 1
            if step > 1 and not here_alone:  # a step 0 would only keep a corrected config from starting
                _settle(run, state, step - 1)
                run.save(state, step - 1, last=True)
            raise
        state, metrics = run.train_step(state, batch)
        run.follow(step, state, metrics)
        logger.flush()
        if step % log_every == 0 or step == last:
            logger.log_step(step, metrics, run.stream.wait_seconds)
        stop = step < last and run.signal.due()
        due = due_tasks(config, step)
        evaluates = step == last or (bool(due) and not stop)
        saves = evaluates or stop or step % save_every == 0
        if saves:  # else a restart would never judge the updates before it
            _settle(run, state, step)
        if evaluates:
            evaluation = run.evaluate(state, step, due)
        if saves:
            run.save(state, step, evaluation if evaluates else None, last=stop)
        if stop:
            run.wait_for_saves()
            if run.signal.error is not None:
                raise RunStopped(run.signal.error)
            number = run.signal.number
            logger.message(f"stopped by signal {number} after step {step}; the same command goes on from here")
            return number
    run.finish(state, last, evaluation)
    return None


def _settle(run: Run, state: TrainState, step: int) -> None:
    """Judge all updates up to a step; where too much of the data is unusable, save the state before that is raised."""
    try:
        run.settle()
    except TooManyBadSamples:
        run.save(state, step, last=True)
        raise
