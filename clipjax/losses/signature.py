"""The signature of every loss over the global batch.

Axes: n pairs of the global batch, e embed, t embed of a teacher.
"""

from typing import NamedTuple, Protocol, runtime_checkable

from jax import Array
from jaxtyping import Float, Int

from clipjax.typing import Metrics


class Teacher(NamedTuple):
    """A frozen model's embeddings of the same pairs.

    Attributes:
        image_embed: unit-norm; its size may differ from the student's.
        text_embed: unit-norm.
        logit_scale: multiplier of the teacher's similarities.
    """

    image_embed: Float[Array, "n t"]
    text_embed: Float[Array, "n t"]
    logit_scale: Float[Array, ""]


class MovingAverages(NamedTuple):
    """Moving averages of the pairs of a batch, which the `global` loss reads and updates.

    Attributes:
        log_mean: logarithms of the moving averages of each image and each text; -inf: not seen yet.
        gamma: weight of the new value, above 0 and at most 1.
    """

    log_mean: Float[Array, "n 2"]
    gamma: Float[Array, ""]


class LossInputs(NamedTuple):
    """Inputs of a loss besides the embeddings and their scaling.

    Attributes:
        group: pairs of the same group are no negatives of each other; [n, k] where it depends on the text of k.
        teacher: embeddings of the same pairs to learn from; a loss made with `distill_weight` needs them.
        memory: moving averages of these pairs; the `global` loss needs them.
    """

    group: Int[Array, "n"] | Int[Array, "n k"] | None = None
    teacher: Teacher | None = None
    memory: MovingAverages | None = None


class LossResults(NamedTuple):
    """Value of a loss, and what comes with it.

    Attributes:
        loss: mean over the global batch.
        metrics: scalars by name; their derivatives are zero.
        log_mean: new `MovingAverages.log_mean` of these pairs; None with other losses than `global`.
    """

    loss: Float[Array, ""]
    metrics: Metrics
    log_mean: Float[Array, "n 2"] | None = None


@runtime_checkable
class LossFunction(Protocol):
    """A loss over the global batch."""

    def __call__(
        self,
        image_embed: Float[Array, "n e"],
        text_embed: Float[Array, "n e"],
        logit_scale: Float[Array, ""],
        logit_bias: Float[Array, ""] | None = None,
        *,
        group: Int[Array, "n"] | None = None,
        teacher: Teacher | None = None,
        memory: MovingAverages | None = None,
    ) -> tuple[Float[Array, ""], Metrics]:
        """Compute the loss and its metrics.

        Args:
            image_embed: unit-norm.
            text_embed: unit-norm; row i belongs to image i.
            logit_scale: multiplier of the similarities.
            logit_bias: added to the logits; a softmax does not depend on it.
            group: pairs of the same group are no negatives of each other.
            teacher: to learn from; a loss made with `distill_weight` needs it.
            memory: of these pairs; the `global` loss needs it. `ContrastiveLoss.evaluate` gives the new ones as well.
        """
        ...
