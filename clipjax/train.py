"""Train a model: `clipjax train --config=FILE[:ARG] --workdir=DIR [--config.FIELD=VALUE ...]`.

Read `prepare` (all that can be refused before training), `train` (a line per noun), `_loop`. Running the same command
again goes on from the newest checkpoint.
"""

import contextlib
import functools
import pathlib
import sys
from collections.abc import Callable, Sequence

import jax
import optax

from clipjax import distributed, flags, launchers, rank_log, sharding
from clipjax.checkpoint import Checkpoints
from clipjax.config import Config, steps_of, total_steps
from clipjax.data.pipeline import BadSampleLimit, TooManyBadSamples, TrainStream
from clipjax.data.tokenizer import TextToTokens
from clipjax.evals.encoder import make_encoder_factory
from clipjax.evals.runner import Results
from clipjax.inference import load_params
from clipjax.inputs import Inputs
from clipjax.journal import Journal
from clipjax.losses import describe_loss
from clipjax.opening import open_run
from clipjax.program import build_program
from clipjax.resume import Position, start_state
from clipjax.run import Run
from clipjax.step import TrainState
from clipjax.stragglers import rank_times

PROGRAM = "clipjax train"
OPTIONS = {
    "workdir": "where checkpoints, metrics.jsonl and results.json go; a run found there goes on",
    **launchers.OPTIONS,
}
HELP = f"""Train a model, or go on with the run that the workdir holds.

  {PROGRAM} --config=FILE[:ARG] --workdir=DIR [--config.FIELD=VALUE ...]
      [--coordinator=HOST:PORT --num_processes=N --process_id=I]

SIGTERM and Ctrl-C save a checkpoint and leave (exit code 128 + signal); the same command then goes on from there.
Exit code 2: arguments, config or files are refused; 3: a checkpoint or too much of the data is unusable; 1: a defect.
The workdir gets metrics.jsonl, tensorboard/, checkpoints/, run.json, logs/ and, at the end, results.json.
Several processes find each other by themselves under Slurm, Open MPI and on TPU pods, else by the last three options.

Fields of the config with their defaults (the config file sets its own):
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The front door; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if flags.wants_help(argv):
        print(HELP + "\n".join(flags.describe_fields()))
        return 0
    with distributed.no_survivors(), rank_log.session():
        return flags.front_door(PROGRAM, lambda: prepare(argv))


def prepare(argv: Sequence[str]) -> Callable[[], int]:
    """Everything that can be refused, on all processes together. Returns the training itself.

    Raises:
        ValueError: for the user, with field, value, rule and remedy.
    """
    distributed.start(flags.option_values(argv, launchers.OPTIONS))
    opened = open_run(lambda: flags.parse(PROGRAM, argv, options=OPTIONS))
    return lambda: train(opened.config, opened.workdir, opened.inputs, opened.tx)


def train(config: Config, workdir: pathlib.Path, inputs: Inputs, tx: optax.GradientTransformation) -> int:
    """Train to the end, or to the first signal; returns the exit code."""
    mesh = sharding.make_mesh(config.mesh)
    taught = None if inputs.teacher is None else inputs.teacher.config
    program = build_program(config, mesh, num_samples=len(inputs.source), tx=tx, teacher=taught)
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        signal = distributed.ShutdownSignal()
        stack.callback(signal.restore)
        checkpoints = Checkpoints(workdir, config.checkpoint)
        stack.callback(checkpoints.close)
        try:
            state, start = start_state(config, inputs, checkpoints, program.init_state, mesh)
            teacher = None if inputs.teacher is None else load_params(inputs.teacher, mesh)
        except ValueError as error:  # a damaged checkpoint: not a defect, so no traceback
            flags.fail(PROGRAM, error)
            return distributed.abandon(flags.UNUSABLE_DATA)
        journal = Journal(config, workdir, start_step=start.step, times=rank_times())
        stack.callback(journal.close)
        journal.message(describe_loss(config, mesh))
        stream = TrainStream(
            inputs.source,
            tokenize=TextToTokens(inputs.tokenizer, config.model.text.context_length),
            config=config,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            start_step=start.step,
        )
        stack.callback(stream.close)
        update = program.jit(state)
        run = Run(
            config=config,
            workdir=workdir,
            inputs=inputs,
            put=functools.partial(sharding.global_batch, mesh),
            stream=stream,
            limit=BadSampleLimit(
                config,
                num_samples=len(inputs.source),
                start_step=start.step,
                skipped=jax.device_get(state.samples_skipped).tolist(),
            ),
            checkpoints=checkpoints,
            journal=journal,
            signal=signal,
            train_step=lambda state, batch: update(state, batch, teacher),
            make_encoder=make_encoder_factory(config, program.clip, mesh, inputs.tokenizer),
        )
        return _loop(run, state, start)


def _loop(run: Run, state: TrainState, start: Position) -> int:
    """Step after step; log, evaluate and save when due; leave early on a signal or if too much data is unusable."""
    config, journal = run.config, run.journal
    last = total_steps(config)
    log_every = steps_of(config.log.every_examples, config)
    save_every = steps_of(config.checkpoint.every_examples, config)
    eval_every = last if config.eval.every_examples is None else steps_of(config.eval.every_examples, config)
    journal.message(f"step {start.step} of {last}, workdir {run.workdir}")
    results: Results | None = None
    if start.step and start.step % eval_every == 0 and not start.evaluated:  # a signal came in between
        results = run.evaluate(state, start.step)
    for step in range(start.step + 1, last + 1):
        try:
            batch = run.next_batch()
        except TooManyBadSamples as error:
            run.save(state, step - 1)
            flags.fail(PROGRAM, error)
            return flags.UNUSABLE_DATA
        state, metrics = run.train_step(state, batch)
        run.follow(step, metrics)
        journal.flush()
        if step % log_every == 0 or step == last:
            journal.note(step, metrics, run.stream.wait_seconds)
        stop = run.signal.due(step) and step < last
        if step == last or (step % eval_every == 0 and not stop):
            results = run.evaluate(state, step)
            run.save(state, step, results)
        elif stop or step % save_every == 0:
            run.save(state, step)
        if stop:
            number = run.signal.number
            journal.message(f"stopped by signal {number} after step {step}; the same command goes on from here")
            return run.signal.exit_code
    run.finish(state, last, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
