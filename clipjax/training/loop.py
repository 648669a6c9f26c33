"""The loop: step after step; log, evaluate and save when due."""

from clipjax.config import steps_of, total_steps
from clipjax.data.training_stream import TooManyBadSamples
from clipjax.evals.runner import Evaluation
from clipjax.training.run import Run


def train(run: Run) -> int | None:
    """Train to the end, or to the first signal; return that signal's number, or None at the end.

    Raises:
        TooManyBadSamples: too much of the data is unusable; the state before is saved.
    """
    config, logger, state, start = run.config, run.logger, run.state, run.start
    last = total_steps(config)
    log_every = steps_of(config.log.every_examples, config)
    save_every = steps_of(config.checkpoint.every_examples, config)
    eval_every = last if config.eval.every_examples is None else steps_of(config.eval.every_examples, config)
    logger.message(f"step {start.step} of {last}, workdir {run.workdir}")
    evaluation: Evaluation | None = None
    if start.step and start.step % eval_every == 0 and not start.evaluated:  # a signal came in between
        evaluation = run.evaluate(state, start.step)
    for step in range(start.step + 1, last + 1):
        run.goodput.step(step)
        try:
            batch = run.next_batch()
        except TooManyBadSamples:
            run.save(state, step - 1)
            raise
        state, metrics = run.train_step(state, batch)
        run.follow(step, metrics)
        logger.flush()
        if step % log_every == 0 or step == last:
            logger.log_step(step, metrics, run.stream.wait_seconds)
        stop = run.signal.due(step) and step < last
        if step == last or (step % eval_every == 0 and not stop):
            evaluation = run.evaluate(state, step)
            run.save(state, step, evaluation)
        elif stop or step % save_every == 0:
            run.save(state, step)
        if stop:
            number = run.signal.number
            logger.message(f"stopped by signal {number} after step {step}; the same command goes on from here")
            return number
    run.finish(state, last, evaluation)
    return None
