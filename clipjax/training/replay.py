"""A logged step again, bit for bit, and what in it was not finite first: `clipjax train ... --replay=STEP`.

Nothing is logged or saved. The order in which a step computes is the order in which it is searched: parameters,
embeddings of each sample, gradients.
"""

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipjax.checkpoints import exchange
from clipjax.checkpoints.manager import Checkpoints
from clipjax.monitoring.writers import METRICS_FILE
from clipjax.pytrees import leaf_paths
from clipjax.runtime import sharding
from clipjax.training.decisions import Rollback
from clipjax.training.preflight import Checked
from clipjax.training.resume import start_state
from clipjax.training.session import Session, open_session
from clipjax.training.step import TrainState
from clipjax.training.stream import device_batch, open_stream
from clipjax.typing import Batch

_SHOWN = 8


def replay(checked: Checked, step: int, rollback: int | None = None, *, show: Callable[[str], None]) -> int | None:
    """Compute a step again from the nearest checkpoint before it, and show what is found.

    Args:
        checked: the run; nobody else may hold its workdir.
        step: to compute again.
        rollback: number of the rollback, from 1, before which the step was; None: the step as the run has it now.
        show: gets the findings, a line at a time; on process 0 they are complete.

    Returns:
        The number of the signal that has stopped it before the step; None if none has.

    Raises:
        ValueError: there is no such rollback, or the step lies behind it.
    """
    config, inputs = checked.config, checked.inputs
    with open_session(checked, record=False) as session:
        checkpoints = Checkpoints(checked.workdir, config.checkpoint, apart=checked.apart)
        decisions = session.decisions
        state, start = start_state(
            session.program,
            inputs,
            checkpoints,
            decisions,
            before=_first_changed(decisions.taken, step, rollback),
        )
        if rollback is not None:
            decisions.forget_from(rollback - 1)
        if start.step:
            show(f"from the checkpoint of step {start.step}: {step - start.step} steps")
        else:
            show(f"no checkpoint before step {step} is kept: from step 0, {step} steps")
        stream = open_stream(session, start.step)
        try:
            for current in range(start.step + 1, step):
                batch = device_batch(config, session.mesh, _read(session, stream, current))
                state, metrics = session.step(state, batch, session.teacher)
                jax.block_until_ready(metrics["loss"])
                if session.signal.due():
                    show(f"stopped by signal {session.signal.number} after step {current}; nothing of it is kept")
                    return session.signal.number
            host = _read(session, stream, step)
            batch = device_batch(config, session.mesh, host)
            with session.watchdog.paused("the search"):
                for line in _search(session, state, batch, host["index"]):
                    show(line)
            state, metrics = session.step(state, batch, session.teacher)
            show(_compare(step, jax.device_get(dict(metrics)), _logged(checked, step) if rollback is None else None))
        finally:
            stream.close()
    return None


def _read(session: Session, stream: Iterator[Mapping[str, np.ndarray]], step: int) -> Mapping[str, np.ndarray]:
    """Return this process's part of the batch of a step."""
    session.watchdog.beat(step)
    with session.watchdog.reading():
        return next(stream)


def _first_changed(taken: Sequence[Rollback], step: int, rollback: int | None) -> int:
    """Return the step before which a checkpoint must be.

    Raises:
        ValueError: there is no such rollback, or the step was not behind it.
    """
    if rollback is None:
        return step
    if not 1 <= rollback <= len(taken):
        raise ValueError(f"--rollback={rollback} must be one of the run's {len(taken)} rollbacks, counted from 1")
    decision = taken[rollback - 1]
    if not decision.to_step < step <= decision.last_step + 1:
        raise ValueError(
            f"--replay={step} with --rollback={rollback} must lie behind step {decision.to_step}, to which that "
            f"rollback went, and not behind {decision.last_step}, the last step of its trouble"
        )
    return min(step, *(each.to_step + 1 for each in taken[rollback - 1 :]))


