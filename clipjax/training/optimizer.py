"""The optimizer: schedule, masks for weight decay and freezing, and the optax chain.

The path of a parameter decides whether it is decayed or frozen, never the model.
"""

from typing import Any

import jax
import optax

from clipjax.config import Config, OptimConfig, steps_of, total_steps
from clipjax.pytrees import leaf_paths, map_with_path, match_any
from clipjax.typing import Params

DECAYED = ("kernel", "token_embed", "pos_embed", "registers", "probe", "queries")
"""Last names of the parameters that decay: those with two or more dimensions, as in open_clip (no gain or bias)."""


def make_schedule(config: Config) -> optax.Schedule:
    """Return the learning rate by step: linear over `warmup_examples`, then half a cosine down to the final rate."""
    warmup, steps = steps_of(config.warmup_examples, config), total_steps(config)
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else config.optim.learning_rate,
        peak_value=config.optim.learning_rate,
        warmup_steps=warmup,
        decay_steps=max(steps, warmup + 1),
        end_value=config.optim.final_learning_rate,
    )


def decay_mask(params: Params) -> Any:
    """Return True for every parameter to which weight decay applies."""
    return map_with_path(lambda name, _: name.rpartition("/")[2] in DECAYED, params)


def frozen_labels(optim: OptimConfig, params: Params) -> Any:
    """Return "frozen" or "trained" for every parameter.

    Raises:
        ValueError: a pattern of `optim.freeze` that no parameter matches, or patterns that leave nothing to train.
    """
    known = leaf_paths(params)
    for pattern in optim.freeze:
        if not any(match_any([pattern], name) for name in known):
            raise ValueError(f"optim.freeze={pattern!r} matches no parameter; paths look like {known[0]!r}")
    labels = map_with_path(lambda name, _: "frozen" if match_any(optim.freeze, name) else "trained", params)
    if "trained" not in jax.tree.leaves(labels):
        raise ValueError(f"optim.freeze={optim.freeze} leaves no parameter to train")
    return labels


def make_tx(config: Config, params: Params) -> optax.GradientTransformation:
    """Return AdamW with gradient clipping by global norm; frozen parameters get no update and no moments.

    Args:
        config: the run; `params` (arrays or their shapes) only give their paths.

    Source:
        arXiv 1711.05101 (AdamW); arXiv 2103.00020, tables 18 and 19 (defaults).
    """
    optim = config.optim
    clip = optax.identity() if optim.max_grad_norm is None else optax.clip_by_global_norm(optim.max_grad_norm)
    adamw = optax.adamw(
        make_schedule(config),
        b1=optim.beta1,
        b2=optim.beta2,
        eps=optim.epsilon,
        weight_decay=optim.weight_decay,
        mask=decay_mask,
    )
    chain = optax.chain(clip, adamw)
    if not optim.freeze:
        return chain
    return optax.partition({"trained": chain, "frozen": optax.set_to_zero()}, frozen_labels(optim, params))
