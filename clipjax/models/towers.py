"""Modules of towers and heads by their configs, and the table of all sharding rules: the one place that knows them all.

Every tower's module holds the rules of its own parameters; a weight that no rule covers is refused.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from clipjax.config import (
    BagOfWordsConfig,
    CbowConfig,
    DecoderConfig,
    ModelConfig,
    ResNetConfig,
    TextTransformerConfig,
    ViTConfig,
)
from clipjax.models import captions, pool, resnet, text, transformer, vit
from clipjax.models.layers import Numerics
from clipjax.runtime.sharding import Rules

PARAMETER_RULES: Rules = (
    *transformer.RULES,
    *pool.RULES,
    *vit.RULES,
    *resnet.RULES,
    *text.RULES,
    *captions.RULES,
    (r"log_logit_scale|logit_bias", ()),
)
"""Dimensions of every parameter and running statistic."""


def build_image_tower(model: ModelConfig) -> nn.Module:
    """Return the module: pixels -> the embedding before normalisation, and the tokens that a caption is made from."""
    match model.image:
        case ViTConfig() as tower:
            return vit.VisionTransformer(tower, model, _numerics(model, tower))
        case ResNetConfig() as tower:
            return resnet.ModifiedResNet(tower, model, _numerics(model, tower))


def build_text_tower(model: ModelConfig) -> nn.Module:
    """Return the module: token ids -> the embedding before normalisation, and the tokens that a decoder reads."""
    match model.text:
        case TextTransformerConfig() as tower:
            return text.TextTransformer(tower, model, _numerics(model, tower))
        case CbowConfig() as tower:
            return text.Cbow(tower, model, _numerics(model, tower))


def build_caption_head(model: ModelConfig) -> nn.Module | None:
    """Return the module that predicts captions, if there is one."""
    match model.caption:
        case DecoderConfig() as head:
            assert isinstance(model.text, TextTransformerConfig)
            return captions.Decoder(head, model.text, model, _numerics(model, head))
        case BagOfWordsConfig() as head:
            return captions.BagOfWords(model.text.vocab_size, _numerics(model, head))
        case None:
            return None


def _numerics(model: ModelConfig, tower: Any) -> Numerics:
    compute_dtype: Any = jnp.dtype(model.compute_dtype.value)
    matmul_dtype = compute_dtype if model.matmul_dtype is None else jnp.dtype(model.matmul_dtype.value)
    return Numerics(compute_dtype, matmul_dtype, getattr(tower, "layer_norm_epsilon", 1e-5), model.attention)
