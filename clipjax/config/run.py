"""The whole run: `Config`, and its optimizer, mesh, checkpoints and log.

Time is given in examples (image-text pairs); the code turns it into steps (completed updates) in one place,
`steps_of`. Every default lives here and in `model`, `loss` and `data`.
"""

import math
from dataclasses import dataclass, field, replace

from clipjax.config.data import DataConfig
from clipjax.config.evaluation import EvalConfig
from clipjax.config.image import ImageTower
from clipjax.config.loss import LossConfig
from clipjax.config.model import ModelConfig
from clipjax.config.ranges import BELOW_ONE, NOT_NEGATIVE, POSITIVE, Range, bounded
from clipjax.config.recovery import RecoveryConfig

SEED = Range("must be less than 2**63", lambda value: value < 2**63)
SLICES = Range("must be at least 1, or None for those of the hardware", lambda value: value >= 1)
PORT = Range("must lie between 0 and 65535; 0 takes a free one", lambda value: 0 <= value <= 65535)
AXIS_SIZE = Range("must be at least 1, or -1 to fill up", lambda value: value >= 1 or value == -1)


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """AdamW with linear warmup and cosine decay to `final_learning_rate`. Defaults: CLIP's, for ViT (tables 18, 19)."""

    learning_rate: float = bounded(5e-4, POSITIVE)
    final_learning_rate: float = bounded(0.0, NOT_NEGATIVE)
    weight_decay: float = bounded(0.2, NOT_NEGATIVE)  # on matrices and embeddings only, no gains, biases, logit scale
    beta1: float = bounded(0.9, BELOW_ONE)
    beta2: float = bounded(0.98, BELOW_ONE)
    epsilon: float = bounded(1e-6, POSITIVE)
    max_grad_norm: float | None = bounded(None, POSITIVE)  # global norm; None does not clip
    ema_decay: float | None = bounded(None, BELOW_ONE)  # per step; evaluation uses the average; None keeps none
    freeze: tuple[str, ...] = ()  # regular expressions of parameter paths, e.g. ("image/.*",) for locked-image tuning


@dataclass(kw_only=True, slots=True)
class MeshConfig:
    """Devices per mesh axis; one of them may be -1 and fills up. The batch is split over all axes but `tensor`."""

    slice: int | None = bounded(None, SLICES)  # groups of devices with slow links between them; None: the hardware's
    data: int = bounded(-1, AXIS_SIZE)
    fsdp: int = bounded(1, AXIS_SIZE)
    tensor: int = bounded(1, AXIS_SIZE)


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """Checkpoints to save and to keep. The last step is always saved, and so is the step at which a signal arrives."""

    every_examples: int = bounded(1_000_000, POSITIVE)
    keep_last: int = bounded(3, POSITIVE)
    best_metric: str | None = None  # "TASK:METRIC", larger is better; keeps that step too


@dataclass(kw_only=True, slots=True)
class LogConfig:
    """Times and places of the log; `metrics.jsonl` in the workdir is always written."""

    every_examples: int = bounded(100_000, POSITIVE)
    tensorboard: bool = True
    peak_tflops: float | None = bounded(None, POSITIVE)  # per device, for MFU; None: the chip's, if it is known
    price_per_hour: float | None = bounded(None, POSITIVE)  # per device, for the cost of a million pairs
    prometheus_port: int | None = bounded(None, PORT)  # serves metrics from the first process; None: no server
    prometheus_host: str = "127.0.0.1"  # address that it listens at; "0.0.0.0" is open to every machine around


@dataclass(kw_only=True, slots=True)
class Config:
    """One run."""

    seed: int = bounded(0, NOT_NEGATIVE, SEED)
    total_examples: int = bounded(12_800_000, POSITIVE)
    warmup_examples: int = bounded(0, NOT_NEGATIVE)
    global_batch_size: int = bounded(256, POSITIVE)
    microbatch_size: int | None = None  # pairs encoded at a time (GradCache), over all devices; None: the whole batch
    init_from: str | None = None  # a clipjax checkpoint whose parameters start this run
    compile_cache: str | None = "auto"  # directory of compiled steps, for you alone; auto: one of yours, None on CPUs
    init_match: tuple[str, ...] = ()  # regular expressions of the parameters to take from it, ("image/.*",); (): all
    # Places of a longer context that stay as they are in it, the others interpolated (Long-CLIP: 20); 0: all are.
    init_keep_positions: int = bounded(0, NOT_NEGATIVE)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    data: DataConfig = field(default_factory=DataConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)


def most_patches(image: ImageTower) -> int | None:
    """Return the most patches of an image of variable aspect; None where images are squares."""
    return getattr(image, "max_patches", None)


def patch_menu(config: Config) -> tuple[int, ...]:
    """Return the budgets of which each step has one, in patches per image; empty where images are squares."""
    most = most_patches(config.model.image)
    return () if most is None else config.data.patch_menu or (most,)


def flops_per_pair(config: Config, patches: int | None = None) -> int:
    """Return the FLOPs of one forward pass of one image with all captions that it is trained with at a sight.

    Args:
        config: the run.
        patches: of the image, where its aspect is variable; None: the largest budget.
    """
    model, more = config.model, config.data.captions_per_image - 1
    if patches is None:
        patches = max(patch_menu(config), default=None)
    if patches is not None:
        model = replace(model, image=replace(model.image, max_patches=patches))
    return model.flops() + more * model.text.flops(model.embed_dim)


def total_steps(config: Config) -> int:
    """Return the updates of the run: whole global batches in `total_examples`."""
    return config.total_examples // config.global_batch_size


def steps_of(examples: int, config: Config) -> int:
    """Return an interval or duration in steps: rounded to the nearest, at least 1 (0 stays 0)."""
    return max(1, round(examples / config.global_batch_size)) if examples else 0


def due_tasks(config: Config, step: int) -> list[str]:
    """Return the names of the tasks to evaluate after a step: those whose interval it ends, after the last step all."""
    if step == total_steps(config):
        return list(config.eval.tasks)
    intervals = {name: config.eval.interval_of(name) for name in config.eval.tasks}
    return [name for name, every in intervals.items() if every is not None and step % steps_of(every, config) == 0]


def resolve_mesh(mesh: MeshConfig, num_devices: int, num_slices: int = 1) -> tuple[int, int, int, int]:
    """Return the sizes of the axes slice, data, fsdp and tensor, with None and -1 filled in.

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
