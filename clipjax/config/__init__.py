"""Every knob of a run: typed dataclasses with units. All of their names are imported from here.

Reading order: `run.Config` is the whole; `model`, `loss` and `data` hold its parts. Every default lives there.
`validation` says what is wrong with a config, `serialization` turns one into JSON and back, `presets` names known
models. Free of JAX, since every config file imports it.
"""

from clipjax.config.data import (
    CLIP_MEAN,
    CLIP_STD,
    Crop,
    DataConfig,
    EvalConfig,
    Interpolation,
    Resize,
    TaskConfig,
    TaskKind,
)
from clipjax.config.loss import GroupRole, LossConfig, LossKind, LossMethod, SamePair
from clipjax.config.model import (
    Activation,
    AttentionMethod,
    BagOfWordsConfig,
    CbowConfig,
    DecoderConfig,
    Dtype,
    ImagePool,
    ModelConfig,
    Positions,
    Projection,
    Remat,
    ResNetConfig,
    TextPool,
    TextTransformerConfig,
    ViTConfig,
)
from clipjax.config.run import (
    CheckpointConfig,
    Config,
    LogConfig,
    MeshConfig,
    OptimConfig,
    resolve_mesh,
    steps_of,
    total_steps,
)

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "Activation",
    "AttentionMethod",
    "BagOfWordsConfig",
    "CbowConfig",
    "CheckpointConfig",
    "Config",
    "Crop",
    "DataConfig",
    "DecoderConfig",
    "Dtype",
    "EvalConfig",
    "GroupRole",
    "ImagePool",
    "Interpolation",
    "LogConfig",
    "LossConfig",
    "LossKind",
    "LossMethod",
    "MeshConfig",
    "ModelConfig",
    "OptimConfig",
    "Positions",
    "Projection",
    "Remat",
    "ResNetConfig",
    "Resize",
    "SamePair",
    "TaskConfig",
    "TaskKind",
    "TextPool",
    "TextTransformerConfig",
    "ViTConfig",
    "resolve_mesh",
    "steps_of",
    "total_steps",
]
