"""open_clip's weights (mlfoundations/open_clip) and OpenAI's, which have the same names: their names to ours."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from clipjax.config import (
    DecoderConfig,
    ImagePool,
    ModelConfig,
    Projection,
    ResNetConfig,
    TextPool,
    TextTransformerConfig,
    ViTConfig,
)
from clipjax.convert.open_clip_limits import check_known
from clipjax.convert.rules import Rule, Table, attention, attention_bias, heads_out, linear, norm, rule

OPENAI_SIZES: dict[str, Callable[[], np.ndarray] | None] = dict.fromkeys(
    ("input_resolution", "context_length", "vocab_size")
)
"""Numbers among the arrays of OpenAI's own files; the config says them already, and they are not written."""


def table(config: ModelConfig, *, custom_text: bool, weights: Mapping[str, np.ndarray] = MappingProxyType({})) -> Table:
    """Build the table of their arrays and ours.

    Args:
        config: the model.
        custom_text: whether the text tower lies in `text.`, as in their `CustomTextCLIP`.
        weights: their arrays, where they are read: the same model may have other names or shapes.

    Raises:
        ValueError: they have no such model.
    """
    check_known(config)
    image, text = config.image, config.text
    assert isinstance(text, TextTransformerConfig)
    sizes = {"two": 2, "three": 3, "n": image.num_heads, "m": text.num_heads}
    more: list[Rule] = []
    if isinstance(image, ViTConfig) and image.pool is ImagePool.QUERIES:
        sizes["queries"] = image.query_heads
        more += _query_pool_rules(image, config.embed_dim)
    if isinstance(config.caption, DecoderConfig):
        sizes["captions"] = config.caption.num_heads
        more += _decoder_rules(config.caption)
    scalars = [_scalar("logit_scale", "log_logit_scale", weights)]
    if config.init_logit_bias is not None:
        scalars.append(_scalar("logit_bias", "logit_bias", weights))
    text_rules = _text_rules(text, "text." if custom_text else "")
    if isinstance(image, ResNetConfig):
        return Table([*_resnet_rules(image), *text_rules, *scalars], sizes, _counters(image) | OPENAI_SIZES)
    image_rules = _trunk_rules(image, weights) if image.pool is ImagePool.ATTENTION else _vit_rules(image)
    return Table([*image_rules, *text_rules, *more, *scalars], sizes, OPENAI_SIZES)


def _scalar(theirs: str, ours: str, weights: Mapping[str, np.ndarray]) -> Rule:
    """Return the rule of a number, which their option `nonscalar_logit_scale` keeps as an array of one."""
    return rule(theirs, ours, "1 ->" if theirs in weights and weights[theirs].ndim else "->")


def _blocks(theirs: str, ours: str, depth: int, n: str) -> list[Rule]:
    layers, block = range(depth), f"{theirs}.{{layer}}"
    qkv = f"{ours}/attn/qkv"
    return [
        *norm(f"{block}.ln_1", f"{ours}/ln_1", layers),
        *norm(f"{block}.ln_2", f"{ours}/ln_2", layers),
        rule(f"{block}.attn.in_proj_weight", f"{qkv}/kernel", f"l (three {n} d) w -> l w three {n} d", layers),
        rule(f"{block}.attn.in_proj_bias", f"{qkv}/bias", f"l (three {n} d) -> l three {n} d", layers),
        *heads_out(f"{block}.attn.out_proj", f"{ours}/attn/out", n, layers),
        *linear(f"{block}.mlp.c_fc", f"{ours}/mlp/fc_in", layers),
        *linear(f"{block}.mlp.c_proj", f"{ours}/mlp/fc_out", layers),
    ]


def _text_rules(tower: TextTransformerConfig, prefix: str) -> list[Rule]:
    behind = [rule(f"{prefix}cls_emb", "text/class_embed", "w -> w")] if tower.pool is TextPool.CLASS else []
    found = [
        *behind,
        rule(f"{prefix}token_embedding.weight", "text/token_embed", "v w -> v w"),
        rule(f"{prefix}positional_embedding", "text/pos_embed", "p w -> p w"),
        *_blocks(f"{prefix}transformer.resblocks", "text/transformer/blocks", tower.depth, "m"),
        *norm(f"{prefix}ln_final", "text/ln_final"),
    ]
    match tower.projection:
        case Projection.LINEAR:
            found.append(rule(f"{prefix}text_projection", "text/proj/kernel", "w e -> w e"))
        case Projection.AFFINE:
            found += linear(f"{prefix}text_projection", "text/proj")
    return found


