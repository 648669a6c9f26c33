"""Contrastive losses: pure functions `(image_embed, text_embed, logit_scale, logit_bias) -> (loss, metrics)`.

The value and its gradient are those of the mean over the global batch, whatever mesh, method or tile computes them.
Read `contrastive`, the plain references, and `signature`; then, from the inside out, `logit_loss` with its
implementations `softmax`, `sigmoid` and `distillation`; `tiles`, which computes a block of the similarity matrix;
`partitioning` and `topology`, which share the matrix out among devices; `sharded`, which makes a differentiable
function of it; `moving_averages`, the memory of the `global` loss; and `build`, which puts them together.
"""

from clipjax.losses.build import ContrastiveLoss, TrainingLoss, build_loss, describe_loss, make_loss
from clipjax.losses.contrastive import sigmoid_loss, softmax_loss
from clipjax.losses.signature import LossFunction, LossInputs, LossResults, MovingAverages, Teacher
from clipjax.losses.topology import choose_method

__all__ = [
    "ContrastiveLoss",
    "LossFunction",
    "LossInputs",
    "LossResults",
    "MovingAverages",
    "Teacher",
    "TrainingLoss",
    "build_loss",
    "choose_method",
    "describe_loss",
    "make_loss",
    "sigmoid_loss",
    "softmax_loss",
]
