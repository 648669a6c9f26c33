"""Every knob of a run: typed dataclasses with units. `clipjax.validation` says what is wrong with one.

Reading order: `Config` at the bottom is the whole; each class above is one part of it. Every default lives here.
Time is given in examples (image-text pairs); the code turns it into steps (completed updates) in one place,
`steps`. This module imports neither JAX nor anything heavy, because every config file imports it.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar

from clipjax.choices import (
    Activation,
    AttentionMethod,
    Crop,
    Dtype,
    GroupRole,
    ImagePool,
    Interpolation,
    LossKind,
    LossMethod,
    Positions,
    Projection,
    Remat,
    Resize,
    SamePair,
    TaskKind,
    TextPool,
)

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


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
class WordsConfig:
    """One layer that predicts from the image which tokens its caption has: the paper's bag-of-words prediction."""

    KIND: ClassVar[str] = "words"


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Two towers, their common embedding and how they are computed."""

    embed_dim: int = 512
    image: ViTConfig | ResNetConfig = field(default_factory=ViTConfig)
    text: TextTransformerConfig | CbowConfig = field(default_factory=TextTransformerConfig)
    caption: DecoderConfig | WordsConfig | None = None  # predicts captions; None: nothing does
    compute_dtype: Dtype = Dtype.BFLOAT16  # of activations; parameters, sums and the loss are float32 always
    matmul_dtype: Dtype | None = None  # of what enters a product with a parameter; None: compute_dtype
    init_logit_bias: float | None = None  # a learned bias of the logits, for the sigmoid loss; None: no bias
    scan_layers: bool = True  # one compiled block per tower; False unrolls (faster for small models, slower to compile)
    remat: Remat = Remat.NONE
    attention: AttentionMethod = AttentionMethod.AUTO  # what computes self-attention
    init_logit_scale: float = 1 / 0.07  # arXiv 2103.00020, section 2.5
    max_logit_scale: float = 100.0  # clamped after every update


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


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """AdamW with linear warmup and cosine decay to `final_learning_rate`. Defaults: CLIP's, for ViT (tables 18, 19)."""

    learning_rate: float = 5e-4
    final_learning_rate: float = 0.0
    weight_decay: float = 0.2  # on matrices and embeddings only, never on gains, biases or the logit scale
    beta1: float = 0.9
    beta2: float = 0.98
    epsilon: float = 1e-6
    max_grad_norm: float | None = None  # global norm; None does not clip
    ema_decay: float | None = None  # per step; None keeps no average. Evaluation uses the average where there is one
    freeze: tuple[str, ...] = ()  # regular expressions of parameter paths, e.g. ("image/.*",) for locked-image tuning


