"""The loss, and what its fields choose from."""

import enum
from dataclasses import dataclass

from clipjax.config.model import Dtype


class LossKind(enum.Enum):
    """Which contrastive loss.

    CLIP's `softmax` (arXiv 2103.00020, figure 3), SigLIP's `sigmoid` (arXiv 2303.15343), or `global`, a softmax against
    the whole dataset for small batches, which remembers two numbers of every sample (FastCLIP, arXiv 2407.01445).
    """

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"
    GLOBAL = "global"


class LossMethod(enum.Enum):
    """How devices share the global similarity matrix; the answer is the same.

    `gathered` collects all embeddings on every device, `ring` passes them from neighbour to neighbour, `auto` chooses.
    Between slices, `gathered` passes them from slice to slice.
    """

    AUTO = "auto"
    GATHERED = "gathered"
    RING = "ring"


class SamePair(enum.Enum):
    """What two pairs of a batch must have in common to be no negatives of each other: nothing, image, or caption."""

    NONE = "none"
    INDEX = "index"
    CAPTION = "caption"


class GroupRole(enum.Enum):
    """What pairs that are no negatives of each other are instead: `ignored`, or each other's `positive`."""

    IGNORED = "ignored"
    POSITIVE = "positive"


@dataclass(kw_only=True, slots=True)
class LossConfig:
    """The contrastive loss over the global batch; its value never depends on `method` or `tile`."""

    kind: LossKind = LossKind.SOFTMAX  # sigmoid needs model.init_logit_bias
    contrastive_weight: float = 1.0  # of the contrastive loss; 0 leaves it out
    caption_weight: float = (
        0.0  # of predicting captions, by model.caption: mean negative log-likelihood of their tokens
    )
    method: LossMethod = LossMethod.AUTO  # how devices share the work
    tile: int | None = None  # rows and columns of the similarity matrix that exist at a time; None: 1,024
    dtype: Dtype = Dtype.FLOAT32  # of embeddings that move between devices and enter products; sums are float32 always
    label_smoothing: float = 0.0  # softmax only: share of the target that all pairs of the batch have in common
    same_pair: SamePair = SamePair.NONE  # what makes two pairs of a batch no negatives of each other
    group_role: GroupRole = GroupRole.IGNORED  # what they are instead
    distill_from: str | None = None  # a clipjax checkpoint, frozen, whose similarities are learned besides
    distill_weight: float = 1.0  # of that part of the loss; the contrastive part counts in full
    gamma: float = 0.2  # global only: weight of a sample's newest value in its moving average
    gamma_decay_examples: int = 0  # global only: cosine decay from 1 to `gamma` over so many; 0: constant
    epsilon: float = 1e-14  # global only: added to the moving average
    rho: float | None = None  # global only: the loss is divided by the logit scale, and rho / scale added (FastCLIP-v3)
