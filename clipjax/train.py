"""Train a model: `clipjax train --config=FILE[:ARG] --workdir=DIR [--config.FIELD=VALUE ...]`.

Read `prepare` (all that can be refused before training), `train` (a line per noun), `_loop`. Running the same command
again goes on from the newest checkpoint.
"""

import collections
import functools
import pathlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax

from clipjax import distributed, flags, grads, optim, sharding
from clipjax.checkpoint import Checkpoints, check_resumable, make_records, saved_config
from clipjax.config import Config, steps_of, total_steps
from clipjax.data.pipeline import TrainStream
from clipjax.data.tokenizer import TextToTokens
from clipjax.evals.encoder import Encoder, make_encoder_factory
from clipjax.evals.runner import Results, run_tasks, write_results
from clipjax.inputs import Inputs, open_inputs
from clipjax.journal import Journal, results_table
from clipjax.losses import make_loss
from clipjax.models.clip import abstract_params, build_clip, make_encode
from clipjax.step import TrainState, TrainStep, eval_params, from_groups, make_init_state, make_train_step, to_groups
from clipjax.typing import Params
from clipjax.validation import validate, validate_devices

PROGRAM = "clipjax train"
OPTIONS = {"workdir": "where checkpoints, metrics.jsonl and results.json go; a run found there goes on"}
HELP = f"""Train a model, or go on with the run that the workdir holds.

  {PROGRAM} --config=FILE[:ARG] --workdir=DIR [--config.FIELD=VALUE ...]

SIGTERM and Ctrl-C save a checkpoint and leave (exit code 128 + signal); the same command then goes on from there.
The workdir gets metrics.jsonl, tensorboard/, checkpoints/ and, at the end, results.json.

Fields of the config with their defaults (the config file sets its own):
"""
STEPS_IN_FLIGHT = 2  # how far the host may run ahead of the devices


@dataclass(frozen=True)
class Run:
    """The parts of one run that its loop uses."""

    config: Config
    workdir: pathlib.Path
    inputs: Inputs
    put: Callable[[Any], Any]
    stream: TrainStream
    checkpoints: Checkpoints
    journal: Journal
    signal: distributed.ShutdownSignal
    train_step: TrainStep
    make_encoder: Callable[[Params], Encoder]


def main(argv: Sequence[str] | None = None) -> int:
    """The front door; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if flags.wants_help(argv):
        print(HELP + "\n".join(flags.describe_fields()))
        return 0
    return flags.front_door(PROGRAM, lambda: prepare(argv))


def prepare(argv: Sequence[str]) -> Callable[[], int]:
    """Everything that can be refused: arguments, config, files, workdir, mesh. Returns the training itself.

    Raises:
        ValueError: for the user, with field, value, rule and remedy.
    """
    arguments = flags.parse(PROGRAM, argv, options=OPTIONS)
    if not arguments.options["workdir"]:
        raise ValueError("--workdir=DIR is missing: checkpoints and metrics need a place, for example runs/first")
    config, workdir = arguments.config, pathlib.Path(arguments.options["workdir"])
    validate(config)
    flags.require_writable(workdir)
    distributed.start()  # before anything that reads a checkpoint, which asks JAX who the processes are
    previous = saved_config(workdir)
    if previous is not None:
        check_resumable(*previous, config)
    inputs = open_inputs(config)
    validate_devices(config, num_devices=jax.device_count(), num_processes=jax.process_count())
    return lambda: train(config, workdir, inputs)


def train(config: Config, workdir: pathlib.Path, inputs: Inputs) -> int:
    """Train to the end, or to the first signal; returns the exit code."""
    signal = distributed.ShutdownSignal()
    mesh = sharding.make_mesh(config.mesh)
    clip = build_clip(config.model)
    tx = optim.make_tx(config, abstract_params(config.model))
    loss = make_loss(kind=config.loss.kind, method=config.loss.method, mesh=mesh)
    grads_fn = functools.partial(grads.direct, make_encode(clip, config.data), loss)
    train_step = make_train_step(config, grads_fn, tx, optim.make_schedule(config))
    with jax.set_mesh(mesh):
        checkpoints = Checkpoints(workdir, config.checkpoint)
        state, start_step, counters = _start_state(
            config, inputs, checkpoints, make_init_state(config, clip.init, tx), mesh
        )
        journal = Journal(config, workdir, start_step=start_step, enabled=distributed.is_first())
        stream = TrainStream(
            inputs.source,
            tokenize=TextToTokens(inputs.tokenizer, config.model.text.context_length),
            config=config,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            start_step=start_step,
            counters=counters,
        )
        run = Run(
            config=config,
            workdir=workdir,
            inputs=inputs,
            put=functools.partial(sharding.global_batch, mesh),
            stream=stream,
            checkpoints=checkpoints,
            journal=journal,
            signal=signal,
            train_step=jax.jit(
                train_step, out_shardings=(sharding.of(state), sharding.replicated(mesh)), donate_argnums=0
            ),
            make_encoder=make_encoder_factory(config, clip, mesh, inputs.tokenizer),
        )
        try:
            return _loop(run, state, start_step)
        finally:
            stream.close()
            checkpoints.close()
            journal.close()
            signal.restore()


def _start_state(
    config: Config,
    inputs: Inputs,
    checkpoints: Checkpoints,
    init_state: Callable[[jax.Array], TrainState],
    mesh: jax.sharding.Mesh,
) -> tuple[TrainState, int, dict[str, Any] | None]:
    """The newest checkpoint's state, step and counters, or a fresh state; either way born on its shards."""

    def init() -> TrainState:
        return init_state(jax.random.key(config.seed))

    abstract = jax.eval_shape(init)
    shardings = sharding.state_shardings(mesh, abstract)
    placed = sharding.placed(abstract, shardings)
    latest = checkpoints.latest_step()
    if latest is not None:
        groups, records = checkpoints.restore(latest, to_groups(placed))
        return from_groups(groups), latest, records["data"]["counters"]
    state = jax.jit(init, out_shardings=shardings)()
    if inputs.initial is not None:
        params = inputs.initial.params(placed.params)
        ema = None if state.ema is None else jax.tree.map(jax.numpy.copy, params)
        state = replace(state, params=params, ema=ema)
    return state, 0, None