def _logged(checked: Checked, step: int) -> Mapping[str, Any] | None:
    """Return the line of a step in the metrics, None if it was not logged."""
    try:
        lines = (checked.workdir / METRICS_FILE).read_bytes().splitlines()
    except OSError:
        return None
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):  # cut off by a kill
            values = json.loads(line)
            if isinstance(values, dict) and values.get("step") == step and "loss" in values:
                return values
    return None


def _compare(step: int, metrics: Mapping[str, Any], logged: Mapping[str, Any] | None) -> str:
    """Return the loss of a step, and whether it is that of the log."""
    loss = float(metrics["loss"])
    text = f"step {step}: loss {loss!r}"
    if int(metrics["skipped_in_a_row"]):
        text += ", the update is skipped"
    if not np.isfinite(float(metrics["param_norm"])):
        text += ", the norm of the parameters after it is not finite"
    if logged is None:
        return f"{text}; it was not logged, so there is nothing to compare"
    others = [
        name
        for name, value in metrics.items()
        if np.ndim(value) == 0 and name in logged and not _same(float(value), logged[name])
    ]
    if not others:
        return f"{text}; every number is bit for bit that of the log"
    return f"{text}; the log has others for {', '.join(others)} (loss {logged['loss']!r}): another mesh or version?"


def _same(value: float, logged: float | None) -> bool:
    return value == logged if np.isfinite(value) else logged is None


def _search(session: Session, state: TrainState, batch: Batch, index: np.ndarray) -> Iterator[str]:
    """Yield what is not finite, in the order in which the step computes; process 0 names the samples of all."""
    rows, leaves, grads = jax.device_get(_make_search(session)(state, batch, session.teacher))
    names = leaf_paths(state.params)
    yield _leaves("parameters", [name for name, finite in zip(names, leaves, strict=True) if not finite], len(names))
    own = _own_rows(len(rows["image"]))
    for side, finite in rows.items():
        bad = np.flatnonzero(~finite)
        if not len(bad):
            yield f"{side} embeddings: all {len(finite)} finite"
            continue
        source = session.checked.inputs.source
        here = [source.location(int(index[i - own.start])) for i in bad[:_SHOWN] if i in own]
        shown = list(itertools.chain.from_iterable(exchange.gather(f"replay/{side}", here)))
        more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        yield f"{side} embeddings: {len(bad)} of {len(finite)} not finite: {'; '.join(shown)}{more}"
    yield _leaves("gradients", [name for name, finite in zip(names, grads, strict=True) if not finite], len(names))


def _own_rows(count: int) -> range:
    """Return the rows of a global batch that this process has read."""
    share = count // jax.process_count()
    return range(jax.process_index() * share, (jax.process_index() + 1) * share)


def _leaves(what: str, bad: Sequence[str], count: int) -> str:
    if not bad:
        return f"{what}: all {count} leaves finite"
    more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
    return f"{what}: {len(bad)} of {count} leaves not finite: {', '.join(bad[:_SHOWN])}{more}"


def _make_search(session: Session) -> Any:
    """Return the jitted function that tells what is finite: rows of embeddings, parameters, gradients."""
    step = session.program.train_step

    def search(state: TrainState, batch: Batch, teacher: Any) -> tuple[Any, Any, Any]:
        batch = step.with_images(batch)
        key = jax.random.fold_in(state.key, state.step)
        encoded = step.gradients.encode(state.params, state.batch_stats or {}, batch, key)
        inputs = step.loss_inputs(state, batch, key, teacher)
        grads, _ = step.gradients(state.params, state.batch_stats or {}, batch, inputs, key)
        rows = {"image": _finite_rows(encoded.image_embed), "text": _finite_rows(encoded.text_embed)}
        return rows, _finite_leaves(state.params), _finite_leaves(grads)

    return jax.jit(search, out_shardings=sharding.replicated(session.mesh))


def _finite_rows(embed: jax.Array) -> jax.Array:
    return jnp.isfinite(embed).all(axis=tuple(range(1, embed.ndim)))


def _finite_leaves(tree: Any) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)])
