"""What can be wrong with a model's config, whatever machine it runs on: field, value, rule, remedy."""

import math

from clipjax.config.loss import LossConfig
from clipjax.config.model import (
    AttentionMethod,
    DecoderConfig,
    Dtype,
    ImagePool,
    ModelConfig,
    Positions,
    Projection,
    ResNetConfig,
    TextPool,
    TextTransformerConfig,
    ViTConfig,
)
from clipjax.config.run import Config

LANES = 128
"""Of a TPU's vector register: one kernel computes attention of widths that are multiples of it."""


def model_errors(config: Config) -> list[str]:
    """All of it, a line each."""
    model, text = config.model, config.model.text
    errors = []
    for path, tower in (("model.image", model.image), ("model.text", text)):
        if isinstance(tower, ViTConfig | TextTransformerConfig):
            errors += _transformer_errors(path, tower, model.embed_dim)
    errors += (
        _vit_errors(model.image, model) if isinstance(model.image, ViTConfig) else _resnet_errors(model.image, config)
    )
    if isinstance(text, TextTransformerConfig) and text.pool is TextPool.CLASS and not text.causal:
        errors.append("model.text.pool=class, a token behind the text, needs model.text.causal=True")
    if isinstance(text, TextTransformerConfig) and text.pool is TextPool.LAST and text.causal:
        errors.append(
            "model.text.pool=last reads the last place, which is padding where a text is short; with "
            "model.text.causal=True use pool=end"
        )
    errors += _attention_errors(model)
    if text.context_length < 3:
        errors.append(f"model.text.context_length={text.context_length} must hold start, a token and end: at least 3")
    if model.init_logit_scale > model.max_logit_scale:
        errors.append(
            f"model.init_logit_scale={model.init_logit_scale} must not exceed "
            f"model.max_logit_scale={model.max_logit_scale}"
        )
    return errors


def _attention_errors(model: ModelConfig) -> list[str]:
    """What a way to compute attention cannot do."""
    errors, method = [], model.attention
    if method in (AttentionMethod.AUTO, AttentionMethod.XLA):
        return errors
    if method is AttentionMethod.CUDNN and model.compute_dtype is not Dtype.BFLOAT16:
        errors.append(
            f"model.attention=cudnn needs model.compute_dtype=bfloat16, not {model.compute_dtype.value}; use auto"
        )
    for path, tower in (("model.image", model.image), ("model.text", model.text)):
        if isinstance(tower, TextTransformerConfig) and tower.pool is TextPool.CLASS:
            errors.append(
                f"model.attention={method.value} knows no mask, which {path}.pool=class needs; use auto or xla"
            )
        if not isinstance(tower, ViTConfig | TextTransformerConfig) or tower.width % tower.num_heads:
            continue
        dim = tower.width // tower.num_heads
        if method is AttentionMethod.FUSED and tower.width % LANES:
            errors.append(
                f"model.attention=fused needs {path}.width={tower.width} to be a multiple of {LANES}; use auto"
            )
        if method is AttentionMethod.CUDNN and (dim % 8 or dim > 128):
            errors.append(
                f"model.attention=cudnn needs heads of a multiple of 8 up to 128; those of {path} have {dim}; use auto"
            )
    return errors


def caption_errors(config: Config) -> list[str]:
    """What predicts captions, and the weights of the losses."""
    model, loss, errors = config.model, config.loss, []
    for name in ("contrastive_weight", "caption_weight"):
        weight = getattr(loss, name)
        if not (weight >= 0 and math.isfinite(weight)):
            errors.append(f"loss.{name}={weight} must be at least 0")
    if loss.contrastive_weight == loss.caption_weight == 0:
        errors.append("loss.contrastive_weight and loss.caption_weight are both 0: nothing would be learned")
    if (model.caption is None) != (loss.caption_weight == 0):
        errors.append(
            f"loss.caption_weight={loss.caption_weight} needs model.caption, a DecoderConfig or WordsConfig, and "
            "model.caption needs a weight"
        )
    default = LossConfig()
    if loss.contrastive_weight == 0:
        ignored = ("kind", "same_pair", "label_smoothing", "distill_from", "tile", "method")
        errors += [
            f"loss.{name} would be ignored with loss.contrastive_weight=0; leave it out"
            for name in ignored
            if getattr(loss, name) != getattr(default, name)
        ]
    if isinstance(model.caption, DecoderConfig):
        if not isinstance(model.text, TextTransformerConfig) or not model.text.causal:
            errors.append("model.caption: a decoder reads a text transformer with model.text.causal=True")
        elif model.text.width % model.caption.num_heads:
            errors.append(
                f"model.caption.num_heads={model.caption.num_heads} must divide model.text.width={model.text.width}"
            )
        for name in ("depth", "num_heads"):
            if getattr(model.caption, name) < 1:
                errors.append(f"model.caption.{name}={getattr(model.caption, name)} must be at least 1")
    return errors


