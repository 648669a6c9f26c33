"""Checks of a model's config, whatever machine it runs on: field, value, rule, remedy."""

from clipjax.config.caption import DecoderConfig
from clipjax.config.image import ImagePool, ViTConfig
from clipjax.config.loss import LossConfig
from clipjax.config.model import AttentionMethod, Dtype, ModelConfig
from clipjax.config.run import Config, most_patches
from clipjax.config.text import TextPool, TextTransformerConfig

LANES = 128
"""Lanes of a TPU's vector register: one kernel computes attention of widths that are multiples of it."""


def model_errors(config: Config) -> list[str]:
    """Return what is wrong between the fields of the model, a line each; their ranges hold already."""
    model, size = config.model, config.microbatch_size
    errors = model.image.errors("model.image", model.embed_dim) + model.text.errors("model.text", model.embed_dim)
    if size is not None and getattr(model.image, "BATCH_STATISTICS", False):
        errors.append(
            f"microbatch_size={size}: BatchNorm takes its statistics over the batch that passes at "
            "once, so a ResNet in microbatches would be another model; leave microbatch_size None, or take a ViT"
        )
    errors += _norm_errors(model) + _attention_errors(model)
    if model.caption is not None and (most := most_patches(model.image)) is not None:
        errors.append(
            f"model.caption reads the tokens of squares, and model.image.max_patches={most} gives others; leave one of "
            "them None"
        )
    if model.init_logit_scale > model.max_logit_scale:
        errors.append(
            f"model.init_logit_scale={model.init_logit_scale} must not exceed "
            f"model.max_logit_scale={model.max_logit_scale}"
        )
    return errors


def _norm_errors(model: ModelConfig) -> list[str]:
    """Return what keeps the image tower's last LayerNorm from standing behind the pooling."""
    tower = model.image
    if not isinstance(tower, ViTConfig) or not tower.ln_post_after_pool or tower.pool is ImagePool.AVERAGE:
        return []
    if tower.pool is ImagePool.CLASS and isinstance(model.caption, DecoderConfig):
        return []
    return [
        f"model.image.ln_post_after_pool=True would change nothing with model.image.pool={tower.pool.value}; it is "
        "for pool=average, and for pool=class with a decoder as model.caption"
    ]


def _attention_errors(model: ModelConfig) -> list[str]:
    """Return what the configured computation of attention cannot do."""
    errors, method = [], model.attention
    if method in (AttentionMethod.AUTO, AttentionMethod.XLA):
        return errors
    if method is AttentionMethod.CUDNN and model.compute_dtype is not Dtype.BFLOAT16:
        errors.append(
            f"model.attention=cudnn needs model.compute_dtype=bfloat16, not {model.compute_dtype.value}; use auto"
        )
    if (most := most_patches(model.image)) is not None:
        errors.append(
            f"model.attention={method.value} knows no mask, which model.image.max_patches={most} needs; use auto or xla"
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
    """Return what is wrong with the prediction of captions and the weights of the losses."""
    model, loss, default, errors = config.model, config.loss, LossConfig(), []
    if loss.contrastive_weight == loss.caption_weight == 0:
        errors.append("loss.contrastive_weight and loss.caption_weight are both 0: nothing would be learned")
    if (model.caption is None) != (loss.caption_weight == 0):
        errors.append(
            f"loss.caption_weight={loss.caption_weight} needs model.caption, a DecoderConfig or BagOfWordsConfig, and "
            "model.caption needs a weight"
        )
    if loss.contrastive_weight == 0:
        ignored = ("kind", "same_pair", "label_smoothing", "distill_from", "tile", "method")
        errors += [
            f"loss.{name} would be ignored with loss.contrastive_weight=0; leave it out"
            for name in ignored
            if getattr(loss, name) != getattr(default, name)
        ]
    return errors + ([] if model.caption is None else model.caption.errors("model.caption", model.text))
