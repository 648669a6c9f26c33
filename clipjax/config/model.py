"""The model: two towers, a caption head, and how they are computed; what these fields choose from.

The towers themselves are described in `image`, `text` and `caption`.
"""

import enum
from dataclasses import dataclass, field

from clipjax.config.caption import CaptionHead
from clipjax.config.image import ImageTower, ViTConfig
from clipjax.config.ranges import FINITE, POSITIVE, bounded
from clipjax.config.text import TextTower, TextTransformerConfig


class Remat(enum.Enum):
    """Values that the backward pass computes again.

    `none`: nothing; `dots`: all but matrix products; `mlp`: the MLPs besides; `full`: everything inside a block.
    """

    NONE = "none"
    DOTS = "dots"
    MLP = "mlp"
    FULL = "full"


class AttentionMethod(enum.Enum):
    """Implementation of self-attention; the answer is the same up to rounding.

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


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Two towers, their common embedding and how they are computed."""

    embed_dim: int = bounded(512, POSITIVE)
    image: ImageTower = field(default_factory=ViTConfig)
    text: TextTower = field(default_factory=TextTransformerConfig)
    caption: CaptionHead | None = None  # predicts captions; None: nothing does
    compute_dtype: Dtype = Dtype.BFLOAT16  # of activations; parameters, sums and the loss are float32 always
    matmul_dtype: Dtype | None = None  # of what enters a product with a parameter; None: compute_dtype
    init_logit_bias: float | None = bounded(None, FINITE)  # learned, added to the logits (sigmoid loss); None: no bias
    scan_layers: bool = True  # one compiled block per tower; False unrolls (faster for small models, slower to compile)
    remat: Remat = Remat.NONE
    attention: AttentionMethod = AttentionMethod.AUTO  # what computes self-attention
    init_logit_scale: float = bounded(1 / 0.07, POSITIVE)  # arXiv 2103.00020, section 2.5
    max_logit_scale: float = bounded(100.0, POSITIVE)  # clamped after every update

    def flops(self) -> int:
        """Return the FLOPs of one forward pass of one image-text pair.

        A multiply-add is 2 FLOPs; attention is counted dense, the causal half of the text tower too; patch embedding,
        pooling by attention and all projections are included, look-ups, norms, softmax and the loss are not. The
        convention of open_clip's `docs/model_profile.csv`.
        """
        return self.image.flops(self.embed_dim) + self.text.flops(self.embed_dim) + self.caption_flops()

    def caption_flops(self) -> int:
        """Return the FLOPs of predicting one caption from the towers' outputs; see `flops`."""
        return 0 if self.caption is None else self.caption.flops(self.image, self.text, self.embed_dim)

    def num_params(self) -> int:
        """Return the number of parameters, the logit scale and bias among them; running statistics are none."""
        caption = 0 if self.caption is None else self.caption.num_params(self.image, self.text, self.embed_dim)
        towers = self.image.num_params(self.embed_dim) + self.text.num_params(self.embed_dim)
        return towers + caption + 1 + (self.init_logit_bias is not None)