def _vit_rules(tower: ViTConfig) -> list[Rule]:
    return [
        rule("visual.conv1.weight", "image/patch_embed/kernel", "o c h w -> h w c o"),
        rule("visual.class_embedding", "image/class_embed", "w -> w"),
        rule("visual.positional_embedding", "image/pos_embed", "p w -> p w"),
        *(norm("visual.ln_pre", "image/ln_pre") if tower.ln_pre else []),
        *_blocks("visual.transformer.resblocks", "image/transformer/blocks", tower.depth, "n"),
        *norm("visual.ln_post", "image/ln_post"),
        rule("visual.proj", "image/proj/kernel", "w e -> w e"),
    ]


def _query_pool_rules(tower: ViTConfig, embed_dim: int) -> list[Rule]:
    """Return the rules of pooling by queries; PyTorch splits query, key and value if their inputs differ in width."""
    pool, attn = "visual.attn_pool", "image/pool/attn"
    if tower.width == embed_dim:
        weights = attention(f"{pool}.attn", attn, "queries")
    else:
        weights = [
            *(
                rule(f"{pool}.attn.{name}_proj_weight", f"{attn}/{name}/kernel", "(queries d) w -> w queries d")
                for name in "qkv"
            ),
            attention_bias(f"{pool}.attn", attn, "queries"),
            *heads_out(f"{pool}.attn.out_proj", f"{attn}/out", "queries"),
        ]
    return [
        rule(f"{pool}.query", "image/pool/queries", "q w -> q w"),
        *weights,
        *norm(f"{pool}.ln_q", "image/pool/ln_q"),
        *norm(f"{pool}.ln_k", "image/pool/ln_k"),
    ]


def _decoder_rules(tower: DecoderConfig) -> list[Rule]:
    layers, ours = range(tower.depth), "caption/layers"
    cross = "text_decoder.cross_attn.{layer}"
    return [
        *_blocks("text_decoder.resblocks", f"{ours}/text", tower.depth, "captions"),
        *norm(f"{cross}.ln_1", f"{ours}/ln_1", layers),
        *norm(f"{cross}.ln_1_kv", f"{ours}/ln_image", layers),
        *norm(f"{cross}.ln_2", f"{ours}/ln_2", layers),
        *attention(f"{cross}.attn", f"{ours}/cross_attn", "captions", layers),
        *linear(f"{cross}.mlp.c_fc", f"{ours}/mlp/fc_in", layers),
        *linear(f"{cross}.mlp.c_proj", f"{ours}/mlp/fc_out", layers),
        *norm("text_decoder.ln_final", "caption/ln_final"),
        rule("text_decoder.text_projection", "caption/proj/kernel", "w v -> w v"),
    ]


def _trunk_rules(tower: ViTConfig, weights: Mapping[str, np.ndarray]) -> list[Rule]:
    """Return the rules of timm's ViT with attention pooling, as in their SigLIPs."""
    trunk, layers, ours = "visual.trunk", range(tower.depth), "image/transformer/blocks"
    block = f"{trunk}.blocks.{{layer}}"
    pool = f"{trunk}.attn_pool"
    return [
        rule(f"{trunk}.patch_embed.proj.weight", "image/patch_embed/kernel", "o c h w -> h w c o"),
        rule(f"{trunk}.patch_embed.proj.bias", "image/patch_embed/bias", "o -> o"),
        rule(f"{trunk}.pos_embed", "image/pos_embed", "1 p w -> p w"),
        *norm(f"{block}.norm1", f"{ours}/ln_1", layers),
        *norm(f"{block}.norm2", f"{ours}/ln_2", layers),
        rule(f"{block}.attn.qkv.weight", f"{ours}/attn/qkv/kernel", "l (three n d) w -> l w three n d", layers),
        rule(f"{block}.attn.qkv.bias", f"{ours}/attn/qkv/bias", "l (three n d) -> l three n d", layers),
        *heads_out(f"{block}.attn.proj", f"{ours}/attn/out", "n", layers),
        *linear(f"{block}.mlp.fc1", f"{ours}/mlp/fc_in", layers),
        *linear(f"{block}.mlp.fc2", f"{ours}/mlp/fc_out", layers),
        *norm(f"{trunk}.norm", "image/ln_post"),
        rule(f"{pool}.latent", "image/pool/probe", "1 q w -> q w"),
        rule(f"{pool}.q.weight", "image/pool/attn/q/kernel", "(n d) w -> w n d"),
        rule(f"{pool}.q.bias", "image/pool/attn/q/bias", "(n d) -> n d"),
        rule(
            f"{pool}.kv.weight",
            ("image/pool/attn/k/kernel", "image/pool/attn/v/kernel"),
            "(two n d) w -> two w n d",
        ),
        rule(f"{pool}.kv.bias", ("image/pool/attn/k/bias", "image/pool/attn/v/bias"), "(two n d) -> two n d"),
        *heads_out(f"{pool}.proj", "image/pool/attn/out", "n"),
        *norm(f"{pool}.norm", "image/pool/ln"),
        *linear(f"{pool}.mlp.fc1", "image/pool/mlp/fc_in"),
        *linear(f"{pool}.mlp.fc2", "image/pool/mlp/fc_out"),
        *_trunk_projection(tower, weights),
    ]


