"""Every knob of a run: typed dataclasses with units. All of their names are imported from here.

Reading order: `run.Config` is the whole; `model`, `loss` and `data` (with `augment`) hold its parts; `image`, `text`
and `caption` describe towers. Every default and every range lives there. `validation` says what is wrong with a config,
`serialization` turns one into JSON and back, `presets` names known models. Free of JAX, since every config file imports
it.
"""

from clipjax.config.augment import AugmentConfig
from clipjax.config.caption import BagOfWordsConfig, DecoderConfig
from clipjax.config.data import (
    CLIP_MEAN,
    CLIP_STD,
    Crop,
    DataConfig,
    Interpolation,
    MixtureSource,
    OnUnreadable,
    Resize,
    ResizeOn,
    TextTruncation,
)
from clipjax.config.evaluation import EvalConfig, FeatureKind, TaskConfig, TaskKind
from clipjax.config.image import ImagePool, Positions, ResNetConfig, ViTConfig
from clipjax.config.layers import Activation, Projection
from clipjax.config.loss import GroupRole, LossConfig, LossKind, LossMethod, SamePair
from clipjax.config.model import AttentionMethod, Dtype, ModelConfig, Remat
from clipjax.config.recovery import RecoveryConfig
from clipjax.config.run import (
    CheckpointConfig,
    Config,
    LogConfig,
    MeshConfig,
    OptimConfig,
    due_tasks,
    flops_per_pair,
    most_patches,
    patch_menu,
    resolve_mesh,
    steps_of,
    total_steps,
)
from clipjax.config.text import CbowConfig, TextPool, TextTransformerConfig

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "Activation",
    "AttentionMethod",
    "AugmentConfig",
    "BagOfWordsConfig",
    "CbowConfig",
    "CheckpointConfig",
    "Config",
    "Crop",
    "DataConfig",
    "DecoderConfig",
    "Dtype",
    "EvalConfig",
    "FeatureKind",
    "GroupRole",
    "ImagePool",
    "Interpolation",
    "LogConfig",
    "LossConfig",
    "LossKind",
    "LossMethod",
    "MeshConfig",
    "MixtureSource",
    "ModelConfig",
    "OnUnreadable",
    "OptimConfig",
    "Positions",
    "Projection",
    "RecoveryConfig",
    "Remat",
    "ResNetConfig",
    "Resize",
    "ResizeOn",
    "SamePair",
    "TaskConfig",
    "TaskKind",
    "TextPool",
    "TextTransformerConfig",
    "TextTruncation",
    "ViTConfig",
    "due_tasks",
    "flops_per_pair",
    "most_patches",
    "patch_menu",
    "resolve_mesh",
    "steps_of",
    "total_steps",
]