def _transformer_errors(path: str, tower: ViTConfig | TextTransformerConfig, embed_dim: int) -> list[str]:
    errors = []
    if tower.width % tower.num_heads:
        errors.append(f"{path}.width={tower.width} must be a multiple of {path}.num_heads={tower.num_heads}")
    if not 0 < tower.layer_norm_epsilon < 1:
        errors.append(f"{path}.layer_norm_epsilon={tower.layer_norm_epsilon} must lie between 0 and 1")
    if tower.projection is Projection.NONE and tower.width != embed_dim:
        errors.append(f"{path}.projection=none needs {path}.width={tower.width} to be model.embed_dim={embed_dim}")
    return errors


def _vit_errors(tower: ViTConfig, model: ModelConfig) -> list[str]:
    errors, embed_dim = [], model.embed_dim
    if tower.image_size < tower.patch_size or (tower.image_size % tower.patch_size and not tower.crop_to_patches):
        errors.append(
            f"model.image.image_size={tower.image_size} must be a multiple of model.image.patch_size={tower.patch_size}"
            " (or set model.image.crop_to_patches)"
        )
    if tower.pool is ImagePool.CLASS and not tower.class_token:
        errors.append("model.image.pool=class needs model.image.class_token=True")
    queries = (tower.num_queries, tower.query_heads)
    if tower.pool is ImagePool.QUERIES and (min(queries) < 1 or embed_dim % tower.query_heads):
        errors.append(
            f"model.image.num_queries={tower.num_queries} and model.image.query_heads={tower.query_heads} must be at "
            f"least 1, and the latter divide model.embed_dim={embed_dim}"
        )
    if tower.pool is not ImagePool.QUERIES and queries != (ViTConfig().num_queries, ViTConfig().query_heads):
        errors.append(f"model.image.num_queries and query_heads: model.image.pool={tower.pool.value} would ignore them")
    class_and_decoder = tower.pool is ImagePool.CLASS and isinstance(model.caption, DecoderConfig)
    if tower.ln_post_after_pool and not (tower.pool is ImagePool.AVERAGE or class_and_decoder):
        errors.append(
            f"model.image.ln_post_after_pool=True would change nothing with model.image.pool={tower.pool.value}; it is "
            "for pool=average, and for pool=class with a decoder as model.caption"
        )
    if tower.num_registers < 0:
        errors.append(f"model.image.num_registers={tower.num_registers} must not be negative")
    if not 0 <= tower.patch_dropout < 1:
        errors.append(f"model.image.patch_dropout={tower.patch_dropout} must be at least 0 and less than 1")
    if tower.positions is Positions.SINCOS and (tower.width % 4 or tower.width < 8):
        errors.append(f"model.image.positions=sincos needs a width divisible by 4 and at least 8, not {tower.width}")
    return errors


def _resnet_errors(tower: ResNetConfig, config: Config) -> list[str]:
    errors = []
    if len(tower.layers) != 4 or min(tower.layers) < 1:
        errors.append(f"model.image.layers={tower.layers} must be four numbers of blocks, each at least 1")
    if tower.image_size % 32:
        errors.append(
            f"model.image.image_size={tower.image_size} must be a multiple of 32, by which a ResNet shrinks it"
        )
    if tower.width % 2 or 32 * tower.width % tower.num_heads:
        errors.append(
            f"model.image.width={tower.width} must be even, and 32 times that a multiple of "
            f"model.image.num_heads={tower.num_heads}"
        )
    if config.microbatch_size is not None:
        errors.append(
            f"microbatch_size={config.microbatch_size}: BatchNorm takes its statistics over the batch that passes at "
            "once, so a ResNet in microbatches would be another model; leave microbatch_size None, or take a ViT"
        )
    return errors