def _loop(run: Run, state: TrainState, start_step: int) -> int:
    """Step after step; log, evaluate and save when due; leave early on a signal."""
    config, journal = run.config, run.journal
    last = total_steps(config)
    log_every, save_every = (
        steps_of(config.log.every_examples, config),
        steps_of(config.checkpoint.every_examples, config),
    )
    eval_every = last if config.eval.every_examples is None else steps_of(config.eval.every_examples, config)
    journal.message(f"step {start_step} of {last}, workdir {run.workdir}")
    in_flight: collections.deque[jax.Array] = collections.deque()
    results: Results = {}
    for step in range(start_step + 1, last + 1):
        try:
            batch = next(run.stream)
        except ValueError as error:  # too many bad samples: not a defect, so no traceback
            flags.fail(PROGRAM, error)
            return 1
        state, metrics = run.train_step(state, run.put({"image": batch["image"], "tokens": batch["tokens"]}))
        in_flight.append(metrics["loss"])
        if len(in_flight) > STEPS_IN_FLIGHT:
            in_flight.popleft().block_until_ready()
        journal.flush()
        if step % log_every == 0 or step == last:
            journal.note(step, metrics, run.stream)
        stop = run.signal.due(step) and step < last
        evaluated = step == last or (step % eval_every == 0 and not stop)
        if evaluated:
            results = _evaluate(run, state, step)
        if stop or step == last or step % save_every == 0:
            _save(run, state, step, results if evaluated else {})
        if stop:
            journal.message(
                f"stopped by signal {run.signal.number} after step {step}; the same command goes on from here"
            )
            return run.signal.exit_code
    return _finish(run, state, last, results)


def _evaluate(run: Run, state: TrainState, step: int) -> Results:
    run.journal.flush()
    with run.journal.pause():
        results = run_tasks(run.inputs.tasks, run.make_encoder(eval_params(state)))
        if results:
            run.journal.results(step, results)
    return results


def _save(run: Run, state: TrainState, step: int, results: Results) -> None:
    """Save in the background; the log is complete up to this step before the checkpoint can be."""
    run.journal.flush()
    best_value = None
    if run.config.checkpoint.best_metric is not None and results:
        task, _, metric = run.config.checkpoint.best_metric.rpartition(":")
        best_value = results[task][metric]
    records = make_records(run.config, run.inputs.tokenizer, {"step": step, "counters": run.stream.counters()})
    with run.journal.pause():
        run.checkpoints.save(step, to_groups(state), records, best_value)


def _finish(run: Run, state: TrainState, last: int, results: Results) -> int:
    """Wait for the last checkpoint, then leave `results.json`, the sign of a finished run."""
    run.checkpoints.wait()
    path = run.workdir / "results.json"
    if not results and not path.exists():  # killed between the last checkpoint and here
        results = _evaluate(run, state, last)
    run.journal.flush()
    if distributed.is_first() and (results or not path.exists()):
        write_results(path, run.checkpoints.path(last), results)
    if results:
        run.journal.message(results_table(results))
    run.journal.message(
        f"done: {last} steps, {last * run.config.global_batch_size} examples; all of it is in {run.workdir}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
