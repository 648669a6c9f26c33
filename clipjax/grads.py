"""Gradients of the loss over the global batch. All ways share one signature and give one answer.

`direct` differentiates through towers and loss at once. (GradCache, for batches whose activations do not fit, takes
the same arguments and will stand beside it.)
"""

from collections.abc import Callable
from typing import Any

import jax

from clipjax.typing import Batch, Key, Metrics, Params

Encode = Callable[[Params, Batch, Key], tuple[Any, Any, Any, Any]]
Loss = Callable[[Any, Any, Any, Any], tuple[jax.Array, Metrics]]


def direct(encode: Encode, loss: Loss, params: Params, batch: Batch, key: Key) -> tuple[Params, Metrics]:
    """Gradients by one backward pass, and the loss's metrics with `loss` itself among them."""

    def objective(params: Params) -> tuple[jax.Array, Metrics]:
        value, metrics = loss(*encode(params, batch, key))
        return value, {"loss": value, **metrics}

    return jax.grad(objective, has_aux=True)(params)
