"""Contrastive losses: pure functions `(image_embed, text_embed, logit_scale, logit_bias) -> (loss, metrics)`.

The value and its gradient are those of the mean over the global batch, whatever mesh, method or tile computes it.
`contrastive` holds the plain references; `logit_loss` is what a kind of loss does with a logit, and `softmax`,
`sigmoid` and `distillation` are the kinds; `tiles` walks through a block of the similarity matrix, `partitioning` and
`topology` share the matrix out among devices, `sharded` makes a differentiable function of it, `moving_averages` keeps
what `global` remembers of each sample, `build` puts them together.
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
