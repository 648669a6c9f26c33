"""The model: image towers, text towers, caption heads, and what their fields choose from."""

import enum
from dataclasses import dataclass, field
from typing import ClassVar


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


@dataclass(kw_only=True, slots=True)
class ViTConfig:
    """Vision transformer. Lengths in pixels; `mlp_dim` None means 4 * width. The defaults are OpenAI's CLIP."""

    KIND: ClassVar[str] = "vit"

    image_size: int = 224
    patch_size: int = 32
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_dim: int | None = None
    activation: Activation = Activation.QUICK_GELU
    layer_norm_epsilon: float = 1e-5
    pool: ImagePool = ImagePool.CLASS
    class_token: bool = True
    num_registers: int = 0  # learned tokens without meaning (arXiv 2309.16588)
    positions: Positions = Positions.LEARNED
    patch_bias: bool = False
    crop_to_patches: bool = False  # leave out pixels at the right and below that fill no patch (SigLIP So400m/14@384)
    ln_pre: bool = True  # LayerNorm before the blocks
    ln_post_after_pool: bool = False  # LayerNorm of the pooled vector, not of all tokens before pooling
    num_queries: int = 256  # pool=queries only
    query_heads: int = 8  # pool=queries only
    projection: Projection = Projection.LINEAR
    patch_dropout: float = 0.0  # share of patches left out in training (FLIP, arXiv 2212.00794)


@dataclass(kw_only=True, slots=True)
class ResNetConfig:
    """The paper's modified ResNet with attention pooling; `layers` are the blocks of its four stages."""

    KIND: ClassVar[str] = "resnet"

    image_size: int = 224
    layers: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64  # channels of the first stage; the last has 32 times as many
    num_heads: int = 32  # of the attention pooling


@dataclass(kw_only=True, slots=True)
class TextTransformerConfig:
    """Text transformer. `vocab_size` is at least the tokenizer's. The defaults are OpenAI's CLIP."""

    KIND: ClassVar[str] = "transformer"

    context_length: int = 77
    vocab_size: int = 49408
    width: int = 512
    depth: int = 12
    num_heads: int = 8
    mlp_dim: int | None = None
    activation: Activation = Activation.QUICK_GELU
    layer_norm_epsilon: float = 1e-5
    causal: bool = True
    pool: TextPool = TextPool.END
    projection: Projection = Projection.LINEAR


@dataclass(kw_only=True, slots=True)
class CbowConfig:
    """The paper's bag of words: the mean of the tokens' embeddings, projected."""

    KIND: ClassVar[str] = "cbow"

    context_length: int = 77
    vocab_size: int = 49408
    width: int = 512


@dataclass(kw_only=True, slots=True)
class DecoderConfig:
    """A causal decoder that reads the text tower's tokens and looks at the image's: it predicts each next token."""

    KIND: ClassVar[str] = "decoder"

    depth: int = 12
    num_heads: int = 8
    mlp_dim: int | None = None
    activation: Activation = Activation.QUICK_GELU
    layer_norm_epsilon: float = 1e-5


@dataclass(kw_only=True, slots=True)
class BagOfWordsConfig:
    """One layer that predicts from the image which tokens its caption has: the paper's bag-of-words prediction."""

    KIND: ClassVar[str] = "words"


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Two towers, their common embedding and how they are computed."""

    embed_dim: int = 512
    image: ViTConfig | ResNetConfig = field(default_factory=ViTConfig)
    text: TextTransformerConfig | CbowConfig = field(default_factory=TextTransformerConfig)
    caption: DecoderConfig | BagOfWordsConfig | None = None  # predicts captions; None: nothing does
    compute_dtype: Dtype = Dtype.BFLOAT16  # of activations; parameters, sums and the loss are float32 always
    matmul_dtype: Dtype | None = None  # of what enters a product with a parameter; None: compute_dtype
    init_logit_bias: float | None = None  # a learned bias of the logits, for the sigmoid loss; None: no bias
    scan_layers: bool = True  # one compiled block per tower; False unrolls (faster for small models, slower to compile)
    remat: Remat = Remat.NONE
    attention: AttentionMethod = AttentionMethod.AUTO  # what computes self-attention
    init_logit_scale: float = 1 / 0.07  # arXiv 2103.00020, section 2.5
    max_logit_scale: float = 100.0  # clamped after every update
