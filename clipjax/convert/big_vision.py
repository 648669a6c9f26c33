"""big_vision's SigLIP (google-research/big_vision): `.npz` files without a config, whose names are paths of Flax.

Layers may lie one by one (`encoderblock_3`) or stacked (`encoderblock`); `table` takes which.
"""

from collections.abc import Sequence

from clipjax.config import ModelConfig, TextTransformerConfig, ViTConfig, most_patches
from clipjax.convert.huggingface import check_known, is_siglip
from clipjax.convert.rules import Rule, Table, rule


def table(config: ModelConfig, *, stacked: bool) -> Table:
    """Build the table of their arrays and ours.

    Args:
        config: the model, a SigLIP.
        stacked: whether all layers of a tower are one array.

    Raises:
        ValueError: they have no such model.
    """
    check_known(config)
    image, text = config.image, config.text
    if not is_siglip(config) or most_patches(config.image) is not None:
        raise ValueError("model: only SigLIP's models are read from big_vision; choose one of them with --model")
    assert isinstance(image, ViTConfig)
    assert isinstance(text, TextTransformerConfig)
    img, txt, head = "params/img", "params/txt", "params/img/MAPHead_0"
    found = [
        rule(f"{img}/embedding/kernel", "image/patch_embed/kernel", "h w c o -> h w c o"),
        rule(f"{img}/embedding/bias", "image/patch_embed/bias", "o -> o"),
        rule(f"{img}/pos_embedding", "image/pos_embed", "1 p w -> p w"),
        *_blocks(f"{img}/Transformer", "image/transformer/blocks", image.depth, stacked),
        *_norm(f"{img}/Transformer/encoder_norm", "image/ln_post"),
        rule(f"{head}/probe", "image/pool/probe", "1 q w -> q w"),
        *(
            rule(f"{head}/MultiHeadDotProductAttention_0/{theirs}/{kind}", f"image/pool/attn/{ours}/{kind}", pattern)
            for theirs, ours in (("query", "q"), ("key", "k"), ("value", "v"))
            for kind, pattern in (("kernel", "w n d -> w n d"), ("bias", "n d -> n d"))
        ),
        rule(f"{head}/MultiHeadDotProductAttention_0/out/kernel", "image/pool/attn/out/kernel", "n d w -> n d w"),
        rule(f"{head}/MultiHeadDotProductAttention_0/out/bias", "image/pool/attn/out/bias", "w -> w"),
        *_norm(f"{head}/LayerNorm_0", "image/pool/ln"),
        *_mlp(f"{head}/MlpBlock_0", "image/pool/mlp", ()),
        rule(f"{txt}/Embed_0/embedding", "text/token_embed", "v w -> v w"),
        rule(f"{txt}/pos_embedding", "text/pos_embed", "1 p w -> p w"),
        *_blocks(f"{txt}/Encoder_0", "text/transformer/blocks", text.depth, stacked),
        *_norm(f"{txt}/Encoder_0/encoder_norm", "text/ln_final"),
        rule(f"{txt}/head/kernel", "text/proj/kernel", "w e -> w e"),
        rule(f"{txt}/head/bias", "text/proj/bias", "e -> e"),
        rule("params/t", "log_logit_scale", "1 ->"),
        rule("params/b", "logit_bias", "1 ->"),
    ]
    return Table(found, {})


def _norm(theirs: str, ours: str, layers: Sequence[int] = (), lead: str = "") -> list[Rule]:
    pattern = f"{lead}w -> {lead}w"
    return [rule(f"{theirs}/{name}", f"{ours}/{name}", pattern, layers) for name in ("scale", "bias")]


def _mlp(theirs: str, ours: str, layers: Sequence[int], lead: str = "") -> list[Rule]:
    patterns = {"kernel": f"{lead}i o -> {lead}i o", "bias": f"{lead}o -> {lead}o"}
    return [
        rule(f"{theirs}/Dense_{number}/{kind}", f"{ours}/{name}/{kind}", pattern, layers)
        for number, name in enumerate(("fc_in", "fc_out"))
        for kind, pattern in patterns.items()
    ]


def _blocks(theirs: str, ours: str, depth: int, stacked: bool) -> list[Rule]:
    """Return the rules of a stack of blocks. Stacked arrays have their axis of layers; single ones get it here."""
    layers = () if stacked else range(depth)
    block = f"{theirs}/encoderblock" if stacked else f"{theirs}/encoderblock_{{layer}}"
    attn = f"{block}/MultiHeadDotProductAttention_0"
    qkv = ("query", "key", "value")
    part = "t l" if stacked else "l t"
    return [
        *_norm(f"{block}/LayerNorm_0", f"{ours}/ln_1", layers, "l "),
        *_norm(f"{block}/LayerNorm_1", f"{ours}/ln_2", layers, "l "),
        rule(
            [f"{attn}/{name}/kernel" for name in qkv], f"{ours}/attn/qkv/kernel", f"{part} w n d -> l w t n d", layers
        ),
        rule([f"{attn}/{name}/bias" for name in qkv], f"{ours}/attn/qkv/bias", f"{part} n d -> l t n d", layers),
        rule(f"{attn}/out/kernel", f"{ours}/attn/out/kernel", "l n d w -> l n d w", layers),
        rule(f"{attn}/out/bias", f"{ours}/attn/out/bias", "l w -> l w", layers),
        *_mlp(f"{block}/MlpBlock_0", f"{ours}/mlp", layers, "l "),
    ]
