"""The training batches of a run: this process's part as its decisions have it, and the global batch on the devices."""

from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from clipjax.config import Config, LossKind, ResizeOn
from clipjax.data.tokenizers.protocol import TextToTokens
from clipjax.data.training_stream import TrainStream, pair_groups
from clipjax.runtime import processes, sharding
from clipjax.training.session import Session
from clipjax.typing import Patches

TAKEN = ("image", *Patches._fields, "tokens", "skip_reason")
"""Arrays of a batch that the step takes as they are, as far as there are any."""


def open_stream(
    session: Session,
    start_step: int,
    on_restart: Callable[[str], None] = processes.announce,
) -> TrainStream:
    """Open this process's training batches from a step on, as the decisions of the run have them."""
    config, inputs = session.checked.config, session.checked.inputs
    return TrainStream(
        inputs.source,
        tokenize=TextToTokens(inputs.tokenizer, config.model.text.context_length),
        config=config,
        order=inputs.order,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        start_step=start_step,
        left_out=session.decisions.left_out,
        stand_ins=session.decisions.stand_ins,
        keep_stand_ins=None if session.keeper is None else session.keeper.keep,
        on_restart=on_restart,
    )


def device_batch(config: Config, mesh: Mesh, batch: Mapping[str, np.ndarray]) -> Mapping[str, jax.Array]:
    """Return this process's part of a batch as global arrays, with what the config's loss needs besides."""
    group = pair_groups(batch, config.loss.same_pair)
    more = {} if group is None else {"group": group}
    if config.loss.kind is LossKind.GLOBAL:
        more["index"] = batch["index"].astype(np.int32)
    if config.data.resize_on is ResizeOn.DEVICE:
        more["crop"] = batch["crop"]
    return sharding.global_batch(mesh, {name: batch[name] for name in TAKEN if name in batch} | more)
