"""What fields of a config choose from. Free of JAX; `clipjax.config` hands these names on."""

import enum


class Activation(enum.Enum):
    """Non-linearity of the MLPs: OpenAI's `quick_gelu` (x * sigmoid(1.702 x)), `gelu`, or its tanh form (SigLIP)."""

    QUICK_GELU = "quick_gelu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"


class ImagePool(enum.Enum):
    """One vector out of an image's tokens.

    The class token, the mean of the patches, attention (SigLIP's MAP), or the first of several `queries` that attend
    to the patches, whose others a captioning decoder reads (CoCa).
    """

    CLASS = "class"
    AVERAGE = "average"
    ATTENTION = "attention"
    QUERIES = "queries"


class TextPool(enum.Enum):
    """One vector out of a text's tokens.

    The end-of-text token, the last place, attention (SigLIP's MAP), or a learned token behind the text (CoCa).
    """

    END = "end"
    LAST = "last"
    ATTENTION = "attention"
    CLASS = "class"


class Positions(enum.Enum):
    """Positions of patches: a learned table, or fixed sines and cosines of row and column."""

    LEARNED = "learned"
    SINCOS = "sincos"


class Projection(enum.Enum):
    """From a tower's width to the embedding: none (they are equal), a matrix, or a matrix and a bias."""

    NONE = "none"
    LINEAR = "linear"
    AFFINE = "affine"


class Remat(enum.Enum):
    """What the backward pass recomputes.

    `none`: nothing; `dots`: all but matrix products; `mlp`: the MLPs besides; `full`: everything inside a block.
    """

    NONE = "none"
    DOTS = "dots"
    MLP = "mlp"
    FULL = "full"


class AttentionMethod(enum.Enum):
    """What computes self-attention; the answer is the same up to rounding.

    `xla` is plain array code, `fused` one kernel for TPUs, `cudnn` NVIDIA's for GPUs in bfloat16; `auto` takes `fused`
    on TPUs where it fits, else `xla`.
    """

    AUTO = "auto"
    XLA = "xla"
    FUSED = "fused"
    CUDNN = "cudnn"


class Dtype(enum.Enum):
    """Number format of the towers' computation. Parameters, logits and log-sum-exps are always float32."""

    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


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


class Crop(enum.Enum):
    """Training crop: `random_resized` (area share from `min_crop_area` to 1) or `center` (as in evaluation)."""

    RANDOM_RESIZED = "random_resized"
    CENTER = "center"


class Resize(enum.Enum):
    """How evaluation makes a picture square: the `shorter_side` fits and the centre is cut out, or both sides fit."""

    SHORTER_SIDE = "shorter_side"
    SQUASH = "squash"


class Interpolation(enum.Enum):
    """Filter of resizing; always antialiased."""

    BICUBIC = "bicubic"
    BILINEAR = "bilinear"


class TaskKind(enum.Enum):
    """What an evaluation task measures."""

    ZERO_SHOT = "zero_shot"
    RETRIEVAL = "retrieval"
    IMAGE_RETRIEVAL = "image_retrieval"