def _trunk_projection(tower: ViTConfig, weights: Mapping[str, np.ndarray]) -> list[Rule]:
    """Return the projection behind timm's tower: open_clip's own, or without `timm_proj` timm's classifier."""
    kernel, *bias = linear(
        "visual.trunk.head" if "visual.trunk.head.weight" in weights else "visual.head.proj", "image/proj"
    )
    match tower.projection:
        case Projection.NONE:
            return []
        case Projection.LINEAR:
            return [kernel]
        case Projection.AFFINE:
            return [kernel, *bias]


def _resnet_rules(tower: ResNetConfig) -> list[Rule]:
    found: list[Rule] = []
    for number in (1, 2, 3):
        found += _convolution(f"visual.conv{number}", f"image/conv_{number}")
        found += _batch_norm(f"visual.bn{number}", f"bn_{number}")
    for stage, depth in enumerate(tower.layers, start=1):
        theirs, first, rest = f"visual.layer{stage}", f"stage_{stage}_first", f"stage_{stage}"
        found += _convolution(f"{theirs}.0.downsample.0", f"image/{first}/downsample")
        found += _batch_norm(f"{theirs}.0.downsample.1", f"{first}/bn_downsample")
        for number in (1, 2, 3):
            found += _convolution(f"{theirs}.0.conv{number}", f"image/{first}/conv_{number}")
            found += _batch_norm(f"{theirs}.0.bn{number}", f"{first}/bn_{number}")
            if layers := range(1, depth):
                found += _convolution(f"{theirs}.{{layer}}.conv{number}", f"image/{rest}/conv_{number}", layers)
                found += _batch_norm(f"{theirs}.{{layer}}.bn{number}", f"{rest}/bn_{number}", layers)
    pool = "visual.attnpool"
    found.append(rule(f"{pool}.positional_embedding", "image/pool/pos_embed", "p w -> p w"))
    for name in "qkv":
        found.append(rule(f"{pool}.{name}_proj.weight", f"image/pool/attn/{name}/kernel", "(n d) w -> w n d"))
        found.append(rule(f"{pool}.{name}_proj.bias", f"image/pool/attn/{name}/bias", "(n d) -> n d"))
    return [*found, *heads_out(f"{pool}.c_proj", "image/pool/attn/out", "n")]


def _convolution(theirs: str, ours: str, layers: Sequence[int] = ()) -> list[Rule]:
    lead = "l " if layers else ""
    return [rule(f"{theirs}.weight", f"{ours}/kernel", f"{lead}o c h w -> {lead}h w c o", layers)]


def _batch_norm(theirs: str, ours: str, layers: Sequence[int] = ()) -> list[Rule]:
    lead = "l " if layers else ""
    return [
        *norm(theirs, f"image/{ours}", layers),
        rule(f"{theirs}.running_mean", f"batch_stats/{ours}/mean", f"{lead}c -> {lead}c", layers),
        rule(f"{theirs}.running_var", f"batch_stats/{ours}/variance", f"{lead}c -> {lead}c", layers),
    ]


def _counters(tower: ResNetConfig) -> dict[str, Callable[[], np.ndarray] | None]:
    """Name the counters of batches that PyTorch's BatchNorm keeps; nothing reads them at a fixed momentum."""
    norms = [f"visual.bn{number}" for number in (1, 2, 3)]
    for stage, depth in enumerate(tower.layers, start=1):
        norms.append(f"visual.layer{stage}.0.downsample.1")
        norms += [f"visual.layer{stage}.{block}.bn{number}" for block in range(depth) for number in (1, 2, 3)]
    return {f"{name}.num_batches_tracked": lambda: np.zeros((), np.int64) for name in norms}
