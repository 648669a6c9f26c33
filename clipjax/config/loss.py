"""The loss, and what its fields choose from."""

import enum
from dataclasses import dataclass

from clipjax.config.model import Dtype
from clipjax.config.ranges import AT_LEAST_ZERO, LESS_THAN_ONE, POSITIVE, Range, bounded

TILE = Range("must be at least 1, or None for the default", lambda value: value >= 1)
GAMMA = Range("must be greater than 0 and at most 1", lambda value: 0 < value <= 1)
EPSILON = Range("must lie between 1e-30 and 1", lambda value: 1e-30 <= value < 1)


class LossKind(enum.Enum):
    """Contrastive loss.

    CLIP's `softmax` (arXiv 2103.00020, figure 3), SigLIP's `sigmoid` (arXiv 2303.15343), or `global`, a softmax against
    the whole dataset for small batches, which remembers two numbers of every sample (FastCLIP, arXiv 2407.01445).
    """

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"
    GLOBAL = "global"


class LossMethod(enum.Enum):
    """Division of the global similarity matrix among devices; the answer is the same.

    `gathered` collects all embeddings on every device, `ring` passes them from neighbour to neighbour, `auto` chooses.
    Between slices, `gathered` passes them from slice to slice.
    """

    AUTO = "auto"
    GATHERED = "gathered"
    RING = "ring"


class SamePair(enum.Enum):
    """Common property of two pairs of a batch that makes them no negatives of each other: none, image, or caption."""

    NONE = "none"
    INDEX = "index"
    CAPTION = "caption"


class GroupRole(enum.Enum):
    """Role of pairs that are no negatives of each other: `ignored`, or each other's `positive`."""

    IGNORED = "ignored"
    POSITIVE = "positive"


@dataclass(kw_only=True, slots=True)
class LossConfig:
    """The contrastive loss over the global batch; its value never depends on `method` or `tile`."""

    kind: LossKind = LossKind.SOFTMAX  # sigmoid needs model.init_logit_bias
    contrastive_weight: float = bounded(1.0, AT_LEAST_ZERO)  # of the contrastive loss; 0 leaves it out
    # Of predicting captions, by model.caption: mean negative log-likelihood of their tokens.
    caption_weight: float = bounded(0.0, AT_LEAST_ZERO)
    method: LossMethod = LossMethod.AUTO  # how devices share the work
    tile: int | None = bounded(None, TILE)  # rows and columns of the similarity matrix at a time; None: 1,024
    dtype: Dtype = Dtype.FLOAT32  # of embeddings that move between devices and enter products; sums are float32 always
    label_smoothing: float = bounded(0.0, LESS_THAN_ONE)  # softmax only: share of the target common to the whole batch
    same_pair: SamePair = SamePair.NONE  # what makes two pairs of a batch no negatives of each other
    group_role: GroupRole = GroupRole.IGNORED  # what they are instead
    distill_from: str | None = None  # a clipjax checkpoint, frozen, whose similarities are learned besides
    distill_weight: float = bounded(1.0, POSITIVE)  # of that part of the loss; the contrastive part counts in full
    # The global loss only, as metadata say: the weight of a sample's newest value in its moving average, which decays
    # (cosine) from 1 to `gamma` over so many examples (0: constant); what is added to that average; and, where rho is
    # given, the loss divided by the logit scale, and rho / scale added (FastCLIP-v3).
    gamma: float = bounded(0.2, GAMMA, used_by=LossKind.GLOBAL)
    gamma_decay_examples: int = bounded(0, AT_LEAST_ZERO, used_by=LossKind.GLOBAL)
    epsilon: float = bounded(1e-14, EPSILON, used_by=LossKind.GLOBAL)
    rho: float | None = bounded(None, AT_LEAST_ZERO, used_by=LossKind.GLOBAL)
