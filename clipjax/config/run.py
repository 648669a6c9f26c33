"""The whole run: `Config`, and its optimizer, mesh, checkpoints and log.

Time is given in examples (image-text pairs); the code turns it into steps (completed updates) in one place,
`steps_of`. Every default lives here and in `model`, `loss` and `data`."""

import math
from dataclasses import dataclass, field

from clipjax.config.data import DataConfig, EvalConfig
from clipjax.config.loss import LossConfig
from clipjax.config.model import (
    ModelConfig,
)


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