@dataclass(kw_only=True, slots=True)
class MeshConfig:
    """Devices per mesh axis; one of them may be -1 and fills up. The batch is split over all axes but `tensor`."""

    slice: int | None = None  # groups of devices with slow links between them; None: as many as the hardware has
    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Where pairs come from and how they become arrays.

    A source is one string: `tfds:NAME/SPLIT`, or a path, glob or brace pattern of WebDataset tars.
    A tokenizer is one string: `bytes`, `clip:PATH`, `sentencepiece:PATH` or `huggingface:PATH`.
    """

    train: str = ""
    tfds_dir: str | None = None  # where prepared TFDS data lies; None is TFDS's own default
    tfds_image_key: str = "image"
    tfds_caption_key: str = "captions"
    tokenizer: str = "bytes"
    crop: Crop = Crop.RANDOM_RESIZED
    min_crop_area: float = 0.9  # share of the image's area
    resize: Resize = Resize.SHORTER_SIDE  # in evaluation, and in training with crop=center
    interpolation: Interpolation = Interpolation.BICUBIC
    mean: tuple[float, float, float] = CLIP_MEAN  # of pixels in 0..1, subtracted on the device
    std: tuple[float, float, float] = CLIP_STD
    num_workers: int = 0  # worker processes per training process; 0 decodes in threads of the training process
    num_threads: int = 2  # reading and decoding threads per worker
    prefetch_batches: int = 2
    max_bad_fraction: float = 0.05  # of the samples read; above it the run stops
    max_image_pixels: int = 25_000_000  # refused from the header
    max_caption_bytes: int = 65_536


@dataclass(kw_only=True, slots=True)
class TaskConfig:
    """One evaluation task.

    `retrieval` finds captions for pictures and pictures for captions. `image_retrieval` finds, for the pictures of
    `source`, those of `gallery` with the same caption, for instance the same thing in another style, and the reverse.
    `zero_shot` needs `classes` and `templates`: a name in `clipjax/evals/prompts.py` or a JSON file with a list of
    strings. The class of a sample is its integer `label`; samples without one (-1) are left out.
    """

    kind: TaskKind = TaskKind.ZERO_SHOT
    source: str = ""
    classes: str | None = None
    templates: str | None = None
    gallery: str | None = None
    tfds_label_key: str = "label"
    max_examples: int | None = None


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    """Evaluation in the loop and at its end."""

    every_examples: int | None = None  # None: only after the last step
    batch_size: int = 256  # images or texts per forward pass, over all devices
    tasks: dict[str, TaskConfig] = field(default_factory=dict)


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """When to save and what to keep. The last step is always saved, and so is the step at which a signal arrives."""

    every_examples: int = 1_000_000
    keep_last: int = 3
    best_metric: str | None = None  # "TASK:METRIC", larger is better; keeps that step too


@dataclass(kw_only=True, slots=True)
class LogConfig:
    """When and where to log; `metrics.jsonl` in the workdir is always written."""

    every_examples: int = 100_000
    tensorboard: bool = True
    peak_tflops: float | None = None  # per device, for MFU; None looks the chip up and leaves MFU out if it is unknown


@dataclass(kw_only=True, slots=True)
class Config:
    """One run."""

    seed: int = 0
    total_examples: int = 12_800_000
    warmup_examples: int = 0
    global_batch_size: int = 256
    microbatch_size: int | None = None  # pairs encoded at a time (GradCache), over all devices; None: the whole batch
    init_from: str | None = None  # a clipjax checkpoint whose parameters start this run
    compile_cache: str | None = "auto"  # directory of compiled steps, for you alone; auto: one of yours, None on CPUs
    init_match: tuple[str, ...] = ()  # regular expressions of the parameters to take from it, ("image/.*",); (): all
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    data: DataConfig = field(default_factory=DataConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)


def total_steps(config: Config) -> int:
    """Updates in the run: whole global batches in `total_examples`."""
    return config.total_examples // config.global_batch_size


def steps_of(examples: int, config: Config) -> int:
    """An interval or duration in steps: rounded to the nearest, at least 1 (0 stays 0)."""
    return max(1, round(examples / config.global_batch_size)) if examples else 0


def resolve_mesh(mesh: MeshConfig, num_devices: int, num_slices: int = 1) -> tuple[int, int, int, int]:
    """Sizes of the axes slice, data, fsdp and tensor, with None and -1 filled in.

    Raises:
        ValueError: the sizes do not multiply to `num_devices`.
    """
    sizes = [num_slices if mesh.slice is None else mesh.slice, mesh.data, mesh.fsdp, mesh.tensor]
    shown = f"mesh.slice={sizes[0]}, mesh.data={mesh.data}, mesh.fsdp={mesh.fsdp}, mesh.tensor={mesh.tensor}"
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes:
        if num_devices % known:
            raise ValueError(
                f"{shown}: {num_devices} devices cannot be divided by {known}; choose sizes that divide {num_devices}"
            )
        sizes[sizes.index(-1)] = num_devices // known
    elif known != num_devices:
        raise ValueError(
            f"{shown} make {known} devices, but there are {num_devices}; set one axis to -1 to let it fill up"
        )
    return sizes[0], sizes[1], sizes[2], sizes[3]
